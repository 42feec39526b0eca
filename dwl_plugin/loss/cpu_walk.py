"""Loss and gradients of a linear head on a CPU, in one pass over the vocabulary, without ever holding all logits.

A tile of logits stays in cache from its product to its exponentials, in one buffer. A trained head keeps its block of exponentials
for a third matmul, ∂W = expᵀ·(rows of hidden, scaled): nothing is divided over (N, V).

Shapes: T positions, N target tokens, R rows of one block, E of them whose target is in a tile, W tokens of one tile of the
vocabulary, H hidden size, V vocabulary, K terms, k the largest logits of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dwl_plugin.loss.anchor import BasePass
from dwl_plugin.loss.heads import LinearHead
from dwl_plugin.loss.matmul import Operands, add_product, add_transposed_product, operands_for, product, tiling_for
from dwl_plugin.loss.stable_nll import exact_nll
from dwl_plugin.loss.tokens import Tokens
from dwl_plugin.loss.top_logits import TopLogits
from dwl_plugin.loss.walk import Gradients, NeedsGrad, Plan, WalkResult

__all__ = ["forward_backward"]

OnTile = Callable[[Tensor, Tensor, slice], None]
"""Gets the logits (R, W) of a tile in units of a softcap, the weight (W, H) they came from, and the tile. Must change neither."""

_MIB = 2**20
# A tile of logits should stay in cache.
_TILE_BYTES = 4 * _MIB
_LEAST_WIDTH = 256
_ROWS = 1024
# A row's running maximum is left behind by this much before it follows: e^20 is far from overflow, and rescaling costs.
_LAG = 20.0
# Columns beside a tile, so that row strides avoid powers of two.
_SPARE = 16


def forward_backward(
    hidden: Tensor, tokens: Tokens, head: LinearHead, base: LinearHead | None, needs_grad: NeedsGrad
) -> WalkResult:
    """Everything about Σ_t Σ_k w_tk·ℓ_k(t), plus the anchor of `tokens` to the model whose head is `base`."""
    N, (V, H), device = len(tokens), head.weight_VH.shape, hidden.device
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        hidden_TH = hidden.detach().reshape(-1, H)

        def new(*shape: int, zero: bool = False) -> Tensor:
            return (torch.zeros if zero else torch.empty)(shape, dtype=head.summed, device=device)

        gradients = Gradients(
            new(N, H) if needs_grad.hidden else None,
            new(V, H, zero=N == 0) if needs_grad.weight else None,
            new(V, zero=True) if needs_grad.bias else None,
            _scale,
        )
        result = WalkResult(new(N), new(N), new(len(tokens.terms), N), None if base is None else new(N), gradients)
        if N:
            operands = operands_for(head, device, anchored=base is not None)
            plan = _plan(N, V, H, needs_grad.head, 1 if base is None else 2, operands, device)
            space = _Workspace(plan, head, operands, device, needs_grad.head)
            for block in plan.blocks():
                _block(hidden_TH, tokens, block, base, space, result)
        result.loss = result.loss.sum()
        return result


def _scale(gradient: Tensor, by: Tensor) -> None:
    if by.item() != 1.0:
        gradient.mul_(by)


def _block(hidden_TH: Tensor, tokens: Tokens, block: slice, base: LinearHead | None, space: _Workspace, result: WalkResult) -> None:
    """One block of rows through the whole vocabulary: its losses, its rows of ∂hidden, its share of ∂W and ∂bias."""
    gradients, operands, head, rows = result.gradients, space.operands, space.head, tokens.positions(block)
    unit = head.unit
    hidden_RH = hidden_TH[rows].to(head.multiplied).to(operands.first)
    targets_R = tokens.targets_N[block]
    grad_RH = None if gradients.hidden is None else gradients.hidden[block]

    state = _Softmax.start(targets_R.numel(), hidden_RH.device, head.summed)
    top = TopLogits(tokens, block, head.weight_VH.shape[0]) if tokens.top_k else None
    base_pass = None
    if base is not None:
        assert tokens.anchor is not None
        base_RH = tokens.anchor.hidden[rows]
        base_pass = BasePass(base_RH, base, head, operands.first, hidden=grad_RH is not None, saves_exp=space.saves_exp)
    watchers: list[OnTile] = [one.update for one in (top, base_pass) if one is not None]
    saved_exp: list[tuple[slice, Tensor, Tensor]] = []
    for index, tile in enumerate(space.plan.tiles()):
        weight_WH = space.weight(tile)
        exp_RW, rescale_R = space.step(state, hidden_RH, weight_WH, targets_R, tile, watchers)
        if grad_RH is not None:
            if rescale_R is not None and index:
                grad_RH.mul_(rescale_R[:, None])
            add_product(grad_RH, exp_RW, weight_WH, first=index == 0)
        if space.saves_exp:
            saved_exp.append((tile, exp_RW.to(operands.saved), state.running_max_R))
        del exp_RW  # before the next one is made

    # Everything below is O(R·H), except the third matmul.
    nll_R, one_minus_p_R = exact_nll(state.sum_exp_others_R, state.running_max_R * unit, state.target_logit_R * unit)
    top_Rk = None if top is None else top.of_rows(len(nll_R)).mul_(unit)
    kl_R = None if base_pass is None else base_pass.kl(nll_R + state.target_logit_R * unit)
    value = tokens.token_losses(nll_R, one_minus_p_R, top_Rk, kl_R, block, slope=grad_RH is not None or space.saves_exp)
    result.put(block, value, nll_R, kl_R)
    tiny = torch.finfo(head.summed).tiny  # a vocabulary of one has no others
    exp_coef_R = value.grad_coef_R * head.scale / state.sum_exp_others_R.clamp(min=tiny)
    target_coef_R = value.target_coef_R * head.scale
    if head.softcap is not None:
        target_coef_R = target_coef_R * (1 - state.target_logit_R.square())
    if grad_RH is not None:
        target_RH = head.weight_VH[targets_R].to(head.multiplied).to(head.summed)
        grad_RH.mul_(exp_coef_R[:, None]).addcmul_(target_RH, target_coef_R[:, None], value=-1)
    hidden_RH = hidden_RH.to(head.summed)
    if space.saves_exp:
        scaled_RH, scaled_for = torch.empty_like(hidden_RH), None
        for tile, exp_RW, running_max_R in saved_exp:
            if scaled_for is not running_max_R:  # the same tensor while no row's maximum moved
                coef_R = exp_coef_R * ((running_max_R - state.running_max_R) * unit).exp()
                torch.mul(hidden_RH, coef_R[:, None], out=scaled_RH)
                scaled_for = running_max_R
            if gradients.weight_VH is not None:
                scaled = scaled_RH.to(operands.saved)
                add_transposed_product(gradients.weight_VH[tile], exp_RW, scaled, first=block.start == 0)
            if gradients.bias_V is not None:
                gradients.bias_V[tile] += coef_R @ exp_RW.to(head.summed)
        if gradients.weight_VH is not None:
            torch.mul(hidden_RH, target_coef_R[:, None], out=scaled_RH)
            gradients.weight_VH.index_put_((targets_R,), scaled_RH.neg_(), accumulate=True)
        if gradients.bias_V is not None:
            gradients.bias_V.index_put_((targets_R,), -target_coef_R, accumulate=True)
    if base_pass is not None:
        assert tokens.anchor is not None
        coef_R = tokens.anchor.weight[block] * head.scale
        base_pass.add_gradients(coef_R, grad_RH, hidden_RH, gradients.weight_VH, gradients.bias_V)


@dataclass
class _Softmax:
    """Per row: Σ_{j≠y} exp(z_j − running max) so far, that maximum, the target's logit (in units of a softcap)."""

    sum_exp_others_R: Tensor
    running_max_R: Tensor
    target_logit_R: Tensor

    @classmethod
    def start(cls, rows: int, device: torch.device, dtype: torch.dtype) -> _Softmax:
        sum_R, target_R = torch.zeros(2, rows, dtype=dtype, device=device)
        # Not −inf: a row may see nothing but its own target at first, and −inf − (−inf) is no number.
        return cls(sum_R, torch.full_like(sum_R, torch.finfo(dtype).min), target_R)


