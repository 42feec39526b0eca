"""What happens before a model is loaded: errors, refusals, and a plugin that is loaded once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError
from dwl_plugin.hosts.incompatible import REFUSALS
from tests.hosts.harness import AXOLOTL, rows, train, write_rows

Configure = Callable[..., dict[str, Any]]


def problems_of(settings: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        train(settings)
    return {problem.path: str(problem) for problem in caught.value.problems}


@pytest.mark.usefixtures("no_model")
def test_what_the_schema_sees_is_reported_whole_and_nothing_is_written(configure: Configure, tmp_path: Path) -> None:
    found = problems_of(configure(loss="dwl", use_dft=True, dwl={"classes": {"a": {"regex": "("}}, "alpha": {"b": 1}}))
    assert {"dwl.classes.a.regex", "dwl.alpha.b", "dwl.alpha", "use_dft"} == set(found)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("no_model")
def test_an_anchor_is_refused_where_the_base_model_would_see_a_part_of_each_sequence(configure: Configure) -> None:
    settings = configure(loss="dft", dft={"anchor": 0.1}, adapter="lora", deepspeed="zero2.json", context_parallel_size=2)
    assert "eval mode" in problems_of(settings)["dft.anchor"]


@pytest.mark.usefixtures("no_model")
def test_what_the_tokenizer_sees_is_reported_whole(configure: Configure, tmp_path: Path) -> None:
    classes = {"many": {"tokens": ["<think>"]}, "outside": {"token_ids": [5, 4000]}, "shadowed": {"token_ids": [5]}}
    found = problems_of(configure(loss="dwl", dwl={"classes": classes}))
    assert "not one token" in found["dwl.classes.many.tokens[0]"]
    assert "400" in found["dwl.classes.outside.token_ids[1]"]
    assert not list((tmp_path / "run").glob("checkpoint*"))


@pytest.fixture
def without_bytes(model_folder: Path, tmp_path: Path) -> Path:
    """The model with a tokenizer whose decoder says nothing about bytes."""
    folder = Path(shutil.copytree(model_folder, tmp_path / "without bytes"))
    file = folder / "tokenizer.json"
    ctc = {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": False}
    file.write_text(json.dumps({**json.loads(file.read_text()), "decoder": ctc}))
    return folder


@pytest.mark.usefixtures("no_model")
def test_where_no_bytes_are_known_every_class_by_text_is_named(configure: Configure, without_bytes: Path) -> None:
    classes = {
        "number": {"regex": r"\d+"},
        "end": {"special": True},
        "both": {"all": [{"turn": 1}, {"between": ["<think>", "</think>"]}]},
    }
    found = problems_of(configure(model=without_bytes, loss="dwl", dwl={"classes": classes}))
    assert set(found) == {"dwl.classes.number", "dwl.classes.both"}
    for problem in found.values():
        assert "does not tell the bytes of its tokens: its decoder has CTC" in problem
        assert "token_ids" in problem


def test_where_no_bytes_are_known_classes_by_token_are_trained(configure: Configure, without_bytes: Path) -> None:
    classes = {"end": {"special": True}, "five": {"token_ids": [5], "allow_empty": True}}
    run = train(configure(model=without_bytes, loss="dwl", dwl={"classes": classes}, max_steps=1))
    assert run.logged("dwl/token_share/end")[0] > 0


@pytest.mark.usefixtures("no_model")
def test_a_class_that_matches_nothing_stops_the_run_before_the_model(configure: Configure) -> None:
    dwl = {"classes": {"code": {"regex": "```"}, "number": {"regex": r"\d+"}}}
    found = problems_of(configure(loss="dwl", dwl=dwl))
    assert set(found) == {"dwl.classes.code"}
    assert "40 rows" in found["dwl.classes.code"]
    assert "allow_empty" in found["dwl.classes.code"]


TO = {"number": 3, "rest": 1}
UNPLACEABLE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an epoch of a stream": ({"streaming": True}, {"controller": {"type": "rlw", "warmup": "1ep"}}, "dwl.controller.warmup"),
    "an order that the length decides": (
        {"max_steps": 10},
        {"schedule": {"type": "keyframes", "at": {"50%": TO, 4: TO}}},
        "dwl.schedule.at.4",
    ),
    "an order that the epoch decides": (
        {"max_steps": 10},
        {"schedule": {"type": "linear", "to": TO, "start": "2ep", "end": 9}},
        "dwl.schedule.end",
    ),
}


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", UNPLACEABLE)
def test_positions_that_the_run_cannot_place_stop_it_before_the_model(configure: Configure, data_file: Path, name: str) -> None:
    host, more, path = UNPLACEABLE[name]
    dwl = {"classes": {"number": {"regex": r"\d+"}}, **more}
    source = [{"path": str(data_file), "ds_type": "json", "type": "chat_template"}]
    assert set(problems_of(configure(loss="dwl", dwl=dwl, datasets=source, **host))) == {path}


@pytest.mark.usefixtures("no_model")
def test_positions_of_dft_without_classes_stop_it_before_the_model(configure: Configure) -> None:
    keyframes = {"type": "keyframes", "at": {"50%": {"exponent": 0}, 1: {"exponent": 1}}}
    found = problems_of(configure(loss="dft", dft={"schedule": keyframes}, max_steps=8))
    assert set(found) == {"dft.schedule.at.1"}


def test_an_empty_class_may_be_allowed(configure: Configure) -> None:
    run = train(configure(loss="dwl", dwl={"classes": {"code": {"regex": "```", "allow_empty": True}}}, max_steps=1))
    assert run.logged("dwl/token_share/code") == [0.0]
    assert not run.logged("dwl/nll/code")


REFUSED = {
    "use_dft": True,
    "use_eaft": True,
    "liger_use_token_scaling": True,
    "label_smoothing_factor": 0.1,
    "label_smoothing": 0.1,
    "orpo_alpha": 0.1,
    "rl": "dpo",
    "reward_model": True,
    "process_reward_model": True,
    "diffusion": {"noise_schedule": "cosine"},
    "kd_trainer": True,
    "kd_ce_alpha": 0.1,
    "ebft": {"x": 1},
    "hatchery": {"x": 1},
    "llmcompressor": {"x": 1},
    "diffusion_lm": {"x": 1},
    "diffusion_decision": {"x": 1},
    "do_bench_eval": True,
}


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_keys_that_change_the_objective_are_refused_with_both_names(configure: Configure, key: str) -> None:
    found = problems_of(configure(loss="dft", **{key: REFUSED[key]}))
    assert "loss: dft" in found[key]


def test_every_refusal_is_tried() -> None:
    """Those with a name of their own depend on more than the key: `test_options.py`."""
    assert {refusal.key for refusal in REFUSALS if not refusal.name} == set(REFUSED)


@pytest.mark.parametrize("name", ["kd.KDPlugin", "diffusion.DiffusionPlugin", "llm_compressor.LLMCompressorPlugin"])
def test_plugins_that_change_the_objective_are_refused(name: str) -> None:
    from dwl_plugin.hosts.incompatible import refused

    cfg = {"plugins": ["dwl_plugin.DWLPlugin", f"axolotl.integrations.{name}"]}
    assert [problem.path for problem in refused(cfg, "dwl")] == ["plugins"]


def test_keys_set_to_off_are_not_refused(configure: Configure) -> None:
    run = train(configure(loss="dft", use_dft=False, label_smoothing_factor=0.0, max_steps=1))
    assert run.logged("nll")


def load(settings: dict[str, Any]) -> Any:
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    return load_cfg(DictDefault(settings))


@pytest.mark.parametrize(
    "plugins",
    [
        ["dwl_plugin.DWLPlugin"],
        *(
            pytest.param(way, marks=pytest.mark.skipif(AXOLOTL < (0, 21), reason="Axolotl 0.21 is the first to find plugins"))
            for way in (None, ["dwl_plugin:DWLPlugin"])
        ),
    ],
)
def test_the_plugin_is_loaded_once_with_or_without_its_line(configure: Configure, plugins: list[str] | None) -> None:
    from axolotl.integrations.base import PluginManager

    cfg = load(configure(plugins=plugins, loss="dft"))
    ours = [plugin for plugin in PluginManager.get_instance().plugins.values() if type(plugin).__name__ == "DWLPlugin"]
    assert len(ours) == 1
    assert cfg.loss == "dft"


def test_a_config_survives_the_hosts_loader_twice(configure: Configure) -> None:
    dwl = {
        "classes": {"soft": {"token_ids": [1, "4-9"], "token_loss": "dft", "dft": {"exponent": 0.3}}},
        "alpha": {"soft": 1, "rest": 3},
        "schedule": {"type": "cosine", "to": {"soft": 3, "rest": 1}, "start": "10%", "end": 90},
    }
    settings = configure(loss="dwl", dwl=dwl)
    once = load(settings)
    # the way Axolotl writes its validated config down; the keys are sorted, so all of them have to be strings
    written = json.loads(json.dumps(once.to_dict(), sort_keys=True, default=str))
    again = load({**settings, **{key: written[key] for key in ("loss", "dwl")}})
    assert once.dwl.to_dict() == again.dwl.to_dict()
    assert parse(again.to_dict()) == parse({"loss": "dwl", "dwl": dwl})


def test_without_a_loss_key_the_hosts_trainer_is_untouched(configure: Configure) -> None:
    run = train(configure(max_steps=1))
    assert type(run.trainer).__name__ == "AxolotlTrainer"
    assert "forward" not in run.trainer.model.get_output_embeddings().__dict__
    assert not any(key.startswith("dwl") or key == "nll" for entry in run.history for key in entry)


def test_a_loss_that_somebody_else_computed_stops_the_run(configure: Configure) -> None:
    from dwl_plugin.errors import LossNotTakenError

    def steal(trainer: Any) -> None:
        trainer.model.loss_function = lambda logits, labels, **kwargs: logits.detach().float().mean() * 0.0

    with pytest.raises(LossNotTakenError, match="did not compute"):
        train(configure(loss="dft", max_steps=1), before=steal)


def test_keyframes_written_as_numbers_survive_the_hosts_sorted_dump(configure: Configure) -> None:
    frames = {200: {"rest": 1}, "50%": {"rest": 1}}
    cfg = load(configure(loss="dwl", dwl={"schedule": {"type": "keyframes", "at": frames}}))
    written = json.loads(json.dumps(cfg.to_dict(), sort_keys=True, default=str))
    assert list(cfg.dwl.schedule.at) == ["200", "50%"]
    assert parse(written) == parse({"loss": "dwl", "dwl": {"schedule": {"type": "keyframes", "at": frames}}})


@pytest.mark.parametrize("key", ["datasets", "test_datasets"])
def test_a_row_that_cannot_be_tokenised_is_named_before_a_model_is_loaded(configure: Configure, tmp_path: Path, key: str) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*rows(3), {"messages": []}, *rows(3)])
    entry = [{"path": str(bad), "type": "chat_template", "split": "train"}]
    settings = configure(loss="dft", **{key: entry}, dataset_prepared_path=str(tmp_path / "prepared"))
    with pytest.raises(ConfigError, match=r"row 4 of .*bad\.jsonl: its `messages` is empty"):
        train(settings)


def test_a_weight_that_axolotl_makes_1_of_is_said_once_at_the_start(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = [{"type": "text", "text": "It is"}, {"type": "text", "text": " 7.", "weight": 0.3}]
    weighed = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": content}]}
    data = write_rows(tmp_path / "weighed.jsonl", [*rows(3), weighed, weighed])
    for written, lines in (({}, 1), ({"dwl": {"data_weights": False}}, 0)):
        capsys.readouterr()
        train(configure(data=data, loss="nll", max_steps=1, out=tmp_path / str(lines), **written))
        said = [line for line in capsys.readouterr().out.splitlines() if "as 1" in line]
        assert len(said) == lines
        if said:
            assert f"[dwl] {data}, row 4, messages[1].content[1]: Axolotl trains `weight: 0.3` as 1; write" in said[0]


@pytest.mark.usefixtures("no_model")
def test_a_factor_that_is_not_finite_stops_the_run_though_its_reader_makes_null_of_it(configure: Configure, tmp_path: Path) -> None:
    answers = [{"role": "assistant", "content": "7", "weight": weight} for weight in (0.5, float("nan"))]
    weighed = [{"messages": [{"role": "user", "content": "NaN: NaN Infinity?"}, answer]} for answer in answers]
    data = write_rows(tmp_path / "weighed.jsonl", [*rows(3), *weighed])
    (said,) = problems_of(configure(data=data, loss="nll", dwl={"data_weights": True})).values()
    assert "row 5 of" in said
    assert "`messages[1].weight`: has to be finite" in said
