"""Forward and backward of the head and its loss, beside the matmuls alone: ours, Liger, Apple's CCE, full logits. Time, memory, and
the errors of the gradients.

The logits are peaked like a trained model's, most of the mass on a few tokens: CCE's filter then leaves out blocks, and its
gradients are approximate; the last columns say by how much.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F

from bench.gpu.common import CUDA, DEVICE, TOY, Table, milliseconds, peak_mib
from dwl_plugin import linear_cross_entropy
from dwl_plugin.loss import gpu_walk
from dwl_plugin.loss.matmul import multiplier

Shape = tuple[int, int, int, float | None]
SHAPES: list[Shape] = (
    [(40, 32, 1009, None)]
    if TOY
    else [(8192, 4096, 151936, None), (4096, 2048, 151936, None), (2048, 1536, 151936, None), (2048, 2304, 256000, 30.0)]
)
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
CHECKED = 256
"""Rows whose gradient is compared with fp32's."""


def data(N: int, H: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(V, H, device=DEVICE).mul_(H**-0.5).bfloat16()
    targets = torch.randint(0, V, (N,), device=DEVICE)
    # The target's logit is 4 to 24 above the rest, whose spread is 1.5.
    hidden = weight[targets].float() * torch.linspace(4, 24, N, device=DEVICE)[:, None] + torch.randn(N, H, device=DEVICE) * 1.5
    return hidden.bfloat16().requires_grad_(), weight, targets


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def losses(N: int, softcap: float | None, *, trained: bool) -> dict[str, Loss]:
    weight, exponent = torch.linspace(0.5, 1.5, N, device=DEVICE), torch.linspace(0.0, 1.0, N, device=DEVICE)
    weighted: dict[str, Any] = {"token_weight": weight, "exponent": exponent, "min_weight": 0.01}

    def ours(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, **more: Any) -> torch.Tensor:
        return linear_cross_entropy(h, w, t, softcap=softcap, **more).loss

    def liger(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        loss: torch.Tensor = liger_fused_linear_cross_entropy(h, w, t, softcap=softcap, reduction="sum")
        return loss

    def cce(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, **more: Any) -> torch.Tensor:
        from cut_cross_entropy import linear_cross_entropy as cut

        options = {"impl": "cce", **more} if CUDA else {"impl": "torch_compile"}
        loss: torch.Tensor = cut(h, w, t, softcap=softcap, reduction="sum", **options)
        return loss

    def full(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(capped(F.linear(h, w), softcap).float(), t, reduction="sum")

    def ours_with_cublas(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with patch.object(gpu_walk, "_hopper", lambda device: None):
            return ours(h, w, t)

    def ours_saving_nothing(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with patch.object(gpu_walk, "_tiles_to_save", lambda *of: 0):
            return ours(h, w, t)

    on_hopper = CUDA and gpu_walk._hopper(torch.device(DEVICE, 0)) is not None and softcap is None
    found: dict[str, Loss] = {
        "ours, nll": ours,
        **({"ours, nll, without loss/hopper.py": ours_with_cublas} if on_hopper else {}),
        **({"ours, nll, no exponentials saved": ours_saving_nothing} if trained else {}),
        "ours, weights, exponents, floor": partial(ours, **weighted),
        "Liger": liger,
        "CCE": cce,
        "CCE, unfiltered": partial(cce, filter_eps=None),
        "full logits": full,
        "full logits, compiled": torch.compile(full, dynamic=True),
    }
    if TOY:  # the others want a GPU, or would do nothing but compile
        found = {name: loss for name, loss in found.items() if name.startswith(("ours", "full logits")) and "compiled" not in name}
    return found


class Exact(NamedTuple):
    """∂hidden of the first rows and ∂W of the tokens that are their targets, in fp32."""

    tokens: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor


def exact_gradients(h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, softcap: float | None) -> Exact:
    with torch.no_grad():
        tokens = t[:CHECKED].unique()
        wide, hidden = w.float(), torch.empty(0)
        weight = torch.zeros(len(tokens), h.shape[1], device=DEVICE)
        for start in range(0, len(t), CHECKED):
            rows, targets = h[start : start + CHECKED].float(), t[start : start + CHECKED]
            logits = capped(F.linear(rows, wide), softcap)
            slope = 1 if softcap is None else 1 - (logits / softcap).square()
            grad = (logits.softmax(1) - F.one_hot(targets, len(w))) * slope
            if start == 0:
                hidden = grad @ wide
            weight += grad[:, tokens].t() @ rows
        return Exact(tokens, hidden, weight)


def measured(loss: Loss, h: torch.Tensor, w: torch.Tensor, t: torch.Tensor, exact: Exact | None) -> tuple[float, float, str, str]:
    def call() -> None:
        h.grad = w.grad = None
        loss(h, w, t).backward()

    taken = milliseconds(call, 120)  # and with that warm
    h.grad = w.grad = None
    memory = peak_mib(call)
    assert h.grad is not None
    if exact is None:
        return taken, memory, "", ""
    of_weight = "" if w.grad is None else error(w.grad[exact.tokens], exact.weight)
    return taken, memory, error(h.grad[: len(exact.hidden)], exact.hidden), of_weight


def error(got: torch.Tensor, want: torch.Tensor) -> str:
    return f"{float((got.float() - want).norm() / want.norm()):.1e}"


def matmuls_alone(h: torch.Tensor, w: torch.Tensor, *, trained: bool, width: int = 4096) -> float:
    """Milliseconds of two or three products of these operands with sums in fp32, in tiles, and of nothing else."""
    (N, H), V = h.shape, len(w)
    width = min(width, V)
    hidden, weight = h.detach(), w.detach()
    logits, summed = torch.empty(N, width, device=DEVICE), torch.zeros(N, H, device=DEVICE)
    exps, grad = torch.rand(N, width, device=DEVICE).to(h.dtype), torch.empty(width, H, dtype=w.dtype, device=DEVICE)
    multiply = multiplier(h.device, h.dtype, torch.float32)

    def call() -> None:
        for start in range(0, V, width):
            part = weight[start : start + width]
            multiply.into(logits[:, : len(part)], hidden, part.t())
            multiply.onto(summed, exps[:, : len(part)], part)
            if trained:
                torch.mm(exps[:, : len(part)].t(), hidden, out=grad[: len(part)])

    return milliseconds(call, 120)


def main() -> None:
    table = Table("forward and backward", "loss", "ms", "MiB more at the peak", "error of ∂hidden", "error of ∂W")
    for index, (N, H, V, softcap) in enumerate(SHAPES):
        for trained in (False, True):
            h, w, t = data(N, H, V)
            w.requires_grad_(trained)
            matmuls = 3 if trained else 2
            case = f"{N}x{H}x{V}{', softcap' if softcap else ''}, {'trained' if trained else 'frozen'}"
            table.add(f"{case}: {matmuls} matmuls are {matmuls * 2 * N * H * V / 1e12:.1f} TFLOP", "", "", "", "")
            exact = exact_gradients(h, w, t, softcap)
            table.add("  the matmuls alone", matmuls_alone(h, w, trained=trained), "", "", "")
            for name, loss in losses(N, softcap, trained=trained).items():
                if "compiled" in name and index != 1:
                    continue
                table.measure(f"  {name}", partial(measured, loss, h, w, t, None if "weights" in name else exact))
                h.grad = w.grad = None
            del h, w, t, exact
            if CUDA:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
