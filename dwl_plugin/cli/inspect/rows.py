"""Rows as they are shown: every token with its text, its class, what the data says of it and what it weighs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from dwl_plugin.classes.data_codes import DATA_CODES, data_sets_of, factors_of, marks_of
from dwl_plugin.classes.survey import codes_in, predicted
from dwl_plugin.classes.token_bytes import TokenTable, as_text
from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.cli.plots import PALETTE
from dwl_plugin.errors import DWLError

__all__ = ["MASKED", "ShownRow", "ShownSample", "ShownToken", "factors_in", "look", "row_notes", "shown_rows"]

MASKED = -1
"""The class index of a token that is no target."""

_UNDERLINES = ("solid", "double", "dotted", "dashed", "wavy")


def look(index: int) -> tuple[str, str]:
    """Colour and underline of the class with this index; no two of the first thirty look alike."""
    return PALETTE[index % len(PALETTE)], _UNDERLINES[(index + index // len(PALETTE)) % len(_UNDERLINES)]


@dataclass(frozen=True)
class ShownToken:
    """`classes` are indices into `LookedAt.class_names`, the one that wins first; empty for a token that is no target."""

    token_id: int
    text: str
    classes: tuple[int, ...]
    weight: float | None
    factor: float = 1.0
    """Of the data."""
    marks: tuple[str, ...] = ()
    data_set: str = ""
    taken_out: bool = False
    """No target because of its factor, which is 0."""

    @property
    def class_index(self) -> int:
        """The class it is coloured by."""
        return self.classes[0] if self.classes else MASKED

    @property
    def counted(self) -> float | None:
        """The factor, where it counts: of a target, or of what would be one."""
        return self.factor if self.classes or self.taken_out else None


@dataclass(frozen=True)
class ShownSample:
    tokens: tuple[ShownToken, ...]

    @property
    def targets(self) -> int:
        """Tokens that are trained on."""
        return sum(bool(token.classes) for token in self.tokens)


@dataclass(frozen=True)
class ShownRow:
    """A row of a batch; several samples where rows are packed."""

    samples: tuple[ShownSample, ...]

    @property
    def tokens(self) -> int:
        """Of all samples, padding left out."""
        return sum(len(sample.tokens) for sample in self.samples)


def factors_in(rows: Sequence[ShownRow]) -> list[float]:
    """The factors of the targets, if any is not 1."""
    found = {token.counted for row in rows for sample in row.samples for token in sample.tokens} - {None}
    return sorted(factor for factor in found if factor is not None) if found - {1.0} else []


def row_notes(seen: LookedAt) -> list[str]:
    """How the rows shown differ from the run's."""
    packed = ["packed among themselves, where the run packs them with all the others"] if seen.rows.packs is not None else []
    return [*seen.rows.notes, *packed]


def shown_rows(seen: LookedAt) -> list[ShownRow]:
    """The rows looked at; padding is left out."""
    text_of = _spelling(seen.tokenizer)
    weights = [figures.weight.weight for figures in seen.figures if figures.weight is not None]
    samples = [_sample(_without_padding(sample), seen, text_of, weights) for sample in seen.rows.samples]
    packs = [[index] for index in range(len(samples))] if seen.rows.packs is None else seen.rows.packs
    return [ShownRow(tuple(shown for index in pack for shown in samples[index])) for pack in packs]


def _sample(sample: dict[str, Any], seen: LookedAt, text_of: Callable[[int], str], weights: Sequence[float]) -> list[ShownSample]:
    """One sample; or, of a stream that packs its rows itself, each that begins where the positions do."""
    ids = sample["input_ids"]
    positions = sample.get("position_ids")
    members_CT = seen.members(sample, matched=True)
    summed = seen.labeller is not None and seen.labeller.overlap == "sum"
    marks: tuple[str, ...] = ()
    names: tuple[str, ...] = ("",)
    counts_T = np.ones(len(ids))
    if seen.block is not None and seen.labeller is not None:
        marks, names = seen.block.marks, ("", *seen.labeller.data_sets)
        counts_T = seen.labeller.factors(ids, sample["labels"], positions, sample.get(DATA_CODES))
    codes_T = codes_in(sample)
    factors_T, marks_T, data_sets_T = factors_of(codes_T), marks_of(codes_T), data_sets_of(codes_T)
    taken_out_T = predicted(sample) & (factors_T == 0)
    tokens = []
    for t, token_id in enumerate(ids):
        classes = tuple(np.flatnonzero(members_CT[:, t]).tolist())
        weight = None
        if weights and classes:
            weight = float(counts_T[t]) * sum(weights[c] for c in (classes if summed else classes[:1]))
        marked = tuple(mark for bit, mark in enumerate(marks) if marks_T[t] >> bit & 1)
        said = (float(factors_T[t]), marked, names[data_sets_T[t]], bool(taken_out_T[t]))
        tokens.append(ShownToken(int(token_id), text_of(int(token_id)), classes, weight, *said))
    starts = [0] if positions is None else [t for t in range(len(ids)) if t == 0 or positions[t] <= positions[t - 1]]
    return [ShownSample(tuple(tokens[a:b])) for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def _without_padding(sample: dict[str, Any]) -> dict[str, Any]:
    mask = sample.get("attention_mask")
    if mask is None or all(mask) or len(mask) != len(sample["input_ids"]):
        return sample
    kept = [t for t, value in enumerate(mask) if value]
    if DATA_CODES in sample:  # which may be longer
        sample = {**sample, DATA_CODES: codes_in(sample).tolist()}
    return {key: [values[t] for t in kept] if len(values) == len(mask) else values for key, values in sample.items()}


def _spelling(tokenizer: Any) -> Callable[[int], str]:
    """The text of a token; a byte that is no character by itself as ‹e2›."""
    try:
        table = TokenTable.of(tokenizer)
    except DWLError:  # no bytes to be had: the tokenizer's own names
        return lambda token_id: str(tokenizer.convert_ids_to_tokens(token_id))

    @cache
    def spell(token_id: int) -> str:
        text = as_text(table.spelling(token_id)) if 0 <= token_id < table.size else f"‹token {token_id}›"
        return "".join(f"‹{ord(char) - 0xDC00:02x}›" if "\udc80" <= char <= "\udcff" else char for char in text)

    return spell
