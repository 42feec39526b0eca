"""Loss and gradients of a linear head in one walk over the vocabulary, without ever holding all logits.

For target y, with q the softmax over the other tokens and s = exp-sum of those others,

    ∂nll/∂z_j = (1 − p_y) · (q_j − 1[j = y]),      q_j = exp(z_j − reference) / s,  q_y = 0

so one pass can accumulate Σ_j exp(z_j − reference)·W_j beside the sum itself, as attention does with K = V = W, and
everything known only at the end (1/s, 1 − p, the slope of what the token pays) scales one row of (N, H). A trained
head keeps its block of exponentials for a third matmul, ∂W = expᵀ·(rows of hidden, scaled the same way): still nothing
is divided over (N, V).

Shapes: T positions, N target tokens, R rows of one block, E of them whose target is in a tile, W tokens of one tile of the
vocabulary, H hidden size, V vocabulary, K terms, k the largest logits of a row.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from dwl_plugin.loss.anchor import BaseWalk
from dwl_plugin.loss.heads import Head, logits_of
from dwl_plugin.loss.matmul import add_product, few_shapes, product
from dwl_plugin.loss.stable_nll import exact_nll
from dwl_plugin.loss.tokens import Tokens
from dwl_plugin.loss.top_logits import TopLogits

__all__ = ["Gradients", "Taken", "Wanted", "walk"]

Watch = Callable[[torch.Tensor, torch.Tensor, slice], None]
"""Gets the logits (R, W) of a tile in units of a softcap, the weight (W, H) they came from, and the tile. Must change neither."""

_MIB = 2**20
# A tile of logits should stay in cache on a CPU, and be a large matmul on a GPU.
_TILE_BYTES = {"cpu": 4 * _MIB, "cuda": 128 * _MIB}
_LEAST_WIDTH = 256
_ROWS = {"cpu": 1024, "cuda": 8192}
# A trained head keeps a block's exponentials for ∂W, and each block reads and writes ∂W: this much, or a quarter of ∂W.
_KEPT_BYTES = 64 * _MIB
# On a CPU blocks of few rows multiply slowly: a batch that needs more than three gets larger ones, up to this many times.
_STRETCH = {"cpu": 4, "cuda": 1}
# A row's reference follows its maximum only when it lags by this much: e^20 is far from overflow, and rescaling costs.
_LAG = 20.0
# Columns beside a tile, so that row strides avoid powers of two.
_SPARE = 16
# Where every shape of a product has its price, sizes are rounded: blocks have at least so many rows, all tiles so many tokens.
# There blocks of few rows multiply as fast as others, so they are never stretched, and fewer exponentials are kept. torch's topk
# finds the 20 largest of 1,280 twice as fast as those of 1,024.
_LEAST_ROWS = 16
_WIDTH_ROUNDED = 1280
_KEPT_BYTES_ROUNDED = 32 * _MIB


@dataclass(frozen=True)
class Wanted:
    hidden: bool
    weight: bool
    bias: bool


@dataclass
class Gradients:
    """∂loss in the accumulation dtype: of the target rows of hidden, of the weight, of the bias."""

    hidden_NH: torch.Tensor | None
    weight_VH: torch.Tensor | None
    bias_V: torch.Tensor | None


@dataclass
class Taken:
    """What a walk brings home: Σ of what the tokens pay, its gradients, and by token nll, the factor of each term, and the KL
    where there is an anchor."""

    loss: torch.Tensor
    nll_N: torch.Tensor
    factors_KN: torch.Tensor
    kl_N: torch.Tensor | None
    gradients: Gradients


def walk(hidden_TH: torch.Tensor, tokens: Tokens, head: Head, base: Head | None, wanted: Wanted) -> Taken:
    """Everything about Σ_t Σ_k w_tk·f_k(t)·nll_t, plus the anchor of `tokens` to the model whose head is `base`."""
    with torch.no_grad(), torch.autocast(hidden_TH.device.type, enabled=False):
        return _walk(hidden_TH, tokens, head, base, wanted)


def _walk(hidden_TH: torch.Tensor, tokens: Tokens, head: Head, base: Head | None, wanted: Wanted) -> Taken:
    device, count, (V, H) = hidden_TH.device, len(tokens), head.weight_VH.shape
    kept = wanted.weight or wanted.bias
    operands = _operands(hidden_TH, head, kept, anchored=base is not None)
    rounded = few_shapes(device, operands.first) or few_shapes(device, operands.kept)
    softmaxes = 1 if base is None else 2
    plan = _plan(count, V, H, device.type, kept, operands.kept, softmaxes=softmaxes, rounded=rounded)
    N = plan.tokens
    if count < N:
        tokens = tokens.padded(N)

    def new(*shape: int, zero: bool = False) -> torch.Tensor:
        return (torch.zeros if zero else torch.empty)(shape, dtype=head.summed, device=device)

    gradients = Gradients(
        new(N, H) if wanted.hidden else None,
        new(V, H, zero=N == 0) if wanted.weight else None,
        new(V, zero=True) if wanted.bias else None,
    )
    taken = Taken(new(N), new(N), new(len(tokens.terms), N), None if base is None else new(N), gradients)
    if N:
        space = _Workspace(plan, H, head, operands, device, kept)
        for block in plan.blocks():
            _block(hidden_TH, tokens, block, head, base, operands, space, taken)
    if gradients.hidden_NH is not None:
        gradients.hidden_NH = gradients.hidden_NH[:count]
    kl_N = None if taken.kl_N is None else taken.kl_N[:count]
    return Taken(taken.loss[:count].sum(), taken.nll_N[:count], taken.factors_KN[:, :count], kl_N, gradients)


def _block(
    hidden_TH: torch.Tensor,
    tokens: Tokens,
    block: slice,
    head: Head,
    base: Head | None,
    operands: Operands,
    space: _Workspace,
    taken: Taken,
) -> None:
    """One block of rows through the whole vocabulary: its losses, its rows of ∂hidden, its share of ∂W and ∂bias."""
    gradients = taken.gradients
    rows = block if tokens.rows_N is None else tokens.rows_N[block]
    hidden_RH = hidden_TH[rows].to(head.multiplied).to(operands.first)
    targets_R = tokens.targets_N[block]
    summed_RH = None if gradients.hidden_NH is None else gradients.hidden_NH[block]

    state = _Softmax.start(targets_R.numel(), hidden_RH.device, head.summed)
    top = TopLogits(tokens, block, head.weight_VH.shape[0]) if tokens.top_k else None
    beside = None
    if base is not None:
        assert tokens.anchor is not None
        base_RH = tokens.anchor.hidden[rows]
        beside = BaseWalk(base_RH, base, head, operands.first, hidden=summed_RH is not None, kept=space.kept)

    def watch(logits_RW: torch.Tensor, weight_WH: torch.Tensor, tile: slice) -> None:
        if top is not None:
            top.see(logits_RW)
        if beside is not None:
            beside.see(logits_RW, weight_WH, tile)

    watched = watch if top is not None or beside is not None else None
    kept: list[tuple[slice, torch.Tensor, torch.Tensor]] = []
    for index, tile in enumerate(space.plan.tiles(head.weight_VH.shape[0])):
        weight_WH = space.weight(tile)
        out_RW = space.logits(index, targets_R.numel(), tile.stop - tile.start)
        exp_RW, shrink_R = space.step(state, hidden_RH, weight_WH, targets_R - tile.start, tile, out_RW, watched)
        if summed_RH is not None:
            if shrink_R is not None and index:
                summed_RH.mul_(shrink_R[:, None])
            add_product(summed_RH, exp_RW, weight_WH, first=index == 0)
        if space.kept:
            kept.append((tile, exp_RW.to(operands.kept), state.reference_R))
        del exp_RW  # before the next one is made

    # Everything below is O(R·H), except the third matmul.
    unit = head.unit
    nll_R, miss_R = exact_nll(state.others_R, state.reference_R * unit, state.target_R * unit)
    top_Rk = None if top is None else top.of_rows(len(nll_R)).mul_(unit)
    paid = tokens.token_losses(nll_R, top_Rk, block, slope=summed_RH is not None or space.kept)
    loss_R, pull_R = paid.loss_R, paid.slope_R * miss_R
    target_R, anchor_R = pull_R, None
    if beside is not None:
        assert tokens.anchor is not None
        assert taken.kl_N is not None
        anchor_R, kl_R = tokens.anchor.weight[block], beside.kl(nll_R + state.target_R * unit)
        taken.kl_N[block] = kl_R
        loss_R = loss_R + anchor_R * kl_R
        pull_R = pull_R + anchor_R * miss_R
        target_R = target_R - anchor_R * nll_R.neg().exp()
    taken.loss[block], taken.nll_N[block], taken.factors_KN[:, block] = loss_R, nll_R, paid.factors_KR
    others_R = pull_R * head.scale / state.others_R.clamp(min=torch.finfo(head.summed).tiny)  # no others: a vocabulary of one
    target_R = target_R * head.scale
    if head.softcap is not None:
        target_R = target_R * (1 - state.target_R.square())
    if summed_RH is not None:
        target_RH = head.weight_VH[targets_R].to(head.multiplied).to(head.summed)
        summed_RH.mul_(others_R[:, None]).addcmul_(target_RH, target_R[:, None], value=-1)
    hidden_RH = hidden_RH.to(head.summed)
    if space.kept:
        scaled_RH, scaled_for = torch.empty_like(hidden_RH), None
        for tile, exp_RW, reference_R in kept:
            if scaled_for is not reference_R:  # the same tensor while no row's reference moved
                factor_R = others_R * ((reference_R - state.reference_R) * unit).exp()
                torch.mul(hidden_RH, factor_R[:, None], out=scaled_RH)
                scaled_for = reference_R
            if gradients.weight_VH is not None:
                add_product(gradients.weight_VH[tile], exp_RW.t(), scaled_RH.to(operands.kept), first=block.start == 0)
            if gradients.bias_V is not None:
                gradients.bias_V[tile] += factor_R @ exp_RW.to(head.summed)
        if gradients.weight_VH is not None:
            torch.mul(hidden_RH, target_R[:, None], out=scaled_RH)
            gradients.weight_VH.index_put_((targets_R,), scaled_RH.neg_(), accumulate=True)
        if gradients.bias_V is not None:
            gradients.bias_V.index_put_((targets_R,), -target_R, accumulate=True)
    if beside is not None and anchor_R is not None:
        beside.pull(anchor_R * head.scale, summed_RH, hidden_RH, gradients.weight_VH, gradients.bias_V)


@dataclass
class _Softmax:
    """Per row: Σ_{j≠y} exp(z_j − reference) so far, that reference, the target's logit (in units of a softcap)."""

    others_R: torch.Tensor
    reference_R: torch.Tensor
    target_R: torch.Tensor

    @classmethod
    def start(cls, rows: int, device: torch.device, dtype: torch.dtype) -> _Softmax:
        zeros_R = torch.zeros(rows, dtype=dtype, device=device)
        # Not −inf: a row may see nothing but its own target at first, and −inf − (−inf) is no number.
        return cls(zeros_R, torch.full_like(zeros_R, torch.finfo(dtype).min), zeros_R)


