"""Samples laid end to end: their bytes, their turns, and the text that patterns see, made once for all selectors.

Suffixes: T tokens, S samples, P turns or pieces of text, C characters, M spans.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from dwl_plugin.classes.token_bytes import Bools, Ints, TokenTable, as_text

__all__ = ["Samples"]


@dataclass(frozen=True, eq=False)
class Pieces:
    """Pieces of text as str, and the place of their characters in `Samples.data`.

    Args:
        texts: the pieces.
        samples: the number of each piece's sample.
        first_C: (P,) where each piece begins in `byte_C`.
        byte_C: the byte at which each character begins; after the characters of a piece, the byte at which it ends.
    """

    texts: list[str]
    samples: list[int]
    first_C: Ints
    byte_C: Ints


class Samples:
    """Samples laid end to end, with their text decoded once for all selectors.

    Args:
        table: bytes of each token id.
        ids_T: token ids from 0 to V, where V stands for every id outside the vocabulary.
        target_T: True where the token is a target.
        starts_S: where each sample begins; increasing, the first is 0.
        codes_T: what the data says of each token; None: nothing.
    """

    def __init__(self, table: TokenTable, ids_T: Ints, target_T: Bools, starts_S: Ints, codes_T: Ints | None = None) -> None:
        self.table, self.ids_T, self.target_T, self.starts_S = table, ids_T, target_T, starts_S
        self.codes_T = np.zeros_like(ids_T) if codes_T is None else codes_T

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
        begin_P, end_P = self.offsets[begin_P], self.offsets[end_P]
        texts = [as_text(self.data[begin:end]) for begin, end in zip(begin_P.tolist(), end_P.tolist(), strict=True)]
        length_C = _bytes_of_characters("".join(text + "\n" for text in texts))
        end_C = np.cumsum(np.array([len(text) + 1 for text in texts], np.int64))
        length_C[end_C - 1] = np.append(begin_P[1:], end_P[-1:]) - end_P  # up to the next piece
        byte_C = begin_P[:1].sum() + np.cumsum(length_C) - length_C
        return Pieces(texts, sample_P.tolist(), np.append(0, end_C)[:-1], byte_C)

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

    def without_blank(self, byte: int) -> int:
        """Where the token at `byte` begins, if nothing but whitespace of it stands before `byte`; else `byte`."""
        begin = int(self.offsets[np.searchsorted(self.offsets, byte, "right") - 1])
        return byte if self.data[begin:byte].strip() else begin

    def covered(self, begin_M: Ints, end_M: Ints) -> Bools:
        """(T,) True where a token's bytes overlap a span of `data`, or a token without bytes stands inside one."""
        some_M = begin_M < end_M
        first_M = np.searchsorted(self.offsets[1:], begin_M[some_M], "right")
        stop_M = np.searchsorted(self.offsets[:-1], end_M[some_M], "left")
        return self.in_ranges(first_M, stop_M)

    def in_ranges(self, first_M: Ints, stop_M: Ints) -> Bools:
        """(T,) True for the tokens of the ranges `first` up to and without `stop`."""
        size = len(self.ids_T) + 1
        open_T = np.cumsum(np.bincount(first_M, minlength=size) - np.bincount(stop_M, minlength=size))
        return open_T[:-1] > 0

    def in_text(self, spans_P: list[list[tuple[int, int]]]) -> Bools:
        """(T,) True where a token's bytes overlap a span of one of `pieces`, which is counted in characters."""
        spans_M = np.fromiter(chain.from_iterable(chain.from_iterable(spans_P)), np.int64).reshape(-1, 2)
        spans_M += np.repeat(self.pieces.first_C, list(map(len, spans_P)))[:, None]
        begin_M, end_M = self.pieces.byte_C[spans_M].T
        return self.covered(begin_M, end_M)


def _bytes_of_characters(text: str) -> Ints:
    """How many bytes `as_bytes` makes of each character; one of a lone surrogate, which stands for a byte."""
    code_C = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    length_C = 1 + (code_C >= 0x80).astype(np.int64) + (code_C >= 0x800) + (code_C >= 0x10000)
    length_C[(code_C >= 0xDC80) & (code_C <= 0xDCFF)] = 1
    return length_C
