"""Wrong losses, each by one mistake somebody has made. A check of the loss that accepts one of them is decoration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.stable_nll import LinearCrossEntropyOutput
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Term, TokenLoss

MISTAKES = (
    "1 - p",
    "bias added after the scale",
    "bias dropped",
    "divided by the weights",
    "exponent ignored",
    "floor added",
    "floor dropped",
    "floor under p, not p^a",
    "ignored tokens paid",
    "logit_scale divides",
    "logit_scale dropped",
    "mean, not sum",
    "nll weighted",
    "one exponent for all tokens",
    "p in bf16",
    "p not detached",
    "shifted once more",
    "sign of the weight lost",
    "softcap dropped",
    "softcap without its slope",
    "token_weight dropped",
    "token_weight of the neighbour",
    "upstream gradient ignored",
    "weight detached",
    "wrong sign",
    "wrong target",
)

TERM_MISTAKES = (
    "1 - H",
    "entropy of the logits over the whole vocabulary",
    "entropy not normalised",
    "entropy not renormalised over the top k",
    "first term only",
    "focal factor detached",
    "focal factor is p",
    "gamma ignored",
    "gate not detached",
    "normalised by the vocabulary",
    "target left out of the top k",
    "terms share a weight",
    "threshold dropped",
    "threshold on p^a",
    "threshold upside down",
    "token_weight of the neighbour",
    "k is one less",
)

ANCHOR_MISTAKES = (
    "KL of the target only",
    "KL the other way round",
    "anchor weight ignored",
    "anchor weighted by p",
    "base without the softcap",
    "cross-entropy, not KL",
    "mean over the vocabulary",
    "our head for the base's",
    "pulls away",
)


UNLIKELIHOOD_MISTAKES = (
    "a term of p",
    "minus nll",
    "p of 1 - p detached",
    "pulls up",
    "unlikelihood dropped",
    "unlikelihood of the neighbour",
)


def naive(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    exponent: torch.Tensor | float = 0.0,
    min_weight: torch.Tensor | float = 0.0,
    terms: Sequence[Term] | None = None,
    anchor: Anchor | None = None,
    unlikelihood: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    ignore_index: int = -100,
    mistake: str = "",
) -> LinearCrossEntropyOutput:
    """Full logits and autograd; with a `mistake`, wrong in that one way."""
    if mistake == "weight detached":
        weight = weight.detach()
    if mistake == "bias dropped":
        bias = None
    scale = 1.0 if logit_scale is None or mistake == "logit_scale dropped" else logit_scale
    if mistake == "logit_scale divides":
        scale = 1 / scale
    if mistake == "bias added after the scale" and bias is not None:
        logits = F.linear(hidden, weight) * scale + bias
    else:
        logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None and mistake != "softcap dropped":
        capped = softcap * torch.tanh(logits / softcap)
        logits = capped.detach() + logits - logits.detach() if mistake == "softcap without its slope" else capped
    logits = logits if logits.dtype == torch.float64 else logits.float()

    keep = targets != ignore_index
    asked = targets.clamp(min=0)
    if mistake == "wrong target":
        asked = (asked + 1) % weight.shape[0]
    if mistake == "shifted once more":
        asked = asked.roll(-1, -1)
    nll = -torch.log_softmax(logits, -1).gather(-1, asked[..., None])[..., 0]
    if mistake != "ignored tokens paid":
        nll = torch.where(keep, nll, 0.0)

    if terms is not None:
        loss = _several(terms, logits, asked, nll, mistake)
        if anchor is not None:
            base = _base_logits(anchor, weight, bias, scale, None if mistake == "base without the softcap" else softcap, mistake)
            loss = loss + _anchored(anchor, logits, base.to(logits.dtype), asked, nll, keep, mistake)
        if unlikelihood is not None:
            loss = loss + _unlikelihood(unlikelihood, nll, mistake)
        return LinearCrossEntropyOutput(loss, nll.detach())
    p = torch.exp(-nll)
    if mistake != "p not detached":
        p = p.detach()
    if mistake == "p in bf16":
        p = torch.softmax(logits.detach().bfloat16(), -1).gather(-1, asked[..., None])[..., 0].to(nll.dtype)
    if mistake == "1 - p":
        p = 1 - p
    if mistake == "one exponent for all tokens" and isinstance(exponent, torch.Tensor):
        exponent = exponent.mean()
    floor = torch.as_tensor(min_weight, dtype=p.dtype)
    paid = {
        "exponent ignored": lambda: torch.maximum(p, floor),
        "floor under p, not p^a": lambda: torch.maximum(p, floor) ** exponent,
        "floor added": lambda: p**exponent + floor,
        "floor dropped": lambda: p**exponent,
    }.get(mistake, lambda: torch.maximum(p**exponent, floor))()
    if token_weight is not None and mistake != "token_weight dropped":
        paid = paid * (token_weight.roll(1, -1) if mistake == "token_weight of the neighbour" else token_weight)
    if mistake == "sign of the weight lost":
        paid = paid.abs()

    loss = (paid * nll).sum()
    if mistake == "wrong sign":
        loss = -loss
    if mistake == "mean, not sum":
        loss = loss / keep.sum()
    if mistake == "divided by the weights":
        loss = loss / paid.sum()
    if mistake == "upstream gradient ignored":
        loss = _UpstreamIgnored.apply(loss)
    return LinearCrossEntropyOutput(loss, (paid * nll if mistake == "nll weighted" else nll).detach())


def _several(terms: Sequence[Term], logits: torch.Tensor, asked: torch.Tensor, nll: torch.Tensor, mistake: str) -> torch.Tensor:
    """Σ over terms and tokens of weight·ℓ."""
    total = nll.new_zeros(())
    for term in terms[:1] if mistake == "first term only" else terms:
        weight = (terms[0] if mistake == "terms share a weight" else term).weight
        weight = torch.ones_like(nll) if weight is None else weight
        if mistake == "token_weight of the neighbour":
            weight = weight.roll(1, -1)
        total = total + (weight * _pays(term.objective, logits, asked, nll, mistake)).sum()
    return total


def _pays(objective: TokenLoss, logits: torch.Tensor, asked: torch.Tensor, nll: torch.Tensor, mistake: str) -> torch.Tensor:
    p = torch.exp(-nll)
    if isinstance(objective, Focal):
        gamma = 1.0 if mistake == "gamma ignored" else objective.gamma
        factor = (p if mistake == "focal factor is p" else 1 - p) ** gamma
        return (factor.detach() if mistake == "focal factor detached" else factor) * nll
    if isinstance(objective, EntropyGate):
        k = min(objective.top_k, logits.shape[-1]) - (mistake == "k is one less")
        seen = logits
        if mistake == "target left out of the top k":
            seen = logits.scatter(-1, asked[..., None], -1e9)
        log_q = seen.topk(k).values.log_softmax(-1)
        if mistake == "entropy not renormalised over the top k":
            log_q = seen.log_softmax(-1).topk(k).values
        if mistake == "entropy of the logits over the whole vocabulary":
            log_q = seen.log_softmax(-1)
        entropy = -(log_q.exp() * log_q).sum(-1)
        if mistake != "entropy not normalised":
            entropy = entropy / math.log(logits.shape[-1] if mistake == "normalised by the vocabulary" else k)
        gate = (1 - entropy if mistake == "1 - H" else entropy) ** objective.exponent
        return (gate if mistake == "gate not detached" else gate.detach()) * nll
    assert isinstance(objective.min_weight, float)
    weight = (p**objective.exponent).clamp(min=objective.min_weight)
    over = (weight if mistake == "threshold on p^a" else p) >= objective.threshold
    if mistake == "threshold upside down":
        over = ~over
    if mistake == "threshold dropped":
        over = torch.zeros_like(over)
    return torch.where(over, 1.0, weight).detach() * nll


def _unlikelihood(weight: torch.Tensor, nll: torch.Tensor, mistake: str) -> torch.Tensor:
    p = torch.exp(-nll)
    if mistake == "unlikelihood of the neighbour":
        weight = weight.roll(1, -1)
    each = {
        "minus nll": -nll,
        "a term of p": p,
        "p of 1 - p detached": p.detach() * nll,
        "pulls up": torch.log1p(-p),
        "unlikelihood dropped": 0 * nll,
    }.get(mistake, -torch.log1p(-p))
    return torch.where(weight != 0, weight * each, 0.0).sum()


def _base_logits(
    anchor: Anchor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, softcap: float | None, mistake: str
) -> torch.Tensor:
    assert not callable(anchor.head)
    if anchor.head is not None and mistake != "our head for the base's":
        weight, bias = anchor.head
    logits = (F.linear(anchor.hidden, weight, bias) * scale).detach()
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _anchored(
    anchor: Anchor,
    logits: torch.Tensor,
    base: torch.Tensor,
    asked: torch.Tensor,
    nll: torch.Tensor,
    keep: torch.Tensor,
    mistake: str,
) -> torch.Tensor:
    log_p, log_q = logits.log_softmax(-1), base.log_softmax(-1)
    each = log_q.exp() * (log_q - log_p)
    if mistake == "KL the other way round":
        each = log_p.exp() * (log_p - log_q)
    if mistake == "cross-entropy, not KL":
        each = -log_q.exp() * log_p
    kl = each.mean(-1) if mistake == "mean over the vocabulary" else each.sum(-1)
    if mistake == "KL of the target only":
        kl = each.gather(-1, asked[..., None])[..., 0]
    if mistake == "anchor weighted by p":
        kl = kl * torch.exp(-nll).detach()
    weight = torch.ones_like(kl) if mistake == "anchor weight ignored" else anchor.weight
    total = (torch.where(keep, kl, 0.0) * weight).sum()
    return -total if mistake == "pulls away" else total


def mutant(mistake: str) -> Callable[..., LinearCrossEntropyOutput]:
    def wrong(*args: Any, **kwargs: Any) -> LinearCrossEntropyOutput:
        return naive(*args, **kwargs, mistake=mistake)

    return wrong


class _UpstreamIgnored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(grad)
