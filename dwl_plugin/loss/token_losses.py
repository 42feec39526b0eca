"""What one token pays: ℓ = f·nll, with a factor f that is different from token to token.

The gradient of ℓ in the logits is s·∂nll/∂z with one number per token, the slope s = dℓ/dnll. So each of these is exact in the
fused path at the price of nll: the walk over the vocabulary gives nll and its unweighted gradient, a few operations on (N,)
numbers do the rest.

Shapes: R tokens, k the most likely tokens of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch

from dwl_plugin.config import DFTConfig, EAFTConfig, FocalConfig

__all__ = ["EntropyGate", "Focal", "Objective", "Paid", "Power", "Term", "TokenStats", "objective_of"]


class TokenStats(NamedTuple):
    """What an objective may look at: nll in nats, 1 − p (exact as p → 1), and the largest logits in falling order."""

    nll_R: torch.Tensor
    miss_R: torch.Tensor
    top_Rk: torch.Tensor | None


class Paid(NamedTuple):
    """ℓ = factor·nll and dℓ/dnll = slope, per token."""

    factor_R: torch.Tensor
    slope_R: torch.Tensor


@dataclass(frozen=True)
class Power:
    """f = sg(max(p^exponent, min_weight)) where p < threshold, 1 from there on; s = f.

    exponent 0 is nll, 1 is DFT (arXiv 2508.05629), between them the family of 2510.00526; exponent 1 with a threshold is the
    coefficient of GFT (2604.14258). `exponent` and `min_weight` may be one number per token.
    """

    exponent: torch.Tensor | float = 0.0
    min_weight: torch.Tensor | float = 0.0
    threshold: float = 1.0
    top_k: ClassVar[int] = 0

    def at(self, rows: slice | torch.Tensor) -> Power:
        exponent, floor = (v[rows] if isinstance(v, torch.Tensor) else v for v in (self.exponent, self.min_weight))
        return replace(self, exponent=exponent, min_weight=floor)

    def __call__(self, seen: TokenStats) -> Paid:
        nll_R = seen.nll_R
        # p^a = exp(−a·nll), and p^0 is 1 even where p is 0.
        if isinstance(self.exponent, torch.Tensor):
            factor_R = torch.where(self.exponent == 0, 0.0, self.exponent * nll_R).neg_().exp_()
        elif self.exponent == 0:
            factor_R = torch.ones_like(nll_R)
        else:
            factor_R = (nll_R * -self.exponent).exp_()
        if isinstance(self.min_weight, torch.Tensor):
            factor_R = torch.maximum(factor_R, self.min_weight)
        else:
            factor_R.clamp_(min=self.min_weight)
        if self.threshold < 1:
            factor_R = torch.where(nll_R > -math.log(self.threshold), factor_R, 1.0)
        return Paid(factor_R, factor_R)


@dataclass(frozen=True)
class Focal:
    """f = (1 − p)^gamma, through which the gradient flows: s = (1 − p)^γ + γ·(1 − p)^(γ−1)·p·nll (arXiv 1708.02002, eq. 4)."""

    gamma: float = 2.0
    top_k: ClassVar[int] = 0

    def at(self, rows: slice | torch.Tensor) -> Focal:
        return self

    def __call__(self, seen: TokenStats) -> Paid:
        factor_R = seen.miss_R**self.gamma
        nll_R = seen.nll_R.clamp(max=torch.finfo(seen.nll_R.dtype).max)  # p·nll is 0, not NaN, where p is 0
        # nll/(1 − p) → 1 as p → 1, so no power of 1 − p is negative.
        ratio_R = torch.where(seen.miss_R > 0, nll_R / seen.miss_R, 1.0)
        return Paid(factor_R, factor_R * (1 + self.gamma * nll_R.neg().exp() * ratio_R))


@dataclass(frozen=True)
class EntropyGate:
    """f = sg(H/ln k)^exponent, H the entropy of the softmax over the k largest logits; s = f (EAFT, arXiv 2601.02151).

    k is the vocabulary where that is smaller.
    """

    exponent: float = 1.0
    top_k: int = 20

    def at(self, rows: slice | torch.Tensor) -> EntropyGate:
        return self

    def __call__(self, seen: TokenStats) -> Paid:
        assert seen.top_Rk is not None
        top_Rk = seen.top_Rk[:, : self.top_k]
        # H = log Σ e^(z_j − z_1) + Σ p_j·(z_1 − z_j): no term is negative, so a certain token keeps its digits.
        gap_Rk = (top_Rk[:, :1] - top_Rk[:, 1:]).clamp_(max=torch.finfo(top_Rk.dtype).max)
        odds_Rk = gap_Rk.neg().exp_()
        others_R = odds_Rk.sum(1)
        entropy_R = others_R.log1p() + (gap_Rk * odds_Rk).sum(1) / (1 + others_R)
        share_R = entropy_R / math.log(max(2, top_Rk.shape[1]))
        factor_R = share_R**self.exponent
        return Paid(factor_R, factor_R)


Objective = Power | Focal | EntropyGate


@dataclass(frozen=True)
class Term:
    """A part of what tokens pay: weight · objective. The weight has one number per token; None is 1 everywhere."""

    objective: Objective
    weight: torch.Tensor | None = None


def objective_of(config: DFTConfig | FocalConfig | EAFTConfig) -> Objective:
    """What a config's token loss asks for."""
    if isinstance(config, FocalConfig):
        return Focal(config.gamma)
    if isinstance(config, EAFTConfig):
        return EntropyGate(config.exponent, config.top_k)
    return Power(config.exponent, config.min_weight, config.threshold)
