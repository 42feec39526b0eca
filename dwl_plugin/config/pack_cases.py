"""A pack's own cases: label each sample byte by byte, and compare what every class got with what the case says.

One byte is one token here, and the pieces that a case calls special or added are one token each. So the spans are exact:
they depend on no vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import regex

from dwl_plugin.classes.build import build_labeller
from dwl_plugin.classes.data_codes import marks_of
from dwl_plugin.classes.selectors import marks_in
from dwl_plugin.classes.token_bytes import as_bytes
from dwl_plugin.config.classes import may_be_empty
from dwl_plugin.config.packs import Pack, PackCase
from dwl_plugin.values import IGNORE_INDEX, REST

__all__ = ["ByteTokenizer", "CaseResult", "class_of_bytes", "run_case", "untouched_classes"]


@dataclass(frozen=True)
class _AddedToken:
    content: str
    special: bool


class ByteTokenizer:
    """Ids 0 to 255 are bytes; then come the special and the added tokens."""

    name_or_path = "bytes"

    def __init__(self, special: Sequence[str] = (), added: Sequence[str] = ()) -> None:
        tokens = [_AddedToken(text, True) for text in special] + [_AddedToken(text, False) for text in added]
        self.added_tokens_decoder = dict(enumerate(tokens, start=256))
        self._id_of = {token.content: token_id for token_id, token in self.added_tokens_decoder.items()}

    def get_vocab(self) -> dict[bytes, int]:
        return {bytes([byte]): byte for byte in range(256)} | {as_bytes(text): token_id for text, token_id in self._id_of.items()}

    @property
    def all_special_ids(self) -> list[int]:
        return [token_id for token_id, token in self.added_tokens_decoder.items() if token.special]

    @cached_property
    def _pieces(self) -> regex.Pattern[str] | None:
        longest_first = sorted(self._id_of, key=len, reverse=True)
        return regex.compile(f"({'|'.join(map(regex.escape, longest_first))})") if longest_first else None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; nothing is put around it."""
        parts = [text] if self._pieces is None else self._pieces.split(text)
        return [i for part in parts for i in ([self._id_of[part]] if part in self._id_of else as_bytes(part))]

    def spelling(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else as_bytes(self.added_tokens_decoder[token_id].content)


@dataclass(frozen=True)
class CaseResult:
    """What a case expects and what was found: class -> its runs of trained text, in order."""

    case: PackCase
    expected: Mapping[str, tuple[str, ...]]
    found: Mapping[str, tuple[str, ...]]

    @property
    def passed(self) -> bool:
        return self.expected == self.found


def class_of_bytes(pack: Pack, case: PackCase) -> tuple[bytes, list[int]]:
    """The sample's bytes, and the class index of each; -100 where it is masked."""
    tokenizer = ByteTokenizer(case.special, case.added)
    known = marks_in(pack.classes)
    labeller = build_labeller(pack.classes, tokenizer, may_be_empty=may_be_empty(pack.classes), reads_data=bool(known))
    ids: list[int] = []
    labels: list[int] = []
    codes: list[int] = []
    for turn in case.sample:
        before, after = tokenizer.encode(turn.prompt), tokenizer.encode(turn.text)
        ids += before + after
        labels += [IGNORE_INDEX] * len(before) + after
        codes += [0] * len(before) + [1 << known.index(turn.mark) if turn.mark in known else 0] * len(after)
    class_ids = labeller(ids, labels, codes)
    classes = np.where(class_ids < 0, class_ids, marks_of(class_ids)).tolist()  # without factors, which are all 1
    spelled = [tokenizer.spelling(token_id) for token_id in ids]
    return b"".join(spelled), [index for index, piece in zip(classes, spelled, strict=True) for _ in piece]


def run_case(pack: Pack, case: PackCase) -> CaseResult:
    """Label the sample of a case and compare; `rest` is compared where the case names it.

    Raises:
        ConfigError: a class of the pack cannot be built.
        PatternTooSlowError: a pattern backtracks on the sample.
    """
    data, classes = class_of_bytes(pack, case)
    names, end = [*pack.classes, REST], 0
    runs: dict[str, list[str]] = {name: [] for name in names}
    for index, run in groupby(classes):
        start, end = end, end + len(list(run))
        if index != IGNORE_INDEX:
            runs[names[index]].append(data[start:end].decode("utf-8", "surrogateescape"))
    found = {name: tuple(texts) for name, texts in runs.items() if name != REST or REST in case.spans}
    expected = {name: case.spans.get(name, ()) for name in found}
    return CaseResult(case, expected, found)


def untouched_classes(pack: Pack) -> list[str]:
    """Classes of which no case has a span."""
    return [name for name in pack.classes if not any(case.spans.get(name) for case in pack.tests)]
