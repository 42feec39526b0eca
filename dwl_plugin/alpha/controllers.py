"""Closed loop: α from the raw nll of each class, which no α enters.

The nll of a window of optimizer steps is summed over its micro-batches and ranks and divided once by the tokens; a rule turns the
running averages into log-weights; a floor and a limit on the change turn these into α. Everything is fp64 on the CPU and the same
on every rank, because the sums are.

Shapes: C classes in the order of `Block.class_names`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import Block, ControllerOptions, LossControllerOptions
from dwl_plugin.errors import ConfigError, DWLError, Problem
from dwl_plugin.extensions import load

__all__ = ["Controller", "Memory", "Rule", "Window"]

PATH = "dwl.controller"

Numbers = NDArray[np.float64]

_TINY = float(np.finfo(np.float64).tiny)

Memory = dict[str, Any]
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


Rule = Callable[[Window, Memory], Sequence[float] | Numbers]
"""Log-weights (C,) of an update; what they sum to does not matter. May change the memory."""


class Controller:
    """α over the windows of a run. `alpha` is the current one, `signal` what it was last updated from (None: nothing yet)."""

    def __init__(self, block: Block, length: RunLength) -> None:
        options = block.controller
        assert options is not None
        self.names, self.options, self.alpha = block.class_names, options, block.alpha
        self.signal: tuple[float, ...] | None = None
        self._warmup = length.step(options.warmup, f"{PATH}.warmup")
        self._prior_C = np.log(np.array(block.alpha))
        self._rule = _rule(options)
        self._updates, self._memory = 0, Memory()
        unseen_C = np.full(len(self.names), np.nan)
        self._average_C, self._first_C, self._previous_C = unseen_C, unseen_C, unseen_C
        self._reference_C: Numbers | None = None
        reference = options.reference if isinstance(options, LossControllerOptions) else None
        if isinstance(reference, Mapping):
            self._reference_C = np.array([reference[name] for name in self.names])

    @property
    def rows_to_measure(self) -> int:
        """How many rows the reference still has to be measured on, by `compare_with`; 0: none."""
        wanted = isinstance(self.options, LossControllerOptions) and self.options.reference == "base"
        return self.options.reference_rows if wanted and self._reference_C is None else 0  # type: ignore[attr-defined]

    def compare_with(self, nll: Mapping[str, float]) -> None:
        """`reference: base`, measured. Raises `ConfigError` for a class that has no number."""
        missing = [name for name in self.names if name not in nll]
        if missing:
            why = f"no token of {', '.join(missing)} was in the rows that the base model was measured on"
            raise ConfigError([Problem(f"{PATH}.reference", why, "base", hint="raise `reference_rows`, or write the numbers")])
        self._reference_C = np.array([nll[name] for name in self.names])

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
        ema = self.options.ema if isinstance(self.options, LossControllerOptions) else 0.0
        before_C = self._average_C
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

    def load(self, state: Mapping[str, Any]) -> None:
        """Other options than the state's hold from here on, the floor at once.

        Raises `ConfigError` if the state is of another controller or other classes, or if its numbers would mean something else.
        """
        theirs, ours = (state["type"], list(state["classes"])), (self.options.type, list(self.names))
        if theirs != ours:
            was, now = (f"`{kind}` over {', '.join(classes)}" for kind, classes in (theirs, ours))
            why = f"the checkpoint was written by {was}; this is {now}"
            raise ConfigError([Problem(PATH, why, hint="resume with the config of the checkpoint, or start a new run")])
        before, options = state["options"], self.options.model_dump(mode="json")
        again = "resume with the value of the checkpoint, or start a new run"
        if before.get("signal") != options.get("signal"):
            why = f"the checkpoint's controller has learned from `signal: {before.get('signal')}`"
            raise ConfigError([Problem(f"{PATH}.signal", why, options.get("signal"), hint=again)])
        if options.get("reference") == "base" != before.get("reference"):
            why = "can only be measured before the first step, and the checkpoint's run did not"
            raise ConfigError([Problem(f"{PATH}.reference", why, "base", hint=again)])
        self.alpha = tuple(state["alpha"])
        if min(self.alpha) < self.options.min_alpha:
            with np.errstate(divide="ignore"):
                self.alpha = tuple(self._floored(np.log(np.array(self.alpha))).tolist())
        self.signal = None if state["signal"] is None else tuple(state["signal"])
        self._updates, self._memory = state["updates"], copy.deepcopy(state["memory"])
        self._average_C, self._first_C = _numbers(state["average"]), _numbers(state["first"])
        self._previous_C = _numbers(state["previous"])
        if self.rows_to_measure and state["reference"] is not None:
            self._reference_C = _numbers(state["reference"])

    def _window(self) -> Window:
        previous_C = None
        if not np.isnan(self._previous_C).all():
            before_C = np.where(np.isnan(self._previous_C), self._average_C, self._previous_C)  # newly seen: no change
            previous_C = _filled(self._signal_of(before_C))
        signal_C = _filled(self._signal_of(self._average_C))
        return Window(self._updates, _filled(self._average_C), signal_C, previous_C, self._prior_C)

    def _signal_of(self, loss_C: Numbers) -> Numbers:
        kind = self.options.signal if isinstance(self.options, LossControllerOptions) else "raw"
        if kind == "ratio_to_init":
            ratio_C: Numbers = loss_C / np.maximum(self._first_C, _TINY)
            return ratio_C
        if kind == "excess_over_ref":
            assert self._reference_C is not None, "the reference is measured before the first step"
            return loss_C - self._reference_C
        return loss_C

    def _log_weights(self, window: Window) -> Numbers:
        weights_C = np.asarray(self._rule(window, self._memory), dtype=np.float64)
        usable = weights_C.shape == window.prior_C.shape and (weights_C < math.inf).all() and np.isfinite(weights_C).any()
        if not usable:
            raise DWLError(f"[dwl] the controller `{self.options.type}` gave {weights_C.tolist()}, which are no log-weights")
        return weights_C

    def _floored(self, weights_C: Numbers) -> Numbers:
        floor = self.options.min_alpha
        alpha_C: Numbers = (1.0 - floor * len(weights_C)) * np.exp(weights_C) + floor
        return alpha_C

    def _limited(self, alpha_C: Numbers) -> tuple[float, ...]:
        """Along the straight line from the old α, so that the sum stays 1 and the floor holds."""
        limit = self.options.max_change
        old_C = np.array(self.alpha)
        most = float(np.abs(alpha_C - old_C).max())
        if limit is not None and most > limit:
            alpha_C = np.maximum(old_C + (alpha_C - old_C) * (limit / most), self.options.min_alpha)
        return tuple(alpha_C.tolist())


# One function per `type`; `dwl_plugin/config/controllers.py` has the formulas and their sources.


def _softmax_loss(options: Any, window: Window, memory: Memory) -> Numbers:
    weights_C: Numbers = window.prior_C + window.signal_C / options.temperature
    return weights_C


def _dwa(options: Any, window: Window, memory: Memory) -> Numbers:
    if window.previous_C is None:  # two windows are needed; until then w = 1 for all
        return window.prior_C
    weights_C: Numbers = window.prior_C + window.signal_C / np.maximum(window.previous_C, _TINY) / options.temperature
    return weights_C


def _softadapt(options: Any, window: Window, memory: Memory) -> Numbers:
    if window.previous_C is None:
        return window.prior_C
    slope_C = window.signal_C - window.previous_C
    if options.normalized:
        slope_C = slope_C / (np.abs(slope_C).sum() + 1e-8)
    weights_C: Numbers = window.prior_C + options.beta * slope_C
    if options.loss_weighted:
        weights_C = weights_C + np.log(np.maximum(window.loss_C, _TINY))
    return weights_C


def _group_dro(options: Any, window: Window, memory: Memory) -> Numbers:
    before_C = np.array(memory.get("log_weights", window.prior_C))
    weights_C = _normalised(before_C + options.eta * window.signal_C)
    memory["log_weights"] = weights_C.tolist()
    return weights_C


def _doremi(options: Any, window: Window, memory: Memory) -> Numbers:
    before_C = np.array(memory.get("log_weights", window.prior_C))
    alpha_C = np.exp(_normalised(before_C + options.eta * np.maximum(window.signal_C, 0.0)))
    with np.errstate(divide="ignore"):  # without smoothing a weight may come to nothing
        weights_C: Numbers = np.log((1.0 - options.smoothing) * alpha_C + options.smoothing / len(alpha_C))
    memory["log_weights"] = weights_C.tolist()
    return weights_C


def _rlw(options: Any, window: Window, memory: Memory) -> Numbers:
    noise = np.random.default_rng([options.seed, window.update])
    return window.prior_C + noise.standard_normal(len(window.prior_C))


_RULES: dict[str, Callable[[Any, Window, Memory], Numbers]] = {
    "softmax_loss": _softmax_loss,
    "dwa": _dwa,
    "softadapt": _softadapt,
    "group_dro": _group_dro,
    "doremi": _doremi,
    "rlw": _rlw,
}


def _rule(options: ControllerOptions) -> Rule:
    if options.type in _RULES:
        return partial(_RULES[options.type], options)
    rule: Rule = load("controller", options.type, ControllerOptions, f"{PATH}.type")(options)
    return rule


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
