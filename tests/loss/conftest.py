"""Processors and block sizes to test the loss on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwl_plugin.loss import fused_walk, matmul
from tests.loss.cases import multiply_with_onednn


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks and several tiles, with shapes that divide nothing evenly."""
    monkeypatch.setitem(fused_walk._ROWS, "cpu", 11)
    monkeypatch.setitem(fused_walk._TILE_BYTES, "cpu", 11 * 4 * 17)
    monkeypatch.setattr(fused_walk, "_LEAST_WIDTH", 16)
    monkeypatch.setattr(matmul, "_WIDTH", 16)


@pytest.fixture(params=["cpu", "cpu, oneDNN", "fused"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The step of a CPU with either library's products, and the one a GPU compiles, here uncompiled."""
    multiply_with_onednn(monkeypatch, request.param == "cpu, oneDNN")
    if request.param == "fused":
        monkeypatch.setattr(fused_walk, "_fuses", lambda device: True)
        monkeypatch.setattr(fused_walk, "_fused_step", lambda: fused_walk._step_fused)
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
