"""Loss, nll and gradients against the loop over tokens, from p → 0 to p → 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from tests.loss.cases import FP32, OBJECTIVES, as_module, errors, full_case, random_case, run, terms_case
from tests.loss.mutants import MISTAKES, mutant, naive
from tests.loss.oracle import Case, per_token, relative

CASES = {
    "plain": random_case(3, 13),
    "everything": full_case(3, 13),
    "nothing ignored": random_case(29, ignored=0.0),
    "dft": random_case(2, 17, exponent=1.0),
    "dft with a floor": random_case(2, 17, exponent=1.0, min_weight=0.1),
    "bias": full_case(19, vocab=97),
    "one token": random_case(1, ignored=0.0),
    "no leading shape": random_case(ignored=0.0),
    "seven tokens": full_case(7, ignored=0.0),
    "vocabulary of one": random_case(5, vocab=1, ignored=0.0),
    "vocabulary of two": full_case(5, vocab=2, ignored=0.0),
    "hidden size of one": full_case(5, width=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks")
def test_matches_the_loop_over_tokens_in_fp32(case: Case, trained: bool, body: str) -> None:
    assert max(errors(linear_cross_entropy, case, trained=trained).values()) <= FP32


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_default_blocks_match_the_loop_over_tokens(case: Case) -> None:
    assert max(errors(linear_cross_entropy, case).values()) <= FP32


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_module_path_matches_the_loop_over_tokens(case: Case) -> None:
    assert max(errors(as_module, case).values()) <= FP32


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
def test_fp64_is_computed_in_fp64(function: Callable[..., LinearCrossEntropyOutput]) -> None:
    assert max(errors(function, full_case(3, 13, dtype=torch.float64)).values()) <= 1e-13


def mutant_case() -> Case:
    return full_case(3, 13, vocab=53)


def test_the_naive_loss_passes_where_mutants_must_fail() -> None:
    assert max(errors(naive, mutant_case()).values()) <= FP32


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mutant_passes(mistake: str) -> None:
    assert max(errors(mutant(mistake), mutant_case()).values()) > 10 * FP32


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(0, 23),
    vocab=st.sampled_from([1, 2, 3, 17, 101]),
    width=st.sampled_from([1, 5, 8]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    everything=st.booleans(),
    objectives=st.lists(st.sampled_from(sorted(OBJECTIVES)), max_size=3),
    trained=st.booleans(),
    seed=st.integers(0, 999),
)
def test_matches_the_loop_for_any_shape(
    tokens: int, vocab: int, width: int, ignored: float, everything: bool, objectives: list[str], trained: bool, seed: int
) -> None:
    options: dict[str, Any] = {"vocab": vocab, "width": width, "ignored": ignored, "seed": seed, "dtype": torch.float64}
    make = full_case if everything else random_case
    if objectives:
        make, options["objectives"] = terms_case, tuple(OBJECTIVES[name] for name in objectives)
    case = make(tokens, **options)
    truth = per_token(case)
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case, upstream=1.0, trained=trained)
        torch.testing.assert_close(out.loss, truth.loss, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out.nll, truth.nll, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grads["hidden"], truth.hidden, rtol=1e-10, atol=1e-12)
        if trained:
            torch.testing.assert_close(grads["weight"], truth.weight, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
@pytest.mark.parametrize("nats", [9.0, 16.0, 40.0])
def test_a_certain_token_keeps_its_digits(function: Callable[..., LinearCrossEntropyOutput], nats: float) -> None:
    case = random_case(6, vocab=5, width=5, ignored=0.0)
    hidden, weight = torch.zeros(6, 5), torch.eye(5)
    hidden[torch.arange(6), case.targets] = nats + torch.arange(6) / 4
    case = replace(case, hidden=hidden, weight=weight, exponent=1.0)
    found = errors(function, case)
    assert 0 < per_token(case).nll.max() < 1e-3
    assert max(found.values()) <= FP32


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
@pytest.mark.parametrize("size", [1e4, 1e20, 1e37])
@pytest.mark.usefixtures("small_blocks")
def test_huge_logits_are_finite_and_right(function: Callable[..., LinearCrossEntropyOutput], size: float) -> None:
    case = random_case(9, vocab=61, width=7)
    case = replace(case, hidden=torch.sign(case.hidden) * size, weight=torch.sign(case.weight).round(), exponent=1.0)
    out, grads = run(function, case)
    truth = per_token(case)
    assert out.loss.isfinite()
    assert relative(out.nll, truth.nll) <= FP32
    for name in ("hidden", "weight"):
        assert grads[name] is not None
        torch.testing.assert_close(grads[name], getattr(truth, name).float() * 0.37, rtol=1e-5, atol=1e-30)


def test_exponent_zero_is_weight_one_where_p_underflows() -> None:
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[0.0], [1.0]])
    for exponent in (0.0, torch.zeros(1)):
        assert linear_cross_entropy(hidden, weight, torch.tensor([0]), exponent=exponent).loss.item() == 200.0


def test_a_reference_that_keeps_rising_is_followed(small_blocks: None, body: str) -> None:
    """Each tile of the vocabulary exceeds the one before by more than fp32 can exponentiate."""
    case = random_case(8, vocab=101, width=3, ignored=0.0)
    ramp = torch.arange(101)[:, None] * torch.ones(1, 3) * 9
    case = replace(case, hidden=case.hidden.abs() + 1, weight=ramp)
    assert max(errors(linear_cross_entropy, case).values()) <= FP32


def test_a_token_masked_out_of_the_vocabulary_costs_nothing(body: str) -> None:
    case = full_case(2, 9)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[3] = -torch.inf
    case = replace(case, bias=bias, softcap=None, targets=torch.where(case.targets == 3, -100, case.targets))
    out, grads = run(linear_cross_entropy, case)
    assert out.loss.isfinite()
    assert grads["weight"] is not None
    assert grads["weight"].isfinite().all()
    assert grads["weight"][3].eq(0).all()


@pytest.mark.usefixtures("small_blocks")
def test_nan_in_hidden_is_not_hidden(body: str) -> None:
    case = random_case(12, ignored=0.0)
    case.hidden[5, 0] = torch.nan
    out, _ = run(linear_cross_entropy, case)
    assert out.loss.isnan()
    assert out.nll.isnan().nonzero().tolist() == [[5]]


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (7,), (2, 3)])
def test_without_targets_the_loss_is_zero_with_a_graph(
    function: Callable[..., LinearCrossEntropyOutput], shape: tuple[int, ...]
) -> None:
    case = full_case(*shape, ignored=1.1)
    out, grads = run(function, case)
    assert out.loss.item() == 0.0
    assert out.nll.shape == torch.Size(shape)
    assert all(g is not None and g.eq(0).all() for g in grads.values())
    assert grads["hidden"] is not None
    assert grads["hidden"].shape == case.hidden.shape


def test_ignored_positions_get_zero_gradient_and_zero_nll() -> None:
    case = random_case(4, 9)
    out, grads = run(linear_cross_entropy, case)
    ignored = case.targets == -100
    assert grads["hidden"] is not None
    assert out.nll[ignored].eq(0).all()
    assert grads["hidden"][ignored].eq(0).all()


def test_ignored_positions_may_hold_nan() -> None:
    case = random_case(4, 9)
    case.hidden[case.targets == -100] = torch.nan
    out, grads = run(linear_cross_entropy, case)
    assert out.loss.isfinite()
    assert grads["weight"] is not None
    assert grads["weight"].isfinite().all()


def test_another_ignore_index() -> None:
    case = random_case(4, 9)
    other = replace(case, targets=torch.where(case.targets == -100, 7, case.targets), ignore_index=7)
    same = replace(case, targets=torch.where(other.targets == 7, -100, other.targets))
    assert run(linear_cross_entropy, other)[0].loss == run(linear_cross_entropy, same)[0].loss
