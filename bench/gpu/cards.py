"""Does QLoRA fit a small card: what one call of the loss allocates with a frozen head in bf16, beside the formula for it.

    N·H·2       ∂hidden, which the model wants anyway
    R·H·(4 + 2) of a block of R rows: its ∂hidden in fp32, its hidden states where some tokens are ignored
    R·W·(4 + 2) of a block and a tile of W tokens: products in fp32, exponentials in bf16; 48 MiB at most
    N·(8 + 80)  numbers of each token

R and W are those of `gpu_walk`. V is in none of them. Exit status 1 if a call takes a twentieth more than that.
"""

from __future__ import annotations

import sys
from functools import partial

from bench.gpu.common import MIB, TOY, Table, inputs, peak_mib
from dwl_plugin import linear_cross_entropy
from dwl_plugin.loss import gpu_walk

SHAPES = [(40, 32, 1009)] if TOY else [(N, H, V) for N in (2048, 4096, 8192) for H, V in ((2048, 151_936), (2304, 262_144))]
NUMBERS = 88
"""Bytes of each token: its position, target, loss, nll, coefficients."""


def by_formula(N: int, H: int, V: int, *, ignored: bool = True) -> int:
    """Bytes; N are the targets, and all positions there are."""
    plan = gpu_walk._plan(N, V)
    return N * H * 2 + plan.rows * (H * (6 if ignored else 4) + plan.width * 6) + N * NUMBERS


def measured(N: int, H: int, V: int) -> tuple[float, float, float, float]:
    """MiB: measured, by the formula; and what full logits would take, 12 bytes each, by theirs; then the first by the second."""
    hidden, weight, targets = inputs(N, H, V, trained=False)
    targets[0] = -100

    def call() -> None:
        hidden.grad = None
        linear_cross_entropy(hidden, weight, targets).loss.backward()

    call()
    hidden.grad = None
    found, formula = peak_mib(call), by_formula(N, H, V) / MIB
    return found, formula, 12 * N * V / MIB, found / formula


def main() -> int:
    table = Table("frozen head, bf16", "tokens x H x V", "MiB", "by the formula", "full logits", "measured / formula")
    too_much = False
    for N, H, V in SHAPES:
        worked = table.measure(f"{N}x{H}x{V}", partial(measured, N, H, V))
        too_much |= not worked or table.last[-1] > 1.05
    return int(too_much)


if __name__ == "__main__":
    sys.exit(main())
