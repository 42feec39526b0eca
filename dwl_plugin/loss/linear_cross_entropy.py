"""The public loss: a linear head and a token-weighted cross-entropy as one operation that never holds all logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from dwl_plugin.loss import cpu_walk, gpu_walk
from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.heads import LinearHead
from dwl_plugin.loss.stable_nll import LinearCrossEntropyOutput, output_at, refuse_second_derivative, spread
from dwl_plugin.loss.token_losses import Term
from dwl_plugin.loss.tokens import Targets, brief, is_finite, require, select_tokens, terms_of
from dwl_plugin.loss.walk import Gradients, NeedsGrad, WalkResult

__all__ = ["LinearCrossEntropyOutput", "fused_cross_entropy", "linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    token_weight: Tensor | None = None,
    exponent: Tensor | float = 0.0,
    min_weight: Tensor | float = 0.0,
    terms: Sequence[Term] | None = None,
    anchor: Anchor | None = None,
    unlikelihood: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    ignore_index: int = -100,
) -> LinearCrossEntropyOutput:
    """The weighted sum of token losses, and the unweighted loss of each token:

        logits = logit_scale * F.linear(hidden, weight, bias)
        logits = softcap * tanh(logits / softcap)
        nll    = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
        loss   = (token_weight * (-nll).exp().pow(exponent).clamp(min=min_weight).detach() * nll).sum()

    without ever holding the logits: ignored positions are dropped before the first matmul, the rest goes through the
    vocabulary in tiles, and the gradients are taken on the way (two matmuls with a frozen `weight`; three with a trained one, and
    on a GPU up to four where there are more targets than H; one when nothing wants a gradient). `exponent` 0 is the plain negative
    log-likelihood, 1 is DFT (arXiv:2508.05629).

    Shapes: … any leading shape, H hidden size, V vocabulary.

    Args:
        hidden: (…, H), fp64, fp32, bf16 or fp16. Position t has to predict `targets[t]`; nothing is shifted here.
        weight: (V, H). Mixed dtypes are multiplied in the wider one, under autocast in autocast's.
        targets: (…) integers in [0, V), or `ignore_index`.
        token_weight: (…), any sign; None is 1 everywhere. A constant: no gradient flows into it.
        exponent: a number ≥ 0, or one per token (…), since classes of one batch may differ. A constant.
        min_weight: a number ≥ 0, or one per token (…): the floor of p^exponent. A constant.
        terms: what a token pays instead of what the three above say: Σ over the terms of weight·ℓ, with a token loss ℓ of
            `dwl_plugin.loss.token_losses` and a weight like token_weight.
        anchor: adds weight·KL(base‖θ) of each token, the divergence from a base model over the vocabulary (ASFT,
            arXiv:2509.23753); see `dwl_plugin.loss.anchor.Anchor`. Two more matmuls, and one with a trained `weight`.
        unlikelihood: (…) like token_weight: adds unlikelihood·(−log(1 − p)) of each token, whose gradient in the logits vanishes as
            p → 0 (arXiv:1908.04319). A constant.
        bias: (V,) or None.
        softcap: a number > 0 or None.
        logit_scale: a finite number or None.
        ignore_index: the target that means "no target here".

    Returns:
        LinearCrossEntropyOutput(loss, nll, factors, kl). `loss`: a scalar, in nats; with no target it is 0 and still has its
        graph. `nll`: (…), detached, 0 at ignored positions; `factors`: likewise, one per term; `kl`: likewise, of an anchor. All
        are fp32 (fp64 if the matmul is) whatever the inputs; gradients have the inputs' dtypes.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or range. On CUDA, values inside tensors are asserted
            by the device, so that nothing waits for it; one wait per call remains, for the number of targets.
        RuntimeError: on a backward with `create_graph=True`.

    Workspace is bounded whatever the number of tokens and V; beyond it there are the gradients themselves, on a CPU in fp32, and on
    a GPU with a trained `weight` the target tokens' rows of `hidden`, where not all are targets or others multiply. The first
    backward hands the gradients out; another one through a retained graph takes them again.
    """
    given = Targets(targets, terms_of(terms, token_weight, exponent, min_weight), anchor, ignore_index, unlikelihood)
    return fused_cross_entropy(hidden, weight, given, bias=bias, softcap=softcap, logit_scale=logit_scale)


def fused_cross_entropy(
    hidden: Tensor, weight: Tensor, given: Targets, *, bias: Tensor | None, softcap: float | None, logit_scale: float | None
) -> LinearCrossEntropyOutput:
    """`linear_cross_entropy`, for callers who have the terms."""
    if torch.compiler.is_compiling():
        return _uncompiled()(hidden, weight, given, bias=bias, softcap=softcap, logit_scale=logit_scale)
    fits = weight.ndim == 2 and weight.is_floating_point() and hidden.ndim >= 1 and weight.shape[1] == hidden.shape[-1]
    require(fits, f"weight must be floating (V, H) with the H of hidden {tuple(hidden.shape)}, got {brief(weight)}")
    V, device = weight.shape[0], hidden.device
    require(V > 0, "weight must have at least one row, got (0, H)")
    require(weight.device == device, f"weight must be on {device} like hidden, got {weight.device}")
    if bias is not None:
        fits = bias.shape == (V,) and bias.is_floating_point() and bias.device == device
        require(fits, f"bias must be floating ({V},) on {device}, got {brief(bias)} on {bias.device}")
    require(softcap is None or (is_finite(softcap) and softcap > 0), f"softcap must be a finite number above 0, got {softcap!r}")
    require(logit_scale is None or is_finite(logit_scale), f"logit_scale must be a finite number, got {logit_scale!r}")
    scale = 1.0 if logit_scale is None else float(logit_scale)
    softcap = None if softcap is None else float(softcap)
    head_of = partial(LinearHead, scale=scale, softcap=softcap, multiplied=_multiplied_dtype(hidden, weight))
    tokens = select_tokens(hidden, given, vocab_size=V, dtype=head_of(weight, bias).summed)
    learns = [tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)]
    needs_grad = NeedsGrad(*(torch.is_grad_enabled() and learn for learn in learns))
    walk, base_of = _walk_of(device), None if tokens.anchor is None else _base_head_of(tokens.anchor, V)

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> WalkResult:
        """Holds on to no weight: ZeRO-3 takes a gathered one away after the forward, and gathers it again for the backward."""
        head = head_of(weight.detach(), _detached(bias))
        return walk(hidden, tokens, head, None if base_of is None else base_of(head), needs_grad)

    if needs_grad.hidden or needs_grad.head:
        loss, nll_N, factors_KN, kl_N = _LinearCrossEntropy.apply(hidden, weight, bias, run, tokens.rows_N)
    else:
        result = run(hidden, weight, bias)
        loss, nll_N, factors_KN, kl_N = result.loss, result.nll_N, result.factors_KN, result.kl_N
    return output_at(tokens.rows_N, given.targets.shape, loss, nll_N, factors_KN, kl_N)


def _walk_of(device: torch.device) -> Callable[..., WalkResult]:
    return cpu_walk.forward_backward if device.type == "cpu" else gpu_walk.forward_backward


def _base_head_of(anchor: Anchor, V: int) -> Callable[[LinearHead], LinearHead]:
    """From our head to the base model's, in the dtypes of now: a backward is outside of autocast."""
    require(not callable(anchor.head), "anchor.head must be None or (weight, bias) here; `module_cross_entropy` takes a callable")
    if anchor.head is None:
        return lambda ours: ours
    assert isinstance(anchor.head, tuple)
    weight, bias = anchor.head
    fits = weight.shape == (V, anchor.hidden.shape[-1]) and (bias is None or bias.shape == (V,))
    require(fits, f"anchor.head must be a (V, H) weight with V = {V} and a (V,) bias or None, got {brief(weight)}")
    multiplied = _multiplied_dtype(anchor.hidden, weight)
    return lambda ours: LinearHead(weight.detach(), _detached(bias), ours.scale, ours.softcap, multiplied)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


