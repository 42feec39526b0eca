"""What a pass over the vocabulary is asked for, and what it returns; `cpu_walk` and `gpu_walk` are the two that there are.

For target y, with q the softmax over the other tokens and s = exp-sum of those others,

    ∂nll/∂z_j = (1 − p_y) · (q_j − 1[j = y]),      q_j = exp(z_j − reference) / s,  q_y = 0

so one pass can accumulate Σ_j exp(z_j − reference)·W_j beside the sum itself, as attention does with K = V = W, and everything
known only at the end (1/s, 1 − p, the slope of what the token pays) scales one row of ∂hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dwl_plugin.loss.tokens import TokenLossValue

__all__ = ["Gradients", "NeedsGrad", "Plan", "WalkResult"]


@dataclass(frozen=True)
class Plan:
    """N tokens in blocks of so many rows, a vocabulary of V in tiles of a width."""

    N: int
    V: int
    rows: int
    width: int

    def blocks(self) -> list[slice]:
        return [slice(start, min(start + self.rows, self.N)) for start in range(0, self.N, self.rows)]

    def tiles(self) -> list[slice]:
        return [slice(start, min(start + self.width, self.V)) for start in range(0, self.V, self.width)]


@dataclass(frozen=True)
class NeedsGrad:
    hidden: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


@dataclass
class Gradients:
    """∂loss of hidden, of the weight (V, H), of the bias (V,), in the dtype of the sums, or in bf16 where a bf16 tensor wants it.

    That of hidden has the rows of the target tokens (N, H), or of all positions (T, H).
    """

    hidden: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None
    scale: Callable[[Tensor, Tensor], None]
    """Multiplies one of them where it lies by a number that is a tensor."""


@dataclass
class WalkResult:
    """The summed loss, its gradients, and of each token nll, the factor of each term, and KL(base‖θ) where there is an anchor."""

    loss: Tensor
    nll_N: Tensor
    factors_KN: Tensor
    kl_N: Tensor | None
    gradients: Gradients

    def put(self, block: slice, value: TokenLossValue, nll_R: Tensor, kl_R: Tensor | None) -> None:
        """What the tokens of a block pay."""
        self.loss[block], self.nll_N[block], self.factors_KN[:, block] = value.loss_R, nll_R, value.factors_KR
        if self.kl_N is not None and kl_R is not None:
            self.kl_N[block] = kl_R
