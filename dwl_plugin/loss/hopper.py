"""The step as the end of its matmul, for Hopper: logits leave no registers, and a tile is written once, in the matmuls' dtype.

A program has some rows and some tokens of a tile. It knows a row's reference of the tiles before, and takes one of its own where
its largest logit has left that behind. `settle_kernel` then brings the parts of a row together: nearly always they have one
reference, and nothing but their sums is added. Operands come by tensor descriptors (TMA): by pointers, it is no faster than cuBLAS
and a step.

Measured on an H200 (bench/RESULTS.md): an eighth faster than `step_kernel` behind cuBLAS. Other cards are not asked.

Shapes: N target tokens, R rows of one block of them, W tokens of one tile of the vocabulary, P programs that share a row, H hidden
size.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dwl_plugin.loss.step import Form, Slopes, SoftmaxRows
from dwl_plugin.loss.step_kernel import BLOCK_H, _shrink

__all__ = ["HopperSteps"]

SIZES: dict[str, Any] = {"ROWS": 128, "TOKENS": 256, "DEPTH": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
"""A program makes ROWS by TOKENS logits from DEPTH of H at a time; GROUP blocks of rows share the tokens that are in cache."""
PARTS = 64
"""Parts of a row that `settle_kernel` looks at at a time."""


@triton.jit
def _place(R, W, ROWS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr):
    """Which rows and tokens are this program's."""
    program = tl.program_id(0)
    in_group = GROUP * tl.cdiv(W, TOKENS)
    first = program // in_group * GROUP
    size = min(tl.cdiv(R, ROWS) - first, GROUP)
    return first + program % in_group % size, program % in_group // size


