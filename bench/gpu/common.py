"""What the stages share: the device, how to time and to measure memory on it, and tables for people and for programs."""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOY = not CUDA
"""Toy sizes, which show that a stage starts and nothing else."""
OUT = Path(os.environ.get("OUT") or "gpu-out")
MIB = 2**20

Work = Callable[[], Any]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(work: Work, budget: float = 150.0) -> float:
    """Median time of a call after one to warm up, repeated for `budget` ms on a GPU."""
    work()
    synchronize()
    if CUDA:
        from triton.testing import do_bench

        return float(do_bench(work, warmup=25, rep=budget, return_mode="median"))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def peak_mib(work: Work) -> float:
    """What one call adds at its peak to what is allocated before it; NaN without a GPU."""
    if not CUDA:
        work()
        return float("nan")
    synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    synchronize()
    return float(torch.cuda.max_memory_allocated() - before) / MIB


class Table:
    """Rows that are printed and written to `results.jsonl` as they come, so that a stage out of time leaves what it has."""

    def __init__(self, title: str, *columns: str) -> None:
        self.title, self.columns, self.last = title, columns, tuple[Any, ...]()
        print(f"\n## {title}\n{' | '.join(columns)}", flush=True)

    def add(self, *cells: Any) -> None:
        self.last = cells
        print(" | ".join(map(_shown, cells)), flush=True)
        row = {"stage": Path(sys.argv[0]).stem, "table": self.title, **dict(zip(self.columns, cells, strict=True))}
        with (OUT / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def measure(self, name: str, work: Callable[[], Any]) -> bool:
        """A row of what `work` returns, a cell or a tuple of cells, or of the error that it raises; whether it raised none."""
        try:
            found = work()
        except Exception as error:
            first = str(error).splitlines()[0][:90] if str(error) else ""
            self.add(name, f"{type(error).__name__}: {first}", *[""] * (len(self.columns) - 2))
            return False
        self.add(name, *(found if isinstance(found, tuple) else (found,)))
        return True


def _shown(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return str(cell)


def inputs(N: int, H: int, V: int, *, trained: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (N, H) and a head (V, H) in bf16, and targets (N,)."""
    hidden = torch.randn(N, H, device=DEVICE).bfloat16().requires_grad_()
    weight = (torch.randn(V, H, device=DEVICE) * 0.05).bfloat16().requires_grad_(trained)
    return hidden, weight, torch.randint(0, V, (N,), device=DEVICE)


def four_terms(N: int) -> list[Term]:
    """A quarter of the tokens under each token loss."""
    quarter = torch.arange(N, device=DEVICE) % 4
    losses = (Power(), Power(1.0, 0.0, 0.7), Focal(2.0), EntropyGate(1.0, 20))
    return [Term(loss, (quarter == k).float()) for k, loss in enumerate(losses)]


def anchor(N: int, H: int, weight: float = 0.05) -> Anchor:
    """To a base model under the head of the call."""
    return Anchor(torch.full((N,), weight, device=DEVICE), torch.randn(N, H, device=DEVICE).bfloat16())
