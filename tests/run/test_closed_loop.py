"""The sums of a window that a checkpoint cut in two, resumed on as many ranks as before or on others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import parse
from dwl_plugin.run.closed_loop import ClosedLoop
from dwl_plugin.run.moving import controller_of

TOKENS, NLL = [[3.0, 1.0], [0.0, 5.0]], [[2.5, 0.5], [0.0, 7.0]]
"""(ranks, classes): what each of two ranks has seen when the checkpoint is written."""
CPU = torch.device("cpu")


def loops(ranks: int) -> list[ClosedLoop]:
    """One loop a rank, which see one another as they would through a group."""
    block = parse(
        {"loss": "dwl", "dwl": {"classes": {"a": {"token_ids": [1]}}, "controller": {"type": "group_dro", "eta": 1.0, "every": 2}}}
    )
    assert block is not None
    found: list[ClosedLoop] = []

    def everywhere(_: torch.Tensor) -> torch.Tensor:
        return torch.stack([loop._sums_2C for loop in found])

    for _ in range(ranks):
        controller = controller_of(block, RunLength(10, None))
        assert controller is not None
        found.append(ClosedLoop(controller, everywhere, CPU))
    return found


def saved() -> tuple[dict[str, Any], list[ClosedLoop]]:
    two = loops(2)
    for loop, tokens, nll in zip(two, TOKENS, NLL, strict=True):
        loop.add(torch.tensor(tokens), torch.tensor(nll))
    return two[0].state(), two


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_window_is_counted_once_on_any_number_of_ranks(ranks: int) -> None:
    state, whole = saved()
    resumed = loops(ranks)
    for rank, loop in enumerate(resumed):
        loop.load(state, rank)
    assert resumed[0].state()["window"] == (
        state["window"] if ranks == 2 else [[[2.5, 7.5], [3.0, 6.0]], *[[[0.0, 0.0], [0.0, 0.0]]] * (ranks - 1)]
    )
    update(whole)
    update(resumed)
    assert {loop.controller.alpha for loop in resumed} == {whole[0].controller.alpha}
    assert whole[0].controller.alpha != (0.5, 0.5)


def update(every: list[ClosedLoop]) -> None:
    """A window ends on all ranks at once: each sees the sums of before any is set back to zero."""
    sums = torch.stack([loop._sums_2C for loop in every])
    for loop in every:
        loop._everywhere = lambda _: sums
        loop.end_step(2)
