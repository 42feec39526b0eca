"""What the pages show can be typed: each YAML parses, each command exists with its options, what is cheap is run."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import tomllib
import yaml
from click.testing import CliRunner

from dwl_plugin.cli.main import main
from dwl_plugin.config import pack_files, parse
from dwl_plugin.config.block import Block as OurBlock, DWLConfig
from dwl_plugin.config.overrides import SWEEP_FILE, VARIABLE, overridden, overrides_of
from dwl_plugin.config.pack_cases import run_case
from dwl_plugin.config.pack_files import PackText
from dwl_plugin.config.packs import parse_pack
from dwl_plugin.config.schema import json_schema
from tests.pages import PAGES, ROOT, Block, blocks, commands, files_of

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def of_language(*languages: str) -> Any:
    found = [block for page in PAGES for block in blocks(page, *languages)]
    return pytest.mark.parametrize("block", found, ids=str)


@each_page
def test_every_line_of_code_fits_100_columns(page: Path) -> None:
    lines = [(block.line + at, line) for block in blocks(page) for at, line in enumerate(block.text.splitlines(), start=1)]
    wide = [f"{page.name}:{at} has {len(line)}" for at, line in lines if len(line) > 100]
    assert not wide, "\n".join(wide)


# YAML

NUMBER = {"number": {"regex": r"\d+"}}
SOME_PACK = "description: d\nclasses: {number: {regex: '[0-9]'}}\nalpha: {number: 2, rest: 1}"
MOVED = {"loss": "dwl", "dwl": {"classes": NUMBER, "alpha": {"number": 1, "rest": 1}}}
MOVED["dwl"]["schedule"] = {"type": "linear", "to": {"number": 1, "rest": 2}}  # type: ignore[index]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """The working directory, with the files that a page shows; on the Hub is its pack, whatever the address."""

    def lay(page: Path) -> Path:
        files = files_of(page)
        monkeypatch.setattr(pack_files, "_from_hub", lambda address, _: PackText(address, files.get("my_pack.yml", SOME_PACK)))
        for name, text in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return lay


def whole(raw: Any, under: str) -> dict[str, Any]:
    """A config around a fragment; where it has α and no classes, a class for each name."""
    for key in reversed(under.split(".")):
        raw = {key: raw}
    raw.setdefault("loss", next(iter(raw)))
    dwl = raw.get("dwl")
    if dwl is not None and not dwl.keys() & {"classes", "pack"}:
        schedule = dwl.get("schedule", {})
        names = [*dwl.get("alpha", {}), *schedule.get("to", {})]
        dwl["classes"] = {name: {"regex": name} for name in names if name != "rest"} or NUMBER
    return raw


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json_schema()


@of_language("yaml")
def test_every_yaml_is_what_it_seems(block: Block, folder: Callable[[Path], Path], schema: dict[str, Any]) -> None:
    raw = yaml.safe_load(block.text)
    if block.under is not None:
        raw = whole(raw, block.under)
    if isinstance(raw, Mapping) and {"program", "parameters"} <= raw.keys():
        for name, values in raw["parameters"].items():
            check_sweep(name, values.get("values") or [values["value"]], folder(block.page))
    elif isinstance(raw, Mapping) and raw.keys() & OurBlock.model_fields.keys():
        parsed = parse(raw, folder(block.page))
        assert parsed is not None
        assert parse(parsed.dump()) == parsed
        jsonschema.validate(raw, schema)
    elif isinstance(raw, Mapping) and "classes" in raw and "description" in raw:
        pack = parse_pack(PackText(str(block), block.text))
        assert [run_case(pack, case).passed for case in pack.tests] == [True] * len(pack.tests)
    else:  # somebody else's
        ours = DWLConfig.model_fields.keys() & set(raw)
        assert not ours, f"{block} is a fragment: write `<!-- under: dwl -->` on the line before it"


def check_sweep(name: str, values: list[Any], folder: Path) -> None:
    for value in values:
        (folder / "sweep.json").write_text(json.dumps({"wandb_version": 1, name: {"value": value}}), encoding="utf-8")
        parse(overridden(MOVED, overrides_of({SWEEP_FILE: str(folder / "sweep.json")})))


@of_language("json", "jsonl", "toml")
def test_every_other_data_can_be_read(block: Block) -> None:
    if block.language == "toml":
        tomllib.loads(block.text)
    else:
        decoder, rest = json.JSONDecoder(), block.text.strip()
        while rest:  # rows, one after the other
            _, end = decoder.raw_decode(rest)
            rest = rest[end:].lstrip()


# Commands

OTHERS = {"cd", "git", "ls", "export", "source", "mkdir", "wandb", "swift", "llamafactory-cli", "trl", "torchrun", "accelerate"}
AXOLOTL = {"train", "preprocess", "evaluate", "inference", "merge-lora"}
PIP = {"--no-build-isolation", "--no-deps", "--upgrade", "-U", "-e", "--quiet"}
CHEAP = (["schedule"], ["packs", "list"], ["packs", "show"], ["packs", "test"], ["schema"], ["examples"])
TO_BE_FILLED_IN = re.compile(r"…|\[.*|[A-Z_]{2,}(\.\.\.)?|<.*|.*NAME.*")


def check(words: list[str], whole: bool) -> None:
    """Fails for what does not exist."""
    while re.match(r"\w+=", words[0]):
        name, _, value = words.pop(0).partition("=")
        if name == VARIABLE and not value.startswith("@"):
            parse(overridden(MOVED, overrides_of({VARIABLE: value})))
    word, *rest = words
    if word == "dwl":
        check_dwl(main, rest, whole)
    elif word == "axolotl":
        if rest[0] == "dwl":
            check_dwl(main, rest[1:], whole)
        else:
            assert rest[0] in AXOLOTL
    elif word == "pip":
        assert rest[0] in ("install", "uninstall")
        for wanted in rest[1:]:
            check_requirement(wanted)
    elif word == "uvx":
        assert rest[0] == "pre-commit"
    elif word == "uv":
        check_uv(rest, whole)
    elif word == "pytest":
        assert [path for path in rest if path.startswith("tests") and not (ROOT / path).exists()] == []
    elif word in ("python", "python3"):
        if rest[0] == "-m":
            assert find_spec(rest[1]), rest[1]
        else:
            assert rest[0].startswith("-") or (ROOT / rest[0]).is_file()
    elif word == ".ci/run":
        steps = " ".join(re.findall(r"^(?:all|by_name)=\((.*)\)", (ROOT / word).read_text(encoding="utf-8"), re.MULTILINE)).split()
        assert set(rest) <= set(steps)
    else:
        assert word in OTHERS or (ROOT / word).is_file() or word in ("ruff", "mypy"), f"no rule for `{word}`"


def check_dwl(command: click.Command, words: list[str], whole: bool) -> None:
    left_out = [word for word in words if re.fullmatch(r"\[.*\]|…", word)]
    words = [word for word in words if word not in left_out]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    if isinstance(command, click.Group):
        known = {option for param in command.params for option in param.opts} | {"--help", "-h"}
        assert set(words) <= known
        return
    try:
        command.make_context(command.name, list(words))
    except (click.MissingParameter, click.BadOptionUsage):
        if whole and not left_out:
            raise
    except click.exceptions.Exit:
        pass


def check_requirement(wanted: str) -> None:
    if wanted.startswith("-"):
        assert wanted in PIP
    elif wanted.endswith(".whl"):
        assert Path(wanted).name.startswith(f"axolotl_dwl-{PROJECT['project']['version']}-")
    elif match := re.fullmatch(r"(?:axolotl-dwl|\.)(?:\[(.*)\])?", wanted):
        assert set(filter(None, (match[1] or "").split(","))) <= PROJECT["project"]["optional-dependencies"].keys()


def check_uv(words: list[str], whole: bool) -> None:
    word, *rest = words
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option == "--group":
            assert rest.pop(0) in PROJECT["dependency-groups"]
    if word in ("pip", "run"):
        check([word, *rest] if word == "pip" else rest, whole) if rest else None
    else:
        assert word in ("sync", "lock", "build", "venv")


def test_there_are_commands_on_most_pages() -> None:
    assert sum(len(commands(page)) > 0 for page in PAGES) > 10


@each_page
def test_every_command_exists_with_its_options(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: Path(value))  # nothing is there
    wrong = []
    for command in commands(page):
        try:
            check(list(command.words), command.whole)
        except (AssertionError, click.ClickException, IndexError) as error:
            wrong.append(f"{command}: {getattr(error, 'message', '') or str(error).partition(chr(10))[0]}")
    assert not wrong, "\n".join(wrong)


def test_what_is_cheap_runs(folder: Callable[[Path], Path]) -> None:
    """On the files that the page shows, or a config with a class and a schedule."""
    ran = set()
    for page in PAGES:
        here = folder(page)
        for command in commands(page):
            words = command.words[1:] if command.program == "dwl" else []
            cheap = next((name for name in CHEAP if words[: len(name)] == name), None)
            if cheap is None or any(map(TO_BE_FILLED_IN.fullmatch, words)):
                continue
            for config in (here / word for word in words if word.endswith(".yml")):
                if not config.exists():
                    config.write_text(json.dumps(MOVED), encoding="utf-8")
                if cheap == ["schedule"] and "max_steps:" not in config.read_text(encoding="utf-8"):
                    words = [*words, "--steps", "20"]
            result = CliRunner().invoke(main, words)
            assert result.exit_code in ([0] if command.whole else [0, 2]), f"{command}\n{result.output}"  # 2: arguments left out
            ran |= {cheap[-1]} if result.exit_code == 0 else set()
    assert ran >= {"test", "show", "schedule", "schema"}


@pytest.mark.slow
def test_axolotls_commands_take_what_the_pages_write() -> None:
    from axolotl.cli.main import cli

    for page in PAGES:
        for command in commands(page):
            rest = command.words[command.words.index("axolotl") + 1 :] if command.program == "axolotl" else ["dwl"]
            if rest[0] != "dwl":
                options = {option for param in cli.commands[rest[0]].params for option in param.opts}
                assert {word for word in rest if word.startswith("--")} <= options, str(command)


# Python


@of_language("python")
def test_every_python_compiles_and_names_what_is_there(block: Block) -> None:
    tree = ast.parse(block.text)
    for name, call in used(tree):
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        if call is not None:
            given = {keyword.arg: None for keyword in call.keywords if keyword.arg}
            inspect.signature(found).bind(*call.args, **given)


def used(tree: ast.AST) -> Iterator[tuple[str, ast.Call | None]]:
    """Names of this package in a block, with the call of each that is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dwl_plugin"):
            yield from ((f"{node.module}.{alias.name}", None) for alias in node.names)
        target = node.func if isinstance(node, ast.Call) else node
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "dwl_plugin":
            yield f"dwl_plugin.{target.attr}", node if isinstance(node, ast.Call) else None


@pytest.mark.slow
def test_a_loop_of_ones_own_runs(tmp_path: Path) -> None:
    """Blocks that need nothing but a model, a batch, and what a head is called with."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.hosts import harness

    harness.make_model(tmp_path)
    shown = [block.text for page in PAGES for block in blocks(page, "python")]
    loops = [text for text in shown if re.search(r"dwl_plugin\.(attach|linear_cross_entropy)\(", text)]
    assert loops
    for loop in loops:
        ids, head = torch.randint(0, 50, (2, 6)), torch.nn.Linear(8, 50)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        exec(loop, {"model": model, "ids": ids, "hidden": torch.randn(6, 8), "head": head, "targets": ids[0], "w": torch.rand(6)})
