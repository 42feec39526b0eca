"""Open loop: numbers as a pure function of τ, so a resumed run has those it would have had.

The numbers are α, a point on the simplex, or whatever else has a `schedule` beside it. Vectors are interpolated, never one class
apart from the others: (1−s)·v⁰ + s·v¹ of two points on the simplex is on the simplex.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import Block, ScheduleOptions
from dwl_plugin.errors import ConfigError, DWLError, Problem
from dwl_plugin.extensions import load

__all__ = ["Alpha", "Curve", "ScheduleContext", "Vector", "alpha_of", "curve_of"]

Vector = tuple[float, ...]
Curve = Callable[[int], Vector]
"""τ -> numbers."""

Alpha = Curve
"""τ -> α over `Block.class_names`, a point on the simplex."""

_Ease = Callable[[float], float]


@dataclass(frozen=True)
class ScheduleContext:
    """What a schedule has to know beside its options.

    `path` is its place in the YAML, `first` the numbers at τ = 0, `vector` turns numbers by name, as the YAML has them, into a
    vector in the order of `first` (proportions become a point on the simplex).
    """

    path: str
    length: RunLength
    first: Vector
    vector: Callable[[Mapping[str, float]], Vector]

    def step(self, position: int | str, option: str) -> float:
        """A position, which is the value of `option`, in optimizer steps."""
        return self.length.step(position, f"{self.path}.{option}")

    def steps(self, **positions: int | str) -> list[float]:
        """Positions by their options' names, each of which has to come after the one before."""
        return self._ascending(list(positions.items()))

    def _ascending(self, positions: Sequence[tuple[str, int | str]]) -> list[float]:
        steps = [self.step(position, option) for option, position in positions]
        for at, (option, position) in enumerate(positions[1:], start=1):
            if steps[at] <= steps[at - 1]:
                why = f"is step {steps[at]:g} of this run, and `{positions[at - 1][0]}` is step {steps[at - 1]:g}"
                raise ConfigError([Problem(f"{self.path}.{option}", why, position)])
        return steps


def alpha_of(block: Block, length: RunLength) -> Alpha:
    """α(τ): from `alpha` along the schedule; constant without one.

    Raises `ConfigError` for positions that this run's length cannot place, and for those that turn out to be in the wrong order.
    """
    if block.schedule is None:
        first = block.alpha
        return lambda tau: first
    context = ScheduleContext("dwl.schedule", length, block.alpha, block.on_simplex)
    return curve_of(block.schedule, context, _on_simplex)


def curve_of(options: ScheduleOptions, context: ScheduleContext, check: Callable[[Vector], bool]) -> Curve:
    """The curve of a schedule's options. `check` is what each vector of another package's schedule has to pass."""
    if options.type in _CURVES:
        return _CURVES[options.type](options, context)
    curve = load("schedule", options.type, ScheduleOptions, f"{context.path}.type")(options, context)

    def checked(tau: int) -> Vector:
        vector = tuple(float(number) for number in curve(tau))
        if len(vector) != len(context.first) or not check(vector):
            raise DWLError(
                f"[dwl] the schedule `{options.type}` gave {vector} at step {tau}, which cannot be used for {context.path}"
            )
        return vector

    return checked


def _on_simplex(alpha: Vector) -> bool:
    return all(0.0 <= a <= 1.0 for a in alpha) and abs(math.fsum(alpha) - 1.0) < 1e-9


# One function per `type`; `dwl_plugin/config/schedules.py` has the formulas.


def _constant(options: Any, context: ScheduleContext) -> Curve:
    return lambda tau: context.first


def _ramp(ease: Callable[[Any], _Ease]) -> Callable[[Any, ScheduleContext], Curve]:
    def curve(options: Any, context: ScheduleContext) -> Curve:
        start, end = context.steps(start=options.start, end=options.end)
        return _through([(start, context.first), (end, context.vector(options.to))], ease(options))

    return curve


def _step(options: Any, context: ScheduleContext) -> Curve:
    at, to = context.step(options.at, "at"), context.vector(options.to)
    return lambda tau: to if tau >= at else context.first


def _keyframes(options: Any, context: ScheduleContext) -> Curve:
    frames = list(options.at.items())
    steps = context._ascending([("start", 0), *((f"at.{position}", position) for position, _ in frames)])
    values = [context.first, *(context.vector(numbers) for _, numbers in frames)]
    return _through(list(zip(steps, values, strict=True)), _EASE[options.interpolation])


def _warmup(options: Any, context: ScheduleContext) -> Curve:
    positions = context.steps(start=options.start, hold=options.hold, decay=options.decay, end=options.end)
    top = context.vector(options.to)
    final = context.first if options.final is None else context.vector(options.final)
    return _through(list(zip(positions, (context.first, top, top, final), strict=True)), _EASE[options.interpolation])


def _cyclic(options: Any, context: ScheduleContext) -> Curve:
    start, period = context.step(options.start, "start"), context.step(options.period, "period")
    to = context.vector(options.to)

    def curve(tau: int) -> Vector:
        phase = max(tau - start, 0.0) / period % 1.0
        s = 1.0 - abs(2.0 * phase - 1.0) if options.shape == "triangular" else (1.0 - math.cos(2.0 * math.pi * phase)) / 2.0
        return _mix(context.first, to, s)

    return curve


def _hold(x: float) -> float:
    return 0.0


def _linear(x: float) -> float:
    return x


def _cosine(x: float) -> float:
    return (1.0 - math.cos(math.pi * x)) / 2.0


def _exponential(options: Any) -> _Ease:
    return lambda x: math.expm1(-options.rate * x) / math.expm1(-options.rate)


def _sigmoid(options: Any) -> _Ease:
    """The logistic function is (1 + tanh(z/2)) / 2, which cannot overflow."""
    k = options.steepness
    return lambda x: (math.tanh(k * (x - 0.5) / 2.0) / math.tanh(k / 4.0) + 1.0) / 2.0


_EASE: dict[str, _Ease] = {"hold": _hold, "linear": _linear, "cosine": _cosine}

_CURVES: dict[str, Callable[[Any, ScheduleContext], Curve]] = {
    "constant": _constant,
    "linear": _ramp(lambda options: _linear),
    "cosine": _ramp(lambda options: _cosine),
    "exponential": _ramp(_exponential),
    "sigmoid": _ramp(_sigmoid),
    "step": _step,
    "keyframes": _keyframes,
    "warmup": _warmup,
    "cyclic": _cyclic,
}


def _through(knots: Sequence[tuple[float, Vector]], ease: _Ease) -> Curve:
    """From knot to knot, `ease` between two; the first vector before the first knot, the last one after the last."""
    steps, vectors = [step for step, _ in knots], [vector for _, vector in knots]

    def curve(tau: int) -> Vector:
        at = bisect_right(steps, tau)
        if at in (0, len(steps)):
            return vectors[max(at - 1, 0)]
        x = (tau - steps[at - 1]) / (steps[at] - steps[at - 1])
        return _mix(vectors[at - 1], vectors[at], ease(x))

    return curve


def _mix(first: Vector, last: Vector, s: float) -> Vector:
    return tuple((1.0 - s) * a + s * b for a, b in zip(first, last, strict=True))
