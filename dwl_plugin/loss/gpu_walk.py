"""Loss and gradients of a linear head off a CPU: matmuls of the device's library, and between them one kernel a tile.

Rows go through the vocabulary in blocks, tile by tile: products, then the step of `step.py`, then Σ exp·W. With a trained head,
when everything is known of all tokens, a tile's exponentials become their gradient in the logits, so that ∂W leaves tile by tile,
summed in fp32 and rounded once. Until then exponentials wait in the memory of ∂W itself; those of tiles that found no room there
are computed again, logits first (docs/decisions/exponentials-wait-in-the-memory-of-dw.md).

Shapes: T positions, N target tokens, R rows of one block, W tokens of one tile, H hidden size, V vocabulary, K ≥ k slots for the
largest logits of a row.
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from torch import Tensor

from dwl_plugin.errors import PREFIX, first_line
from dwl_plugin.loss.anchor import kl_to_base
from dwl_plugin.loss.heads import LinearHead
from dwl_plugin.loss.matmul import multiplier
from dwl_plugin.loss.stable_nll import exact_nll
from dwl_plugin.loss.step import BaseRows, Form, Products, Slopes, SoftmaxRows, Steps, TopRows, TorchSteps
from dwl_plugin.loss.tokens import Tokens
from dwl_plugin.loss.walk import Gradients, NeedsGrad, Plan, WalkResult

if TYPE_CHECKING:
    from dwl_plugin.loss.hopper import HopperSteps

__all__ = ["forward_backward", "steps_for"]

_Found = TypeVar("_Found")

_ROWS = 2048
_ROW_MULTIPLE = 16
"""Whatever the batch, a block then begins at whole 16 bytes: Triton compiles for addresses that do, and once more for others."""
_TILE_BYTES = 31 * 2**20
"""Of a tile's products in fp32: a large matmul, and with its exponentials what a cache holds."""
_EXP_BYTES = 33 * 2**20
"""Of a tile's exponentials on Hopper: of 2,048 rows its programs then fill 132 multiprocessors four times."""
_HOPPER_DTYPES = (torch.bfloat16, torch.float16)
_SLOPE_BYTES = 64 * 2**20
"""Of the gradient in the logits of a tile, all tokens of the batch."""
_LEAST_WIDTH = 256
_WIDTH_MULTIPLE = 128
"""An odd stride keeps the matrix units from loading 16 bytes at a time: the same product takes six times as long."""


def forward_backward(
    hidden: Tensor, tokens: Tokens, head: LinearHead, base: LinearHead | None, needs_grad: NeedsGrad
) -> WalkResult:
    """Everything about Σ_t Σ_k w_tk·ℓ_k(t), plus the anchor of `tokens` to the model whose head is `base`."""
    device = hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _on(device):
        hopper = _hopper(device)
        if hopper is not None and _HopperWalk.takes(hidden, tokens, head, base) and _runs_on_hopper(device, head.multiplied):
            return _HopperWalk(hidden, tokens, head, needs_grad, hopper).run()
        return _Walk(hidden, tokens, head, base, needs_grad).run()


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Where kernels are launched."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _scale(steps: Steps, gradient: Tensor, by: Tensor) -> None:
    with _on(gradient.device):
        steps.scale(gradient, by)


def steps_for(device: torch.device, operand: torch.dtype, summed: torch.dtype) -> Steps:
    """The kernels where they run, else torch. A GPU that has to go without them says why, once."""
    return _kernels(device, operand) if device.type == "cuda" and summed == torch.float32 else TorchSteps()


@functools.cache
def _kernels(device: torch.device, operand: torch.dtype) -> Steps:
    def advance() -> Steps:
        from dwl_plugin.loss.step_kernel import TritonSteps

        steps = TritonSteps()
        exp_RW = torch.zeros(1, 1, dtype=operand, device=device)  # older Tritons know no bf16 before Ampere
        products = Products(torch.zeros(1, 1, dtype=torch.float32, device=device), None, exp_RW)
        total_R, reference_R, logit_R = torch.zeros(3, 1, dtype=torch.float32, device=device)
        target_R, rows = total_R.long(), SoftmaxRows(total_R, reference_R, logit_R, None)
        steps.advance(products, rows, target_R, 0, Form(1.0, None, 1.0, 0.0), None, None, None, first=True)
        return steps

    return _tried(advance, "Triton kernels") or TorchSteps()


