"""The same loss for a head that is a callable, not a matrix: LoRA on it, a quantised weight, operations we cannot fold.

Shapes: … any leading shape with T positions, N of them targets, R rows of a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dwl_plugin.loss.stable_nll import LinearCrossEntropyOutput, exact_nll, output_at, refuse_second_derivative
from dwl_plugin.loss.tokens import Targets, Tokens, require, select_tokens
from dwl_plugin.loss.top_logits import TopLogits

__all__ = ["module_cross_entropy"]

_CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of fp32 logits; about three times as much is alive in a backward


def module_cross_entropy(
    hidden: Tensor,
    head: Callable[[Tensor], Tensor],
    given: Targets,
    *,
    vocab_size: int | None = None,
    chunk_tokens: int | None = None,
) -> LinearCrossEntropyOutput:
    """The weighted sum of token losses under any head, and the unweighted loss of each token:

        nll  = F.cross_entropy(head(hidden.flatten(0, -2)).float(), given.targets.flatten(), reduction="none")
        loss = sum((term.weight * term.objective(nll)).sum() for term in given.terms)

    `head` maps (R, H) to (R, V), row by row, and is called on chunks of target tokens; each chunk's logits are computed
    again in the backward, so only one chunk of them exists at a time. Gradients reach whatever parameters `head` uses. The result
    is that of `linear_cross_entropy`.

    Args:
        hidden: (…, H) floating.
        given: the targets (…) and what they pay; the `head` of an anchor has to be a callable like `head`.
        vocab_size: V, if it is known; otherwise one row is sent through `head` to learn it.
        chunk_tokens: rows of a chunk; None takes as many as fit a byte budget.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range.
    """
    is_size = chunk_tokens is None or (isinstance(chunk_tokens, int) and chunk_tokens > 0)
    require(is_size, f"chunk_tokens must be a positive integer or None, got {chunk_tokens!r}")
    require(given.anchor is None or callable(given.anchor.head), "anchor.head must be a callable here")
    require(hidden.ndim >= 1, "hidden must be floating (..., H), got a scalar")
    hidden_TH = hidden.reshape(-1, hidden.shape[-1])
    if vocab_size is None and hidden_TH.shape[0]:
        with torch.no_grad():
            vocab_size = head(hidden_TH[:1]).shape[-1]
    dtype, targets = _summed(hidden), given.targets
    tokens = select_tokens(hidden, given, vocab_size=vocab_size, dtype=dtype)
    N = len(tokens)
    if N == 0:
        # One row of logits, none of it used: a zero with a graph, for heads that cannot take an empty batch.
        loss = head(hidden_TH[:1])[:0].sum(dtype=dtype)
        nothing = loss.new_zeros(targets.shape)
        return LinearCrossEntropyOutput(loss, nothing, (nothing,) * len(tokens.terms), None if tokens.anchor is None else nothing)

    def chunk_loss(rows_RH: Tensor, chunk: slice) -> _Part:
        base_RV = None
        if tokens.anchor is not None:
            assert callable(tokens.anchor.head)
            with torch.no_grad():
                base_RV = tokens.anchor.head(tokens.anchor.hidden[tokens.positions(chunk)])
        return _LogitsLoss.apply(head(rows_RH), base_RV, tokens, chunk)  # type: ignore[no-any-return]

    if chunk_tokens is None:
        assert vocab_size is not None
        budget = _CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
        chunk_tokens = max(1, budget // (4 * vocab_size * (1 if tokens.anchor is None else 2)))
    rows = math.ceil(N / math.ceil(N / chunk_tokens))
    parts = []
    for start in range(0, N, rows):
        chunk = slice(start, min(start + rows, N))
        rows_RH = hidden_TH[tokens.positions(chunk)]
        again = torch.is_grad_enabled() and rows < N
        parts.append(checkpoint(chunk_loss, rows_RH, chunk, use_reentrant=False) if again else chunk_loss(rows_RH, chunk))
    losses, nlls, factors, kls = zip(*parts, strict=True)
    kl_N = None if tokens.anchor is None else torch.cat(kls)
    return output_at(tokens.rows_N, targets.shape, torch.stack(losses).sum(), torch.cat(nlls), torch.cat(factors, 1), kl_N)


_Part = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Of a chunk: the loss; nll, factors and KL of its tokens."""


def _summed(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _LogitsLoss(torch.autograd.Function):
    """What the tokens of a chunk pay, summed, their nll and factors; in fp32 or wider whatever the logits are."""

    @staticmethod
    def forward(ctx: Any, logits_RV: Tensor, base_RV: Tensor | None, tokens: Tokens, chunk: slice) -> _Part:
        exp_RV = logits_RV.to(_summed(logits_RV), copy=True)
        top_Rk, share_RV = None, None
        if tokens.top_k:
            top = TopLogits(tokens, chunk, exp_RV.shape[1])
            top.update(exp_RV)
            top_Rk = top.of_rows(len(exp_RV))
        if base_RV is not None:
            log_share_RV = base_RV.to(exp_RV.dtype).log_softmax(1)
            share_RV = log_share_RV.exp()
            # Σ q·(log q − z); 0 where q is, even if z is −inf there
            cross_R = log_share_RV.sub_(exp_RV).masked_fill_(share_RV == 0, 0.0).mul_(share_RV).sum(1)
        targets_R1 = tokens.targets_N[chunk, None]
        target_R = exp_RV.gather(1, targets_R1)[:, 0]
        exp_RV.scatter_(1, targets_R1, -math.inf)
        max_R = exp_RV.amax(1).clamp_(min=torch.finfo(exp_RV.dtype).min)
        exp_RV.sub_(max_R[:, None]).exp_()
        sum_exp_others_R = exp_RV.sum(1)
        nll_R, one_minus_p_R = exact_nll(sum_exp_others_R, max_R, target_R)
        kl_R = None if share_RV is None else (cross_R + nll_R + target_R).clamp_(min=0)
        anchor_R = None if tokens.anchor is None else tokens.anchor.weight[chunk]
        value = tokens.token_losses(nll_R, one_minus_p_R, top_Rk, kl_R, chunk, slope=ctx.needs_input_grad[0])
        ctx.save_for_backward(exp_RV, sum_exp_others_R, value.grad_coef_R, value.target_coef_R, targets_R1, share_RV, anchor_R)
        ctx.dtype = logits_RV.dtype
        ctx.mark_non_differentiable(*(part for part in (nll_R, value.factors_KR, kl_R) if part is not None))
        return value.loss_R.sum(), nll_R, value.factors_KR, kl_R

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None, None]:
        refuse_second_derivative()
        exp_RV, sum_exp_others_R, grad_coef_R, target_coef_R, targets_R1, share_RV, anchor_R = ctx.saved_tensors
        exp_coef_R = grad * grad_coef_R / sum_exp_others_R.clamp(min=torch.finfo(sum_exp_others_R.dtype).tiny)
        dtype = ctx.dtype if share_RV is None else exp_RV.dtype
        grad_RV = torch.mul(exp_RV, exp_coef_R[:, None], out=torch.empty_like(exp_RV, dtype=dtype))
        grad_RV.scatter_(1, targets_R1, -(grad * target_coef_R)[:, None].to(dtype))
        if share_RV is not None:
            grad_RV.addcmul_(share_RV, (grad * anchor_R)[:, None], value=-1)
        return grad_RV.to(ctx.dtype), None, None, None