@dataclass(frozen=True)
class _Plan(Plan):
    reuses_buffers: bool


def _plan(N: int, V: int, H: int, head_trained: bool, softmaxes: int, operands: Operands, device: torch.device) -> _Plan:
    """Even blocks of rows and even tiles of the vocabulary whose buffers fit their budgets, whatever N and V."""
    tiling = tiling_for(operands, device)
    most_rows = _ROWS
    if head_trained:
        # Each block reads and writes ∂W, so its exponentials may be a quarter of that.
        in_budget = max(1, max(tiling.saved_bytes, V * H) // (softmaxes * V * operands.saved.itemsize))
        if 3 * in_budget < N:
            in_budget = min(N // 2, tiling.stretch * in_budget)
        most_rows = min(most_rows, in_budget)
    rows = tiling.round_up(max(1, math.ceil(N / max(1, math.ceil(N / most_rows)))))
    even_width = math.ceil(V / math.ceil(V / max(_LEAST_WIDTH, _TILE_BYTES // (4 * rows))))
    return _Plan(N, V, rows, even_width if tiling.any_shape else min(V, tiling.width), reuses_buffers=tiling.any_shape)


class _Workspace:
    """The buffers of a pass, allocated once: allocating them per tile costs more than the arithmetic does."""

    def __init__(self, plan: _Plan, head: LinearHead, operands: Operands, device: torch.device, saves_exp: bool) -> None:
        self.plan, self.head, self.operands, self.saves_exp = plan, head, operands, saves_exp
        self._bias_V = None if head.bias_V is None else head.bias_V.to(head.multiplied).to(head.summed)
        self._logits = self._slope = self._weight = None
        if plan.reuses_buffers:
            saves_all = saves_exp and operands.first == operands.saved
            tiles = len(plan.tiles()) if saves_all else 1
            self._logits = torch.empty(tiles, plan.rows, plan.width + _SPARE, dtype=head.summed, device=device)
        if head.softcap is not None:
            self._slope = torch.empty(plan.rows, plan.width, dtype=head.summed, device=device)
        if not operands.first == head.multiplied == head.weight_VH.dtype:
            self._weight = torch.empty(plan.width, head.weight_VH.shape[1], dtype=operands.first, device=device)

    def _logits_buffer(self, rows: int, tile: slice) -> Tensor | None:
        """(rows, width of the tile) to write into, None where products are new tensors."""
        width = tile.stop - tile.start
        if self._logits is None:
            return None
        return self._logits[tile.start // self.plan.width if len(self._logits) > 1 else 0, :rows, :width]

    def weight(self, tile: slice) -> Tensor:
        """A tile of W as the first two matmuls want it, a view where it is so already."""
        weight_WH = self.head.weight_VH[tile]
        if self._weight is None:
            return weight_WH
        if self.operands.first != self.head.multiplied:
            weight_WH = weight_WH.to(self.head.multiplied)
        return self._weight[: weight_WH.shape[0]].copy_(weight_WH)

    def step(
        self, state: _Softmax, hidden_RH: Tensor, weight_WH: Tensor, targets_R: Tensor, tile: slice, watchers: list[OnTile]
    ) -> tuple[Tensor, Tensor | None]:
        """Advance `state` by a tile whose logits the watchers see; its exponentials, and what multiplies earlier ones (None: 1)."""
        bias_W = None if self._bias_V is None else self._bias_V[tile]
        scale, softcap = self.head.scale / (self.head.softcap or 1.0), self.head.softcap
        local_R, out_RW = targets_R - tile.start, self._logits_buffer(len(targets_R), tile)
        logits_RW = product(hidden_RH, weight_WH.t(), self.head.summed, out=out_RW)
        if bias_W is not None:
            logits_RW.add_(bias_W)
        if scale != 1.0:
            logits_RW.mul_(scale)
        if softcap is not None:
            logits_RW.tanh_()
        for watch in watchers:
            watch(logits_RW, weight_WH, tile)
        slope_RW = None
        if self._slope is not None:
            slope_RW = self._slope[: logits_RW.shape[0], : logits_RW.shape[1]]
            torch.mul(logits_RW, logits_RW, out=slope_RW).neg_().add_(1.0)
        return logits_RW, _step_in_place(state, logits_RW, local_R, softcap or 1.0, slope_RW)


def _step_in_place(state: _Softmax, logits_RW: Tensor, local_R: Tensor, unit: float, slope_RW: Tensor | None) -> Tensor | None:
    """One buffer from logits to exponentials. Returns what earlier ones must be multiplied by."""
    rows_E = ((local_R >= 0) & (local_R < logits_RW.shape[1])).nonzero()[:, 0]
    here = (rows_E, local_R[rows_E])
    state.target_logit_R = state.target_logit_R.index_copy(0, rows_E, logits_RW[here])
    logits_RW[here] = -math.inf
    largest_R, rescale_R = logits_RW.amax(1), None
    if bool((largest_R > state.running_max_R + _LAG / unit).any()):
        moved_R = torch.maximum(state.running_max_R, largest_R)
        rescale_R = ((state.running_max_R - moved_R) * unit).exp_()
        state.sum_exp_others_R, state.running_max_R = state.sum_exp_others_R * rescale_R, moved_R
    exp_RW = logits_RW.sub_(state.running_max_R[:, None])
    if unit != 1.0:
        exp_RW.mul_(unit)
    exp_RW.exp_()
    state.sum_exp_others_R = state.sum_exp_others_R + exp_RW.sum(1)
    if slope_RW is not None:
        exp_RW.mul_(slope_RW)
    return rescale_R