@dataclass(frozen=True)
class _Plan:
    tokens: int
    rows: int
    width: int
    count: int  # tiles

    def blocks(self) -> Iterator[slice]:
        return (slice(start, min(start + self.rows, self.tokens)) for start in range(0, self.tokens, self.rows))

    def tiles(self, V: int) -> Iterator[slice]:
        return (slice(start, min(start + self.width, V)) for start in range(0, V, self.width))


def _plan(N: int, V: int, H: int, device: str, kept: bool, operand: torch.dtype, *, softmaxes: int, rounded: bool) -> _Plan:
    """Even blocks of rows and even tiles of the vocabulary whose buffers fit their budgets, whatever N and V. `rounded`: a few
    tokens more and tiles of one size, so that few different shapes come up."""
    kind = "cpu" if device == "cpu" else "cuda"
    most_rows = _ROWS[kind]
    if kept:
        budget = max(_KEPT_BYTES_ROUNDED if rounded else _KEPT_BYTES, V * H)
        in_budget = max(1, budget // (softmaxes * V * operand.itemsize))
        if 3 * in_budget < N and not rounded:
            in_budget = min(N // 2, _STRETCH[kind] * in_budget)
        most_rows = min(most_rows, in_budget)
    if rounded:
        most_rows = max(_LEAST_ROWS, most_rows - most_rows % _step_of(most_rows))
    rows = max(1, math.ceil(N / max(1, math.ceil(N / most_rows))))
    if rounded and N:
        rows = _up(rows, _step_of(rows))
        last = N % rows
        N += _up(last, _step_of(last)) - last if last else 0
    even_width = math.ceil(V / math.ceil(V / max(_LEAST_WIDTH, _TILE_BYTES[kind] // (4 * rows))))
    width = min(V, _WIDTH_ROUNDED) if rounded else even_width
    return _Plan(N, rows, width, math.ceil(V / width))


def _step_of(rows: int) -> int:
    """What `rows` are a multiple of where they are rounded: at most an eighth of them, for 128 and more."""
    return int(max(_LEAST_ROWS, 2 ** max(0, (rows - 1).bit_length() - 4)))


def _up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


class Operands(NamedTuple):
    """What the matmuls read: the first two, and the third with the exponentials that are kept for it."""

    first: torch.dtype
    kept: torch.dtype


def _operands(hidden_TH: torch.Tensor, head: Head, kept: bool, *, anchored: bool) -> Operands:
    """A CPU rounds a product of bf16 operands to bf16: too much for logits and for ∂hidden, where one token of the vocabulary may
    be all there is to a sum; for a ∂W that is handed out in bf16 it is less than is lost in the end. fp16 has no room for the
    scaled rows of hidden."""
    if hidden_TH.device.type == "cpu":
        narrow = head.multiplied == head.weight_VH.dtype == torch.bfloat16 and not anchored
        narrow = narrow and few_shapes(hidden_TH.device, torch.bfloat16)
        return Operands(head.summed, torch.bfloat16 if narrow else head.summed)
    operand = head.summed if kept and head.multiplied == torch.float16 else head.multiplied
    return Operands(operand, operand)


def _fuses(device: torch.device) -> bool:
    """Whether the steps are compiled. On a CPU that gains nothing: a tile stays in cache between its few passes."""
    return str(device.type) != "cpu"


class _Workspace:
    """The buffers of a walk, allocated once: allocating them per tile costs more than the arithmetic does."""

    def __init__(self, plan: _Plan, H: int, head: Head, operands: Operands, device: torch.device, kept: bool) -> None:
        self.plan, self.head, self.operands, self.kept = plan, head, operands, kept
        self._bias_V = None if head.bias_V is None else head.bias_V.to(head.multiplied).to(head.summed)
        self._in_place = not _fuses(device)
        self._logits = self._slope = None
        if not few_shapes(device, operands.first):
            tiles = plan.count if kept and self._in_place and operands.first == operands.kept else 1
            self._logits = torch.empty(tiles, plan.rows, plan.width + _SPARE, dtype=head.summed, device=device)
        if head.softcap is not None and self._in_place:
            self._slope = torch.empty(plan.rows, plan.width, dtype=head.summed, device=device)
        self._weight = None
        if not operands.first == head.multiplied == head.weight_VH.dtype:
            self._weight = torch.empty(plan.width, H, dtype=operands.first, device=device)

    def logits(self, tile: int, rows: int, width: int) -> torch.Tensor | None:
        """(rows, width) to write into, None where products are new tensors."""
        if self._logits is None:
            return None
        if not self._in_place:
            return self._logits.view(-1)[: rows * width].view(rows, width)
        return self._logits[tile if len(self._logits) > 1 else 0, :rows, :width]

    def weight(self, tile: slice) -> torch.Tensor:
        """A tile of W as the first two matmuls want it, a view where it is so already."""
        weight_WH = self.head.weight_VH[tile]
        if self._weight is None:
            return weight_WH
        if self.operands.first != self.head.multiplied:
            weight_WH = weight_WH.to(self.head.multiplied)
        return self._weight[: weight_WH.shape[0]].copy_(weight_WH)

    def step(
        self,
        state: _Softmax,
        hidden_RH: torch.Tensor,
        weight_WH: torch.Tensor,
        local_R: torch.Tensor,
        tile: slice,
        out_RW: torch.Tensor | None,
        watch: Watch | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Advance `state` by a tile, whose logits `watch` gets to see; its exponentials, and what earlier ones must be multiplied
        by (None: 1)."""
        bias_W = None if self._bias_V is None else self._bias_V[tile]
        scale, softcap = self.head.scale / (self.head.softcap or 1.0), self.head.softcap
        logits_RW = product(hidden_RH, weight_WH.t(), self.head.summed, out=out_RW)
        if not self._in_place:
            if watch is not None:
                watch(logits_of(logits_RW, bias_W, scale, softcap), weight_WH, tile)
            exp_RW, shrink_R, *now = _fused_step()(
                logits_RW, local_R, bias_W, scale, softcap, self.operands.first, state.others_R, state.reference_R, state.target_R
            )
            state.others_R, state.reference_R, state.target_R = now
            return exp_RW, shrink_R
        if bias_W is not None:
            logits_RW.add_(bias_W)
        if scale != 1.0:
            logits_RW.mul_(scale)
        if softcap is not None:
            logits_RW.tanh_()
        if watch is not None:
            watch(logits_RW, weight_WH, tile)
        slope_RW = None
        if self._slope is not None:
            slope_RW = self._slope[: logits_RW.shape[0], : logits_RW.shape[1]]
            torch.mul(logits_RW, logits_RW, out=slope_RW).neg_().add_(1.0)
        return logits_RW, _step_in_place(state, logits_RW, local_R, softcap or 1.0, slope_RW)


def _step_in_place(
    state: _Softmax, logits_RW: torch.Tensor, local_R: torch.Tensor, unit: float, slope_RW: torch.Tensor | None
) -> torch.Tensor | None:
    """On a CPU: one buffer from logits to exponentials. Returns what earlier ones must be multiplied by."""
    rows_E = ((local_R >= 0) & (local_R < logits_RW.shape[1])).nonzero()[:, 0]
    here = (rows_E, local_R[rows_E])
    state.target_R = state.target_R.index_copy(0, rows_E, logits_RW[here])
    logits_RW[here] = -math.inf
    largest_R, shrink_R = logits_RW.amax(1), None
    if bool((largest_R > state.reference_R + _LAG / unit).any()):
        moved_R = torch.maximum(state.reference_R, largest_R)
        shrink_R = ((state.reference_R - moved_R) * unit).exp_()
        state.others_R, state.reference_R = state.others_R * shrink_R, moved_R
    exp_RW = logits_RW.sub_(state.reference_R[:, None])
    if unit != 1.0:
        exp_RW.mul_(unit)
    exp_RW.exp_()
    state.others_R = state.others_R + exp_RW.sum(1)
    if slope_RW is not None:
        exp_RW.mul_(slope_RW)
    return shrink_R


def _step_fused(
    logits_RW: torch.Tensor,
    local_R: torch.Tensor,
    bias_W: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    operand: torch.dtype,
    others_R: torch.Tensor,
    reference_R: torch.Tensor,
    target_R: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """The same step without branches on values and without writes in place: what a compiler can make one kernel of."""
    logits_RW = logits_of(logits_RW, bias_W, scale, softcap)
    unit, width = softcap or 1.0, logits_RW.shape[1]
    here_R = (local_R >= 0) & (local_R < width)
    at_target_R = logits_RW.gather(1, local_R.clamp(0, width - 1)[:, None])[:, 0]
    is_target_RW = local_R[:, None] == torch.arange(width, device=local_R.device)
    other_RW = torch.where(is_target_RW, -math.inf, logits_RW)
    # fp16 ends at 6e-8 below but only at 65504 above: a reference under the maximum uses that room.
    lift = 10.0 / unit if operand == torch.float16 else 0.0
    moved_R = torch.maximum(reference_R, other_RW.amax(1) - lift)
    shrink_R = torch.exp((reference_R - moved_R) * unit)
    exp_RW = torch.exp((other_RW - moved_R[:, None]) * unit)
    others_R = others_R * shrink_R + exp_RW.sum(1)
    if softcap is not None:
        exp_RW = exp_RW * (1 - logits_RW.square())
    return exp_RW.to(operand), shrink_R, others_R, moved_R, torch.where(here_R, at_target_R, target_R)


@functools.cache
def _fused_step() -> Callable[..., tuple[torch.Tensor, ...]]:
    """`_step_fused`, compiled at its first use, or plain if that fails (said once)."""
    compiled: list[Callable[..., tuple[torch.Tensor, ...]]] = [torch.compile(_step_fused)]

    def step(*arguments: Any) -> tuple[torch.Tensor, ...]:
        if compiled:
            try:
                return compiled[0](*arguments)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # whatever a compiler on a stranger's machine can raise
                compiled.clear()
                warnings.warn(f"[dwl] torch.compile failed, the loss runs uncompiled: {error}", stacklevel=2)
        return _step_fused(*arguments)

    return step
