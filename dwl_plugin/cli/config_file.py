"""A config file as a mapping, of a size that a person writes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dwl_plugin.errors import ConfigError
from dwl_plugin.yaml_io import CutOff, Odd, Twice, read_yaml
from dwl_plugin.yaml_text import as_flow

__all__ = ["read_config"]

_PATTERN = re.compile(r"dwl\.classes\..+\.(token_)?regex")


def read_config(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The mapping, and a warning for each key that stands twice and each pattern that a comment may have cut off.

    Raises `ConfigError` where there is no mapping to be had.
    """
    odd = Odd()
    raw = read_yaml(path, odd)
    if raw is None:
        raise ConfigError.at(str(path), "the file is empty")
    if not isinstance(raw, dict):
        raise ConfigError.at(str(path), f"a config is a mapping of keys to values, and this is a {type(raw).__name__}")
    twice = [_told(*key) for key in odd if isinstance(key, Twice)]
    return raw, twice + [_cut(*text) for text in odd if isinstance(text, CutOff) and _PATTERN.fullmatch(text.path)]


def _cut(path: str, line: int, value: str, comment: str) -> str:
    key = path.rpartition(".")[2]
    whole = as_flow({key: f"{value} {comment}"})[1:-1]
    what = f"`{path}` is `{value}`: the `#` behind it in line {line} begins a comment"
    return f"{what}. If it belongs to the pattern, write `{whole}`"


def _told(path: str, lines: tuple[int, ...], value: str) -> str:
    """Every reader of YAML on the way of a config, Axolotl's too, takes the last."""
    often = "twice" if len(lines) == 2 else f"{len(lines)} times"
    where = f"{', '.join(map(str, lines[:-1]))} and {lines[-1]}"
    kept = f"`{path.rpartition('.')[2]}: {value if len(value) < 100 else value[:99] + '…'}` of " if value else ""
    kept = f"YAML says nothing and keeps the last, so {kept}line {lines[-1]} counts"
    return f"`{path}` stands {often}, in lines {where}; {kept}. Delete the other, or give it another name"
