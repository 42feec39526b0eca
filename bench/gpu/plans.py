"""Time and memory of a call under other plans: rows of a block, bytes of a tile, widths that suit the matrix units."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from bench.gpu.common import DEVICE, MIB, TOY, Table, inputs, milliseconds, peak_mib
from dwl_plugin import linear_cross_entropy
from dwl_plugin.loss import fused_walk

N, H, V = (256, 32, 1009) if TOY else (8192, 4096, 151936)
Plan = tuple[int, int, int]
"""Rows of a block, MiB of a tile's logits, what a tile's width is a multiple of."""
FROZEN: list[Plan] = [(rows, tile, 128) for rows in (1024, 2048, 4096, 8192) for tile in (16, 32, 64, 128, 256)] + [(8192, 128, 1)]
TRAINED: list[Plan] = [(2048, 128, 128), (8192, 128, 128)]


@contextmanager
def planned(plan: Plan | None) -> Iterator[None]:
    """The pass over the vocabulary with other sizes; None: as it is."""
    if plan is None:
        yield
        return
    rows, tile, multiple = plan
    was = fused_walk._ROWS, fused_walk._TILE_BYTES, fused_walk._plan

    def aligned(*arguments: Any, **options: Any) -> Any:
        found = was[2](*arguments, **options)
        return replace(found, width=max(multiple, found.width - found.width % multiple))

    fused_walk._ROWS, fused_walk._TILE_BYTES, fused_walk._plan = {DEVICE: rows}, {DEVICE: tile * MIB}, aligned
    try:
        yield
    finally:
        fused_walk._ROWS, fused_walk._TILE_BYTES, fused_walk._plan = was


def measured(plan: Plan | None, trained: bool) -> tuple[float, float]:
    hidden, weight, targets = inputs(N, H, V, trained=trained)

    def call() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets).loss.backward()

    with planned(plan):
        return milliseconds(call, 50), peak_mib(call)


def main() -> None:
    table = Table(f"plans at {N}x{H}x{V}, bf16", "plan", "ms", "MiB more at the peak")
    for trained, plans in ((False, FROZEN), (True, TRAINED)):
        for plan in [None, *plans]:
            name = "as it is" if plan is None else "{} rows, {} MiB, multiples of {}".format(*plan)
            table.measure(f"{'trained' if trained else 'frozen'}: {name}", partial(measured, plan, trained))


if __name__ == "__main__":
    main()
