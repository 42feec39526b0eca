"""`dwl init` and `dwl examples`: every purpose on every card is a config that parses, fits and overwrites nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from itertools import product
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from dwl_plugin.cli.examples import folder
from dwl_plugin.cli.init import CARDS, estimated, written
from dwl_plugin.cli.init.purposes import PURPOSES
from dwl_plugin.cli.main import main
from dwl_plugin.cli.memory import MODELS
from dwl_plugin.config import parse

ROOT = Path(__file__).parents[2]


def dwl(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("purpose", "card"), product(PURPOSES, CARDS))
def test_every_purpose_on_every_card_is_a_config_that_fits(purpose: str, card: str) -> None:
    text = written(purpose, card)
    config = yaml.safe_load(text)
    block = parse(config)
    assert block is not None
    assert block.reduction == ("weighted_mean" if block.loss == "dwl" else "token_mean")
    assert max(map(len, text.splitlines())) <= 120
    model, on = config["base_model"], CARDS[card]
    tokens = config["micro_batch_size"] * config["sequence_len"]
    family = [name for name in MODELS if name.startswith("Qwen/Qwen3-")]
    larger = family[family.index(model) + 1 :]
    assert estimated(model, tokens, on) <= 0.85 * on.gb
    assert all(estimated(other, tokens, on) > 0.85 * on.gb for other in larger)
    assert f"{estimated(model, tokens, on):.1f} GiB" in text
    how = {None: "adapter", "fsdp2": "fsdp_config", "zero3": "deepspeed"}
    assert [key for key in how.values() if key in config] == [how[on.sharded_by]]
    assert config["gradient_accumulation_steps"] * on.ranks == 8


@pytest.mark.parametrize("purpose", ["tool-calls", "json"])
def test_what_has_to_come_out_whole_is_weighted_whole(purpose: str) -> None:
    """With its end: docs/choosing.md advises against a weight on a part."""
    alpha = yaml.safe_load(written(purpose, "8GB"))["dwl"]["alpha"]
    assert {name for name, weight in alpha.items() if weight == 1} == {"control", "rest"}
    assert set(alpha.values()) == {1, 2}


def test_thoughts_are_split_off_only_where_the_template_knows_them() -> None:
    """Others would drop what is handed over beside the content."""
    for model, splits in (("Qwen/Qwen3-4B", True), ("/models/Qwen3-8B", True), ("meta-llama/Llama-3.2-3B", False)):
        for data in ("rows.jsonl", None):
            config = yaml.safe_load(written("reasoning", "12GB", model, data))
            assert config["datasets"][0].get("split_thinking", False) == splits
            assert config.get("chat_template") == ("qwen3" if splits else None)


@pytest.mark.parametrize("purpose", PURPOSES)
def test_the_alpha_of_a_pack_is_the_one_that_it_suggests(purpose: str) -> None:
    """It stands there to be changed; until then it changes nothing."""
    config = yaml.safe_load(written(purpose, "8GB"))
    if "alpha" in (dwl := config.get("dwl", {})):
        packs = dwl["pack"] if isinstance(dwl["pack"], list) else [dwl["pack"]]
        plain = parse({"loss": "dwl", "dwl": {"pack": packs}})
        assert plain is not None
        assert parse(config) == plain


def test_a_model_and_rows_of_one_s_own_are_in_it(tmp_path: Path) -> None:
    result = dwl("init", "--for", "tool-calls", "--card", "12gb", "--data", "my rows.jsonl", "--out", "a.yml")
    assert result.exit_code == 0, result.output
    assert "Qwen/Qwen3-8B" in result.output
    assert re.search(r"not measured: 9\.\d GiB", result.output)
    config = yaml.safe_load((tmp_path / "a.yml").read_text(encoding="utf-8"))
    assert config["datasets"] == [{"path": "my rows.jsonl", "type": "chat_template"}]


@pytest.mark.parametrize("name", ["x/y: z", "null", "Yes", "~", "a#b", "a: b", "1e5", ".inf", 'ein"s', "...", "a\nb: c"])
def test_names_are_text_to_yaml(name: str) -> None:
    config = yaml.safe_load(written("measure", "8GB", name, name))
    assert (config["base_model"], config["datasets"][0]["path"]) == (name, name)


def test_of_a_model_that_nothing_is_known_of_it_says_why(tmp_path: Path) -> None:
    said = dwl("init", "--for", "measure", "--card", "8GB", "--model", "x/y").output
    assert "is not known: config.json of x/y is not on this disk." in said
    assert "(not estimated)" in (tmp_path / "train.yml").read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["--model", "--data"])
def test_an_empty_name_is_refused(tmp_path: Path, option: str) -> None:
    result = dwl("init", "--for", "dft", "--card", "8GB", option, " ")
    assert result.exit_code == 1
    assert f"{option} is empty" in result.output
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_told() -> None:
    assert "more than 8 GB" in dwl("init", "--for", "numbers", "--card", "8GB", "--model", "Qwen/Qwen3-14B").output
    assert "more than" not in dwl("init", "--for", "numbers", "--card", "8GB", "--model", "Qwen/Qwen3-0.6B", "--out", "b").output
    nearly = dwl("init", "--for", "reasoning", "--card", "12GB", "--model", "Qwen/Qwen3-8B", "--out", "c").output
    assert "more than 85% of 12 GB, and an estimate: take a smaller model, or a smaller sequence_len than 8,192." in nearly
    assert "take a smaller model." in dwl("init", "--for", "dft", "--card", "8GB", "--model", "Qwen/Qwen3-14B", "--out", "d").output


def test_rows_that_are_not_there_are_told(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    for data, told in (("rows.jsonl", False), ("row.jsonl", True)):
        result = dwl("init", "--for", "dft", "--card", "8GB", "--data", data, "--out", f"{data}.yml")
        assert result.exit_code == 0
        assert (f"There is no file {data} here yet." in result.output) == told


def test_nothing_is_written_over_another_file(tmp_path: Path) -> None:
    (tmp_path / "train.yml").write_text("mine")
    (tmp_path / "link.yml").symlink_to("nowhere")
    assert "link.yml is there already" in dwl("init", "--for", "dft", "--card", "8GB", "--out", "link.yml").output
    for arguments in (("init", "--for", "dft", "--card", "8GB"), ("examples", "dft-qlora", "--out", "train.yml")):
        result = dwl(*arguments)
        assert result.exit_code == 1
        assert "train.yml is there already" in result.output
    assert (tmp_path / "train.yml").read_text() == "mine"
    assert not (tmp_path / "nowhere").exists()


def test_names_that_are_none_are_told_with_what_there_is(tmp_path: Path) -> None:
    for arguments, said in (
        (("init", "--for", "number", "--card", "8GB"), "did you mean `numbers`"),
        (("init", "--for", "numbers", "--card", "9GB"), "8GB, 12GB"),
        (("init", "--for", "numbers"), "Say --card, too"),
        (("init", "--data", "rows.jsonl"), "Say --for and --card, too"),
        (("examples", "dwl-number-qlora"), "did you mean `dwl-numbers-qlora`"),
    ):
        result = dwl(*arguments)
        assert result.exit_code != 0
        assert said in result.output
    assert not list(tmp_path.iterdir())


def test_without_options_it_lists_what_there_is() -> None:
    output = dwl("init").output
    assert all(f"--for {name} " in output for name in PURPOSES)
    assert all(f"--card {name} " in output for name in CARDS)


def test_examples_are_listed_printed_and_written(tmp_path: Path) -> None:
    listed = dwl("examples").output
    for path in sorted((ROOT / "example_configs").glob("*.yml")):
        assert re.search(rf"^{path.stem} ", listed, re.MULTILINE)
        assert dwl("examples", path.stem).stdout == path.read_text(encoding="utf-8")
    assert dwl("examples", "dft-qlora.yml", "-o", "mine.yml").exit_code == 0
    assert (tmp_path / "mine.yml").read_bytes() == (folder() / "dft-qlora.yml").read_bytes()


def test_neither_imports_torch() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from dwl_plugin.cli.main import main; "
        "[CliRunner().invoke(main, words.split()) for words in ('init --for dft --card 8GB -o a.yml', 'examples')]; "
        "print({'torch', 'transformers', 'axolotl'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.slow
def test_a_wheel_carries_the_examples_and_reads_them_there(tmp_path: Path) -> None:
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("builds with uv")
    subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", str(tmp_path)], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert all(name.startswith(("dwl_plugin/", "axolotl_dwl-")) for name in archive.namelist())
        archive.extractall(tmp_path / "installed")
    code = "import dwl_plugin.cli.examples as e; print(e.folder()); print(*sorted(p.stem for p in e.folder().glob('*.yml')))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "installed", env={"PYTHONPATH": "."}, capture_output=True, text=True
    )
    found, names = done.stdout.splitlines()
    assert Path(found).resolve().is_relative_to((tmp_path / "installed").resolve())
    assert names.split() == sorted(path.stem for path in (ROOT / "example_configs").glob("*.yml"))