@triton.jit
def _logits(
    hidden, weight, bias, block_r, block_w, tokens, W, H, scale, ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    z = tl.zeros((ROWS, TOKENS), tl.float32)
    for k in range(0, H, DEPTH):
        z = tl.dot(hidden.load([block_r * ROWS, k]), weight.load([block_w * TOKENS, k]).T, z)
    if bias is not None:
        z += tl.load(bias + tokens, mask=tokens < W, other=0.0)[None, :]
    return z * scale


@triton.jit(do_not_specialize=["start", "R", "P"])
def multiply_advance_kernel(
    hidden, weight, bias, exps, targets, references, target_logits, part_sums, part_references,
    start, R, W, H, P, exps_stride, scale, lag, lift,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block_r, block_w = _place(R, W, ROWS, TOKENS, GROUP)
    rows, tokens = block_r * ROWS + tl.arange(0, ROWS), block_w * TOKENS + tl.arange(0, TOKENS)
    is_row = rows < R
    z = _logits(hidden, weight, bias, block_r, block_w, tokens, W, H, scale, ROWS, TOKENS, DEPTH)
    local = (tl.load(targets + rows, mask=is_row, other=-1) - start).to(tl.int32)
    is_target = local[:, None] == tokens[None, :]
    here = (local >= block_w * TOKENS) & (local < min(block_w * TOKENS + TOKENS, W))
    tl.store(target_logits + rows, tl.sum(tl.where(is_target, z, 0.0), 1), mask=is_row & here)
    outside = tl.where(tokens < W, 0.0, -float("inf"))  # added: with both conditions in one `where`, registers spill
    others = tl.where(is_target, -float("inf"), z) + outside[None, :]
    wanted, old = tl.max(others, 1) - lift, tl.load(references + rows, mask=is_row, other=0.0)
    reference = tl.where(wanted > old + lag, wanted, old)
    e = tl.exp(others - reference[:, None])
    part = rows.to(tl.int64) * P + block_w
    tl.store(part_sums + part, tl.sum(e, 1), mask=is_row)
    tl.store(part_references + part, reference, mask=is_row)
    if exps is not None:
        at = rows.to(tl.int64)[:, None] * exps_stride + tokens[None, :]
        tl.store(exps + at, e.to(exps.dtype.element_ty), mask=is_row[:, None] & (tokens[None, :] < W))


@triton.jit(do_not_specialize=["W", "P", "parts", "exps_stride"])
def settle_kernel(
    exps, part_sums, part_references, totals, references, summed, W, H, P, parts, exps_stride, summed_stride,
    PARTS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at, columns = tl.arange(0, PARTS), tl.arange(0, TOKENS)
    old, total = tl.load(references + row), tl.load(totals + row)
    best, sums = tl.full((PARTS,), -float("inf"), tl.float32), tl.zeros((PARTS,), tl.float32)
    for begin in range(0, parts, PARTS):
        their = tl.load(part_references + row * P + begin + at, mask=begin + at < parts, other=-float("inf"))
        best = tl.maximum(best, their)
    new = tl.max(best, 0)
    for begin in range(0, parts, PARTS):
        their = tl.load(part_references + row * P + begin + at, mask=begin + at < parts, other=-float("inf"))
        sums += tl.load(part_sums + row * P + begin + at, mask=begin + at < parts, other=0.0) * tl.exp(their - new)
    shrink = tl.exp(old - new)
    tl.debug_barrier()  # every warp has read what one of them writes now
    tl.store(references + row, new)
    tl.store(totals + row, total * shrink + tl.sum(sums, 0))
    if new > old:
        if exps is not None:
            for part in range(0, parts):
                by = tl.exp(tl.load(part_references + row * P + part) - new)
                if by != 1.0:
                    place, inside = exps + row * exps_stride + part * TOKENS + columns, part * TOKENS + columns < W
                    e = tl.load(place, mask=inside, other=0.0).to(tl.float32) * by
                    tl.store(place, e.to(exps.dtype.element_ty), mask=inside)
        if summed is not None:
            _shrink(summed + row * summed_stride, shrink, H, BLOCK_H)


@triton.jit(do_not_specialize=["start", "R"])
def multiply_slopes_kernel(
    hidden, weight, bias, out, targets, references, coefs, target_coefs, by,
    start, R, W, H, out_stride, scale,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    block_r, block_w = _place(R, W, ROWS, TOKENS, GROUP)
    rows, tokens = block_r * ROWS + tl.arange(0, ROWS), block_w * TOKENS + tl.arange(0, TOKENS)
    is_row = rows < R
    z = _logits(hidden, weight, bias, block_r, block_w, tokens, W, H, scale, ROWS, TOKENS, DEPTH)
    local = (tl.load(targets + rows, mask=is_row, other=-1) - start).to(tl.int32)
    reference = tl.load(references + rows, mask=is_row, other=0.0)
    slope = tl.exp(z - reference[:, None]) * tl.load(coefs + rows, mask=is_row, other=0.0)[:, None]
    target_slope = -tl.load(target_coefs + rows, mask=is_row, other=0.0)
    slope = tl.where(local[:, None] == tokens[None, :], target_slope[:, None], slope)
    if by is not None:
        slope *= tl.load(by)
    at = rows.to(tl.int64)[:, None] * out_stride + tokens[None, :]
    tl.store(out + at, slope.to(out.dtype.element_ty), mask=is_row[:, None] & (tokens[None, :] < W))


class HopperSteps:
    """`advance` and `slopes` of `step.Steps` that multiply as well: without a softcap, an anchor, the largest logits."""

    @staticmethod
    def rows(hidden_RH: Tensor) -> TensorDescriptor:
        """For `hidden`; strides and addresses have to be whole 16 bytes."""
        return TensorDescriptor.from_tensor(hidden_RH, [SIZES["ROWS"], SIZES["DEPTH"]])

    @staticmethod
    def tokens(weight_WH: Tensor) -> TensorDescriptor:
        """For `weight`, likewise."""
        return TensorDescriptor.from_tensor(weight_WH, [SIZES["TOKENS"], SIZES["DEPTH"]])

    @staticmethod
    def parts(rows: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the sums and references of the parts of each row."""
        shape = (rows, triton.cdiv(width, SIZES["TOKENS"]))
        sums = torch.empty(shape, dtype=torch.float32, device=like.device)
        return sums, torch.empty_like(sums)  # each at an address of whole 16 bytes

    def advance(
        self,
        hidden: TensorDescriptor,
        weight: TensorDescriptor,
        bias_W: Tensor | None,
        exp_RW: Tensor | None,
        parts: tuple[Tensor, Tensor],
        rows: SoftmaxRows,
        targets_R: Tensor,
        start: int,
        form: Form,
        *,
        first: bool,
    ) -> None:
        (R, H), W, (sums_RP, references_RP) = hidden.shape, weight.shape[0], parts
        P, stride = sums_RP.shape[1], 0 if exp_RW is None else exp_RW.stride(0)
        multiply_advance_kernel[_programs(R, W)](
            hidden, weight, bias_W, exp_RW, targets_R, rows.reference_R, rows.target_R, sums_RP, references_RP,
            start, R, W, H, P, stride, form.scale, form.lag, form.lift, **SIZES,
        )  # fmt: skip
        summed_RH = None if first else rows.summed_RH
        settle_kernel[(R,)](
            exp_RW, sums_RP, references_RP, rows.total_R, rows.reference_R, summed_RH,
            W, H, P, triton.cdiv(W, SIZES["TOKENS"]), stride, 0 if summed_RH is None else summed_RH.stride(0),
            PARTS=PARTS, TOKENS=SIZES["TOKENS"], BLOCK_H=BLOCK_H, num_warps=4,
        )  # fmt: skip

    def slopes(
        self,
        hidden: TensorDescriptor,
        weight: TensorDescriptor,
        bias_W: Tensor | None,
        out_NW: Tensor,
        of: Slopes,
        start: int,
        form: Form,
    ) -> None:
        (N, H), W = hidden.shape, weight.shape[0]
        multiply_slopes_kernel[_programs(N, W)](
            hidden, weight, bias_W, out_NW, of.targets_R, of.reference_R, of.coef_R, of.target_coef_R, of.by,
            start, N, W, H, out_NW.stride(0), form.scale, **SIZES,
        )  # fmt: skip


def _programs(rows: int, tokens: int) -> tuple[int]:
    return (triton.cdiv(rows, SIZES["ROWS"]) * triton.cdiv(tokens, SIZES["TOKENS"]),)
