"""From what the caller hands over to the tokens that count: checks, then compaction. Nothing is changed in place.

Shapes: … any leading shape with T positions in all, N of them targets, R of a block, H hidden size, V vocabulary, K terms.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.token_losses import Power, Term, TokenStats

__all__ = ["Targets", "TokenLossValue", "Tokens", "brief", "require", "require_number", "select_tokens", "terms_of"]


@dataclass(frozen=True)
class Targets:
    """The target of each position (…), and what tokens pay: the terms, and an anchor beside them."""

    targets: torch.Tensor
    terms: Sequence[Term] = (Term(Power()),)
    anchor: Anchor | None = None
    ignore_index: int = -100


class TokenLossValue(NamedTuple):
    """What tokens pay, anchor included, and ℓ/nll of each term.

    Its gradient in the logits is grad_coef·q_j for the other tokens, q their softmax, and −target_coef for the target.
    """

    loss_R: torch.Tensor
    grad_coef_R: torch.Tensor
    target_coef_R: torch.Tensor
    factors_KR: torch.Tensor


@dataclass(frozen=True)
class Tokens:
    """The target tokens of a batch. `rows` are their positions among the T, None when every position is a target.

    Weights, those of the anchor too, are at the targets (N,); the anchor's hidden states are at all positions (T, H).
    """

    rows_N: torch.Tensor | None
    targets_N: torch.Tensor
    terms: tuple[Term, ...]
    anchor: Anchor | None

    def __len__(self) -> int:
        return len(self.targets_N)

    @property
    def top_k(self) -> int:
        """How many of the largest logits the objectives want to see."""
        return max(term.objective.needs_top for term in self.terms)

    def gated(self, rows: slice) -> torch.Tensor | None:
        """Which of the tokens in `rows` an objective wants to see the largest logits of; None: all of them."""
        weights = [term.weight for term in self.terms if term.objective.needs_top]
        if any(weight is None for weight in weights):
            return None
        return torch.stack([weight[rows] != 0 for weight in weights if weight is not None]).any(0)

    def token_losses(
        self,
        nll_R: torch.Tensor,
        one_minus_p_R: torch.Tensor,
        top_Rk: torch.Tensor | None,
        kl_R: torch.Tensor | None,
        rows: slice,
        *,
        slope: bool,
    ) -> TokenLossValue:
        """What the tokens in `rows` pay. Without `slope` the coefficients are those of a constant."""
        # Finite, so that 0·nll is 0; above 0, so that a power of 1 − p has a slope.
        limits = torch.finfo(nll_R.dtype)
        clamped_R = nll_R.detach().clamp(limits.tiny, limits.max).requires_grad_(slope)
        weights: list[torch.Tensor | float] = [1.0 if term.weight is None else term.weight[rows] for term in self.terms]
        # What is saved for the slope is no activation: a checkpoint around the loss would compute the loss again to get it.
        with torch.set_grad_enabled(slope), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
            paid = [term.objective.at(rows)(TokenStats(clamped_R, top_Rk)) for term in self.terms]
            weighted_R = _added([weight_R * paid_R for weight_R, paid_R in zip(weights, paid, strict=True)])
            slope_R = torch.autograd.grad(weighted_R.sum(), clamped_R)[0] if slope else torch.zeros_like(nll_R)
        factors_KR = torch.stack(paid).detach() / clamped_R.detach()
        loss_R = _added([weight_R * factor_R * nll_R for weight_R, factor_R in zip(weights, factors_KR, strict=True)])
        grad_coef_R = target_coef_R = slope_R * one_minus_p_R
        if self.anchor is not None and kl_R is not None:
            anchor_R = self.anchor.weight[rows]
            loss_R = loss_R + anchor_R * kl_R
            grad_coef_R = grad_coef_R + anchor_R * one_minus_p_R
            target_coef_R = target_coef_R - anchor_R * nll_R.neg().exp()
        return TokenLossValue(loss_R, grad_coef_R, target_coef_R, factors_KR)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _added(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_number(name: str, value: object, *, above: float) -> None:
    """A finite Python number greater than `above`."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    bound = "" if above == -math.inf else f" above {above:g}"
    require(plain and math.isfinite(value) and value > above, f"{name} must be a finite number{bound}, got {value!r}")  # type: ignore[operator, arg-type]


