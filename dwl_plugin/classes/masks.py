"""What decides membership: one callable per selector, from samples to a mask over their tokens.

A selector that only looks at the token itself is a look-up in an array over the vocabulary. Text selectors work in bytes
of the decoded text and share one decode; a token is a member when its bytes overlap a span. A mask may be True outside
the targets: whoever calls last leaves only targets in it.

Suffixes: V token ids, T tokens, S samples, P pieces or turns, M spans.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Protocol

import numpy as np
import regex

from dwl_plugin.classes.keywords import Words
from dwl_plugin.classes.samples import Samples
from dwl_plugin.classes.token_bytes import Bools
from dwl_plugin.errors import ConfigError, Problem

__all__ = [
    "TIME_LIMIT_S",
    "AllOf",
    "AnyOf",
    "AtTurnEnds",
    "Between",
    "Clock",
    "InText",
    "InVocabulary",
    "Mask",
    "Not",
    "NthTurn",
    "OfRole",
    "PatternTooSlowError",
    "all_of",
    "any_of",
    "covers",
    "negation",
]

TIME_LIMIT_S = 4.0
"""How long one pattern may search one sample, or the vocabulary (seconds of CPU time). Ordinary patterns need
milliseconds."""


class PatternTooSlowError(ConfigError):
    """A pattern ran past `TIME_LIMIT_S` on a sample, or out of memory."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        super().__init__(problems)
        if self.problems:  # raised in the middle of training: the header of a start-up error would mislead
            Exception.__init__(self, "\n".join(f"[dwl] {problem}" for problem in self.problems))


class Mask(Protocol):
    """Samples -> (T,) True where a token is meant."""

    def __call__(self, samples: Samples) -> Bools: ...


@dataclass(frozen=True, eq=False)
class InVocabulary:
    """`token_ids`, `tokens`, `token_regex`, `special`, `added`: membership is the token's own."""

    member: Bools

    def __call__(self, samples: Samples) -> Bools:
        return self.member[samples.ids_T]


@dataclass(frozen=True)
class InText:
    """`regex`: tokens that overlap a group of a match; a match without length selects nothing.

    Raises:
        PatternTooSlowError: a sample took longer than `TIME_LIMIT_S`, or more memory than there is.
    """

    path: str = field(compare=False)
    pattern: regex.Pattern[str]
    group: int | str = 0

    def __call__(self, samples: Samples) -> Bools:
        search, group, pieces = self.pattern.finditer, self.group, samples.pieces
        spans_P: list[list[tuple[int, int]]] = []
        sample, clock = -1, Clock()
        for text, own in zip(pieces.texts, pieces.samples, strict=True):
            if own != sample:
                sample, clock = own, Clock()
            try:
                # By position, as keywords cost more than a search in a short text: pos, endpos, overlapped, partial,
                # concurrent (to give the GIL back and forth costs as much), timeout.
                matches = search(text, None, None, False, False, False, clock.left())
                spans_P.append([match.span(group) for match in matches])
            except TimeoutError:
                raise self._too_slow(text, f"one sample may take {TIME_LIMIT_S:g} s") from None
            except MemoryError:  # of the engine's own stack
                raise self._too_slow(text, "it takes more memory than there is") from None
        return samples.in_text(spans_P)

    def _too_slow(self, text: str, why: str) -> PatternTooSlowError:
        problem = Problem(
            self.path,
            f"too slow: stopped in a text of {len(text):,} characters; {why}",
            self.pattern.pattern,
            hint="the pattern backtracks: avoid a repetition of a repetition, as in (a+)+, or make it atomic, (?>a+)",
        )
        return PatternTooSlowError([problem])


class Clock:
    """What is left of `TIME_LIMIT_S`, by the clock that `regex` reads."""

    def __init__(self) -> None:
        self.end = time.process_time() + TIME_LIMIT_S

    def left(self) -> float:
        """Seconds; raises `TimeoutError` where there are none."""
        left = self.end - time.process_time()
        if left <= 0:
            raise TimeoutError
        return left


@dataclass(frozen=True)
class Between:
    """`between`: tokens from an opening delimiter to the next closing one, or to the end of the sample.

    The delimiters are looked for in all of a sample's text. A token that overlaps one at all belongs to the delimiter.
    A prompt may only mention one: a masked opening that is never closed, or that another one follows before it is, counts
    only where a turn begins right after it, whitespace aside, and no longer than that turn.
    """

    opening: bytes
    closing: bytes
    include_delimiters: bool = True

    def __call__(self, samples: Samples) -> Bools:
        spans = np.array(list(self._spans(samples)), np.int64).reshape(-1, 4)
        outer_begin, inner_begin, inner_end, outer_end = spans.T
        if self.include_delimiters:
            return samples.covered(outer_begin, outer_end)
        opening, closing = samples.covered(outer_begin, inner_begin), samples.covered(inner_end, outer_end)
        return samples.covered(inner_begin, inner_end) & ~opening & ~closing

    def _spans(self, samples: Samples) -> Iterator[tuple[int, int, int, int]]:
        """Where the delimiters begin and end: opening, text, closing."""
        data = samples.data
        turn_begins, turn_ends = samples.turn_extents
        for at, sample_end in samples.extents:
            closing = at
            while (opening := data.find(self.opening, at, sample_end)) >= 0:
                text = opening + len(self.opening)
                if 0 <= closing < text:
                    closing = data.find(self.closing, text, sample_end)
                turn = bisect_right(turn_ends, opening)
                masked = turn == len(turn_ends) or turn_begins[turn] >= text
                if masked and (closing < 0 or data.find(self.opening, text, closing) >= 0):
                    next_turn = turn_begins[turn] if turn < len(turn_ends) else sample_end
                    if next_turn >= sample_end or data[text:next_turn].strip():
                        at = text
                        continue
                    if not text <= closing < turn_ends[turn]:
                        at = turn_ends[turn]
                        yield opening, text, at, at
                        continue
                if closing < 0:
                    yield opening, text, sample_end, sample_end
                    break
                at = closing + len(self.closing)
                yield opening, text, closing, at


