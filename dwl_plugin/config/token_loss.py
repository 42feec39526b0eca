"""What one token pays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from dwl_plugin.config.schedules import Schedule, order_problems, vectors
from dwl_plugin.errors import Problem, did_you_mean
from dwl_plugin.values import Strict, Weight

__all__ = [
    "SCHEDULED",
    "TOKEN_LOSSES",
    "DFTConfig",
    "EAFTConfig",
    "FocalConfig",
    "TokenLossConfig",
    "TokenLossName",
    "dft_problems",
]

SCHEDULED = ("exponent", "min_weight")
"""The options of dft that a `schedule` beside them may move."""

_PART_OF_DFT = {"asft": "anchor: 0.05", "gft": "threshold: 0.7", "sft": "exponent: 0"}


def _token_loss(value: object) -> object:
    """Names from papers that are `dft` with an option."""
    if isinstance(value, str) and value.lower() in _PART_OF_DFT:
        raise PydanticCustomError("dwl", f"is `token_loss: dft` with `dft: {{{_PART_OF_DFT[value.lower()]}}}`")
    return value


TokenLossName = Annotated[Literal["nll", "dft", "focal", "eaft"], BeforeValidator(_token_loss)]


class DFTConfig(Strict):
    """Token loss −sg(max(p^exponent, min_weight))·log p (arXiv 2508.05629 with the exponent of 2510.00526)."""

    exponent: Weight = Field(1.0, ge=0.0, description="a in the token weight p^a: 0 is plain NLL, 1 is DFT.")
    min_weight: Weight = Field(
        0.0, ge=0.0, le=1.0, description="Floor of the token weight, so that tokens of tiny p (EOS, format) still learn."
    )
    threshold: Weight = Field(
        1.0,
        gt=0.0,
        le=1.0,
        description="From this p on the token weight is 1: 0.7 gives GFT's coefficient (arXiv 2604.14258), 1 no threshold.",
    )
    anchor: Weight = Field(
        0.0,
        ge=0.0,
        description="λ of λ·KL(base‖θ) beside each token's loss: 0.05 makes dft ASFT (arXiv 2509.23753). Needs an adapter.",
    )
    schedule: Schedule | None = Field(
        None, description="`exponent` and `min_weight` as functions of the optimizer step, e.g. from NLL to DFT."
    )


def dft_problems(dft: object, path: str) -> Iterator[Problem]:
    """What no single field of `dft` can see, from the mapping as it was written."""
    spec = dft.get("schedule") if isinstance(dft, Mapping) else None
    for where, numbers in vectors(spec, f"{path}.schedule"):
        if not isinstance(numbers, Mapping):
            continue  # the schema says so already
        if not numbers:
            yield Problem(where, "names nothing that moves", allowed=", ".join(SCHEDULED))
        for name, value in numbers.items():
            if name not in SCHEDULED:
                hint = did_you_mean(name, SCHEDULED)
                yield Problem(f"{where}.{name}", "not an option of dft that can move", allowed=", ".join(SCHEDULED), hint=hint)
            elif isinstance(value, (int, float)) and not 0 <= value <= (1 if name == "min_weight" else value):
                allowed = "numbers from 0 to 1" if name == "min_weight" else "numbers from 0 up"
                yield Problem(f"{where}.{name}", "out of range", value, allowed=allowed)
    yield from order_problems(spec, f"{path}.schedule")


class FocalConfig(Strict):
    """Token loss −(1 − p)^gamma·log p, differentiated through its factor (arXiv 1708.02002, eq. 4)."""

    gamma: Weight = Field(2.0, ge=0.0, description="γ in the factor (1 − p)^γ: 0 is plain NLL.")


class EAFTConfig(Strict):
    """Token loss −sg(H/ln k)^exponent·log p, H the entropy over the top_k most likely tokens (arXiv 2601.02151)."""

    exponent: Weight = Field(1.0, ge=0.0, description="Power of the normalised entropy: 0 is plain NLL.")
    top_k: int = Field(20, ge=2, le=1024, description="k: how many of the most likely tokens the entropy is taken over.")


TokenLossConfig = DFTConfig | FocalConfig | EAFTConfig

TOKEN_LOSSES: dict[str, type[TokenLossConfig]] = {"dft": DFTConfig, "focal": FocalConfig, "eaft": EAFTConfig}
"""The token losses that have options, which stand under a key of the same name."""
