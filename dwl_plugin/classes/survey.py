"""What the classes find in some samples, and what is wrong where they find nothing.

Suffixes: C classes with `rest`, K classes without it, T tokens.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dwl_plugin.classes.labeller import Labeller, as_ints
from dwl_plugin.classes.selectors import SelectorConfig
from dwl_plugin.errors import Problem
from dwl_plugin.values import IGNORE_INDEX

__all__ = ["ClassSurvey", "empty_class_problems", "survey"]


@dataclass(frozen=True)
class ClassSurvey:
    """What the classes found in some samples.

    Args:
        names: classes in priority order, then `rest`.
        tokens: targets of each class; where classes overlap, in each of their classes.
        matches: targets that each selector matches before priority; for `rest`, its tokens.
        rows_without: rows without a token of the class.
        rows: rows looked at.
        rows_with_targets: rows with a target.
        targets: targets looked at.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    matches: tuple[int, ...]
    rows_without: tuple[int, ...]
    rows: int
    rows_with_targets: int
    targets: int

    @property
    def counts(self) -> tuple[int, ...]:
        """(C + 2,) as `class_weights` takes them: tokens of each class, targets, samples with a target."""
        return (*self.tokens, self.targets, self.rows_with_targets)


def survey(labeller: Labeller, samples: Iterable[Mapping[str, Any]]) -> ClassSurvey:
    """Count the classes in samples, each a mapping with `input_ids`, `labels` and perhaps `position_ids` of (T,)."""
    count = len(labeller.names)
    tokens_C, matches_C, without_C = np.zeros((3, count), np.int64)
    rows = rows_with_targets = targets = 0
    for sample in samples:
        members_KT = labeller.members(sample["input_ids"], sample["labels"], sample.get("position_ids"))
        claimed_KT = members_KT & (np.cumsum(members_KT, axis=0) == 1)
        in_sample = int(np.count_nonzero(as_ints(sample["labels"]) != IGNORE_INDEX))
        in_rest = in_sample - int(claimed_KT.sum())
        in_class_C = np.append((claimed_KT if labeller.overlap == "first" else members_KT).sum(1), in_rest)
        tokens_C += in_class_C
        matches_C += np.append(members_KT.sum(1), in_rest)
        without_C += in_class_C == 0
        targets += in_sample
        rows += 1
        rows_with_targets += in_sample > 0
    tokens, matches, without = (tuple(count_C.tolist()) for count_C in (tokens_C, matches_C, without_C))
    return ClassSurvey(labeller.names, tokens, matches, without, rows, rows_with_targets, targets)


def empty_class_problems(
    found: ClassSurvey, classes: Mapping[str, SelectorConfig], may_be_empty: Container[str] = ()
) -> list[Problem]:
    """One problem for each class without a token that is not in `may_be_empty`."""
    if found.rows and not found.targets:
        message = f"there is nothing to classify: no target token in the {found.rows:,} rows looked at"
        hint = "every label is -100; look at the dataset's type and at `train_on_inputs`"
        return [Problem("dwl.classes", message, hint=hint)]
    looked = f"looked at {found.targets:,} target tokens in {found.rows:,} rows"
    problems: list[Problem] = []
    for (name, config), tokens, matches in zip(classes.items(), found.tokens, found.matches, strict=False):
        if tokens or name in may_be_empty:
            continue
        message = f"matches nothing ({looked})"
        hint = f"{config.if_empty} If the class may be empty, write `allow_empty: true`"
        if matches:
            message = f"has no token: classes above it take all {matches:,} that it matches ({looked})"
            hint = "the first class that matches wins; move this class up, or write `allow_empty: true`"
        problems.append(Problem(f"dwl.classes.{name}", message, hint=hint))
    return problems
