"""The largest logits of some rows, collected tile by tile.

Shapes: R rows, E of them asked about, W tokens of a tile of the vocabulary, k.
"""

from __future__ import annotations

import torch

from dwl_plugin.loss.tokens import Tokens

__all__ = ["TopLogits"]


class TopLogits:
    """Of the tokens in `rows`, those whose objective wants to see them."""

    def __init__(self, tokens: Tokens, rows: slice, V: int) -> None:
        self._k, asked_R = min(tokens.top_k, V), tokens.gated(rows)
        # Off a CPU, learning which ask would make it wait: there, all do.
        some = asked_R is not None and asked_R.device.type == "cpu" and not bool(asked_R.all())
        self._rows_E = asked_R.nonzero()[:, 0] if some and asked_R is not None else None
        self._top_Ek: torch.Tensor | None = None

    def update(self, logits_RW: torch.Tensor, *_: object) -> None:
        logits_EW = logits_RW if self._rows_E is None else logits_RW[self._rows_E]
        best_Ek = logits_EW.topk(min(self._k, logits_EW.shape[1]), 1).values
        if self._top_Ek is not None:
            both_E2k = torch.cat([self._top_Ek, best_Ek], 1)
            best_Ek = both_E2k.topk(min(self._k, both_E2k.shape[1]), 1).values
        self._top_Ek = best_Ek

    def of_rows(self, rows: int) -> torch.Tensor:
        """(R, k) in falling order, all equal in rows that nobody asks about."""
        assert self._top_Ek is not None
        if self._rows_E is None:
            return self._top_Ek
        return self._top_Ek.new_zeros(rows, self._top_Ek.shape[1]).index_copy_(0, self._rows_E, self._top_Ek)
