"""Open loop: α as a pure function of τ, so a resumed run has the α it would have had."""

from __future__ import annotations

import math
from collections.abc import Callable

from dwl_plugin.alpha.tau import RunLength
from dwl_plugin.config import Block
from dwl_plugin.errors import ConfigError, Problem

__all__ = ["Alpha", "alpha_of"]

Alpha = Callable[[int], tuple[float, ...]]
"""τ -> α over `Block.class_names`, a point on the simplex."""

_EASE: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "cosine": lambda x: (1.0 - math.cos(math.pi * x)) / 2.0,
}


def alpha_of(block: Block, length: RunLength) -> Alpha:
    """α(τ) = (1−s)·`alpha` + s·`to`, with s = ease(clip((τ−start)/(end−start), 0, 1)). Constant without a schedule.

    The vectors are interpolated, so α stays on the simplex and no class bends another's curve.
    Raises `ConfigError` for positions that this run's length cannot place, or an `end` that does not come after `start`.
    """
    first, schedule = block.alpha, block.schedule
    if schedule is None:
        return lambda tau: first
    last = block.on_simplex(schedule.to)
    start = length.step(schedule.start, "dwl.schedule.start")
    end = length.step(schedule.end, "dwl.schedule.end")
    if end <= start:
        raise ConfigError([
            Problem("dwl.schedule.end", f"is step {end:g} of this run, and `start` is step {start:g}", schedule.end)
        ])  # fmt: skip
    ease = _EASE[schedule.type]

    def alpha(tau: int) -> tuple[float, ...]:
        share = ease(min(max((tau - start) / (end - start), 0.0), 1.0))
        return tuple((1.0 - share) * a + share * b for a, b in zip(first, last, strict=True))

    return alpha
