"""Closed loop: α from the raw nll of each class, which no α enters.

The nll of a window of optimizer steps is summed over its micro-batches and ranks and divided once by the tokens; a rule turns the
running averages into log-weights; a floor and a limit on the change turn these into α. Everything is fp64 on the CPU and the same
on every rank, because the sums are.

A rule is a class, built once for a run, with the pydantic model of its options. A new one needs an entry in `CONTROLLERS`.

L is the average raw nll of a class, in nats per token; α⁰ the `alpha` of the YAML (uniform if absent), where a controller starts
from. Shapes: C classes in the order of the class ids.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, JsonValue, create_model
from pydantic_core import ValidationError

from dwl_plugin.alpha.controller_state import ControllerState, LogWeights, Nothing
from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.errors import ConfigError, Problem, RunError
from dwl_plugin.extensions import ChosenByType, class_of
from dwl_plugin.values import Position, Share, Strict, Weight, line_error, missing_or_unknown

__all__ = ["CONTROLLERS", "Controller", "ControllerConfig", "ControllerOptions", "LossControllerOptions", "controller_problems"]

PATH = "dwl.controller"

Numbers = NDArray[np.float64]

_TINY = float(np.finfo(np.float64).tiny)

Remembered = dict[str, Any]
"""What a rule wants to know again at the next update: plain numbers, strings, lists and dicts, kept in the checkpoint."""


@dataclass(frozen=True)
class Window:
    """What a rule is told at an update.

    `loss_C` is the average raw nll, in nats per token; `signal_C` what the option `signal` makes of it, `previous_C` the same at
    the window before (None at the first). A class that no token has belonged to yet has the mean of the others. `prior_C` is
    log α⁰; `update` counts from 0.
    """

    update: int
    loss_C: Numbers
    signal_C: Numbers
    previous_C: Numbers | None
    prior_C: Numbers


class ControllerOptions(Strict):
    """Base of the options of every controller, those of other packages too."""

    type: str = Field(description="Which controller.")
    every: int = Field(10, ge=1, description="Optimizer steps in a window; α is updated at the end of each.")
    warmup: Position = Field(0, description="α stays at `alpha` until here: a step, `10%` of the run, or `1ep`.")
    min_alpha: Weight = Field(0.01, ge=0.0, lt=1.0, description="No class falls below: α is (1 − K·min_alpha)·α + min_alpha.")
    max_change: Share | None = Field(None, description="The most that any α moves in an update. Absent: no limit.")


class LossControllerOptions(ControllerOptions):
    """Base of the options of controllers that look at losses."""

    ema: Weight = Field(0.9, ge=0.0, lt=1.0, description="What a window keeps of the old average: L ← ema·L + (1 − ema)·mean.")
    signal: Literal["raw", "ratio_to_init", "excess_over_ref"] = Field(
        "raw", description="What is compared: L, L over its first value, or L minus `reference`."
    )
    reference: dict[str, Weight] | Literal["base"] | None = Field(
        None, description="class -> nll to compare with, or `base`: measured before the first step, without the adapter."
    )
    reference_rows: int = Field(256, ge=1, description="Rows of the training set that `reference: base` is measured on.")


class _Rule:
    """Called at the end of a window, gives log-weights (C,); what they sum to does not matter."""

    Memory: type[BaseModel] = Nothing
    """What it keeps from its first update on; validated with the names of the classes as `classes` in the context."""

    def __init__(self, options: ControllerOptions) -> None:
        self.options = options


class SoftmaxLoss(_Rule):
    class Options(LossControllerOptions):
        """α ∝ α⁰·e^(L/temperature): arXiv 2412.14780."""

        type: Literal["softmax_loss"]
        temperature: Weight = Field(3.0, gt=0.0, description="Nats by which a loss must be larger to count e times as much.")

    options: Options

    def __call__(self, window: Window, memory: Remembered) -> Numbers:
        return window.prior_C + window.signal_C / self.options.temperature


class DWA(_Rule):
    class Options(LossControllerOptions):
        """α ∝ α⁰·e^(w/temperature), w = L of the last window over L of the one before: arXiv 1803.10704, eq. 7 and 8."""

        type: Literal["dwa"]
        ema: Weight = Field(0.0, ge=0.0, lt=1.0, description="As elsewhere; 0, since the windows are averages already.")
        signal: Literal["raw"] = Field("raw", description="The ratio of two losses has no unit: nothing else to choose.")
        reference: None = Field(None, description="Not used.")
        temperature: Weight = Field(2.0, gt=0.0, description="T: larger is more even.")

    options: Options

    def __call__(self, window: Window, memory: Remembered) -> Numbers:
        if window.previous_C is None:  # two windows are needed; until then w = 1 for all
            return window.prior_C
        ratio_C: Numbers = window.signal_C / np.maximum(window.previous_C, _TINY)
        return window.prior_C + ratio_C / self.options.temperature


class SoftAdapt(_Rule):
    class Options(LossControllerOptions):
        """α ∝ α⁰·e^(beta·slope), slope = change of L since the window before: arXiv 1912.12355."""

        type: Literal["softadapt"]
        ema: Weight = Field(0.0, ge=0.0, lt=1.0, description="As elsewhere; 0, since the windows are averages already.")
        beta: Weight = Field(0.1, description="β above 0 favours the class that learns slowest, below 0 the fastest.")
        normalized: bool = Field(False, description="Divide the slopes by the sum of their sizes.")
        loss_weighted: bool = Field(False, description="Multiply by L.")

    options: Options

    def __call__(self, window: Window, memory: Remembered) -> Numbers:
        if window.previous_C is None:
            return window.prior_C
        slope_C = window.signal_C - window.previous_C
        if self.options.normalized:
            slope_C = slope_C / (np.abs(slope_C).sum() + 1e-8)
        weights_C: Numbers = window.prior_C + self.options.beta * slope_C
        if self.options.loss_weighted:
            weights_C = weights_C + np.log(np.maximum(window.loss_C, _TINY))
        return weights_C


class GroupDRO(_Rule):
    class Options(LossControllerOptions):
        """α ← α·e^(eta·L), normalised: arXiv 1911.08731, algorithm 1."""

        type: Literal["group_dro"]
        eta: Weight = Field(0.01, gt=0.0, description="Step size of the exponentiated gradient.")

    Memory = LogWeights
    options: Options

    def __call__(self, window: Window, memory: Remembered) -> Numbers:
        before_C = np.array(memory.get("log_weights", window.prior_C))
        weights_C = _normalised(before_C + self.options.eta * window.signal_C)
        memory["log_weights"] = weights_C.tolist()
        return weights_C


class DoReMi(_Rule):
    class Options(LossControllerOptions):
        """α ← α·e^(eta·max(L − reference, 0)), normalised, then (1 − smoothing)·α + smoothing/K: arXiv 2305.10429, algorithm 1."""

        type: Literal["doremi"]
        signal: Literal["excess_over_ref"] = Field("excess_over_ref", description="The excess is the method.")
        eta: Weight = Field(1.0, gt=0.0, description="Step size of the exponentiated gradient.")
        smoothing: Weight = Field(1e-4, ge=0.0, le=1.0, description="c, the share of the uniform vector in each update.")

    Memory = LogWeights
    options: Options

    def __call__(self, window: Window, memory: Remembered) -> Numbers:
        before_C = np.array(memory.get("log_weights", window.prior_C))
        alpha_C = np.exp(_normalised(before_C + self.options.eta * np.maximum(window.signal_C, 0.0)))
        smoothing = self.options.smoothing
        with np.errstate(divide="ignore"):  # without smoothing a weight may come to nothing
            weights_C: Numbers = np.log((1.0 - smoothing) * alpha_C + smoothing / len(alpha_C))
        memory["log_weights"] = weights_C.tolist()
        return weights_C


class RLW(_Rule):
    class Options(ControllerOptions):
        """α ∝ α⁰·e^z, z fresh standard normal noise: arXiv 2111.10603. What a controller has to beat."""

        type: Literal["rlw"]
        every: int = Field(1, ge=1, description="Optimizer steps between two draws.")
        seed: int = Field(0, ge=0, description="Of the noise; a resumed run goes on with the same.")

    options: Options

    def __call__(self, window: Window, memory: Remembered) -> Numbers:
        noise = np.random.default_rng([self.options.seed, window.update])
        return window.prior_C + noise.standard_normal(len(window.prior_C))


CONTROLLERS: dict[str, type[Any]] = {
    "softmax_loss": SoftmaxLoss,
    "dwa": DWA,
    "softadapt": SoftAdapt,
    "group_dro": GroupDRO,
    "doremi": DoReMi,
    "rlw": RLW,
}
"""By the `type` that a YAML has for it."""

ControllerConfig = Annotated[ControllerOptions, ChosenByType("controller", CONTROLLERS, ControllerOptions)]


def controller_problems(options: ControllerOptions | None, alpha: object, names: Sequence[str]) -> Iterator[Problem]:
    """What no single option can see; `alpha` is the one of the YAML, as it was written, and `names` all classes."""
    if options is None:
        return
    if isinstance(options, LossControllerOptions):
        yield from _reference_problems(options, f"{PATH}.reference", names)
    floor = options.min_alpha
    if floor * len(names) > 1:
        why = f"{len(names)} classes cannot all have at least this much of 1"
        yield Problem(f"{PATH}.min_alpha", why, floor, allowed=f"at most {1 / len(names):.4g}")
        return
    if not isinstance(alpha, Mapping) or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in alpha.values()):
        return  # reported elsewhere, or uniform
    total = sum(alpha.values())
    for name, value in alpha.items():
        if value == 0:
            why = f"the controller multiplies weights, so 0 stays 0 and {PATH} does nothing here"
            yield Problem(f"dwl.alpha.{name}", why, value, hint="give the class a small number")
        elif total > 0 and value > 0 and value / total < floor * (1 - 1e-9):
            why = f"its share, {value / total:.4g}, is below `{PATH}.min_alpha`, {floor:g}"
            yield Problem(f"dwl.alpha.{name}", why, value, hint="raise this number, or lower `min_alpha`")


def _reference_problems(options: LossControllerOptions, path: str, names: Sequence[str]) -> Iterator[Problem]:
    reference, wanted = options.reference, options.signal == "excess_over_ref"
    if wanted and reference is None:
        allowed = "`base` (measured before the first step), or class -> nll"
        yield Problem(path, "is required: the excess is over it", allowed=allowed)
    if not wanted and reference is not None:
        why, hint = f"has no effect with `signal: {options.signal}`", "write `signal: excess_over_ref`, or delete this line"
        yield Problem(path, why, reference, hint=hint)
    if isinstance(reference, Mapping):
        yield from missing_or_unknown(path, reference, names)


class Controller:
    """α over the windows of a run. `alpha` is the current one, `signal` what it was last updated from (None: nothing yet).

    `first` is α⁰ over the classes `names`; the length of the run is for the warm-up.
    """

    def __init__(self, options: ControllerOptions, names: Sequence[str], first: Sequence[float], length: RunLength) -> None:
        self.options, self.names, self.alpha = options, tuple(names), tuple(first)
        self.signal: tuple[float, ...] | None = None
        self._warmup = length.step(options.warmup, f"{PATH}.warmup")
        self._prior_C = np.log(np.array(self.alpha))
        self._rule = class_of("controller", options.type, CONTROLLERS, ControllerOptions, f"{PATH}.type")(options)
        self._updates, self._memory = 0, Remembered()
        unseen_C = np.full(len(self.names), np.nan)
        self._average_C, self._first_C, self._previous_C = unseen_C, unseen_C, unseen_C
        no_losses = LossControllerOptions.model_validate({"type": options.type, "ema": 0.0})
        self._losses = options if isinstance(options, LossControllerOptions) else no_losses
        self._reference_C: Numbers | None = None
        if isinstance(self._losses.reference, Mapping):
            self._reference_C = np.array([self._losses.reference[name] for name in self.names])

    @property
    def rows_to_measure(self) -> int:
        """How many rows the reference still has to be measured on, by `compare_with`; 0: none."""
        return self._losses.reference_rows if self._losses.reference == "base" and self._reference_C is None else 0

    def compare_with(self, nll: Mapping[str, float]) -> None:
        """`reference: base`, measured. Raises `ConfigError` for a class that has no number or an infinite one."""
        missing = [name for name in self.names if name not in nll]
        if missing:
            why = f"no token of {', '.join(missing)} was in the rows that the base model was measured on"
            raise ConfigError.at(f"{PATH}.reference", why, "base", hint="raise `reference_rows`, or write the numbers")
        reference_C = np.array([nll[name] for name in self.names])
        if not np.isfinite(reference_C).all():
            raise ConfigError.at(f"{PATH}.reference", "the loss of the base model is infinite or NaN", dict(nll))
        self._reference_C = reference_C

    def is_due(self, steps: int) -> bool:
        """Whether a window ends when `steps` optimizer steps are done."""
        return steps % self.options.every == 0

    def update(self, steps: int, nll: Sequence[float], tokens: Sequence[float]) -> None:
        """A window ended with step number `steps`: Σ nll and the number of tokens in it, by class, over all ranks.

        A class without tokens keeps its average. α moves when the warm-up is over and any class has been seen.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            mean_C = np.array(nll, dtype=np.float64) / np.array(tokens, dtype=np.float64)
        seen_C = np.isfinite(mean_C)
        ema, before_C = self._losses.ema, self._average_C
        smooth_C = np.where(np.isnan(before_C), mean_C, ema * before_C + (1.0 - ema) * mean_C)
        self._average_C = np.where(seen_C, smooth_C, before_C)
        self._first_C = np.where(np.isnan(self._first_C), self._average_C, self._first_C)
        self._previous_C = before_C
        if np.isnan(self._average_C).all():
            return
        window = self._window()
        self.signal = tuple(window.signal_C.tolist())
        if steps < self._warmup:
            return
        self.alpha = self._limited(self._floored(_normalised(self._log_weights(window))))
        self._updates += 1

    def state(self) -> dict[str, Any]:
        """Plain values; `load` of them goes on as if nothing had happened."""
        return {
            "type": self.options.type,
            "options": self.options.model_dump(mode="json"),
            "classes": list(self.names),
            "alpha": list(self.alpha),
            "signal": None if self.signal is None else list(self.signal),
            "updates": self._updates,
            "memory": copy.deepcopy(self._memory),
            "average": _plain(self._average_C),
            "first": _plain(self._first_C),
            "previous": _plain(self._previous_C),
            "reference": None if self._reference_C is None else _plain(self._reference_C),
        }

    def load(self, saved: Mapping[str, Any] | ControllerState) -> None:
        """Other options than the state's hold from here on, the floor at once.

        Raises `ConfigError` if the state is of another controller or other classes, or if its numbers would mean something else;
        pydantic's `ValidationError`, with the fields, for what `state` cannot have given.
        """
        state = ControllerState.model_validate(saved)
        theirs, mine = (state.type, state.classes), (self.options.type, list(self.names))
        if theirs != mine:
            was, now = (f"`{kind}` over {', '.join(classes)}" for kind, classes in (theirs, mine))
            why = f"the checkpoint was written by {was}; this is {now}"
            raise ConfigError.at(PATH, why, hint="resume with the config of the checkpoint, or start a new run")
        before, memory = self._rules_own(state)
        again = "resume with the value of the checkpoint, or start a new run"
        (signal, reference), (our_signal, our_reference) = (
            [getattr(options, key, None) for key in ("signal", "reference")] for options in (before, self.options)
        )
        if signal != our_signal:
            why = f"the checkpoint's controller has learned from `signal: {signal}`"
            raise ConfigError.at(f"{PATH}.signal", why, our_signal, hint=again)
        if our_reference == "base" != reference:
            why = "can only be measured before the first step, and the checkpoint's run did not"
            raise ConfigError.at(f"{PATH}.reference", why, "base", hint=again)
        self.alpha = tuple(state.alpha)
        if min(self.alpha) < self.options.min_alpha:
            with np.errstate(divide="ignore"):
                self.alpha = tuple(self._floored(np.log(np.array(self.alpha))).tolist())
        self.signal = None if state.signal is None else tuple(state.signal)
        self._updates, self._memory = state.updates, memory
        self._average_C, self._first_C, self._previous_C = map(_numbers, (state.average, state.first, state.previous))
        if self.rows_to_measure and state.reference is not None:
            self._reference_C = _numbers(state.reference)

    def _rules_own(self, state: ControllerState) -> tuple[ControllerOptions, Remembered]:
        """Options and memory of a state of this rule. Options that this version does not have are left out."""
        kept: Any = getattr(self._rule, "Memory", dict[str, JsonValue]) if state.updates else Nothing
        parts = create_model("ControllerState", __base__=Strict, options=(type(self.options), ...), memory=(kept, ...))
        fields = type(self.options).model_fields.items()
        known = {field.alias or name: state.options[name] for name, field in fields if name in state.options}
        read: Any = parts.model_validate({"options": known, "memory": state.memory}, context={"classes": state.classes})
        options: ControllerOptions = read.options
        if min(state.alpha) < options.min_alpha * (1.0 - 1e-9):
            wrong = line_error(["alpha"], f"a class is below the `min_alpha` of its run, {options.min_alpha:g}", state.alpha)
        elif (state.reference is not None) != (isinstance(options, LossControllerOptions) and options.reference is not None):
            wrong = line_error(["reference"], "is there if the options have one", state.reference)
        else:
            return options, state.memory
        raise ValidationError.from_exception_data("ControllerState", [wrong])

    def _window(self) -> Window:
        previous_C = None
        if not np.isnan(self._previous_C).all():
            before_C = np.where(np.isnan(self._previous_C), self._average_C, self._previous_C)  # newly seen: no change
            previous_C = _filled(self._signal_of(before_C))
        signal_C = _filled(self._signal_of(self._average_C))
        return Window(self._updates, _filled(self._average_C), signal_C, previous_C, self._prior_C)

    def _signal_of(self, loss_C: Numbers) -> Numbers:
        if self._losses.signal == "ratio_to_init":
            first_C: Numbers = np.maximum(self._first_C, _TINY)
            return loss_C / first_C
        if self._losses.signal == "excess_over_ref":
            assert self._reference_C is not None, "the reference is measured before the first step"
            return loss_C - self._reference_C
        return loss_C

    def _log_weights(self, window: Window) -> Numbers:
        weights_C = np.asarray(self._rule(window, self._memory), dtype=np.float64)
        usable = weights_C.shape == window.prior_C.shape and (weights_C < math.inf).all() and np.isfinite(weights_C).any()
        if not usable:
            raise RunError(f"the controller `{self.options.type}` gave {weights_C.tolist()}, which are no log-weights")
        return weights_C

    def _floored(self, weights_C: Numbers) -> Numbers:
        alpha_C: Numbers = np.exp(weights_C)
        return (1.0 - self.options.min_alpha * len(alpha_C)) * alpha_C + self.options.min_alpha

    def _limited(self, alpha_C: Numbers) -> tuple[float, ...]:
        """Along the straight line from the old α, so that the sum stays 1 and the floor holds."""
        limit = self.options.max_change
        old_C = np.array(self.alpha)
        most = float(np.abs(alpha_C - old_C).max())
        if limit is not None and most > limit:
            alpha_C = np.maximum(old_C + (alpha_C - old_C) * (limit / most), self.options.min_alpha)
        return tuple(alpha_C.tolist())


def _normalised(weights_C: Numbers) -> Numbers:
    """log softmax."""
    top = float(weights_C.max())
    return weights_C - (top + math.log(float(np.exp(weights_C - top).sum())))


def _filled(values_C: Numbers) -> Numbers:
    """A class that was never seen is taken for an average one, so that it neither gains nor loses."""
    unseen_C = np.isnan(values_C)
    return np.where(unseen_C, values_C[~unseen_C].mean(), values_C) if unseen_C.any() else values_C


def _plain(values_C: Numbers) -> list[float | None]:
    """JSON has no nan."""
    return [None if math.isnan(value) else value for value in values_C.tolist()]


def _numbers(values: Sequence[float | None]) -> Numbers:
    return np.array([math.nan if value is None else value for value in values])
