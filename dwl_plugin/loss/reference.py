"""The loss by its definition, from full logits by autograd: what everything else here must equal. Nothing imports it but tests.

Shapes: B samples, T positions, V vocabulary, C classes (the last one is `rest`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dwl_plugin.loss.token_losses import TokenLoss, TokenStats
from dwl_plugin.values import IGNORE_INDEX, SAMPLE_POWERS, Reduction

__all__ = ["reference_loss"]


def reference_loss(
    logits_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    members_CBT: torch.Tensor,
    alpha: Sequence[float],
    token_losses: Sequence[TokenLoss],
    reduction: Reduction = "token_mean",
    factors_BT: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of one optimizer step. `members` says which tokens are in each class, `alpha` sums to 1 over the classes, `factors`
    are those of the data (None: 1)."""
    labels_BT = labels_BT[:, 1:]  # position t predicts token t + 1
    factors_BT = torch.ones_like(labels_BT, dtype=logits_BTV.dtype) if factors_BT is None else factors_BT[:, 1:]
    is_target_BT = (labels_BT != IGNORE_INDEX) & (factors_BT != 0)
    members_CN = members_CBT[:, :, 1:][:, is_target_BT]
    logits_NV = logits_BTV[:, :-1][is_target_BT]
    nll_N = F.cross_entropy(logits_NV, labels_BT[is_target_BT], reduction="none")
    token = TokenStats(nll_N, logits_NV.sort(descending=True).values)

    if reduction in SAMPLE_POWERS:  # each of the n targets of a sample counts n^-1, or n^-½
        targets_B1 = is_target_BT.sum(1, keepdim=True).clamp(min=1).to(factors_BT)
        factors_BT = factors_BT / targets_B1 ** SAMPLE_POWERS[reduction]
    factors_N = factors_BT[is_target_BT]
    unlikelihood_N = -torch.log1p(-torch.exp(-nll_N))  # −log(1 − p), what a token with a negative factor pays
    paid_CN = torch.stack([torch.where(factors_N > 0, token_loss(token), unlikelihood_N) for token_loss in token_losses])
    sums = [(factors_N.abs() * paid_N)[member_N].sum() for paid_N, member_N in zip(paid_CN, members_CN, strict=True)]
    masses = [factors_N.abs()[member_N].sum() for member_N in members_CN]
    total = torch.stack([a * sum_c for a, sum_c in zip(alpha, sums, strict=True)]).sum()
    if reduction == "token_mean":
        return total / len(nll_N)
    if reduction == "sequence_mean_token_sum":
        return total / is_target_BT.any(1).sum()
    if reduction in SAMPLE_POWERS:
        return total / factors_N.abs().sum()
    if reduction == "weighted_mean":
        return total / torch.stack([a * mass for a, mass in zip(alpha, masses, strict=True)]).sum()
    present = [c for c, mass in enumerate(masses) if mass > 0]
    return torch.stack([alpha[c] * sums[c] / masses[c] for c in present]).sum() / sum(alpha[c] for c in present)
