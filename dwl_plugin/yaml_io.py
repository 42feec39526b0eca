"""The one reader of YAML: plain values of bounded size, or an error that says where.

PyYAML, because Axolotl reads configs with it: YAML 1.1, where `yes` is true. What is no YAML may be anything, a secret too, if a
stranger's config names it: an error quotes nothing of it, unless it has the keys of a config.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.files import UnreadableError, read_regular
from dwl_plugin.yaml_text import lines_of, trouble

__all__ = ["CutOff", "ExactDumper", "Odd", "Twice", "decoded", "load_plain_yaml", "load_yaml", "read_yaml"]


class Twice(NamedTuple):
    """A key that stands more than once in its mapping: its YAML path, the lines, and the last value, which YAML keeps.

    `value` is "" where it is no scalar.
    """

    path: str
    lines: tuple[int, ...]
    value: str


class CutOff(NamedTuple):
    """A text without quotes, and the comment behind it, which may have been meant to belong to it."""

    path: str
    line: int
    value: str
    comment: str


Odd = list[Twice | CutOff]
"""What is YAML, and perhaps not what was meant."""

_MAX_BYTES = 1 << 20
_MAX_NODES = 200_000
"""With every alias written out. A list of keywords may be long; aliases of aliases make a few lines into more than any memory."""

_MAX_NESTING = 32
_MAX_DIGITS = 128
"""Python takes the square of the time for a number's digits, and refuses to print more than 4,300."""

_CONFIG = re.compile(r"^(base_model|loss|dft|dwl) *:", re.MULTILINE)
"""What a text has that is a config and no secret, however wrong it is."""

_LONGEST = 200
"""Characters of a line that is shown."""

_FOUND = re.compile(r"(alias|anchor|handle|tag) (['\"])(?!tag:yaml\.org,2002:python/).*\2")
"""What PyYAML quotes of the text, where that is more than one character."""


def decoded(data: bytes, path: str) -> str:
    """The text in UTF-8; raises `ConfigError` at `path` with the byte that is none."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError.at(path, f"not UTF-8: {error.reason} at byte {error.start}") from None


def read_yaml(path: Path, odd: Odd | None = None) -> Any:
    """`load_yaml` of a file; raises `ConfigError` at its name also where it cannot be read."""
    try:
        data = read_regular(path, _MAX_BYTES)
    except UnreadableError as error:
        raise ConfigError.at(str(path), error.why) from None
    return load_yaml(decoded(data, str(path)), str(path), odd)


def load_yaml(text: str, name: str, odd: Odd | None = None) -> Any:
    """The values in one document of YAML. Raises `ConfigError` at `name`, with line and column.

    `odd` receives each key that stands more than once in its mapping, and each text that a comment may have cut off.
    """
    try:
        return _loaded(text, [] if odd is None else odd)
    except yaml.YAMLError as error:
        known = trouble(text, error) if isinstance(error, yaml.MarkedYAMLError) and _CONFIG.search(text) else None
        why, mark, hint = known or (_why(error), _mark(error), "")
        if mark is None:
            raise ConfigError.at(name, f"is not YAML: {why}") from None
        where, lines = f"line {mark.line + 1}", lines_of(text)
        line = f"{where}: {lines[mark.line].rstrip()[:_LONGEST]}" if _CONFIG.search(text) and mark.line < len(lines) else ""
        problem = Problem(name, f"is not YAML: {why} ({where}, column {mark.column + 1})", hint=hint, line=line)
        raise ConfigError([problem]) from None


def load_plain_yaml(text: str, name: str) -> Any:
    """`load_yaml` of a text by somebody else: nothing but data, with each key once; the line is in the path of an error.

    Aliases can multiply without end, tags name types: both are refused before anything is built.
    """
    at, depth, odd = name, 0, Odd()
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            at = name if event.start_mark is None else f"{name}:{event.start_mark.line + 1}"
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise ConfigError.at(at, "no anchors and aliases (`&` and `*`) here; write it out, or put it in quotes")
            if getattr(event, "tag", None):
                raise ConfigError.at(at, "no tags (`!`) here; put it in quotes")
            if depth > _MAX_NESTING:
                raise ConfigError.at(at, f"nested more than {_MAX_NESTING} deep")
        content = _loaded(text, odd)
    except yaml.YAMLError as error:
        mark = _mark(error)
        at = name if mark is None else f"{name}:{mark.line + 1}"
        raise ConfigError.at(at, f"is not YAML: {_why(error)}") from None
    for _, (first, line, *_), _ in (item for item in odd if isinstance(item, Twice)):
        raise ConfigError.at(f"{name}:{line}", f"a key stands twice, here and in line {first}")
    return content


class ExactDumper(yaml.SafeDumper):
    """Text with line ends that are not `\\n` comes back from double quotes alone: PyYAML folds them in all other styles."""

    def style_of(self, text: str) -> str | None:
        return '"' if re.search("[\x85\u2028\u2029]", text) else None


ExactDumper.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, dumper.style_of(text)))


def _mark(error: yaml.YAMLError) -> yaml.Mark | None:
    return getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)


def _why(error: yaml.YAMLError) -> str:
    """The error in a line, without what it found in the text."""
    why = getattr(error, "problem", None) or getattr(error, "reason", None) or " ".join(str(error).split())
    return _FOUND.sub(r"\1 …", why)


def _loaded(text: str, odd: Odd) -> Any:
    """`yaml.safe_load` that raises `yaml.YAMLError` alone."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _size(node, {}, odd, "") > _MAX_NODES:
            raise yaml.YAMLError("its anchors and aliases multiply without end, or nearly so")
        return None if node is None else yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError:
        raise
    except Exception as error:  # a date that is none, a value that does not fit its tag, lists nested without end
        said = f": {str(error).partition(':')[0]}" if isinstance(error, ValueError) else ""  # behind the colon is the text
        raise yaml.YAMLError(f"{type(error).__name__}{said}") from error


def _size(node: yaml.Node, seen: dict[int, float], odd: Odd, path: str) -> float:
    """Nodes of a tree with aliases written out; infinite where one holds itself. What is odd goes to `odd`."""
    if id(node) in seen:
        return seen[id(node)]
    seen[id(node)] = float("inf")
    if node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") and len(node.value) > _MAX_DIGITS:
        raise yaml.MarkedYAMLError(problem=f"a number of more than {_MAX_DIGITS} characters", problem_mark=node.start_mark)
    inner: list[tuple[yaml.Node, str]] = []
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value and (comment := _comment(node.end_mark)):
        odd.append(CutOff(path, node.end_mark.line + 1, node.value, comment))
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, list[int]] = {}
        last: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
            below = f"{path}.{name}".removeprefix(".")
            inner += (key, below), (value, below)
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                lines.setdefault(below, []).append(key.start_mark.line + 1)
                last[below] = value
        odd.extend(
            Twice(below, tuple(where), last[below].value if isinstance(last[below], yaml.ScalarNode) else "")
            for below, where in lines.items()
            if len(where) > 1
        )
    elif isinstance(node, yaml.SequenceNode):
        inner = [(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
    seen[id(node)] = 1.0 + sum(_size(child, seen, odd, below) for child, below in inner)
    return seen[id(node)]


def _comment(mark: yaml.Mark) -> str:
    """What stands behind a value in its line, if it is a comment."""
    if mark.buffer is None:
        return ""
    rest = mark.buffer[mark.pointer :].partition("\n")[0].strip("\0\r ")
    return rest if rest.startswith("#") else ""
