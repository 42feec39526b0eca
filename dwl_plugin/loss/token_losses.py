"""What one token pays: for each token loss its options, as a YAML has them, and its formula, one differentiable expression.

A formula is called with what is known of some tokens and returns what they pay. It is written on tensors, with `.detach()` where
the paper holds a factor constant. The gradient of ℓ in the logits is dℓ/dnll·∂nll/∂z with one number dℓ/dnll per token, which
autograd takes from the expression: the pass over the vocabulary gives nll and its gradient, so any token loss costs what nll costs.

A new one is a pair of the two here and an entry in `TOKEN_LOSSES`, or an entry point of another package (`extensions.py`): derived
from `TokenLoss`, its `Options` from `TokenLossOptions`.

Shapes: R tokens, k the largest logits of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, SerializeAsAny
from pydantic_core import CoreSchema, InitErrorDetails

from dwl_plugin.alpha.schedules import Schedule, vectors
from dwl_plugin.errors import ConfigError, closest, did_you_mean
from dwl_plugin.extensions import class_of, load, other_names, schema_of_others
from dwl_plugin.values import Strict, Weight, invalid, line_error

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

__all__ = [
    "NLL_NAMES",
    "SCHEDULED",
    "TOKEN_LOSSES",
    "DFTConfig",
    "EntropyGate",
    "Focal",
    "Power",
    "Term",
    "TokenLoss",
    "TokenLossConfig",
    "TokenLossName",
    "TokenLossOptions",
    "TokenStats",
    "objective_of",
]

SCHEDULED = ("exponent", "min_weight")
"""The options of dft that a `schedule` beside them may move."""


class TokenStats(NamedTuple):
    """What a formula may look at: `nll` (R,) in nats, finite and above 0, and `top_logits` (R, k) in falling order, None if no
    token loss looks at them."""

    nll: Tensor
    top_logits: Tensor | None

    @property
    def p(self) -> Tensor:
        return self.nll.neg().exp()

    @property
    def one_minus_p(self) -> Tensor:
        """With all its digits as p → 1."""
        return self.nll.neg().expm1().neg()


class TokenLossConfig(Strict):
    """Base of the options of token losses."""


class TokenLossOptions(TokenLossConfig):
    """Base of the options of token losses from other packages."""

    type: str = Field(description="Which token loss.")


class TokenLoss:
    """Base of the formulas: frozen dataclasses, whose fields are named like the options they come from."""

    Options: ClassVar[type[TokenLossConfig]]

    @property
    def needs_top(self) -> int:
        """How many of the largest logits the formula looks at."""
        return 0

    def at(self, rows: slice | Tensor) -> Self:
        """The formula of some of the tokens, where it has a number for each."""
        return self

    def __call__(self, token: TokenStats) -> Tensor:
        """What each token pays, (R,)."""
        raise NotImplementedError


class DFTConfig(TokenLossConfig):
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

    @classmethod
    def cross_errors(cls, written: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
        """What is wrong with the numbers of the schedule here."""
        names = ", ".join(SCHEDULED)
        for path, numbers in vectors(written.get("schedule"), "schedule"):
            at = path.split(".")
            if numbers == {}:
                yield line_error(at, "names nothing that moves", numbers, names)
            for name, value in numbers.items() if isinstance(numbers, Mapping) else ():
                if name not in SCHEDULED:
                    hint = did_you_mean(name, SCHEDULED)
                    yield line_error([*at, str(name)], "not an option of dft that can move", value, names, hint)
                elif isinstance(value, (int, float)) and not 0 <= value <= (1 if name == "min_weight" else value):
                    allowed = "numbers from 0 to 1" if name == "min_weight" else "numbers from 0 up"
                    yield line_error([*at, name], "out of range", value, allowed)


@dataclass(frozen=True)
class Power(TokenLoss):
    """ℓ = sg(w)·nll, w = max(p^exponent, min_weight) if p < threshold, else 1; the first two may be one number per token."""

    Options = DFTConfig
    exponent: Tensor | float = 0.0
    min_weight: Tensor | float = 0.0
    threshold: float = 1.0

    def at(self, rows: slice | Tensor) -> Power:
        exponent, floor = (v if isinstance(v, (int, float)) else v[rows] for v in (self.exponent, self.min_weight))
        return replace(self, exponent=exponent, min_weight=floor)

    def __call__(self, token: TokenStats) -> Tensor:
        nll_R = token.nll.detach()
        weight_R = (nll_R * -self.exponent).exp().clamp(min=self.min_weight)
        if self.threshold < 1:
            weight_R = weight_R.where(nll_R > -math.log(self.threshold), 1.0)
        return weight_R * token.nll


class FocalConfig(TokenLossConfig):
    """Token loss −(1 − p)^gamma·log p, differentiated through its factor (arXiv 1708.02002, eq. 4)."""

    gamma: Weight = Field(2.0, ge=0.0, description="γ in the factor (1 − p)^γ: 0 is plain NLL.")


@dataclass(frozen=True)
class Focal(TokenLoss):
    """ℓ = (1 − p)^gamma·nll."""

    Options = FocalConfig
    gamma: float

    def __call__(self, token: TokenStats) -> Tensor:
        return token.one_minus_p**self.gamma * token.nll


class EAFTConfig(TokenLossConfig):
    """Token loss −sg(H/ln k)^exponent·log p, H the entropy over the top_k most likely tokens (arXiv 2601.02151)."""

    exponent: Weight = Field(1.0, ge=0.0, description="Power of the normalised entropy: 0 is plain NLL.")
    top_k: int = Field(20, ge=2, le=1024, description="k: how many of the most likely tokens the entropy is taken over.")


@dataclass(frozen=True)
class EntropyGate(TokenLoss):
    """ℓ = sg(H/ln k)^exponent·nll, H the entropy of the softmax over the k largest logits, over all if there are fewer."""

    Options = EAFTConfig
    exponent: float
    top_k: int

    @property
    def needs_top(self) -> int:
        return self.top_k

    def __call__(self, token: TokenStats) -> Tensor:
        assert token.top_logits is not None
        top_Rk = token.top_logits[:, : self.top_k].detach()
        # H = log Σ e^(z_j − z_1) + Σ p_j·(z_1 − z_j): no term is negative, so a certain token keeps its digits. A gap of 1e4 is as
        # good as any above: e^−1e4 is 0.
        gap_Rk = (top_Rk[:, :1] - top_Rk[:, 1:]).clamp(max=1e4)
        odds_Rk = gap_Rk.neg().exp()
        others_R = odds_Rk.sum(1)
        entropy_R = others_R.log1p() + (gap_Rk * odds_Rk).sum(1) / (1 + others_R)
        return (entropy_R / math.log(max(2, top_Rk.shape[1]))) ** self.exponent * token.nll


TOKEN_LOSSES: dict[str, type[TokenLoss]] = {  # a new one goes here
    "dft": Power,
    "focal": Focal,
    "eaft": EntropyGate,
}
"""By the name that a YAML has for it, which is also the key of its options. Those of another package's token loss stand in
`token_loss: {type: name, ...}`. `nll` is dft with exponent 0."""

NLL_NAMES = ("sft", "ce", "xent", "cross_entropy", "crossentropy", "cross-entropy", "none")
"""What people call `nll`."""

_WITH_A_KEY = ("nll", *TOKEN_LOSSES)
_PART_OF_DFT = {"asft": "anchor: 0.05", "gft": "threshold: 0.7", "sft": "exponent: 0"}
"""Names from papers that are `dft` with an option."""


def _chosen(value: object) -> object:
    """A token loss with a key for its options stays a name; any other becomes its options."""
    if isinstance(value, TokenLossOptions) or (isinstance(value, str) and value in _WITH_A_KEY):
        return value
    if isinstance(value, str) and value.lower() in _PART_OF_DFT:
        raise invalid(f"is `token_loss: dft` with `dft: {{{_PART_OF_DFT[value.lower()]}}}`")
    written = value if isinstance(value, Mapping) else {"type": value}
    name, others = written.get("type"), other_names("token_loss", _WITH_A_KEY)
    if not isinstance(name, str) or name not in others:
        known = [*_WITH_A_KEY, *others]
        meant = "nll" if str(name).lower() in NLL_NAMES else closest(name, known)
        raise invalid("not a known value", ", ".join(known), **({"write": meant} if meant else {}))
    try:
        found = load("token_loss", name, "", TokenLossOptions)
    except ConfigError as error:
        raise invalid(error.problems[0].message, hint=error.problems[0].hint) from None
    return found.Options.model_validate(written)


class _ByName:
    """In the JSON Schema: names, and where there are token losses without a key a mapping, which is checked when it is parsed."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        others = other_names("token_loss", _WITH_A_KEY)
        names = {"enum": [*_WITH_A_KEY, *others], "type": "string"}
        return {"anyOf": [names, schema_of_others(others)]} if others else names


TokenLossName = Annotated[str | SerializeAsAny[TokenLossOptions], BeforeValidator(_chosen), _ByName()]
"""What stands behind `token_loss`."""


def objective_of(options: TokenLossConfig, path: str = "dwl.token_loss") -> TokenLoss:
    """The formula with these options. Raises `ConfigError` at `path` where another package's is none."""
    formula: type[TokenLoss]
    if isinstance(options, TokenLossOptions):
        formula = class_of("token_loss", options.type, TOKEN_LOSSES, TokenLossOptions, f"{path}.type")
        if not issubclass(formula, TokenLoss):
            raise ConfigError.at(f"{path}.type", f"`{formula.__name__}` is no token loss: it has to derive from `TokenLoss`")
    else:
        formula = next(one for one in TOKEN_LOSSES.values() if one.Options is type(options))
    return formula(**{field.name: getattr(options, field.name) for field in fields(formula)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Term:
    """A part of what tokens pay: weight · token loss. The weight has one number per token; None is 1 everywhere."""

    objective: TokenLoss
    weight: Tensor | None = None
