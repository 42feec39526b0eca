"""Every schedule against its closed formula, at every step of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.alpha.schedules import SCHEDULES
from dwl_plugin.config import Block, parse
from dwl_plugin.errors import ConfigError
from dwl_plugin.run.moving import alpha_of

STEPS = 200
LENGTH = RunLength(total_steps=STEPS, steps_per_epoch=60.0)

START, TO, THIRD = np.array([0.25, 0.25, 0.5]), np.array([0.8, 0.0, 0.2]), np.array([0.1, 0.6, 0.3])
NAMES = ("a", "b", "rest")


def proportions(vector: np.ndarray, scale: float) -> dict[str, float]:
    """The same point, written with a sum that is not 1."""
    return dict(zip(NAMES, (vector * scale).tolist(), strict=True))


def block(**schedule: Any) -> Block:
    dwl: dict[str, Any] = {"classes": {"a": {"regex": "a"}, "b": {"regex": "b"}}, "alpha": proportions(START, 4)}
    if schedule:
        dwl["schedule"] = {"to": proportions(TO, 5), **schedule}
    if schedule.get("type") in ("constant", "keyframes"):
        del dwl["schedule"]["to"]
    parsed = parse({"loss": "dwl", "dwl": dwl})
    assert parsed is not None
    return parsed


def share(tau: int, first: float, last: float) -> float:
    return min(max((tau - first) / (last - first), 0.0), 1.0)


def logistic(z: float) -> float:
    return 1.0 / (1.0 + math.exp(-z))


def towards(s: Callable[[float], float], first: float, last: float) -> Callable[[int], np.ndarray]:
    return lambda tau: START + s(share(tau, first, last)) * (TO - START)


def frames(*knots: tuple[float, np.ndarray], s: Callable[[float], float]) -> Callable[[int], np.ndarray]:
    """Piecewise, found by walking over every pair of knots."""

    def alpha(tau: int) -> np.ndarray:
        value = knots[0][1]
        for (left, before), (right, after) in pairwise(knots):
            if left <= tau < right:
                value = before + s((tau - left) / (right - left)) * (after - before)
        return knots[-1][1] if tau >= knots[-1][0] else value

    return alpha


def cosine(x: float) -> float:
    return 0.5 - 0.5 * math.cos(math.pi * x)


def triangle(tau: int) -> float:
    """0 at step 30, then up for 25 steps and down for 25."""
    into = (tau - 30) % 50
    return 0.0 if tau < 30 else into / 25 if into <= 25 else 2 - into / 25


AT = {"20%": proportions(TO, 3), 100: proportions(THIRD, 1), "2.5ep": proportions(START, 1)}
KNOTS = ((0, START), (40, TO), (100, THIRD), (150, START))
HUMP = ((10, START), (30, TO), (120, TO), (200, START))

CURVES: dict[str, tuple[dict[str, Any], Callable[[int], np.ndarray]]] = {
    "constant": ({"type": "constant"}, lambda tau: START),
    "linear, whole run": ({"type": "linear"}, towards(lambda x: x, 0, STEPS)),
    "linear, steps": ({"type": "linear", "start": 20, "end": "120"}, towards(lambda x: x, 20, 120)),
    "linear, share": ({"type": "linear", "start": "10%", "end": "90%"}, towards(lambda x: x, 20, 180)),
    "cosine, epochs": ({"type": "cosine", "start": "1ep", "end": "2.5ep"}, towards(cosine, 60, 150)),
    "exponential": (
        {"type": "exponential", "start": 20, "end": 180},
        towards(lambda x: (1 - math.exp(-5 * x)) / (1 - math.exp(-5)), 20, 180),
    ),
    "exponential, slow first": (
        {"type": "exponential", "rate": -2.5},
        towards(lambda x: (1 - math.exp(2.5 * x)) / (1 - math.exp(2.5)), 0, STEPS),
    ),
    "sigmoid": (
        {"type": "sigmoid", "end": 160},
        towards(lambda x: (logistic(10 * (x - 0.5)) - logistic(-5)) / (logistic(5) - logistic(-5)), 0, 160),
    ),
    "sigmoid, gentle": (
        {"type": "sigmoid", "steepness": 3},
        towards(lambda x: (logistic(3 * (x - 0.5)) - logistic(-1.5)) / (logistic(1.5) - logistic(-1.5)), 0, STEPS),
    ),
    "step": ({"type": "step", "at": "33%"}, lambda tau: TO if tau >= 66 else START),
    "keyframes": ({"type": "keyframes", "at": AT}, frames(*KNOTS, s=lambda x: x)),
    "keyframes, hold": ({"type": "keyframes", "at": AT, "interpolation": "hold"}, frames(*KNOTS, s=lambda x: 0.0)),
    "keyframes, cosine": ({"type": "keyframes", "at": AT, "interpolation": "cosine"}, frames(*KNOTS, s=cosine)),
    "warmup": ({"type": "warmup", "start": 10, "hold": "0.5ep", "decay": "60%"}, frames(*HUMP, s=lambda x: x)),
    "warmup, elsewhere": (
        {"type": "warmup", "interpolation": "cosine", "final": proportions(THIRD, 2)},
        frames((0, START), (20, TO), (180, TO), (200, THIRD), s=cosine),
    ),
    "cyclic": ({"type": "cyclic", "period": 50, "start": 30}, lambda tau: START + triangle(tau) * (TO - START)),
    "cyclic, cosine": (
        {"type": "cyclic", "period": "0.5ep", "shape": "cosine"},
        lambda tau: START + (1 - math.cos(2 * math.pi * tau / 30)) / 2 * (TO - START),
    ),
}


@pytest.mark.parametrize("name", CURVES)
def test_every_step_is_on_the_curve_and_on_the_simplex(name: str) -> None:
    schedule, expected = CURVES[name]
    alpha = alpha_of(block(**schedule), LENGTH)
    for tau in range(STEPS + 20):
        assert np.abs(np.array(alpha(tau)) - expected(tau)).max() < 1e-12, tau
        assert min(alpha(tau)) >= 0
        assert abs(math.fsum(alpha(tau)) - 1) < 1e-12


def test_every_type_has_a_curve_here() -> None:
    assert {schedule["type"] for schedule, _ in CURVES.values()} == set(SCHEDULES)


def test_without_a_schedule_alpha_stays() -> None:
    alpha = alpha_of(block(), RunLength(None, None))
    assert {alpha(tau) for tau in (0, 7, 10_000)} == {(0.25, 0.25, 0.5)}


def test_a_ramp_begins_and_ends_at_exactly_the_numbers_of_the_yaml() -> None:
    for kind in ("linear", "cosine", "exponential", "sigmoid"):
        alpha = alpha_of(block(type=kind, start=10, end=20), LENGTH)
        assert alpha(10) == alpha(0) == (0.25, 0.25, 0.5)
        assert alpha(20) == alpha(199) == (0.8, 0.0, 0.2)


@pytest.mark.parametrize("steps", [1, 7, 50, 100, 150, 1000, 12345])
def test_every_percent_of_a_run_begins_at_its_own_step(steps: int) -> None:
    """In floats 7% of 100 is a little more than 7, and a jump there comes a step late."""
    for percent in range(1, 101):
        alpha = alpha_of(block(type="step", at=f"{percent}%"), RunLength(steps, None))
        first = next(tau for tau in range(steps + 1) if alpha(tau) != alpha(0) or tau * 100 >= percent * steps)
        assert first * 100 >= percent * steps
        assert alpha(first) != alpha(0), (percent, steps)


def test_a_position_keeps_every_digit_that_was_written() -> None:
    options = block(type="linear", start="12.3456789%", end="1000000.50 ep").schedule
    assert options is not None
    assert options.last_position == ("end", "1000000.5ep")
    assert options.start == "12.3456789%"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("schedule", "length", "path", "words"),
    [
        ({"type": "linear", "start": "10%"}, RunLength(None, 60.0), "start", "no known length"),
        ({"type": "linear", "start": 0, "end": "2ep"}, RunLength(200, None), "end", "epochs"),
        ({"type": "linear", "start": "2ep", "end": 100}, LENGTH, "end", "`start` is step 120"),
        ({"type": "keyframes", "at": {"50%": proportions(TO, 1), 90: proportions(START, 1)}}, LENGTH, "at.90", "step 100"),
        ({"type": "keyframes", "at": {"2ep": proportions(TO, 1)}}, RunLength(200, None), "at.2ep", "epochs"),
        ({"type": "step", "at": "50%"}, RunLength(None, 60.0), "at", "no known length"),
        ({"type": "warmup", "hold": 190}, LENGTH, "decay", "`hold` is step 190"),
        ({"type": "cyclic", "period": "10%"}, RunLength(None, None), "period", "no known length"),
    ],
)
def test_positions_this_run_cannot_place_are_errors(schedule: dict[str, Any], length: RunLength, path: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        alpha_of(block(**schedule), length)
    assert [problem.path for problem in caught.value.problems] == [f"dwl.schedule.{path}"]
    assert words in str(caught.value)
