"""What a checkpoint keeps of a controller. Whoever wrote the file may not have been us, so nothing of it is taken on trust.

Shapes: C classes, in the order of `classes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import ConfigDict, Field, JsonValue, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, ValidationError

from dwl_plugin.values import Strict, invalid, line_error

__all__ = ["ControllerState", "LogWeights", "LoopState", "Nothing"]

_MOST_NATS = 1e100
"""Beyond the loss of any float32 logits, and far from where sums of losses overflow."""

_Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""As JSON has it: neither a string nor a boolean, and an integer only if a float can hold it."""

_Share = Annotated[_Number, Field(ge=0.0)]
_Tokens = Annotated[_Number, Field(ge=0.0, le=2**53)]
_LogWeight = Annotated[float, Field(strict=True, allow_inf_nan=True)]
_Loss = Annotated[_Number, Field(ge=-1.0, le=_MOST_NATS)] | None  # rounding may bring it below 0
"""None: no token of the class has been seen yet."""


class ControllerState(Strict):
    """`Controller.state`. What `options` and `memory` may hold is known to the rule alone."""

    model_config = ConfigDict(allow_inf_nan=True)  # of a memory; a _Number is finite

    type: str = Field(pattern=r"^[ -~]{1,200}$")
    options: dict[str, JsonValue]
    classes: list[Annotated[str, Field(pattern=r"^\w{1,200}$")]]
    alpha: list[_Share]
    signal: list[_Number] | None
    updates: int = Field(strict=True, ge=0, le=2**53)
    memory: dict[str, JsonValue]
    average: list[_Loss]
    first: list[_Loss]
    previous: list[_Loss]
    reference: list[_Number] | None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> ControllerState:
        if wrong := list(self._lengths()) or list(self._contradictions()):
            raise ValidationError.from_exception_data("ControllerState", wrong)
        return self

    def _lengths(self) -> Iterator[InitErrorDetails]:
        classes = len(self.classes)
        for name in ("alpha", "signal", "average", "first", "previous", "reference"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != classes:
                yield line_error([name], f"has {len(numbers)} numbers for {classes} classes", numbers)

    def _contradictions(self) -> Iterator[InitErrorDetails]:
        if not _is_one(math.fsum(self.alpha)):
            yield line_error(["alpha"], "does not sum to 1", self.alpha)
        for c, (average, first, previous) in enumerate(zip(self.average, self.first, self.previous, strict=True)):
            if (average is None) != (first is None):
                yield line_error(["first", c], "a class has its first loss from the moment it has an average", first)
            if average is None and previous is not None:
                yield line_error(["previous", c], "is of a class that has no average", previous)
        is_seen = any(average is not None for average in self.average)
        if is_seen == (self.signal is None):
            yield line_error(["signal"], "is there from the moment any class has an average", self.signal)
        if self.updates and not is_seen:
            yield line_error(["updates"], "no class has an average to update from", self.updates)


class LoopState(ControllerState):
    """`ClosedLoop.state`: a controller's, and for each rank Σ nll (C,) and tokens (C,) of the window that is not over yet."""

    window: list[tuple[list[_Number], list[_Tokens]]] = Field(min_length=1)

    @model_validator(mode="after")
    def _sums_of_its_classes(self) -> LoopState:
        for rank, (nll_C, tokens_C) in enumerate(self.window):
            if {len(nll_C), len(tokens_C)} != {len(self.classes)}:
                why = f"has {len(nll_C)} losses and {len(tokens_C)} numbers of tokens for {len(self.classes)} classes"
                raise ValidationError.from_exception_data("LoopState", [line_error(["window", rank], why, (nll_C, tokens_C))])
            if not all(-tokens <= nll <= _MOST_NATS * tokens for nll, tokens in zip(nll_C, tokens_C, strict=True)):
                why = "a loss that its number of tokens cannot have"
                raise ValidationError.from_exception_data("LoopState", [line_error(["window", rank], why, (nll_C, tokens_C))])
        return self


class Nothing(Strict):
    """The memory of a rule that keeps nothing."""


class LogWeights(Strict):
    """The memory of a rule that multiplies its weights: log-weights (C,) whose weights sum to 1. −inf is a weight of 0."""

    log_weights: list[_LogWeight]

    @field_validator("log_weights")
    @classmethod
    def _are_log_weights(cls, weights_C: list[float], info: ValidationInfo) -> list[float]:
        assert info.context is not None
        classes = len(info.context["classes"])
        if len(weights_C) != classes:
            raise invalid(f"has {len(weights_C)} numbers for {classes} classes")
        if not all(weight <= 1e-9 for weight in weights_C):  # nan is not
            raise invalid("the logarithm of a weight is at most 0")
        if not _is_one(math.fsum(map(math.exp, weights_C))):
            raise invalid("the weights do not sum to 1")
        return weights_C


def _is_one(total: Any) -> bool:
    """Whether a sum of weights is 1, up to rounding."""
    return bool(abs(total - 1.0) < 1e-9)
