"""An output head as numbers.

Shapes: R rows, W tokens of a tile of the vocabulary, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Head", "logits_of"]


@dataclass(frozen=True)
class Head:
    """logits = softcap · tanh(scale · (hidden Wᵀ + bias) / softcap); without a softcap, scale · (hidden Wᵀ + bias).

    `multiplied` is the dtype F.linear would multiply in, autocast included.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    softcap: float | None
    multiplied: torch.dtype

    @property
    def summed(self) -> torch.dtype:
        """The dtype of logits, sums and gradients while they accumulate."""
        return torch.float64 if self.multiplied == torch.float64 else torch.float32

    @property
    def unit(self) -> float:
        """What logits are counted in on the way: a softcap, so that tanh is all there is to it."""
        return self.softcap or 1.0


def logits_of(product_RW: torch.Tensor, bias_W: torch.Tensor | None, scale: float, softcap: float | None) -> torch.Tensor:
    """From hidden Wᵀ, in units of a softcap; `scale` is divided by it already."""
    logits_RW = (product_RW if bias_W is None else product_RW + bias_W) * scale
    return logits_RW if softcap is None else torch.tanh(logits_RW)
