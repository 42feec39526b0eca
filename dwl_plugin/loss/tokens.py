"""From what the caller hands over to the tokens that count: checks, then compaction. Nothing is changed in place.

Shapes: … any leading shape with T positions in all, N of them targets, R of a block, H hidden size, V vocabulary, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.stable_nll import unlikelihood
from dwl_plugin.loss.token_losses import Power, Term, TokenStats

__all__ = ["Targets", "TokenLossValue", "Tokens", "brief", "is_finite", "require", "select_tokens", "terms_of"]


@dataclass(frozen=True)
class Targets:
    """The target of each position (…), and what tokens pay: the terms, beside them `unlikelihood`·(−log(1 − p)), and an anchor."""

    targets: Tensor
    terms: Sequence[Term] = (Term(Power()),)
    anchor: Anchor | None = None
    ignore_index: int = -100
    unlikelihood: Tensor | None = None


class TokenLossValue(NamedTuple):
    """What tokens pay in all, and ℓ/nll of each term.

    Its gradient in the logits is grad_coef·q_j for the other tokens, q their softmax, and −target_coef for the target.
    """

    loss_R: Tensor
    grad_coef_R: Tensor
    target_coef_R: Tensor
    factors_KR: Tensor


@dataclass(frozen=True)
class Tokens:
    """The target tokens of a batch. `rows` are their positions among the T, None when every position is a target.

    Weights, those of the anchor too, are at the targets (N,); the anchor's hidden states are at all positions (T, H).
    """

    rows_N: Tensor | None
    targets_N: Tensor
    terms: tuple[Term, ...]
    anchor: Anchor | None
    unlikelihood_N: Tensor | None

    def __len__(self) -> int:
        return len(self.targets_N)

    def positions(self, block: slice) -> Tensor | slice:
        """Where the tokens of a block are among the T."""
        return block if self.rows_N is None else self.rows_N[block]

    @property
    def top_k(self) -> int:
        """How many of the largest logits the objectives want to see."""
        return max(term.objective.needs_top for term in self.terms)

    def gated(self, rows: slice) -> Tensor | None:
        """Which of the tokens in `rows` an objective wants to see the largest logits of; None: all of them."""
        weights = [term.weight for term in self.terms if term.objective.needs_top]
        if any(weight is None for weight in weights):
            return None
        return torch.stack([weight[rows] != 0 for weight in weights if weight is not None]).any(0)

    def token_losses(
        self, nll_R: Tensor, one_minus_p_R: Tensor, top_Rk: Tensor | None, kl_R: Tensor | None, rows: slice, *, slope: bool
    ) -> TokenLossValue:
        """What the tokens in `rows` pay. Without `slope` the coefficients are those of a constant."""
        # Finite, so that 0·nll is 0; above 0, so that a power of 1 − p has a slope.
        limits = torch.finfo(nll_R.dtype)
        clamped_R = nll_R.detach().clamp(limits.tiny, limits.max).requires_grad_(slope)
        weights: list[Tensor | float] = [1.0 if term.weight is None else term.weight[rows] for term in self.terms]
        # What is saved for the slope is no activation: a checkpoint around the loss would compute the loss again to get it.
        with torch.set_grad_enabled(slope), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            paid = [term.objective.at(rows)(TokenStats(clamped_R, top_Rk)) for term in self.terms]
            weighted_R = reduce(torch.add, (weight_R * paid_R for weight_R, paid_R in zip(weights, paid, strict=True)))
            slope_R = torch.autograd.grad(weighted_R.sum(), clamped_R)[0] if slope else torch.zeros_like(nll_R)
        factors_KR = torch.stack(paid).detach() / clamped_R.detach()
        loss_R = reduce(torch.add, (weight_R * factor_R * nll_R for weight_R, factor_R in zip(weights, factors_KR, strict=True)))
        grad_coef_R = target_coef_R = slope_R * one_minus_p_R
        if self.unlikelihood_N is not None:
            weight_R = self.unlikelihood_N[rows]
            loss_R = loss_R + weight_R * unlikelihood(nll_R)
            if slope:  # p itself: no part of it, dℓ/dnll or 1 − p, could be told from ∞ and 0 as p -> 1
                grad_coef_R = target_coef_R = grad_coef_R - weight_R * nll_R.neg().exp()
        if self.anchor is not None and kl_R is not None:
            anchor_R = self.anchor.weight[rows]
            loss_R = loss_R + anchor_R * kl_R
            grad_coef_R = grad_coef_R + anchor_R * one_minus_p_R
            target_coef_R = target_coef_R - anchor_R * nll_R.neg().exp()
        return TokenLossValue(loss_R, grad_coef_R, target_coef_R, factors_KR)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def is_finite(value: object) -> bool:
    """Whether it is a finite Python number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def terms_of(
    terms: Sequence[Term] | None, token_weight: Tensor | None, exponent: Tensor | float, min_weight: Tensor | float
) -> Sequence[Term]:
    """`terms`, or the one that the three others describe."""
    if terms is None:
        return [Term(Power(exponent, min_weight), token_weight)]
    plain = token_weight is None and not any(isinstance(v, Tensor) or v for v in (exponent, min_weight))
    require(plain and len(terms) > 0, "terms take the place of token_weight, exponent and min_weight: give one or the other")
    return terms


