"""From what the caller hands over to the tokens that count: checks, then compaction. Nothing is changed in place.

Shapes: … any leading shape with T positions in all, N of them targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dwl_plugin.loss.exact_nll import paid_weight

__all__ = ["Tokens", "brief", "require", "require_number", "select_tokens"]


@dataclass(frozen=True)
class Tokens:
    """The target tokens of a batch. `rows` are their positions among the T, None when every position is a target."""

    rows_N: torch.Tensor | None
    targets_N: torch.Tensor
    token_weight_N: torch.Tensor | None
    exponent: torch.Tensor | float
    min_weight: torch.Tensor | float

    def __len__(self) -> int:
        return len(self.targets_N)

    def paid(self, nll_R: torch.Tensor, rows: slice) -> torch.Tensor:
        """`paid_weight` of the tokens in `rows`, whose nll is given."""
        weight_R = None if self.token_weight_N is None else self.token_weight_N[rows]
        exponent, floor = (v[rows] if isinstance(v, torch.Tensor) else v for v in (self.exponent, self.min_weight))
        return paid_weight(nll_R, weight_R, exponent, floor)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def require_number(name: str, value: object, *, above: float) -> None:
    """A finite Python number greater than `above`."""
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    bound = "" if above == -math.inf else f" above {above:g}"
    require(plain and math.isfinite(value) and value > above, f"{name} must be a finite number{bound}, got {value!r}")  # type: ignore[operator, arg-type]


def select_tokens(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    *,
    ignore_index: int,
    vocab_size: int | None,
    dtype: torch.dtype,
    token_weight: torch.Tensor | None,
    exponent: torch.Tensor | float,
    min_weight: torch.Tensor | float,
) -> Tokens:
    """Drop the ignored positions. On CUDA this waits once for the device, to learn how many are left."""
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
    if token_weight is not None:
        require(
            isinstance(token_weight, torch.Tensor),
            f"token_weight must be None or a tensor like targets, got {token_weight!r}",
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
    weight_N = None if token_weight is None else at_targets("token_weight", token_weight, -math.inf)
    assert not isinstance(weight_N, float)
    return Tokens(
        rows_N, targets_N, weight_N, at_targets("exponent", exponent, 0.0), at_targets("min_weight", min_weight, 0.0)
    )


def _check(values: torch.Tensor, allowed: torch.Tensor, message: str) -> None:
    """Name an offending value on the CPU; elsewhere let the device assert, since looking would make it wait."""
    if values.device.type == "cpu":
        if not bool(allowed.all()):
            raise ValueError(f"{message}, got {values[~allowed][0].item()}")
    elif values.device.type == "cuda":
        torch._assert_async(allowed.all(), message)


def brief(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
