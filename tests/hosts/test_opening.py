"""What α does to one token, as the run says it: literal counts, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dwl_plugin.config import Block, parse
from dwl_plugin.hosts.opening import class_weight_table

COUNTS = (20, 30, 50, 100, 4)
"""Two classes and `rest`, 100 targets, 4 samples."""
OVERLAPPING = (60, 50, 10, 100, 4)


def block(**dwl: Any) -> Block:
    classes = {"a": {"token_ids": [1]}, "b": {"token_ids": [2]}}
    parsed = parse({"loss": "dwl", "dwl": {"classes": classes, "alpha": {"a": 5, "b": 3, "rest": 2}, **dwl}})
    assert parsed is not None
    return parsed


@pytest.mark.parametrize(
    ("reduction", "one_token"),
    [
        ("token_mean", (0.5, 0.3, 0.2)),
        ("weighted_mean", (0.5 / 0.29, 0.3 / 0.29, 0.2 / 0.29)),
        ("class_mean", (2.5, 1.0, 0.4)),
        ("sequence_mean_token_sum", (12.5, 7.5, 5.0)),
    ],
)
def test_a_token_counts_what_its_reduction_makes_of_alpha(reduction: str, one_token: tuple[float, ...]) -> None:
    found = block(reduction=reduction)
    rows = class_weight_table(found, found.alpha, COUNTS)
    assert [row.one_token for row in rows] == pytest.approx(one_token)
    assert [row.token_share for row in rows] == pytest.approx([0.2, 0.3, 0.5])
    assert sum(row.weight_share for row in rows) == pytest.approx(1)


def test_overlapping_classes_share_more_than_all_tokens_and_all_of_the_weight() -> None:
    found = block(reduction="weighted_mean", overlap="sum")
    rows = class_weight_table(found, found.alpha, OVERLAPPING)
    mass = 0.5 * 60 + 0.3 * 50 + 0.2 * 10
    assert [row.token_share for row in rows] == pytest.approx([0.6, 0.5, 0.1])
    assert [row.one_token for row in rows] == pytest.approx([0.5 * 100 / mass, 0.3 * 100 / mass, 0.2 * 100 / mass])
    assert [row.weight_share for row in rows] == pytest.approx([30 / mass, 15 / mass, 2 / mass])
