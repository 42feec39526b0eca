"""The parts of one tile alone: what the alignment of its width is worth, and what the step between the matmuls costs."""

from __future__ import annotations

from functools import partial

import torch

from bench.gpu.common import CUDA, DEVICE, TOY, Table, Work, milliseconds
from dwl_plugin.loss import fused_walk
from dwl_plugin.loss.matmul import add_product, add_transposed_product, product

R, H = (64, 64) if TOY else (8192, 4096)
WIDTHS = (96, 97) if TOY else (4096, 3999, 4000, 3968, 8192, 16384)


def matmuls(width: int) -> tuple[float, ...]:
    """TFLOP/s of the products of one tile, with fp32 sums; and of the first with its result in bf16."""
    hidden = torch.randn(R, H, device=DEVICE).bfloat16()
    weight = (torch.randn(width, H, device=DEVICE) * 0.05).bfloat16()
    exp = torch.rand(R, width, device=DEVICE).bfloat16()
    logits, grad_hidden = torch.empty(R, width, device=DEVICE), torch.zeros(R, H, device=DEVICE)
    grad_weight = torch.empty(width, H, device=DEVICE)
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


def main() -> None:
    table = Table("TFLOP/s of the matmuls of a tile", "tile", "logits, fp32", "logits, bf16", "∂hidden +=", "∂W")
    for width in WIDTHS:
        table.measure(f"{R}x{H}x{width}", partial(matmuls, width))
    width = WIDTHS[0]
    logits = torch.randn(R, width, device=DEVICE)
    targets = torch.randint(0, width, (R,), device=DEVICE)
    grad_hidden, rescale = torch.rand(R, H, device=DEVICE), torch.rand(R, device=DEVICE)
    state = fused_walk._Softmax.start(R, logits.device, torch.float32)
    before = (state.sum_exp_others_R, state.running_max_R, state.target_logit_R)
    # Compiling for a CPU takes longer than all the rest of this stage, and is not what runs there.
    step = fused_walk._fused_step() if CUDA else fused_walk._step_fused
    table = Table(f"beside the matmuls, {R}x{width}", "what", "ms", "TB/s")
    for softcap in (None, 30.0):
        once = partial(step, logits, targets, None, 1.0 / (softcap or 1.0), softcap, torch.bfloat16, *before)
        table.measure(f"the step, softcap {softcap}", partial(cost, once, 6 * R * width))
    table.measure("rescaling ∂hidden", partial(cost, partial(grad_hidden.mul_, rescale[:, None]), 8 * R * H))
    table.measure("topk 20 of a tile", partial(cost, partial(logits.topk, 20, 1), 4 * R * width))


if __name__ == "__main__":
    main()
