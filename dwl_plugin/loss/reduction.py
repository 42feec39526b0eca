"""How token losses become one number, written as one weight per class.

Of the whole optimizer step (every micro-batch, every rank), N is the number of target tokens, N_c of those in class c, S the number
of samples with a target. M_c and M are the sums of their |v_t|, where v_t is the factor of token t: what the data says it counts,
times n^-1 (sample_mean) or n^-½ (sample_sqrt) if its sample has n targets. Where nothing is said it is 1, and M = N. The loss of a
step is (1/N) Σ_t v_t Σ_{c∋t} w_c·ℓ_tc, so the host keeps its own division by N, by accumulation steps and by ranks. Where classes
overlap (`overlap: sum`) the N_c add up to more than N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dwl_plugin.values import SAMPLE_POWERS, Reduction

__all__ = ["ClassWeight", "class_weight_table", "class_weights"]


def class_weights(
    reduction: Reduction, alpha_C: torch.Tensor, counts: torch.Tensor, masses: torch.Tensor | None = None
) -> torch.Tensor:
    """w (C,) in the dtype of `alpha_C`; `counts` is (C + 2,): N_c of each class, N, S; `masses` M_c, M and S, None: as the counts.

    - token_mean               w_c = α_c                      (1/N) Σ_t v_t Σ_{c∋t} α_c ℓ_tc
    - weighted_mean            w_c = α_c · N / Σ_k α_k M_k    Σ_t v_t Σ_{c∋t} α_c ℓ_tc / Σ_t |v_t| Σ_{c∋t} α_c
    - class_mean               w_c = α'_c · N / M_c           Σ_c α'_c (1/M_c) Σ_{t∈c} v_t ℓ_tc, α' = α over the classes present,
      rescaled to the sum that α has
    - sequence_mean_token_sum  w_c = α_c · N / S              (1/S) Σ_samples Σ_t v_t Σ_{c∋t} α_c ℓ_tc
    - sample_mean, sample_sqrt w_c = α_c · N / M              Σ_t v_t Σ_{c∋t} α_c ℓ_tc / M: without factors in the data M is S, or
      Σ_samples √n

    A step whose tokens all have α = 0 gets w = 0, not NaN.
    """
    if reduction == "token_mean":
        return alpha_C
    masses = (counts if masses is None else masses).to(alpha_C)
    counts = counts.to(alpha_C)
    masses_C, total, samples = masses[:-2], counts[-2], counts[-1]
    if reduction == "sequence_mean_token_sum":
        return alpha_C * total / samples.clamp(min=1)
    if reduction in SAMPLE_POWERS:
        return alpha_C * total / masses[-2].clamp(min=torch.finfo(masses.dtype).tiny)
    if reduction == "weighted_mean":
        mass = (alpha_C * masses_C).sum()
        return torch.where(mass > 0, alpha_C * total / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    present_C = alpha_C * (masses_C > 0)
    mass = present_C.sum()
    share_C = torch.where(mass > 0, present_C * alpha_C.sum() / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    return share_C * total / torch.where(masses_C > 0, masses_C, 1.0)


class ClassWeight(NamedTuple):
    """What α does to a class. Shares in [0, 1]; where classes overlap, the token shares add up to more than 1."""

    name: str
    alpha: float
    token_share: float
    weight: float
    """w_c: what one of its tokens with a factor of 1 counts, where a token of SFT counts 1, before any factor of its token loss."""
    one_token: float
    """What one of its tokens counts on average."""
    weight_share: float


def class_weight_table(
    reduction: Reduction, names: Sequence[str], alpha: Sequence[float], counts: Sequence[int], masses: Sequence[float] | None = None
) -> list[ClassWeight]:
    """One row per class; `counts` and `masses` are (C + 2,) as above, with at least one target."""
    alpha_C = torch.tensor(alpha, dtype=torch.float64)
    masses = counts if masses is None else masses
    tensors = torch.tensor([counts, masses], dtype=torch.float64)
    weights = class_weights(reduction, alpha_C, *tensors).tolist()
    mass = [weight * own for weight, own in zip(weights, masses, strict=False)]
    whole = math.fsum(mass) or 1.0
    return [
        ClassWeight(name, a, count / counts[-2], weight, part / count if count else weight, part / whole)
        for name, a, count, weight, part in zip(names, alpha, counts, weights, mass, strict=False)
    ]
