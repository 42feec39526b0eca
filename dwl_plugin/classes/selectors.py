"""What decides membership: one callable per selector, from samples to a mask over their tokens.

Token selectors are a look-up in an array over the vocabulary. Text selectors work in bytes of the decoded text and
share one decode; a token is a member when its bytes overlap a span.

Suffixes: V token ids, T tokens, S samples, P pieces, C characters, M spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import TypeAlias

import numpy as np
import regex

from dwl_plugin.classes.token_table import Bools, Ints, TokenTable, as_text
from dwl_plugin.errors import ConfigError, Problem

__all__ = ["TIME_LIMIT_S", "Between", "InText", "InVocabulary", "PatternTooSlowError", "Samples", "Selector"]

TIME_LIMIT_S = 4.0
"""How long one pattern may search one sample (seconds of CPU time, shared out over its turns but never less than an
eighth for one). Ordinary patterns need milliseconds."""


class PatternTooSlowError(ConfigError):
    """A pattern ran past `TIME_LIMIT_S` on a sample."""

    def __init__(self, problems: Iterable[Problem] | str) -> None:
        super().__init__(problems)
        if self.problems:  # raised in the middle of training: the header of a start-up error would mislead
            Exception.__init__(self, "\n".join(f"[dwl] {problem}" for problem in self.problems))


class Samples:
    """Samples laid end to end, with their text decoded once for all selectors.

    Args:
        table: bytes of each token id.
        ids_T: token ids from 0 to V, where V stands for every id outside the vocabulary.
        target_T: True where the token is a target.
        starts_S: where each sample begins; increasing, the first is 0.
    """

    def __init__(self, table: TokenTable, ids_T: Ints, target_T: Bools, starts_S: Ints) -> None:
        self.table, self.ids_T, self.target_T, self.starts_S = table, ids_T, target_T, starts_S

    @cached_property
    def _decoded(self) -> tuple[bytes, Ints]:
        return self.table.decode(self.ids_T, self.starts_S)

    @property
    def data(self) -> bytes:
        """The bytes of all samples."""
        return self._decoded[0]

    @property
    def offsets(self) -> Ints:
        """(T + 1,) where each token begins in `data`."""
        return self._decoded[1]

    @cached_property
    def extents(self) -> list[tuple[int, int]]:
        """Begin and end in `data` of each sample that has a target."""
        ends_S = np.append(self.starts_S[1:], len(self.ids_T))
        has_target_S = np.logical_or.reduceat(self.target_T, self.starts_S)
        begins, ends = (self.offsets[edge_S[has_target_S]].tolist() for edge_S in (self.starts_S, ends_S))
        return list(zip(begins, ends, strict=True))

    @cached_property
    def pieces(self) -> Pieces:
        """The text that patterns see: each turn, split at special tokens."""
        inside_T = self.target_T & ~self.table.special[self.ids_T]
        edge = np.zeros(len(inside_T) + 1, np.bool_)
        edge[self.starts_S] = True
        before, after = np.append(False, inside_T), np.append(inside_T, False)
        begin_P = np.flatnonzero(after & (edge | ~before))
        end_P = np.flatnonzero(before & (edge | ~after))
        sample_P = np.searchsorted(self.starts_S, begin_P, "right")
        return Pieces.of(self, self.offsets[begin_P], self.offsets[end_P], np.bincount(sample_P)[sample_P])

    def covered(self, begin_M: Ints, end_M: Ints) -> Bools:
        """(T,) True where a token's bytes overlap a span of `data`, or a token without bytes stands inside one."""
        some_M = begin_M < end_M
        first_M = np.searchsorted(self.offsets[1:], begin_M[some_M], "right")
        stop_M = np.searchsorted(self.offsets[:-1], end_M[some_M], "left")
        return self.in_ranges(first_M, stop_M)

    def in_ranges(self, first_M: Ints, stop_M: Ints) -> Bools:
        """(T,) True for the tokens of the ranges `first` up to and without `stop`."""
        mask_T = np.zeros(len(self.ids_T), np.bool_)
        mask_T[_ranges(first_M, stop_M - first_M)] = True
        return mask_T


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of text as str, and the tokens of their characters.

    Characters are counted through all pieces: the i-th of piece p is number `first_char[p] + i`.

    Args:
        texts: the pieces.
        seconds: how long a pattern may search each.
        first_char: the number of each piece's first character.
        first_token: for each character, the token of its first byte.
        last_token: for each character, the token of its last byte.
    """

    texts: list[str]
    seconds: list[float]
    first_char: Ints
    first_token: Ints
    last_token: Ints

    @classmethod
    def of(cls, samples: Samples, begin_P: Ints, end_P: Ints, pieces_in_sample_P: Ints) -> Pieces:
        """The pieces of `samples.data` from `begin_P` to `end_P`."""
        data = samples.data
        texts = [as_text(data[begin:end]) for begin, end in zip(begin_P.tolist(), end_P.tolist(), strict=True)]
        chars_P = np.fromiter(map(len, texts), np.int64, len(texts))
        code_C = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
        length_C = 1 + (code_C >= 0x80).astype(np.int64) + (code_C >= 0x800) + (code_C >= 0x10000)
        length_C[(code_C >= 0xDC80) & (code_C <= 0xDCFF)] = 1  # see as_text: one byte each
        token_of_byte = np.repeat(np.arange(len(samples.ids_T)), np.diff(samples.offsets))
        token_of_byte = token_of_byte[_ranges(begin_P, end_P - begin_P)]
        end_C = np.cumsum(length_C)
        return cls(
            texts=texts,
            seconds=np.maximum(TIME_LIMIT_S / pieces_in_sample_P, TIME_LIMIT_S / 8).tolist(),
            first_char=np.cumsum(chars_P) - chars_P,
            first_token=token_of_byte[end_C - length_C],
            last_token=token_of_byte[end_C - 1],
        )


def _ranges(first: Ints, length: Ints) -> Ints:
    """`first`, `first + 1`, … `first + length - 1` of each range, end to end."""
    shift = first - (np.cumsum(length) - length)
    shifts: Ints = np.repeat(shift, length)
    return np.arange(len(shifts)) + shifts


@dataclass(frozen=True, eq=False)
class InVocabulary:
    """`token_ids`, `tokens`, `token_regex`: membership is the token's own."""

    member: Bools

    def __call__(self, samples: Samples) -> Bools:
        return self.member[samples.ids_T]


