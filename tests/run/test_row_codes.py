"""What a row says of its tokens, by its definition: products in fp64, marks side by side, and each wrong value named."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest

from dwl_plugin.classes.data_codes import data_sets_of, encode, factors_of, marks_of
from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError
from dwl_plugin.run.message_spans import Span
from dwl_plugin.run.row_codes import RowCodes, RowError

NAMES = {"row": "weight", "message": "weight", "part": "weight", "token": "token_weight"}
ALL = RowCodes(**NAMES, marks=("a", "b", "7"))


def message(begin: int, end: int, **said: Any) -> Span:
    return Span(begin, end, "messages[1]", "message", said)


def part(begin: int, end: int, **said: Any) -> Span:
    return Span(begin, end, "messages[1].content[2]", "part", said)


def test_the_fields_are_those_of_the_block() -> None:
    block = parse({"loss": "dwl", "dwl": {"data_weights": {"row": "w"}, "classes": {"x": {"marked": "m"}}}})
    assert RowCodes.of(block) == RowCodes(row="w", marks=("m",))
    only_marks = parse({"loss": "dwl", "dwl": {"classes": {"x": {"marked": 7}, "y": {"marked": "b"}}}})
    assert RowCodes.of(only_marks) == RowCodes(marks=("7", "b"))


def test_a_row_that_says_nothing_has_codes_of_0() -> None:
    assert ALL({"text": "a"}, 3).tolist() == [0, 0, 0]
    assert ALL({"weight": None, "mark": None, "token_weight": None}, 3, [message(0, 2, weight=None)]).tolist() == [0, 0, 0]
    assert data_sets_of(ALL({}, 2, data_set=5)).tolist() == [5, 5]
    assert ALL({}, 0).tolist() == []


def test_factors_are_multiplied_and_rounded_once() -> None:
    row = {"weight": 0.1, "token_weight": [0.7, 3, None, 0.0, 1]}
    spans = [message(1, 4, weight=0.3), part(2, 3, weight=1 / 3), part(3, 4)]
    exact = [0.1 * 0.7, 0.1 * 3 * 0.3, 0.1 * 0.3 * (1 / 3), 0.0, 0.1]
    found = factors_of(ALL(row, 5, spans))
    assert found.tolist() == [float(np.float32(value)) for value in exact]
    step_by_step = np.float32(0.1) * np.float32(0.3) * np.float32(1 / 3)
    assert found[2] != step_by_step or float(np.float32(exact[2])) == step_by_step


@pytest.mark.parametrize("values", [[0.5, 1.0], (0.5, 1.0), np.array([0.5, 1.0]), np.array([0.5, 1.0], np.float32)])
def test_a_column_may_be_any_sequence(values: Any) -> None:
    assert factors_of(ALL({"token_weight": values}, 2)).tolist() == [0.5, 1]


def test_marks_add_up() -> None:
    spans = [message(1, 3, mark="b"), part(2, 3, mark=[7, "unknown"])]
    assert marks_of(ALL({"mark": ["a"]}, 4, spans)).tolist() == [1, 3, 7, 1]
    assert marks_of(ALL({"mark": "unknown"}, 1)).tolist() == [0]
    assert RowCodes(row="weight")({"mark": {"no": "mark"}}, 1).tolist() == [0]  # nobody asks


def test_tokens_may_have_marks_of_their_own() -> None:
    row = {"input_ids": [1, 2, 3], "mark": [None, "a", ["a", "b"]]}
    assert marks_of(ALL(row, 3)).tolist() == [0, 1, 3]
    assert marks_of(ALL({"input_ids": [1, 2, 3], "mark": ["a", "b"]}, 3)).tolist() == [3, 3, 3]
    assert marks_of(ALL({"mark": ["a", "b", "7"]}, 3)).tolist() == [7, 7, 7]  # no tokens came with it
    for odd in (["a", None], ["a", "a", "a", "b"]):
        with pytest.raises(ConfigError, match=f"`?mark`?: has {len(odd)} marks, and the row has 3 tokens"):
            ALL({"input_ids": [1, 2, 3], "mark": odd}, 3)


ODD_NUMBERS = {
    "true": (True, "has to be a number"),
    "text": ("0.3", "has to be a number"),
    "a list": ([0.3], "has to be a number"),
    "NaN": (math.nan, "has to be finite"),
    "infinite": (-math.inf, "has to be finite"),
    "more than a float holds": (10**400, "has to be finite"),
    "below 0": (-1, "is below 0"),
}


@pytest.mark.parametrize("case", ODD_NUMBERS)
def test_a_number_that_is_none_is_named_with_its_field(case: str) -> None:
    value, why = ODD_NUMBERS[case]
    for path, call in {
        "weight": lambda: ALL({"weight": value}, 2),
        "token_weight[1]": lambda: ALL({"token_weight": [1.0, value]}, 2),
        "messages[1].weight": lambda: ALL({}, 2, [message(0, 2, weight=value)]),
        "messages[1].content[2].weight": lambda: ALL({}, 2, [part(0, 0, weight=value)]),
    }.items():
        with pytest.raises(ConfigError, match=why) as raised:
            call()
        (problem,) = raised.value.problems
        assert (problem.path, problem.value) == (path, value) or (problem.path == path and math.isnan(problem.value))


@pytest.mark.parametrize("value", [True, 0.5, {"a": 1}, ["a", 0.5]])
def test_a_mark_is_a_name_or_a_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="has to be a name or a number") as raised:
        ALL({}, 1, [message(0, 1, mark=value)])
    assert raised.value.problems[0].path.startswith("messages[1].mark")


def test_a_column_has_a_number_for_each_token() -> None:
    with pytest.raises(ConfigError, match="token_weight: has 1 numbers, and the row has 2 tokens"):
        ALL({"token_weight": [1.0]}, 2)
    with pytest.raises(ConfigError, match="token_weight: has to be a list of numbers"):
        ALL({"token_weight": 0.5}, 2)


def test_negative_factors_are_taken_where_they_are_allowed() -> None:
    may = RowCodes(**NAMES, allow_negative=True)
    row = {"weight": -1, "token_weight": [0.5, -2, -0.0, 0]}
    assert factors_of(may(row, 4)).tolist() == [-0.5, 2, 0, 0]
    assert not np.signbit(factors_of(may(row, 4))[2:]).any()
    assert may({"weight": -0.0}, 1).tolist() == encode([0.0]).tolist()


@pytest.mark.parametrize("factors", [(1e30, 1e30), (1e-30, 1e-30), (1e39, 1), (1e-50, 1)])
def test_a_product_that_is_stored_as_another_is_refused(factors: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="the product of the factors of token 1 is beyond fp32"):
        ALL({"weight": factors[0], "token_weight": [0, factors[1]]}, 2)


def test_where_nothing_reads_them_they_are_refused() -> None:
    reads = RowCodes(message="w", part="p", marks=("a",))
    for value, path in (
        ({"w": 2}, "meta.w"),
        ([{"x": 1}, {"p": 0.5}], "meta[1].p"),
        ({"deep": [{"er": {"w": 0.1}}]}, "meta.deep[0].er.w"),
        ({"mark": ["b", "a"]}, "meta.mark"),
    ):
        with pytest.raises(ConfigError, match="stands where nothing reads it") as raised:
            reads.require_none_in(value, "meta")
        assert raised.value.problems[0].path == path
    for value in (3, "w", [1, 2], {"w": "10 kg", "mark": "b", "weight": 2}, {"p": True}, None, [None, None]):
        reads.require_none_in(value, "meta")
    with pytest.raises(ConfigError):
        reads.require_none_in({"w": 2}, "meta", ["w"])
    reads.require_none_in({"p": 2, "mark": "a"}, "meta", ["w"])


def test_the_error_of_a_row_keeps_it_through_a_process() -> None:
    with pytest.raises(ConfigError) as raised:
        ALL({"weight": -1}, 1)
    error = RowError(raised.value.problems, "datasets", "sums", "{'weight': -1}")
    assert "datasets: the row of sums that begins with {'weight': -1}: `weight`: is below 0 (got -1)" in str(error)
    there = pickle.loads(pickle.dumps(error)).numbered(1233)
    assert "datasets: row 1,234 of sums: `weight`: is below 0 (got -1)" in str(there)
    assert there.number == pickle.loads(pickle.dumps(there)).number == 1233
    as_a_loader_makes_it = RowError(f"Caught RowError in worker 0.\nOriginal Traceback:\n  File\ndwl.RowError: {error}\n")
    assert as_a_loader_makes_it.said.splitlines()[0].strip() == error.said.splitlines()[0]
