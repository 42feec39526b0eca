"""The loss core where it is meant to run. Skipped by name on a machine without a CUDA device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dwl_plugin import LossSpec, attach, linear_cross_entropy
from dwl_plugin.loss import gpu_walk
from dwl_plugin.loss.step import TorchSteps
from tests.loss.cases import OBJECTIVES, anchored_case, full_case, options_of, random_case, run, terms_case
from tests.loss.mutants import naive
from tests.loss.oracle import Case, per_token, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps in plain torch, which stand in for the kernels where those fail, fail too."""

    def fell_back(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the loss runs without its kernels")

    for step in ("advance", "slopes", "saved_slopes", "finish", "scale"):
        monkeypatch.setattr(TorchSteps, step, fell_back)


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """The oracle is fp64: TF32 would hide a mistake of ours behind its own."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_device(value: Any) -> Any:
    """`value` with every tensor inside it on the device."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, list | tuple):
        return type(value)(map(on_device, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: on_device(getattr(value, f.name)) for f in fields(value)})
    return value


def cuda_errors(case: Case, *, trained: bool) -> dict[str, float]:
    """Relative errors on the device against the per-token loop on the CPU."""
    truth = per_token(case)
    out, grads = run(linear_cross_entropy, on_device(case), upstream=1.0, trained=trained)
    found = {"loss": relative(out.loss.cpu(), truth.loss), "nll": relative(out.nll.cpu(), truth.nll)}
    for name in ("hidden", "weight", "bias") if trained else ("hidden",):
        want, got = getattr(truth, name), grads[name]
        if want is not None:
            assert got is not None, name
            found[name] = relative(got.cpu(), want)
    return found


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "make",
    [random_case, full_case, partial(terms_case, objectives=tuple(OBJECTIVES.values())), anchored_case],
    ids=["plain", "every argument", "every objective", "anchored"],
)
def test_fp32_equals_the_definition(make: Callable[..., Case], trained: bool) -> None:
    case = make(3, 41, vocab=1009, width=64)
    assert max(cuda_errors(case, trained=trained).values()) <= 2e-6


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_no_worse_than_the_naive_loss_in_it(dtype: torch.dtype, trained: bool) -> None:
    case = random_case(4, 64, vocab=1009, width=64, dtype=dtype)
    ours = cuda_errors(case, trained=trained)
    truth = per_token(case)
    _, grads = run(naive, on_device(case), upstream=1.0, trained=trained)
    for name in ("hidden", "weight") if trained else ("hidden",):
        got = grads[name]
        assert got is not None
        assert ours[name] <= relative(got.cpu(), getattr(truth, name)) * 1.05, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_comes_back_into_the_loss_multiplies_the_gradients(dtype: torch.dtype) -> None:
    case = on_device(random_case(4, 64, vocab=1009, width=64, dtype=dtype))
    _, once = run(linear_cross_entropy, case, upstream=1.0)
    _, twice = run(linear_cross_entropy, case, upstream=-2.0)
    for name in ("hidden", "weight"):
        assert once[name] is not None
        assert torch.equal(once[name] * -2, twice[name]), name


def test_the_kernels_are_what_runs_and_nothing_is_compiled_by_torch() -> None:
    import torch._dynamo.utils

    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run(linear_cross_entropy, on_device(random_case(2, 32, vocab=512, width=32)))
    assert type(gpu_walk.steps_for(torch.device("cuda", 0), torch.float32, torch.float32)).__name__ == "TritonSteps"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("tokens", "width", "vocab", "ignored"), [(4500, 64, 20_011, 0.3), (2000, 1024, 60_011, 0.0)], ids=["narrow", "saving"]
)
def test_many_rows_whose_maximum_moves_on_every_tile(
    tokens: int, width: int, vocab: int, ignored: float, dtype: torch.dtype
) -> None:
    """Several blocks of rows and tiles of the vocabulary, and logits that grow along it by 60 nats. A wide ∂W has room for
    exponentials."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device="cuda") * (8 / width**0.5)
    hidden[:, 0] = 8.0
    weight = torch.randn(vocab, width, device="cuda") * 0.2
    weight[:, 0] = torch.linspace(-4, 4, vocab, device="cuda")
    targets = torch.randint(0, vocab, (tokens,), device="cuda")
    targets[torch.rand(tokens, device="cuda") < ignored] = -100
    hidden, weight = hidden.to(dtype), weight.to(dtype)

    def gradients(loss: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in (hidden, weight)]
        value = loss(*leaves)
        value.backward()
        return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def full(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = h @ w.t()
        return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets, reduction="sum")

    exact = gradients(full, torch.float64)
    naive = gradients(full, dtype)
    ours = gradients(lambda h, w: linear_cross_entropy(h, w, targets).loss, dtype)
    for name, found, theirs, truth in zip(("loss", "hidden", "weight"), ours, naive, exact, strict=True):
        assert relative(found, truth) <= max(relative(theirs, truth) * 1.05, 2e-6), name


@pytest.mark.parametrize("made", [random_case, full_case], ids=["plain", "full"])
def test_it_waits_for_the_device_once_at_most(made: Callable[..., Case]) -> None:
    """The number of targets is the one thing the host has to know."""
    case = on_device(made(4, 256, vocab=1009, width=64, dtype=torch.bfloat16))
    run(linear_cross_entropy, case)  # its kernels are compiled by now
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            hidden = case.hidden.clone().requires_grad_()
            linear_cross_entropy(hidden, case.weight, case.targets, **options_of(case)).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([wait for wait in waits if "synchroniz" in str(wait.message)]) <= 1


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_workspace_does_not_grow_with_the_tokens(trained: bool) -> None:
    def workspace(tokens: int) -> int:
        hidden = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(50_021, 256, device="cuda", dtype=torch.bfloat16, requires_grad=trained)
        targets = torch.randint(0, 50_021, (tokens,), device="cuda")
        linear_cross_entropy(hidden, weight, targets).loss.backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, targets).loss.backward()
        return torch.cuda.max_memory_allocated() - before - tokens * 256 * 2  # ∂hidden

    assert workspace(65_536) <= workspace(16_384) * 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_trains_on_the_same_gradients_as_in_eager(dtype: torch.dtype) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=1009, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    ).to("cuda", dtype)
    ids = torch.randint(0, 1009, (2, 64), device="cuda")

    def gradients() -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    wanted_loss, wanted = gradients()
    handle = attach(model, LossSpec(), say=lambda line: None)
    loss, found = gradients()
    handle.detach()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert abs(loss - wanted_loss) <= tolerance * wanted_loss
    assert max(relative(found[name], wanted[name]) for name in wanted) <= tolerance


def test_large_logits_stay_finite_in_fp16() -> None:
    hidden = (torch.randn(64, 64, device="cuda") * 8).half().requires_grad_()
    weight = (torch.randn(4099, 64, device="cuda") * 4).half()
    targets = torch.randint(0, 4099, (64,), device="cuda")
    out = linear_cross_entropy(hidden, weight, targets)
    out.loss.backward()
    want = F.cross_entropy(hidden.detach().double() @ weight.double().T, targets, reduction="none")
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())
    assert relative(out.nll, want) <= 1e-4
