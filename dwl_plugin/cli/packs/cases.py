"""Cases of a pack out of rows of data: short pieces in which the pack finds, byte by byte, what the run finds on its tokens.

A piece is cut out of its row, so that patterns may see something else in it. One in which a token would get another class than in
its row is not taken.

Suffixes: T tokens of a row, C classes with `rest`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import regex

from dwl_plugin.classes import trained_on
from dwl_plugin.classes.data_codes import marks_of
from dwl_plugin.classes.selectors import NotSelector, SelectorConfig, TokenRegexSelector, TokensSelector, marks_in, walk
from dwl_plugin.classes.survey import codes_in
from dwl_plugin.classes.token_bytes import Ints, TokenTable, added_ids, as_bytes, special_ids
from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.config.pack_cases import class_of_bytes, run_case
from dwl_plugin.config.packs import Pack, PackCase
from dwl_plugin.errors import ConfigError
from dwl_plugin.values import IGNORE_INDEX, REST

__all__ = ["cases_of"]

_EACH = 2
"""Cases in which each class has a span."""

_TRIES = 40
"""Pieces that are tried for a class."""

_RUNS = 200
"""Runs of a class that are cut out of their rows."""

_LINE = 200
"""Bytes; of what is longer, only the beginning is taken, or the neighbourhood of a class."""

_LONGEST = 1000
_SHORTEST = 16
"""Of a text that says something to a person."""


class _Piece(NamedTuple):
    """Tokens `begin` to `end` of a row, and those from `prompt` on as what stands before them, masked."""

    prompt: int
    begin: int
    end: int


@dataclass(frozen=True, eq=False)
class _Row:
    """Args:
    ids_T: token ids.
    data, offsets: the bytes, and the (T + 1,) offsets of the tokens in them.
    class_T: the class that the run gives each token, -100 where it is no target.
    marks_T: the bits of what the data marks it.
    """

    ids_T: Ints
    data: bytes
    offsets: Ints
    class_T: Ints
    marks_T: Ints

    @cached_property
    def masked(self) -> Ints:
        """Where its tokens are no targets."""
        return np.flatnonzero(self.class_T == IGNORE_INDEX)

    def turn(self, token: int) -> tuple[int, int]:
        """Begin and end of the run of targets around one."""
        at = int(np.searchsorted(self.masked, token))
        begin = int(self.masked[at - 1]) + 1 if at else 0
        return begin, int(self.masked[at]) if at < len(self.masked) else len(self.ids_T)

    def size(self, piece: _Piece) -> int:
        """In bytes, those of the prompt included."""
        return int(self.offsets[piece.end] - self.offsets[piece.prompt])

    def bytes_of(self, begin: int, end: int) -> bytes:
        return self.data[self.offsets[begin] : self.offsets[end]]

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Class, begin and end of each run of one class."""
        end = 0
        for index, run in groupby(self.class_T.tolist()):
            begin, end = end, end + len(list(run))
            if index != IGNORE_INDEX:
                yield index, begin, end


def cases_of(pack: Pack, seen: LookedAt) -> list[PackCase]:
    """Cases with a span of each class of the pack, as far as the rows have such, and one of which no class takes anything."""
    cutter = _Cutter(pack, seen.tokenizer)
    rows = [row for sample in seen.rows.samples for row in _rows(sample, seen, cutter.table)]
    runs = [(row, *run) for row in rows for run in row.runs()]
    spans = Counter[str]()
    found: dict[str, PackCase] = {}  # by their text without digits and blanks
    for index, name in enumerate([*pack.classes, REST]):
        own = [(row, begin, end) for row, which, begin, end in runs if which == index][:_RUNS]
        pieces = [(row, piece) for row, begin, end in own for piece in _pieces(row, begin, end)]
        if name == REST:
            pieces = [(row, piece) for row, piece in pieces if set(row.class_T[piece.begin : piece.end]) == {index}]
        for row, piece in _short_ones_first(pieces):
            if spans[name] >= (1 if name == REST else _EACH):
                break
            case = cutter.case(row, piece, name)
            kind = "" if case is None else regex.sub(r"[\d\s]", "", "".join(turn.prompt + turn.text for turn in case.sample))
            if case is not None and kind not in found:
                found[kind] = case
                spans.update(case.spans.keys())
    return list(found.values())


def _short_ones_first(pieces: Iterable[tuple[_Row, _Piece]]) -> list[tuple[_Row, _Piece]]:
    """Those from anywhere, then those from where a turn begins, which hold all that a pattern may have to see. Those that are too
    short for a person come last, and those that are too long for a case are left out."""
    sized = [(row.size(piece), row, piece) for row, piece in pieces]
    fit = sorted((item for item in sized if item[0] <= _LONGEST), key=lambda item: (item[0] < _SHORTEST, item[0]))
    whole = [item for item in fit if item[2].begin == 0 or item[1].class_T[item[2].begin - 1] == IGNORE_INDEX]
    return [(row, piece) for _, row, piece in (*fit[:_TRIES], *whole[:_TRIES])]


def _rows(sample: dict[str, Any], seen: LookedAt, table: TokenTable) -> Iterator[_Row]:
    """The samples of a row; where it is packed it has several."""
    ids_T = np.asarray(sample["input_ids"], np.int64)
    members_CT = seen.members(sample, matched=True)
    class_T = np.where(trained_on(sample), members_CT.argmax(0), IGNORE_INDEX)
    marks_T = marks_of(codes_in(sample))
    position_T = sample.get("position_ids") or range(len(ids_T))
    starts = [at for at in range(len(ids_T)) if at == 0 or position_T[at] <= position_T[at - 1]]
    for begin, end in zip(starts, [*starts[1:], len(ids_T)], strict=True):
        known_T = np.where(ids_T[begin:end] < table.size, ids_T[begin:end], table.size)
        data, offsets = table.decode(known_T, np.zeros(1, np.int64))
        yield _Row(known_T, data, offsets, class_T[begin:end], marks_T[begin:end])


