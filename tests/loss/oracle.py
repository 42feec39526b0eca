"""The loss by its definition: one token at a time, in fp64, gradients by hand from ∂nll/∂z = softmax(z) − onehot(y)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Case:
    """Arguments of `linear_cross_entropy`; per-token ones are tensors of the shape of `targets`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    token_weight: torch.Tensor | None = None
    exponent: torch.Tensor | float = 0.0
    min_weight: torch.Tensor | float = 0.0
    bias: torch.Tensor | None = None
    softcap: float | None = None
    logit_scale: float | None = None
    ignore_index: int = -100


@dataclass
class Truth:
    loss: torch.Tensor
    nll: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None


def per_token(case: Case) -> Truth:
    targets = case.targets.reshape(-1).tolist()
    hidden = case.hidden.detach().double().reshape(len(targets), case.hidden.shape[-1])
    weight = case.weight.detach().double()
    bias = torch.zeros(weight.shape[0], dtype=torch.float64) if case.bias is None else case.bias.detach().double()
    scale = 1.0 if case.logit_scale is None else case.logit_scale

    def of(value: torch.Tensor | float | None, t: int) -> float:
        if isinstance(value, torch.Tensor):
            return value.double().reshape(-1)[t].item()
        return 1.0 if value is None else float(value)

    loss, nll = 0.0, torch.zeros(len(targets), dtype=torch.float64)
    grad_hidden, grad_weight, grad_bias = torch.zeros_like(hidden), torch.zeros_like(weight), torch.zeros_like(bias)
    for t, target in enumerate(targets):
        if target == case.ignore_index:
            continue
        before_cap = scale * (weight @ hidden[t] + bias)
        logits, slope = before_cap, torch.ones_like(before_cap)
        if case.softcap is not None:
            logits = case.softcap * torch.tanh(before_cap / case.softcap)
            slope = torch.cosh(before_cap / case.softcap) ** -2
        others = torch.cat([logits[:target], logits[target + 1 :]])
        odds = math.inf if logits[target] == -math.inf else float(torch.logsumexp(others, 0) - logits[target])
        nll[t] = odds + math.log1p(math.exp(-odds)) if odds > 0 else math.log1p(math.exp(odds))
        paid = of(case.token_weight, t) * max(math.exp(-of(case.exponent, t) * nll[t].item()), of(case.min_weight, t))
        loss += paid * nll[t].item()
        grad_logits = torch.softmax(logits, 0)
        grad_logits[target] = 0.0
        grad_logits[target] = -(1 / (1 + math.exp(-odds)) if odds > -700 else 0.0)  # −(1 − p)
        grad_logits *= paid * slope * scale
        grad_hidden[t] = grad_logits @ weight
        grad_weight += grad_logits[:, None] * hidden[t]
        grad_bias += grad_logits
    return Truth(
        torch.tensor(loss, dtype=torch.float64),
        nll.reshape(case.targets.shape),
        grad_hidden.reshape(case.hidden.shape),
        grad_weight,
        None if case.bias is None else grad_bias,
    )


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖, and the absolute error where nothing is wanted."""
    error = (got.detach().double() - want.detach().double()).norm().item()
    size = want.detach().double().norm().item()
    return error / size if size else error
