"""Samples laid end to end: their bytes, their turns, and the pieces of text that patterns see, made once for all selectors.

Suffixes: T tokens, S samples, P pieces, C characters, M spans.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dwl_plugin.classes.token_bytes import Bools, Ints, TokenTable, as_text

__all__ = ["JOINT", "Pieces", "Samples", "ranges"]

JOINT = "\ud800"
"""No text can hold it: half of a surrogate pair, and not one of those that stand for a byte."""


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
        begin_P, end_P, sample_P = self._runs(self.target_T & ~self.table.special[self.ids_T])
        return Pieces.of(self, begin_P, end_P, sample_P)

    @cached_property
    def turns(self) -> tuple[Ints, Ints, Ints]:
        """(P,) each: the first token of each turn, the one after its last, and the number of its sample."""
        return self._runs(self.target_T)

    @cached_property
    def turn_extents(self) -> tuple[list[int], list[int]]:
        """Begins and ends in `data` of the turns that have text."""
        begin_P, end_P = (self.offsets[edge_P] for edge_P in self.turns[:2])
        some_P = begin_P < end_P
        return begin_P[some_P].tolist(), end_P[some_P].tolist()

    def _runs(self, inside_T: Bools) -> tuple[Ints, Ints, Ints]:
        """Contiguous runs of True, none longer than its sample."""
        edge = np.zeros(len(inside_T) + 1, np.bool_)
        edge[self.starts_S] = True
        before, after = np.append(False, inside_T), np.append(inside_T, False)
        begin_P = np.flatnonzero(after & (edge | ~before))
        end_P = np.flatnonzero(before & (edge | ~after))
        return begin_P, end_P, np.searchsorted(self.starts_S, begin_P, "right") - 1

    def covered(self, begin_M: Ints, end_M: Ints) -> Bools:
        """(T,) True where a token's bytes overlap a span of `data`, or a token without bytes stands inside one."""
        some_M = begin_M < end_M
        first_M = np.searchsorted(self.offsets[1:], begin_M[some_M], "right")
        stop_M = np.searchsorted(self.offsets[:-1], end_M[some_M], "left")
        return self.in_ranges(first_M, stop_M)

    def in_ranges(self, first_M: Ints, stop_M: Ints) -> Bools:
        """(T,) True for the tokens of the ranges `first` up to and without `stop`."""
        mask_T = np.zeros(len(self.ids_T), np.bool_)
        mask_T[ranges(first_M, stop_M - first_M)] = True
        return mask_T


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of text as str, and the tokens of their characters.

    Characters are counted through all pieces: the i-th of piece p is number `first_char[p] + i`.

    Args:
        texts: the pieces.
        sample: the number of each piece's sample.
        first_char: the number of each piece's first character.
        first_token: for each character, the token of its first byte.
        last_token: for each character, the token of its last byte.
    """

    texts: list[str]
    sample: Ints
    first_char: Ints
    first_token: Ints
    last_token: Ints

    @classmethod
    def of(cls, samples: Samples, begin_P: Ints, end_P: Ints, sample_P: Ints) -> Pieces:
        """The pieces of tokens from `begin_P` up to and without `end_P`."""
        data, offsets = samples.data, samples.offsets
        edges = zip(offsets[begin_P].tolist(), offsets[end_P].tolist(), strict=True)
        parts = [data[begin:end] for begin, end in edges]
        texts = list(map(as_text, parts))
        chars_P = np.fromiter(map(len, texts), np.int64, len(texts))
        tokens = ranges(begin_P, end_P - begin_P)
        length = np.diff(offsets)[tokens]
        token_of_byte = np.repeat(tokens, length)
        begin_C, end_C = _characters(texts, b"".join(parts), int(chars_P.sum()))
        return cls(
            texts=texts,
            sample=sample_P,
            first_char=np.cumsum(chars_P) - chars_P,
            first_token=token_of_byte[begin_C],
            last_token=token_of_byte[end_C - 1],
        )

    @cached_property
    def lengths(self) -> Ints:
        """How many characters each has."""
        return np.diff(np.append(self.first_char, len(self.first_token)))

    @cached_property
    def most_siblings(self) -> int:
        """The most pieces that one sample has."""
        return int(np.bincount(self.sample).max(initial=0))

    @cached_property
    def joined(self) -> str:
        """All pieces, with a character between them that no text has."""
        return JOINT.join(self.texts)

    @cached_property
    def joints(self) -> Ints:
        """Where the characters between the pieces are in `joined`."""
        return self.first_char[1:] + np.arange(len(self.texts) - 1)

    @cached_property
    def codes(self) -> NDArray[np.uint32]:
        """The code points of all pieces."""
        return _codes(self.texts)


def _characters(texts: list[str], data: bytes, chars: int) -> tuple[Ints, Ints]:
    """Where each character begins and ends in the bytes of the texts."""
    begin_C = np.flatnonzero((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)
    if len(begin_C) == chars:  # no byte inside a character stands alone
        return begin_C, np.append(begin_C, len(data))[1:]
    code_C = _codes(texts)
    length_C = 1 + (code_C >= 0x80).astype(np.int64) + (code_C >= 0x800) + (code_C >= 0x10000)
    length_C[(code_C >= 0xDC80) & (code_C <= 0xDCFF)] = 1  # see as_text: one byte each
    end_C = np.cumsum(length_C)
    return end_C - length_C, end_C


def _codes(texts: list[str]) -> NDArray[np.uint32]:
    return np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)


def ranges(first: Ints, length: Ints) -> Ints:
    """`first`, `first + 1`, … `first + length - 1` of each range, end to end."""
    shift = first - (np.cumsum(length) - length)
    shifts: Ints = np.repeat(shift, length)
    return np.arange(len(shifts)) + shifts
