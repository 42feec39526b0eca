"""`torch_compile`: a trainer with the loss compiles what the stock one does, and trains as it does uncompiled."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dwl_plugin
from tests.hosts.harness import logged

MOVING = {"type": "linear", "start": 0, "end": 4, "to": {"number": 1, "rest": 1}}
DFT = {"exponent": 1.0, "schedule": {"type": "linear", "start": 0, "end": 4, "to": {"exponent": 0.5}}}
DWL = {"classes": {"number": {"regex": r"\d+"}}, "alpha": {"number": 5, "rest": 1}, "token_loss": "dft", "schedule": MOVING}
CONFIG = {"loss": "dwl", "dft": DFT, "dwl": DWL}
COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.fixture
def compiler() -> Iterator[Any]:
    """What the compiler counts; it starts with nothing, and keeps nothing."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def trained(trainer: Any, config: dict[str, Any] | None) -> tuple[list[float], list[float]]:
    """Losses and gradient norms."""
    if config is not None:
        dwl_plugin.apply(trainer, config)
    trainer.train()
    return logged(trainer, "loss"), logged(trainer, "grad_norm")


@pytest.mark.parametrize("host", ["trainer_of", pytest.param("sft_of", marks=pytest.mark.slow)])
def test_the_model_is_no_more_graphs_than_without_the_loss(
    host: str, request: pytest.FixtureRequest, model: Any, compiler: Any
) -> None:
    make, graphs, runs = request.getfixturevalue(host), [], []
    for config, settings in ((None, COMPILED), (CONFIG, COMPILED), (CONFIG, {})):
        torch._dynamo.reset()
        compiler.clear()
        trainer = make({"max_steps": 4, **settings}, model=copy.deepcopy(model))
        runs.append(trained(trainer, config))
        graphs.append(compiler["stats"]["unique_graphs"])
        if trainer.args.torch_compile and config is not None:
            assert [why for why in compiler["graph_break"] if "function Seam._loss_function" not in why] == []
    stock, ours, uncompiled = graphs
    assert stock >= ours > uncompiled == 0
    assert len(runs[1][0]) == 4
    assert runs[1][0] == pytest.approx(runs[2][0], rel=1e-5)
    assert runs[1][1] == pytest.approx(runs[2][1], rel=1e-4)
