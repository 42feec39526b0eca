"""What a survey makes of factors that come with the data, by hand: 4 targets are a row's `7 7 7 7` behind one masked token."""

from __future__ import annotations

from typing import Any

import pytest

from dwl_plugin.classes import ClassSurvey, empty_class_problems, survey, trained_on
from dwl_plugin.classes.data_codes import DATA_CODES, encode
from dwl_plugin.config import parse
from dwl_plugin.loss.reduction import class_weight_table
from dwl_plugin.run.dataset_check import labeller_of
from tests.classes.little_tokenizers import byte_level

SEVEN, EIGHT, X = byte_level().encode("78x", add_special_tokens=False)
ROWS = [
    ([X, SEVEN, SEVEN, EIGHT, X], [1.0, 0.5, 0.0, 2.0, 1.0]),  # 3 targets that count
    ([X, SEVEN], [7.0, -1.5]),
    ([X, SEVEN, SEVEN, SEVEN, SEVEN, X, X], [1.0] * 7),  # 6
]
CLASSES = {"seven": {"token_ids": [SEVEN]}, "digit": {"token_ids": [SEVEN, EIGHT], "allow_empty": True}}


def found_in(rows: list[tuple[list[int], list[float]]] = ROWS, **dwl: Any) -> ClassSurvey:
    block = parse({"loss": "dwl", "dwl": {"data_weights": {"allow_negative": True}, "classes": CLASSES, **dwl}})
    assert block is not None
    samples = [{"input_ids": ids, "labels": [-100, *ids[1:]], DATA_CODES: encode(factors).tolist()} for ids, factors in rows]
    return survey(labeller_of(block, byte_level()), samples)


@pytest.mark.parametrize(
    ("reduction", "mass"),
    [
        ("weighted_mean", (0.5 + 1.5 + 4, 2, 3, 11)),
        ("sample_mean", (0.5 / 3 + 1.5 + 4 / 6, 2 / 3, 1 / 3 + 2 / 6, 3.5 / 3 + 1.5 + 1)),
        ("sample_sqrt", (0.5 / 3**0.5 + 1.5 + 4 / 6**0.5, 2 / 3**0.5, 3**-0.5 + 2 / 6**0.5, 3.5 / 3**0.5 + 1.5 + 6**0.5)),
    ],
)
def test_a_class_has_the_sum_of_its_factors(reduction: str, mass: tuple[float, ...]) -> None:
    """That of the negative one without its sign; the one that is 0 is no target."""
    found = found_in(reduction=reduction)
    assert (found.tokens, found.targets, found.rows_with_targets) == ((6, 1, 3), 10, 3)
    assert found.mass == pytest.approx(mass)
    assert found.masses == (*found.mass, 3)
    assert (found.taken_out, found.weighed) == ((1, 1, 0, 1), 4)


def test_where_classes_overlap_a_token_adds_its_factor_to_each() -> None:
    found = found_in(overlap="sum", reduction="weighted_mean")
    assert (found.tokens, found.mass) == ((6, 7, 3), (6, 8, 3, 11))


TABLE = {  # by hand: α = (.5, .3, .2), N = 10, N_c = (6, 1, 3), M_c and M as above
    "token_mean": (0.5 * 6 / 6, 0.3 * 2, 0.2 * 3 / 3),
    "weighted_mean": tuple(a * 10 / (0.5 * 6 + 0.3 * 2 + 0.2 * 3) for a in (0.5 * 6 / 6, 0.3 * 2, 0.2 * 3 / 3)),
    "class_mean": (0.5 * 10 / 6, 0.3 * 10 / 1, 0.2 * 10 / 3),
    "sequence_mean_token_sum": tuple(a * 10 / 3 for a in (0.5 * 6 / 6, 0.3 * 2, 0.2 * 3 / 3)),
    "sample_mean": (
        0.5 * 10 / (3.5 / 3 + 2.5) * (0.5 / 3 + 1.5 + 4 / 6) / 6,
        0.3 * 10 / (3.5 / 3 + 2.5) * 2 / 3,
        0.2 * 10 / (3.5 / 3 + 2.5) * (1 / 3 + 2 / 6) / 3,
    ),
    "sample_sqrt": (
        0.5 * 10 / (3.5 / 3**0.5 + 1.5 + 6**0.5) * (0.5 / 3**0.5 + 1.5 + 4 / 6**0.5) / 6,
        0.3 * 10 / (3.5 / 3**0.5 + 1.5 + 6**0.5) * 2 / 3**0.5,
        0.2 * 10 / (3.5 / 3**0.5 + 1.5 + 6**0.5) * (3**-0.5 + 2 / 6**0.5) / 3,
    ),
}


@pytest.mark.parametrize("reduction", TABLE)
def test_what_one_token_counts_on_average_under_each_reduction(reduction: Any) -> None:
    found, alpha = found_in(reduction=reduction), (0.5, 0.3, 0.2)
    rows = class_weight_table(reduction, found.names, alpha, found.counts, found.masses)
    assert [row.one_token for row in rows] == pytest.approx(TABLE[reduction])
    parts = [count * one for count, one in zip(found.tokens, TABLE[reduction], strict=True)]
    assert [row.weight_share for row in rows] == pytest.approx([part / sum(parts) for part in parts])
    if reduction in ("weighted_mean", "class_mean"):
        assert sum(parts) == pytest.approx(10)  # as large as SFT


def test_a_class_whose_tokens_all_have_a_factor_of_0_is_told_so() -> None:
    found = found_in([([X, SEVEN, EIGHT, X], [1.0, 0.0, 1.0, 1.0])])
    block = parse({"loss": "dwl", "dwl": {"classes": CLASSES}})
    assert block is not None
    (problem,) = empty_class_problems(found, block.class_configs, {"digit"})
    assert problem.path == "dwl.classes.seven"
    assert problem.hint.startswith("The 1 it does match have a factor of 0 in the data.")
    assert found.unpredicted == (0, 0, 0)


def test_a_row_of_zeros_has_no_target() -> None:
    row = {"input_ids": [X, SEVEN, X], "labels": [-100, SEVEN, X], DATA_CODES: encode([1.0, 0.0, 1.0]).tolist()}
    assert trained_on(row).tolist() == [False, False, True]
    assert survey(None, [row]).targets == 1


def test_the_first_token_of_a_sample_is_none_of_its_targets() -> None:
    """Two targets of ½ each, though three tokens have labels."""
    block = parse({"loss": "dwl", "dwl": {"classes": CLASSES, "reduction": "sample_mean"}})
    assert block is not None
    row = {"input_ids": [SEVEN, SEVEN, X], "labels": [SEVEN, SEVEN, X]}
    found = survey(labeller_of(block, byte_level()), [row])
    assert (found.tokens, found.mass) == ((1, 0, 1), (0.5, 0, 0.5, 1))