@dataclass(frozen=True)
class InText:
    """`regex`: tokens that overlap a group of a match; a match without length selects nothing.

    Raises:
        PatternTooSlowError: a sample took longer than `TIME_LIMIT_S`.
    """

    path: str
    pattern: regex.Pattern[str]
    group: int | str = 0

    def __call__(self, samples: Samples) -> Bools:
        pieces = samples.pieces
        found_P = self._search(pieces)
        spans_M = np.fromiter(chain.from_iterable(chain.from_iterable(found_P)), np.int64).reshape(-1, 2)
        some_M = spans_M[:, 1] > spans_M[:, 0]
        spans_M += np.repeat(pieces.first_char, list(map(len, found_P)))[:, None]
        begin_M, end_M = spans_M[some_M].T
        return samples.in_ranges(pieces.first_token[begin_M], pieces.last_token[end_M - 1] + 1)

    def _search(self, pieces: Pieces) -> list[list[tuple[int, int]]]:
        """The spans in each piece, in characters."""
        search, group = self.pattern.finditer, self.group
        found_P = []
        text = ""
        try:
            for text, seconds in zip(pieces.texts, pieces.seconds, strict=True):
                # By position, because keywords cost more than a search in a short text, in the order pos, endpos,
                # overlapped, partial, concurrent, timeout. To give the GIL back and forth (concurrent) costs as much.
                matches = search(text, None, None, False, False, False, seconds)
                found_P.append([match.span(group) for match in matches])
        except TimeoutError:
            raise PatternTooSlowError([self._too_slow(text)]) from None
        return found_P

    def _too_slow(self, text: str) -> Problem:
        return Problem(
            self.path,
            f"too slow: stopped in a text of {len(text):,} characters; one sample may take {TIME_LIMIT_S:g} s",
            self.pattern.pattern,
            hint="the pattern backtracks: avoid a repetition of a repetition, as in (a+)+, or make it atomic, (?>a+)",
        )


@dataclass(frozen=True)
class Between:
    """`between`: tokens from an opening delimiter to the next closing one, or to the end of the sample.

    The delimiters are looked for in all of a sample's text. A token that overlaps one at all belongs to the delimiter.
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
        for at, sample_end in samples.extents:
            while (opening := data.find(self.opening, at, sample_end)) >= 0:
                text = opening + len(self.opening)
                closing = data.find(self.closing, text, sample_end)
                if closing < 0:
                    yield opening, text, sample_end, sample_end
                    break
                at = closing + len(self.closing)
                yield opening, text, closing, at


Selector: TypeAlias = InVocabulary | InText | Between
