"""Registers, shared memory and stack of the loss's kernels on every card: Triton compiles for cards that are not there.

    python -m bench.gpu.registers          # all of them
    python -m bench.gpu.registers 86 90

What it compiles are the launches of `TritonSteps` and `HopperSteps` themselves, on tensors without data, so their block sizes and
warps are the ones.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench.gpu.common import OUT, Table
from dwl_plugin.loss.hopper import HopperSteps
from dwl_plugin.loss.step import BaseRows, Form, Products, Slopes, SoftmaxRows, TopRows
from dwl_plugin.loss.step_kernel import TritonSteps

CARDS = (75, 80, 86, 89, 90, 100, 120)
OPERANDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CUOBJDUMP = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"


class Used(NamedTuple):
    """Bytes, but for the registers of a thread."""

    registers: int
    stack: int
    shared: int
    local: int

    def __str__(self) -> str:
        spilled = self.stack + self.local
        return f"{self.registers}" + (f" + {spilled} B spilled" if spilled else "")


class _Card:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is kept by it

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling(capability: int) -> Iterator[dict[str, Any]]:
    """Launches compile, and run nothing: kernel -> what was compiled."""
    found: dict[str, Any] = {}

    def launcher(kernel: JITFunction[Any], grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            found[kernel.__name__.removesuffix("_kernel")] = kernel.warmup(*args, grid=grid, **kwargs)

        return launch

    active = patch.object(
        triton.runtime.driver, "_active" if hasattr(triton.runtime.driver, "_active") else "active", _Card(capability)
    )
    with active, patch.object(JITFunction, "__getitem__", launcher):
        yield found


def launch(operand: torch.dtype, *, full: bool, hopper: bool) -> None:
    """Every kernel once, those for Hopper among them or not: with all that a call may have, or with the least."""
    R, W, H, K = 8, 4096, 2048, 32

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def if_full(tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor if full else None

    steps, form = TritonSteps(), Form(1.0, 30.0 if full else None, 8.0, 0.0)
    ours = Products(new(R, W), if_full(new(W)), new(R, W, dtype=operand))
    base, base_rows = ours._replace(), BaseRows(new(R), new(R), new(R), new(R, H))
    targets_R = new(R, dtype=torch.int64)
    rows = SoftmaxRows(new(R), new(R), new(R), new(R, H))
    top = TopRows(new(R, K), 20, if_full(new(R, dtype=torch.bool)))
    of = Slopes(targets_R, new(R), new(R), new(R), if_full(new(1)), if_full(new(R)), if_full(new(R)))
    weight_VH, positions_R = new(2 * W, H, dtype=operand), if_full(new(R, dtype=torch.int64))
    steps.advance(ours, rows, targets_R, W, form, base, base_rows, top, first=False)
    steps.slopes(ours, of, W, form, base if full else None)
    steps.saved_slopes(new(R, W, dtype=operand), new(R), of, W, form)
    steps.finish(new(R, H, dtype=operand), positions_R, rows.summed_RH, weight_VH, operand, of, if_full(new(R, H)))
    steps.scale(weight_VH, new(1))
    if hopper:
        on_hopper, form = HopperSteps(), form._replace(softcap=None)
        operands = on_hopper.rows(new(R, H, dtype=operand)), on_hopper.tokens(weight_VH[:W]), ours.bias_W
        on_hopper.advance(*operands, ours.exp_RW, on_hopper.parts(R, W, targets_R), rows, targets_R, W, form, first=False)
        on_hopper.slopes(*operands, new(R, W, dtype=operand), of, W, form)


def compiled(capability: int, operand: torch.dtype, *, full: bool) -> dict[str, Any]:
    """Kernel -> its `asm`, of every stage."""
    with compiling(capability) as found:
        launch(operand, full=full, hopper=capability == 90 and operand != torch.float32)
    return {name: kernel.asm for name, kernel in found.items()}


def used(capability: int, operand: torch.dtype, *, full: bool) -> dict[str, Used]:
    """Kernel -> what it takes."""
    return {name: _used(asm["cubin"]) for name, asm in compiled(capability, operand, full=full).items()}


def _used(cubin: bytes) -> Used:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed)
    assert numbers, printed
    return Used(*map(int, numbers.groups()))


def main(capabilities: Sequence[int]) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for dtype, operand in OPERANDS.items():
        cards = [f"sm_{capability}" for capability in capabilities]
        table = Table(f"Registers of a thread, {dtype}, Triton {triton.__version__}", "kernel", *cards, "bytes shared")
        for full in (False, True):
            by_card = [_tried(capability, operand, full=full) for capability in capabilities]
            for name in dict.fromkeys(name for card in by_card for name in card):
                takes = [card.get(name) for card in by_card]
                shared = max(one.shared for one in takes if one is not None)
                table.add(name + (", every option" if full else ""), *(one or "–" for one in takes), shared)


def _tried(capability: int, operand: torch.dtype, *, full: bool) -> dict[str, Used]:
    """Nothing where this Triton cannot compile for the card: older ones know no Blackwell, and bf16 only since Ampere."""
    try:
        return used(capability, operand, full=full)
    except Exception as error:
        print(f"sm_{capability}: {type(error).__name__}: {str(error).strip().splitlines()[-1][:100]}")
        return {}


if __name__ == "__main__":
    main([int(capability) for capability in sys.argv[1:]] or CARDS)
