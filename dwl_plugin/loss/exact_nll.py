"""What one token pays, exact from p → 0 to p → 1. Every way of computing the loss ends here.

Shapes: N target tokens. Probabilities are never formed by a subtraction: the target's exponential stays out of the
sum, so a token the model is certain of keeps its last digits (nll ≈ 1e-7 is not 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["TokenLoss", "exact_nll", "paid_weight", "refuse_second_derivative", "spread"]


class TokenLoss(NamedTuple):
    """`loss`: the weighted sum, with gradient. `nll`: −log p of each position in nats, detached, 0 where ignored."""

    loss: torch.Tensor
    nll: torch.Tensor


def exact_nll(
    others_N: torch.Tensor, reference_N: torch.Tensor, target_logit_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """nll = −log softmax(z)[y] and 1 − p = 1 − exp(−nll), from others = Σ_{j≠y} exp(z_j − reference) and z_y.

    With x = log Σ_{j≠y} exp(z_j) − z_y they are softplus(x) and sigmoid(x); for x < 0 taken from odds = exp(x) itself,
    since the logarithm of 1e-17 has fewer digits than 1e-17.
    """
    gap_N = reference_N - target_logit_N
    x_N, odds_N = others_N.log() + gap_N, others_N * gap_N.exp()
    likely_N = x_N < 0
    nll_N = torch.where(likely_N, odds_N.log1p(), x_N + x_N.neg().exp().log1p())
    return nll_N, torch.where(likely_N, odds_N / (1 + odds_N), torch.sigmoid(x_N))


def paid_weight(
    nll_N: torch.Tensor,
    token_weight_N: torch.Tensor | None,
    exponent: torch.Tensor | float,
    min_weight: torch.Tensor | float,
) -> torch.Tensor:
    """w · max(p^a, m) with p^a = exp(−a·nll), a constant for autograd; a = 0 is 1 even where p is 0."""
    if isinstance(exponent, torch.Tensor):
        paid_N = torch.where(exponent == 0, 0.0, exponent * nll_N).neg_().exp_()
    elif exponent == 0:
        paid_N = torch.ones_like(nll_N)
    else:
        paid_N = (nll_N * -exponent).exp_()
    paid_N = (
        torch.maximum(paid_N, min_weight) if isinstance(min_weight, torch.Tensor) else paid_N.clamp_(min=min_weight)
    )
    return paid_N if token_weight_N is None else paid_N * token_weight_N


def spread(values_N: torch.Tensor, rows_N: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    """Values of the target tokens back at their positions in `shape`, 0 everywhere else."""
    if rows_N is None:
        return values_N.reshape(shape)
    return values_N.new_zeros(shape.numel()).index_copy_(0, rows_N, values_N).reshape(shape)


def refuse_second_derivative() -> None:
    """Gradients taken in the forward are constants: a gradient penalty on them would be wrong without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the fused loss cannot be differentiated twice: call backward or grad without create_graph=True"
        )
