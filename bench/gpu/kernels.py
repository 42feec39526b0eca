"""The parts of one tile alone: what the alignment of its width is worth, and what the steps between the matmuls cost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench.gpu.common import DEVICE, MIB, TOY, Table, Work, milliseconds
from dwl_plugin.loss import gpu_walk
from dwl_plugin.loss.matmul import add_product, add_transposed_product, product
from dwl_plugin.loss.step import BaseRows, Form, Products, Slopes, SoftmaxRows, TopRows

R, H = (64, 64) if TOY else (2048, 4096)
WIDTHS = (96, 97) if TOY else (4096, 3999, 4000, 3968, 8192, 16384)
W = 96 if TOY else gpu_walk._TILE_BYTES // (4 * R)


def matmuls(width: int) -> tuple[float, ...]:
    """TFLOP/s of the products of one tile, with fp32 sums; and of the first with its result in bf16."""
    hidden = torch.randn(R, H, device=DEVICE).bfloat16()
    weight = (torch.randn(width, H, device=DEVICE) * 0.05).bfloat16()
    exp = torch.rand(R, width, device=DEVICE).bfloat16()
    logits, grad_hidden = torch.empty(R, width, device=DEVICE), torch.zeros(R, H, device=DEVICE)
    grad_weight = torch.empty(width, H, device=DEVICE, dtype=torch.bfloat16)
    works: list[Work] = [
        lambda: product(hidden, weight.t(), torch.float32, out=logits),
        lambda: torch.mm(hidden, weight.t()),
        lambda: add_product(grad_hidden, exp, weight, first=False),
        lambda: add_transposed_product(grad_weight, exp, hidden, first=True),
    ]
    return tuple(2 * R * H * width / milliseconds(work, 60) / 1e9 for work in works)


def cost(work: Work, moved: int) -> tuple[float, float]:
    """Milliseconds, and TB/s if `moved` bytes are what it has to read and write."""
    taken = milliseconds(work, 60)
    return taken, moved / taken / 1e9


def steps(softcap: float | None) -> dict[str, tuple[Work, int]]:
    """The steps of a tile as they are on this machine, and the bytes that each has to move: of logits that no row's reference lags
    behind, which is how nearly all tiles are."""
    does = gpu_walk.steps_for(torch.device(DEVICE), torch.bfloat16, torch.float32)
    form = Form(1.0 / (softcap or 1.0), softcap, lag=8.0, lift=0.0)

    def numbers(*shape: int, value: float | None = None) -> torch.Tensor:
        return torch.rand(*shape, device=DEVICE) if value is None else torch.full(shape, value, device=DEVICE)

    def products() -> Products:
        return Products(torch.randn(R, W, device=DEVICE), None, torch.empty(R, W, device=DEVICE, dtype=torch.bfloat16))

    exps = torch.rand(R, W, device=DEVICE).bfloat16()
    ours, theirs, targets = products(), products(), torch.randint(0, W, (R,), device=DEVICE)
    rows = SoftmaxRows(numbers(R), numbers(R, value=4.0), numbers(R), numbers(R, H))
    base_rows = BaseRows(numbers(R), numbers(R, value=4.0), numbers(R), numbers(R, H))
    of = Slopes(targets, numbers(R, value=4.0), numbers(R), numbers(R))
    weight, out = numbers(W, H).bfloat16(), numbers(R, H).bfloat16()
    back, one = numbers(value=-1.0), numbers(value=1.0)
    top = TopRows(torch.full((R, 32), torch.inf, device=DEVICE), 20, None)
    top.top_RK[:, :20] = 5.0
    advance: Callable[..., Any] = partial(does.advance, ours, rows, targets, 0, form, first=False)
    return {
        "advance": (lambda: advance(None, None, None), 6 * R * W),
        "advance, k = 20": (lambda: advance(None, None, top), 10 * R * W),
        "advance with an anchor": (lambda: advance(theirs, base_rows, None), 16 * R * W),
        "slopes": (lambda: does.slopes(ours, of, 0, form, None), 6 * R * W),
        "saved slopes": (lambda: does.saved_slopes(exps, rows.reference_R, of, 0, form), 4 * R * W),
        "finish": (lambda: does.finish(out, None, rows.summed_RH, weight, torch.bfloat16, of, None), 8 * R * H),
        "scale": (lambda: does.scale(weight, back), 4 * W * H),
        "scale by 1": (lambda: does.scale(weight, one), 0),
    }


def main() -> None:
    table = Table("TFLOP/s of the matmuls of a tile", "tile", "logits, fp32", "logits, bf16", "∂hidden +=", "∂W")
    for width in WIDTHS:
        table.measure(f"{R}x{H}x{width}", partial(matmuls, width))
    name = type(gpu_walk.steps_for(torch.device(DEVICE), torch.bfloat16, torch.float32)).__name__
    table = Table(f"{name} of a tile, {R}x{W} ({R * W * 4 / MIB:.3g} MiB)", "what", "ms", "TB/s")
    for softcap in (None, 30.0):
        for step, (work, moved) in steps(softcap).items():
            table.measure(f"{step}{', softcap' if softcap else ''}", partial(cost, work, moved))


if __name__ == "__main__":
    main()