@cache
def _uncompiled() -> Callable[..., LinearCrossEntropyOutput]:
    # Built at first use: the decorator would import torch's compiler into every process.
    eager: Callable[..., LinearCrossEntropyOutput] = torch.compiler.disable(fused_cross_entropy)  # type: ignore[no-untyped-call]
    return eager


def _multiplied_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype F.linear multiplies in."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return dtype


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        run: Callable[[Tensor, Tensor, Tensor | None], WalkResult],
        rows_N: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        result = run(hidden, weight, bias)
        ctx.run, ctx.gradients = run, result.gradients
        ctx.save_for_backward(hidden, weight, bias, rows_N)
        detached = (result.nll_N, result.factors_KN, result.kl_N)
        ctx.mark_non_differentiable(*(tensor for tensor in detached if tensor is not None))
        return result.loss, *detached

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        hidden, weight, bias, rows_N = ctx.saved_tensors
        # Handed out and forgotten, so that ∂W is scaled where it lies: a copy would be the largest tensor of all.
        gradients: Gradients = ctx.gradients or ctx.run(hidden, weight, bias).gradients
        ctx.gradients = None
        scaled = partial(_scaled, gradients.scale, by=grad_loss)
        grad = scaled(gradients.hidden, like=hidden)
        at_all = grad is not None and len(grad) == hidden.shape[:-1].numel()
        grad_hidden = None if grad is None else spread(grad, None if at_all else rows_N, hidden.shape)
        return grad_hidden, scaled(gradients.weight_VH, like=weight), scaled(gradients.bias_V, like=bias), None, None


def _scaled(scale: Callable[[Tensor, Tensor], None], gradient: Tensor | None, *, by: Tensor, like: Tensor | None) -> Tensor | None:
    """gradient · by in the dtype of `like`, rounded once; where it lies, if the dtype allows."""
    if gradient is None or like is None:
        return None
    if gradient.dtype != like.dtype and by.device.type != "cpu":  # one kernel; a CPU would convert all of it beforehand
        return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=like.dtype))
    scale(gradient, by)
    return gradient.to(like.dtype)
