"""What the classes find in some samples, and what is wrong where they find nothing.

Counted is what is trained: position t predicts token t + 1, so the first label of a row is classified and counts nowhere, and
neither does a token to which the data gives a factor of 0.

Suffixes: C classes with `rest`, K classes without it, T tokens.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwl_plugin.classes.data_codes import DATA_CODES, factors_of
from dwl_plugin.classes.labeller import Labeller, codes_of, ids_and_targets, sample_starts
from dwl_plugin.classes.selectors import SelectorConfig
from dwl_plugin.classes.token_bytes import Bools, Ints
from dwl_plugin.errors import Problem
from dwl_plugin.values import REST

__all__ = ["FOLLOWS", "ClassSurvey", "codes_in", "empty_class_problems", "predicted", "survey", "trained_on"]

FOLLOWS = "dwl_follows"
"""Key of a sample that stands behind another one in its row, whose last token predicts its first."""


@dataclass(frozen=True)
class ClassSurvey:
    """What the classes found in some samples.

    Args:
        names: classes in priority order, then `rest`.
        tokens: targets of each class; where classes overlap, in each of their classes.
        matches: targets that each selector matches before priority; for `rest`, its tokens.
        unpredicted: first labels of rows that each selector matches; they are no targets. For `rest`, those of no class.
        taken_out: tokens with a factor of 0 that each selector matches; they are no targets. For `rest`, of no class; last, all.
        rows_without: rows without a token of the class.
        rows: rows looked at.
        rows_with_targets: samples with a target; a row is one, or has several, told apart by their positions.
        targets: targets looked at.
        weighed: of these and those taken out, the ones to which the data gives a factor other than 1.
        mass: Σ|v| of the tokens of each class and, last, of all targets; v is what the data and the reduction make of a token.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    matches: tuple[int, ...]
    unpredicted: tuple[int, ...]
    taken_out: tuple[int, ...]
    rows_without: tuple[int, ...]
    rows: int
    rows_with_targets: int
    targets: int
    weighed: int
    mass: tuple[float, ...]

    @property
    def masses(self) -> tuple[float, ...]:
        """(C + 2,) as `class_weights` takes them: Σ|v| of each class and of all targets, samples with a target."""
        return (*self.mass, self.rows_with_targets)

    @property
    def counts(self) -> tuple[int, ...]:
        """(C + 2,) as `class_weights` takes them: tokens of each class, targets, samples with a target."""
        return (*self.tokens, self.targets, self.rows_with_targets)


def trained_on(sample: Mapping[str, Any]) -> Bools:
    """(T,) True at the labels of a row that something predicts, and that the data gives no factor of 0."""
    trained_T: Bools = predicted(sample) & (factors_of(codes_in(sample)) != 0)
    return trained_T


def predicted(sample: Mapping[str, Any]) -> Bools:
    """(T,) True at the labels of a row that something predicts, whatever the data says of them."""
    target_T = ids_and_targets(sample["input_ids"], sample["labels"])[1].copy()
    if not sample.get(FOLLOWS):
        target_T[:1] = False
    return target_T


def codes_in(sample: Mapping[str, Any]) -> Ints:
    """(T,) what the data says of each token, 0 where it says nothing."""
    tokens = len(sample["input_ids"])
    return codes_of(sample[DATA_CODES], tokens) if DATA_CODES in sample else np.zeros(tokens, np.int64)


def survey(labeller: Labeller | None, samples: Iterable[Mapping[str, Any]]) -> ClassSurvey:
    """Count the classes in samples, each a mapping with `input_ids`, `labels` and perhaps `position_ids` of (T,), and `FOLLOWS`.

    Without a labeller every target is `rest`.
    """
    names = (REST,) if labeller is None else labeller.names
    overlaps = labeller is not None and labeller.overlap == "sum"
    tokens_C, matches_C, unpredicted_C, taken_out_C, without_C = np.zeros((5, len(names)), np.int64)
    taken_out = 0
    mass_C, mass = np.zeros(len(names)), 0.0
    rows = rows_with_targets = targets = weighed = 0
    for sample in samples:
        ids_T, target_T = ids_and_targets(sample["input_ids"], sample["labels"])
        said_T, predicted_T, positions = factors_of(codes_in(sample)), predicted(sample), sample.get("position_ids")
        matched_KT, factors_T = np.zeros((0, len(ids_T)), np.bool_), said_T.astype(np.float64)
        if labeller is not None:
            codes = sample.get(DATA_CODES)
            matched_KT = labeller.members(ids_T, sample["labels"], positions, codes)
            factors_T = labeller.factors(ids_T, sample["labels"], positions, codes)
        trained_T = predicted_T & (factors_T != 0)
        matched_CT = np.concatenate([matched_KT, ~matched_KT.any(0, keepdims=True)]) & target_T
        taken_out_C += (matched_CT & (said_T == 0)).sum(1)
        taken_out += int((predicted_T & (said_T == 0)).sum())
        unpredicted_C += (matched_CT & (said_T != 0) & ~trained_T).sum(1)
        weighed += int((predicted_T & (said_T != 1)).sum())
        members_CT = matched_CT & trained_T
        claimed_CT = members_CT if overlaps else members_CT & (np.cumsum(members_CT, axis=0) == 1)
        tokens_C += claimed_CT.sum(1)
        matches_C += members_CT.sum(1)
        without_C += ~claimed_CT.any(1)
        mass_C += claimed_CT @ np.abs(factors_T)
        mass += float(np.abs(factors_T[trained_T]).sum())
        targets += int(trained_T.sum())
        rows += 1
        starts_T = sample_starts(ids_T, positions)
        rows_with_targets += len(np.unique(np.cumsum(starts_T)[trained_T & ~starts_T]))
    counts = (tokens_C, matches_C, unpredicted_C, np.append(taken_out_C, taken_out), without_C)
    tokens, matches, unpredicted, zeros, without = (tuple(count_C.tolist()) for count_C in counts)
    by_class = (tokens, matches, unpredicted, zeros, without)
    return ClassSurvey(names, *by_class, rows, rows_with_targets, targets, weighed, (*mass_C.tolist(), mass))


def empty_class_problems(
    found: ClassSurvey, classes: Mapping[str, SelectorConfig], may_be_empty: Container[str] = ()
) -> list[Problem]:
    """One problem for each class without a token that is not in `may_be_empty`."""
    looked = f"looked at {found.targets:,} target tokens in {found.rows:,} rows"
    problems: list[Problem] = []
    counts = zip(classes.items(), found.tokens, found.matches, found.unpredicted, found.taken_out, strict=False)
    for (name, config), tokens, matches, unpredicted, taken_out in counts:
        if tokens or name in may_be_empty:
            continue
        message = f"matches nothing ({looked})"
        why = config.if_empty
        if taken_out:
            why = f"The {taken_out:,} it does match have a factor of 0 in the data."
        elif unpredicted:
            why = f"The {unpredicted:,} it does match are first in their rows, where no token before predicts them."
        hint = f"{why} If the class may be empty, write `allow_empty: true`"
        if matches:
            message = f"has no token: classes above it take all {matches:,} that it matches ({looked})"
            hint = "the first class that matches wins; move this class up, or write `allow_empty: true`"
        problems.append(Problem(f"dwl.classes.{name}", message, hint=hint))
    return problems
