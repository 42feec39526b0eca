"""Time and memory of a call under other plans: rows of a block, bytes of a tile, bytes of a trained head's second pass."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

from bench.gpu.common import MIB, TOY, Table, inputs, milliseconds, peak_mib
from dwl_plugin import linear_cross_entropy
from dwl_plugin.loss import gpu_walk

N, H, V = (256, 32, 1009) if TOY else (8192, 4096, 151936)
Plan = dict[str, int]
"""Constants of `gpu_walk`, and what they are instead."""
FROZEN: list[Plan] = [
    *({"_ROWS": rows, "_TILE_BYTES": tile * MIB} for rows in (1024, 2048, 4096, 8192) for tile in (16, 32, 64, 128)),
    *({"_WIDTH_MULTIPLE": multiple} for multiple in (1, 128, 256)),
]
TRAINED: list[Plan] = [{"_SLOPE_BYTES": slope * MIB} for slope in (32, 64, 128, 256)]


def measured(plan: Plan, trained: bool) -> tuple[float, float]:
    hidden, weight, targets = inputs(N, H, V, trained=trained)

    def call() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets).loss.backward()

    with ExitStack() as stack:
        for name, value in plan.items():
            stack.enter_context(patch.object(gpu_walk, name, value))
        taken = milliseconds(call, 50)
        hidden.grad = weight.grad = None
        return taken, peak_mib(call)


def shown(plan: Plan) -> str:
    parts = [
        f"{name[1:].lower()} {value // MIB} MiB" if "BYTES" in name else f"{name[1:].lower()} {value}"
        for name, value in plan.items()
    ]
    return ", ".join(parts) or "as it is"


def main() -> None:
    table = Table(f"plans at {N}x{H}x{V}, bf16", "plan", "ms", "MiB at the peak")
    for trained, plans in ((False, FROZEN), (True, TRAINED)):
        for plan in [Plan(), *plans]:
            table.measure(f"{'trained' if trained else 'frozen'}: {shown(plan)}", partial(measured, plan, trained))


if __name__ == "__main__":
    main()
