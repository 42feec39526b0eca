"""A controller in a training loop: one exchange between the ranks per window and no wait within it, its state in the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dwl_plugin.alpha.controller_state import LoopState
from dwl_plugin.alpha.controllers import Controller
from dwl_plugin.loss.membership import widest

__all__ = ["ClosedLoop"]

Everywhere = Callable[[torch.Tensor], torch.Tensor]


class ClosedLoop:
    """Adds up what a window of optimizer steps costs and hands it to the controller.

    `everywhere` turns this rank's (1, 2, C) into (ranks, 2, C), in the order of the ranks, on each of them. The ranks' sums are
    then added in that order, so all of them compute the same α, bit for bit.
    """

    def __init__(self, controller: Controller, everywhere: Everywhere, device: torch.device) -> None:
        self.controller, self._everywhere = controller, everywhere
        self._sums_2C = torch.zeros(2, len(controller.names), dtype=widest(device), device=device)

    def add(self, tokens_C: torch.Tensor, nll_C: torch.Tensor) -> None:
        """Tokens and Σ nll of a micro-batch, by class; stays on the device."""
        self._sums_2C = self._sums_2C + torch.stack((nll_C, tokens_C)).to(self._sums_2C)

    def end_step(self, steps: int) -> None:
        """`steps` optimizer steps are done. Every rank has to call it."""
        if not self.controller.is_due(steps):
            return
        by_rank = self._by_rank()
        nll, tokens = ([sum(column) for column in zip(*rows, strict=True)] for rows in zip(*by_rank, strict=True))
        self.controller.update(steps, nll, tokens)
        self._sums_2C = torch.zeros_like(self._sums_2C)

    def state(self) -> dict[str, Any]:
        """The controller's, and the sums of the window that is not over yet. Every rank has to call it."""
        return {**self.controller.state(), "window": self._by_rank()}

    def load(self, saved: Mapping[str, Any], rank: int) -> None:
        """As many ranks as wrote the state each go on with their own sums; otherwise the first goes on with all of them.

        Raises as `Controller.load`.
        """
        state = LoopState.model_validate(saved)
        self.controller.load(state)
        by_rank = torch.tensor(state.window, dtype=self._sums_2C.dtype)
        ranks = len(self._by_rank())
        if len(by_rank) != ranks:
            by_rank = torch.stack([by_rank.sum(0), *[torch.zeros_like(by_rank[0])] * (ranks - 1)])
        self._sums_2C = by_rank[rank].to(self._sums_2C)

    def _by_rank(self) -> list[list[list[float]]]:
        rows: list[list[list[float]]] = self._everywhere(self._sums_2C[None]).tolist()
        return rows
