"""Memory, shapes of products, and the compiler."""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from dwl_plugin.loss import chunked, cpu_walk, gpu_walk, linear_cross_entropy as module, matmul
from dwl_plugin.loss.linear_cross_entropy import linear_cross_entropy
from dwl_plugin.loss.step import Products, SoftmaxRows, TorchSteps
from tests.loss.cases import FP32, anchored_case, errors, full_case, multiply_with_onednn, random_case, run
from tests.loss.oracle import per_token, relative


def plan_of(tokens: int, vocab: int, width: int, trained: bool) -> cpu_walk._Plan:
    operands = matmul.Operands(torch.float32, torch.float32)
    return cpu_walk._plan(tokens, vocab, width, trained, 1, operands, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 330, 1000, 8192, 100_000])
@pytest.mark.parametrize("vocab", [1, 257, 151_936, 1_000_003])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_workspace_is_bounded_whatever_the_shape(
    tokens: int, vocab: int, trained: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_with_onednn(monkeypatch, onednn)
    plan = plan_of(tokens, vocab, 64, trained)
    tile = 4 * plan.rows * plan.width
    least = matmul._WIDTH if onednn else cpu_walk._LEAST_WIDTH
    assert tile <= max(cpu_walk._TILE_BYTES * 1.01, 4 * plan.rows * least)
    assert plan.rows <= 1024
    if trained:
        assert plan.rows <= (16 if onednn else 4) or 4 * plan.rows * vocab <= 4 * max(64 * 2**20, vocab * 64)
    covered = [i for block in plan.blocks() for i in (block.start, block.stop)]
    assert covered == sorted(covered)
    assert (covered[0], covered[-1]) == (0, tokens)
    assert sum(b.stop - b.start for b in plan.blocks()) == tokens
    assert sum(t.stop - t.start for t in plan.tiles()) == vocab


@pytest.mark.parametrize("vocab", [49_152, 151_936])
@pytest.mark.parametrize("trained", [False, True])
def test_products_that_remember_shapes_are_asked_for_few(vocab: int, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any size up to 8,192 tokens: what oneDNN would keep for each new shape stays bounded."""
    multiply_with_onednn(monkeypatch, True)
    shapes = set()
    for tokens in range(1, 8193):
        plan = plan_of(tokens, vocab, 576, trained)
        rows = {matmul._round_up(block.stop - block.start) for block in plan.blocks()}
        shapes |= {(R, tile.stop - tile.start) for R in rows for tile in plan.tiles()}
    assert len(shapes) <= 72


@pytest.mark.parametrize("tokens", [1, 777, 8192, 100_000])
def test_tiles_on_a_gpu_suit_its_matrix_units_and_stay_within_their_budgets(tokens: int) -> None:
    """An H200 multiplies tiles of 3,999 columns at 102 TFLOP/s, of 4,096 at 766."""
    plan = gpu_walk._plan(tokens, 151_936)
    again = gpu_walk._slopes_plan(plan, 2)
    for one in (plan, again):
        assert one.width % 128 == 0
        assert [i for part in one.blocks() for i in range(part.start, part.stop)] == list(range(tokens))
        assert sum(tile.stop - tile.start for tile in one.tiles()) == 151_936
        assert 4 * one.rows * one.width <= gpu_walk._TILE_BYTES
    assert 2 * tokens * again.width <= max(gpu_walk._SLOPE_BYTES, 2 * tokens * gpu_walk._LEAST_WIDTH)
    assert gpu_walk._plan(tokens, 100).width == 100


def test_no_call_shows_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each element that is shown is a wait; a message for an error that did not happen once cost 20 a call."""

    def shown(*args: Any, **kwargs: Any) -> str:
        raise AssertionError("a tensor was shown")

    monkeypatch.setattr(torch._tensor_str, "_str", shown)
    for case in (full_case(5, 7), anchored_case(5, 7)):
        run(linear_cross_entropy, case)


def test_rows_that_fill_up_a_block_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_with_onednn(monkeypatch, True)
    for case in (full_case(5, 7), anchored_case(5, 7), random_case(21, ignored=0.0, exponent=1.0)):
        case = replace(case, hidden=case.hidden.clone())
        case.hidden.view(-1, 24)[-1] = torch.inf  # ignored, so it is nowhere
        case.targets.view(-1)[-1] = -100
        out, grads = run(linear_cross_entropy, case)
        truth = per_token(case)
        assert relative(out.loss, truth.loss) <= 2 * FP32
        assert out.nll.shape == case.targets.shape
        assert grads["weight"] is not None
        assert relative(grads["weight"], truth.weight * 0.37) <= 2 * FP32


def test_the_users_word_against_onednn_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_with_onednn(monkeypatch, True)
    monkeypatch.setattr(matmul, "_multiplies_bf16", lambda: True)
    monkeypatch.delattr(matmul, "_onednn")
    with torch.backends.mkldnn.flags(enabled=False):
        run(linear_cross_entropy, random_case(3, 7))
        run(linear_cross_entropy, random_case(3, 7, dtype=torch.bfloat16))


def test_kernels_that_do_not_run_are_reported_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in an image without Triton, or without the C compiler that its launchers need."""
    monkeypatch.setitem(sys.modules, "dwl_plugin.loss.step_kernel", None)
    gpu_walk._kernels.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"without its Triton kernels, slower: \w+: .*step_kernel"):
            assert isinstance(gpu_walk._kernels(torch.device("cpu"), torch.bfloat16), TorchSteps)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gpu_walk._kernels(torch.device("cpu"), torch.bfloat16)  # said once
    finally:
        gpu_walk._kernels.cache_clear()


def test_kernels_are_tried_in_the_dtype_of_the_matmuls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton of torch 2.6 compiles no bf16 for a card before Ampere."""
    step_kernel = pytest.importorskip("dwl_plugin.loss.step_kernel")

    def advance(self: Any, ours: Products, *args: Any, **kwargs: Any) -> None:
        if ours.exp_RW is not None and ours.exp_RW.dtype == torch.bfloat16:
            raise RuntimeError("Feature '.bf16' requires .target sm_80 or higher")

    monkeypatch.setattr(step_kernel.TritonSteps, "advance", advance)
    gpu_walk._kernels.cache_clear()
    try:
        assert isinstance(gpu_walk._kernels(torch.device("cpu"), torch.float16), step_kernel.TritonSteps)
        with pytest.warns(UserWarning, match="requires .target sm_80"):
            assert isinstance(gpu_walk._kernels(torch.device("cpu"), torch.bfloat16), TorchSteps)
    finally:
        gpu_walk._kernels.cache_clear()


def test_kernels_are_tried_in_fp32_whatever_the_default_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    step_kernel = pytest.importorskip("dwl_plugin.loss.step_kernel")
    tried = []

    def advance(self: Any, ours: Products, rows: SoftmaxRows, *args: Any, **kwargs: Any) -> None:
        tried.extend([ours.logits_RW.dtype, rows.total_R.dtype, rows.reference_R.dtype, rows.target_R.dtype])

    monkeypatch.setattr(step_kernel.TritonSteps, "advance", advance)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        gpu_walk._kernels.__wrapped__(torch.device("cpu"), torch.bfloat16)
    finally:
        torch.set_default_dtype(before)
    assert tried == [torch.float32] * 4


@pytest.mark.parametrize("others_run", [False, True], ids=["no kernel runs", "only Hopper's do not"])
def test_kernels_for_hopper_that_do_not_run_are_reported_and_replaced(others_run: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper = pytest.importorskip("dwl_plugin.loss.hopper")

    def advance(self: Any, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(hopper.HopperSteps, "advance", advance)
    monkeypatch.setattr(gpu_walk, "_hopper", lambda device: hopper.HopperSteps())
    monkeypatch.setattr(gpu_walk, "_HOPPER_DTYPES", (torch.float32,))
    monkeypatch.setattr(gpu_walk, "_kernels", lambda device, operand: object() if others_run else TorchSteps())
    monkeypatch.setattr(gpu_walk, "_runs_on_hopper", functools.cache(gpu_walk._runs_on_hopper.__wrapped__))
    monkeypatch.setattr(module, "_walk_of", lambda device: gpu_walk.forward_backward)
    case = replace(full_case(3, 7), softcap=None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert max(errors(linear_cross_entropy, case).values()) <= FP32
    assert [str(warning.message) for warning in said] == others_run * [
        "[dwl] the loss runs without its kernels for Hopper, slower: RuntimeError: Failed to find C compiler"
    ]


def test_the_module_path_has_a_budget() -> None:
    assert set(chunked._CHUNK_BYTES) == {"cpu", "cuda"}


def test_a_gpu_that_cannot_sum_wider_multiplies_in_fp32_and_says_so() -> None:
    """This CPU is one: a torch before 2.8, most of ROCm's, and bf16 before Ampere raise likewise, each in its own way."""
    matmul._has_out_dtype.cache_clear()
    device = torch.device("cpu")
    with pytest.warns(UserWarning, match="multiplies bfloat16 as fp32, slower"):
        assert not matmul._has_out_dtype(device, torch.bfloat16)
    multiply = matmul.multiplier(device, torch.bfloat16, torch.float32)
    a, b = torch.randn(5, 7).bfloat16(), torch.randn(7, 3).bfloat16()
    out = torch.empty(5, 3)
    multiply.into(out, a, b)
    multiply.onto(out, a, b)
    assert relative(out, 2 * a.double() @ b.double()) <= FP32


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float16])
def test_fp64_stays_fp64_until_it_is_rounded(out: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the gradient of a head in bf16 under hidden states in fp64; and no GPU is asked whether it can."""
    monkeypatch.setattr(matmul, "_has_out_dtype", lambda device, dtype: pytest.fail("asked"))
    multiply = matmul.multiplier(torch.device("cuda"), torch.float64, out)
    a, b = torch.tensor([[2.0**24 + 1, -(2.0**24)]], dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    found = torch.empty(1, 1, dtype=out)
    multiply.into(found, a, b)
    assert found.item() == 1.0


def test_fp16_that_torch_may_sum_in_fp16_is_not_asked_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_has_out_dtype", lambda device, dtype: True)
    assert matmul._sums_wider(torch.device("cuda", 0), torch.float16)
    before = torch.backends.cuda.matmul.allow_fp16_accumulation
    torch.backends.cuda.matmul.allow_fp16_accumulation = True
    try:
        assert not matmul._sums_wider(torch.device("cuda", 0), torch.float16)
        assert matmul._sums_wider(torch.device("cuda", 0), torch.bfloat16)
    finally:
        torch.backends.cuda.matmul.allow_fp16_accumulation = before


def test_rows_of_a_tile_begin_at_even_places_in_an_odd_vocabulary_too(monkeypatch: pytest.MonkeyPatch) -> None:
    strides = set()

    class Watched(TorchSteps):
        def advance(self, ours: Products, *arguments: Any, **options: Any) -> None:
            strides.update(one.stride(0) for one in (ours.logits_RW, ours.exp_RW) if one is not None)
            super().advance(ours, *arguments, **options)

        def slopes(self, ours: Products, *arguments: Any) -> None:
            strides.update(one.stride(0) for one in (ours.logits_RW, ours.exp_RW) if one is not None)
            super().slopes(ours, *arguments)

    monkeypatch.setattr(gpu_walk, "steps_for", lambda *_: Watched())
    monkeypatch.setattr(module, "_walk_of", lambda _: gpu_walk.forward_backward)
    assert max(errors(linear_cross_entropy, random_case(5, vocab=1009, width=8)).values()) <= FP32
    assert strides == {1024}
