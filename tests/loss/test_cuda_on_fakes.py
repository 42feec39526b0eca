"""The loss on a GPU, without one: fake CUDA tensors have shapes, dtypes and storages, and no values."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch

from tests.loss.conftest import INTERPRETED

pytest.importorskip("triton", reason="it is its launches that are looked at")
if INTERPRETED:
    pytest.skip("no tensor here has values", allow_module_level=True)

from bench.gpu.cards import by_formula
from bench.gpu.fake_cuda import Call, on_fakes
from dwl_plugin.loss import gpu_walk
from dwl_plugin.loss.step import TorchSteps

MIB = 2**20
N, H, V = 3000, 40, 9001
"""Two blocks of rows, and an odd tile at the end."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
OPTIONS: dict[str, tuple[Any, ...]] = {
    "hidden": DTYPES,
    "weight": DTYPES,
    "autocast": (None, torch.bfloat16, torch.float16),
    "learns": ("hidden", "head", "both"),
    "has_bias": (False, True),
    "softcap": (None, 30.0),
    "objective": ("plain", "four token losses"),
    "anchor": (None, "ours", "its own"),
    "unlikely": (False, True),
    "targets": (None, 1700),
}
EVERY = [dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())]
SHUFFLED = random.Random(0).sample(EVERY, len(EVERY))
ON_HOPPER = [
    options | {"capability": 90}
    for options in SHUFFLED
    if (options["softcap"], options["objective"], options["anchor"]) == (None, "plain", None)
]
"""Where that has kernels of its own."""


@pytest.fixture(params=[86, 90], ids="sm_{}".format)
def capability(request: pytest.FixtureRequest) -> int:
    """Of a card that is served by a matmul and a step, and of one whose matmul has the step at its end."""
    assert isinstance(request.param, int)
    return request.param


def problems_of(*, learns: str, capability: int = 86, **options: Any) -> list[str]:
    """What is wrong with a call: a gradient that is not as its tensor, a loss that is not in fp32, a wait too many or too few."""
    call = Call(N, H, V, learns_hidden=learns != "head", learns_head=learns != "hidden", **options)
    try:
        seen = on_fakes(call, capability=capability)
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    found = []
    shapes = {"hidden": (N, H), "weight": (V, H), "bias": (V,)}
    learning = {"hidden": call.learns_hidden, "weight": call.learns_head, "bias": call.learns_head and call.has_bias}
    for (name, shape), gradient in zip(shapes.items(), seen.gradients, strict=True):
        expected = (shape, call.hidden if name == "hidden" else call.weight) if learning[name] else None
        got = None if gradient is None else (tuple(gradient.shape), gradient.dtype)
        if got != expected:
            found.append(f"∂{name} is {got}, not {expected}")
    output = seen.output
    if any(tensor.dtype != torch.float32 for tensor in (output.loss, output.nll, *output.factors, output.kl) if tensor is not None):
        found.append("a loss that is not in fp32")
    if sum(seen.waits.values()) != 1:
        found.append(f"waits: {dict(seen.waits)}")
    multiplied = call.autocast or torch.promote_types(call.hidden, call.weight)
    expected_kernel = "multiply_advance_kernel" if capability == 90 and multiplied != torch.float32 else "advance_kernel"
    if expected_kernel not in {kernel[0] for kernel in seen.kernels}:
        found.append(f"{expected_kernel} was not launched")
    return found


def failures(cases: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[str]]]:
    return [(options, problems) for options in cases if (problems := problems_of(**options))]


def test_gradients_are_as_their_tensors_and_a_call_waits_once() -> None:
    assert not failures(SHUFFLED[:60] + ON_HOPPER[:20])


@pytest.mark.slow
def test_gradients_are_as_their_tensors_and_a_call_waits_once_in_more_combinations() -> None:
    assert not failures(SHUFFLED[60:600] + ON_HOPPER[20:])


@pytest.mark.weekly
def test_gradients_are_as_their_tensors_and_a_call_waits_once_in_all_combinations() -> None:
    assert not failures(SHUFFLED[600:])


def test_a_call_in_which_nothing_learns_waits_once(capability: int) -> None:
    seen = on_fakes(Call(N, H, V, learns_hidden=False), capability=capability)
    assert sum(seen.waits.values()) == 1


