"""Thousands of keywords in one pass: every word of the text gets a number, and the numbers are looked up together.

Suffixes: C characters, W words of the text, K first words of the keywords, D candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import regex
from numpy.typing import NDArray

from dwl_plugin.classes.samples import Pieces, Samples, ranges
from dwl_plugin.classes.token_bytes import Bools, Ints

__all__ = ["Words"]

Codes = NDArray[np.uint32]
_BUCKETS = 16  # bits


@dataclass(frozen=True)
class Words:
    """`words`: tokens that overlap a keyword. A keyword begins where a word begins, and ends inside no word.

    A word is a run of `\\w`. Letters are compared as they are, or by Unicode's case folding, where that of a letter is
    one letter.
    """

    words: frozenset[str]
    ignore_case: bool = False

    def __call__(self, samples: Samples) -> Bools:
        pieces = samples.pieces
        begin_M, end_M = self.spans(pieces)
        return samples.in_ranges(pieces.first_token[begin_M], pieces.last_token[end_M - 1] + 1)

    def takes(self, words: Iterable[str]) -> bool:
        """True if each of `words` is one of these, case folded where this folds it."""
        fold = self._fold
        own = {fold(_codes(word)).tobytes() for word in self.words}
        return all(fold(_codes(word)).tobytes() in own for word in words)

    def spans(self, pieces: Pieces) -> tuple[Ints, Ints]:
        """Begin and end of every keyword that is found, in characters counted through all pieces."""
        codes_C = self._fold(pieces.codes)
        is_word_C = _is_word()[pieces.codes]
        joint = np.zeros(len(codes_C) + 1, np.bool_)
        joint[pieces.first_char[pieces.first_char < len(joint)]] = True
        before, after = np.append(False, is_word_C), np.append(is_word_C, False)
        begin_W, end_W = np.flatnonzero(after & (joint | ~before)), np.flatnonzero(before & (joint | ~after))
        found_D, which_D = self._first_words.find(codes_C, begin_W, end_W)
        begin_D, end_D = begin_W[found_D], end_W[found_D]
        alone_D, longer_D = self._alone[which_D], self._begins_longer[which_D]
        longer = self._longer_spans(pieces, codes_C, is_word_C, begin_D[longer_D], which_D[longer_D])
        longer_M = np.array(list(longer), np.int64).reshape(-1, 2)
        return np.append(begin_D[alone_D], longer_M[:, 0]), np.append(end_D[alone_D], longer_M[:, 1])

    def _longer_spans(
        self, pieces: Pieces, codes_C: Codes, is_word_C: Bools, begin_D: Ints, which_D: Ints
    ) -> Iterator[tuple[int, int]]:
        """Keywords that go on after their first word, at the words where one may begin."""
        ends = np.append(pieces.first_char[1:], len(codes_C))
        piece_D = np.searchsorted(pieces.first_char, begin_D, "right") - 1
        for begin, which, stop in zip(begin_D.tolist(), which_D.tolist(), ends[piece_D].tolist(), strict=True):
            for keyword in self._longer[which]:
                end = begin + len(keyword)
                if end <= stop and np.array_equal(codes_C[begin:end], keyword):
                    inside_a_word = end < stop and is_word_C[end - 1] and is_word_C[end]
                    if not inside_a_word:
                        yield begin, end

    def _fold(self, codes_C: Codes) -> Codes:
        return _folding()[codes_C] if self.ignore_case else codes_C

    @cached_property
    def _grouped(self) -> dict[bytes, list[Codes]]:
        """Keywords by their first word."""
        grouped: dict[bytes, list[Codes]] = {}
        for word in sorted(self.words):
            codes = self._fold(_codes(word))
            grouped.setdefault(codes[: len(_WORD.findall(word)[0])].tobytes(), []).append(codes)
        return grouped

    @cached_property
    def _first_words(self) -> _Numbered:
        return _Numbered([np.frombuffer(first, np.uint32) for first in self._grouped])

    @cached_property
    def _longer(self) -> list[list[Codes]]:
        """The keywords of more than each first word."""
        return [[code for code in codes if code.nbytes > len(first)] for first, codes in self._grouped.items()]

    @cached_property
    def _alone(self) -> Bools:
        """(K,) True where the first word is a keyword itself."""
        sizes = [(len(first), [code.nbytes for code in codes]) for first, codes in self._grouped.items()]
        return np.array([size in all_sizes for size, all_sizes in sizes], np.bool_)

    @cached_property
    def _begins_longer(self) -> Bools:
        return np.array([bool(keywords) for keywords in self._longer], np.bool_)


class _Numbered:
    """Different words, to be found among the words of a text."""

    def __init__(self, words: list[Codes]) -> None:
        self.flat = np.concatenate(words)
        self.length = np.array([len(word) for word in words])
        self.begin = np.cumsum(self.length) - self.length
        for self.seed in range(1, 100):
            number = _numbers(self.flat, self.begin, self.begin + self.length, self.seed)
            if len(np.unique(number)) == len(number):
                break
        self.order = np.argsort(number)
        self.number = number[self.order]
        self.bucket = np.zeros(1 << _BUCKETS, np.bool_)
        self.bucket[self.number >> np.uint64(64 - _BUCKETS)] = True

    def find(self, codes_C: Codes, begin_W: Ints, end_W: Ints) -> tuple[Ints, Ints]:
        """Which words of the text are one of these, and which."""
        number_W = _numbers(codes_C, begin_W, end_W, self.seed)
        maybe_D = np.flatnonzero(self.bucket[number_W >> np.uint64(64 - _BUCKETS)])
        at_D = np.minimum(np.searchsorted(self.number, number_W[maybe_D]), len(self.number) - 1)
        which_D = self.order[at_D]
        same_D = (self.number[at_D] == number_W[maybe_D]) & (self.length[which_D] == (end_W - begin_W)[maybe_D])
        maybe_D, which_D = maybe_D[same_D], which_D[same_D]
        if len(maybe_D):  # one number may stand for two words
            length_D = self.length[which_D]
            equal = codes_C[ranges(begin_W[maybe_D], length_D)] == self.flat[ranges(self.begin[which_D], length_D)]
            truly_D = np.logical_and.reduceat(equal, np.cumsum(length_D) - length_D)
            maybe_D, which_D = maybe_D[truly_D], which_D[truly_D]
        return maybe_D, which_D


def _numbers(codes_C: Codes, begin_W: Ints, end_W: Ints, seed: int) -> NDArray[np.uint64]:
    """A number of each word by its letters and their places, modulo 2^64."""
    mixed_C = (codes_C.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    mixed_C ^= mixed_C >> np.uint64(29)
    sums = np.zeros((2, len(codes_C) + 1), np.uint64)
    np.cumsum(mixed_C, out=sums[0, 1:])
    np.cumsum(mixed_C * np.arange(len(codes_C), dtype=np.uint64), out=sums[1, 1:])
    plain_W, placed_W = sums[:, end_W] - sums[:, begin_W]
    placed_W -= plain_W * begin_W.astype(np.uint64)
    number_W: NDArray[np.uint64] = plain_W * np.uint64(0xD6E8FEB86659FD93) + placed_W * np.uint64(0xA0761D6478BD642F)
    number_W ^= number_W << np.uint64(32)
    return number_W


_WORD = regex.compile(r"\w+")


def _codes(text: str) -> Codes:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@cache
def _is_word() -> Bools:
    """For each code point, whether it is a `\\w`."""
    member = np.zeros(sys.maxunicode + 1, np.bool_)
    for match in _WORD.finditer("".join(map(chr, range(sys.maxunicode + 1)))):
        member[match.start() : match.end()] = True
    return member


@cache
def _folding() -> Codes:
    """For each code point, its case folding where that is one character; else itself."""
    folding = np.arange(sys.maxunicode + 1, dtype=np.uint32)
    for code in range(sys.maxunicode + 1):
        folded = chr(code).casefold()
        if len(folded) == 1:
            folding[code] = ord(folded)
    return folding
