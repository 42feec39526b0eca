"""`dwl check`: every mistake in one run, what the classes are, and nothing done that nobody asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from dwl_plugin.cli import quickstart
from dwl_plugin.cli.quickstart.problems import generate, with_mistakes, write_jsonl
from dwl_plugin.config import parse
from dwl_plugin.run.dataset_check import picked_rows
from tests.hosts import harness
from tests.test_example_configs import EXAMPLES, each, with_local_data

Check = Callable[..., Result]
Write = Callable[..., Path]

CLASSES = {"control": {"tokens": ["<|im_end|>"]}, "number": {"regex": r"\d+"}}


def findings(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def paths(result: Result) -> set[str]:
    return {problem["path"] for problem in findings(result)["problems"]}


def targets_of(model: Path, rows: list[dict[str, Any]]) -> int:
    """The assistant's own text and the token that ends the turn, counted without the host."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return sum(len(tokenizer.encode(row["messages"][1]["content"])) + 1 for row in rows)


def test_the_classes_of_a_good_config(dwl: Check, write_config: Write, little_model: Path) -> None:
    rows = harness.rows(40)
    alpha = {"control": 2, "number": 1, "rest": 1}
    config = write_config(loss="dwl", dwl={"classes": CLASSES, "alpha": alpha, "reduction": "weighted_mean"})
    result = dwl("check", config, "--json")
    assert result.exit_code == 0, result.output
    found = findings(result)
    targets = targets_of(little_model, rows)
    assert (found["rows"], found["targets"], found["problems"]) == (40, targets, [])
    control, number, rest = found["classes"]
    assert (control["tokens"], control["rows_without"]) == (40, 0)
    assert number["tokens"] + rest["tokens"] == targets - 40
    # weighted_mean: a token counts α over the mean α of all tokens
    mean = (0.5 * 40 + 0.25 * (targets - 40)) / targets
    assert control["one_token_vs_sft"] == pytest.approx(0.5 / mean)
    assert control["weight_share"] == pytest.approx(0.5 * 40 / targets / mean)
    assert found["overlaps"] == []


def test_what_a_person_reads(dwl: Check, write_config: Write) -> None:
    classes = {"odd": {"regex": r"\d*[13579]"}, **CLASSES}
    result = dwl("check", write_config(loss="dwl", dwl={"classes": classes}))
    assert result.exit_code == 0
    for words in (
        "target tokens in 40 rows",
        "one token, vs SFT",
        "Tokens that two classes match",
        "odd and number: ",
        "No problem found.",
    ):
        assert words in result.output


SIX = {
    "loss": "dwl",
    "use_dft": True,
    "micro_batch_size": "many",
    "learning_rate": "fast",
    "dwl": {
        "classes": {
            "broken": {"regex": r"\d+("},
            "several_tokens": {"tokens": ["<think>"]},
            "empty": {"regex": "no such words"},
            "number": {"regex": r"\d+"},
        },
        "alpha": {"nubmer": 1, "rest": 1},
        "reduction": "mean",
    },
}


def test_mistakes_of_every_kind_are_reported_at_once(dwl: Check, write_config: Write) -> None:
    """The schema's, the host's, a conflict of keys, one that only the tokenizer sees, one that only the data shows."""
    result = dwl("check", write_config(**SIX), "--json")
    assert result.exit_code == 1
    assert paths(result) == {
        "use_dft",
        "micro_batch_size",
        "learning_rate",
        "dwl.classes.broken.regex",
        "dwl.classes.several_tokens.tokens[0]",
        "dwl.classes.empty",
        "dwl.alpha.nubmer",
        "dwl.alpha",
        "dwl.reduction",
    }


def test_a_config_without_a_loss_is_told_so(dwl: Check, write_config: Write) -> None:
    result = dwl("check", write_config())
    assert result.exit_code == 1
    assert "this config has no `loss`" in result.output


