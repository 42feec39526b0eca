"""What α does to one token, as the run says it: literal counts, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.classes import ClassSurvey
from dwl_plugin.config import Block, parse
from dwl_plugin.loss.reduction import class_weight_table
from dwl_plugin.run.moving import alpha_of
from dwl_plugin.run.startup import hints, other_length_lines, other_options_lines, startup_lines

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
    rows = class_weight_table(found.reduction, found.class_names, found.alpha, COUNTS)
    assert [row.one_token for row in rows] == pytest.approx(one_token)
    assert [row.token_share for row in rows] == pytest.approx([0.2, 0.3, 0.5])
    assert sum(row.weight_share for row in rows) == pytest.approx(1)


def test_overlapping_classes_share_more_than_all_tokens_and_all_of_the_weight() -> None:
    found = block(reduction="weighted_mean", overlap="sum")
    rows = class_weight_table(found.reduction, found.class_names, found.alpha, OVERLAPPING)
    mass = 0.5 * 60 + 0.3 * 50 + 0.2 * 10
    assert [row.token_share for row in rows] == pytest.approx([0.6, 0.5, 0.1])
    assert [row.one_token for row in rows] == pytest.approx([0.5 * 100 / mass, 0.3 * 100 / mass, 0.2 * 100 / mass])
    assert [row.weight_share for row in rows] == pytest.approx([30 / mass, 15 / mass, 2 / mass])


def found_in_data(counts: tuple[int, ...], mass: tuple[float, ...] | None = None) -> ClassSurvey:
    """A survey with these counts; `mass` is Σ|v| of each class and of all targets, if it is not their number."""
    tokens, (targets, samples), none = counts[:-2], counts[-2:], (0,) * (len(counts) - 2)
    names = ("a", "b", "rest")
    weighed = 0 if mass is None else targets
    return ClassSurvey(names, tokens, tokens, none, none, none, samples, samples, targets, weighed, mass or counts[:-1])


UNIFORM = {"a": 1, "b": 1, "rest": 1}


def size_hints(counts: tuple[int, ...] = COUNTS, **dwl: Any) -> list[str]:
    parsed, length = block(**dwl), RunLength(100, 50)
    lines = hints(parsed, found_in_data(counts), alpha_of(parsed, length), length, None)
    return [line for line in lines if "of SFT" in line or "mean weight" in line]


@pytest.mark.parametrize(
    ("alpha", "counts", "size"),
    [
        ({"a": 5, "b": 3, "rest": 2}, COUNTS, "0.29×"),  # 0.2·0.5 + 0.3·0.3 + 0.5·0.2
        (UNIFORM, COUNTS, "0.33×"),
        (UNIFORM, OVERLAPPING, "0.40×"),  # 120 memberships of 100 targets
        ({"a": 1, "b": 0, "rest": 9}, COUNTS, "0.47×"),
    ],
)
def test_a_loss_much_smaller_than_sft_is_said_with_the_line_that_keeps_its_size(
    alpha: dict[str, int], counts: tuple[int, ...], size: str
) -> None:
    overlap = "sum" if counts is OVERLAPPING else "first"
    (line,) = size_hints(counts, alpha=alpha, overlap=overlap)
    assert f"the whole loss and its gradients are {size} those of SFT" in line
    assert "`reduction: weighted_mean` keeps SFT's size" in line


@pytest.mark.parametrize("reduction", ["weighted_mean", "class_mean"])
def test_reductions_that_keep_the_size_get_no_hint(reduction: str) -> None:
    """And they do keep it: the mean weight of a target is 1."""
    assert not size_hints(alpha=UNIFORM, reduction=reduction)
    found = block(reduction=reduction)
    rows = class_weight_table(found.reduction, found.class_names, found.alpha, COUNTS)
    assert sum(row.token_share * row.one_token for row in rows) == pytest.approx(1)


def test_a_size_near_sfts_or_a_reduction_that_is_written_gets_no_hint() -> None:
    assert not size_hints((5, 5, 90, 100, 4), alpha={"a": 0.05, "b": 0.05, "rest": 0.9})  # 0.815
    assert size_hints((10, 10, 80, 100, 4), alpha={"a": 0.05, "b": 0.05, "rest": 0.9})  # 0.73
    assert not size_hints(alpha=UNIFORM, reduction="token_mean")


def test_a_size_that_a_schedule_moves_is_one_hint() -> None:
    (line,) = size_hints(alpha={"a": 0, "b": 0, "rest": 1}, schedule={"type": "linear", "to": {"a": 1, "b": 0, "rest": 0}})
    assert "goes between 0.20" in line


def test_a_sum_over_samples_is_said_with_its_size() -> None:
    """25 targets to a sample, of a mean weight of 0.29."""
    (line,) = size_hints(reduction="sequence_mean_token_sum")
    assert "(25 targets on average)" in line
    assert "7.25× those of SFT" in line


def test_the_table_of_a_run_counts_factors() -> None:
    """By hand: Σ α·M = 0.5·2 + 0.3·30 + 0.2·100 = 30, so w is α·100/30, and a class's token counts that times its mean factor."""
    parsed, length = block(reduction="weighted_mean", data_weights=True), RunLength(100, 50)
    found = found_in_data(COUNTS, (2.0, 30.0, 100.0, 132.0))
    lines = list(startup_lines(parsed, found, alpha_of(parsed, length), length, "it", None))
    cells = {line.split()[0]: line.split()[4:] for line in lines[2:5]}
    assert cells == {"a": ["0.17×", "3.3", "%"], "b": ["1.00×", "30.0", "%"], "rest": ["1.33×", "66.7", "%"]}
    assert lines[5] == "100 of the 100 targets looked at have a factor of the data other than 1"
    assert not any("data_weights" in line for line in lines)


