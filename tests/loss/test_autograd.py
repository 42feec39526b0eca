"""A guest of autograd: what is differentiated, how often, and at which price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

from dwl_plugin.loss.chunked import module_cross_entropy
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from dwl_plugin.loss.token_losses import Power, Term
from dwl_plugin.loss.tokens import Targets
from tests.loss.cases import FP32, as_module, errors, full_case, options_of, random_case, run
from tests.loss.oracle import Case, per_token, relative


def test_inputs_are_left_as_they_are() -> None:
    case = full_case(3, 7)
    before = {f.name: getattr(case, f.name) for f in fields(case)}
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in before.items()}
    with torch.no_grad():
        linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, **options_of(case))
    run(linear_cross_entropy, case)
    for name, value in before.items():
        assert torch.equal(value, copies[name]) if isinstance(value, torch.Tensor) else value == copies[name]


@pytest.mark.parametrize(
    ("hidden_learns", "weight_learns", "matmuls"), [(False, False, 1), (True, False, 2), (False, True, 2), (True, True, 3)]
)
def test_takes_no_more_matmuls_than_gradients_asked_for(
    matmuls_taken: list[int], hidden_learns: bool, weight_learns: bool, matmuls: int
) -> None:
    case, count = random_case(3, 7), matmuls_taken
    hidden, weight = case.hidden.requires_grad_(hidden_learns), case.weight.requires_grad_(weight_learns)
    out = linear_cross_entropy(hidden, weight, case.targets)
    assert count[0] == matmuls
    assert out.loss.requires_grad == (hidden_learns or weight_learns)
    if out.loss.requires_grad:
        out.loss.backward()
        assert (hidden.grad is not None, weight.grad is not None) == (hidden_learns, weight_learns)
        assert count[0] == matmuls


def test_no_grad_takes_one_matmul(matmuls_taken: list[int]) -> None:
    case, count = random_case(3, 7), matmuls_taken
    with torch.no_grad():
        out = linear_cross_entropy(case.hidden.requires_grad_(), case.weight.requires_grad_(), case.targets)
    assert count[0] == 1
    assert not out.loss.requires_grad


def test_bias_alone_can_learn() -> None:
    case = full_case(3, 7)
    assert case.bias is not None
    bias = case.bias.clone().requires_grad_()
    linear_cross_entropy(case.hidden, case.weight, case.targets, bias=bias, **options_of(case)).loss.backward()
    truth = per_token(case).bias
    assert truth is not None
    assert bias.grad is not None
    assert relative(bias.grad, truth) <= FP32


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
def test_backward_twice_gives_the_same_gradient_twice(function: Callable[..., LinearCrossEntropyOutput]) -> None:
    case = full_case(3, 7)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = function(hidden, weight, case.targets, bias=case.bias, **options_of(case)).loss
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5))
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_weight_that_is_taken_away_after_the_forward_is_gone_and_one_that_comes_back_is_used() -> None:
    """As ZeRO-3 does: the parameter stays, its data goes and is gathered again."""
    case = full_case(3, 7)
    hidden, weight = case.hidden.requires_grad_(), torch.nn.Parameter(case.weight.clone())
    loss = linear_cross_entropy(hidden, weight, case.targets, bias=case.bias, **options_of(case)).loss
    gathered = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.empty(0)
    assert gathered.expired()
    weight.data = case.weight.clone()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_differentiating_twice_is_an_error() -> None:
    case = random_case(3, 7)
    hidden = case.hidden.requires_grad_()
    for function in (linear_cross_entropy, as_module):
        loss = function(hidden, case.weight, case.targets).loss
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_weights_get_no_gradient() -> None:
    case = full_case(3, 7)
    assert isinstance(case.token_weight, torch.Tensor)
    weight = case.token_weight.requires_grad_()
    run(linear_cross_entropy, case)
    assert weight.grad is None


def test_one_leaf_as_hidden_and_weight_adds_its_gradients() -> None:
    tied = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([1, 0, 5, -100, 2, 3])
    linear_cross_entropy(tied, tied, targets).loss.backward()
    truth = per_token(Case(tied, tied, targets))
    assert tied.grad is not None
    assert relative(tied.grad, truth.hidden + truth.weight) <= FP32


def test_a_transposed_or_sliced_input_is_fine(body: str) -> None:
    case = full_case(3, 7)
    strided = replace(case, hidden=case.hidden.transpose(0, 1).contiguous().transpose(0, 1))
    strided.weight = case.weight.t().contiguous().t()
    strided.targets = torch.stack([case.targets, case.targets.clamp(max=0)], -1)[..., 0]
    assert max(errors(linear_cross_entropy, strided).values()) <= FP32


def test_columns_of_wider_inputs_are_fine(body: str) -> None:
    """Rows of ten numbers that lie sixteen apart, until those of the targets are gathered."""
    case = full_case(3, 7, width=16)
    parts = replace(case, hidden=case.hidden[..., :10], weight=case.weight[:, :10], softcap=None)
    hidden = parts.hidden.requires_grad_()
    assert hidden.stride(-2) == parts.weight.stride(0) == 16
    out = linear_cross_entropy(hidden, parts.weight, parts.targets, bias=parts.bias, **options_of(parts))
    (found,) = torch.autograd.grad(out.loss, [hidden])
    truth = per_token(parts)
    assert relative(out.loss, truth.loss) <= FP32
    assert relative(found, truth.hidden) <= FP32


def test_targets_and_biases_that_lie_apart_are_fine(body: str) -> None:
    case = full_case(21, ignored=0.0)
    assert case.bias is not None
    apart = torch.stack([case.bias, torch.zeros_like(case.bias)], 1)[:, 0].requires_grad_()
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    targets = torch.stack([case.targets, torch.zeros_like(case.targets)], 1)[:, 0]
    assert apart.stride() == targets.stride() == (2,)
    out = linear_cross_entropy(hidden, weight, targets, bias=apart, **options_of(case))
    found = torch.autograd.grad(out.loss, [hidden, weight, apart])
    truth = per_token(case)
    for got, want in zip(found, (truth.hidden, truth.weight, truth.bias), strict=True):
        assert want is not None
        assert relative(got, want) <= FP32


def test_module_path_reaches_parameters_with_one_chunk_of_logits_at_a_time() -> None:
    case, seen = random_case(4, 9), []
    down, up = torch.nn.Linear(24, 2, bias=False), torch.nn.Linear(2, 211, bias=False)

    def head(chunk: torch.Tensor) -> torch.Tensor:
        seen.append(chunk.shape[0])
        return F.linear(chunk, case.weight) + up(down(chunk))

    out = module_cross_entropy(case.hidden, head, Targets(case.targets, [Term(Power(1.0))]), chunk_tokens=4, vocab_size=211)
    out.loss.backward()
    merged = (case.weight + up.weight @ down.weight).detach()
    truth = per_token(replace(case, weight=merged, exponent=1.0))
    assert max(seen) <= 4
    assert up.weight.grad is not None
    assert relative(up.weight.grad, truth.weight @ down.weight.T.double()) <= FP32


def test_module_path_repeats_dropout_in_its_backward() -> None:
    case = random_case(4, 9)
    weight = case.weight.clone().requires_grad_()
    masks: list[torch.Tensor] = []

    def head(chunk: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(chunk, 0.5)
        masks.append(dropped.detach().clone())
        return F.linear(dropped, weight)

    module_cross_entropy(case.hidden, head, Targets(case.targets), chunk_tokens=100, vocab_size=211).loss.backward()
    masks.clear()
    module_cross_entropy(case.hidden, head, Targets(case.targets), chunk_tokens=12, vocab_size=211).loss.backward()
    half = len(masks) // 2
    for forward in masks[:half]:
        assert any(torch.equal(forward, again) for again in masks[half:])


def test_module_path_without_grad_keeps_no_graph() -> None:
    case = random_case(4, 9)
    with torch.no_grad():
        out = module_cross_entropy(case.hidden, lambda h: h @ case.weight.T, Targets(case.targets))
    assert not out.loss.requires_grad
    assert relative(out.nll, per_token(case).nll) <= FP32
