"""A look at the data before the first step: a class that is nowhere in it stops the run, and so does data without a target."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np

from dwl_plugin.classes import ClassSurvey, Labeller, build_labeller, empty_class_problems, survey, trained_on
from dwl_plugin.classes.labeller import as_ints
from dwl_plugin.config import Block
from dwl_plugin.config.classes import may_be_empty
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.values import IGNORE_INDEX

__all__ = [
    "NO_TARGET",
    "SURVEY_ROWS",
    "check_dataset",
    "ids_outside",
    "labeller_of",
    "no_rows",
    "no_targets",
    "picked_rows",
    "require_rows",
    "require_targets",
    "with_targets",
]

SURVEY_ROWS = 512
"""Rows of the training set that are labelled to see that every class exists."""

NO_TARGET = "a label is -100, or the first of its row, which nothing predicts"

_OF_A_TRAINER = ("train_dataset", "eval_dataset")


def labeller_of(block: Block, tokenizer: Any, data_sets: tuple[str, ...] = ()) -> Labeller | None:
    """The labeller that a block asks for; None if nothing in it depends on the tokens.

    `data_sets` are their names, as the host numbers them from 1; they count where rows say from which they are. Raises as
    `build_labeller`.
    """
    if not block.labels_tokens:
        return None
    classes = block.class_configs
    marks_samples = block.reduction == "sequence_mean_token_sum"
    return build_labeller(
        classes,
        tokenizer,
        block.overlap,
        may_be_empty(classes),
        marks_samples=marks_samples,
        reads_data=block.reads_data,
        power=block.sample_power,
        data_sets=data_sets if block.reads_data else (),
    )


def picked_rows(count: int, seed: int, most: int = SURVEY_ROWS) -> list[int]:
    """Up to `most` different row numbers below `count`, in order; a seed gives the same ones everywhere."""
    return sorted(np.random.default_rng(seed).permutation(count)[:most].tolist())


def with_targets(picked: list[dict[str, Any]], everything: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """`picked`, and where none of these rows has a target, as many as may be of those that have one."""
    if not picked or any(trained_on(row).any() for row in picked):
        return picked
    return [*picked, *islice((row for row in everything if trained_on(row).any()), SURVEY_ROWS)]


def require_rows(dataset: Any, key: str = "datasets") -> None:
    """Raise `ConfigError` for a training set without a row; a stream does not tell."""
    if hasattr(dataset, "__len__") and not len(dataset):
        raise ConfigError([no_rows(key)])


def no_rows(key: str = "datasets", why: str = "the data is empty, or every row was dropped", **received: Any) -> Problem:
    hint = "rows longer than `sequence_len` are dropped, and rows without a token to train on (`train_on_inputs`, roles)"
    if key == "train_dataset":
        why, hint = "the data is empty", ""
    return Problem(key, f"there is no row to train on: {why}", hint=hint, **received)


def no_targets(rows: int | None, key: str = "datasets", taken_out: int = 0) -> Problem:
    """Of the training set, which is `datasets` of a config or `train_dataset` of a trainer, or of an evaluation set; `taken_out`
    targets have a factor of 0 in the data."""
    looked = "in any row" if rows is None else f"in the {rows:,} rows looked at"
    what = "to train on" if key in ("datasets", "train_dataset") else "to evaluate on, and its loss would be NaN"
    source = "the collator" if key in _OF_A_TRAINER else "`train_on_inputs`, roles and the dataset's type"
    hint = f"the data gives all {taken_out:,} a factor of 0" if taken_out else f"{NO_TARGET}: look at {source}"
    return Problem(key, f"there is nothing {what}: no target token {looked}", hint=hint)


def ids_outside(samples: Iterable[Mapping[str, Any]], size: int, source: str = "datasets") -> Iterator[Problem]:
    """Ids and labels beyond the `size` rows of a model's embedding: training would stop at them, on a GPU without a word of why."""
    rows = list(samples)
    for key, no_target in (("input_ids", ()), ("labels", (IGNORE_INDEX,))):
        outside = [ids[((ids < 0) | (ids >= size)) & ~np.isin(ids, no_target)] for ids in (as_ints(row[key]) for row in rows)]
        if wrong := [int(ids[0]) for ids in outside if len(ids)]:
            allowed = f"0 to {size - 1:,}{', or -100 for no target' if no_target else ''}"
            message = f"`{key}` of {len(wrong):,} of the rows looked at name tokens that the model does not have"
            yield Problem(source, message, wrong[0], allowed, "were they tokenised for another model?")


def require_targets(samples: Iterable[Mapping[str, Any]], key: str) -> None:
    """Raise `ConfigError` if an evaluation set has no target; `samples` as of `with_targets`."""
    found = survey(None, samples)
    if found.rows and not found.targets:
        raise ConfigError([no_targets(None, key, found.taken_out[-1])])


def check_dataset(
    block: Block, labeller: Labeller | None, samples: Iterable[Mapping[str, Any]], key: str = "datasets"
) -> ClassSurvey | None:
    """Survey the classes in `samples`, as of `with_targets`; None where there are none.

    Raises:
        ConfigError: no target in all of the data; or every class without a token that does not say `allow_empty: true`.
    """
    found = survey(labeller, samples)
    if not found.rows:
        return None
    if not found.targets:
        raise ConfigError([no_targets(None, key, found.taken_out[-1])])
    ConfigError.raise_any(empty_class_problems(found, block.class_configs, may_be_empty(block.class_configs)))
    return found
