"""Loss and gradients against fp64, beside the naive loss in the same dtype.

A row passes where nothing is further from fp64 than 1.05 times the naive loss is. Exit status 1 if a row fails.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from bench.gpu.common import DEVICE, TOY, Table, anchor, four_terms, inputs
from dwl_plugin import linear_cross_entropy

IGNORED = -100
EXACT = 3e-6
"""An error in fp32 that passes whatever the naive loss has."""


@dataclass(frozen=True)
class Case:
    """N tokens, hidden size H, vocabulary V. Under autocast the head is in fp32."""

    N: int
    H: int
    V: int
    dtype: torch.dtype
    autocast: bool
    softcap: float | None
    has_bias: bool
    scale: float | None
    trained: bool

    def __str__(self) -> str:
        options = {"autocast, fp32 head": self.autocast, "softcap": self.softcap, "bias": self.has_bias, "scale": self.scale}
        kind = "trained" if self.trained else "frozen"
        return " ".join([f"{self.N}x{self.H}x{self.V}", str(self.dtype)[6:], *(key for key, on in options.items() if on), kind])


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm() / want.norm().clamp(min=1e-300))


def by_definition(
    case: Case, leaves: list[torch.Tensor | None], targets: torch.Tensor, weights: torch.Tensor, exponents: torch.Tensor
) -> torch.Tensor:
    hidden, weight, bias = leaves
    assert hidden is not None
    assert weight is not None
    counts = targets != IGNORED
    logits = F.linear(hidden[counts], weight, bias) * (case.scale or 1.0)
    if case.softcap:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    nll = F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets[counts], reduction="none")
    factor = (-nll.detach() * exponents[counts].to(nll)).exp()
    return (weights[counts].to(nll) * factor * nll).sum()


def compare(case: Case) -> tuple[str, ...]:
    """ours/naive: how far loss, ∂hidden, ∂W and ∂bias are from fp64, and whether that passes."""
    hidden = torch.randn(case.N, case.H, device=DEVICE).to(case.dtype)
    weight = (torch.randn(case.V, case.H, device=DEVICE) * 0.15).to(torch.float32 if case.autocast else case.dtype)
    bias = torch.randn(case.V, device=DEVICE).to(weight.dtype) if case.has_bias else None
    likely = (hidden.float() @ weight.float().t()).argmax(1)  # half of the targets have p near 1
    targets = torch.where(torch.rand(case.N, device=DEVICE) < 0.5, likely, torch.randint(0, case.V, (case.N,), device=DEVICE))
    targets[torch.rand(case.N, device=DEVICE) < 0.2] = IGNORED
    weights, exponents = torch.rand(case.N, device=DEVICE) + 0.5, torch.rand(case.N, device=DEVICE)

    if case.autocast:  # numbers that autocast's dtype has: what it rounds away is no error of either
        weight, bias = weight.bfloat16().float(), None if bias is None else bias.bfloat16().float()
    found: dict[str, list[torch.Tensor | None]] = {}
    for method in ("fp64", "naive", "ours"):
        leaves = [
            None
            if tensor is None
            else tensor.detach()
            .to(torch.float64 if method == "fp64" else tensor.dtype)
            .requires_grad_(tensor is hidden or case.trained)
            for tensor in (hidden, weight, bias)
        ]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast and method != "fp64"):
            if method == "ours":
                loss = linear_cross_entropy(
                    leaves[0],  # type: ignore[arg-type]
                    leaves[1],  # type: ignore[arg-type]
                    targets,
                    bias=leaves[2],
                    softcap=case.softcap,
                    logit_scale=case.scale,
                    token_weight=weights,
                    exponent=exponents,
                ).loss
            else:
                loss = by_definition(case, leaves, targets, weights, exponents)
        loss.backward()
        found[method] = [loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)]

    cells, passes = [], True
    for ours, naive, exact in zip(found["ours"], found["naive"], found["fp64"], strict=True):
        if exact is None or ours is None or naive is None:
            cells.append("")
            continue
        error, allowed = relative(ours, exact), relative(naive, exact)
        passes = passes and error <= max(allowed * 1.05, EXACT)
        cells.append(f"{error:.1e}/{allowed:.1e}")
    return (*cells, "ok" if passes else "FAIL")


def against_fp32(options: dict[str, Any], N: int, H: int, V: int) -> tuple[str, str]:
    """How far the loss and ∂hidden in bf16 are from the same call in fp32."""
    hidden, weight, targets = inputs(N, H, V, trained=False)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf, base = hidden.detach().to(dtype).requires_grad_(), options.get("anchor")
        base = {} if base is None else {"anchor": replace(base, hidden=base.hidden.to(dtype))}
        loss = linear_cross_entropy(leaf, weight.to(dtype), targets, **{**options, **base}).loss
        found.append((loss, torch.autograd.grad(loss, leaf)[0]))
    loss_error, gradient_error = (relative(ours, exact) for ours, exact in zip(*found, strict=True))
    return f"{loss_error:.1e}", f"{gradient_error:.1e}"


def main() -> int:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    # The last has several blocks of rows, and for ∂W narrower tiles.
    shapes = [(40, 64, 1009)] if TOY else [(1000, 512, 32003), (300, 2048, 151936), (11000, 256, 16411)]
    dtypes = [(torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.bfloat16, True)]
    heads = [(None, False, None), (30.0, True, None), (None, True, 0.25)]
    failed = []
    table = Table("relative error against fp64, ours/naive", "case", "loss", "∂hidden", "∂W", "∂bias", "passes")
    for shape, dtype, head, trained in itertools.product(shapes, dtypes, heads, [False, True]):
        case = Case(*shape, *dtype, *head, trained)
        if not table.measure(str(case), partial(compare, case)) or table.last[-1] != "ok":
            failed.append(str(case))
    N, H, V = (64, 64, 1009) if TOY else (1024, 1024, 64007)
    table = Table("bf16 against our own fp32", "options", "loss", "∂hidden")
    for name, options in {
        "four token losses": {"terms": four_terms(N)},
        "anchor": {"exponent": 1.0, "anchor": anchor(N, H)},
    }.items():
        if not table.measure(name, partial(against_fp32, options, N, H, V)):
            failed.append(name)
    print(f"\n{len(failed)} failed", *failed, sep="\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