def terms_of(
    terms: Sequence[Term] | None,
    token_weight: torch.Tensor | None,
    exponent: torch.Tensor | float,
    min_weight: torch.Tensor | float,
) -> Sequence[Term]:
    """`terms`, or the one that the three others describe."""
    if terms is None:
        return [Term(Power(exponent, min_weight), token_weight)]
    plain = token_weight is None and not any(isinstance(v, torch.Tensor) or v for v in (exponent, min_weight))
    require(plain and len(terms) > 0, "terms take the place of token_weight, exponent and min_weight: give one or the other")
    return terms


def select_tokens(hidden: torch.Tensor, given: Targets, *, vocab_size: int | None, dtype: torch.dtype) -> Tokens:
    """Drop the ignored positions. On CUDA this waits once for the device, to learn how many are left."""
    targets, anchor, ignore_index = given.targets, given.anchor, given.ignore_index
    require(hidden.ndim >= 1 and hidden.is_floating_point(), f"hidden must be floating (..., H), got {brief(hidden)}")
    require(
        targets.shape == hidden.shape[:-1],
        f"targets must have the leading shape of hidden, {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}",
    )
    require(
        not targets.is_floating_point() and not targets.is_complex() and targets.dtype != torch.bool,
        f"targets must be integer token ids, got {targets.dtype}",
    )
    require(targets.device == hidden.device, f"targets must be on {hidden.device} like hidden, got {targets.device}")
    for term in given.terms:
        require(
            term.weight is None or isinstance(term.weight, torch.Tensor),
            f"token_weight must be None or a tensor like targets, got {term.weight!r}",
        )
    flat_T = targets.reshape(-1).long()
    keep_T = flat_T != ignore_index
    rows_N: torch.Tensor | None = keep_T.nonzero().squeeze(1)
    assert rows_N is not None
    if rows_N.numel() == flat_T.numel():
        rows_N = None

    def at_targets(name: str, value: torch.Tensor | float, floor: float) -> torch.Tensor | float:
        if not isinstance(value, torch.Tensor):
            plain = isinstance(value, (int, float)) and not isinstance(value, bool)
            require(
                plain and math.isfinite(value) and value >= floor,
                f"{name} must be a finite number of at least {floor:g}, or a tensor like targets, got {value!r}",
            )
            return float(value)
        require(
            value.shape in (targets.shape, torch.Size()),
            f"{name} must have the shape of targets, {tuple(targets.shape)}, got {tuple(value.shape)}",
        )
        require(value.device == hidden.device, f"{name} must be on {hidden.device} like hidden, got {value.device}")
        flat = value.detach().to(dtype).expand(targets.shape).reshape(-1)
        flat = flat if rows_N is None else flat.index_select(0, rows_N)
        if floor > -math.inf:
            _check(flat, (flat >= floor) & (flat < math.inf), f"{name} must be finite and at least {floor:g}")
        return flat

    targets_N = flat_T if rows_N is None else flat_T.index_select(0, rows_N)
    if vocab_size is not None:
        in_range_N = (targets_N >= 0) & (targets_N < vocab_size)
        _check(targets_N, in_range_N, f"targets must be {ignore_index} (ignored) or in [0, {vocab_size})")

    def selected(term: Term) -> Term:
        weight = None if term.weight is None else at_targets("token_weight", term.weight, -math.inf)
        assert not isinstance(weight, float)
        objective = term.objective
        if isinstance(objective, Power):
            floor = at_targets("min_weight", objective.min_weight, 0.0)
            objective = Power(at_targets("exponent", objective.exponent, 0.0), floor, objective.threshold)
        return Term(objective, weight)

    if anchor is not None:
        require(
            anchor.hidden.shape[:-1] == targets.shape and anchor.hidden.device == hidden.device,
            f"anchor.hidden must have the leading shape of targets, {tuple(targets.shape)}, on {hidden.device}, "
            f"got {brief(anchor.hidden)} on {anchor.hidden.device}",
        )
        weight_N = at_targets("anchor.weight", anchor.weight, -math.inf)
        assert isinstance(weight_N, torch.Tensor)
        anchor = replace(anchor, weight=weight_N, hidden=anchor.hidden.detach().reshape(-1, anchor.hidden.shape[-1]))
    return Tokens(rows_N, targets_N, tuple(selected(term) for term in given.terms), anchor)


def _check(values: torch.Tensor, allowed: torch.Tensor, message: str) -> None:
    """Name an offending value on the CPU; elsewhere let the device assert, since looking would make it wait."""
    if values.device.type == "cpu":
        if not bool(allowed.all()):
            raise ValueError(f"{message}, got {values[~allowed][0].item()}")
    elif values.device.type == "cuda":
        torch._assert_async(allowed.all(), message)


def brief(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
