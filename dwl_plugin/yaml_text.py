"""YAML as a person writes it: a value in one line, and what to do about a line that is none."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

__all__ = ["Trouble", "as_flow", "lines_of", "trouble"]

_PLAIN = re.compile(r"[A-Za-z_][\w./-]*|\d+(%|ep)")
_NO_TEXT = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))
"""Words that YAML reads as something else."""

_ENTRY = re.compile(r"(?P<before>\s*(?:- +)*(?P<key>[\w.-]+): +)(?P<value>\S.*?)\s*")
_FLOW_ENTRY = re.compile(r"(?P<before>[^{]*\{ *[\w.-]+: +)(?P<value>[^'\",][^,]*?)(?P<after> *\} *)")
_LONGEST = 200


def as_flow(value: Any) -> str:
    """`value` in one line of YAML, as a person would write it: texts that are no plain words in single quotes."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{as_flow(key)}: {as_flow(item)}' for key, item in value.items())}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_flow, value))}]"
    if not isinstance(value, str):
        return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return value if _PLAIN.fullmatch(value) and value.lower() not in _NO_TEXT else _quoted(value)


def _quoted(text: str) -> str:
    """In single quotes, where a backslash is a backslash; in double ones where only an escape can write it."""
    return "'" + text.replace("'", "''") + "'" if text.isprintable() else json.dumps(text, ensure_ascii=False)


class Trouble(NamedTuple):
    """Why a text is no YAML, without a word of it; the line where it is to be mended, from 0, and how."""

    why: str
    at: yaml.Mark
    hint: str = ""


def lines_of(text: str) -> list[str]:
    """The lines as PyYAML counts them."""
    return re.split("\r\n|[\n\r\x85\u2028\u2029]", text)


def trouble(text: str, error: yaml.MarkedYAMLError) -> Trouble | None:
    """What PyYAML's error means to whoever wrote the text; None where that is not known."""
    problem, context, at, begin = str(error.problem), str(error.context), error.problem_mark, error.context_mark
    if at is None:
        return None
    lines = lines_of(text)
    line = _line(lines, at)
    if r"'\t'" in problem:
        return Trouble("a tab: YAML is indented by blanks alone", at, _write(line.replace("\t", "  ")))
    if "escape character" in problem and begin is not None:
        why = "in double quotes a backslash begins an escape, and this one is none"
        return Trouble(why, at, f"patterns stand in single quotes: {_write(_in_single_quotes(line, begin.column))}")
    if "while scanning a quoted scalar" in context and begin is not None:
        return Trouble("the quote that begins here is not closed", begin, _write(_closed(_line(lines, begin), begin.column)))
    if "expected ':'" in problem and begin is not None:
        return _without_colon(lines, begin)
    if "while parsing a flow" in context and begin is not None:
        bracket, closing = ("{", "}") if "mapping" in context else ("[", "]")
        if at.line != begin.line:
            return Trouble(f"the `{bracket}` that begins here is not closed", begin, _write(_line(lines, begin) + closing))
        return _to_be_quoted(line, at, f"between `{bracket}` and `{closing}` a text with one of `{{}}[],:` in it stands in quotes")
    if "mapping values are not allowed" in problem or "block end" in problem or "'<block" in problem:
        if ": " in line[: at.column] or "<scalar>" in problem:
            why = "a text that begins with a bracket or a quote, or has `: ` in it, stands in quotes as a whole"
            return _to_be_quoted(line, at, why)
        return Trouble("the line is not as far in as the line that it belongs to", at, _further_in(lines, at.line))
    if re.search(r"scanning (an alias|an anchor|a block scalar|a tag)", context) or "undefined alias" in problem:
        return _to_be_quoted(_line(lines, begin or at), begin or at, "a text that begins with one of `*&|>!` stands in quotes")
    if "cannot start any token" in problem:
        return Trouble(
            "a text that begins with one of `%@` and the backtick stands in quotes", at, _write(_quoted_from(line, at.column))
        )
    return None


def _line(lines: list[str], mark: yaml.Mark) -> str:
    return lines[mark.line] if mark.line < len(lines) else ""


def _write(line: str) -> str:
    return f"write `{line}`" if len(line) <= _LONGEST else ""


def _in_single_quotes(line: str, begin: int) -> str:
    """A line with the text in double quotes that begins there in single ones."""
    found = re.compile(r'"((?:[^"\\]|\\.)*)"').match(line, begin)
    if found is None:
        return line
    return line[:begin].lstrip() + _quoted(found[1].replace(r"\"", '"')) + line[found.end() :]


def _to_be_quoted(line: str, at: yaml.Mark, why: str) -> Trouble:
    match = _FLOW_ENTRY.fullmatch(line) or (None if "{" in line[: at.column] else _ENTRY.fullmatch(line))
    if match is None:
        return Trouble(why, at, "put it in single quotes, in which a `'` is written twice")
    text = match["value"]
    inner = text[1:-1] if text[0] == text[-1] == "'" and len(text) > 1 else text
    after = match["after"] if "after" in match.groupdict() else ""
    return Trouble(why, at, _write(f"{match['before']}{_quoted(inner)}{after}".strip()))


def _closed(line: str, begin: int) -> str:
    """A line with a second quote at its end: in brackets before those that close."""
    text = line[begin:].rstrip()
    inside = text.rstrip("}] ") if any(bracket in line[:begin] for bracket in "{[") else text
    return f"{line[:begin]}{inside}{line[begin]}{text[len(inside) :]}".strip()


def _quoted_from(line: str, column: int) -> str:
    """A line with the text in quotes that begins there: in brackets it ends with its item."""
    inside = any(bracket in line[:column] for bracket in "{[")
    end = re.compile(r"[,\]}]|$" if inside else r"$").search(line, column)
    assert end is not None
    return f"{line[:column]}{_quoted(line[column : end.start()].strip())}{line[end.start() :]}".strip()


def _without_colon(lines: list[str], at: yaml.Mark) -> Trouble:
    line = _line(lines, at)
    close = re.fullmatch(r"(\s*(?:- )?[\w.-]+):(\S.*)", line)
    if close:
        return Trouble("a blank is missing after the colon", at, _write(f"{close[1]}: {close[2]}"))
    return Trouble("neither `key: value` nor the item of a list", at, "write `key: value`, or put `- ` before it")


def _further_in(lines: list[str], number: int) -> str:
    """How far in the line could be meant to stand: as an open one above it."""
    own, least, places = _depth(lines[number]), 10**9, list[tuple[int, int]]()
    for above in range(number - 1, -1, -1):
        depth = _depth(lines[above])
        if lines[above].strip() and not lines[above].lstrip().startswith("#") and depth < least:
            least = depth
            places.append((depth, above + 1))
    near = sorted(places, key=lambda place: abs(place[0] - own))[:2]
    near = [place for place in near if place[0] != own]
    if not near:
        return ""
    (blanks, beside), *other = near
    more = "".join(f"; or with {depth} blanks before it, as line {above}" for depth, above in other)
    return f"{_write(' ' * blanks + lines[number].strip())}, as far in as line {beside}{more}"


def _depth(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
