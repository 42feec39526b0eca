"""`dwl packs new`: what a config has becomes a pack whose cases, out of rows of its data, pass."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from dwl_plugin.config import Block, parse
from dwl_plugin.config.pack_cases import run_case, untouched_classes
from dwl_plugin.config.pack_files import PackText
from dwl_plugin.config.packs import Pack, parse_pack
from tests.hosts import harness

Dwl = Callable[..., Result]
Write = Callable[..., Path]

CLASSES: dict[str, Any] = {
    "thought": {"between": ["<think>", "</think>"]},
    "end": {"tokens": ["<|im_end|>"], "token_loss": "nll"},
    "number": {"regex": r"\d+", "group": 0, "allow_empty": True},
    "word": {"token_regex": r"\s?[A-Z][a-z]+"},
}
ALPHA = {"thought": 1, "end": 2, "number": 4, "word": 0.5, "rest": 1}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(name: str) -> Pack:
    return parse_pack(PackText(name, Path(f"{name}.yml").read_text(encoding="utf-8")))


def block_of(config: Path) -> Block:
    block = parse(yaml.safe_load(config.read_text(encoding="utf-8")), config.parent)
    assert block is not None
    return block


def test_a_config_becomes_a_pack_with_cases_of_its_data(dwl: Dwl, write_config: Write) -> None:
    schedule = {"type": "linear", "to": ALPHA}
    config = write_config(loss="dwl", dwl={"classes": CLASSES, "alpha": ALPHA, "reduction": "class_mean", "schedule": schedule})
    made = dwl("packs", "new", "sums", "--from", config)
    assert made.exit_code == 0, made.output
    pack, block = read("sums"), block_of(config)
    assert pack.classes == block.class_configs
    assert (pack.alpha, pack.reduction) == ({name: float(number) for name, number in ALPHA.items()}, "class_mean")
    text = Path("sums.yml").read_text(encoding="utf-8")
    for name, spec in CLASSES.items():
        assert yaml.safe_load(text)["classes"][name] == spec, "as it was written"
    assert "write them beside `pack`: dwl.schedule\n" in made.output

    assert not pack.is_described
    assert "Its description is still to be written." in made.output
    assert f"./sums.yml: {len(pack.tests)} cases pass" in made.output
    assert "Its cases are text of your data: whoever gets sums.yml reads them." in made.output
    assert dwl("packs", "test", "./sums.yml").exit_code == 0
    assert untouched_classes(pack) == []
    rendered = "".join(
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
        for row in harness.rows(40)
        for message in row["messages"]
    )
    for case in pack.tests:
        assert f"{case.prompt or ''}{case.text}" in rendered, "of the data, as it stands there"
        assert len(case.text or "") <= 1000
        assert run_case(pack, case).passed
    kinds = [re.sub(r"\d+", "0", f"{case.prompt}{case.text}") for case in pack.tests]
    assert len({*kinds}) == len(kinds) >= 4, "no two that differ in their numbers alone"

    again = dwl("packs", "new", "sums", "--from", config)
    assert (again.exit_code, "is there already, and is not written over" in again.output) == (1, True)
    Path("sums.yml").unlink()
    dwl("packs", "new", "sums", "--from", config)
    assert Path("sums.yml").read_text(encoding="utf-8") == text, "the same data, the same file"


def test_a_case_shows_what_the_run_finds_and_not_what_a_cut_makes_of_it(dwl: Dwl, write_config: Write) -> None:
    """A number without the words before it would be in another class, so it is not cut off from them."""
    classes = {"made": {"regex": r"(?<=make )\d+"}, "given": {"regex": r"(?<! make )\b\d+ and \d+"}}
    made = dwl("packs", "new", "sums", "--from", write_config(loss="dwl", dwl={"classes": classes}))
    assert made.exit_code == 0, made.output
    pack = read("sums")
    for case in pack.tests:
        for number in case.spans.get("made", ()):
            assert f"make {number}" in str(case.text)
    assert untouched_classes(pack) == []
    assert pack.alpha is None
    assert "alpha" not in Path("sums.yml").read_text(encoding="utf-8")


def test_a_piece_is_not_cut_off_from_what_decides_its_classes(dwl: Dwl, write_config: Write) -> None:
    """The words around a number are a thought only behind `<think>`."""
    classes = {"number": {"regex": r"\d+"}, "thought": {"between": ["<think>", "</think>"]}}
    dwl("packs", "new", "sums", "--from", write_config(loss="dwl", dwl={"classes": classes}))
    thoughts = [thought for row in harness.rows(40) for thought in re.findall(r"<think>.*?</think>", row["messages"][1]["content"])]
    tests = read("sums").tests
    assert {"number", "thought"} == {name for case in tests for name in case.spans if name != "rest"}
    for case in tests:
        assert ("thought" in case.spans) == any(str(case.text) in thought for thought in thoughts) or "</think>" in str(case.text)


def test_classes_of_packs_are_written_out(dwl: Dwl, write_config: Write) -> None:
    Path("mine.yml").write_text(
        "description: d\nclasses: {cafe: {regex: Café}, it: {words: [it]}}\nalpha: {cafe: 3, it: 2, rest: 1}\n"
    )
    dwl_block = {
        "pack": ["./mine.yml", "end_of_turn"],
        "classes": {"number": {"pack": "numbers.number"}},
        "alpha": {"number": 2, "it": 5},
    }
    config = write_config(loss="dwl", dwl=dwl_block)
    made = dwl("packs", "new", "both", "--from", config)
    assert made.exit_code == 0, made.output
    pack, block = read("both"), block_of(config)
    assert pack.classes == block.class_configs
    assert list(pack.classes) == ["number", "cafe", "it", "end_of_turn", "control"]
    assert pack.alpha == {"number": 2, "cafe": 3, "it": 5, "end_of_turn": 2, "control": 1, "rest": 1}
    assert "pack:" not in re.sub("#.*", "", Path("both.yml").read_text(encoding="utf-8")), "nothing of other packs is left to fetch"
    assert {"number", "cafe", "it", "end_of_turn"} <= {name for case in pack.tests for name in case.spans}


def test_marks_of_the_data_are_in_the_cases(dwl: Dwl, write_config: Write, tmp_path: Path) -> None:
    rows = [{**row, **({"mark": "hard"} if number % 2 else {})} for number, row in enumerate(harness.rows(40))]
    data = harness.write_rows(tmp_path / "marked.jsonl", rows)
    config = write_config(data=data, loss="dwl", dwl={"classes": {"hard": {"marked": "hard"}, "number": {"regex": r"\d+"}}})
    made = dwl("packs", "new", "marked", "--from", config)
    assert made.exit_code == 0, made.output
    marks = {case.mark for case in read("marked").tests if case.spans.get("hard")}
    assert marks == {"hard"}
    assert {case.mark for case in read("marked").tests if case.spans.get("number")} == {None}


def test_without_cases_nothing_of_the_data_is_looked_at(dwl: Dwl, write_config: Write, tmp_path: Path) -> None:
    config = write_config(loss="dwl", dwl={"classes": CLASSES, "alpha": ALPHA})
    (tmp_path / "rows.jsonl").unlink()
    made = dwl("packs", "new", "bare", "--from", config, "--no-cases")
    assert made.exit_code == 0, made.output
    assert read("bare").tests == ()
    assert "has no cases" in made.output
    assert "text of your data" not in made.output


@pytest.mark.parametrize(
    ("dwl_block", "options", "says"),
    [
        (
            {"classes": {"a": {"any": [{"dataset": "rows"}, {"regex": "x"}]}}},
            ["--no-cases"],
            "dwl.classes.a.any[0].dataset: is a name in one config",
        ),
        (
            {"classes": {"a": {"not": {"token_ids": [11]}}}},
            ["--no-cases"],
            "dwl.classes.a.not.token_ids: are numbers of one tokenizer",
        ),
        ({"data_weights": True}, ["--no-cases"], "dwl.classes: there are none, and a pack is its classes"),
        ({"classes": {"a": {"role": "assistant"}}}, [], "dwl.classes.a.role: is known from a chat template"),
        ({"classes": {"a": {"regex": "("}}}, [], "bad.yml was not written. --no-cases makes it of the YAML alone."),
        ({"pack": f"hf://u/r@{'0' * 40}/p.yml"}, [], "Nothing of it was done. If you trust it, say so with --trust."),
        ({"pack": f"hf://u/r@{'0' * 40}/p.yml"}, ["--no-cases"], "Nothing was fetched. If you trust it, say so with --trust."),
    ],
)
def test_what_cannot_be_a_pack_is_said(
    dwl: Dwl, write_config: Write, dwl_block: dict[str, Any], options: list[str], says: str
) -> None:
    made = dwl("packs", "new", "bad", "--from", write_config(loss="dwl", dwl=dwl_block), *options)
    assert made.exit_code != 0
    assert says in made.output
    assert not Path("bad.yml").exists()


def test_a_role_is_for_a_pack_without_cases_and_a_name_is_one(dwl: Dwl, write_config: Write) -> None:
    config = write_config(loss="dwl", dwl={"classes": {"a": {"role": "assistant"}}})
    assert dwl("packs", "new", "roles", "--from", config, "--no-cases").exit_code == 0
    for name in ("../up", "a.b", "", "-x"):
        result = dwl("packs", "new", "--from", config, "--no-cases", "--", name)
        assert (result.exit_code, "is no name for a pack" in result.output) == (1, True), result.output


def test_what_yaml_would_take_apart_comes_back_as_it_was(dwl: Dwl, write_config: Write) -> None:
    lines = "(?x)\n  yes  # and no: 'why'\n  | \\d{3}\t\n\n"
    odd = {
        "a": {"regex": lines},
        "b": {"words": ["no", "null", "1_0", "été"]},
        "c": {"between": ["#", "- "], "include_delimiters": False},
    }
    odd["d"] = {"any": [{"regex": "x" * 200}, {"not": {"any": [{"regex": "'\"\\\\"}, {"turn": -1}]}}]}
    config = write_config(loss="dwl", dwl={"classes": odd, "alpha": {"a": 0.1, "b": 1e-7, "c": 3, "d": 1, "rest": 0}})
    assert dwl("packs", "new", "odd", "--from", config, "--no-cases").exit_code == 0
    assert read("odd").classes == block_of(config).class_configs
    assert read("odd").alpha == {"a": 0.1, "b": 1e-7, "c": 3, "d": 1, "rest": 0}
