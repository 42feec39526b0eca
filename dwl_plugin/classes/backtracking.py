"""How many steps a pattern can take at worst, read off the pattern.

A search that is timed asks for the time at every match, which costs more than most matches. So a pattern is timed only
where it could need the limit: where it is not known that a text of this length takes but so many steps. Whatever is not
plainly understood here is unknown, and unknown patterns are timed.

The bound: a matcher tries one way after the other, and goes back into an element only if something behind it can fail.
An element that is entered so many times, and can be left in so many ways, multiplies what stands behind it. A repetition
of characters before one that is none of them can be left in one way, its end.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TypeAlias

import regex

from dwl_plugin.classes.samples import JOINT

__all__ = ["Conduct", "conduct"]

MOST = 100
"""A repetition of more than this is not followed."""


class _UnknownError(Exception):
    """A construct whose steps are not known here."""


@dataclass(frozen=True)
class _Char:
    """One character, a set of them, or an anchor, which has no width. `source` is empty where flags may change what it matches."""

    cost: int = 1
    width: int = 1
    literal: str = ""
    source: str = ""


@dataclass(frozen=True)
class _Choice:
    """Alternatives, each a sequence; a group has one."""

    branches: tuple[_Sequence, ...]


@dataclass(frozen=True)
class _Repeat:
    """`body` from `least` to `most` times; None is without end."""

    body: _Node
    least: int
    most: int | None


@dataclass(frozen=True)
class _Look:
    """A lookahead, which is never gone back into."""

    body: _Node


_Node: TypeAlias = _Char | _Choice | _Repeat | _Look
_Sequence: TypeAlias = tuple[_Node, ...]


@dataclass(frozen=True)
class Conduct:
    """What is known of the search for a pattern.

    Args:
        local: a match depends on its own characters and on whether a `\\w` stands beside them, and on nothing else.
        stays: nothing in it matches `JOINT`, so no attempt reaches past the piece of text it began in.
        prefix: what every match begins with; may be empty.
        whole: the pattern.
    """

    local: bool
    stays: bool
    prefix: str
    whole: _Choice
    _attempts: dict[int, float] = field(default_factory=dict, compare=False, repr=False)

    def steps(self, length: int, starts: int | None = None, reach: int | None = None) -> float:
        """At most so many for all matches in a text of `length`, `starts` of them at a prefix, one for each character; an attempt
        reads `reach` characters at most."""
        reach = length if reach is None else reach
        coarse = max(reach.bit_length() - 4, 0)
        rounded = ((reach >> coarse) + 1) << coarse
        attempt = self._attempts.get(rounded)
        if attempt is None:
            attempt = self._attempts[rounded] = _failing((self.whole,), rounded) + 1
        return (length + 1) * (1 + len(self.prefix)) + attempt * (length + 1 if starts is None else starts)


def conduct(pattern: str) -> Conduct | None:
    """How the search for a `regex` pattern goes; None where that is not known."""
    try:
        reader = _Reader(pattern)
        whole = reader.alternatives()
        if reader.rest():
            return None  # a closing parenthesis too many
        _failing((whole,), 1)
        return Conduct(reader.local, reader.stays, "" if reader.flags else _prefix(whole), whole)
    except (_UnknownError, RecursionError, regex.error):
        return None


def _prefix(whole: _Choice) -> str:
    literals = takewhile(lambda node: isinstance(node, _Char) and node.literal, whole.branches[0])
    return "".join(node.literal for node in literals if isinstance(node, _Char)) if len(whole.branches) == 1 else ""


def _failing(sequence: _Sequence, n: int) -> float:
    """Steps of an attempt, without those that move over text of a match: these come once for each character."""
    fallible = [index for index, node in enumerate(sequence) if not _always(node)]
    stop = fallible[-1] + 1 if fallible else 0
    first = sequence[0] if stop == 1 else None
    if isinstance(first, _Choice):
        steps = 1 + sum(_failing(branch, n) for branch in first.branches)
    else:
        steps = _explore_sequence(sequence[:stop], n, can_fail=False)[0]
    for node in sequence[stop:]:
        if isinstance(node, _Repeat) and _width(node.body) > 0:
            steps += _failing((node.body,), n)
        else:
            steps += _explore(node, n, can_fail=False)[0]
    return steps


def _explore_sequence(sequence: _Sequence, n: int, can_fail: bool) -> tuple[float, float]:
    """(steps, ways out) of a sequence; `can_fail`: what stands behind it can fail."""
    steps, entries = 0.0, 1.0
    for index, node in enumerate(sequence):
        behind = can_fail or not all(map(_always, sequence[index + 1 :]))
        cost, ways = _explore(node, n, behind)
        if ways > 1 and _apart(node, sequence[index + 1 : index + 2]):
            cost, ways = cost + ways, 1  # where it gives characters back, the next one is looked at and is none
        steps, entries = steps + entries * cost, entries * ways
    return steps, entries


def _explore(node: _Node, n: int, can_fail: bool) -> tuple[float, float]:
    if isinstance(node, _Char):
        return node.cost, 1
    if isinstance(node, _Look):
        return 1 + _explore(node.body, n, can_fail=False)[0], 1
    if isinstance(node, _Choice):
        explored = [_explore_sequence(branch, n, can_fail) for branch in node.branches]
        return 1 + sum(cost for cost, _ in explored), sum(ways for _, ways in explored) if can_fail else 1
    cost, ways = _explore(node.body, n, can_fail or node.least > 1)
    if node.most is None:
        if _width(node.body) == 0 or ways != 1:  # (a*)* and the like: as many ways as there are partitions
            raise _UnknownError
        return (n + 1) * (cost + 1), n + 1 if can_fail else 1
    if node.most > MOST:
        raise _UnknownError
    entries = [ways**times for times in range(node.most + 1)]
    return 1 + sum(entries[:-1]) * cost, sum(entries) if can_fail else 1


def _apart(node: _Node, following: _Sequence) -> bool:
    """True for a repetition of characters before one that it cannot match."""
    if not (isinstance(node, _Repeat) and isinstance(node.body, _Char) and node.body.source and node.body.width):
        return False
    return any(
        isinstance(char, _Char) and char.source and char.literal and not regex.fullmatch(node.body.source, char.literal)
        for char in following
    )


def _always(node: _Node) -> bool:
    """True if it matches wherever it is tried."""
    if isinstance(node, _Repeat):
        return node.least == 0 or _always(node.body)
    return isinstance(node, _Choice) and any(all(map(_always, branch)) for branch in node.branches)


def _width(node: _Node) -> int:
    """How many characters it takes at least."""
    if isinstance(node, _Char):
        return node.width
    if isinstance(node, _Choice):
        return min(sum(map(_width, branch)) for branch in node.branches)
    return node.least * _width(node.body) if isinstance(node, _Repeat) else 0


_OPENING = re.compile(r"\(\?(?::|[ims]+:|>|P?<[A-Za-z_]\w*>)|\((?!\?)")
_SET = re.compile(r"\[\^?\]?(?:\\[^\n]|[^\]\[\\])*\]")
_SET_OPERATION = re.compile(r"--|\|\||&&|~~")
_ESCAPE = re.compile(r"\\(?:[dDwWsSnrtfv]|[pP]\{\w+\}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[^\w\s])")
_ANCHOR = re.compile(r"[\^$]|\\[bBAZ]")
_COUNT = re.compile(r"\{(\d*)(,?)(\d*)\}")
_FLAGS = re.compile(r"\(\?[imsau]+\)")


class _Reader:
    """The syntax that is understood: literals, sets, escapes, anchors, groups, lookarounds, repetitions."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.local, self.stays = pattern, 0, True, True
        self.flags = self.take(_FLAGS)
        self.plain = not self.flags

    def char(self, source: str, literal: str = "", cost: int = 1) -> _Char:
        self.stays &= bool(literal) or not regex.fullmatch(source, JOINT)
        return _Char(cost=cost, literal=literal, source=source if self.plain else "")

    def rest(self) -> str:
        return self.pattern[self.at :]

    def take(self, token: re.Pattern[str]) -> re.Match[str] | None:
        match = token.match(self.pattern, self.at)
        self.at = match.end() if match else self.at
        return match

    def alternatives(self) -> _Choice:
        branches = [self.sequence()]
        while self.rest().startswith("|"):
            self.at += 1
            branches.append(self.sequence())
        return _Choice(tuple(branches))

    def sequence(self) -> _Sequence:
        nodes: list[_Node] = []
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            nodes += self.repeated(self.item())
        return tuple(nodes)

    def item(self) -> _Node:
        if found := self.take(_ANCHOR):
            self.local &= found[0] in ("\\b", "\\B")
            return _Char(width=0)
        if found := self.take(_ESCAPE):
            return self.char(found[0], "" if found[0][1].isalpha() else found[0][1])
        if found := self.take(_SET):
            if _SET_OPERATION.search(found[0]):
                raise _UnknownError
            return self.char(found[0], cost=len(found[0]))
        if self.rest().startswith(("(?=", "(?!", "(?<=", "(?<!")):
            self.local = False
            behind = self.rest()[2] == "<"
            self.at += 4 if behind else 3
            body = self.closed()
            if behind and _explore(body, 1, can_fail=True)[1] != 1:
                raise _UnknownError  # it is matched from its end to its beginning
            return _Look(body)
        if found := self.take(_OPENING):
            self.local &= found[0] != "(?>"
            self.plain &= not found[0].endswith(":") or found[0] == "(?:"
            return self.closed()
        char = self.pattern[self.at]
        if char in "\\()[]{}*+?":
            raise _UnknownError
        self.at += 1
        return self.char(char, "" if char == "." else char)

    def closed(self) -> _Choice:
        body = self.alternatives()
        if not self.rest().startswith(")"):
            raise _UnknownError
        self.at += 1
        return body

    def repeated(self, node: _Node) -> list[_Node]:
        """`node` under its quantifier: what it needs at least, then what may follow."""
        sign = self.pattern[self.at : self.at + 1]
        if sign in ("*", "+", "?"):
            least, most = int(sign == "+"), 1 if sign == "?" else None
            self.at += 1
        elif count := self.take(_COUNT):
            least = int(count[1] or 0)
            most = least if not count[2] else int(count[3]) if count[3] else None
            if not (count[1] or count[3]) or (most is not None and most < least):
                raise _UnknownError
        else:
            return [node]
        manner = self.pattern[self.at : self.at + 1]
        self.local &= manner != "+"
        self.at += manner in ("?", "+")
        if self.pattern[self.at : self.at + 1] in ("*", "+", "?", "{"):
            raise _UnknownError
        if least == 0 or _explore(node, 1, can_fail=True)[1] != 1 or _width(node) == 0:
            return [_Repeat(node, least, most)]
        more = [] if most == least else [_Repeat(node, 0, None if most is None else most - least)]
        return [node if least == 1 else _Repeat(node, least, least), *more]