def _tried(advance: Callable[[], _Found], kernels: str) -> _Found | None:
    """What a first, small launch leaves; None, said aloud, where there can be none: without Triton, without a C compiler for its
    launchers, on a GPU that it does not know, in a version that compiles something else."""
    try:
        return advance()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        warnings.warn(f"{PREFIX} the loss runs without its {kernels}, slower: {reason}", stacklevel=3)
        return None


@functools.cache
def _hopper(device: torch.device) -> HopperSteps | None:
    """Where they were measured to be worth it, and this Triton has what they need."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from dwl_plugin.loss.hopper import HopperSteps
    except ImportError:  # tensor descriptors came with Triton 3.4
        return None
    return HopperSteps()


@functools.cache
def _runs_on_hopper(device: torch.device, operand: torch.dtype) -> bool:
    """Tried, as the other kernels are."""

    def advance() -> bool:
        from dwl_plugin.loss.hopper import HopperSteps

        hopper, like = HopperSteps(), torch.zeros(16, 16, dtype=operand, device=device)
        total_R, reference_R, logit_R = torch.zeros(3, 16, dtype=torch.float32, device=device)
        target_R, rows, parts = total_R.long(), SoftmaxRows(total_R, reference_R, logit_R, None), hopper.parts(16, 16, total_R)
        hidden, weight, form = hopper.rows(like), hopper.tokens(like), Form(1.0, None, 1.0, 0.0)
        hopper.advance(hidden, weight, None, torch.zeros_like(like), parts, rows, target_R, 0, form, first=True)
        return True

    without = isinstance(_kernels(device, operand), TorchSteps)  # which said why
    return not without and bool(_tried(advance, "kernels for Hopper"))


class _Plan(Plan):
    """Even blocks of rows and even tiles of the vocabulary whose buffers fit their budgets, whatever N and V."""

    @property
    def stride(self) -> int:
        """Of a row of a tile, also where a tile is the whole of an odd vocabulary."""
        return self.width + -self.width % _WIDTH_MULTIPLE


def _plan(N: int, V: int) -> _Plan:
    rows = math.ceil(N / math.ceil(N / _ROWS))
    rows = min(N, rows + -rows % _ROW_MULTIPLE)
    return _Plan(N, V, rows, _even_width(V, _TILE_BYTES // (4 * rows)))


def _hopper_plan(plan: _Plan, itemsize: int) -> _Plan:
    return _Plan(plan.N, plan.V, plan.rows, _even_width(plan.V, _EXP_BYTES // (itemsize * plan.rows)))


def _slopes_plan(plan: _Plan, itemsize: int) -> _Plan:
    """The same products again, so that they are the same numbers; for more tokens than that is affordable for, narrower ones."""
    most = _SLOPE_BYTES // (itemsize * plan.N)
    if plan.width <= max(_LEAST_WIDTH, most):
        return plan
    width = _even_width(plan.V, most)
    rows = _TILE_BYTES // (4 * width)
    return _Plan(plan.N, plan.V, min(plan.N, max(1, rows - rows % _ROW_MULTIPLE)), width)


def _tiles_to_save(tiles: int, exp_bytes: int, tile_bytes: int) -> int:
    """How many of the last tiles can leave their exponentials in ∂W, one after the other from its first byte on, while it is
    written from its end, tile by tile: each tile must begin where the exponentials that are not yet read have ended.
    """
    return max(0, min(tiles - math.ceil(exp_bytes / tile_bytes), (tiles - 1) * tile_bytes // exp_bytes))


def _even_width(V: int, most: int) -> int:
    most = max(_LEAST_WIDTH, most - most % _WIDTH_MULTIPLE)
    width = math.ceil(V / math.ceil(V / most))
    return min(V, width + -width % _WIDTH_MULTIPLE)


def _held(dtype: torch.dtype, summed: torch.dtype) -> torch.dtype:
    """What a gradient waits in: bf16 has the range of fp32; what is yet to be multiplied might not be there in fp16."""
    return dtype if dtype == torch.bfloat16 else summed


class _Tile(NamedTuple):
    """Some tokens of the vocabulary: the id of the first, how many, their rows of the head as operands, their biases."""

    start: int
    width: int
    weight_WH: Tensor
    weight_HW: Tensor
    bias_W: Tensor | None
    source_WH: Tensor | None
    """What has to be copied to where the operands are first; None: they are the head's own."""


