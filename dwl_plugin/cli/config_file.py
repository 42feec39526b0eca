"""A config file as a mapping: of a size that a person writes, in which no key stands twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.yaml_io import Twice, read_yaml

__all__ = ["read_config"]


def read_config(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The mapping, and what is odd about the file itself. Raises `ConfigError` where there is no mapping to be had."""
    twice: list[Twice] = []
    raw = read_yaml(path, twice)
    if raw is None:
        raise ConfigError.at(str(path), "the file is empty")
    if not isinstance(raw, dict):
        raise ConfigError.at(str(path), f"a config is a mapping of keys to values, and this is a {type(raw).__name__}")
    said = "stands twice, in lines {} and {}; YAML keeps the last one and says nothing"
    return raw, [Problem(key, said.format(*lines)) for key, *lines in twice]
