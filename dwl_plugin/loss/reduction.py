"""How token losses become one number, written as one weight per class.

Of the whole optimizer step (every micro-batch, every rank), N is the number of target tokens, N_c of those in class c, S the number
of samples with a target. The loss of a step is (1/N) Σ_t Σ_{c∋t} w_c·ℓ_tc, so the host keeps its own division by N, by accumulation
steps and by ranks. Where classes overlap (`overlap: sum`) the N_c add up to more than N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dwl_plugin.values import Reduction

__all__ = ["ClassWeight", "class_weight_table", "class_weights"]


def class_weights(reduction: Reduction, alpha_C: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """w (C,) in the dtype of `alpha_C`; `counts` is (C + 2,): N_c of each class, N, S.

    - token_mean               w_c = α_c                      (1/N) Σ_t Σ_{c∋t} α_c ℓ_tc
    - weighted_mean            w_c = α_c · N / Σ_k α_k N_k    Σ_t Σ_{c∋t} α_c ℓ_tc / Σ_t Σ_{c∋t} α_c
    - class_mean               w_c = α'_c · N / N_c           Σ_c α'_c (1/N_c) Σ_{t∈c} ℓ_tc, α' = α over the classes present,
      rescaled to the sum that α has
    - sequence_mean_token_sum  w_c = α_c · N / S              (1/S) Σ_samples Σ_t Σ_{c∋t} α_c ℓ_tc

    A step whose tokens all have α = 0 gets w = 0, not NaN.
    """
    if reduction == "token_mean":
        return alpha_C
    counts = counts.to(alpha_C)
    counts_C, total, samples = counts[:-2], counts[-2], counts[-1]
    if reduction == "sequence_mean_token_sum":
        return alpha_C * total / samples.clamp(min=1)
    if reduction == "weighted_mean":
        mass = (alpha_C * counts_C).sum()
        return torch.where(mass > 0, alpha_C * total / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    present_C = alpha_C * (counts_C > 0)
    mass = present_C.sum()
    share_C = torch.where(mass > 0, present_C * alpha_C.sum() / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    return share_C * total / counts_C.clamp(min=1)


class ClassWeight(NamedTuple):
    """What α does to a class. Shares in [0, 1]; where classes overlap, the token shares add up to more than 1."""

    name: str
    alpha: float
    token_share: float
    one_token: float
    """What one of its tokens counts, where a token of SFT counts 1, before any factor of its token loss."""
    weight_share: float


def class_weight_table(
    reduction: Reduction, names: Sequence[str], alpha: Sequence[float], counts: Sequence[int]
) -> list[ClassWeight]:
    """One row per class; `counts` is (C + 2,) as above, with at least one target."""
    alpha_C = torch.tensor(alpha, dtype=torch.float64)
    weights = class_weights(reduction, alpha_C, torch.tensor(counts, dtype=torch.int64)).tolist()
    mass = [weight * count for weight, count in zip(weights, counts, strict=False)]
    whole = math.fsum(mass) or 1.0
    return [
        ClassWeight(name, a, count / counts[-2], weight, part / whole)
        for name, a, count, weight, part in zip(names, alpha, counts, weights, mass, strict=False)
    ]