@pytest.mark.parametrize(("tokens", "width", "most"), [(8192, 4096, 160), (4096, 2048, 80)])
def test_peak_memory_with_a_frozen_head(tokens: int, width: int, most: int, capability: int) -> None:
    """MiB that a call allocates, ∂hidden among them."""
    assert on_fakes(Call(tokens, width, 151_936), capability=capability).peak <= most * MIB


@pytest.mark.parametrize("targets", [4096, 4095, 2048, 100])
@pytest.mark.parametrize(("width", "vocab"), [(2048, 151_936), (2304, 262_144)])
def test_the_formula_for_small_cards(width: int, vocab: int, targets: int) -> None:
    """What `bench/RESULTS.md` says of them."""
    seen = on_fakes(Call(4096, width, vocab, targets=targets))
    assert seen.peak == pytest.approx(by_formula(4096, targets, width, vocab), rel=0.02)


@pytest.mark.parametrize(("tokens", "width"), [(8192, 4096), (4096, 2048)])
def test_peak_memory_with_a_trained_head(tokens: int, width: int, capability: int) -> None:
    """That of ∂W in bf16, and little more."""
    seen = on_fakes(Call(tokens, width, 151_936, learns_head=True), capability=capability)
    assert 151_936 * width * 2 < seen.peak <= 151_936 * width * 2 + 200 * MIB


def test_without_kernels_a_step_holds_no_more_than_two_copies_of_a_tile() -> None:
    call = Call(4096, 2048, 151_936, softcap=30.0)
    seen = on_fakes(call, TorchSteps())
    assert not seen.kernels
    assert sum(seen.waits.values()) == 1
    assert seen.peak <= on_fakes(call).peak + 2 * gpu_walk._TILE_BYTES


@pytest.mark.parametrize(
    ("trained", "width", "vocab"), [(False, H, V), (True, H, V), (True, 4096, 40_001)], ids=["frozen", "trained", "wide"]
)
def test_few_kernels_serve_any_number_of_tokens(trained: bool, width: int, vocab: int, capability: int) -> None:
    """Triton compiles one for each kind of arguments: dtypes, constants, what divides by 16."""
    rng, kernels = random.Random(0), set[Any]()
    for _ in range(50):
        tokens = rng.randint(1, 9000)
        call = Call(tokens, width, vocab, learns_head=trained, targets=rng.randint(1, tokens))
        kernels |= set(on_fakes(call, capability=capability).kernels)
    assert 0 < len(kernels) <= (10 if trained else 9)
    assert any(kernel[0] == "saved_slopes_kernel" for kernel in kernels) == trained


@pytest.mark.parametrize(
    ("call", "has_out_dtype"),
    [
        (Call(32_768, 4096, 40_000, weight=torch.float32, autocast=torch.bfloat16, learns_head=True), False),
        (Call(32_768, 4096, 40_000, weight=torch.float32, autocast=torch.bfloat16, learns_head=True), True),
        (Call(16_384, 8192, 32_000, autocast=torch.float16, learns_head=True), True),
        (Call(16_384, 8192, 32_000, learns_head=True), True),
    ],
    ids=["fp32 by copies", "fp32", "bf16 of fp16", "bf16"],
)
def test_exponentials_that_are_saved_take_no_memory(
    call: Call, has_out_dtype: bool, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for their references. They are of all tokens of the batch, and so would be a copy of them on its way to ∂W."""

    def peak() -> int:
        return on_fakes(call, capability=capability, has_out_dtype=has_out_dtype).peak

    saving = peak()
    monkeypatch.setattr(gpu_walk, "_tiles_to_save", lambda *of: 0)
    assert saving <= peak() + 8 * MIB


@pytest.mark.parametrize(
    ("device", "capability", "has"), [("cuda", 90, True), ("cuda", 86, False), ("cuda", 100, False), ("cpu", 90, False)]
)
def test_the_kernels_for_hopper_are_those_of_no_other_card(
    device: str, capability: int, has: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: divmod(capability, 10))
    assert (gpu_walk._hopper.__wrapped__(torch.device(device)) is not None) == has
