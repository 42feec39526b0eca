"""The loss that the package has as documentation, against the definitions that the tests state by themselves, and against the
fused one."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from dwl_plugin.config import Reduction
from dwl_plugin.loss.linear_cross_entropy import linear_cross_entropy
from dwl_plugin.loss.reduction import class_weights
from dwl_plugin.loss.reference import reference_loss
from dwl_plugin.loss.shift import shift_left
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term
from dwl_plugin.values import SAMPLE_POWERS
from tests.loss.oracle import token_loss
from tests.loss.test_reduction import Token, naive

ALPHA = [0.4, 0.3, 0.2, 0.1]
TOKEN_LOSSES = [Power(1.0, 0.05, 0.7), Focal(1.5), EntropyGate(0.7, 6), Power()]
FACTORS = [0.0, 0.25, 1.0, 3.0, -0.5]
B, T, H, V = 3, 9, 8, 23


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "factors"])
@pytest.mark.parametrize("present", [(0, 1, 2, 3), (0, 2, 3)], ids=["every class", "one absent"])
@pytest.mark.parametrize("reduction", get_args(Reduction))
def test_the_reference_is_the_definition_and_the_fused_loss_is_the_reference(
    reduction: Reduction, present: tuple[int, ...], weighed: bool
) -> None:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, H, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[torch.rand(B, T, generator=g) < 0.3] = -100
    members = torch.rand(4, B, T, generator=g) < 0.4
    members[3] = ~members[:3].any(0)
    for c in {0, 1, 2, 3} - set(present):
        members[3] |= members[c] & (members.sum(0) == 1)
        members[c] = False
    logits = hidden @ weight.T
    factors = torch.tensor(FACTORS, dtype=torch.float64)[torch.randint(0, len(FACTORS), (B, T), generator=g)]
    loss = reference_loss(logits, labels, members, ALPHA, TOKEN_LOSSES, reduction, factors if weighed else None)
    if not weighed:
        factors = torch.ones_like(factors)
    labels = labels.masked_fill(factors == 0, -100)

    step = []
    for b, t in (shift_left(labels) != -100).nonzero().tolist():
        at, target = logits[b, t].detach(), labels[b, t + 1]
        odds = float(torch.logsumexp(torch.cat([at[:target], at[target + 1 :]]), 0) - at[target])
        nll = float(torch.nn.functional.softplus(torch.tensor(odds, dtype=torch.float64)))
        losses = {c: token_loss(TOKEN_LOSSES[c], nll, odds, at)[0] for c in range(4)}
        if (factor := factors[b, t + 1].item()) < 0:
            losses = dict.fromkeys(losses, float(torch.nn.functional.softplus(torch.tensor(-odds, dtype=torch.float64))))
        step.append(Token(b, tuple(c for c in range(4) if members[c, b, t + 1]), losses, factor))
    assert loss.item() == pytest.approx(naive(reduction, ALPHA, step), rel=1e-12)

    targets = shift_left(labels)
    own = shift_left(factors, 0) / (targets != -100).double().sum(1, keepdim=True).clamp(min=1) ** SAMPLE_POWERS.get(reduction, 0.0)
    paying = torch.stack([shift_left(member.long(), 0) * (targets != -100) for member in members])
    samples = len({token.sample for token in step})
    counts, masses = (
        torch.tensor([*(paying * size).sum((1, 2)).tolist(), size[targets != -100].sum(), samples], dtype=torch.float64)
        for size in (torch.ones_like(own), own.abs())
    )
    weights = class_weights(reduction, torch.tensor(ALPHA, dtype=torch.float64), counts, masses)
    terms = [Term(one, weights[c] * paying[c] * own.clamp(min=0)) for c, one in enumerate(TOKEN_LOSSES)]
    below = (weights[:, None, None] * paying).sum(0) * -own.clamp(max=0)
    fused = linear_cross_entropy(hidden, weight, targets, terms=terms, unlikelihood=below if weighed else None).loss / len(step)
    torch.testing.assert_close(fused, loss, rtol=1e-12, atol=0.0)
    for got, want in zip(*(torch.autograd.grad(one, (hidden, weight)) for one in (fused, loss)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
