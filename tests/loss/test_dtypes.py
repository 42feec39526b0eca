"""What each dtype rounds, and what it must not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from tests.loss.cases import FP32, as_module, errors, full_case, random_case, run
from tests.loss.mutants import naive
from tests.loss.oracle import Case, per_token, relative


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# Autograd adds the weight gradients of several chunks in the weight's dtype, so the module path gets one.
@pytest.mark.parametrize("function", [linear_cross_entropy, partial(as_module, chunk_tokens=None)])
@pytest.mark.usefixtures("processor")
def test_half_precision_is_no_worse_than_naive(dtype: torch.dtype, function: Callable[..., LinearCrossEntropyOutput]) -> None:
    case = full_case(3, 13, dtype=dtype)
    ours, theirs = errors(function, case), errors(naive, case)
    assert all(ours[name] <= theirs[name] * 1.05 + FP32 for name in ours), (ours, theirs)


@pytest.mark.usefixtures("small_blocks", "processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_only_rounds_the_result_on_a_cpu(dtype: torch.dtype) -> None:
    found = errors(linear_cross_entropy, full_case(3, 13, dtype=dtype))
    assert found["loss"] <= FP32
    assert found["nll"] <= FP32
    assert found["hidden"] <= 2e-3
    assert found["weight"] <= 2e-3


def test_gradients_and_results_have_their_dtypes() -> None:
    case = full_case(3, 5, dtype=torch.bfloat16)
    out, grads = run(linear_cross_entropy, case)
    assert (out.loss.dtype, out.nll.dtype) == (torch.float32, torch.float32)
    assert {g.dtype for g in grads.values() if g is not None} == {torch.bfloat16}
    assert not out.nll.requires_grad


def test_bf16_hidden_with_an_fp32_head_multiplies_in_fp32() -> None:
    case = full_case(3, 13)
    case = replace(case, hidden=case.hidden.bfloat16())
    found = errors(linear_cross_entropy, case)
    assert found["weight"] <= FP32
    assert found["hidden"] <= 2e-3  # returned in bf16


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("spread", [0.05, 0.2, 0.7])
def test_bf16_gradients_are_as_good_as_bf16_can_hold(spread: float) -> None:
    """Logits of one to twenty nats, half of the targets likely: the loss in bf16 is off by up to 2 % here."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(300, 576, generator=g), torch.randn(2048, 576, generator=g) * spread
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    likely = (hidden.float() @ weight.float().T).argmax(1)
    targets = torch.where(torch.rand(300, generator=g) < 0.5, likely, torch.randint(0, 2048, (300,), generator=g))
    case = Case(hidden, weight, targets)
    _, grads = run(linear_cross_entropy, case, upstream=1.0)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum").backward()
    for got, want in zip((grads["hidden"], grads["weight"]), exact, strict=True):
        assert got is not None
        assert want.grad is not None
        assert relative(got, want.grad) <= 2e-3


def test_autocast_multiplies_in_its_dtype() -> None:
    case = full_case(3, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, grads = run(linear_cross_entropy, case)
    rounded = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16(), bias=case.bias.bfloat16())  # type: ignore[union-attr]
    truth = per_token(rounded)
    assert relative(found.loss, truth.loss) <= FP32
    assert grads["weight"] is not None
    assert grads["weight"].dtype == torch.float32
    assert relative(grads["weight"], truth.weight * 0.37) <= FP32


def test_small_fp16_weights_do_not_underflow_before_they_are_scaled() -> None:
    case = random_case(2, 9, dtype=torch.float16, token_weight=torch.full((2, 9), 1e-7))
    assert errors(linear_cross_entropy, case, upstream=2.0**20)["hidden"] <= 2e-3
