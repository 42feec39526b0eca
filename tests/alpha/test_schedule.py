"""α(τ) against its closed formula."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dwl_plugin.alpha.schedule import alpha_of
from dwl_plugin.alpha.tau import RunLength
from dwl_plugin.config import Block, parse
from dwl_plugin.errors import ConfigError

LENGTH = RunLength(total_steps=200, steps_per_epoch=60.0)


def block(**schedule: Any) -> Block:
    dwl = {"classes": {"a": {"regex": "a"}}, "alpha": {"a": 1, "rest": 3}}
    if schedule:
        dwl["schedule"] = {"to": {"a": 4, "rest": 1}, **schedule}
    parsed = parse({"loss": "dwl", "dwl": dwl})
    assert parsed is not None
    return parsed


def test_without_a_schedule_alpha_stays() -> None:
    alpha = alpha_of(block(), RunLength(None, None))
    assert {alpha(tau) for tau in (0, 7, 10_000)} == {(0.25, 0.75)}


@pytest.mark.parametrize(("start", "end", "first", "last"), [
    (20, 120, 20, 120), ("10%", "90%", 20, 180), ("1ep", "2.5ep", 60, 150), (0, "100%", 0, 200),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_every_step_is_on_the_curve_and_on_the_simplex(kind: str, start: Any, end: Any, first: int, last: int) -> None:
    alpha = alpha_of(block(type=kind, start=start, end=end), LENGTH)
    for tau in range(201):
        x = min(max((tau - first) / (last - first), 0.0), 1.0)
        s = x if kind == "linear" else 0.5 - 0.5 * math.cos(math.pi * x)
        a = 0.25 + s * (0.8 - 0.25)
        assert alpha(tau) == pytest.approx((a, 1 - a), abs=1e-12)


@pytest.mark.parametrize(("schedule", "length", "path"), [
    ({"start": "10%"}, RunLength(None, 60.0), "dwl.schedule.start"),
    ({"start": 0, "end": "2ep"}, RunLength(200, None), "dwl.schedule.end"),
    ({"start": "2ep", "end": 100}, LENGTH, "dwl.schedule.end"),
])  # fmt: skip
def test_positions_this_run_cannot_place_are_errors(schedule: dict[str, Any], length: RunLength, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        alpha_of(block(type="linear", **schedule), length)
    assert [problem.path for problem in caught.value.problems] == [path]
