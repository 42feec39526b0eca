"""Open loop: numbers as a pure function of the optimizer step, so a resumed run has those it would have had.

The numbers are α, a point on the simplex, or whatever else has a `schedule` beside it. Whole vectors are interpolated, never one
class apart from the others: (1−s)·v⁰ + s·v¹ of two points on the simplex is on the simplex. x is the elapsed share of the way from
one position to the next, 0 to 1; s(x) is how far the numbers have gone.

A schedule is a class, built once for a run, with the pydantic model of its options. A new one needs an entry in `SCHEDULES`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.errors import ConfigError, RunError
from dwl_plugin.extensions import ChosenByType, class_of
from dwl_plugin.values import Position, Strict, Weight, invalid, line_error, position

__all__ = [
    "SCHEDULES",
    "Curve",
    "Schedule",
    "ScheduleContext",
    "ScheduleOptions",
    "Vector",
    "curve_of",
    "required_vectors",
    "vectors",
]

_ZEROS = (0, "0%", "0ep")

PositionKey = Annotated[str, BeforeValidator(lambda value: str(position(value)))]
"""A position that names an entry of a mapping: always a string, since the host sorts the keys of a config it writes down."""
NamedNumbers = dict[str, Weight]
Vector = tuple[float, ...]
Curve = Callable[[int], Vector]
"""τ -> numbers."""


class ScheduleOptions(Strict):
    """Base of the options of every schedule, those of other packages too."""

    vector_keys: ClassVar[tuple[str, ...]] = ()
    """Options that hold a number for each class."""
    ascending_keys: ClassVar[tuple[str, ...]] = ()
    """Options that hold positions, each of which has to come after the one before."""

    type: str = Field(description="Which schedule.")

    @property
    def last_position(self) -> tuple[str, int | str] | None:
        """The option that says where the numbers come to rest, and its value; None where they never do."""
        return (self.ascending_keys[-1], getattr(self, self.ascending_keys[-1])) if self.ascending_keys else None

    @classmethod
    def vectors(cls, written: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """(option, numbers by name) of every vector in the options as a YAML has them."""
        yield from ((key, written[key]) for key in cls.vector_keys if key in written)

    @classmethod
    def cross_errors(cls, written: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        """Positions that come too early, as far as it can be known before the length of the run is."""
        given = [(key, written.get(key, cls.model_fields[key].default)) for key in cls.ascending_keys]
        for (before, first), (key, second) in pairwise(given):
            if _comes_too_early(second, first):
                hint = f"for a share of the run write `{key}: {second}%`" if isinstance(second, int) and 0 < second <= 100 else ""
                yield line_error((key,), f"must come after `{before}`, which is {first}", second, hint=hint)


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
        """Positions by the names of their options, each of which has to come after the one before."""
        steps = {option: self.step(value, option) for option, value in positions.items()}
        for before, option in pairwise(positions):
            end = self.length.total_steps
            if steps[option] <= steps[before] and end is not None and isinstance(positions[before], int) and steps[before] >= end:
                hint = f"a number alone is a step; for a share of the run write `{before}: {positions[before]}%`"
                why = f"is step {steps[before]:g}, and this run ends at step {end}"
                raise ConfigError.at(f"{self.path}.{before}", why, positions[before], hint=hint if steps[before] <= 100 else "")
            if steps[option] <= steps[before]:
                why = f"is step {steps[option]:g} of this run, and `{before}` is step {steps[before]:g}"
                raise ConfigError.at(f"{self.path}.{option}", why, positions[option])
        return list(steps.values())


_EASE: dict[str, Callable[[float], float]] = {
    "hold": lambda x: 0.0,
    "linear": lambda x: x,
    "cosine": lambda x: (1.0 - math.cos(math.pi * x)) / 2.0,
}


def _mix(first: Vector, last: Vector, s: float) -> Vector:
    return tuple((1.0 - s) * a + s * b for a, b in zip(first, last, strict=True))


class _Interpolated:
    """From knot to knot, s(x) = `ease` between two; the first vector before the first knot, the last one after the last."""

    def __init__(self, knots: Iterable[tuple[float, Vector]], ease: Callable[[float], float]) -> None:
        self._knots, self._ease = list(knots), ease
        self._steps = [step for step, _ in self._knots]

    def __call__(self, tau: int) -> Vector:
        at = bisect_right(self._steps, tau)
        if at in (0, len(self._steps)):
            return self._knots[max(at - 1, 0)][1]
        (before, first), (after, last) = self._knots[at - 1 : at + 1]
        return _mix(first, last, self._ease((tau - before) / (after - before)))


class Constant(_Interpolated):
    class Options(ScheduleOptions):
        """No movement: what leaving the schedule out gives, written down."""

        type: Literal["constant"]

    def __init__(self, options: Options, run: ScheduleContext) -> None:
        super().__init__([(0, run.first)], _EASE["hold"])


class _Ramp(_Interpolated):
    """From where the numbers are to `to`, between `start` and `end`."""

    class Options(ScheduleOptions):
        vector_keys: ClassVar[tuple[str, ...]] = ("to",)
        ascending_keys: ClassVar[tuple[str, ...]] = ("start", "end")

        to: NamedNumbers = Field(description="The numbers at the end; for α a proportion of every class, `rest` too.")
        start: Position = Field(0, description="Where the numbers begin to move: a step, `10%` of the run, or `2ep`.")
        end: Position = Field("100%", description="Where they arrive at `to`: a step, `90%` of the run, or `2ep`.")

    def __init__(self, options: Any, run: ScheduleContext) -> None:
        self.options = options
        start, end = run.steps(start=options.start, end=options.end)
        super().__init__([(start, run.first), (end, run.vector(options.to))], self.ease)

    def ease(self, x: float) -> float:
        return _EASE[self.options.type](x)


class Linear(_Ramp):
    class Options(_Ramp.Options):
        """s = x."""

        type: Literal["linear"]


class Cosine(_Ramp):
    class Options(_Ramp.Options):
        """s = (1 − cos πx) / 2: slow, fast, slow."""

        type: Literal["cosine"]


def _not_zero(value: float | int | str) -> float | int | str:
    if value in _ZEROS:
        raise invalid("cannot be 0")
    return value


class Exponential(_Ramp):
    class Options(_Ramp.Options):
        """s = (1 − e^(−rate·x)) / (1 − e^(−rate)): fast at first, then ever slower; a negative rate the other way round."""

        type: Literal["exponential"]
        rate: Annotated[Weight, AfterValidator(_not_zero)] = Field(
            5.0, ge=-50.0, le=50.0, description="How bent the curve is: the speed falls by e^rate from start to end. Not 0."
        )

    def ease(self, x: float) -> float:
        return math.expm1(-self.options.rate * x) / math.expm1(-self.options.rate)


class Sigmoid(_Ramp):
    """The logistic function is (1 + tanh(z/2)) / 2, which cannot overflow."""

    class Options(_Ramp.Options):
        """s = (σ(k(x − ½)) − σ(−k/2)) / (σ(k/2) − σ(−k/2)), k = `steepness`: a switch that takes its time."""

        type: Literal["sigmoid"]
        steepness: Weight = Field(10.0, gt=0.0, description="How sudden the middle is; towards 0 it becomes linear.")

    def ease(self, x: float) -> float:
        k = self.options.steepness
        return (math.tanh(k * (x - 0.5) / 2.0) / math.tanh(k / 4.0) + 1.0) / 2.0


class Step(_Interpolated):
    class Options(ScheduleOptions):
        """One jump: `to` from the position `at` on."""

        vector_keys: ClassVar[tuple[str, ...]] = ("to",)
        ascending_keys: ClassVar[tuple[str, ...]] = ("at",)

        type: Literal["step"]
        to: NamedNumbers = Field(description="The numbers from `at` on.")
        at: Position = Field(description="The jump: a step, `50%` of the run, or `2ep`.")

    def __init__(self, options: Options, run: ScheduleContext) -> None:
        super().__init__([(0, run.first), (run.step(options.at, "at"), run.vector(options.to))], _EASE["hold"])


class Keyframes(_Interpolated):
    class Options(ScheduleOptions):
        """From position to position. What the YAML gives outside the schedule is the keyframe of step 0; the last one stays."""

        type: Literal["keyframes"]
        at: dict[PositionKey, NamedNumbers] = Field(
            min_length=1, description='position -> numbers, in their order, e.g. `{"50%": {…}, "2ep": {…}, 900: {…}}`.'
        )
        interpolation: Literal["hold", "linear", "cosine"] = Field(
            "linear", description="Between two keyframes: hold (jump at each), linear, or cosine."
        )

        @property
        def last_position(self) -> tuple[str, int | str]:
            last = list(self.at)[-1]
            return f"at.{last}", last

        @classmethod
        def vectors(cls, written: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
            frames = written.get("at")
            yield from ((f"at.{where}", numbers) for where, numbers in frames.items()) if isinstance(frames, Mapping) else ()

        @classmethod
        def cross_errors(cls, written: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
            frames = list(written["at"]) if isinstance(written.get("at"), Mapping) else []
            for index, frame in enumerate(frames):
                at, later = ("at", str(frame)), next((other for other in frames[:index] if _comes_too_early(frame, other)), None)
                if later is not None:
                    yield line_error(at, f"must come after the keyframe {later}", frame)
                elif index == 0 and any(_comes_too_early(frame, zero) for zero in _ZEROS):
                    hint = "write them there, and begin with a later keyframe"
                    yield line_error(at, "the numbers of step 0 are those outside the schedule", frame, hint=hint)

        @field_validator("at", mode="before")
        @classmethod
        def _with_string_keys(cls, frames: object) -> object:
            """A key may be a number of YAML. That YAML reads `on` as a boolean is reported where any such key is."""
            if not isinstance(frames, Mapping):
                return frames
            return {str(key): numbers for key, numbers in frames.items() if not isinstance(key, bool)}

    def __init__(self, options: Options, run: ScheduleContext) -> None:
        steps = run.steps(start=0, **{f"at.{position}": position for position in options.at})
        super().__init__(zip(steps, [run.first, *map(run.vector, options.at.values())], strict=True), _EASE[options.interpolation])


class Warmup(_Interpolated):
    class Options(ScheduleOptions):
        """Up to `to`, hold it, and decay: warm-up, hold, decay, as learning rates have it."""

        vector_keys: ClassVar[tuple[str, ...]] = ("to", "final")
        ascending_keys: ClassVar[tuple[str, ...]] = ("start", "hold", "decay", "end")

        type: Literal["warmup"]
        to: NamedNumbers = Field(description="The numbers that are held.")
        final: NamedNumbers | None = Field(None, description="The numbers after the decay. Default: those of the beginning.")
        start: Position = Field(0, description="Where the numbers begin to move.")
        hold: Position = Field("10%", description="Where they arrive at `to`.")
        decay: Position = Field("90%", description="Where they leave `to`.")
        end: Position = Field("100%", description="Where they arrive at `final`.")
        interpolation: Literal["linear", "cosine"] = Field("linear", description="How they move on both ways.")

    def __init__(self, options: Options, run: ScheduleContext) -> None:
        steps = run.steps(start=options.start, hold=options.hold, decay=options.decay, end=options.end)
        top, final = run.vector(options.to), run.first if options.final is None else run.vector(options.final)
        super().__init__(zip(steps, (run.first, top, top, final), strict=True), _EASE[options.interpolation])


class Cyclic:
    class Options(ScheduleOptions):
        """To `to` and back, over and over; φ is the elapsed part of a period: s = 1 − |2φ − 1|, or (1 − cos 2πφ) / 2."""

        vector_keys: ClassVar[tuple[str, ...]] = ("to",)

        type: Literal["cyclic"]
        to: NamedNumbers = Field(description="The numbers half a period after each beginning.")
        period: Annotated[Position, AfterValidator(_not_zero)] = Field(
            description="How long one cycle takes: steps, `10%` of the run, or `0.5ep`."
        )
        start: Position = Field(0, description="Where the first cycle begins.")
        shape: Literal["triangular", "cosine"] = Field("triangular", description="Straight lines, or a cosine.")

    def __init__(self, options: Options, run: ScheduleContext) -> None:
        self._start, self._period = run.step(options.start, "start"), run.step(options.period, "period")
        self._first, self._to, self._shape = run.first, run.vector(options.to), options.shape

    def __call__(self, tau: int) -> Vector:
        phase = max(tau - self._start, 0.0) / self._period % 1.0
        s = 1.0 - abs(2.0 * phase - 1.0) if self._shape == "triangular" else (1.0 - math.cos(2.0 * math.pi * phase)) / 2.0
        return _mix(self._first, self._to, s)


SCHEDULES: dict[str, type[Any]] = {
    "constant": Constant,
    "linear": Linear,
    "cosine": Cosine,
    "exponential": Exponential,
    "sigmoid": Sigmoid,
    "step": Step,
    "keyframes": Keyframes,
    "warmup": Warmup,
    "cyclic": Cyclic,
}
"""By the `type` that a YAML has for it."""

Schedule = Annotated[ScheduleOptions, ChosenByType("schedule", SCHEDULES, ScheduleOptions)]


def curve_of(options: ScheduleOptions, run: ScheduleContext, check: Callable[[Vector], bool]) -> Curve:
    """The curve of a schedule. `check` is what each vector of another package's schedule has to pass.

    Raises `ConfigError` for positions that this run's length cannot place, and for those that turn out to be in the wrong order.
    """
    curve: Curve = class_of("schedule", options.type, SCHEDULES, ScheduleOptions, f"{run.path}.type")(options, run)
    if options.type in SCHEDULES:
        return curve

    def checked(tau: int) -> Vector:
        vector = tuple(float(number) for number in curve(tau))
        if len(vector) != len(run.first) or not check(vector):
            raise RunError(f"the schedule `{options.type}` gave {vector} at step {tau}, which cannot be used for {run.path}")
        return vector

    return checked


def vectors(written: object, path: str) -> Iterator[tuple[str, Any]]:
    """(path, numbers by name) of every vector in a schedule as a YAML has it, whatever else is wrong with it."""
    if not isinstance(written, Mapping):  # most configs have no schedule, and to ask every installed package takes long
        return
    try:
        model = class_of("schedule", written.get("type"), SCHEDULES, ScheduleOptions, path).Options
    except ConfigError:
        return
    yield from ((f"{path}.{option}", numbers) for option, numbers in model.vectors(written))


def required_vectors(written: object, path: str) -> Iterator[str]:
    """The paths of vectors that a schedule of a known type cannot do without, and that are not there."""
    kind = written.get("type") if isinstance(written, Mapping) else None
    if isinstance(written, Mapping) and isinstance(kind, str) and kind in SCHEDULES:
        model = SCHEDULES[kind].Options
        needed = (key for key in model.vector_keys if model.model_fields[key].is_required())
        yield from (f"{path}.{key}" for key in needed if written.get(key) is None)


def _comes_too_early(later: object, earlier: object) -> bool:
    """Whether that is known already: without the length of the run, only positions of one unit can be compared."""
    try:
        first, second = str(position(earlier)), str(position(later))
    except PydanticCustomError:  # reported where the position is validated
        return False
    of_one_unit = first.lstrip("0123456789.") == second.lstrip("0123456789.")
    return of_one_unit and float(second.rstrip("%ep")) <= float(first.rstrip("%ep"))
