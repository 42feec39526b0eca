"""Wrong losses, each by one mistake somebody has made. A check of the loss that accepts one of them is decoration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from dwl_plugin.loss.exact_nll import TokenLoss

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


def naive(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    token_weight: torch.Tensor | None = None,
    exponent: torch.Tensor | float = 0.0,
    min_weight: torch.Tensor | float = 0.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float | None = None,
    ignore_index: int = -100,
    mistake: str = "",
) -> TokenLoss:
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
    return TokenLoss(loss, (paid * nll if mistake == "nll weighted" else nll).detach())


def mutant(mistake: str) -> Callable[..., TokenLoss]:
    def wrong(*args: Any, **kwargs: Any) -> TokenLoss:
        return naive(*args, **kwargs, mistake=mistake)

    return wrong


class _UpstreamIgnored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(grad)
