"""The anchor to a base model: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from dwl_plugin.loss.token_losses import Power, Term
from tests.loss.cases import FP32, anchored_case, as_module, errors, options_of, random_case, run
from tests.loss.mutants import ANCHOR_MISTAKES, mutant, naive
from tests.loss.oracle import per_token


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks")
def test_an_anchor_matches_its_formula_in_fp64(own_head: bool, trained: bool, body: str) -> None:
    case = anchored_case(3, 13, vocab=67, own_head=own_head, dtype=torch.float64)
    for function in (linear_cross_entropy, as_module):
        assert max(errors(function, case, trained=trained).values()) <= 1e-12
        out, _ = run(function, case, trained=trained)
        assert out.kl is not None
        torch.testing.assert_close(out.kl, per_token(case).kl, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("small_blocks")
def test_an_anchor_matches_its_formula_in_fp32(body: str) -> None:
    for case in (anchored_case(3, 13), replace(anchored_case(3, 13), softcap=None, logit_scale=None)):
        for function in (linear_cross_entropy, as_module):
            assert max(errors(function, case).values()) <= 2 * FP32


@pytest.mark.usefixtures("small_blocks")
def test_a_base_model_may_be_wider_or_narrower(body: str) -> None:
    case = anchored_case(3, 13, vocab=53)
    for width in (8, 40):
        other = random_case(3, 13, vocab=53, width=width, seed=7)
        assert case.anchor is not None
        wider = replace(case, anchor=Anchor(case.anchor.weight, other.hidden, (other.weight, None)))
        assert max(errors(linear_cross_entropy, wider).values()) <= 2 * FP32


def test_a_model_that_is_still_its_base_has_no_kl_and_no_pull(body: str) -> None:
    case = random_case(3, 13, terms=[Term(Power(), torch.zeros(3, 13))])
    case = replace(case, anchor=Anchor(torch.ones(3, 13), case.hidden))
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case, trained=False)
        assert out.loss.item() == pytest.approx(0.0, abs=1e-6 * int((case.targets != -100).sum()))
        assert grads["hidden"] is not None
        assert grads["hidden"].abs().max() <= 1e-5


def test_an_anchor_without_targets_is_zero_with_a_graph() -> None:
    case = anchored_case(2, 3, ignored=1.1)
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case)
        assert out.loss.item() == 0.0
        assert out.kl is not None
        assert out.kl.eq(0).all()
        assert all(g is not None and g.eq(0).all() for g in grads.values())


def test_tokens_masked_out_of_both_vocabularies_add_nothing_to_the_kl(body: str) -> None:
    case = anchored_case(9, vocab=23, ignored=0.0, own_head=False)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[3] = -torch.inf
    case = replace(case, bias=bias, softcap=None, targets=torch.where(case.targets == 3, 4, case.targets))
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case)
        assert out.loss.isfinite()
        assert grads["hidden"] is not None
        assert grads["hidden"].isfinite().all()


def test_the_naive_anchor_passes_where_mutants_must_fail() -> None:
    assert max(errors(naive, anchored_case(3, 13, vocab=53)).values()) <= 2 * FP32


@pytest.mark.parametrize("mistake", ANCHOR_MISTAKES)
def test_no_mutant_of_the_anchor_passes(mistake: str) -> None:
    assert max(errors(mutant(mistake), anchored_case(3, 13, vocab=53)).values()) > 20 * FP32


@pytest.mark.parametrize(
    ("function", "head", "message"),
    [
        (linear_cross_entropy, F.relu, "anchor.head must be None or"),
        (linear_cross_entropy, (torch.zeros(5, 24), None), r"\(V, H\) weight with V = 211"),
    ],
)
def test_an_anchor_that_does_not_fit_is_named(function: Callable[..., LinearCrossEntropyOutput], head: Any, message: str) -> None:
    case = random_case(3, 7)
    with pytest.raises(ValueError, match=message):
        run(function, replace(case, anchor=Anchor(torch.ones(3, 7), case.hidden, head)))
    with pytest.raises(ValueError, match=r"anchor\.hidden must have the leading shape"):
        run(function, replace(case, anchor=Anchor(torch.ones(3, 7), case.hidden[:2])))


def test_a_second_backward_outside_of_autocast_takes_the_same_products(body: str) -> None:
    case = anchored_case(3, 13)
    hidden = case.hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, case.weight, case.targets, bias=case.bias, **options_of(case)).loss
    first, again = (torch.autograd.grad(loss, hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
