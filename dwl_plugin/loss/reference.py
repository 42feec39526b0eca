"""The loss by its definition, from full logits by autograd: what everything else here must equal. Nothing imports it but tests.

Shapes: B samples, T positions, V vocabulary, C classes (the last one is `rest`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dwl_plugin.loss.token_losses import TokenLoss, TokenStats
from dwl_plugin.values import IGNORE_INDEX, Reduction

__all__ = ["reference_loss"]


def reference_loss(
    logits_BTV: torch.Tensor,
    labels_BT: torch.Tensor,
    members_CBT: torch.Tensor,
    alpha: Sequence[float],
    token_losses: Sequence[TokenLoss],
    reduction: Reduction = "token_mean",
) -> torch.Tensor:
    """The loss of one optimizer step. `members` says which tokens are in each class, `alpha` sums to 1 over the classes."""
    labels_BT = labels_BT[:, 1:]  # position t predicts token t + 1
    is_target_BT = labels_BT != IGNORE_INDEX
    members_CN = members_CBT[:, :, 1:][:, is_target_BT]
    logits_NV = logits_BTV[:, :-1][is_target_BT]
    nll_N = F.cross_entropy(logits_NV, labels_BT[is_target_BT], reduction="none")
    token = TokenStats(nll_N, logits_NV.sort(descending=True).values)

    counts = [int(member_N.sum()) for member_N in members_CN]
    sums = [token_loss(token)[member_N].sum() for token_loss, member_N in zip(token_losses, members_CN, strict=True)]
    total = torch.stack([a * sum_c for a, sum_c in zip(alpha, sums, strict=True)]).sum()
    if reduction == "token_mean":
        return total / len(nll_N)
    if reduction == "sequence_mean_token_sum":
        return total / is_target_BT.any(1).sum()
    if reduction == "weighted_mean":
        return total / sum(a * count for a, count in zip(alpha, counts, strict=True))
    present = [c for c, count in enumerate(counts) if count]
    return torch.stack([alpha[c] * sums[c] / counts[c] for c in present]).sum() / sum(alpha[c] for c in present)
