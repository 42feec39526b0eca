"""The steps of `step.py` as Triton kernels: one launch for each, a program for a row of it. Imported where Triton is installed.

A tile of logits is read twice, the second time from cache: once for its maximum, once for exponentials and sums. A row whose
reference moves scales its own row of ∂hidden; the others leave it alone. Sums are taken in one order, so a run repeats bit for bit.

Shapes: as in `step.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwl_plugin.loss.step import BaseRows, Form, Products, Slopes, SoftmaxRows, TopRows

__all__ = ["TritonSteps"]

BLOCK = 2048
"""Logits of a row that a program holds at a time."""
BLOCK_TOP = 4096
BLOCK_H = 1024
WARPS = 8
PROGRAMS = 4096
"""Of a launch that is for no rows, at most."""

_LANGUAGE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _tanh(x):
    """To 3 units in the last place of fp32: by exponentials, and by its series where they would cancel."""
    size = tl.abs(x)
    e = tl.exp(-2.0 * size)
    x2 = x * x
    series = 0.021869488536155203 - x2 * 0.008863235529902197
    series = -0.05396825396825397 + x2 * series
    series = 0.13333333333333333 + x2 * series
    series = -0.3333333333333333 + x2 * series
    tanh = tl.where(size < 0.25, size + size * x2 * series, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0, -tanh, tanh)


@triton.jit
def _logits(row, bias, at, inside, scale, HAS_CAP: tl.constexpr):
    z = tl.load(row + at, mask=inside, other=0.0)
    if bias is not None:
        z += tl.load(bias + at, mask=inside, other=0.0)
    z *= scale
    if HAS_CAP:
        z = _tanh(z)
    return z


@triton.jit
def _follow(old, largest, unit, lag, lift):
    """Where a reference is from now on, whether it moved, and what sums shrink by."""
    wanted = largest - lift
    moves = wanted > old + lag
    new = tl.where(moves, wanted, old)
    return new, moves, tl.where(moves, tl.exp((old - new) * unit), 1.0)


@triton.jit
def _shrink(row, by, H, BLOCK_H: tl.constexpr):
    columns = tl.arange(0, BLOCK_H)
    for begin in range(0, H, BLOCK_H):
        at = begin + columns
        tl.store(row + at, tl.load(row + at, mask=at < H, other=0.0) * by, mask=at < H)


@triton.jit
def advance_kernel(
    logits, bias, exps, targets, totals, references, target_logits, summed,
    start, W, H, logits_stride, exps_stride, summed_stride, scale, unit, lag, lift,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_row = logits + row * logits_stride
    local = tl.load(targets + row) - start
    columns = tl.arange(0, BLOCK)
    old = tl.load(references + row)  # by every warp before any stores it: the maximum below keeps them together
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for begin in range(0, W, BLOCK):
        at = begin + columns
        z = _logits(z_row, bias, at, at < W, scale, False)
        best = tl.maximum(best, tl.where((at == local) | (at >= W), -float("inf"), z))
    largest = tl.max(best, 0)
    if HAS_CAP:
        largest = _tanh(largest)
    if (local >= 0) & (local < W):
        tl.store(target_logits + row, _logits(z_row, bias, local, True, scale, HAS_CAP))
    reference, moves, shrink = _follow(old, largest, unit, lag, lift)
    tl.store(references + row, reference)
    sums = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, W, BLOCK):
        at = begin + columns
        z = _logits(z_row, bias, at, at < W, scale, HAS_CAP)
        e = tl.where((at == local) | (at >= W), 0.0, tl.exp((z - reference) * unit))
        sums += e
        if exps is not None:
            if HAS_CAP:
                e *= 1.0 - z * z
            tl.store(exps + row * exps_stride + at, e.to(exps.dtype.element_ty), mask=at < W)
    tl.store(totals + row, tl.load(totals + row) * shrink + tl.sum(sums, 0))
    if summed is not None:  # noqa: SIM102 (one condition is of the compiler, the other of the row)
        if moves:
            _shrink(summed + row * summed_stride, shrink, H, BLOCK_H)


@triton.jit
def advance_base_kernel(
    base, base_bias, logits, bias, exps, totals, references, crosses, summed,
    W, H, logits_stride, exps_stride, summed_stride, scale, unit, lag, lift,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    b_row, z_row = base + row * logits_stride, logits + row * logits_stride
    columns = tl.arange(0, BLOCK)
    old = tl.load(references + row)  # by every warp before any stores it: the maximum below keeps them together
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    for begin in range(0, W, BLOCK):
        at = begin + columns
        b = _logits(b_row, base_bias, at, at < W, scale, False)
        best = tl.maximum(best, tl.where(at < W, b, -float("inf")))
    largest = tl.max(best, 0)
    if HAS_CAP:
        largest = _tanh(largest)
    reference, moves, shrink = _follow(old, largest, unit, lag, lift)
    tl.store(references + row, reference)
    sums = tl.zeros((BLOCK,), tl.float32)
    crosses_sum = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, W, BLOCK):
        at = begin + columns
        b = _logits(b_row, base_bias, at, at < W, scale, HAS_CAP)
        z = _logits(z_row, bias, at, at < W, scale, HAS_CAP)
        e = tl.where(at < W, tl.exp((b - reference) * unit), 0.0)
        sums += e
        crosses_sum += tl.where(e == 0.0, 0.0, e * (b - z))  # 0 · log 0
        if exps is not None:
            if HAS_CAP:
                e *= 1.0 - z * z
            tl.store(exps + row * exps_stride + at, e.to(exps.dtype.element_ty), mask=at < W)
    tl.store(totals + row, tl.load(totals + row) * shrink + tl.sum(sums, 0))
    tl.store(crosses + row, tl.load(crosses + row) * shrink + tl.sum(crosses_sum, 0) * unit)
    if summed is not None:  # noqa: SIM102 (one condition is of the compiler, the other of the row)
        if moves:
            _shrink(summed + row * summed_stride, shrink, H, BLOCK_H)


@triton.jit
def advance_top_kernel(
    logits, bias, tops, asked, W, logits_stride, scale,
    HAS_CAP: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """While the largest logit that is left beats the least of the list, it takes its place: after the first tile, hardly ever."""
    row = tl.program_id(0).to(tl.int64)
    wanted = True
    if asked is not None:
        wanted = tl.load(asked + row)
    if wanted:
        slots, columns = tl.arange(0, K), tl.arange(0, BLOCK)
        top = tl.load(tops + row * K + slots)
        for begin in range(0, W, BLOCK):
            at = begin + columns
            z = _logits(logits + row * logits_stride, bias, at, at < W, scale, HAS_CAP)
            z = tl.where(at < W, z, -float("inf"))
            largest, least = tl.max(z, 0), tl.min(top, 0)
            while largest > least:
                top = tl.where(slots == tl.argmin(top, 0), largest, top)
                z = tl.where(columns == tl.argmax(z, 0), -float("inf"), z)
                largest, least = tl.max(z, 0), tl.min(top, 0)
        tl.store(tops + row * K + slots, top)


@triton.jit
def slopes_kernel(
    logits, bias, out, targets, references, coefs, target_coefs, by, base, base_bias, base_references, base_coefs,
    start, W, logits_stride, out_stride, scale, unit,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(targets + row) - start
    reference, coef, target_coef = tl.load(references + row), tl.load(coefs + row), tl.load(target_coefs + row)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = _logits(logits + row * logits_stride, bias, at, at < W, scale, HAS_CAP)
    slope = tl.exp((z - reference) * unit) * coef
    if HAS_CAP:
        slope *= 1.0 - z * z
    slope = tl.where(at == local, -target_coef, slope)
    if base is not None:
        b = _logits(base + row * logits_stride, base_bias, at, at < W, scale, HAS_CAP)
        theirs = tl.exp((b - tl.load(base_references + row)) * unit) * tl.load(base_coefs + row)
        if HAS_CAP:
            theirs *= 1.0 - z * z
        slope -= theirs
    if by is not None:
        slope *= tl.load(by)
    tl.store(out + row * out_stride + at, slope.to(out.dtype.element_ty), mask=at < W)


@triton.jit
def saved_slopes_kernel(
    exps, saved_references, targets, references, coefs, target_coefs, by, start, W, exps_stride, unit, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    local = tl.load(targets + row) - start
    shrink = tl.exp((tl.load(saved_references + row) - tl.load(references + row)) * unit)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = exps + row * exps_stride + at
    slope = tl.load(place, mask=at < W, other=0.0).to(tl.float32) * shrink * tl.load(coefs + row)
    slope = tl.where(at == local, -tl.load(target_coefs + row), slope)
    if by is not None:
        slope *= tl.load(by)
    tl.store(place, slope.to(exps.dtype.element_ty), mask=at < W)


@triton.jit
def finish_kernel(
    out, positions, summed, weight, targets, coefs, target_coefs, base_summed, base_coefs,
    H, out_stride, summed_stride, weight_stride, weight_column_stride,
    MULTIPLIED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place = row
    if positions is not None:
        place = tl.load(positions + row)
    coef, target_coef = tl.load(coefs + row), tl.load(target_coefs + row)
    weight_row = weight + tl.load(targets + row) * weight_stride
    columns = tl.arange(0, BLOCK_H)
    for begin in range(0, H, BLOCK_H):
        at = begin + columns
        inside = at < H
        target = tl.load(weight_row + at.to(tl.int64) * weight_column_stride, mask=inside, other=0.0).to(MULTIPLIED).to(tl.float32)
        grad = tl.load(summed + row * summed_stride + at, mask=inside, other=0.0) * coef - target * target_coef
        if base_summed is not None:
            grad -= tl.load(base_summed + row * summed_stride + at, mask=inside, other=0.0) * tl.load(base_coefs + row)
        tl.store(out + place * out_stride + at, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def scale_kernel(gradient, by, size, BLOCK: tl.constexpr):
    factor = tl.load(by)
    if factor != 1.0:
        columns, programs = tl.arange(0, BLOCK), tl.num_programs(0).to(tl.int64)
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK, size, programs * BLOCK):
            at = begin + columns
            scaled = tl.load(gradient + at, mask=at < size, other=0.0).to(tl.float32) * factor
            tl.store(gradient + at, scaled.to(gradient.dtype.element_ty), mask=at < size)


class TritonSteps:
    """By the kernels above, for products in fp32; arguments as `step.Steps` has them."""

    def advance(
        self,
        ours: Products,
        rows: SoftmaxRows,
        targets_R: Tensor,
        start: int,
        form: Form,
        base: Products | None,
        base_rows: BaseRows | None,
        top: TopRows | None,
        *,
        first: bool,
    ) -> None:
        R, W = ours.logits_RW.shape
        stride, has_cap = ours.logits_RW.stride(0), form.softcap is not None
        numbers = (form.scale, form.unit, form.lag / form.unit, form.lift / form.unit)
        sizes: dict[str, Any] = {"HAS_CAP": has_cap, "BLOCK": BLOCK, "BLOCK_H": BLOCK_H, "num_warps": WARPS}
        if top is not None:
            asked_R = None if top.asked_R is None else top.asked_R.view(torch.uint8)
            advance_top_kernel[(R,)](
                ours.logits_RW, ours.bias_W, top.top_RK, asked_R, W, stride, form.scale,
                HAS_CAP=has_cap, K=top.top_RK.shape[1], BLOCK=BLOCK_TOP, num_warps=WARPS,
            )  # fmt: skip
        if base is not None and base_rows is not None:
            summed_RH = None if first else base_rows.summed_RH
            advance_base_kernel[(R,)](
                base.logits_RW, base.bias_W, ours.logits_RW, ours.bias_W, base.exp_RW,
                base_rows.total_R, base_rows.reference_R, base_rows.cross_R, summed_RH,
                W, _width(summed_RH), stride, _stride(base.exp_RW), _stride(summed_RH), *numbers, **sizes,
            )  # fmt: skip
        summed_RH = None if first else rows.summed_RH
        advance_kernel[(R,)](
            ours.logits_RW, ours.bias_W, ours.exp_RW, targets_R, rows.total_R, rows.reference_R, rows.target_R, summed_RH,
            start, W, _width(summed_RH), stride, _stride(ours.exp_RW), _stride(summed_RH), *numbers, **sizes,
        )  # fmt: skip

    def slopes(self, ours: Products, of: Slopes, start: int, form: Form, base: Products | None) -> None:
        R, W = ours.logits_RW.shape
        base_RW, base_bias_W = (None, None) if base is None else (base.logits_RW, base.bias_W)
        slopes_kernel[(R, triton.cdiv(W, BLOCK))](
            ours.logits_RW, ours.bias_W, ours.exp_RW, of.targets_R, of.reference_R, of.coef_R, of.target_coef_R, of.by,
            base_RW, base_bias_W, of.base_reference_R, of.base_coef_R,
            start, W, ours.logits_RW.stride(0), _stride(ours.exp_RW), form.scale, form.unit,
            HAS_CAP=form.softcap is not None, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def saved_slopes(self, exp_RW: Tensor, reference_R: Tensor, of: Slopes, start: int, form: Form) -> None:
        R, W = exp_RW.shape
        saved_slopes_kernel[(R, triton.cdiv(W, BLOCK))](
            exp_RW, reference_R, of.targets_R, of.reference_R, of.coef_R, of.target_coef_R, of.by,
            start, W, exp_RW.stride(0), form.unit, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def finish(
        self,
        out_TH: Tensor,
        positions: Tensor | None,
        summed_RH: Tensor,
        weight_VH: Tensor,
        multiplied: torch.dtype,
        of: Slopes,
        base_summed_RH: Tensor | None,
    ) -> None:
        R, H = summed_RH.shape
        finish_kernel[(R,)](
            out_TH, positions, summed_RH, weight_VH, of.targets_R, of.coef_R, of.target_coef_R, base_summed_RH, of.base_coef_R,
            H, out_TH.stride(0), summed_RH.stride(0), *weight_VH.stride(),
            MULTIPLIED=_LANGUAGE[multiplied], BLOCK_H=BLOCK_H, num_warps=4,
        )  # fmt: skip

    def scale(self, gradient: Tensor, by: Tensor) -> None:
        size = gradient.numel()
        if size:
            programs = min(triton.cdiv(size, BLOCK), PROGRAMS)
            scale_kernel[(programs,)](gradient, by, size, BLOCK=BLOCK, num_warps=WARPS)


def _width(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[1]


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)