def _operands(hidden_TH: Tensor, positions: Tensor | slice | None, head: LinearHead, operand: torch.dtype) -> Tensor:
    """Hidden states to multiply a head with, of some positions or of all."""
    return (hidden_TH if positions is None else hidden_TH[positions]).to(head.multiplied).to(operand)


class _Side:
    """One of the models: its hidden states, its head in tiles, and a buffer for the products."""

    def __init__(
        self,
        head: LinearHead,
        hidden_TH: Tensor,
        operand: torch.dtype,
        plan: _Plan,
        ours: _Side | None = None,
        *,
        stores_products: bool = True,
    ) -> None:
        self.head, self.hidden_TH, self.operand = head, hidden_TH, operand
        self.multiply = multiplier(hidden_TH.device, operand, head.summed)
        size = (plan.rows, plan.stride) if stores_products else (0, 0)
        self.logits_RW = torch.empty(size, dtype=head.summed, device=hidden_TH.device)
        self.tiles: list[_Tile] = []
        if ours is not None and ours.head is head:
            self.tiles.extend(tile._replace(source_WH=None) for tile in ours.tiles)
            return
        H = head.weight_VH.shape[1]
        converts = not head.weight_VH.dtype == head.multiplied == operand
        buffer_WH = torch.empty(plan.width, H, dtype=operand, device=hidden_TH.device) if converts else None
        bias_V = None if head.bias_V is None else head.bias_V.to(head.multiplied).to(head.summed).contiguous()
        for tile in plan.tiles():
            head_WH, width = head.weight_VH[tile], tile.stop - tile.start
            weight_WH = head_WH if buffer_WH is None else buffer_WH[:width]
            bias_W, source_WH = None if bias_V is None else bias_V[tile], None if buffer_WH is None else head_WH
            self.tiles.append(_Tile(tile.start, width, weight_WH, weight_WH.t(), bias_W, source_WH))

    def rows(self, positions: Tensor | slice | None) -> Tensor:
        return _operands(self.hidden_TH, positions, self.head, self.operand)

    def prepare(self, tile: _Tile) -> None:
        """Make the operands of a tile what they are to be."""
        if tile.source_WH is not None:
            is_exact = self.head.multiplied == self.operand
            tile.weight_WH.copy_(tile.source_WH if is_exact else tile.source_WH.to(self.head.multiplied))


class _Saved(NamedTuple):
    """The exponentials of tokens in a tile, in memory that ∂W is yet to take, and the references that they are from."""

    exp_NW: Tensor
    reference_N: Tensor

    def at(self, rows: slice) -> _Saved:
        return _Saved(self.exp_NW[rows], self.reference_N[rows])


class _Block:
    """Some rows of a side. What is alike for all tiles is made once: the host has a tenth of a millisecond for each."""

    def __init__(self, side: _Side, hidden_RH: Tensor, exp_RW: Tensor | None, saved: Mapping[int, _Saved] | None = None) -> None:
        self.hidden_RH, self._side, self._saved = hidden_RH, side, saved or {}
        self._logits, self._exps = {}, {}
        for width in {tile.width for tile in side.tiles}:
            self._logits[width] = side.logits_RW[: len(hidden_RH), :width]
            self._exps[width] = None if exp_RW is None else exp_RW[: len(hidden_RH), :width]

    def products(self, tile: _Tile) -> Products:
        self._side.prepare(tile)
        logits_RW = self._logits[tile.width]
        self._side.multiply.into(logits_RW, self.hidden_RH, tile.weight_HW)
        return Products(logits_RW, tile.bias_W, self.exps_of(tile))

    def exps_of(self, tile: _Tile) -> Tensor | None:
        """Where the exponentials of a tile go: where those of another were, or where they stay."""
        saved = self._saved.get(tile.start)
        return self._exps[tile.width] if saved is None else saved.exp_NW

    def save(self, tile: _Tile, reference_R: Tensor) -> None:
        """If its exponentials stay: what they are from."""
        if tile.start in self._saved:
            self._saved[tile.start].reference_N.copy_(reference_R)