def select_tokens(hidden: Tensor, given: Targets, *, vocab_size: int | None, dtype: torch.dtype) -> Tokens:
    """Drop the ignored positions. On CUDA this waits once for the device, to learn how many are left."""
    targets, anchor, device = given.targets, given.anchor, hidden.device
    require(hidden.ndim >= 1 and hidden.is_floating_point(), f"hidden must be floating (..., H), got {brief(hidden)}")
    shape, leading = tuple(targets.shape), tuple(hidden.shape[:-1])
    require(shape == leading, f"targets must have the leading shape of hidden, {leading}, got {shape}")
    is_integer = not (targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool)
    require(is_integer, f"targets must be integer token ids, got {targets.dtype}")
    require(targets.device == device, f"targets must be on {device} like hidden, got {targets.device}")
    flat_T = targets.reshape(-1).long()
    found_N = (flat_T != given.ignore_index).nonzero()[:, 0]
    rows_N = None if len(found_N) == len(flat_T) else found_N

    def selected(values_T: Tensor) -> Tensor:
        return values_T if rows_N is None else values_T.index_select(0, rows_N)

    def at_targets(name: str, value: Tensor) -> Tensor:
        require(value.shape in (shape, ()), f"{name} must have the shape of targets, {shape}, got {tuple(value.shape)}")
        require(value.device == device, f"{name} must be on {device} like hidden, got {value.device}")
        return selected(value.detach().to(dtype).expand(shape).reshape(-1))

    def not_negative(name: str, value: Tensor | float) -> Tensor | float:
        if not isinstance(value, Tensor):
            allowed = f"{name} must be a finite number of at least 0, or a tensor like targets"
            require(is_finite(value) and value >= 0, f"{allowed}, got {value!r}")
            return float(value)
        value_N = at_targets(name, value)
        _check(value_N, (value_N >= 0) & (value_N < math.inf), f"{name} must be finite and at least 0")
        return value_N

    targets_N = selected(flat_T)
    if vocab_size is not None:
        in_range_N = (targets_N >= 0) & (targets_N < vocab_size)
        _check(targets_N, in_range_N, f"targets must be {given.ignore_index} (ignored) or in [0, {vocab_size})")
    terms = []
    for term in given.terms:
        objective, weight = term.objective, term.weight
        if weight is not None:
            got = type(weight).__name__  # showing a tensor would wait for the device
            require(isinstance(weight, Tensor), f"token_weight must be None or a tensor like targets, got {got}")
            weight = at_targets("token_weight", weight)
        if isinstance(objective, Power):
            exponent = not_negative("exponent", objective.exponent)
            objective = replace(objective, exponent=exponent, min_weight=not_negative("min_weight", objective.min_weight))
        terms.append(Term(objective, weight))
    if anchor is not None:
        fits = anchor.hidden.shape[:-1] == shape and anchor.hidden.device == device
        allowed = f"anchor.hidden must have the leading shape of targets, {shape}, on {device}"
        require(fits, f"{allowed}, got {brief(anchor.hidden)} on {anchor.hidden.device}")
        hidden_TH = anchor.hidden.detach().reshape(-1, anchor.hidden.shape[-1])
        anchor = replace(anchor, weight=at_targets("anchor.weight", anchor.weight), hidden=hidden_TH)
    unlikely_N = None if given.unlikelihood is None else at_targets("unlikelihood", given.unlikelihood)
    return Tokens(rows_N, targets_N, tuple(terms), anchor, unlikely_N)


def _check(values: Tensor, allowed: Tensor, message: str) -> None:
    """Name an offending value on the CPU; elsewhere let the device assert, since looking would make it wait."""
    if values.device.type == "cpu":
        if not bool(allowed.all()):
            raise ValueError(f"{message}, got {values[~allowed][0].item()}")
    elif values.device.type == "cuda":
        torch._assert_async(allowed.all(), message)


def brief(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
