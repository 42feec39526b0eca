"""Masks: callables from samples to the tokens that a selector selects.

Selectors of single tokens become a look-up in an array over the vocabulary. Selectors of text work in bytes of the decoded
text and share one decode; a token is selected when its bytes overlap a span. A mask may be True outside the targets, and the
labeller drops those tokens.

Suffixes: V token ids, T tokens, S samples, P pieces or turns, M spans.
"""

from __future__ import annotations

import re
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from typing import Any, ClassVar

import numpy as np
import regex

from dwl_plugin.classes.data_codes import data_sets_of
from dwl_plugin.classes.samples import Samples
from dwl_plugin.classes.token_bytes import Bools, TokenTable
from dwl_plugin.errors import PREFIX, ConfigError, Problem

__all__ = ["TIME_LIMIT_S", "Clock", "InVocabulary", "Mask", "MaskContext", "PatternTooSlowError", "covers"]

TIME_LIMIT_S = 4.0
"""How long one pattern may search one sample, or the vocabulary, in seconds of CPU time; most patterns need milliseconds."""

_WORD = regex.compile(r"\w+")
_INSIDE_WORD = regex.compile(r"(?<=\w)\w")


class PatternTooSlowError(ConfigError):
    """A pattern ran past `TIME_LIMIT_S` on a sample, or out of memory."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        super().__init__(problems)
        if self.problems:  # raised in the middle of training: the header of a start-up error would mislead
            Exception.__init__(self, "\n".join(f"{PREFIX} {problem}" for problem in self.problems))


Mask = Callable[[Samples], Bools]
"""Samples -> (T,) True where a token is selected."""


@dataclass(frozen=True, eq=False)
class MaskContext:
    """What a selector makes its mask from.

    Args:
        tokenizer: fast or slow.
        table: the bytes of its tokens; blank where no selector looks at text.
        may_be_empty: whether the class may have no token in the vocabulary.
        marks: names of the marks, in the order of their bits.
        data_sets: names of the data sets, as the host numbers them from 1.
        problems: what this tokenizer cannot serve.
    """

    tokenizer: Any
    table: TokenTable
    may_be_empty: bool
    marks: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()
    problems: list[Problem] = field(default_factory=list)

    def look_up(self, ids: Iterable[int]) -> Mask:
        """The mask of some token ids."""
        member_V = np.zeros(self.table.size + 1, np.bool_)
        member_V[list(ids)] = True
        return InVocabulary(member_V)


@dataclass(frozen=True, eq=False)
class Marked:
    """`marked`: the data set mark number `bit`."""

    bit: int

    def __call__(self, samples: Samples) -> Bools:
        return (samples.codes_T >> self.bit & 1).astype(np.bool_)


@dataclass(frozen=True, eq=False)
class FromDataSet:
    """`dataset`: the data set of this number."""

    number: int

    def __call__(self, samples: Samples) -> Bools:
        from_it_T: Bools = data_sets_of(samples.codes_T) == self.number
        return from_it_T


@dataclass(frozen=True, eq=False)
class InVocabulary:
    """`token_ids`, `tokens`, `token_regex`, `special`, `added`: (V + 1,) True for the ids that are selected."""

    member_V: Bools

    def __call__(self, samples: Samples) -> Bools:
        return self.member_V[samples.ids_T]


@dataclass(frozen=True)
class InText:
    """`regex`: tokens that overlap a group of a match; an empty match selects nothing."""

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
            except (TimeoutError, MemoryError) as error:  # or out of the engine's own stack
                limit = f"one sample may take {TIME_LIMIT_S:g} s"
                why = limit if isinstance(error, TimeoutError) else "it takes more memory than there is"
                message = f"too slow: stopped in a text of {len(text):,} characters; {why}"
                hint = "the pattern backtracks: avoid a repetition of a repetition, as in (a+)+, or make it atomic, (?>a+)"
                raise PatternTooSlowError([Problem(self.path, message, self.pattern.pattern, hint=hint)]) from None
        return samples.in_text(spans_P)


class Clock:
    """The rest of `TIME_LIMIT_S`, by the clock that `regex` reads."""

    def __init__(self) -> None:
        self.end = time.process_time() + TIME_LIMIT_S

    def left(self) -> float:
        """The seconds that are left; raises `TimeoutError` where there are none."""
        left = self.end - time.process_time()
        if left <= 0:
            raise TimeoutError
        return left


@dataclass(frozen=True)
class Words:
    """`words`: tokens that overlap a keyword. A keyword begins where a word begins, and ends inside no word.

    Thousands of keywords take one pass: every word of the text is looked up in a dictionary of their first words.

    A word is a run of `\\w`. Letters are compared as they are, or by Unicode's case folding, where that of a letter is
    one letter.
    """

    words: frozenset[str]
    ignore_case: bool = False

    def __call__(self, samples: Samples) -> Bools:
        return samples.in_text([list(self._spans(text)) for text in samples.pieces.texts])

    def contains(self, words: Iterable[str]) -> bool:
        """True if each of `words` is one of these, case folded where this folds it."""
        return set(map(self._fold, words)) <= set(map(self._fold, self.words))

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of every keyword in a text, in characters."""
        folded, by_first_word = self._fold(text), self._by_first_word
        # By position, as above: pos, endpos, overlapped, partial, concurrent.
        for match in _WORD.finditer(text, None, None, False, False, False):
            begin, end = match.span()
            for keyword in by_first_word.get(folded[begin:end], ()):
                stop = begin + len(keyword)
                if stop == end or (stop > end and folded.startswith(keyword, begin) and not _INSIDE_WORD.match(text, stop)):
                    yield begin, stop

    @cached_property
    def _by_first_word(self) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for word in self.words:
            first = _WORD.match(word)
            assert first is not None, word
            keyword = self._fold(word)
            grouped.setdefault(keyword[: first.end()], []).append(keyword)
        return grouped

    def _fold(self, text: str) -> str:
        if not self.ignore_case:
            return text
        folded = text.casefold()
        if len(folded) == len(text):
            return folded
        return "".join(char if len(char.casefold()) > 1 else char.casefold() for char in text)


