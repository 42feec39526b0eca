"""The same loss for a head that is a callable, not a matrix: LoRA on it, a quantised weight, operations we cannot fold.

Shapes: … any leading shape with T positions, N of them targets, R rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dwl_plugin.loss.exact_nll import TokenLoss, exact_nll, refuse_second_derivative, spread
from dwl_plugin.loss.inputs import require, select_tokens

__all__ = ["module_cross_entropy"]

_CHUNK_BYTES = {
    "cpu": 64 * 2**20,
    "cuda": 512 * 2**20,
}  # of fp32 logits; about three times as much is alive in a backward


def module_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    targets: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    exponent: torch.Tensor | float = 0.0,
    min_weight: torch.Tensor | float = 0.0,
    ignore_index: int = -100,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> TokenLoss:
    """The weighted sum of token losses under any head, and the unweighted loss of each token:

        nll  = F.cross_entropy(head(hidden.flatten(0, -2)).float(), targets.flatten(), reduction="none")
        loss = (token_weight * (-nll).exp().pow(exponent).clamp(min=min_weight).detach() * nll).sum()

    `head` maps (R, H) to (R, V), row by row, and is called on chunks of target tokens; each chunk's logits are computed
    again in the backward, so only one chunk of them exists at a time. Gradients reach whatever parameters `head` uses.

    Arguments and result are those of `linear_cross_entropy`, besides:
        vocab_size: V, if the caller knows it; otherwise one row is sent through `head` to learn it.
        chunk_tokens: rows of a chunk; None takes as many as fit a byte budget.
    """
    require(
        chunk_tokens is None or (isinstance(chunk_tokens, int) and chunk_tokens > 0),
        f"chunk_tokens must be a positive integer or None, got {chunk_tokens!r}",
    )
    require(hidden.ndim >= 1, "hidden must be floating (..., H), got a scalar")
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    if vocab_size is None and hidden_TH.shape[0]:
        with torch.no_grad():
            vocab_size = head(hidden_TH[:1]).shape[-1]
    tokens = select_tokens(
        hidden,
        targets,
        ignore_index=ignore_index,
        vocab_size=vocab_size,
        dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32,
        token_weight=token_weight,
        exponent=exponent,
        min_weight=min_weight,
    )
    N = len(tokens)
    if N == 0:
        # One row of logits, none of it used: a zero with a graph, for heads that cannot take an empty batch.
        loss = head(hidden_TH[:1])[:0].sum(dtype=_summed(hidden))
        return TokenLoss(loss, loss.new_zeros(targets.shape))

    def chunk_loss(rows_RH: torch.Tensor, chunk: slice) -> tuple[torch.Tensor, torch.Tensor]:
        nll_R = _LogitsNLL.apply(head(rows_RH), tokens.targets_N[chunk])
        return (tokens.paid(nll_R.detach(), chunk) * nll_R).sum(), nll_R.detach()

    if chunk_tokens is None:
        assert vocab_size is not None
        budget = _CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
        chunk_tokens = max(1, budget // (4 * vocab_size))
    rows = math.ceil(N / math.ceil(N / chunk_tokens))
    parts = []
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        rows_RH = hidden_TH[chunk if tokens.rows_N is None else tokens.rows_N[chunk]]
        again = torch.is_grad_enabled() and rows < N
        part = checkpoint(chunk_loss, rows_RH, chunk, use_reentrant=False) if again else chunk_loss(rows_RH, chunk)
        parts.append(part)
    loss = torch.stack([part for part, _ in parts]).sum()
    return TokenLoss(loss, spread(torch.cat([nll_R for _, nll_R in parts]), tokens.rows_N, targets.shape))


def _summed(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _LogitsNLL(torch.autograd.Function):
    """−log softmax(logits)[target] per row, in fp32 or wider whatever the logits are."""

    @staticmethod
    def forward(ctx: Any, logits_RV: torch.Tensor, targets_R: torch.Tensor) -> torch.Tensor:
        exp_RV = logits_RV.to(_summed(logits_RV), copy=True)
        targets_R1 = targets_R[:, None]
        target_R = exp_RV.gather(1, targets_R1)[:, 0]
        exp_RV.scatter_(1, targets_R1, -math.inf)
        reference_R = exp_RV.amax(1).clamp_(min=torch.finfo(exp_RV.dtype).min)
        exp_RV.sub_(reference_R[:, None]).exp_()
        others_R = exp_RV.sum(1)
        nll_R, miss_R = exact_nll(others_R, reference_R, target_R)
        ctx.save_for_backward(exp_RV, others_R, miss_R, targets_R1)
        ctx.dtype = logits_RV.dtype
        return nll_R

    @staticmethod
    def backward(ctx: Any, grad_R: torch.Tensor) -> tuple[torch.Tensor, None]:
        refuse_second_derivative()
        exp_RV, others_R, miss_R, targets_R1 = ctx.saved_tensors
        factor_R = grad_R * miss_R
        others_R = factor_R / others_R.clamp(min=torch.finfo(others_R.dtype).tiny)
        grad_RV = torch.mul(exp_RV, others_R[:, None], out=torch.empty_like(exp_RV, dtype=ctx.dtype))
        return grad_RV.scatter_(1, targets_R1, -factor_R[:, None].to(ctx.dtype)), None
