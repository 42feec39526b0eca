"""What a config can name and is no pack: nothing of it is told, nothing waits for it, and no number in it is too much."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dwl_plugin.cli.main import main
from dwl_plugin.config import parse, read_block
from dwl_plugin.config.overrides import overridden, overrides_of
from dwl_plugin.config.problems import collected
from dwl_plugin.errors import ConfigError, Problem

SECRET = "gho_16C7e42F292c6912E7"
SECRETS = {
    "gh": f"github.com:\n    oauth_token: {SECRET}\n    user: x\n",
    "token": f"{SECRET}\n",
    "list": f"- {SECRET}\n",
    "netrc": f"machine github.com login x password {SECRET}\n",
    "json": f'{{"token": "{SECRET}"}}',
    "key": f"{SECRET}: 1\n",
    "key twice": f"{SECRET}: 1\n{SECRET}: 2\n",
    "described": f"description: {SECRET}\n",
    "classes that are none": f"classes: {SECRET}\n",
    "alias": f"a: *{SECRET}\n",
    "anchors": f"a: &{SECRET} 1\nb: &{SECRET} 2\n",
    "tag": f"!{SECRET} x\n",
    "handle": f"!{SECRET}!x y\n",
    "handles": f"%TAG !{SECRET}! x\n%TAG !{SECRET}! y\n---\na\n",
    "directive": f"%{SECRET}\n---\n",
    "int": f"!!int {SECRET}\n",
    "bool": f"!!bool {SECRET}\n",
    "core tag": f"!!{SECRET} x\n",
    "open quote": f'a: "{SECRET}\n',
    "escape": f'a: "{SECRET}\\{SECRET}"\n',
    "two values": f"a: b: {SECRET}\n",
    "indent": f"a: {SECRET}\n  b: {SECRET}\n",
    "tab": f"a:\n\t{SECRET}: x\n",
    "two documents": f"--- {SECRET}\n--- {SECRET}\n",
    "control": f"{SECRET}\x01",
}
Files = dict[str, bytes]
FILES: Files = {name: text.encode() for name, text in SECRETS.items()} | {
    "latin-1": f"caf\xe9: {SECRET}\n".encode("latin-1"),
    "utf-16": SECRET.encode("utf-16"),
}


def pack_problem(name: object, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({"loss": "dwl", "dwl": {"pack": str(name)}}, folder)
    return str(caught.value)


@pytest.mark.parametrize("kind", FILES)
def test_nothing_of_a_file_that_is_no_pack_is_told(tmp_path: Path, kind: str) -> None:
    (tmp_path / "secret.yml").write_bytes(FILES[kind])
    said = [pack_problem("./secret.yml", tmp_path), pack_problem(tmp_path / "secret.yml", tmp_path)]
    with pytest.raises(ConfigError) as member:
        parse({"loss": "dwl", "dwl": {"classes": {"a": {"any": [{"pack": "./secret.yml.x"}, {"regex": "x"}]}}}}, tmp_path)
    said.append(str(member.value))
    for command in ("show", "test"):
        result = CliRunner().invoke(main, ["packs", command, str(tmp_path / "secret.yml")])
        assert result.exit_code == 1
        said.append(result.output)
    for text in said:
        assert "secret.yml" in text
        assert SECRET not in text


@pytest.mark.parametrize("variable", ["DWL_OVERRIDES", "WANDB_SWEEP_PARAM_PATH"])
def test_nothing_of_a_file_of_overrides_that_is_none_is_told(tmp_path: Path, variable: str) -> None:
    path = tmp_path / "secret.yml"
    for kind, data in FILES.items():
        path.write_bytes(data)
        problems: list[Problem] = []
        with collected(problems):
            assert overrides_of({variable: f"@{path}" if variable == "DWL_OVERRIDES" else str(path)}) == []
        assert problems or variable != "DWL_OVERRIDES", kind
        assert SECRET not in str(problems), kind


def test_a_value_in_a_file_of_overrides_is_not_told_with_a_key_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "o.yml").write_text(f"loss: dft\nhub_token: {SECRET}\n")
    with pytest.raises(ConfigError, match="hub_token") as caught:
        overrides_of({"DWL_OVERRIDES": f"@{tmp_path / 'o.yml'}"})
    assert SECRET not in str(caught.value)


def test_a_config_that_is_none_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    for kind, data in FILES.items():
        path.write_bytes(data)
        with pytest.raises(ConfigError) as caught:
            read_block(path)
        assert SECRET not in str(caught.value), kind


def test_a_pack_s_own_mistakes_are_told_in_full(tmp_path: Path) -> None:
    (tmp_path / "p.yml").write_text("description: d\nclases: {a: {regex: x}}\n")
    assert "did you mean `classes`?" in pack_problem("p.yml", tmp_path)
    (tmp_path / "q.yml").write_text("description: d\nclasses: {a: {regex: '('}}\n")
    assert "got '('" in pack_problem("q.yml", tmp_path)


# Where a path may lead

PACK = "description: d\nclasses: {a: {regex: x}}\n"


def test_a_link_may_not_lead_out_of_where_the_path_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs, elsewhere = tmp_path / "configs", tmp_path / "elsewhere"
    for folder in (configs / "packs", elsewhere):
        folder.mkdir(parents=True)
        (folder / "p.yml").write_text(PACK)
    monkeypatch.chdir(elsewhere)
    (configs / "out.yml").symlink_to("../elsewhere/p.yml")
    (configs / "far.yml").symlink_to(elsewhere / "p.yml")
    (configs / "folder").symlink_to("../elsewhere")
    (configs / "in.yml").symlink_to("packs/p.yml")
    (tmp_path / "linked").symlink_to("configs")
    for refused in ("out.yml", "./far.yml", "folder/p.yml", "packs/../folder/p.yml", "folder/../elsewhere/p.yml"):
        assert "leads out" in pack_problem(refused, configs)
    shown = ("in.yml", "packs/p.yml", "../elsewhere/p.yml", "../configs/in.yml", str(elsewhere / "p.yml"), str(configs / "far.yml"))
    for name in shown:
        assert parse({"loss": "dwl", "dwl": {"pack": name}}, configs) is not None
        assert parse({"loss": "dwl", "dwl": {"pack": name}}, tmp_path / "linked") is not None


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [a_fifo, Path.mkdir, a_link_to_a_device])
def test_only_regular_files_are_opened_and_none_is_waited_for(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x.yml"
    make(path)
    assert "is not read: it is a" in pack_problem(path, tmp_path)
    for environ in ({"DWL_OVERRIDES": f"@{path}"}, {"WANDB_SWEEP_PARAM_PATH": str(path)}):
        with pytest.raises(ConfigError, match="is not read: it is a"):
            overrides_of(environ)
    with pytest.raises(ConfigError, match="is not read: it is a"):
        read_block(path)
    for arguments in (["packs", "show", str(path)], ["schedule", str(path)]):
        assert CliRunner().invoke(main, arguments).exit_code in (1, 2)


def test_a_file_of_any_size_is_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.yml"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole
    assert "more than 128 KiB" in pack_problem(path, tmp_path)
    for read in (lambda: read_block(path), lambda: overrides_of({"DWL_OVERRIDES": f"@{path}"})):
        with pytest.raises(ConfigError, match="more than 1,024 KiB"):
            read()


def test_a_home_that_nobody_has_is_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        overrides_of({"DWL_OVERRIDES": "@~nobody-of-that-name/x.yml"})


@pytest.mark.parametrize(
    "rest",
    [
        "../x.yml",
        "a/../../x.yml",
        "./x.yml",
        "a//x.yml",
        "/etc/x.yml",
        "%2e%2e/x.yml",
        "a%2fx.yml",
        "..\\x.yml",
        "a/..yml/../x.yml",
    ],
)
def test_an_address_on_the_hub_is_of_plain_names(rest: str, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    for repo in ("u/r", "datasets/u/r"):
        assert "plain name" in pack_problem(f"hf://{repo}@{commit}/{rest}", tmp_path)
    for repo in ("../r", "u/..", "./.", "datasets/../r"):
        assert "plain name" in pack_problem(f"hf://{repo}@{commit}/x.yml", tmp_path)


# Numbers and encodings

NUMBERS = {
    "decimal": "9" * 5000,
    "hexadecimal": "0x" + "f" * 9000,
    "binary": "0b" + "1" * 30_000,
    "octal": "0" + "7" * 9000,
    "base 60": "1" + ":59" * 3000,
    "base 60 with a point": "1" + ":59" * 3000 + ".5",
    "with underscores": "1" + "_0" * 5000,
    "negative": "-0x" + "f" * 9000,
    "fits in a line": "0x" + "f" * 100,
}


@pytest.mark.parametrize("place", ["alpha: {a: %s}", "alpha: {? %s : 1}", "? %s\n: 1", "sources: [%s]", "tests: [%s]"])
def test_a_number_without_end_is_a_problem_of_the_pack(tmp_path: Path, place: str) -> None:
    for kind, number in NUMBERS.items():
        (tmp_path / "p.yml").write_text(f"{PACK}{place % number}\n")
        began = time.process_time()
        said = pack_problem("p.yml", tmp_path)
        assert ("63 bits" if kind == "fits in a line" else "128 characters") in said
        assert len(said) < 1000
        assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "place", ["loss: %s", "loss: dwl\ndwl: {classes: {a: {token_ids: [%s]}}}", "loss: dft\nseed: %s", "loss: dft\n? %s\n: 1"]
)
def test_a_number_without_end_in_a_config_is_no_traceback(tmp_path: Path, place: str) -> None:
    path = tmp_path / "c.yml"
    for kind, number in NUMBERS.items():
        path.write_text(place % number)
        problems: list[Problem] = []
        with collected(problems):
            read_block(path)
        fits = kind == "fits in a line"
        expected = "" if fits and place.startswith("loss: dft") else "63 bits" if fits else "128 characters"  # a key of the host's
        assert expected in str(problems)
        assert bool(problems) == bool(expected)
        result = CliRunner().invoke(main, ["schedule", str(path)])
        assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_number_without_end_in_an_override_is_no_traceback(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"128 characters|63 bits"):
        parse(overridden({"loss": "dwl"}, overrides_of({"DWL_OVERRIDES": f"dwl.alpha.a={NUMBERS[kind]}"})))


def test_half_a_character_in_a_pack_is_a_problem(tmp_path: Path) -> None:
    for text in ('classes: {a: {regex: "\\ud800"}}', 'classes: {"\\ud800": {regex: x}}', 'classes: {a: {regex: x}}\n"\\udfff": 1'):
        (tmp_path / "p.yml").write_text(f"description: d\n{text}\n")
        assert "surrogate" in pack_problem("p.yml", tmp_path)


@pytest.mark.parametrize(("data", "at"), [("classes: {a: {regex: é}}\n".encode("latin-1"), 21), (b"\xff\xfea\0", 0)])
def test_a_pack_that_is_not_utf_8_is_refused_with_the_byte(tmp_path: Path, data: bytes, at: int, monkeypatch: Any) -> None:
    (tmp_path / "p.yml").write_bytes(data)
    said = pack_problem("p.yml", tmp_path)
    assert "not UTF-8" in said
    assert f"byte {at}" in said
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--u--r" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "p.yml").write_bytes(data)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert f"byte {at}" in pack_problem(f"hf://u/r@{commit}/p.yml", tmp_path)
