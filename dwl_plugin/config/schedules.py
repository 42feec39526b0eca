"""Numbers as functions of the optimizer step: one model per `type`, chosen before the options are looked at.

x is the elapsed share of the way from one position to the next, 0 to 1; s(x) is how far the numbers have gone from the first
vector v⁰ to the second v¹: v(τ) = (1−s)·v⁰ + s·v¹. `dwl_plugin/alpha/schedule.py` computes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, SerializeAsAny
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from dwl_plugin.config.validate import validate
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.extensions import model_of
from dwl_plugin.values import Position, PositionKey, Strict, Weight, position

__all__ = [
    "ConstantSchedule",
    "CosineSchedule",
    "CyclicSchedule",
    "ExponentialSchedule",
    "KeyframesSchedule",
    "LinearSchedule",
    "Schedule",
    "ScheduleOptions",
    "SigmoidSchedule",
    "StepSchedule",
    "WarmupSchedule",
    "order_problems",
    "schedule_of",
    "vectors",
]

Vector = dict[str, Weight]


def _not_zero(value: float | int | str) -> float | int | str:
    if value in (0, "0%", "0ep"):
        raise PydanticCustomError("dwl", "cannot be 0")
    return value


class ScheduleOptions(Strict):
    """What every schedule has; that of another package derives its options from this."""

    vector_keys: ClassVar[tuple[str, ...]] = ()
    """Options that hold a number for each class."""
    ascending_keys: ClassVar[tuple[str, ...]] = ()
    """Options that hold positions, each of which has to come after the one before."""

    type: str = Field(description="Which schedule.")

    @property
    def last_position(self) -> tuple[str, int | str] | None:
        """The option that says where the numbers come to rest, and its value; None where they never do."""
        return (self.ascending_keys[-1], getattr(self, self.ascending_keys[-1])) if self.ascending_keys else None


class ConstantSchedule(ScheduleOptions):
    """No movement: what leaving the schedule out gives, written down."""

    type: Literal["constant"]


class _Ramp(ScheduleOptions):
    """From where the numbers are to `to`, between `start` and `end`."""

    vector_keys: ClassVar[tuple[str, ...]] = ("to",)
    ascending_keys: ClassVar[tuple[str, ...]] = ("start", "end")

    to: Vector = Field(description="The numbers at the end; for α a proportion of every class, `rest` too.")
    start: Position = Field(0, description="Where the numbers begin to move: a step, `10%` of the run, or `2ep`.")
    end: Position = Field("100%", description="Where they arrive at `to`: a step, `90%` of the run, or `2ep`.")


class LinearSchedule(_Ramp):
    """s = x."""

    type: Literal["linear"]


class CosineSchedule(_Ramp):
    """s = (1 − cos πx) / 2: slow, fast, slow."""

    type: Literal["cosine"]


class ExponentialSchedule(_Ramp):
    """s = (1 − e^(−rate·x)) / (1 − e^(−rate)): fast at first, then ever slower; a negative rate the other way round."""

    type: Literal["exponential"]
    rate: Annotated[Weight, AfterValidator(_not_zero)] = Field(
        5.0, ge=-50.0, le=50.0, description="How bent the curve is: the speed falls by e^rate from start to end. Not 0."
    )


class SigmoidSchedule(_Ramp):
    """s = (σ(k(x − ½)) − σ(−k/2)) / (σ(k/2) − σ(−k/2)), k = `steepness`: a switch that takes its time."""

    type: Literal["sigmoid"]
    steepness: Weight = Field(10.0, gt=0.0, description="How sudden the middle is; towards 0 it becomes linear.")


class StepSchedule(ScheduleOptions):
    """One jump: `to` from the position `at` on."""

    vector_keys: ClassVar[tuple[str, ...]] = ("to",)
    ascending_keys: ClassVar[tuple[str, ...]] = ("at",)

    type: Literal["step"]
    to: Vector = Field(description="The numbers from `at` on.")
    at: Position = Field(description="The jump: a step, `50%` of the run, or `2ep`.")


class KeyframesSchedule(ScheduleOptions):
    """From position to position. What the YAML gives outside the schedule is the keyframe of step 0; the last one stays."""

    type: Literal["keyframes"]
    at: dict[PositionKey, Vector] = Field(
        min_length=1, description='position -> numbers, in their order, e.g. {"50%": {...}, "2ep": {...}, 200: {...}}.'
    )
    interpolation: Literal["hold", "linear", "cosine"] = Field(
        "linear", description="Between two keyframes: hold (jump at each), linear, or cosine."
    )

    @property
    def last_position(self) -> tuple[str, int | str]:
        last = list(self.at)[-1]
        return f"at.{last}", last


class WarmupSchedule(ScheduleOptions):
    """Up to `to`, hold it, and decay: warm-up, hold, decay, as learning rates have it."""

    vector_keys: ClassVar[tuple[str, ...]] = ("to", "final")
    ascending_keys: ClassVar[tuple[str, ...]] = ("start", "hold", "decay", "end")

    type: Literal["warmup"]
    to: Vector = Field(description="The numbers that are held.")
    final: Vector | None = Field(None, description="The numbers after the decay. Default: those of the beginning.")
    start: Position = Field(0, description="Where the numbers begin to move.")
    hold: Position = Field("10%", description="Where they arrive at `to`.")
    decay: Position = Field("90%", description="Where they leave `to`.")
    end: Position = Field("100%", description="Where they arrive at `final`.")
    interpolation: Literal["linear", "cosine"] = Field("linear", description="How they move on both ways.")


class CyclicSchedule(ScheduleOptions):
    """To `to` and back, over and over; φ is the elapsed part of a period: s = 1 − |2φ − 1|, or (1 − cos 2πφ) / 2."""

    vector_keys: ClassVar[tuple[str, ...]] = ("to",)

    type: Literal["cyclic"]
    to: Vector = Field(description="The numbers half a period after each beginning.")
    period: Annotated[Position, AfterValidator(_not_zero)] = Field(
        description="How long one cycle takes: steps, `10%` of the run, or `0.5ep`."
    )
    start: Position = Field(0, description="Where the first cycle begins.")
    shape: Literal["triangular", "cosine"] = Field("triangular", description="Straight lines, or a cosine.")


_BUILT_IN: dict[str, type[ScheduleOptions]] = {
    "constant": ConstantSchedule,
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "exponential": ExponentialSchedule,
    "sigmoid": SigmoidSchedule,
    "step": StepSchedule,
    "keyframes": KeyframesSchedule,
    "warmup": WarmupSchedule,
    "cyclic": CyclicSchedule,
}


def schedule_of(spec: object, path: str, problems: list[Problem]) -> ScheduleOptions | None:
    """The model of `spec`; what is wrong goes to `problems`."""
    if isinstance(spec, ScheduleOptions):
        return spec
    try:
        model = model_of("schedule", spec, _BUILT_IN, ScheduleOptions, path)
    except ConfigError as error:
        problems += error.problems
        return None
    return validate(model, _with_string_keys(spec), path, problems)  # type: ignore[return-value]


def _with_string_keys(spec: object) -> object:
    """A keyframe may be written as a number. A boolean among the keys is reported where the other traps of YAML are."""
    if not (isinstance(spec, Mapping) and isinstance(spec.get("at"), Mapping)):
        return spec
    return {**spec, "at": {str(key): value for key, value in spec["at"].items() if not isinstance(key, bool)}}


def _chosen(spec: object) -> object:
    """The host validates again what `parse` has accepted, and models may be built without it."""
    if isinstance(spec, ScheduleOptions):
        return spec
    try:
        model = model_of("schedule", spec, _BUILT_IN, ScheduleOptions, "")
    except ConfigError as error:
        raise PydanticCustomError("dwl", "{why}", {"why": str(error.problems[0]).removeprefix(".")}) from None
    return model.model_validate(_with_string_keys(spec))


Schedule = Annotated[
    SerializeAsAny[
        ConstantSchedule
        | LinearSchedule
        | CosineSchedule
        | ExponentialSchedule
        | SigmoidSchedule
        | StepSchedule
        | KeyframesSchedule
        | WarmupSchedule
        | CyclicSchedule
        | SkipJsonSchema[ScheduleOptions]  # of another package
    ],
    BeforeValidator(_chosen),
]


def vectors(spec: object, path: str) -> Iterator[tuple[str, Any]]:
    """(path, numbers) of every vector in a schedule as it was written, whatever else is wrong with it."""
    model = _model_if_known(spec, path)
    if model is None or not isinstance(spec, Mapping):
        return
    for key in model.vector_keys:
        if key in spec:
            yield f"{path}.{key}", spec[key]
    if model is KeyframesSchedule and isinstance(spec.get("at"), Mapping):
        yield from ((f"{path}.at.{where}", numbers) for where, numbers in spec["at"].items())


def order_problems(spec: object, path: str) -> Iterator[Problem]:
    """Positions that come too early, as far as it can be known before the length of the run is."""
    model = _model_if_known(spec, path)
    if model is None or not isinstance(spec, Mapping):
        return
    given = [(key, spec.get(key, model.model_fields[key].default)) for key in model.ascending_keys]
    for (before, first), (key, second) in pairwise(given):
        if _is_known_to_come_after(first, second) is False:
            yield Problem(f"{path}.{key}", f"must come after `{before}`, which is {first}", second)
    if model is KeyframesSchedule and isinstance(spec.get("at"), Mapping):
        frames = list(spec["at"])
        if frames and (_number_and_unit(frames[0]) or (1.0,))[0] == 0.0:
            yield Problem(
                f"{path}.at.{frames[0]}",
                "the numbers of step 0 are those outside the schedule",
                frames[0],
                hint="write them there, and begin with a later keyframe",
            )
        for at, frame in enumerate(frames):
            later = next((other for other in frames[:at] if _is_known_to_come_after(other, frame) is False), None)
            if later is not None:
                yield Problem(f"{path}.at.{frame}", f"must come after the keyframe {later}", frame)


def _model_if_known(spec: object, path: str) -> type[ScheduleOptions] | None:
    if not isinstance(spec, Mapping):  # most configs have no schedule, and to ask every installed package takes long
        return None
    try:
        return model_of("schedule", spec, _BUILT_IN, ScheduleOptions, path)  # type: ignore[return-value]
    except ConfigError:
        return None


def _is_known_to_come_after(first: object, second: object) -> bool | None:
    """None where the two cannot be compared: only positions of one unit can, before the length of the run is known."""
    earlier, later = _number_and_unit(first), _number_and_unit(second)
    return None if earlier is None or later is None or earlier[1] != later[1] else later[0] > earlier[0]


def _number_and_unit(value: object) -> tuple[float, str] | None:
    try:
        text = str(position(value))
    except PydanticCustomError:
        return None
    number = text.rstrip("%ep")
    return float(number), text[len(number) :]