def test_a_loss_that_factors_make_small_is_said() -> None:
    """By hand: (0.5·2 + 0.3·30 + 0.2·10) / 100."""
    parsed, length = block(), RunLength(100, 50)
    (line,) = hints(parsed, found_in_data(COUNTS, (2.0, 30.0, 10.0, 42.0)), alpha_of(parsed, length), length, None)
    assert line.startswith("hint: the mean weight of a token is 0.12, so the whole loss and its gradients are 0.12× those of SFT")


@pytest.mark.parametrize(("mass", "said"), [(8460.0, "is 84.6, so"), (20.0, "is 0.2, so"), (50.0, ""), (250.0, "")])
@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_factors_that_make_another_loss_much_larger_or_smaller_are_said(loss: str, mass: float, said: str) -> None:
    parsed, length = parse({"loss": loss, "dwl": {"data_weights": True}}), RunLength(100, 50)
    assert parsed is not None
    found = ClassSurvey(("rest",), (100,), (100,), (0,), (0, 0), (0,), 4, 4, 100, 100, (mass, mass))
    lines = list(hints(parsed, found, alpha_of(parsed, length), length, None))
    assert [line.startswith(f"hint: the mean factor of the data {said}") for line in lines] == [True] * bool(said)


def test_weights_of_the_data_that_change_nothing_are_said() -> None:
    parsed, length = block(reduction="weighted_mean", data_weights={"token": "w"}), RunLength(100, 50)
    (line,) = hints(parsed, found_in_data(COUNTS), alpha_of(parsed, length), length, None)
    assert line == ("hint: `dwl.data_weights` changes nothing in the 4 rows looked at, where every factor is 1 (`w` of a token)")


TO = {"a": 1, "b": 1, "rest": 8}


@pytest.mark.parametrize(
    ("schedule", "option", "step"),
    [
        ({"type": "linear", "to": TO, "end": 150}, "end", 150),
        ({"type": "step", "to": TO, "at": 101}, "at", 101),
        ({"type": "keyframes", "at": {50: TO, "2.5ep": TO}}, "at.2.5ep", 125),
        ({"type": "warmup", "to": TO, "end": "3ep"}, "end", 150),
    ],
)
def test_a_schedule_that_ends_past_the_run_is_said(schedule: dict[str, Any], option: str, step: int) -> None:
    def said(total: int) -> list[str]:
        found, length = block(schedule=schedule), RunLength(total, 50)
        return [line for line in hints(found, None, alpha_of(found, length), length, None) if "end of its" in line]

    (line,) = said(100)
    assert line.startswith(f"hint: `dwl.schedule.{option}` is step {step} and this run ends at step 100")
    assert not said(150)


def test_a_dft_schedule_that_ends_past_the_run_is_said_once() -> None:
    found = parse(
        {
            "loss": "dwl",
            "dft": {"schedule": {"type": "linear", "to": {"exponent": 0}, "end": 20}},
            "dwl": {"classes": {"a": {"token_ids": [1]}}, "token_loss": "dft"},
        }
    )
    assert found is not None
    length = RunLength(10, None)
    (line,) = hints(found, None, alpha_of(found, length), length, None)
    assert line.startswith("hint: `dft.schedule.end` is step 20 and this run ends at step 10")


def test_a_dft_schedule_of_another_length_is_said() -> None:
    found = parse({"loss": "dft", "dft": {"exponent": 0, "schedule": {"type": "linear", "to": {"exponent": 1}}}})
    assert found is not None
    lines = list(other_length_lines(found, RunLength(10, None), RunLength(20, None), 5))
    assert lines[0] == "resumed at step 5: the checkpoint was trained for 10 steps, this run has 20"
    assert "`dft.schedule`" in lines[1]
    assert "exponent 0.500 → 0.250" in lines[1]
    assert not list(other_length_lines(found, RunLength(10, None), RunLength(10, None), 5))


def test_other_options_of_a_controller_are_said_in_a_line() -> None:
    before, after = (block(controller={"type": "group_dro", **more}).controller for more in ({}, {"eta": 0.5, "every": 3}))
    assert before is not None
    assert after is not None
    saved = before.model_dump(mode="json")
    (line,) = other_options_lines(after, saved)
    assert "`eta` 0.01 → 0.5, `every` 10 → 3" in line
    assert not list(other_options_lines(before, saved))
