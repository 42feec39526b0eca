"""The nll of one token, exact from p → 0 to p → 1. Every way of computing the loss ends here.

Shapes: N target tokens. Probabilities are never formed by a subtraction: the target's exponential stays out of the
sum, so a token the model is certain of keeps its last digits (nll ≈ 1e-7 is not 0).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LinearCrossEntropyOutput", "exact_nll", "output_at", "refuse_second_derivative", "spread", "unlikelihood"]


class LinearCrossEntropyOutput(NamedTuple):
    """`loss`: the weighted sum, with gradient. `nll`: −log p of each position in nats. `factors`: for each term (…), ℓ/nll of its
    token loss. `kl`: KL(base‖θ) of each position, where there is an anchor. All but the loss are detached, and 0 where ignored."""

    loss: Tensor
    nll: Tensor
    factors: tuple[Tensor, ...] = ()
    kl: Tensor | None = None


def exact_nll(sum_exp_others_N: Tensor, max_N: Tensor, target_logit_N: Tensor) -> tuple[Tensor, Tensor]:
    """nll = −log softmax(z)[y] and 1 − p = 1 − exp(−nll), from Σ_{j≠y} exp(z_j − max) and z_y.

    With x = log Σ_{j≠y} exp(z_j) − z_y they are softplus(x) and sigmoid(x); for x < 0 taken from odds = exp(x) itself,
    since the logarithm of 1e-17 has fewer digits than 1e-17.
    """
    gap_N = max_N - target_logit_N
    x_N, odds_N = sum_exp_others_N.log() + gap_N, sum_exp_others_N * gap_N.exp()
    likely_N = x_N < 0
    nll_N = torch.where(likely_N, odds_N.log1p(), x_N + x_N.neg().exp().log1p())
    return nll_N, torch.where(likely_N, odds_N / (1 + odds_N), torch.sigmoid(x_N))


def unlikelihood(nll_N: Tensor) -> Tensor:
    """−log(1 − p), in nats; finite (87 in fp32) where nll is 0."""
    p_N, least = nll_N.neg().exp(), torch.finfo(nll_N.dtype).tiny
    return torch.where(p_N < 0.5, p_N.neg().log1p(), nll_N.clamp(min=least).neg().expm1().neg().log()).neg()


def spread(values_N: Tensor, rows_N: Tensor | None, shape: torch.Size) -> Tensor:
    """Values of the target tokens, numbers or rows, back at their positions in `shape`, 0 everywhere else."""
    if rows_N is not None:
        positions = shape[: len(shape) + 1 - values_N.ndim].numel()
        values_N = values_N.new_zeros(positions, *values_N.shape[1:]).index_copy_(0, rows_N, values_N)
    return values_N.reshape(shape)


def output_at(
    rows_N: Tensor | None, shape: torch.Size, loss: Tensor, nll_N: Tensor, factors_KN: Tensor, kl_N: Tensor | None
) -> LinearCrossEntropyOutput:
    """What the target tokens have, back at their positions in `shape`."""
    nll, *factors = (spread(values_N, rows_N, shape) for values_N in (nll_N, *factors_KN))
    return LinearCrossEntropyOutput(loss, nll, tuple(factors), None if kl_N is None else spread(kl_N, rows_N, shape))


def refuse_second_derivative() -> None:
    """Gradients taken in the forward are constants: a gradient penalty on them would be wrong without a word."""
    if torch.is_grad_enabled():
        raise RuntimeError("the fused loss cannot be differentiated twice: call backward or grad without create_graph=True")
