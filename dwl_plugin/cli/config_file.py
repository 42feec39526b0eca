"""A config file as a mapping: safe YAML of a size that a person writes, in which no key stands twice."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.yaml_io import yaml_errors

__all__ = ["read_config"]

_MAX_BYTES = 1 << 20
_MAX_NODES = 100_000
"""With every alias written out. Aliases of aliases make a few lines into more than any memory holds."""


class _Loader(yaml.SafeLoader):
    """`SafeLoader` that remembers the keys it was given twice."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.doubled: list[Problem] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Any, yaml.Node] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.value in first:
                lines = [first[key_node.value].start_mark.line + 1, key_node.start_mark.line + 1]
                message = f"stands twice, in lines {lines[0]} and {lines[1]}; YAML keeps the last one and says nothing"
                self.doubled.append(Problem(key_node.value, message))
            first.setdefault(key_node.value, key_node)
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The mapping, and what is odd about the file itself. Raises `ConfigError` where there is no mapping to be had."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConfigError([Problem(str(path), f"larger than {_MAX_BYTES >> 20} MiB; this is no config")])
        loader = _Loader(path.read_text(encoding="utf-8"))
        try:
            with yaml_errors():
                node = loader.get_single_node()
                if node is None:
                    raise ConfigError([Problem(str(path), "the file is empty")])
                if _nodes(node, {}) > _MAX_NODES:
                    raise ConfigError([Problem(str(path), "its anchors and aliases multiply without end, or nearly so")])
                raw = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError([Problem(str(path), f"not YAML: {_where(error)}", hint=_trap(error))]) from None
    except OSError as error:
        raise ConfigError([Problem(str(path), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(str(path), f"not UTF-8: {error.reason} at byte {error.start}")]) from None
    if not isinstance(raw, dict):
        raise ConfigError([Problem(str(path), f"a config is a mapping of keys to values, and this is a {type(raw).__name__}")])
    return raw, loader.doubled


def _nodes(node: yaml.Node, seen: dict[int, float]) -> float:
    """Nodes below `node` with aliases written out; infinite where one holds itself."""
    if id(node) not in seen:
        seen[id(node)] = float("inf")
        children = [item for pair in node.value for item in pair] if isinstance(node, yaml.MappingNode) else node.value
        inner = [] if isinstance(node, yaml.ScalarNode) else children
        seen[id(node)] = 1.0 + sum(_nodes(child, seen) for child in inner)
    return seen[id(node)]


def _where(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error)
    return problem if mark is None else f"{problem} (line {mark.line + 1}, column {mark.column + 1})"


def _trap(error: yaml.YAMLError) -> str:
    text = str(getattr(error, "problem", ""))
    if "escape character" in text:
        return r"in double quotes a backslash begins an escape: write patterns in single quotes, '\d+'"
    if "cannot start any token" in text and "%" in text:
        return "put a value that begins with % in quotes"
    return ""
