"""A YAML from anybody: a mapping comes out, or an error that says where and what."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import yaml

from dwl_plugin.cli.config_file import read_config
from dwl_plugin.errors import ConfigError
from dwl_plugin.yaml_io import load_yaml
from dwl_plugin.yaml_text import lines_of
from tests.cli.mistakes import AT_ONCE


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_config(write(folder, text))
    return str(caught.value.problems[0])


def test_a_mapping_comes_out(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "loss: dft\ndft: {exponent: 0.5}\n")) == ({"loss": "dft", "dft": {"exponent": 0.5}}, [])


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("loss: dft\nseed: 1\nloss: nll\n", "`loss` stands twice, in lines 1 and 3; … so `loss: nll` of line 3 counts"),
        ("a: 1\na: 2\na: 3\n", "`a` stands 3 times, in lines 1, 2 and 3; … so `a: 3` of line 3 counts"),
        (
            "dwl:\n  alpha: {x: 1, rest: 2,\n    x: 5}\n",
            "`dwl.alpha.x` stands twice, in lines 2 and 3; … so `x: 5` of line 3 counts",
        ),
        ("d:\n- path: a\n- path: b\n  path: c\n", "`d[1].path` stands twice, in lines 3 and 4; … so `path: c` of line 4 counts"),
        ("d: [1]\nd: [2]\n", "`d` stands twice, in lines 1 and 2; … so line 2 counts"),
    ],
)
def test_a_key_that_stands_twice_is_a_warning_of_what_yaml_makes_of_it(tmp_path: Path, text: str, warning: str) -> None:
    raw, (said,) = read_config(write(tmp_path, text))
    assert raw == yaml.safe_load(text)
    before, after = warning.split(" … ")
    assert said.startswith(before)
    assert said.endswith(f"{after}. Delete the other, or give it another name")


def test_a_key_may_stand_once_in_each_mapping(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "a: {x: 1}\nb: {x: 1}\n"))[1] == []


def test_merged_mappings_are_not_doubled_keys(tmp_path: Path) -> None:
    assert read_config(write(tmp_path, "a: &a {x: 1}\nb: {<<: *a, y: 2}\n")) == ({"a": {"x": 1}, "b": {"x": 1, "y": 2}}, [])


def test_double_quotes_around_a_pattern_get_a_hint(tmp_path: Path) -> None:
    said = complaint(tmp_path, 'loss: dwl\nx: "\\d+"\n')
    assert "line 2" in said
    assert "single quotes" in said


@pytest.mark.parametrize("text", ["!!python/object/apply:os.system ['true']\n", "a: !!python/name:os.system\n"])
def test_tags_that_name_code_are_refused(tmp_path: Path, text: str) -> None:
    assert "python" in complaint(tmp_path, text)


@pytest.mark.parametrize("text", ["a: 2026-99-99\n", "a: !!int x\n", "[" * 5000], ids=["date", "int", "deep"])
def test_what_pyyaml_trips_over_is_not_yaml(tmp_path: Path, text: str) -> None:
    assert "not YAML" in complaint(tmp_path, text)


def test_a_file_that_cannot_be_read_is_a_sentence(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.yml", "cannot be read: No such file"), (tmp_path, "is not read: it is a folder")):
        with pytest.raises(ConfigError, match=why):
            read_config(path)


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    assert "aliases" in complaint(tmp_path, "\n".join(lines))


def test_an_alias_of_itself_is_refused(tmp_path: Path) -> None:
    assert "aliases" in complaint(tmp_path, "a: &a [*a]\n")


def test_a_file_larger_than_a_config_is_refused(tmp_path: Path) -> None:
    assert "larger" in complaint(tmp_path, "# " + "x" * (1 << 20))


@pytest.mark.parametrize(("text", "word"), [("", "empty"), ("- a\n- b\n", "list"), ("just words\n", "str")])
def test_what_is_no_mapping_is_named(tmp_path: Path, text: str, word: str) -> None:
    assert word in complaint(tmp_path, text)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_bytes(b"loss: \xff\xfe\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_config(path)


def test_whatever_is_mistyped_there_is_a_line_and_a_column(tmp_path: Path) -> None:
    """Configs with a few characters replaced or put in: read, or refused with a place that is in the file."""
    draw, wrong = random.Random(0), 0
    for _ in range(400):
        text = list(draw.choice(AT_ONCE).config)
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            text[at : at + draw.randint(0, 1)] = draw.choice("\t {}[]'\":#*&!|>%@`-,\\\n\r\x85\ufeffé")
        try:
            load_yaml("".join(text), "train.yml")
        except ConfigError as error:
            wrong += 1
            (problem,) = error.problems
            place = re.search(r"\(line (\d+), column (\d+)\)$", problem.message)
            assert place, problem
            assert int(place[1]) <= len(lines_of("".join(text)))
    assert wrong > 200
