"""What of a block changes from step to step: α by a schedule or a controller, and dft's exponent and floor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

from dwl_plugin.alpha.controllers import Controller
from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.alpha.schedules import Curve, ScheduleContext, Vector, curve_of
from dwl_plugin.config import Block
from dwl_plugin.errors import ConfigError
from dwl_plugin.loss.token_losses import SCHEDULED, DFTConfig, TokenLossConfig

__all__ = ["alpha_of", "controller_of", "end_hints", "require_places", "token_losses_of"]


def alpha_of(block: Block, length: RunLength) -> Curve:
    """α(τ) over `Block.class_names`: from `alpha` along the schedule; constant without one.

    Raises `ConfigError` for positions that this run's length cannot place, and for those that turn out to be in the wrong order.
    """
    if block.schedule is None:
        first = block.alpha
        return lambda tau: first
    context = ScheduleContext("dwl.schedule", length, block.alpha, block.on_simplex)
    return curve_of(block.schedule, context, _on_simplex)


def token_losses_of(block: Block, length: RunLength) -> Callable[[int], tuple[TokenLossConfig, ...]] | None:
    """τ -> what each class pays at that step, over `Block.class_names`; None where no `dft` has a schedule.

    Raises as `alpha_of`.
    """
    losses = block.token_losses
    curves = [_dft_curve(loss, length, path) for loss, path in zip(losses, block.dft_paths, strict=True)]
    if not any(curves):
        return None

    def at(tau: int) -> tuple[TokenLossConfig, ...]:
        return tuple(
            loss if curve is None else loss.model_copy(update=dict(zip(SCHEDULED, curve(tau), strict=True)))
            for loss, curve in zip(losses, curves, strict=True)
        )

    return at


def controller_of(block: Block, length: RunLength) -> Controller | None:
    """What moves α by the losses, if anything does. Raises `ConfigError` for a warm-up that this run's length cannot place."""
    if block.controller is None:
        return None
    return Controller(block.controller, block.class_names, block.alpha, length)


def require_places(block: Block, total_steps: int | None, steps_per_epoch: float | None) -> None:
    """Raises `ConfigError` for positions that the run to come cannot place.

    Steps per epoch are an estimate until the loader is there; an order that a tenth more or less puts right is left to the run.
    """

    def place(estimate: float | None) -> None:
        for moving in (alpha_of, token_losses_of, controller_of):
            moving(block, RunLength(total_steps, estimate))

    try:
        place(steps_per_epoch)
    except ConfigError:
        for other in () if steps_per_epoch is None else (0.9 * steps_per_epoch, 1.1 * steps_per_epoch):
            with suppress(ConfigError):
                return place(other)
        raise


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
                f"get to the end of its schedule; the end of the run is `{option}: 100%`"
            )


def _dft_curve(loss: TokenLossConfig, length: RunLength, path: str) -> Curve | None:
    """τ -> `SCHEDULED`. A number that a vector leaves out is the one outside the schedule."""
    if not isinstance(loss, DFTConfig) or loss.schedule is None:
        return None
    first = tuple(float(getattr(loss, name)) for name in SCHEDULED)

    def vector(numbers: Mapping[str, float]) -> Vector:
        return tuple(numbers.get(name, value) for name, value in zip(SCHEDULED, first, strict=True))

    return curve_of(loss.schedule, ScheduleContext(f"{path}.schedule", length, first, vector), _in_range)


def _on_simplex(alpha: Vector) -> bool:
    return all(0.0 <= a <= 1.0 for a in alpha) and abs(math.fsum(alpha) - 1.0) < 1e-9


def _in_range(vector: Vector) -> bool:
    exponent, min_weight = vector
    return 0.0 <= exponent < math.inf and 0.0 <= min_weight <= 1.0
