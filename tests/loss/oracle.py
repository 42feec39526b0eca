"""The loss by its definition: one token at a time, in fp64, gradients by hand from ∂nll/∂z = softmax(z) − onehot(y)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Term, TokenLoss


@dataclass
class Case:
    """Arguments of `linear_cross_entropy`; per-token ones are tensors of the shape of `targets`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    token_weight: torch.Tensor | None = None
    exponent: torch.Tensor | float = 0.0
    min_weight: torch.Tensor | float = 0.0
    terms: Sequence[Term] | None = None
    anchor: Anchor | None = None
    unlikelihood: torch.Tensor | None = None
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
    kl: torch.Tensor


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

    loss, nll, kl = 0.0, *torch.zeros(2, len(targets), dtype=torch.float64)
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
        if case.terms is None:
            paid = max(math.exp(-of(case.exponent, t) * nll[t].item()), of(case.min_weight, t))
            paid *= of(case.token_weight, t)
            loss += paid * nll[t].item()
        else:
            paid = 0.0
            for term in case.terms:
                pays, slope_of_it = token_loss(term.objective, nll[t].item(), odds, logits)
                loss += of(term.weight, t) * pays
                paid += of(term.weight, t) * slope_of_it
        grad_logits = torch.softmax(logits, 0)
        grad_logits[target] = 0.0
        grad_logits[target] = -(1 / (1 + math.exp(-odds)) if odds > -700 else 0.0)  # −(1 − p)
        grad_logits *= paid
        if case.unlikelihood is not None:  # −log(1 − p): −p for the others together, +p for the target
            below, p = of(case.unlikelihood, t), math.exp(-nll[t].item())
            loss += below * (math.log1p(math.exp(-odds)) if odds > 0 else math.log1p(math.exp(odds)) - odds)
            q = torch.softmax(logits.where(torch.arange(len(logits)) != target, -math.inf), 0)
            q[target] = -1.0
            grad_logits -= below * p * q
        if case.anchor is not None:
            share = torch.softmax(base_logits(case, case.anchor, t), 0)
            p = torch.softmax(logits, 0)
            kl[t] = math.fsum(q * (math.log(q) - math.log(mine)) for q, mine in zip(share.tolist(), p.tolist(), strict=True) if q)
            anchored = of(case.anchor.weight, t)
            loss += anchored * kl[t].item()
            grad_logits += anchored * (p - share)
        grad_logits *= slope * scale
        grad_hidden[t] = grad_logits @ weight
        grad_weight += grad_logits[:, None] * hidden[t]
        grad_bias += grad_logits
    return Truth(
        torch.tensor(loss, dtype=torch.float64),
        nll.reshape(case.targets.shape),
        grad_hidden.reshape(case.hidden.shape),
        grad_weight,
        None if case.bias is None else grad_bias,
        kl.reshape(case.targets.shape),
    )


def base_logits(case: Case, anchor: Anchor, t: int) -> torch.Tensor:
    """Of the base model at token t: its own hidden states and perhaps its own head, under the scale and the cap of the case."""
    assert not callable(anchor.head)
    weight, bias = (case.weight, case.bias) if anchor.head is None else anchor.head
    logits = weight.double() @ anchor.hidden.double().reshape(-1, anchor.hidden.shape[-1])[t]
    logits = (1.0 if case.logit_scale is None else case.logit_scale) * (logits if bias is None else logits + bias.double())
    return logits if case.softcap is None else case.softcap * torch.tanh(logits / case.softcap)


def token_loss(objective: TokenLoss, nll: float, odds: float, logits: torch.Tensor) -> tuple[float, float]:
    """ℓ and dℓ/dnll = −p·dℓ/dp, from the formulas of the papers in p. `odds` is log((1 − p)/p)."""
    p, miss = math.exp(-nll), 1 / (1 + math.exp(-odds)) if odds > -700 else 0.0
    if isinstance(objective, Focal):  # ℓ = −(1 − p)^γ·log p
        gamma = objective.gamma
        if miss == 0.0:
            return 0.0, 1.0 if gamma == 0 else 0.0
        dldp = -(miss**gamma) / p - gamma * miss ** (gamma - 1) * nll
        return miss**gamma * nll, -p * dldp
    if isinstance(objective, EntropyGate):  # ℓ = −sg(H_k / ln k)^a·log p
        top = sorted(logits.tolist(), reverse=True)[: objective.top_k]
        whole = math.fsum(math.exp(z - top[0]) for z in top)
        shares = [math.exp(z - top[0]) / whole for z in top]
        entropy = -math.fsum(q * math.log(q) for q in shares if q > 0)
        gate = (entropy / math.log(len(top))) ** objective.exponent if len(top) > 1 else 0.0**objective.exponent
        return gate * nll, gate
    assert isinstance(objective.exponent, float)
    assert isinstance(objective.min_weight, float)
    weight = max(p**objective.exponent, objective.min_weight) if p < objective.threshold else 1.0
    return weight * nll, weight


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """‖got − want‖ / ‖want‖, and the absolute error where nothing is wanted."""
    error = (got.detach().double() - want.detach().double()).norm().item()
    size = want.detach().double().norm().item()
    return error / size if size else error
