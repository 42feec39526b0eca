"""What the classes find in some samples, and what is wrong where they find nothing.

Counted is what is trained: position t predicts token t + 1, so the first label of a row is classified and counts nowhere.

Suffixes: C classes with `rest`, K classes without it, T tokens.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwl_plugin.classes.labeller import Labeller, ids_and_targets, sample_starts
from dwl_plugin.classes.selectors import SelectorConfig
from dwl_plugin.classes.token_bytes import Bools
from dwl_plugin.errors import Problem
from dwl_plugin.values import REST

__all__ = ["FOLLOWS", "ClassSurvey", "empty_class_problems", "survey", "trained_on"]

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
        rows_without: rows without a token of the class.
        rows: rows looked at.
        rows_with_targets: samples with a target; a row is one, or has several, told apart by their positions.
        targets: targets looked at.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    matches: tuple[int, ...]
    unpredicted: tuple[int, ...]
    rows_without: tuple[int, ...]
    rows: int
    rows_with_targets: int
    targets: int

    @property
    def counts(self) -> tuple[int, ...]:
        """(C + 2,) as `class_weights` takes them: tokens of each class, targets, samples with a target."""
        return (*self.tokens, self.targets, self.rows_with_targets)


def trained_on(sample: Mapping[str, Any]) -> Bools:
    """(T,) True at the labels of a row that something predicts."""
    return _predicted(sample, ids_and_targets(sample["input_ids"], sample["labels"])[1])


def _predicted(sample: Mapping[str, Any], target_T: Bools) -> Bools:
    trained_T = target_T.copy()
    if not sample.get(FOLLOWS):
        trained_T[:1] = False
    return trained_T


def survey(labeller: Labeller | None, samples: Iterable[Mapping[str, Any]]) -> ClassSurvey:
    """Count the classes in samples, each a mapping with `input_ids`, `labels` and perhaps `position_ids` of (T,), and `FOLLOWS`.

    Without a labeller every target is `rest`.
    """
    names = (REST,) if labeller is None else labeller.names
    overlaps = labeller is not None and labeller.overlap == "sum"
    tokens_C, matches_C, unpredicted_C, without_C = np.zeros((4, len(names)), np.int64)
    rows = rows_with_targets = targets = 0
    for sample in samples:
        ids_T, target_T = ids_and_targets(sample["input_ids"], sample["labels"])
        trained_T, positions = _predicted(sample, target_T), sample.get("position_ids")
        matched_KT = (
            np.zeros((0, len(ids_T)), np.bool_) if labeller is None else labeller.members(ids_T, sample["labels"], positions)
        )
        matched_CT = np.concatenate([matched_KT, ~matched_KT.any(0, keepdims=True)])
        unpredicted_C += (matched_CT & target_T & ~trained_T).sum(1)
        members_CT = matched_CT & trained_T
        claimed_CT = members_CT if overlaps else members_CT & (np.cumsum(members_CT, axis=0) == 1)
        tokens_C += claimed_CT.sum(1)
        matches_C += members_CT.sum(1)
        without_C += ~claimed_CT.any(1)
        targets += int(trained_T.sum())
        rows += 1
        starts_T = sample_starts(ids_T, positions)
        rows_with_targets += len(np.unique(np.cumsum(starts_T)[trained_T & ~starts_T]))
    counts = (tokens_C, matches_C, unpredicted_C, without_C)
    tokens, matches, unpredicted, without = (tuple(count_C.tolist()) for count_C in counts)
    return ClassSurvey(names, tokens, matches, unpredicted, without, rows, rows_with_targets, targets)


def empty_class_problems(
    found: ClassSurvey, classes: Mapping[str, SelectorConfig], may_be_empty: Container[str] = ()
) -> list[Problem]:
    """One problem for each class without a token that is not in `may_be_empty`."""
    looked = f"looked at {found.targets:,} target tokens in {found.rows:,} rows"
    problems: list[Problem] = []
    counts = zip(classes.items(), found.tokens, found.matches, found.unpredicted, strict=False)
    for (name, config), tokens, matches, unpredicted in counts:
        if tokens or name in may_be_empty:
            continue
        message = f"matches nothing ({looked})"
        why = config.if_empty
        if unpredicted:
            why = f"The {unpredicted:,} it does match are first in their rows, where no token before predicts them."
        hint = f"{why} If the class may be empty, write `allow_empty: true`"
        if matches:
            message = f"has no token: classes above it take all {matches:,} that it matches ({looked})"
            hint = "the first class that matches wins; move this class up, or write `allow_empty: true`"
        problems.append(Problem(f"dwl.classes.{name}", message, hint=hint))
    return problems
