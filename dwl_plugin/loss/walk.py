"""What a pass over the vocabulary is asked for, and what it returns; `cpu_walk` and `gpu_walk` are the two that there are.

For target y, with q the softmax over the other tokens and s = exp-sum of those others,

    ∂nll/∂z_j = (1 − p_y) · (q_j − 1[j = y]),      q_j = exp(z_j − reference) / s,  q_y = 0

so one pass can accumulate Σ_j exp(z_j − reference)·W_j beside the sum itself, as attention does with K = V = W, and everything
known only at the end (1/s, 1 − p, the slope of what the token pays) scales one row of ∂hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Gradients", "NeedsGrad", "WalkResult"]


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


@dataclass
class WalkResult:
    """The summed loss, its gradients, and of each token nll, the factor of each term, and KL(base‖θ) where there is an anchor."""

    loss: Tensor
    nll_N: Tensor
    factors_KN: Tensor
    kl_N: Tensor | None
    gradients: Gradients
