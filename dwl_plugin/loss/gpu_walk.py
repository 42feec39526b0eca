"""Loss and gradients of a linear head off a CPU: matmuls of the device's library, and between them one kernel a tile.

Rows go through the vocabulary in blocks, tile by tile: products, then the step of `step.py`, then Σ exp·W. With a trained head they
go through it once more: when everything is known of them, a tile's logits are computed again and become their gradient, for all
tokens at once, so that ∂W leaves tile by tile, summed in fp32 and rounded once. That takes four matmuls where saved exponentials
would take three, but neither those nor a ∂W in fp32 are held (docs/decisions/a-trained-head-computes-its-logits-twice.md).

Shapes: T positions, N target tokens, R rows of one block, W tokens of one tile, H hidden size, V vocabulary, K ≥ k slots for the
largest logits of a row.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dwl_plugin.errors import PREFIX, first_line
from dwl_plugin.loss.heads import LinearHead
from dwl_plugin.loss.matmul import add_product, add_transposed_product, product
from dwl_plugin.loss.stable_nll import exact_nll
from dwl_plugin.loss.step import BaseRows, Form, Products, Slopes, SoftmaxRows, Steps, TopRows, TorchSteps
from dwl_plugin.loss.tokens import Tokens
from dwl_plugin.loss.walk import Gradients, NeedsGrad, WalkResult

__all__ = ["forward_backward", "steps_for"]

_ROWS = 2048
_TILE_BYTES = 32 * 2**20
"""Of a tile's products in fp32: a large matmul, and what a cache holds."""
_SLOPE_BYTES = 64 * 2**20
"""Of the gradient in the logits of a tile, all tokens of the batch."""
_LEAST_WIDTH = 256
_WIDTH_MULTIPLE = 64
"""An odd stride keeps the matrix units from loading 16 bytes at a time: the same product takes six times as long."""
_ROWS_MULTIPLE = 16
"""Where a block begins divides by it: Triton compiles another kernel for each way in which its pointers do not."""


def forward_backward(
    hidden: Tensor, tokens: Tokens, head: LinearHead, base: LinearHead | None, needs_grad: NeedsGrad
) -> WalkResult:
    """Everything about Σ_t Σ_k w_tk·ℓ_k(t), plus the anchor of `tokens` to the model whose head is `base`."""
    device = hidden.device
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.no_grad(), torch.autocast(device.type, enabled=False), on_device:
        return _Walk(hidden, tokens, head, base, needs_grad).run()


def steps_for(device: torch.device, summed: torch.dtype) -> Steps:
    """The kernels where they run, else torch. A GPU that has to go without them says why, once."""
    return _kernels(device) if device.type == "cuda" and summed == torch.float32 else TorchSteps()


