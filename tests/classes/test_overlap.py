"""Class ids as bits where classes overlap, and the mark on the first target of each sample."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from dwl_plugin.classes import Labeller, survey
from dwl_plugin.config import parse
from dwl_plugin.errors import DWLError
from dwl_plugin.run.dataset_check import labeller_of
from dwl_plugin.values import FIRST_TARGET
from tests.classes.little_tokenizers import END, byte_level, encode

CLASSES = {"number": {"regex": r"\d+"}, "seven": {"token_regex": "7"}, "end": {"tokens": [END]}, "tail": {"regex": r"\w+$"}}


def labeller(classes: dict[str, Any] = CLASSES, **dwl: Any) -> Labeller:
    block = parse({"loss": "dwl", "dwl": {"classes": classes, **dwl}})
    assert block is not None
    found = labeller_of(block, byte_level())
    assert found is not None
    return found


def test_a_token_has_a_bit_for_every_class_that_matches_it() -> None:
    ids = encode(byte_level(), f"a 6 7{END}")
    texts = [byte_level().decode([token_id]) for token_id in ids]
    found = dict(zip(texts, labeller(overlap="sum")(ids, ids).tolist(), strict=True))
    assert found["a"] == 0
    assert found["7"] == 0b1011
    assert found[END] == 0b0100
    assert {found[text] for text in texts if "6" in text} == {0b0001}


def test_bits_agree_with_the_selectors_and_the_mask() -> None:
    ids = encode(byte_level(), f"number 7 and 77{END} x7")
    labels = [-100, -100, *ids[2:]]
    sums, first = labeller(overlap="sum"), labeller()
    members_KT = sums.members(ids, labels)
    bits = (members_KT * (1 << np.arange(len(CLASSES)))[:, None]).sum(0)
    assert sums(ids, labels).tolist() == [-100, -100, *bits[2:].tolist()]
    alone = [c if c >= 0 else -100 for c in first(ids, labels)]
    lowest = [int(b & -b).bit_length() - 1 if b > 0 else len(CLASSES) for b in sums(ids, labels)[2:]]
    assert alone[2:] == lowest


def test_a_class_inside_another_is_no_error_where_classes_overlap() -> None:
    inner_last = {"digit": {"token_regex": "[0-9]"}, "seven": {"token_regex": "7"}}
    assert labeller(inner_last, overlap="sum").names == ("digit", "seven", "rest")


def test_the_survey_counts_a_token_in_each_of_its_classes() -> None:
    ids = encode(byte_level(), f"a 6 7{END}")
    masked = {"input_ids": ids, "labels": [-100] * len(ids)}
    found = survey(labeller(overlap="sum"), [{"input_ids": ids, "labels": ids}, masked])
    assert found.tokens[1:4] == (1, 1, 1)
    assert found.tokens == found.matches
    trained = len(ids) - 1
    assert (found.targets, found.rows, found.rows_with_targets) == (trained, 2, 1)
    assert found.counts == (*found.tokens, trained, 1)
    assert sum(found.tokens) > found.targets


def marks(class_ids: Any) -> list[Any]:
    return (np.asarray(class_ids) >= FIRST_TARGET).astype(int).tolist()


@pytest.mark.parametrize("overlap", ["first", "sum"])
def test_the_first_target_of_a_sample_is_marked_and_keeps_its_classes(overlap: str) -> None:
    ids = encode(byte_level(), "say 7 7")
    labels = [-100, -100, *ids[2:]]
    plain = labeller(overlap=overlap)(ids, labels)
    found = labeller(overlap=overlap, reduction="sequence_mean_token_sum")(ids, labels)
    assert marks(found) == [0, 0, 1, *[0] * (len(ids) - 3)]
    assert np.where(found >= 0, found & (FIRST_TARGET - 1), found).tolist() == plain.tolist()


def test_a_target_that_nothing_predicts_is_not_marked() -> None:
    counting = labeller({}, reduction="sequence_mean_token_sum")
    assert marks(counting([5, 6, 7], [5, 6, 7])) == [0, 1, 0]
    assert marks(counting([5, 6, 7], [5, -100, -100])) == [0, 0, 0]
    assert marks(counting([5, 6, 7], [-100, -100, -100])) == [0, 0, 0]
    assert marks(counting([], [])) == []


def test_every_sample_of_a_batch_is_marked_once() -> None:
    counting = labeller({}, reduction="sequence_mean_token_sum")
    ids = [[5, 6, 7, 8, 9, 3], [5, 6, 7, 8, 0, 0]]
    labels = [[-100, 6, 7, -100, 9, 3], [-100, -100, -100, -100, -100, -100]]
    positions = [[0, 1, 2, 0, 1, 2], [0, 1, 2, 3, 4, 5]]
    assert marks(counting.label_batch(ids, labels, position_ids=positions, packed=True)) == [[0, 1, 0, 0, 1, 0], [0] * 6]
    numbered = [[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 0, 0]]
    assert marks(counting.label_batch(ids, labels, attention_mask=numbered, packed=True)) == [[0, 1, 0, 0, 1, 0], [0] * 6]
    assert marks(counting.label_batch(ids, labels)) == [[0, 1, 0, 0, 0, 0], [0] * 6]


def test_samples_that_cannot_be_told_apart_are_refused_where_they_are_counted() -> None:
    ids = [[5, 6, 7, 8]]
    with pytest.raises(DWLError, match="reductions by sample"):
        labeller({}, reduction="sequence_mean_token_sum").label_batch(ids, ids, packed=True)