@dataclass(frozen=True)
class NthTurn:
    """`turn`: the n-th contiguous run of targets of each sample; 1 is the first, -1 the last."""

    number: int

    def __call__(self, samples: Samples) -> Bools:
        begin_P, end_P, sample_P = samples.turns
        before_P = np.searchsorted(sample_P, sample_P, "left")
        after_P = np.searchsorted(sample_P, sample_P, "right")
        wanted_P = before_P + self.number - 1 if self.number > 0 else after_P + self.number
        chosen_P = wanted_P == np.arange(len(sample_P))
        return samples.in_ranges(begin_P[chosen_P], end_P[chosen_P])


@dataclass(frozen=True)
class AtTurnEnds:
    """`position`: so many tokens at the beginning and at the end of each turn."""

    first: int
    last: int

    def __call__(self, samples: Samples) -> Bools:
        begin_P, end_P, _ = samples.turns
        first = samples.in_ranges(begin_P, np.minimum(begin_P + self.first, end_P))
        last = samples.in_ranges(np.maximum(end_P - self.last, begin_P), end_P)
        return first | last


@dataclass(frozen=True)
class OfRole:
    """`role`: the messages of one role. A message begins with its header and ends where the next one begins.

    Args:
        headers: what opens a message, of every role.
        own: the headers of this role.
    """

    headers: frozenset[bytes]
    own: frozenset[bytes]

    def __call__(self, samples: Samples) -> Bools:
        spans = np.array(list(self._spans(samples)), np.int64).reshape(-1, 2)
        return samples.covered(spans[:, 0], spans[:, 1])

    def _spans(self, samples: Samples) -> Iterator[tuple[int, int]]:
        longest_first = sorted(self.headers, key=len, reverse=True)
        header = re.compile(b"|".join(map(re.escape, longest_first)))
        for begin, end in samples.extents:
            found = list(header.finditer(samples.data, begin, end))
            ends = [*(match.start() for match in found[1:]), end]
            for match, stop in zip(found, ends, strict=False):
                if match.group() in self.own:
                    yield match.start(), stop


@dataclass(frozen=True)
class AnyOf:
    """`any`."""

    selectors: tuple[Mask, ...]

    def __call__(self, samples: Samples) -> Bools:
        return reduce(np.bitwise_or, [selector(samples) for selector in self.selectors])


@dataclass(frozen=True)
class AllOf:
    """`all`."""

    selectors: tuple[Mask, ...]

    def __call__(self, samples: Samples) -> Bools:
        return reduce(np.bitwise_and, [selector(samples) for selector in self.selectors])


@dataclass(frozen=True)
class Not:
    """`not`."""

    selector: Mask

    def __call__(self, samples: Samples) -> Bools:
        return ~self.selector(samples)


def any_of(selectors: Sequence[Mask]) -> Mask:
    """`any`, its look-ups folded into one."""
    return _folded(selectors, np.bitwise_or, AnyOf)


def all_of(selectors: Sequence[Mask]) -> Mask:
    """`all`, its look-ups folded into one."""
    return _folded(selectors, np.bitwise_and, AllOf)


def negation(selector: Mask) -> Mask:
    """`not`; that of a look-up is a look-up."""
    return InVocabulary(~selector.member) if isinstance(selector, InVocabulary) else Not(selector)


def _folded(selectors: Sequence[Mask], join: np.ufunc, together: type[AnyOf | AllOf]) -> Mask:
    lookups = [selector.member for selector in selectors if isinstance(selector, InVocabulary)]
    folded = [InVocabulary(reduce(join, lookups))] if lookups else []
    others = [selector for selector in selectors if not isinstance(selector, InVocabulary)]
    return together((*folded, *others)) if len(folded) + len(others) > 1 else [*folded, *others][0]


def covers(wider: Mask, selector: Mask) -> bool:
    """True where it is plain from the two selectors that the first takes every token of the second."""
    if wider == selector:
        return True
    if isinstance(selector, AnyOf):
        return all(covers(wider, part) for part in selector.selectors)
    if isinstance(wider, AllOf):
        return all(covers(part, selector) for part in wider.selectors)
    if isinstance(wider, AnyOf) and any(covers(part, selector) for part in wider.selectors):
        return True
    if isinstance(selector, AllOf):
        return any(covers(wider, part) for part in selector.selectors)
    if isinstance(wider, Not) and isinstance(selector, Not):
        return covers(selector.selector, wider.selector)
    if isinstance(wider, InVocabulary) and isinstance(selector, InVocabulary):
        return not (selector.member & ~wider.member).any()
    if isinstance(wider, InText) and isinstance(selector, InText):
        return wider.pattern == selector.pattern and wider.group == 0
    if isinstance(wider, Between) and isinstance(selector, Between):
        return wider == replace(selector, include_delimiters=True)
    if isinstance(wider, Words) and isinstance(selector, Words):
        return wider.ignore_case >= selector.ignore_case and wider.takes(selector.words)
    if isinstance(wider, AtTurnEnds) and isinstance(selector, AtTurnEnds):
        return wider.first >= selector.first and wider.last >= selector.last
    return False