@functools.cache
def _kernels(device: torch.device) -> Steps:
    try:
        from dwl_plugin.loss.step_kernel import TritonSteps

        steps = TritonSteps()
        products = Products(torch.zeros(1, 1, device=device), None, None)
        total_R, reference_R, logit_R = torch.zeros(3, 1, device=device)
        target_R, rows = total_R.long(), SoftmaxRows(total_R, reference_R, logit_R, None)
        steps.advance(products, rows, target_R, 0, Form(1.0, None, 1.0, 0.0), None, None, None, first=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler for its launchers, a GPU that it does not know
        reason = f"{type(error).__name__}: {first_line(error)}"
        warnings.warn(f"{PREFIX} the loss runs without its Triton kernels, slower: {reason}", stacklevel=2)
        return TorchSteps()
    return steps


@dataclass(frozen=True)
class _Plan:
    """Even blocks of rows and even tiles of the vocabulary whose buffers fit their budgets, whatever N and V."""

    N: int
    V: int
    rows: int
    width: int

    def blocks(self) -> Iterator[slice]:
        return (slice(start, min(start + self.rows, self.N)) for start in range(0, self.N, self.rows))

    def tiles(self) -> Iterator[slice]:
        return (slice(start, min(start + self.width, self.V)) for start in range(0, self.V, self.width))


def _plan(N: int, V: int) -> _Plan:
    rows = math.ceil(N / math.ceil(N / _ROWS))
    rows += -rows % _ROWS_MULTIPLE
    return _Plan(N, V, rows, _even_width(V, _TILE_BYTES // (4 * rows)))


def _slopes_plan(plan: _Plan, itemsize: int) -> _Plan:
    """The same products again, so that they are the same numbers; for more tokens than that is affordable for, narrower ones."""
    most = _SLOPE_BYTES // (itemsize * plan.N)
    if plan.width <= max(_LEAST_WIDTH, most):
        return plan
    width = _even_width(plan.V, most)
    rows = _TILE_BYTES // (4 * width)
    return _Plan(plan.N, plan.V, max(_ROWS_MULTIPLE, rows - rows % _ROWS_MULTIPLE), width)


def _even_width(V: int, most: int) -> int:
    most = max(_LEAST_WIDTH, most - most % _WIDTH_MULTIPLE)
    width = math.ceil(V / math.ceil(V / most))
    return min(V, width + -width % _WIDTH_MULTIPLE)


def _held(dtype: torch.dtype, summed: torch.dtype) -> torch.dtype:
    """What a gradient waits in: bf16 has the range of fp32; what is yet to be multiplied might not be there in fp16."""
    return dtype if dtype == torch.bfloat16 else summed


class _Side:
    """One of the models: its products with a tile of its head, in buffers of its own."""

    def __init__(self, head: LinearHead, hidden_TH: Tensor, operand: torch.dtype, plan: _Plan) -> None:
        self.head, self.hidden_TH, self.operand = head, hidden_TH, operand
        device, (_, H) = hidden_TH.device, head.weight_VH.shape
        self._bias_V = None if head.bias_V is None else head.bias_V.to(head.multiplied).to(head.summed)
        self._logits_RW = torch.empty(plan.rows, plan.width, dtype=head.summed, device=device)
        converts = not head.weight_VH.dtype == head.multiplied == operand
        self._weight_WH = torch.empty(plan.width, H, dtype=operand, device=device) if converts else None

    def rows(self, positions: Tensor | slice | None) -> Tensor:
        hidden_RH = self.hidden_TH if positions is None else self.hidden_TH[positions]
        return hidden_RH.to(self.head.multiplied).to(self.operand)

    def weight(self, tile: slice) -> Tensor:
        weight_WH = self.head.weight_VH[tile]
        if self._weight_WH is None:
            return weight_WH
        if self.operand != self.head.multiplied:
            weight_WH = weight_WH.to(self.head.multiplied)
        return self._weight_WH[: len(weight_WH)].copy_(weight_WH)

    def products(self, hidden_RH: Tensor, weight_WH: Tensor, tile: slice, exp_RW: Tensor | None) -> Products:
        out_RW = self._logits_RW[: len(hidden_RH), : len(weight_WH)]
        bias_W = None if self._bias_V is None else self._bias_V[tile]
        return Products(product(hidden_RH, weight_WH.t(), self.head.summed, out=out_RW), bias_W, exp_RW)


class _Walk:
    def __init__(self, hidden: Tensor, tokens: Tokens, head: LinearHead, base: LinearHead | None, needs_grad: NeedsGrad) -> None:
        self.tokens, self.head, self.base, self.needs_grad = tokens, head, base, needs_grad
        self.hidden_TH, self.device = hidden.detach().reshape(-1, hidden.shape[-1]), hidden.device
        self.operand, self.summed = head.multiplied, head.summed
        self.N, (self.V, self.H) = len(tokens), head.weight_VH.shape
        is_fp16 = self.operand == torch.float16
        # e^8 is far from overflow; e^(4 + 6) is as far as fp16 may go.
        self.form = Form(head.scale / head.unit, head.softcap, lag=4.0 if is_fp16 else 8.0, lift=6.0 if is_fp16 else 0.0)
        self.steps = steps_for(self.device, self.summed)

    def run(self) -> WalkResult:
        N, V, H, needs, tokens = self.N, self.V, self.H, self.needs_grad, self.tokens
        gradients = Gradients(None, None, None)
        if needs.hidden:
            held = _held(self.hidden_TH.dtype, self.summed)
            gradients.hidden = self._new(len(self.hidden_TH), H, dtype=held, fill=None if tokens.rows_N is None else 0.0)
        if needs.weight:
            gradients.weight_VH = self._new(V, H, dtype=_held(self.head.weight_VH.dtype, self.summed), fill=None if N else 0.0)
        if needs.bias:
            gradients.bias_V = self._new(V, fill=0.0)
        kl_N = None if self.base is None else self._new(N)
        result = WalkResult(self._new(N), self._new(N), self._new(len(tokens.terms), N), kl_N, gradients)
        if N:
            slopes = self._forward(result)
            if needs.head:
                self._weight_gradient(slopes, gradients)
        result.loss = result.loss.sum()
        return result

    def _new(self, *shape: int, dtype: torch.dtype | None = None, fill: float | None = None) -> Tensor:
        empty = torch.empty(shape, dtype=dtype or self.summed, device=self.device)
        return empty if fill is None else empty.fill_(fill)

    def _sides(self, plan: _Plan) -> tuple[_Side, _Side | None]:
        ours = _Side(self.head, self.hidden_TH, self.operand, plan)
        if self.base is None:
            return ours, None
        assert self.tokens.anchor is not None
        return ours, _Side(self.base, self.tokens.anchor.hidden, self.operand, plan)

    def _forward(self, result: WalkResult) -> Slopes:
        """Every loss and ∂hidden, and what the gradient in the logits of each token is made of."""
        N, H, tokens, head, plan = self.N, self.H, self.tokens, self.head, _plan(self.N, self.V)
        wants_hidden, wants_slopes = self.needs_grad.hidden, self.needs_grad.hidden or self.needs_grad.head
        ours, theirs = self._sides(plan)
        least = torch.finfo(
            self.summed
        ).min  # not −inf: a row may see nothing but its target at first, and −inf − (−inf) is no number
        slopes = Slopes(tokens.targets_N, self._new(N, fill=least), self._new(N), self._new(N), self._new(N))
        if theirs is not None:
            slopes = slopes._replace(base_reference_R=self._new(N, fill=least), base_coef_R=self._new(N))
        exp_RW = self._new(plan.rows, plan.width, dtype=self.operand) if wants_hidden else None
        base_exp_RW = None if exp_RW is None or theirs is None else torch.empty_like(exp_RW)
        summed_RH = self._new(plan.rows, H) if wants_hidden else None
        base_summed_RH = None if summed_RH is None or theirs is None else torch.empty_like(summed_RH)
        for block in plan.blocks():
            R, of = block.stop - block.start, slopes.at(block)
            positions = tokens.positions(block)
            hidden_RH = ours.rows(positions)
            rows = SoftmaxRows(self._new(R, fill=0.0), of.reference_R, self._new(R, fill=0.0), _part(summed_RH, R))
            base_rows = None
            if theirs is not None:
                assert of.base_reference_R is not None
                base_hidden_RH, part_RH = theirs.rows(positions), _part(base_summed_RH, R)
                base_rows = BaseRows(self._new(R, fill=0.0), of.base_reference_R, self._new(R, fill=0.0), part_RH)
            top = self._top_rows(block)
            for tile in plan.tiles():
                W, first = tile.stop - tile.start, tile.start == 0
                weight_WH, base = ours.weight(tile), None
                products = ours.products(hidden_RH, weight_WH, tile, _part(exp_RW, R, W))
                if theirs is not None:
                    base_WH = weight_WH if self.base is head else theirs.weight(tile)
                    base = theirs.products(base_hidden_RH, base_WH, tile, _part(base_exp_RW, R, W))
                self.steps.advance(products, rows, of.targets_R, tile.start, self.form, base, base_rows, top, first=first)
                for summed, tile_of in ((rows, products), (base_rows, base)):
                    if summed is not None and tile_of is not None and summed.summed_RH is not None and tile_of.exp_RW is not None:
                        add_product(summed.summed_RH, tile_of.exp_RW, weight_WH, first=first)

            # Everything below is O(R·H).
            unit = self.form.unit
            nll_R, one_minus_p_R = exact_nll(rows.total_R, rows.reference_R * unit, rows.target_R * unit)
            kl_R = None if base_rows is None else _kl(base_rows, nll_R + rows.target_R * unit, unit)
            top_Rk = None if top is None else _in_order(top) * unit
            value = tokens.token_losses(nll_R, one_minus_p_R, top_Rk, kl_R, block, slope=wants_slopes)
            result.loss[block], result.nll_N[block], result.factors_KN[:, block] = value.loss_R, nll_R, value.factors_KR
            if result.kl_N is not None and kl_R is not None:
                result.kl_N[block] = kl_R
            if not wants_slopes:
                continue
            torch.mul(value.grad_coef_R, head.scale, out=of.bound_R)
            torch.div(of.bound_R, _not_zero(rows.total_R), out=of.coef_R)  # a vocabulary of one has no others
            torch.mul(value.target_coef_R, head.scale, out=of.target_coef_R)
            if head.softcap is not None:
                of.target_coef_R.mul_(1 - rows.target_R.square())
            if base_rows is not None and tokens.anchor is not None:
                assert of.base_coef_R is not None
                torch.div(tokens.anchor.weight[block] * head.scale, base_rows.total_R, out=of.base_coef_R)
            if result.gradients.hidden is not None and rows.summed_RH is not None:
                base_RH = None if base_rows is None else base_rows.summed_RH
                out_TH = result.gradients.hidden if isinstance(positions, Tensor) else result.gradients.hidden[positions]
                at = positions if isinstance(positions, Tensor) else None
                self.steps.finish(out_TH, at, rows.summed_RH, head.weight_VH, head.multiplied, of, base_RH)
        return slopes

    def _top_rows(self, block: slice) -> TopRows | None:
        k = min(self.tokens.top_k, self.V)
        if not k:
            return None
        top_RK = self._new(block.stop - block.start, 2 ** (k - 1).bit_length(), fill=math.inf)
        top_RK[:, :k] = -math.inf
        return TopRows(top_RK, k, self.tokens.gated(block))

    def _weight_gradient(self, slopes: Slopes, gradients: Gradients) -> None:
        """∂W and ∂bias, tile by tile: the gradient in the logits of all tokens, then one product over them."""
        plan = _slopes_plan(_plan(self.N, self.V), self.operand.itemsize)
        ours, theirs = self._sides(plan)
        hidden_NH = ours.rows(self.tokens.rows_N)
        base_NH = None if theirs is None else theirs.rows(self.tokens.rows_N)
        grad_NW = self._new(self.N, plan.width, dtype=self.operand)
        if self.operand == torch.float16:  # has neither room below for small weights nor above for large ones
            bound = slopes.bound_R.abs().max().clamp(1e-20, 1e20)
            slopes = slopes._replace(by=torch.exp2(13 - bound.log2().ceil()))
        for tile in plan.tiles():
            W, weight_WH = tile.stop - tile.start, ours.weight(tile)
            for block in plan.blocks():
                products, base = ours.products(hidden_NH[block], weight_WH, tile, grad_NW[block, :W]), None
                if theirs is not None and base_NH is not None:
                    base_WH = weight_WH if self.base is self.head else theirs.weight(tile)
                    base = theirs.products(base_NH[block], base_WH, tile, None)
                self.steps.slopes(products, slopes.at(block), tile.start, self.form, base)
            found: list[Tensor] = []
            if gradients.weight_VH is not None:
                found.append(gradients.weight_VH[tile])
                add_transposed_product(found[-1], grad_NW[:, :W], hidden_NH, first=True)
            if gradients.bias_V is not None:
                found.append(gradients.bias_V[tile])
                torch.sum(grad_NW[:, :W], 0, dtype=self.summed, out=found[-1])
            if slopes.by is not None:
                for gradient in found:
                    gradient.div_(slopes.by)


def _part(buffer: Tensor | None, rows: int, width: int | None = None) -> Tensor | None:
    return None if buffer is None else buffer[:rows, :width]


def _not_zero(tensor: Tensor) -> Tensor:
    return tensor.clamp(min=torch.finfo(tensor.dtype).tiny)


def _kl(base: BaseRows, log_total_R: Tensor, unit: float) -> Tensor:
    """KL of each row; `log_total` is log Σ e^z."""
    base_log_total_R = base.reference_R * unit + base.total_R.log()
    return (base.cross_R / base.total_R - base_log_total_R + log_total_R).clamp_(min=0)


def _in_order(top: TopRows) -> Tensor:
    """(R, k) falling; all equal in rows that nobody asks about."""
    top_Rk = top.top_RK[:, : top.k].sort(1, descending=True).values
    return top_Rk if top.asked_R is None else torch.where(top.asked_R[:, None], top_Rk, 0.0)
