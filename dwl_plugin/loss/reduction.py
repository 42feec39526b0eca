"""How token losses become one number, written as one weight per class.

N is the number of target tokens of the whole optimizer step (every micro-batch, every rank), N_c those in class c. The loss
of a step is (1/N) Σ_t w_{c(t)}·ℓ_t, so the host keeps its own division by N, by accumulation steps and by ranks.
"""

from __future__ import annotations

import torch

from dwl_plugin.config import Reduction

__all__ = ["class_weights"]


def class_weights(reduction: Reduction, alpha_C: torch.Tensor, counts_C: torch.Tensor) -> torch.Tensor:
    """w (C,) in the dtype of `alpha_C`.

    - token_mean     w_c = α_c                       (1/N) Σ_t α_{c(t)} ℓ_t
    - weighted_mean  w_c = α_c · N / Σ_k α_k N_k     Σ_t α_{c(t)} ℓ_t / Σ_t α_{c(t)}
    - class_mean     w_c = α'_c · N / N_c            Σ_c α'_c (1/N_c) Σ_{t∈c} ℓ_t, α' = α over the classes present, rescaled to
      the sum that α has

    A step whose tokens all have α = 0 gets w = 0, not NaN.
    """
    if reduction == "token_mean":
        return alpha_C
    counts_C = counts_C.to(alpha_C)
    total = counts_C.sum()
    if reduction == "weighted_mean":
        mass = (alpha_C * counts_C).sum()
        return torch.where(mass > 0, alpha_C * total / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    present_C = alpha_C * (counts_C > 0)
    mass = present_C.sum()
    share_C = torch.where(mass > 0, present_C * alpha_C.sum() / mass.clamp(min=torch.finfo(mass.dtype).tiny), 0.0)
    return share_C * total / counts_C.clamp(min=1)
