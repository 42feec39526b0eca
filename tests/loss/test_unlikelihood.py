"""What tokens pay that are to become unlikely, −log(1 − p), on every path of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from dwl_plugin.loss.stable_nll import unlikelihood
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term
from tests.loss.cases import FP32, as_module, decided, errors, random_case, run, unlikely_case
from tests.loss.mutants import UNLIKELIHOOD_MISTAKES, mutant, naive
from tests.loss.oracle import Case, per_token, relative

PATHS = [linear_cross_entropy, as_module]
Loss = Callable[..., LinearCrossEntropyOutput]


@pytest.mark.parametrize("own_head", [False, True], ids=["base under our head", "base with its own"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks")
def test_beside_terms_and_an_anchor_it_is_the_definition(trained: bool, own_head: bool, body: str) -> None:
    case = unlikely_case(3, 13, vocab=67, own_head=own_head)
    assert max(errors(linear_cross_entropy, case, trained=trained).values()) <= 2 * FP32


@pytest.mark.parametrize("objective", [Power(1.0, 0.05), Focal(2.0), EntropyGate(0.7, 6)], ids=["dft", "focal", "eaft"])
@pytest.mark.usefixtures("small_blocks")
def test_beside_each_token_loss_it_is_the_definition_in_fp64(objective: object, body: str) -> None:
    case = unlikely_case(3, 13, vocab=67, dtype=torch.float64)
    assert case.terms is not None
    case = replace(case, terms=[Term(objective, term.weight) for term in case.terms])  # type: ignore[arg-type]
    for function in PATHS:
        assert max(errors(function, case).values()) <= 1e-12


def test_where_the_head_is_a_callable_it_is_the_definition() -> None:
    assert max(errors(as_module, unlikely_case(3, 13, vocab=67)).values()) <= 2 * FP32


def test_the_naive_one_passes_where_mutants_must_fail() -> None:
    assert max(errors(naive, unlikely_case(3, 13, vocab=53)).values()) <= 2 * FP32


@pytest.mark.parametrize("mistake", UNLIKELIHOOD_MISTAKES)
def test_no_mutant_passes(mistake: str) -> None:
    assert max(errors(mutant(mistake), unlikely_case(3, 13, vocab=53)).values()) > 20 * FP32


def only_unlikely(nats: float, dtype: torch.dtype, weight: float) -> Case:
    """The target is `nats` above the others, or as far below; such tokens pay nothing else."""
    case = decided(nats, tokens=5)
    nothing, all_of_it = torch.zeros(6), torch.full((6,), weight)
    return replace(
        case,
        hidden=case.hidden.to(dtype),
        weight=case.weight.to(dtype),
        exponent=0.0,
        terms=[Term(Power(), nothing)],
        unlikelihood=all_of_it,
    )


@pytest.mark.parametrize("nats", [-1e3, -60.0, -9.0, 0.0, 9.0, 30.0, 80.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("function", PATHS)
def test_from_p_of_0_to_p_of_1_it_is_finite_and_its_gradient_the_definitions(
    function: Loss, dtype: torch.dtype, nats: float, body: str
) -> None:
    """Also with a weight that takes dℓ/dnll = −p/(1 − p) out of the range of fp32, and through autograd's own formula in fp64."""
    case = only_unlikely(nats, dtype, weight=100.0)
    near = {torch.bfloat16: 1e-2, torch.float16: 1e-3}.get(dtype, 2e-6)
    (out, grads), truth = run(function, case), per_token(case)
    assert out.loss.isfinite()
    smallest = 2 * torch.finfo(dtype).smallest_normal
    for name in ("hidden", "weight"):
        torch.testing.assert_close(grads[name], (getattr(truth, name) * 0.37).to(dtype), rtol=near, atol=smallest)
    if nats < 80:
        assert out.loss.item() == pytest.approx(truth.loss.item(), rel=2e-6, abs=1e-36)
    if abs(nats) < 30:
        hidden = case.hidden.double().requires_grad_()
        p = torch.softmax(hidden @ case.weight.double().T, -1).gather(-1, case.targets[:, None])[:, 0]
        (want,) = torch.autograd.grad((100.0 * -torch.log(1 - p)).sum() * 0.37, hidden)
        assert grads["hidden"] is not None
        assert relative(grads["hidden"], want) <= near


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_it_is_exact_where_p_rounds_to_0_or_to_1(dtype: torch.dtype) -> None:
    nll = torch.tensor([0.0, 1e-30, 1e-9, 0.1, math.log(2), 2.0, 40.0, 1e30, math.inf], dtype=dtype)
    want = [-math.log(-math.expm1(-value)) if 0 < value < 1 else -math.log1p(-math.exp(-value)) if value else None for value in nll]
    got = unlikelihood(nll).tolist()
    assert got[1:] == pytest.approx(want[1:], rel=3e-7 if dtype == torch.float32 else 1e-15)
    assert math.isfinite(got[0])
    assert got[0] > 80


def test_it_is_no_part_of_what_is_reported_of_the_terms() -> None:
    case = unlikely_case(3, 13, vocab=53)
    for function in PATHS:
        with_it, _ = run(function, case)
        without, _ = run(function, replace(case, unlikelihood=None))
        assert torch.equal(with_it.nll, without.nll)
        assert all(map(torch.equal, with_it.factors, without.factors))


def test_weights_of_zero_change_no_bit() -> None:
    case = random_case(3, 13, terms=[Term(Focal(2.0))])
    for function in PATHS:
        (one, ours), (other, theirs) = run(function, replace(case, unlikelihood=torch.zeros(3, 13))), run(function, case)
        assert torch.equal(one.loss, other.loss)
        for name in ("hidden", "weight"):
            assert torch.equal(ours[name], theirs[name])  # type: ignore[arg-type]
