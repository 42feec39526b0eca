"""What a loss is made of: what each class pays, and what one forward has to know to compute it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.deferred_logits import DeferredLogits
from dwl_plugin.loss.token_losses import Power, TokenLoss
from dwl_plugin.values import Overlap

__all__ = ["LossSpec", "PendingLoss"]


@dataclass(frozen=True)
class LossSpec:
    """What each class pays and how much it counts, over C classes (last: every token no class claims).

    Token t pays Σ_{c∋t} w_c·f_c(t)·(−log p_t): `weight` is w, `objective` says what f is. `overlap` says how class ids name the
    classes of a token: `first` by the index of its class, `sum` by a bit for each of them. Without `classes_pay` classes are only
    measured, and every token pays once, what the last class pays. `anchor` adds w_c·λ_c·KL(base‖θ), for a seam that knows the base
    model; empty: none. `weighs`: class ids hold a factor for each token, which multiplies what it pays. `allow_negative`: one with
    a factor below 0 pays |factor|·w_c·(−log(1 − p_t)) instead.
    """

    weight: tuple[float, ...] = (1.0,)
    objective: tuple[TokenLoss, ...] = (Power(),)
    overlap: Overlap = "first"
    classes_pay: bool = True
    anchor: tuple[float, ...] = ()
    weighs: bool = False
    allow_negative: bool = False

    def __post_init__(self) -> None:
        if not len(self.weight) == len(self.objective) >= 1 or len(self.anchor) not in (0, len(self.weight)):
            raise ValueError("weight, objective and anchor need one entry per class, of at least one class")

    @classmethod
    def named(cls, loss: str) -> LossSpec:
        """`nll` or `dft`, for every token."""
        if loss not in ("nll", "dft"):
            raise ValueError(f"loss is 'nll', 'dft' or a LossSpec, not {loss!r}")
        return cls(objective=(Power(1.0 if loss == "dft" else 0.0),))

    @property
    def terms(self) -> tuple[TokenLoss, ...]:
        """The different objectives: classes that pay alike are one term of the loss."""
        return tuple(dict.fromkeys(self.objective))

    @property
    def is_anchored(self) -> bool:
        return any(self.anchor)


@dataclass
class PendingLoss:
    """What one forward has to know. `denominator` divides the summed loss; None: the number of targets of this forward.

    `class_ids` (B, T) has the layout of `labels`, or, if `shifted`, of the `shift_labels` that the model is given as well. It is
    read at the positions that are targets; None: everything is the last class. `on_tokens` gets what they paid, detached.
    """

    spec: LossSpec
    labels: torch.Tensor | None = None
    class_ids: torch.Tensor | None = None
    class_weight: torch.Tensor | None = None
    denominator: torch.Tensor | float | None = None
    on_tokens: Callable[[ForwardMetrics], object] | None = None
    shifted: bool = False
    base: DeferredLogits | torch.Tensor | None = field(default=None, init=False)
    """The base model's logits, where the spec has an anchor."""
    taken: int = field(default=0, init=False)
    """How many losses of the forward the seam has computed."""
