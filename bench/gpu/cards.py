"""Does QLoRA fit a small card: what one call of the loss allocates with a frozen head in bf16, beside the formula for it, which is
in `dwl_plugin/loss/workspace.py`. Exit status 1 if a call takes a twentieth more than that.
"""

from __future__ import annotations

import sys
from functools import partial

from bench.gpu.common import MIB, TOY, Table, inputs, peak_mib
from dwl_plugin import linear_cross_entropy
from dwl_plugin.loss import gpu_walk
from dwl_plugin.loss.workspace import loss_bytes

SHAPES = [(40, 32, 1009)] if TOY else [(T, H, V) for T in (2048, 4096, 8192) for H, V in ((2048, 151_936), (2304, 262_144))]


def by_formula(T: int, N: int, H: int, V: int) -> int:
    """Bytes of a call with N targets among T positions, in the blocks and tiles that it takes."""
    plan = gpu_walk._plan(N, V)
    return loss_bytes(T, N, H, rows=plan.rows, tile_bytes=plan.rows * plan.width * 6)


def measured(T: int, H: int, V: int) -> tuple[float, float, float, float]:
    """MiB: measured, by the formula, and what full logits take, 12 bytes each; then the first by the second. Half are prompts."""
    hidden, weight, targets = inputs(T, H, V, trained=False)
    targets[::2] = -100

    def call() -> None:
        hidden.grad = None
        linear_cross_entropy(hidden, weight, targets).loss.backward()

    call()
    hidden.grad = None
    found, formula = peak_mib(call), by_formula(T, T // 2, H, V) / MIB
    return found, formula, 12 * T * V / MIB, found / formula


def main() -> int:
    table = Table("frozen head, bf16", "positions x H x V", "MiB", "by the formula", "full logits", "measured / formula")
    too_much = False
    for T, H, V in SHAPES:
        worked = table.measure(f"{T}x{H}x{V}", partial(measured, T, H, V))
        too_much |= not worked or table.last[-1] > 1.05
    return int(too_much)


if __name__ == "__main__":
    sys.exit(main())
