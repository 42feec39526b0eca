"""Memory, shapes of products, and the compiler."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from dwl_plugin.loss import chunked, fused_walk, matmul
from dwl_plugin.loss.linear_cross_entropy import linear_cross_entropy
from tests.loss.cases import FP32, anchored_case, errors, full_case, multiply_with_onednn, random_case, run
from tests.loss.oracle import per_token, relative


def plan_of(tokens: int, vocab: int, width: int, trained: bool) -> fused_walk._Plan:
    operands = matmul.Operands(torch.float32, torch.float32)
    return fused_walk._plan(tokens, vocab, width, trained, 1, operands, torch.device("cpu"))


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
    least = matmul._WIDTH if onednn else fused_walk._LEAST_WIDTH
    assert tile <= max(fused_walk._TILE_BYTES["cpu"] * 1.01, 4 * plan.rows * least)
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


@pytest.mark.parametrize("tokens", [1, 777, 8192])
@pytest.mark.parametrize("trained", [False, True])
def test_strides_of_tiles_on_a_gpu_suit_its_matrix_units(tokens: int, trained: bool) -> None:
    """An H200 multiplies tiles of 3,999 columns at 102 TFLOP/s, of 4,096 at 766."""
    operands = matmul.Operands(torch.bfloat16, torch.bfloat16)
    plan = fused_walk._plan(tokens, 151_936, 4096, trained, 1, operands, torch.device("cuda"))
    assert plan.width % 128 == 0
    assert sum(tile.stop - tile.start for tile in plan.tiles()) == 151_936
    assert fused_walk._plan(tokens, 100, 64, trained, 1, operands, torch.device("cuda")).width == 100


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


def test_a_compiler_that_fails_is_reported_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        def raises(*args: Any) -> Any:
            raise RuntimeError("no compiler here")

        return raises

    monkeypatch.setattr(fused_walk.torch, "compile", broken)
    monkeypatch.setattr(fused_walk, "_fuses", lambda device: True)
    fused_walk._fused_step.cache_clear()
    case = full_case(3, 7)
    try:
        with pytest.warns(UserWarning, match="no compiler here"):
            assert max(errors(linear_cross_entropy, case).values()) <= FP32
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(linear_cross_entropy, case)  # said once
    finally:
        fused_walk._fused_step.cache_clear()


def test_the_module_path_has_a_budget() -> None:
    assert set(chunked._CHUNK_BYTES) == {"cpu", "cuda"}
