"""An anchor to the base model: weight · KL(base‖θ) per token, beside whatever else the token pays.

    KL_t = Σ_v q_v·(log q_v − log p_v),   ∂KL_t/∂z = p − q,   q of the base model, a constant

With DFT it is ASFT (arXiv 2509.23753). Both softmaxes go through the same tiles of the vocabulary, so no logits are held.

Shapes: … any leading shape with T positions, R rows of a block, W tokens of a tile, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dwl_plugin.loss.heads import LinearHead, logits_of
from dwl_plugin.loss.matmul import add_product, add_transposed_product, product

__all__ = ["Anchor", "BasePass", "kl_to_base"]


@dataclass(frozen=True)
class Anchor:
    """What a loss needs to know of the base model.

    Args:
        weight: (…) what each token's KL counts; a constant.
        hidden: (…, H) hidden states of the base model at the same positions.
        head: (weight (V, H), bias (V,) or None) of the base model's head, under the softcap and scale of the call; None: the head
            of the call. `module_cross_entropy` takes a callable (R, H) -> (R, V), and always needs it.
    """

    weight: Tensor
    hidden: Tensor
    head: tuple[Tensor, Tensor | None] | Callable[[Tensor], Tensor] | None = None


def kl_to_base(cross_R: Tensor, sum_exp_R: Tensor, reference_R: Tensor, log_total_R: Tensor) -> Tensor:
    """KL of each row from Σ e·(b − z) and Σ e, with e = exp(b − reference), and log Σ exp(z)."""
    return (cross_R / sum_exp_R - (reference_R + sum_exp_R.log()) + log_total_R).clamp_(min=0)


class BasePass:
    """The base model's softmax beside ours, over one block of rows: Σ e^b, Σ e^b·(b − z) and Σ e^b·slope·W, b its logits."""

    def __init__(
        self, hidden_RH: Tensor, base: LinearHead, ours: LinearHead, operand: torch.dtype, *, hidden: bool, saves_exp: bool
    ) -> None:
        self._hidden_RH = hidden_RH.to(base.multiplied).to(operand)
        self._base, self._ours, self._operand, self._saves_exp = base, ours, operand, saves_exp
        zeros_R = torch.zeros(len(hidden_RH), dtype=ours.summed, device=hidden_RH.device)
        self._sum_exp_R, self._cross_R = zeros_R, zeros_R
        self._running_max_R = torch.full_like(zeros_R, torch.finfo(ours.summed).min)
        self._grad_RH = zeros_R.new_zeros(len(hidden_RH), ours.weight_VH.shape[1]) if hidden else None
        self._saved_exp: list[tuple[slice, Tensor, Tensor]] = []

    def update(self, logits_RW: Tensor, weight_WH: Tensor, tile: slice) -> None:
        """Our logits of a tile, in units of a softcap, and the weight they came from."""
        base, unit = self._base, self._ours.unit
        base_WH = weight_WH
        if base.weight_VH is not self._ours.weight_VH:
            base_WH = base.weight_VH[tile].to(base.multiplied).to(self._operand)
        product_RW = product(self._hidden_RH, base_WH.t(), logits_RW.dtype)
        bias_W = None if base.bias_V is None else base.bias_V[tile].to(base.multiplied).to(base.summed)
        base_RW = logits_of(product_RW, bias_W, base.scale / unit, base.softcap)
        running_max_R = torch.maximum(self._running_max_R, base_RW.amax(1))
        rescale_R = ((self._running_max_R - running_max_R) * unit).exp_()
        gap_RW = base_RW - logits_RW
        exp_RW = base_RW.sub_(running_max_R[:, None]).mul_(unit).exp_()
        gap_RW.masked_fill_(exp_RW == 0, 0.0)  # 0 · log 0
        self._running_max_R = running_max_R
        self._sum_exp_R = self._sum_exp_R * rescale_R + exp_RW.sum(1)
        self._cross_R = self._cross_R * rescale_R + (gap_RW.mul_(exp_RW)).sum(1) * unit
        if self._ours.softcap is not None:
            exp_RW.mul_(1 - logits_RW.square())
        exp_RW = exp_RW.to(self._operand)
        if self._grad_RH is not None:
            add_product(self._grad_RH.mul_(rescale_R[:, None]), exp_RW, weight_WH, first=False)
        if self._saves_exp:
            self._saved_exp.append((tile, exp_RW, running_max_R))

    def kl(self, log_total_R: Tensor) -> Tensor:
        """KL of each row; `log_total` is log Σ e^z."""
        return kl_to_base(self._cross_R, self._sum_exp_R, self._running_max_R * self._ours.unit, log_total_R)

    def add_gradients(
        self, coef_R: Tensor, grad_RH: Tensor | None, hidden_RH: Tensor, weight_VH: Tensor | None, bias_V: Tensor | None
    ) -> None:
        """Take coef·q, the base model's part of coef·(p − q), from the gradients."""
        share_R = coef_R / self._sum_exp_R
        if grad_RH is not None:
            assert self._grad_RH is not None
            grad_RH.addcmul_(self._grad_RH, share_R[:, None], value=-1)
        for tile, exp_RW, running_max_R in self._saved_exp:
            share_now_R = share_R * ((running_max_R - self._running_max_R) * self._ours.unit).exp()
            if weight_VH is not None:
                scaled_RH = (hidden_RH * -share_now_R[:, None]).to(self._operand)
                add_transposed_product(weight_VH[tile], exp_RW, scaled_RH, first=False)
            if bias_V is not None:
                bias_V[tile] -= share_now_R @ exp_RW.to(bias_V.dtype)