@dataclass(frozen=True)
class Between:
    """`between`: tokens from an open tag to the next close tag, or to the end of the sample.

    The tags are searched in all of a sample's text. A token that overlaps a tag belongs to it. A prompt may only mention
    a tag: a masked open tag that is never closed, or that another one follows before it is, counts only where a turn begins
    right after it, whitespace aside, and no longer than that turn.
    """

    open_tag: bytes
    close_tag: bytes
    include_delimiters: bool = True

    def __call__(self, samples: Samples) -> Bools:
        spans = np.array(list(self._spans(samples)), np.int64).reshape(-1, 4)
        outer_begin, inner_begin, inner_end, outer_end = spans.T
        if self.include_delimiters:
            return samples.covered(outer_begin, outer_end)
        open_tags, close_tags = samples.covered(outer_begin, inner_begin), samples.covered(inner_end, outer_end)
        return samples.covered(inner_begin, inner_end) & ~open_tags & ~close_tags

    def _spans(self, samples: Samples) -> Iterator[tuple[int, int, int, int]]:
        """Yield where the open tag begins, where the text begins and ends, and where the close tag ends."""
        data = samples.data
        turn_begins, turn_ends = samples.turn_extents
        for at, sample_end in samples.extents:
            closing = at  # where the next close tag begins; below 0 where there is none
            while (begin := data.find(self.open_tag, at, sample_end)) >= 0:
                text = begin + len(self.open_tag)
                if 0 <= closing < text:
                    closing = data.find(self.close_tag, text, sample_end)
                turn = bisect_right(turn_ends, begin)
                masked = turn == len(turn_ends) or turn_begins[turn] >= text
                if masked and (closing < 0 or data.find(self.open_tag, text, closing) >= 0):
                    next_turn = turn_begins[turn] if turn < len(turn_ends) else sample_end
                    if next_turn >= sample_end or data[text:next_turn].strip():
                        at = text
                        continue
                    if not text <= closing < turn_ends[turn]:
                        at = turn_ends[turn]
                        yield begin, text, at, at
                        continue
                if closing < 0:
                    yield begin, text, sample_end, sample_end
                    break
                at = closing + len(self.close_tag)
                yield begin, text, closing, at


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
    """`role`: the messages that one of `own` begins. A message ends where the next header begins."""

    header: re.Pattern[bytes]
    own: frozenset[bytes]

    def __call__(self, samples: Samples) -> Bools:
        spans = np.array(list(self._spans(samples)), np.int64).reshape(-1, 2)
        return samples.covered(spans[:, 0], spans[:, 1])

    def _spans(self, samples: Samples) -> Iterator[tuple[int, int]]:
        for begin, end in samples.extents:
            text = samples.data[begin:end]  # of its own: a pattern looks at what stands before a header
            found = list(self.header.finditer(text))
            starts = [samples.without_blank(begin + match.start()) for match in found]
            for match, start, stop in zip(found, starts, [*starts[1:], end], strict=False):
                if match.group() in self.own:
                    yield start, stop


@dataclass(frozen=True)
class _Joined:
    masks: tuple[Mask, ...]
    join: ClassVar[np.ufunc]

    def __call__(self, samples: Samples) -> Bools:
        joined: Bools = reduce(self.join, [mask(samples) for mask in self.masks])
        return joined

    @classmethod
    def of(cls, masks: Sequence[Mask]) -> Mask:
        """Look-ups among the masks are folded into one."""
        lookups = [mask.member_V for mask in masks if isinstance(mask, InVocabulary)]
        parts: list[Mask] = [InVocabulary(reduce(cls.join, lookups))] if lookups else []
        parts += [mask for mask in masks if not isinstance(mask, InVocabulary)]
        return cls(tuple(parts)) if len(parts) > 1 else parts[0]


class AnyOf(_Joined):
    """`any`."""

    join = np.bitwise_or


class AllOf(_Joined):
    """`all`."""

    join = np.bitwise_and


@dataclass(frozen=True)
class Not:
    """`not`."""

    mask: Mask

    def __call__(self, samples: Samples) -> Bools:
        return ~self.mask(samples)


def covers(wider: Mask, narrower: Mask) -> bool:
    """True where the two masks alone show that the first selects every token of the second."""
    if wider == narrower:
        return True
    if isinstance(narrower, AnyOf):
        return all(covers(wider, part) for part in narrower.masks)
    if isinstance(wider, AllOf):
        return all(covers(part, narrower) for part in wider.masks)
    if isinstance(wider, AnyOf) and any(covers(part, narrower) for part in wider.masks):
        return True
    if isinstance(narrower, AllOf):
        return any(covers(wider, part) for part in narrower.masks)
    match wider, narrower:
        case Not(), Not():
            return covers(narrower.mask, wider.mask)
        case InVocabulary(), InVocabulary():
            return not (narrower.member_V & ~wider.member_V).any()
        case InText(), InText():
            return wider.pattern == narrower.pattern and wider.group == 0
        case Between(), Between():
            return wider == replace(narrower, include_delimiters=True)
        case Words(), Words():
            return wider.ignore_case >= narrower.ignore_case and wider.contains(narrower.words)
        case AtTurnEnds(), AtTurnEnds():
            return wider.first >= narrower.first and wider.last >= narrower.last
    return False
