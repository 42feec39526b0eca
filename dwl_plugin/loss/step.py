"""What happens between the matmuls of one tile of the vocabulary, in plain torch: the reference of the kernels in `step_kernel`,
and what runs where those cannot. Nothing here waits for the device, and logits become exponentials where they lie.

Logits are counted in units of a softcap: z = tanh(scale·(hidden Wᵀ + bias)/softcap), or scale·(hidden Wᵀ + bias) without one. The
exponentials of a row are taken from a reference that follows the largest logit with a lag; where it moves, the row's sums shrink.

Shapes: T positions, R rows of one block of target tokens, W tokens of one tile of the vocabulary, H hidden size, V vocabulary,
K ≥ k slots for the largest logits of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["BaseRows", "Form", "Products", "Slopes", "SoftmaxRows", "Steps", "TopRows", "TorchSteps"]


class Form(NamedTuple):
    """How products become logits, and when a reference follows them."""

    scale: float
    softcap: float | None
    lag: float
    """A reference stays behind by as much, in nats: rescaling a row of ∂hidden costs."""
    lift: float
    """And moves to this far under the largest logit: fp16 ends at 6e-8 below, but only at 65504 above."""

    @property
    def unit(self) -> float:
        return self.softcap or 1.0


class Products(NamedTuple):
    """hidden Wᵀ of a tile (R, W), overwritten; the bias of the tile; and where its exponentials go in the dtype of the matmuls, if
    they are wanted."""

    logits_RW: Tensor
    bias_W: Tensor | None
    exp_RW: Tensor | None


@dataclass
class SoftmaxRows:
    """Of each row so far: Σ_{j≠y} exp(z_j − reference), the reference, z_y, and Σ_{j≠y} exp(z_j − reference)·∂z_j·W_j."""

    total_R: Tensor
    reference_R: Tensor
    target_R: Tensor
    summed_RH: Tensor | None


@dataclass
class BaseRows:
    """Of each row of the base model so far, b its logits and e = exp(b − reference): Σ_j e_j, the reference, Σ_j e_j·(b_j − z_j) in
    nats, and Σ_j e_j·∂z_j·W_j."""

    total_R: Tensor
    reference_R: Tensor
    cross_R: Tensor
    summed_RH: Tensor | None


class TopRows(NamedTuple):
    """The k largest logits of each row so far in no order, in the first of K slots whose others hold +inf; and which rows are asked
    for (None: all)."""

    top_RK: Tensor
    k: int
    asked_R: Tensor | None


class Slopes(NamedTuple):
    """What is known of each token after the pass. Its gradient in the product of token j is coef·exp(z_j − reference)·∂z_j, of the
    target −target_coef, and with an anchor −base_coef·exp(b_j − base_reference)·∂z_j beside it; all of it times `by` (None: 1)."""

    targets_R: Tensor
    reference_R: Tensor
    coef_R: Tensor
    target_coef_R: Tensor
    by: Tensor | None = None
    base_reference_R: Tensor | None = None
    base_coef_R: Tensor | None = None

    def at(self, rows: slice) -> Slopes:
        return Slopes(*(part if part is None or part is self.by else part[rows] for part in self))  # type: ignore[arg-type]


class Steps(Protocol):
    """What happens to a tile and to the gradients, as one implementation has it."""

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
        """Go on by the tile that begins at token `start`; the `first` has nothing summed before it."""

    def slopes(self, ours: Products, of: Slopes, start: int, form: Form, base: Products | None) -> None:
        """The gradient in the products of a tile, written to `ours.exp_RW`."""

    def saved_slopes(self, exp_RW: Tensor, reference_R: Tensor, of: Slopes, start: int, form: Form) -> None:
        """The same, where the exponentials lie that `advance` left of the tile, from the references that it left."""

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
        """∂hidden of some rows, at their `positions` (None: the first ones) in `out_TH`, from what was summed."""

    def scale(self, gradient: Tensor, by: Tensor) -> None:
        """Multiply a contiguous gradient by a number where it lies; the kernel neither reads nor writes it if that is 1."""


class TorchSteps:
    """By operations of torch."""

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
        logits_RW, unit = _as_logits(ours, form), form.unit
        if top is not None:
            best_RK = torch.cat([top.top_RK[:, : top.k], logits_RW.topk(min(top.k, logits_RW.shape[1]), 1).values], 1)
            top.top_RK[:, : top.k] = best_RK.topk(top.k, 1).values
        if base is not None and base_rows is not None:
            self._advance_base(base, base_rows, logits_RW, form, first=first)
        slope_RW = None if form.softcap is None else 1 - logits_RW.square()
        here_R, at_R1 = _at_target(targets_R, start, logits_RW.shape[1])
        at_target_R1 = logits_RW.gather(1, at_R1)
        rows.target_R.copy_(torch.where(here_R, at_target_R1[:, 0], rows.target_R))
        logits_RW.scatter_(1, at_R1, torch.where(here_R[:, None], -math.inf, at_target_R1))
        shrink_R = _follow(rows.reference_R, logits_RW.amax(1), form)
        exp_RW = logits_RW.sub_(rows.reference_R[:, None]).mul_(unit).exp_()
        rows.total_R.mul_(shrink_R).add_(exp_RW.sum(1))
        if rows.summed_RH is not None and not first:
            rows.summed_RH.mul_(shrink_R[:, None])
        if ours.exp_RW is not None:
            ours.exp_RW.copy_(exp_RW if slope_RW is None else exp_RW.mul_(slope_RW))

    def _advance_base(self, theirs: Products, rows: BaseRows, logits_RW: Tensor, form: Form, *, first: bool) -> None:
        base_RW, unit = _as_logits(theirs, form), form.unit
        shrink_R = _follow(rows.reference_R, base_RW.amax(1), form)
        gap_RW = base_RW - logits_RW
        exp_RW = base_RW.sub_(rows.reference_R[:, None]).mul_(unit).exp_()
        gap_RW.masked_fill_(exp_RW == 0, 0.0)  # 0 · log 0
        rows.total_R.mul_(shrink_R).add_(exp_RW.sum(1))
        rows.cross_R.mul_(shrink_R).add_(gap_RW.mul_(exp_RW).sum(1), alpha=unit)
        if rows.summed_RH is not None and not first:
            rows.summed_RH.mul_(shrink_R[:, None])
        if theirs.exp_RW is not None:
            theirs.exp_RW.copy_(exp_RW if form.softcap is None else exp_RW.mul_(1 - logits_RW.square()))

    def slopes(self, ours: Products, of: Slopes, start: int, form: Form, base: Products | None) -> None:
        logits_RW, unit = _as_logits(ours, form), form.unit
        slope_RW = None if form.softcap is None else 1 - logits_RW.square()
        here_R, at_R1 = _at_target(of.targets_R, start, logits_RW.shape[1])
        grad_RW = logits_RW.sub_(of.reference_R[:, None]).mul_(unit).exp_().mul_(of.coef_R[:, None])
        if slope_RW is not None:
            grad_RW.mul_(slope_RW)
        grad_RW.scatter_(1, at_R1, torch.where(here_R[:, None], -of.target_coef_R[:, None], grad_RW.gather(1, at_R1)))
        if base is not None:
            assert of.base_reference_R is not None
            assert of.base_coef_R is not None
            exp_RW = _as_logits(base, form).sub_(of.base_reference_R[:, None]).mul_(unit).exp_().mul_(of.base_coef_R[:, None])
            grad_RW.sub_(exp_RW if slope_RW is None else exp_RW.mul_(slope_RW))
        assert ours.exp_RW is not None
        ours.exp_RW.copy_(grad_RW if of.by is None else grad_RW.mul_(of.by))

    def saved_slopes(self, exp_RW: Tensor, reference_R: Tensor, of: Slopes, start: int, form: Form) -> None:
        by = 1.0 if of.by is None else of.by
        here_R, at_R1 = _at_target(of.targets_R, start, exp_RW.shape[1])
        exp_RW.mul_(((reference_R - of.reference_R).mul_(form.unit).exp_() * of.coef_R * by)[:, None])
        target_R1 = (-of.target_coef_R * by).to(exp_RW.dtype)[:, None]
        exp_RW.scatter_(1, at_R1, torch.where(here_R[:, None], target_R1, exp_RW.gather(1, at_R1)))

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
        target_RH = weight_VH[of.targets_R].to(multiplied).to(summed_RH.dtype)
        grad_RH = summed_RH.mul_(of.coef_R[:, None]).addcmul_(target_RH, of.target_coef_R[:, None], value=-1)
        if base_summed_RH is not None:
            assert of.base_coef_R is not None
            grad_RH.addcmul_(base_summed_RH, of.base_coef_R[:, None], value=-1)
        if positions is None:
            out_TH[: len(grad_RH)].copy_(grad_RH)
        else:
            out_TH.index_copy_(0, positions, grad_RH.to(out_TH.dtype))

    def scale(self, gradient: Tensor, by: Tensor) -> None:
        gradient.mul_(by)


def _as_logits(products: Products, form: Form) -> Tensor:
    logits_RW = products.logits_RW if products.bias_W is None else products.logits_RW.add_(products.bias_W)
    logits_RW.mul_(form.scale)
    return logits_RW if form.softcap is None else logits_RW.tanh_()


def _at_target(targets_R: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Whether a row's target is in the tile, and a column (R, 1): the target's there, any where it is not."""
    local_R = targets_R - start
    return (local_R >= 0) & (local_R < width), local_R.clamp(0, width - 1)[:, None]


def _follow(reference_R: Tensor, largest_R: Tensor, form: Form) -> Tensor:
    """Move references that lag too far behind; what the rows' sums shrink by."""
    wanted_R = largest_R - form.lift / form.unit
    moved_R = torch.where(wanted_R > reference_R + form.lag / form.unit, wanted_R, reference_R)
    shrink_R = ((reference_R - moved_R) * form.unit).exp_()
    reference_R.copy_(moved_R)
    return shrink_R
