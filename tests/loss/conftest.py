"""Processors and block sizes to test the loss on."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from dwl_plugin.loss import cpu_walk, gpu_walk, linear_cross_entropy, matmul
from dwl_plugin.loss.step import TorchSteps
from tests.loss.cases import multiply_with_onednn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run by Python on the CPU: `TRITON_INTERPRET=1 pytest tests/loss`."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks and several tiles, with shapes that divide nothing evenly."""
    monkeypatch.setattr(matmul, "_WIDTH", 16)
    for walk in (cpu_walk, gpu_walk):
        monkeypatch.setattr(walk, "_ROWS", 11)
        monkeypatch.setattr(walk, "_TILE_BYTES", 11 * 4 * 17)
        monkeypatch.setattr(walk, "_LEAST_WIDTH", 16)
    monkeypatch.setattr(gpu_walk, "_SLOPE_BYTES", 600)
    monkeypatch.setattr(gpu_walk, "_EXP_BYTES", 11 * 4 * 40)
    monkeypatch.setattr(gpu_walk, "_WIDTH_MULTIPLE", 1)
    monkeypatch.setattr(gpu_walk, "_ROW_MULTIPLE", 1)
    if INTERPRETED:
        from dwl_plugin.loss import step_kernel

        monkeypatch.setattr(gpu_walk, "_TILE_BYTES", 11 * 4 * 53)  # a tile of a row takes Python milliseconds
        for name, size in {"BLOCK": 32, "BLOCK_TOP": 32, "BLOCK_H": 16}.items():
            monkeypatch.setattr(step_kernel, name, size)


@pytest.fixture(params=["gpu, Triton"] if INTERPRETED else ["cpu", "cpu, oneDNN", "gpu"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The walk of a CPU with either library's products, and that of a GPU: its torch steps, or its kernels interpreted."""
    multiply_with_onednn(monkeypatch, request.param == "cpu, oneDNN")
    if request.param.startswith("gpu"):
        monkeypatch.setattr(linear_cross_entropy, "_walk_of", lambda device: gpu_walk.forward_backward)
    if request.param.endswith("Triton"):
        from dwl_plugin.loss.step_kernel import TritonSteps

        monkeypatch.setattr(
            gpu_walk, "steps_for", lambda device, operand, summed: TritonSteps() if summed == torch.float32 else TorchSteps()
        )
    return str(request.param)


@pytest.fixture(params=[False, True], ids=["bf16 emulated", "bf16 in hardware"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bf16, and one with them."""
    if request.param and not matmul._multiplies_bf16():
        pytest.skip("this CPU has no instructions for bf16")
    monkeypatch.setattr(matmul, "_multiplies_bf16", lambda: request.param)


@pytest.fixture(params=[False, True], ids=["mm", "oneDNN"])
def matmuls_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[how many so far]"""
    multiply_with_onednn(monkeypatch, request.param)
    count = [0]
    for owner, name in ((torch, "mm"), (torch, "addmm"), (matmul, "_onednn")):
        original = getattr(owner, name)

        def counted(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            count[0] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return count