class _Walk:
    def __init__(self, hidden: Tensor, tokens: Tokens, head: LinearHead, base: LinearHead | None, needs_grad: NeedsGrad) -> None:
        self.tokens, self.head, self.base, self.needs_grad = tokens, head, base, needs_grad
        self.hidden_TH, self.device = hidden.detach().reshape(-1, hidden.shape[-1]), hidden.device
        self.operand, self.summed = head.multiplied, head.summed
        self.N, (self.V, self.H) = len(tokens), head.weight_VH.shape
        # e^8 is far from overflow; e^(4 + 6) is as far as fp16 may go.
        lag, lift = (4.0, 6.0) if self.operand == torch.float16 else (8.0, 0.0)
        self.form = Form(head.scale / head.unit, head.softcap, lag, lift)
        self.steps = steps_for(self.device, self.operand, self.summed)
        self.bounds: list[Tensor] = []  # of the gradients in the logits, for fp16

    def run(self) -> WalkResult:
        N, V, H, needs, tokens = self.N, self.V, self.H, self.needs_grad, self.tokens
        gradients = Gradients(None, None, None, partial(_scale, self.steps))
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
            saved = self._room_in(gradients)
            slopes = self._forward(result, saved)
            if needs.head:
                self._head_gradient(slopes, saved, gradients)
        result.loss = result.loss.sum()
        return result

    def _new(self, *shape: int, dtype: torch.dtype | None = None, fill: float | None = None) -> Tensor:
        empty = torch.empty(shape, dtype=dtype or self.summed, device=self.device)
        return empty if fill is None else empty.fill_(fill)

    def _plan(self) -> _Plan:
        return _plan(self.N, self.V)

    def _slopes_plan(self, V: int) -> _Plan:
        return _slopes_plan(replace(self._plan(), V=V), self.operand.itemsize)

    def _room_in(self, gradients: Gradients) -> dict[int, _Saved]:
        """By the first token of a tile: where its exponentials wait for ∂W, in its memory. If one tile is left over, in memory of
        its own, which is no more than it would take to make them again."""
        plan, of = self._plan(), gradients.weight_VH
        if of is None or gradients.hidden is None or self.base is not None:
            return {}
        if multiplier(self.device, self.operand, of.dtype).copies:  # of a tile for all tokens: it may be large
            return {}
        tiles, exp_bytes = plan.tiles(), self.N * plan.stride * self.operand.itemsize
        count = _tiles_to_save(len(tiles), exp_bytes, plan.width * self.H * of.itemsize)
        exps = of.view(-1).view(torch.uint8)[: count * exp_bytes].view(self.operand).view(count, self.N, plan.stride).unbind()
        if len(tiles) - count == 1 and exp_bytes <= _SLOPE_BYTES:
            exps = (self._new(self.N, plan.stride, dtype=self.operand), *exps)
        references = self._new(len(exps), self.N + -self.N % _ROW_MULTIPLE)[:, : self.N]
        return {
            tile.start: _Saved(exp_NW[:, : tile.stop - tile.start], reference_N)
            for tile, exp_NW, reference_N in zip(tiles[len(tiles) - len(exps) :], exps, references, strict=True)
        }

    def _sides(self, plan: _Plan) -> tuple[_Side, _Side | None]:
        ours = _Side(self.head, self.hidden_TH, self.operand, plan)
        if self.base is None or self.tokens.anchor is None:
            return ours, None
        return ours, _Side(self.base, self.tokens.anchor.hidden, self.operand, plan, ours)

    def _forward(self, result: WalkResult, saved: Mapping[int, _Saved]) -> Slopes:
        """Every loss, ∂hidden, exponentials that are to be saved, and what the gradient in the logits of each token is made of."""
        plan, tokens, out = self._plan(), self.tokens, result.gradients.hidden
        ours, theirs = self._sides(plan)
        slopes = Slopes(tokens.targets_N.contiguous(), self._references(), self._new(self.N), self._new(self.N))
        if theirs is not None:
            slopes = slopes._replace(base_reference_R=self._references(), base_coef_R=self._new(self.N))

        def buffers(side: _Side | None) -> tuple[Tensor | None, Tensor | None]:
            """For exponentials and for what they sum up."""
            if side is None or out is None:
                return None, None
            all_saved = len(saved) == len(side.tiles)
            return None if all_saved else self._new(plan.rows, plan.stride, dtype=self.operand), self._new(plan.rows, self.H)

        (exp_RW, summed_RH), (base_exp_RW, base_summed_RH) = buffers(ours), buffers(theirs)
        for place in plan.blocks():
            of, positions, R = slopes.at(place), tokens.positions(place), place.stop - place.start
            block = _Block(ours, ours.rows(positions), exp_RW, {start: one.at(place) for start, one in saved.items()})
            rows = SoftmaxRows(self._new(R, fill=0.0), of.reference_R, self._new(R, fill=0.0), _first(summed_RH, R))
            base_block, base_rows = None, None
            if theirs is not None and of.base_reference_R is not None:
                base_block = _Block(theirs, theirs.rows(positions), base_exp_RW)
                part_RH = _first(base_summed_RH, R)
                base_rows = BaseRows(self._new(R, fill=0.0), of.base_reference_R, self._new(R, fill=0.0), part_RH)
            top = self._top_rows(place)
            self._through_the_vocabulary(ours, block, rows, of.targets_R, theirs, base_block, base_rows, top)
            del block, base_block  # their hidden states, before the next are gathered

            # Everything below is O(R·H).
            self._pay(place, rows, base_rows, top, of, result)
            if out is not None and rows.summed_RH is not None:
                out_RH, at = (out, positions) if isinstance(positions, Tensor) else (out[positions], None)
                base_RH = None if base_rows is None else base_rows.summed_RH
                self.steps.finish(out_RH, at, rows.summed_RH, self.head.weight_VH, self.head.multiplied, of, base_RH)
        return slopes

    def _references(self) -> Tensor:
        # Not −inf: a row may see nothing but its own target at first, and −inf − (−inf) is no number.
        return self._new(self.N, fill=torch.finfo(self.summed).min)

    def _top_rows(self, place: slice) -> TopRows | None:
        k = min(self.tokens.top_k, self.V)
        if not k:
            return None
        top_RK = self._new(place.stop - place.start, 2 ** (k - 1).bit_length(), fill=math.inf)
        top_RK[:, :k] = -math.inf
        return TopRows(top_RK, k, self.tokens.gated(place))

    def _through_the_vocabulary(
        self,
        ours: _Side,
        block: _Block,
        rows: SoftmaxRows,
        targets_R: Tensor,
        theirs: _Side | None,
        base_block: _Block | None,
        base_rows: BaseRows | None,
        top: TopRows | None,
    ) -> None:
        accumulate = multiplier(self.device, self.operand, self.summed)
        add, first = accumulate.into, True
        for index, tile in enumerate(ours.tiles):
            products = block.products(tile)
            base = None if theirs is None or base_block is None else base_block.products(theirs.tiles[index])
            self.steps.advance(products, rows, targets_R, tile.start, self.form, base, base_rows, top, first=first)
            if rows.summed_RH is not None and products.exp_RW is not None:
                add(rows.summed_RH, products.exp_RW, tile.weight_WH)
                if base is not None and base.exp_RW is not None and base_rows is not None and base_rows.summed_RH is not None:
                    add(base_rows.summed_RH, base.exp_RW, tile.weight_WH)
            block.save(tile, rows.reference_R)
            add, first = accumulate.onto, False

    def _pay(
        self, place: slice, rows: SoftmaxRows, base_rows: BaseRows | None, top: TopRows | None, of: Slopes, result: WalkResult
    ) -> None:
        """What the tokens of a block pay, and the coefficients of their gradient."""
        tokens, head, unit = self.tokens, self.head, self.form.unit
        wants_slopes = self.needs_grad.hidden or self.needs_grad.head
        nll_R, one_minus_p_R = exact_nll(rows.total_R, rows.reference_R * unit, rows.target_R * unit)
        kl_R = None
        if base_rows is not None:
            log_total_R = nll_R + rows.target_R * unit
            kl_R = kl_to_base(base_rows.cross_R, base_rows.total_R, base_rows.reference_R * unit, log_total_R)
        top_Rk = None if top is None else _in_order(top) * unit
        value = tokens.token_losses(nll_R, one_minus_p_R, top_Rk, kl_R, place, slope=wants_slopes)
        result.put(place, value, nll_R, kl_R)
        if not wants_slopes:
            return
        torch.div(value.grad_coef_R * head.scale, _not_zero(rows.total_R), out=of.coef_R)  # a vocabulary of one has no others
        torch.mul(value.target_coef_R, head.scale, out=of.target_coef_R)
        if head.softcap is not None:
            of.target_coef_R.mul_(1 - rows.target_R.square())
        if base_rows is not None and tokens.anchor is not None and of.base_coef_R is not None:
            torch.div(tokens.anchor.weight[place] * head.scale, base_rows.total_R, out=of.base_coef_R)
        if self.operand == torch.float16 and self.needs_grad.head:
            anchor_R = 0.0 if tokens.anchor is None else tokens.anchor.weight[place].abs()
            bound_R = torch.maximum(value.grad_coef_R.abs(), value.target_coef_R.abs()) + anchor_R
            self.bounds.append(bound_R.max() * abs(head.scale))

    def _head_gradient(self, slopes: Slopes, saved: Mapping[int, _Saved], gradients: Gradients) -> None:
        """∂W and ∂bias, tile by tile: the gradient in the logits of all tokens, then one product over them."""
        if self.bounds:  # fp16 has neither room below for small weights nor above for large ones
            largest = torch.stack(self.bounds).max().clamp(1e-20, 1e20)
            slopes = slopes._replace(by=torch.exp2(14 - largest.log2().ceil()))
        hidden_NH = _operands(self.hidden_TH, self.tokens.rows_N, self.head, self.operand)
        made_again = self._slopes_made_again(min(saved, default=self.V), hidden_NH, slopes)
        for start, grad_NW in itertools.chain(self._slopes_of_saved(saved, slopes), made_again):
            found, vocabulary = list[Tensor](), slice(start, start + grad_NW.shape[1])
            if gradients.weight_VH is not None:
                found.append(gradients.weight_VH[vocabulary])
                multiplier(self.device, self.operand, found[-1].dtype).into(found[-1], grad_NW.t(), hidden_NH)
            if gradients.bias_V is not None:
                found.append(gradients.bias_V[vocabulary])
                torch.sum(grad_NW, 0, dtype=self.summed, out=found[-1])
            if slopes.by is not None:
                for gradient in found:
                    gradient.div_(slopes.by)

    def _slopes_of_saved(self, saved: Mapping[int, _Saved], slopes: Slopes) -> Iterator[tuple[int, Tensor]]:
        """By the first token of a tile, the gradient in its logits: from the last one back, see `_tiles_to_save`."""
        for start, (exp_NW, reference_N) in sorted(saved.items(), reverse=True):
            self.steps.saved_slopes(exp_NW, reference_N, slopes, start, self.form)
            yield start, exp_NW

    def _slopes_made_again(self, V: int, hidden_NH: Tensor, slopes: Slopes) -> Iterator[tuple[int, Tensor]]:
        """The same for the first V tokens, by their logits; each where the one before was."""
        if V == 0:
            return
        plan = self._slopes_plan(V)
        ours, theirs = self._sides(plan)
        grad_NW = self._new(self.N, plan.stride, dtype=self.operand)
        fill = self._slopes_of_tiles(ours, theirs, hidden_NH, plan, slopes, grad_NW)
        for index, tile in enumerate(ours.tiles):
            fill(index, tile)
            yield tile.start, grad_NW[:, : tile.width]

    def _slopes_of_tiles(
        self, ours: _Side, theirs: _Side | None, hidden_NH: Tensor, plan: _Plan, slopes: Slopes, grad_NW: Tensor
    ) -> Callable[[int, _Tile], None]:
        """What writes the gradient in the logits of a tile to the first columns of `grad_NW`."""
        places = plan.blocks()
        blocks = [_Block(ours, hidden_NH[place], grad_NW[place]) for place in places]
        base_blocks: list[_Block | None] = [None] * len(places)
        if theirs is not None:
            base_NH = theirs.rows(self.tokens.rows_N)
            base_blocks = [_Block(theirs, base_NH[place], None) for place in places]
        of_blocks = [slopes.at(place) for place in places]

        def fill(index: int, tile: _Tile) -> None:
            for block, base_block, of in zip(blocks, base_blocks, of_blocks, strict=True):
                products = block.products(tile)
                base = None if theirs is None or base_block is None else base_block.products(theirs.tiles[index])
                self.steps.slopes(products, of, tile.start, self.form, base)

        return fill


