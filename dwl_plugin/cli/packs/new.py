"""`dwl packs new`: the classes and α of a config as a pack file, with cases cut from rows of its data."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from dwl_plugin.classes.selectors import DatasetSelector, RoleSelector, TokenIdsSelector, walk
from dwl_plugin.cli.config_file import read_config
from dwl_plugin.cli.output import printable, say
from dwl_plugin.cli.packs import test_pack
from dwl_plugin.cli.trust import stop_at_packs
from dwl_plugin.config import Block, parse
from dwl_plugin.config.overrides import overridden, overrides_of
from dwl_plugin.config.pack_files import PackText
from dwl_plugin.config.packs import TO_WRITE, PackCase, parse_pack
from dwl_plugin.config.problems import nodes
from dwl_plugin.errors import ConfigError, DWLError, Problem
from dwl_plugin.files import require_new, write_whole

__all__ = ["new_pack"]

_IN_A_PACK = ("pack", "classes", "alpha", "reduction")
_WIDTH = 110


def new_pack(console: Console, name: str, config: Path, samples: int | None, trust: bool) -> int:
    """The whole command; the exit status. `samples` None: without cases.

    Raises:
        DWLError: the name is none, the file is there, or the config's classes are none that a pack can have.
    """
    path = Path(f"{name}.yml")
    if re.fullmatch(r"\w[\w-]*", name) is None:
        raise DWLError(f"{name} is no name for a pack, which has letters, digits, _ and -; NAME.yml is written here.")
    require_new(path)
    cases: list[PackCase] = []
    raw: Mapping[str, Any]
    if samples is None:
        written, _ = read_config(config)
        if not trust:
            stop_at_packs(config, written)
        raw = overridden(written, overrides_of(os.environ))
        text = _text(path, config, raw, _with_classes(parse(raw, folder=config.parent), with_cases=False), cases)
    else:
        from dwl_plugin.cli.analysis import analyse
        from dwl_plugin.cli.check import print_findings
        from dwl_plugin.cli.packs.cases import cases_of

        found, seen = analyse(config, samples, trust, spread=True)
        print_findings(console, found, seen)
        if found.status or seen is None:
            say(console, f"{path} was not written. --no-cases makes it of the YAML alone.", "bold yellow")
            return found.status or 2
        block = _with_classes(seen.block, with_cases=True)
        raw = seen.raw
        cases = cases_of(parse_pack(PackText(str(path), _text(path, config, raw, block, []))), seen)
        text = _text(path, config, raw, block, cases)
    parse_pack(PackText(str(path), text))
    write_whole(path, text.encode())
    test_pack(console, f"./{path}")
    if cases:
        say(console, f"Its cases are text of your data: whoever gets {path} reads them. --no-cases makes it without.", "bold")
    if left := list(_left_out(raw)):
        say(console, f"Not in it, as a pack has classes, α and reduction; write them beside `pack`: {', '.join(left)}")
    say(console, f"Write its description and sources; then `dwl packs push {path} user/repo` shares it.")
    return 0


def _with_classes(block: Block | None, *, with_cases: bool) -> Block:
    """The block, if a pack can have its classes."""
    if block is None or not block.class_configs:
        raise ConfigError.at("dwl.classes", "there are none, and a pack is its classes")
    ConfigError.raise_any(_problems(block, with_cases))
    return block


def _problems(block: Block, with_cases: bool) -> Iterator[Problem]:
    """Selectors that mean something in one config only, or that no case can show."""
    for name, config in block.class_configs.items():
        for path, selector in walk(config, f"dwl.classes.{name}"):
            if isinstance(selector, DatasetSelector):
                hint = "let rows say it: `marked: <name>` here, and `mark: <name>` in the data"
                yield Problem(f"{path}.dataset", "is a name in one config, and a pack is for many", selector.dataset, hint=hint)
            elif isinstance(selector, TokenIdsSelector):
                hint = "write the tokens themselves, `tokens: [...]`, or a `token_regex`"
                ids = list(selector.token_ids)
                yield Problem(f"{path}.token_ids", "are numbers of one tokenizer, and a pack is for many", ids, hint=hint)
            elif isinstance(selector, RoleSelector) and with_cases:
                hint = "use `between` or `regex` with what stands around such messages, or add --no-cases"
                why = "is known from a chat template, and a pack's cases have none"
                yield Problem(f"{path}.role", why, selector.role, hint=hint)


def _text(path: Path, config: Path, raw: Mapping[str, Any], block: Block, cases: Sequence[PackCase]) -> str:
    assert block.dwl is not None
    dwl = raw["dwl"]
    written = dwl.get("classes") or {}
    lines = [
        f"# {path}: the classes of {printable(config.name)}, as a pack. `dwl packs test ./{path}` runs its cases.",
        _yaml({"description": f"{TO_WRITE}: what the classes are, in a sentence or two."}),
        "sources: []                 # addresses, https://…, of where the formats are described",
        "",
        "classes:",
    ]
    for name, spec in block.class_configs.items():
        own = written.get(name)
        uses_pack = any(isinstance(node, Mapping) and "pack" in node for _, node, _ in nodes(own, ""))
        whole = spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        lines.append(_indented(_yaml({name: whole if own is None or uses_pack else own})))
    if block.loss == "dwl" and block.dwl.alpha is not None:
        lines += ["", _yaml({"alpha": {name: _short(number) for name, number in block.dwl.alpha.items()}})]
        lines += [f"reduction: {block.reduction}"] if block.writes_reduction else []
    if cases:
        lines += ["", "tests:                      # text of the data of that config: whoever gets this file reads it"]
        for case in cases:
            keys = case.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
            lines.append(f"  - {_indented(_indented(_yaml(keys, leaves=True))).lstrip()}")
    return "\n".join(lines) + "\n"


def _short(number: float) -> float:
    return int(number) if number.is_integer() else number


def _left_out(raw: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"dwl.{key}" for key, value in raw["dwl"].items() if key not in _IN_A_PACK and value is not None)
    yield from ("dft" for _ in [0] if raw.get("dft") is not None)


class _Inline(yaml.SafeDumper):
    """Nothing by reference, and text of several lines in one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _Block(_Inline):
    """Text of several lines as a person writes it."""


def _lines_in(style: str) -> Callable[[yaml.SafeDumper, str], yaml.ScalarNode]:
    return lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style if "\n" in text else None)


_Inline.add_representer(str, _lines_in('"'))
_Block.add_representer(str, _lines_in("|"))


def _yaml(value: dict[str, Any], *, leaves: bool = False) -> str:
    """A mapping in one line, if it fits; else in several. `leaves`: what holds no collections always in one."""
    how: dict[str, Any] = {"width": 1 << 20, "allow_unicode": True, "sort_keys": False}
    line = str(yaml.dump(value, Dumper=_Inline, default_flow_style=True, **how)).strip()
    if len(line) < _WIDTH and (leaves or "\\n" not in line):
        return line[1:-1] if len(value) == 1 else line
    text = yaml.dump(value, Dumper=_Inline if leaves else _Block, default_flow_style=None if leaves else False, **how)
    return str(text).removesuffix("\n")


def _indented(text: str) -> str:
    return re.sub("^(?=.)", "  ", text, flags=re.MULTILINE)
