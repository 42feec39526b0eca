"""The exponent and the floor of DFT as functions of the step, in the grammar of α's schedules."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import Block, parse
from dwl_plugin.errors import ConfigError
from dwl_plugin.loss.token_losses import DFTConfig
from dwl_plugin.run.moving import token_losses_of

LENGTH = RunLength(100, 20.0)


def block(text: str) -> Block:
    parsed = parse(yaml.safe_load(text))
    assert parsed is not None
    assert parse(parsed.dump()) == parsed
    return parsed


def dft_at(config: Block, tau: int) -> list[tuple[float, float]]:
    at = token_losses_of(config, LENGTH)
    assert at is not None
    losses: tuple[Any, ...] = at(tau)
    assert all(isinstance(loss, DFTConfig) for loss in losses)
    return [(loss.exponent, loss.min_weight) for loss in losses]


def test_from_nll_to_dft_on_a_straight_line() -> None:
    config = block(
        "{loss: dft, dft: {exponent: 0, min_weight: 0.2, schedule: {type: linear, to: {exponent: 1}, start: 10%, end: 60%}}}"
    )
    for tau in range(101):
        x = min(max((tau - 10) / 50, 0.0), 1.0)
        assert dft_at(config, tau) == [(pytest.approx(x, abs=1e-12), pytest.approx(0.2, abs=1e-12))]


def test_both_numbers_move_through_keyframes() -> None:
    frames = "{20: {exponent: 1, min_weight: 0.5}, '3ep': {min_weight: 0}}"
    config = block(f"{{loss: dft, dft: {{exponent: 0.5, schedule: {{type: keyframes, at: {frames}}}}}}}")
    assert dft_at(config, 0) == [(0.5, 0.0)]
    assert dft_at(config, 10) == [(0.75, 0.25)]
    assert dft_at(config, 20) == [(1.0, 0.5)]
    assert dft_at(config, 40) == [(0.75, 0.25)]
    assert dft_at(config, 99) == [(0.5, 0.0)]


def test_a_class_moves_by_its_own_schedule_and_the_others_stay() -> None:
    config = block("""
loss: dwl
dwl:
  token_loss: dft
  classes:
    soft: {regex: a, dft: {exponent: 0, schedule: {type: step, to: {exponent: 2}, at: 50}}}
    plain: {regex: b, token_loss: nll}
""")
    assert dft_at(config, 49) == [(0.0, 0.0), (0.0, 0.0), (1.0, 0.0)]
    assert dft_at(config, 50) == [(2.0, 0.0), (0.0, 0.0), (1.0, 0.0)]


def test_without_a_schedule_nothing_is_computed() -> None:
    assert token_losses_of(block("{loss: dft}"), LENGTH) is None


@pytest.mark.parametrize(
    ("schedule", "path", "words"),
    [
        ("{type: linaer, to: {exponent: 1}}", "type", "did you mean `linear`"),
        ("{type: linear, to: {exponent: 1}, strat: 5}", "strat", "did you mean `start`"),
        ("{type: linear, to: {exponnet: 1}}", "to.exponnet", "did you mean `exponent`"),
        ("{type: linear, to: {}}", "to", "exponent, min_weight"),
        ("{type: linear, to: {exponent: -1}}", "to.exponent", "from 0 up"),
        ("{type: linear, to: {min_weight: 1.5}}", "to.min_weight", "from 0 to 1"),
        ("{type: linear, to: {exponent: 1}, start: 9, end: 3}", "end", "after `start`"),
        ("{type: keyframes, at: {50: {exponent: 1}, 30: {exponent: 2}}}", "at.30", "after the keyframe 50"),
    ],
)
@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("dft", "{{loss: dft, dft: {{schedule: {0}}}}}"),
        ("dwl.classes.a.dft", "{{loss: dwl, dwl: {{classes: {{a: {{regex: a, token_loss: dft, dft: {{schedule: {0}}}}}}}}}}}"),
    ],
)
def test_the_error_names_the_option(place: str, text: str, schedule: str, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(yaml.safe_load(text.format(schedule)))
    (problem,) = caught.value.problems
    assert problem.path == f"{place}.schedule.{path}"
    assert words in str(problem)


def test_a_position_that_the_run_cannot_place_is_named_with_the_class() -> None:
    text = "{loss: dwl, dwl: {classes: {a: {regex: a, token_loss: dft, dft: {schedule: {type: linear, to: {exponent: 0}}}}}}}"
    with pytest.raises(ConfigError, match=r"dwl\.classes\.a\.dft\.schedule\.end: this run has no known length"):
        token_losses_of(block(text), RunLength(None, None))