class _HopperWalk(_Walk):
    """With the step at the end of its matmul: products are not stored."""

    def __init__(self, hidden: Tensor, tokens: Tokens, head: LinearHead, needs_grad: NeedsGrad, hopper: HopperSteps) -> None:
        super().__init__(hidden, tokens, head, None, needs_grad)
        self.hopper = hopper

    @staticmethod
    def takes(hidden: Tensor, tokens: Tokens, head: LinearHead, base: LinearHead | None) -> bool:
        if base is not None or tokens.top_k or head.softcap is not None or head.multiplied not in _HOPPER_DTYPES:
            return False
        H, operands = hidden.shape[-1], (hidden.reshape(-1, hidden.shape[-1]), head.weight_VH)
        if H % 8:  # rows that are gathered or converted lie as close as they can
            return False
        if any(one.stride(1) != 1 or one.stride(0) < H for one in operands):  # a descriptor's rows lie one after the other
            return False
        return all(one.stride(0) % 8 == 0 and one.data_ptr() % 16 == 0 for one in operands)

    def _plan(self) -> _Plan:
        return _hopper_plan(super()._plan(), self.operand.itemsize)

    def _slopes_plan(self, V: int) -> _Plan:
        return _Plan(self.N, V, self.N, _even_width(V, _SLOPE_BYTES // (self.operand.itemsize * self.N)))

    def _sides(self, plan: _Plan) -> tuple[_Side, None]:
        ours = _Side(self.head, self.hidden_TH, self.operand, plan, stores_products=False)
        self._weights = [self.hopper.tokens(tile.weight_WH) for tile in ours.tiles]
        return ours, None

    def _through_the_vocabulary(self, ours: _Side, block: _Block, rows: SoftmaxRows, targets_R: Tensor, *_: object) -> None:
        accumulate = multiplier(self.device, self.operand, self.summed)
        add, first = accumulate.into, True
        hidden, parts = self.hopper.rows(block.hidden_RH), self.hopper.parts(len(block.hidden_RH), ours.tiles[0].width, targets_R)
        for tile, weight in zip(ours.tiles, self._weights, strict=True):
            ours.prepare(tile)
            exp_RW = block.exps_of(tile)
            self.hopper.advance(hidden, weight, tile.bias_W, exp_RW, parts, rows, targets_R, tile.start, self.form, first=first)
            if rows.summed_RH is not None and exp_RW is not None:
                add(rows.summed_RH, exp_RW, tile.weight_WH)
            block.save(tile, rows.reference_R)
            add, first = accumulate.onto, False

    def _slopes_of_tiles(
        self, ours: _Side, theirs: _Side | None, hidden_NH: Tensor, plan: _Plan, slopes: Slopes, grad_NW: Tensor
    ) -> Callable[[int, _Tile], None]:
        hidden = self.hopper.rows(hidden_NH)

        def fill(index: int, tile: _Tile) -> None:
            ours.prepare(tile)
            self.hopper.slopes(hidden, self._weights[index], tile.bias_W, grad_NW[:, : tile.width], slopes, tile.start, self.form)

        return fill


def _first(buffer_RX: Tensor | None, rows: int) -> Tensor | None:
    return None if buffer_RX is None else buffer_RX[:rows]


def _not_zero(tensor: Tensor) -> Tensor:
    return tensor.clamp(min=torch.finfo(tensor.dtype).tiny)


def _in_order(top: TopRows) -> Tensor:
    """(R, k) falling; all equal in rows that nobody asks about."""
    top_Rk = top.top_RK[:, : top.k].sort(1, descending=True).values
    return top_Rk if top.asked_R is None else torch.where(top.asked_R[:, None], top_Rk, 0.0)
