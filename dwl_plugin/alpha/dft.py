"""DFT's exponent and floor over the run: from NLL to DFT, say. The curves are those of α; the numbers are no point on a simplex."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.alpha.schedule import Curve, ScheduleContext, Vector, curve_of
from dwl_plugin.config import Block, DFTConfig, TokenLossConfig
from dwl_plugin.loss.token_losses import SCHEDULED

__all__ = ["end_hints", "token_losses_of"]


def token_losses_of(block: Block, length: RunLength) -> Callable[[int], tuple[TokenLossConfig, ...]] | None:
    """τ -> what each class pays at that step, over `Block.class_names`; None where no `dft` has a schedule.

    Raises `ConfigError` for positions that this run's length cannot place, and for those that turn out to be in the wrong order.
    """
    losses = block.token_losses
    curves = [_curve(loss, length, path) for loss, path in zip(losses, block.dft_paths, strict=True)]
    if not any(curves):
        return None

    def at(tau: int) -> tuple[TokenLossConfig, ...]:
        return tuple(
            loss if curve is None else loss.model_copy(update=dict(zip(SCHEDULED, curve(tau), strict=True)))
            for loss, curve in zip(losses, curves, strict=True)
        )

    return at


def end_hints(block: Block, length: RunLength) -> Iterator[str]:
    """Schedules that the run stops before the end of."""
    for path, options in block.schedules.items():
        if options.last_position is None or length.total_steps is None:
            continue
        option, position = options.last_position
        end = length.step(position, f"{path}.{option}")
        if end > length.total_steps:
            what = "α" if path == "dwl.schedule" else "dft"
            yield (
                f"hint: `{path}.{option}` is step {end:g} and this run ends at step {length.total_steps}, so {what} does not "
                "get to the end of its schedule"
            )


def _curve(loss: TokenLossConfig, length: RunLength, path: str) -> Curve | None:
    """τ -> `SCHEDULED`. A number that a vector leaves out is the one outside the schedule."""
    if not isinstance(loss, DFTConfig) or loss.schedule is None:
        return None
    first = tuple(float(getattr(loss, name)) for name in SCHEDULED)

    def vector(numbers: Mapping[str, float]) -> Vector:
        return tuple(numbers.get(name, value) for name, value in zip(SCHEDULED, first, strict=True))

    return curve_of(loss.schedule, ScheduleContext(f"{path}.schedule", length, first, vector), _in_range)


def _in_range(vector: Vector) -> bool:
    exponent, min_weight = vector
    return 0.0 <= exponent < math.inf and 0.0 <= min_weight <= 1.0
