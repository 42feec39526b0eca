"""α from what the classes cost: one model per `type`, chosen before the options are looked at.

L is the average raw nll of a class, in nats per token; K the number of classes; α⁰ the `alpha` of the YAML (uniform if absent),
where a controller starts from. `dwl_plugin/alpha/controllers.py` computes the updates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from dwl_plugin.config.validate import validate
from dwl_plugin.errors import ConfigError, Problem, did_you_mean
from dwl_plugin.extensions import model_of
from dwl_plugin.values import Position, Strict, Weight

__all__ = [
    "Controller",
    "ControllerOptions",
    "DWAController",
    "DoReMiController",
    "GroupDROController",
    "LossControllerOptions",
    "RLWController",
    "SoftAdaptController",
    "SoftmaxLossController",
    "controller_of",
    "controller_problems",
]


class ControllerOptions(Strict):
    """What every controller has; one of another package derives its options from this, or from `LossControllerOptions`."""

    type: str = Field(description="Which controller.")
    every: int = Field(10, ge=1, description="Optimizer steps in a window; α is updated at the end of each.")
    warmup: Position = Field(0, description="α stays at `alpha` until here: a step, `10%` of the run, or `1ep`.")
    min_alpha: Weight = Field(0.01, ge=0.0, lt=1.0, description="No class falls below: α is (1 − K·min_alpha)·α + min_alpha.")
    max_change: Weight | None = Field(
        None, gt=0.0, le=1.0, description="The most that the α of any class moves in one update. Absent: no limit."
    )


class LossControllerOptions(ControllerOptions):
    """What the controllers have that look at losses."""

    ema: Weight = Field(
        0.9, ge=0.0, lt=1.0, description="Share of the old average that a window keeps: L ← ema·L + (1 − ema)·mean."
    )
    signal: Literal["raw", "ratio_to_init", "excess_over_ref"] = Field(
        "raw", description="What is compared: L, L over its first value, or L minus `reference`."
    )
    reference: dict[str, Weight] | Literal["base"] | None = Field(
        None, description="class -> nll to compare with, or `base`: measured before the first step, without the adapter."
    )
    reference_rows: int = Field(256, ge=1, description="Rows of the training set that `reference: base` is measured on.")


class SoftmaxLossController(LossControllerOptions):
    """α ∝ α⁰·e^(L/temperature): arXiv 2412.14780."""

    type: Literal["softmax_loss"]
    temperature: Weight = Field(3.0, gt=0.0, description="Nats by which a loss must be larger to count e times as much.")


class DWAController(LossControllerOptions):
    """α ∝ α⁰·e^(w/temperature), w = L of the last window over L of the one before: arXiv 1803.10704, eq. 7 and 8."""

    type: Literal["dwa"]
    ema: Weight = Field(0.0, ge=0.0, lt=1.0, description="As everywhere; the windows are averages already.")
    signal: Literal["raw"] = Field("raw", description="The ratio of two losses has no unit: nothing else to choose.")
    reference: None = Field(None, description="Not used.")
    temperature: Weight = Field(2.0, gt=0.0, description="T: larger is more even.")


class SoftAdaptController(LossControllerOptions):
    """α ∝ α⁰·e^(beta·slope), slope = change of L since the window before: arXiv 1912.12355."""

    type: Literal["softadapt"]
    ema: Weight = Field(0.0, ge=0.0, lt=1.0, description="As everywhere; the windows are averages already.")
    beta: Weight = Field(0.1, description="β above 0 favours the class that learns slowest, below 0 the fastest.")
    normalized: bool = Field(False, description="Divide the slopes by the sum of their sizes.")
    loss_weighted: bool = Field(False, description="Multiply by L.")


class GroupDROController(LossControllerOptions):
    """α ← α·e^(eta·L), normalised: arXiv 1911.08731, algorithm 1."""

    type: Literal["group_dro"]
    eta: Weight = Field(0.01, gt=0.0, description="Step size of the exponentiated gradient.")


class DoReMiController(LossControllerOptions):
    """α ← α·e^(eta·max(L − reference, 0)), normalised, then (1 − smoothing)·α + smoothing/K: arXiv 2305.10429, algorithm 1."""

    type: Literal["doremi"]
    signal: Literal["excess_over_ref"] = Field("excess_over_ref", description="The excess is the method.")
    eta: Weight = Field(1.0, gt=0.0, description="Step size of the exponentiated gradient.")
    smoothing: Weight = Field(1e-4, ge=0.0, le=1.0, description="c, the share of the uniform vector in each update.")


class RLWController(ControllerOptions):
    """α ∝ α⁰·e^z, z fresh standard normal noise: arXiv 2111.10603. What a controller has to beat."""

    type: Literal["rlw"]
    every: int = Field(1, ge=1, description="Optimizer steps between two draws.")
    seed: int = Field(0, ge=0, description="Of the noise; a resumed run goes on with the same.")


_BUILT_IN: dict[str, type[ControllerOptions]] = {
    "softmax_loss": SoftmaxLossController,
    "dwa": DWAController,
    "softadapt": SoftAdaptController,
    "group_dro": GroupDROController,
    "doremi": DoReMiController,
    "rlw": RLWController,
}


def controller_of(spec: object, path: str, problems: list[Problem]) -> ControllerOptions | None:
    """The model of `spec`; what is wrong goes to `problems`."""
    if isinstance(spec, ControllerOptions):
        return spec
    try:
        model = model_of("controller", spec, _BUILT_IN, ControllerOptions, path)
    except ConfigError as error:
        problems += error.problems
        return None
    return validate(model, spec, path, problems)  # type: ignore[return-value]


def _revalidated(spec: object) -> object:
    """The host validates again what `parse` has accepted."""
    problems: list[Problem] = []
    model = controller_of(spec, "controller", problems)
    if problems:
        raise PydanticCustomError("dwl", "{why}", {"why": "; ".join(map(str, problems))})
    return model


Controller = Annotated[
    SerializeAsAny[
        SoftmaxLossController
        | DWAController
        | SoftAdaptController
        | GroupDROController
        | DoReMiController
        | RLWController
        | SkipJsonSchema[ControllerOptions]  # of another package
    ],
    BeforeValidator(_revalidated),
]


def controller_problems(options: ControllerOptions | None, path: str, alpha: object, names: Sequence[str]) -> Iterator[Problem]:
    """What no single option can see; `alpha` is the one of the YAML, as it was written, and `names` all classes."""
    if options is None:
        return
    yield from _floor_problems(options, path, alpha, names)
    if isinstance(options, LossControllerOptions):
        yield from _reference_problems(options, path, names)


def _floor_problems(options: ControllerOptions, path: str, alpha: object, names: Sequence[str]) -> Iterator[Problem]:
    floor = options.min_alpha
    if floor * len(names) > 1:
        yield Problem(
            f"{path}.min_alpha",
            f"{len(names)} classes cannot all have at least this much of 1",
            floor,
            allowed=f"at most {1 / len(names):.4g}",
        )
        return
    if not isinstance(alpha, Mapping) or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in alpha.values()):
        return  # reported elsewhere, or uniform
    total = sum(alpha.values())
    for name, value in alpha.items():
        if value == 0:
            yield Problem(
                f"dwl.alpha.{name}",
                f"the controller multiplies weights, so 0 stays 0 and {path} does nothing here",
                value,
                hint="give the class a small number",
            )
        elif total > 0 and value > 0 and value / total < floor * (1 - 1e-9):
            yield Problem(
                f"dwl.alpha.{name}",
                f"its share, {value / total:.4g}, is below `{path}.min_alpha`, {floor:g}",
                value,
                hint="raise this number, or lower `min_alpha`",
            )


def _reference_problems(options: LossControllerOptions, path: str, names: Sequence[str]) -> Iterator[Problem]:
    reference, wanted = options.reference, options.signal == "excess_over_ref"
    if wanted and reference is None:
        yield Problem(
            f"{path}.reference",
            "is required: the excess is over it",
            allowed="`base` (measured before the first step), or class -> nll",
        )
    if not wanted and reference is not None:
        yield Problem(
            f"{path}.reference",
            f"has no effect with `signal: {options.signal}`",
            reference,
            hint="write `signal: excess_over_ref`, or delete this line",
        )
    if isinstance(reference, Mapping):
        for name in reference:
            if name not in names:
                yield Problem(f"{path}.reference.{name}", "no such class", allowed=", ".join(names), hint=did_you_mean(name, names))
        missing = [name for name in names if name not in reference]
        if missing:
            yield Problem(f"{path}.reference", f"every class needs a number; missing: {', '.join(missing)}")
