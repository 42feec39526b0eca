"""Per-class sums over target tokens. Sums travel over micro-batches, steps and ranks; division happens once, in `ratios`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["ClassSums", "widest"]

_ROWS = ("count", "nll", "p", "weight", "loss")


def widest(device: torch.device) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


class ClassSums:
    """Running sums (5, C): tokens, Σ nll, Σ p, Σ token weight, Σ weighted loss.

    Stays on the device of the tokens, so adding costs no synchronisation.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._sums_RC: torch.Tensor | None = None

    def add(self, nll_N: torch.Tensor, class_N: torch.Tensor, weight_N: torch.Tensor) -> None:
        """Count tokens: nll in nats, class index (negative: not a target), and the weight each token's nll was given."""
        nll_N, weight_N = nll_N.detach().reshape(-1), weight_N.detach().reshape(-1)
        class_N = class_N.reshape(-1)
        dtype = widest(nll_N.device)
        nll_N, weight_N = nll_N.to(dtype), weight_N.to(dtype)
        rows_RN = torch.stack((torch.ones_like(nll_N), nll_N, torch.exp(-nll_N), weight_N, weight_N * nll_N))
        slot_N = torch.where(
            class_N < 0, len(self.names), class_N
        )  # tokens that are no targets go to a column of their own
        sums_RC = rows_RN.new_zeros(len(_ROWS), len(self.names) + 1).index_add_(1, slot_N, rows_RN)
        self._sums_RC = sums_RC if self._sums_RC is None else self._sums_RC + sums_RC.to(self._sums_RC.device)

    def take(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """The sums since the last call, added up over ranks by `reduce`, as ratios; then starts again from zero.

        Every rank has to call it, also one that saw no token.
        """
        sums_RC = self._sums_RC
        if sums_RC is None:
            sums_RC = torch.zeros(len(_ROWS), len(self.names) + 1, dtype=widest(device), device=device)
        self._sums_RC = None
        return self._ratios(reduce(sums_RC.to(device))[:, :-1].tolist())

    def _ratios(self, rows: list[list[float]]) -> dict[str, float]:
        count, nll, p, weight, loss = rows
        total, total_loss = sum(count), sum(loss)
        if total == 0:
            return {}
        out = {"nll": sum(nll) / total, "dwl/p": sum(p) / total, "dwl/weight": sum(weight) / total}
        for c, name in enumerate(self.names):
            if count[c] > 0:
                out[f"dwl/nll/{name}"] = nll[c] / count[c]
                out[f"dwl/p/{name}"] = p[c] / count[c]
            out[f"dwl/token_share/{name}"] = count[c] / total
            if total_loss > 0:
                out[f"dwl/loss_share/{name}"] = loss[c] / total_loss
        return out
