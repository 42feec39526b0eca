"""Deferred logits against real ones: whatever a model does to them, the same numbers and the same gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dwl_plugin.loss.deferred_logits import DeferredLogits

B, T, H, V = 2, 5, 8, 11


def head_and_hidden() -> tuple[torch.nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return torch.nn.Linear(H, V), torch.randn(B, T, H, requires_grad=True)


def deferred(said: list[str] | None = None) -> DeferredLogits:
    head, hidden = head_and_hidden()
    return DeferredLogits(hidden, head, V, torch.float32, on_materialise=None if said is None else said.append)


def true() -> torch.Tensor:
    head, hidden = head_and_hidden()
    return head(hidden)


def in_place(logits: Any, change: Callable[[Any], Any]) -> Any:
    """The model changes its logits and goes on with the name it had for them."""
    logits = logits.clone() if isinstance(logits, torch.Tensor) else logits
    change(logits)
    return logits


def assign(index: Any, value: Any) -> Callable[[Any], Any]:
    return lambda z: in_place(z, lambda y: y.__setitem__(index, value))


MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]]).bool()
PER_ENTRY = torch.linspace(-1, 1, V)

RECORDED: dict[str, Callable[[Any], Any]] = {
    "softcap": lambda z: torch.tanh(z / 3.0) * 3.0,
    "in place": lambda z: in_place(z, lambda y: y.div_(3.0).add_(1.0).clamp_(-0.3, 1.2)),
    "softcap, augmented": lambda z: in_place(z, lambda y: y.__itruediv__(3.0)).tanh() * 3.0,
    "torch.div": lambda z: torch.div(z, 2.0),
    "number on the left": lambda z: 0.5 * z,
    "scale by a parameter": lambda z: z * torch.tensor(0.3),
    "scale by a parameter of many dimensions": lambda z: z * torch.full((1, 1, 1), 0.3),
    "per entry": lambda z: z * PER_ENTRY + PER_ENTRY,
    "shift": lambda z: 1.0 + z - 3,
    "final_logits_bias": lambda z: z + PER_ENTRY[None],
    "negative": lambda z: -z,
    "clamp": lambda z: z.clamp(-0.5, 0.4),
    "torch.clamp": lambda z: torch.clamp(z, max=0.2),
    "double and back": lambda z: z.to(torch.float64).float(),
    "to keyword": lambda z: z.to(dtype=torch.bfloat16),
    "type_as": lambda z: z.type_as(torch.zeros(1, dtype=torch.float64)),
    "promotion": lambda z: z * torch.ones(V, dtype=torch.float64),
    "shifted by one": lambda z: z[..., :-1, :].contiguous().view(-1, V),
    "shifted, two indices": lambda z: z[:, :-1].contiguous().view(-1, z.size(-1)),
    "view": lambda z: z.view(-1, z.shape[-1]),
    "view, inferred vocabulary": lambda z: z.view(B * T, -1),
    "reshape of a tuple": lambda z: z.reshape((T, B, V)),
    "torch.reshape": lambda z: torch.reshape(z, (-1, V)),
    "flatten": lambda z: z.flatten(0, 1),
    "torch.flatten": lambda z: torch.flatten(z, end_dim=1),
    "transpose of rows": lambda z: z.transpose(0, 1),
    "unsqueeze and squeeze": lambda z: z.unsqueeze(1).squeeze(1),
    "None": lambda z: z[:, None],
    "one row": lambda z: z[0],
    "the last position": lambda z: z[:, -1, :],
    "mask": lambda z: z[MASK],
    "indices": lambda z: z[:, torch.tensor([3, 1])],
    "vocabulary": lambda z: z[..., :7],
    "vocabulary, three indices": lambda z: z[:, :, 2:9],
    "log_softmax": lambda z: F.log_softmax(z, dim=-1),
    "log_softmax, method": lambda z: z.log_softmax(2),
    "log_softmax, dtype": lambda z: F.log_softmax(z.view(-1, V), dim=-1, dtype=torch.float64),
    "assigned entries": assign((slice(None), slice(None), [3, 5]), -1e3),
    "assigned slice": assign((..., slice(4, 6)), torch.tensor(-9.0)),
}

MATERIALISED: dict[str, Callable[[Any], Any]] = {
    "logsumexp": lambda z: torch.logsumexp(z, -1),
    "mean": lambda z: z.mean(),
    "softmax": lambda z: z.softmax(-1),
    "argmax": lambda z: z.argmax(-1),
    "sigmoid in place": lambda z: in_place(z, lambda y: y.sigmoid_()) * 2.0,
    "masked_fill in place": lambda z: in_place(z, lambda y: y.masked_fill_(PER_ENTRY > 0.5, -7.0)).view(-1, V),
    "torch function in place": lambda z: in_place(z, torch.sigmoid_),
    "assigned rows": assign((0, 1), 2.0),
    "transpose with the vocabulary": lambda z: z.transpose(1, 2),
    "times rows": lambda z: z * torch.arange(1.0, T + 1)[None, :, None],
    "right operand": lambda z: torch.ones(V) - z,
    "cat": lambda z: torch.cat([z, z], dim=0),
    "gather": lambda z: z.gather(-1, torch.zeros(B, T, 1, dtype=torch.long)),
    "view over the vocabulary": lambda z: z.view(-1),
    "vocabulary with a step": lambda z: z[..., ::2],
    "comparison": lambda z: torch.where(MASK[..., None], z, torch.zeros(())),
    "where": lambda z: torch.maximum(z, torch.zeros(())),
    "keyword": lambda z: torch.softmax(input=z, dim=-1),
}


def as_tensor(value: Any) -> torch.Tensor:
    return value.materialise("test") if isinstance(value, DeferredLogits) else value


def gradients(function: Callable[[Any], Any], make: Callable[[], Any]) -> list[torch.Tensor]:
    head, hidden = head_and_hidden()
    logits = head(hidden) if make is true else DeferredLogits(hidden, head, V, torch.float32)
    out = as_tensor(function(logits))
    if not out.requires_grad:
        return []
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (out.double() * g).sum().backward()
    return [hidden.grad, head.weight.grad, head.bias.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("name", [*RECORDED, *MATERIALISED])
def test_values_shapes_dtypes_and_gradients_are_those_of_real_logits(name: str) -> None:
    function = (RECORDED | MATERIALISED)[name]
    got, want = function(deferred()), function(true())
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert (got.ndim, got.numel(), got.device) == (want.ndim, want.numel(), want.device)
    torch.testing.assert_close(as_tensor(got), want)
    torch.testing.assert_close(gradients(function, deferred), gradients(function, true))


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_operations_compute_no_logits(name: str) -> None:
    said: list[str] = []
    assert isinstance(RECORDED[name](deferred(said)), DeferredLogits)
    assert not said


@pytest.mark.parametrize("name", MATERIALISED)
def test_other_operations_say_that_they_compute_the_logits(name: str) -> None:
    said: list[str] = []
    MATERIALISED[name](deferred(said))
    assert said


@pytest.mark.parametrize("name", [name for name in RECORDED if RECORDED[name](deferred()).shape[-1] == V])
def test_a_chunk_of_rows_goes_through_the_same_operations(name: str) -> None:
    logits = RECORDED[name](deferred())
    whole = logits.materialise("test").reshape(-1, logits.vocab_size)
    torch.testing.assert_close(logits.compute(logits.rows()[1:2]), whole[1:2])


def test_asking_for_shape_place_or_empty_tensors_computes_nothing() -> None:
    said: list[str] = []
    logits = deferred(said)
    assert logits.new_zeros(3).dtype == torch.float32
    assert (logits.size(-1), logits.size(), logits.dim()) == (V, torch.Size((B, T, V)), 3)
    assert len(logits) == B
    assert not logits.is_cuda
    assert logits.is_floating_point()
    assert logits.requires_grad
    assert not said


def test_operations_of_one_name_leave_the_others_alone() -> None:
    logits = deferred()
    scaled = logits * 2.0
    scaled[..., 3] = 0.0
    assert logits.operations == ()
    torch.testing.assert_close(logits.materialise("test"), true())


def test_what_is_no_attribute_of_a_tensor_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        deferred().no_such_thing  # noqa: B018


def test_a_copy_is_independent() -> None:
    logits = copy.copy(deferred())
    torch.testing.assert_close(logits.materialise("test"), true())


def caught(logits_function: Callable[[Any], Any]) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def on_cross_entropy(logits: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append((logits, *args))
        return torch.zeros(())

    logits = deferred()
    logits.on_cross_entropy = on_cross_entropy
    logits_function(logits)
    return calls


TARGETS = torch.arange(B * T) % V

LOSSES: dict[str, Callable[[Any], Any]] = {
    "F.cross_entropy": lambda z: F.cross_entropy(z.view(-1, V), TARGETS),
    "keywords": lambda z: F.cross_entropy(input=z.view(-1, V), target=TARGETS),
    "module": lambda z: torch.nn.CrossEntropyLoss()(z.view(-1, V), TARGETS),
    "log_softmax and nll_loss": lambda z: F.nll_loss(F.log_softmax(z.view(-1, V), -1), TARGETS),
    "transposed": lambda z: F.cross_entropy(z.transpose(1, 2), TARGETS.view(B, T)),
    "after something unknown": lambda z: F.cross_entropy(torch.sigmoid(z).view(-1, V) * 2.0, TARGETS),
    "nll after something unknown": lambda z: F.nll_loss(torch.sigmoid(z).log_softmax(-1).view(-1, V), TARGETS),
    "after a change in place": lambda z: F.cross_entropy(in_place(z, lambda y: y.sigmoid_()).view(-1, V), TARGETS),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_cross_entropy_is_never_somebody_elses(name: str) -> None:
    assert len(caught(LOSSES[name])) == 1


def test_nll_loss_of_what_is_no_log_probability_is_not_taken_for_a_cross_entropy() -> None:
    assert caught(lambda z: F.nll_loss(z.view(-1, V), TARGETS)) == []