def test_a_loss_that_no_plugin_computes_is_a_problem(dwl: Check, write_config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.integrations import base

    monkeypatch.setattr(base, "get_builtin_plugins", lambda: ())
    config = write_config(loss="dft", plugins=None)
    result = dwl("check", config, "--json")
    assert "plugins" in paths(result)


def test_a_plugin_that_is_only_installed_gets_a_hint(dwl: Check, write_config: Write) -> None:
    found = findings(dwl("check", write_config(loss="dft", plugins=None), "--json"))
    assert found["problems"] == []
    assert any("dwl_plugin.DWLPlugin" in hint for hint in found["hints"])


def test_a_key_that_axolotl_drops_gets_a_hint(dwl: Check, write_config: Write) -> None:
    found = findings(dwl("check", write_config(loss="dft", learnin_rate=1e-4), "--json"))
    assert any("learnin_rate" in hint and "learning_rate" in hint for hint in found["hints"])


def test_what_the_environment_overrides_is_what_is_checked(
    dwl: Check, write_config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(loss="dwl", dwl={"classes": CLASSES, "alpha": {"control": 2, "number": 1, "rest": 1}})
    monkeypatch.setenv("DWL_OVERRIDES", "dwl.alpha.control=6")
    found = findings(dwl("check", config, "--json"))
    assert found["classes"][0]["alpha"] == 0.75
    assert any("DWL_OVERRIDES" in note for note in found["notes"])
    monkeypatch.setenv("DWL_OVERRIDES", "dwl.alpha.contrl=6")
    assert paths(dwl("check", config, "--json")) == {"dwl.alpha.contrl"}


def test_nothing_is_written_and_no_weights_are_read(dwl: Check, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(little_model, bare)
    (bare / "model.safetensors").write_bytes(b"")  # nobody could read it
    config = write_config(model=bare, loss="dwl", dwl={"classes": CLASSES}, val_set_size=0.1)
    before = sorted(tmp_path.rglob("*"))
    assert dwl("check", config).exit_code == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_only_the_rows_asked_for_are_tokenised(dwl: Check, write_config: Write, tmp_path: Path) -> None:
    """They come from all over the data, as those that a run looks at."""
    rows = harness.rows(30)
    (left_out,) = set(range(30)) - set(picked_rows(30, seed=5, most=29))
    rows[left_out] = {"messages": None}
    data = harness.write_rows(tmp_path / "bad.jsonl", rows)
    config = write_config(data=data, loss="dft", shuffle_merged_datasets=False, seed=5)
    assert dwl("check", config, "--samples", 29).exit_code == 0
    assert paths(dwl("check", config, "--samples", 30, "--json")) == {"datasets"}


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_a_rare_class_is_no_mistake_before_as_many_rows_as_a_run_looks_at_are_seen(
    dwl: Check, write_config: Write, command: str
) -> None:
    rare = write_config(loss="dwl", dwl={"classes": {"rare": {"regex": "no such words"}}})
    result = dwl(command, rare, "--samples", 8)
    assert result.exit_code == 0, result.output
    assert "dwl.classes.rare matches nothing" in result.output or command == "inspect"
    assert dwl(command, rare, "--samples", 40).exit_code == 1


def test_six_mistakes_are_reported_at_once(dwl: Check, write_config: Write) -> None:
    classes = {"broken": {"regex": r"\d+("}, "none": {"all": [{"regex": "a"}, {"regxe": "b"}]}, "number": {"regex": r"\d+"}}
    result = dwl(
        "check",
        write_config(
            loss="dwl",
            dwl={
                "pack": "reasonning",
                "classes": classes,
                "alpha": {"broken": 1, "none": 1, "number": -2, "thinking": 1, "rest": 1},
                "schedule": {"type": "linear", "to": {"broken": 1, "none": 1, "number": 1, "rest": -1}},
                "reductoin": "class_mean",
            },
        ),
        "--json",
    )
    assert result.exit_code == 1
    assert paths(result) == {
        "dwl.pack",
        "dwl.classes.broken.regex",
        "dwl.classes.none.all[1]",
        "dwl.alpha.number",
        "dwl.schedule.to.rest",
        "dwl.reductoin",
    }


def test_a_model_that_cannot_be_read_is_one_sentence(dwl: Check, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    import shutil

    config = write_config(model=tmp_path / "nowhere", loss="dft")
    for command in ("check", "preflight"):
        result = dwl(command, config)
        assert result.exit_code == 1, result.output
        assert "1 problem\n  base_model: there is no such folder (got '" in result.output
    broken = tmp_path / "broken"
    shutil.copytree(little_model, broken)
    for file, commands in {"model.safetensors": ["preflight"], "tokenizer.json": ["check", "preflight"]}.items():
        (broken / file).write_text("{nothing")
        for command in commands:
            result = dwl(command, write_config(model=broken, loss="dft"))
            assert result.exit_code == 1, result.output
            assert "cannot be loaded" in result.output


def test_no_folder_is_left_behind(dwl: Check, write_config: Write) -> None:
    from dwl_plugin.hosts import axolotl_preview

    config = write_config(loss="dft")
    folders = []
    for _ in range(2):
        raw = yaml.safe_load(config.read_text())
        folders.append(axolotl_preview.load_cfg(raw, config)[0].output_dir)
    assert folders[0] == folders[1] == axolotl_preview._scratch()


def test_an_unreachable_model_does_not_hide_our_problems(dwl: Check, write_config: Write) -> None:
    classes = {"bad": {"regex": "("}}
    result = dwl("check", write_config(model=Path("nobody/nothing"), loss="dwl", dwl={"classes": classes}), "--json")
    assert result.exit_code == 1
    assert paths(result) == {"dwl.classes.bad.regex"}
    assert any("nobody/nothing" in line for line in findings(result)["not_looked_at"])


def test_data_beside_the_config_is_pointed_at(
    dwl: Check, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(loss="dft", datasets=[{"path": "rows.jsonl", "type": "chat_template"}])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    result = dwl("check", config)
    assert result.exit_code == 1, result.output
    assert "datasets[0].path: there is no such file or folder (got 'rows.jsonl')" in result.output
    assert "lies beside the config" in result.output


def test_code_is_listed_and_not_run_until_it_is_trusted(
    dwl: Check, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "it_ran"
    (tmp_path / "somebodys_module.py").write_text(
        "from pathlib import Path\nfrom axolotl.integrations.base import BasePlugin\n"
        f"Path({str(marker)!r}).touch()\nclass Plugin(BasePlugin): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = write_config(loss="dft", plugins=["dwl_plugin.DWLPlugin", "somebodys_module.Plugin"])
    result = dwl("check", config)
    assert result.exit_code == 2
    assert "plugins[1]" in result.output
    assert "somebodys_module.Plugin" in result.output
    assert "--trust" in result.output
    assert not marker.exists()
    assert "somebodys_module" not in sys.modules
    assert dwl("check", config, "--trust").exit_code == 0
    assert marker.exists()


def test_before_it_is_trusted_our_own_block_is_still_checked(dwl: Check, write_config: Write) -> None:
    config = write_config(loss="dwl", trust_remote_code=True, dwl={"classes": {"bad": {"regex": "("}}})
    result = dwl("check", config, "--json")
    assert result.exit_code == 1
    assert paths(result) == {"dwl.classes.bad.regex"}
    assert [danger["path"] for danger in findings(result)["dangers"]] == ["trust_remote_code"]


def test_before_it_is_trusted_numbers_by_class_are_checked(
    dwl: Check, write_config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line that fetches hides nothing of ours: the classes are in the config."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    config = write_config(model=Path("org/never-seen"), loss="dwl", dwl={"classes": CLASSES, "alpha": {"nubmer": 1, "rest": 1}})
    result = dwl("check", config, "--json")
    assert result.exit_code == 1
    assert [danger["path"] for danger in findings(result)["dangers"]] == ["base_model"]
    assert {"dwl.alpha.nubmer", "dwl.alpha"} <= paths(result)
    good = dwl("check", write_config(model=Path("org/never-seen"), loss="dft"))
    assert good.exit_code == 2
    assert "No problem found" not in good.output
    assert good.output.endswith("No problem in what was: `loss`, `dft` and `dwl`.\n")


def test_before_a_pack_is_fetched_what_does_not_need_it_is_checked(dwl: Check, write_config: Write) -> None:
    block = {"pack": f"hf://user/repo@{'0' * 40}/mine.yml", "reduction": "mean", "alpha": {"perhaps_of_the_pack": 1, "rest": 1}}
    result = dwl("check", write_config(loss="dwl", dwl=block), "--json")
    assert result.exit_code == 1
    assert paths(result) == {"dwl.reduction"}


OWN_DATA = ("quickstart.yml", "dwl-data-weights-qlora.yml")
"""Their rows are made, or written by whoever trains."""


def test_an_example_on_rows_that_are_yet_to_be_written(dwl: Check) -> None:
    result = dwl("check", next(path for path in EXAMPLES if path.name == OWN_DATA[1]), "--json")
    assert result.exit_code == 1
    assert paths(result) == {"datasets[0].path"}


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.name not in OWN_DATA], ids=lambda path: path.name)
def test_an_example_whose_model_is_out_of_reach(dwl: Check, path: Path) -> None:
    result = dwl("check", path)
    assert result.exit_code == 2, result.output
    assert "Not looked at" in result.output
    assert yaml.safe_load(path.read_text())["base_model"] in result.output
    assert result.output.endswith("No problem in what was: `loss`, `dft` and `dwl`.\n")
    assert " problem\n" not in result.output


@each
def test_an_example_on_local_data(dwl: Check, little_model: Path, tmp_path: Path, path: Path) -> None:
    """Nothing is wrong with it, and each of its classes is found that has to be."""
    config = tmp_path / path.name
    settings = with_local_data(path, tmp_path) | {"base_model": str(little_model)}
    config.write_text(yaml.safe_dump(settings, sort_keys=False))
    result = dwl("check", config, "--json")
    assert result.exit_code == 0, result.output
    found = findings(result)
    assert (found["problems"], found["not_looked_at"]) == ([], [])
    block = parse(yaml.safe_load(path.read_text()))
    assert block is not None
    tokens = {figure["name"]: figure["tokens"] for figure in found.get("classes", ())}
    assert tuple(tokens) == (block.class_names if block.labels_tokens else ())
    may_be_empty = {name for name, spec in block.class_configs.items() if spec.allow_empty}
    assert all(count for name, count in tokens.items() if name not in may_be_empty), tokens


def test_the_quickstart_example_on_its_own_data(dwl: Check, little_model: Path, tmp_path: Path) -> None:
    write_jsonl(with_mistakes(generate(64, seed=1), 1, seed=1), tmp_path / "problems.jsonl")
    config = tmp_path / "quickstart.yml"
    config.write_text(quickstart.render(quickstart.template(), little_model, tmp_path, None), encoding="utf-8")
    found = findings(dwl("check", config, "--json"))
    assert found["status"] == 0, found
    classes = {figure["name"]: figure for figure in found["classes"]}
    assert list(classes) == ["mistake", "answer", "number", "reasoning", "end_of_turn", "rest"]
    assert classes["end_of_turn"]["tokens"] == found["rows"]
    assert classes["mistake"]["alpha_end"] == 0
    assert classes["number"]["alpha_end"] == pytest.approx(0.3)


@pytest.mark.parametrize(("number", "form"), [(r"\d+", "--samples=9"), (r"(\d+", "--json")], ids=["good", "bad"])
def test_axolotls_own_command_line(
    dwl: Check, write_config: Write, monkeypatch: pytest.MonkeyPatch, number: str, form: str
) -> None:
    """`axolotl dwl check` is `dwl check`, after Axolotl's banner."""
    from axolotl.cli import main as host

    for effect in ("print_axolotl_text_art", "load_dotenv", "set_pytorch_cuda_alloc_conf", "set_misc_env"):
        monkeypatch.setattr(host, effect, lambda: None)
    config = write_config(loss="dwl", dwl={"classes": {**CLASSES, "number": {"regex": number}}})
    ours = dwl("check", config, form)
    theirs = dwl("dwl", "check", config, form, command=host.cli)
    assert ours.exit_code == (0 if number == r"\d+" else 1)
    assert (theirs.exit_code, theirs.output) == (ours.exit_code, ours.output)