def _pieces(row: _Row, begin: int, end: int) -> Iterator[_Piece]:
    """What could be cut out around a run of a class: from some words to the whole turn, with and without what stands before it."""
    first, last = row.turn(begin)
    near = range(max(first, begin - _LONGEST), min(last, begin + _LONGEST) + 1)
    breaks = [at for at in near if at in (first, last) or row.bytes_of(at - 1, at).endswith(b"\n")]
    words = [at for at in near if at in (first, last) or row.bytes_of(at, at + 1)[:1] in (b" ", b"\n")]
    shown = max(
        (at for at in range(begin + 1, min(end, near[-1]) + 1) if row.offsets[at] - row.offsets[begin] <= _LINE), default=begin + 1
    )

    begins = {first}.union(*([edge for edge in edges if edge <= begin][-3:] for edges in (breaks, words)))
    ends = {shown, last}.union(*([edge for edge in edges if edge >= shown][:3] for edges in (breaks, words)))
    for at in sorted(begins):
        for to in sorted(ends):
            yield _Piece(at, at, to)
            if at == first:
                for before in (_LINE // 2, _LINE, _LONGEST):
                    yield _Piece(int(np.searchsorted(row.offsets, row.offsets[first] - before)), first, to)


class _Cutter:
    """Makes a case of a piece, for one pack and one tokenizer."""

    def __init__(self, pack: Pack, tokenizer: Any) -> None:
        self.pack, self.table = pack, TokenTable.of(tokenizer)
        self._special, self._added = special_ids(tokenizer), added_ids(tokenizer)
        leaves: list[SelectorConfig] = [leaf for config in pack.classes.values() for _, leaf in walk(config, "")]
        vocabulary = tokenizer.get_vocab()
        named = [text for leaf in leaves if isinstance(leaf, TokensSelector) for text in leaf.tokens]
        self._named = {text: (self.table.ids_of(as_bytes(text)) or [vocabulary.get(text, -1)])[0] for text in named}
        patterns = [regex.compile(leaf.token_regex) for leaf in leaves if isinstance(leaf, TokenRegexSelector)]
        self._match = {
            text for text in self.table.texts() if len(text) > 1 and any(pattern.fullmatch(text) for pattern in patterns)
        }
        self._one_of_each = [min(sorted(filter(pattern.fullmatch, self._match)), key=len, default="") for pattern in patterns]
        self._has_not = any(isinstance(leaf, NotSelector) for leaf in leaves)
        self._marks = marks_in(pack.classes)

    def case(self, row: _Row, piece: _Piece, needs: str) -> PackCase | None:
        """The case; None where it would not show what the run finds, or has no span of the class it `needs`."""
        prompt, text = row.bytes_of(piece.prompt, piece.begin), row.bytes_of(piece.begin, piece.end)
        marks = set(row.marks_T[piece.begin : piece.end].tolist()) if self._marks else {0}
        mark = {0: None, **{1 << bit: name for bit, name in enumerate(self._marks)}}
        if len(marks) > 1 or not marks <= mark.keys():
            return None
        try:
            special, added = self._tokens(row.ids_T[piece.prompt : piece.end].tolist())
            shown = {"prompt": prompt.decode() or None, "text": text.decode(), "mark": mark[marks.pop()]}
            case = PackCase.model_validate({**shown, "special": special, "added": added, "spans": {}})
            data, classes = class_of_bytes(self.pack, case)
        except (UnicodeDecodeError, ConfigError):  # half of a character, or a class that asks for tokens that are not in the piece
            return None
        if data != prompt + text or not self._agrees(row, piece, classes[len(prompt) :]):
            return None
        runs = run_case(self.pack, case.model_copy(update={"spans": {REST: ()}})).found
        spans = {name: texts for name, texts in runs.items() if texts and (name != REST or needs == REST)}
        return case.model_copy(update={"spans": spans}) if needs in spans else None

    def _tokens(self, ids: list[int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What has to be one token in the case, too: special and added ones, and those that a class is about; special, and not."""
        spelled = {token_id: self.table.spelling(token_id).decode(errors="replace") for token_id in dict.fromkeys(ids)}
        special = [text for token_id, text in spelled.items() if token_id in self._special]
        added = [text for token_id, text in spelled.items() if token_id in self._added - self._special]
        added += [text for text in (*spelled.values(), *self._one_of_each) if text in self._match]
        for text, token_id in self._named.items():
            (special if token_id in self._special else added).append(text)
        whole = [text for text in dict.fromkeys(added) if text not in special and len(text.encode()) > 1]
        return tuple(dict.fromkeys(special)), tuple(whole)

    def _agrees(self, row: _Row, piece: _Piece, classes: list[int]) -> bool:
        """Whether each token has the class that its bytes have; of several, as it is about to straddle an edge, the first."""
        base = row.offsets[piece.begin]
        for token in range(piece.begin, piece.end):
            of_bytes = classes[row.offsets[token] - base : row.offsets[token + 1] - base]
            if of_bytes and row.class_T[token] != min(of_bytes) and not (self._has_not and row.class_T[token] in of_bytes):
                return False
        return True
