"""Between two logs a trainer with the loss reads no value that the stock trainer does not, but the number of targets."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from transformers import TrainerCallback

import dwl_plugin
from bench.gpu.device_waits import Waits
from tests.hosts.harness import Build

SETTINGS = {"max_steps": 4, "gradient_accumulation_steps": 2, "logging_steps": 100, "save_strategy": "no"}
MOVING = {"type": "linear", "start": 0, "end": 4, "to": {"number": 1, "rest": 1}}
DWL = {"classes": {"number": {"regex": r"\d+"}}, "alpha": {"number": 5, "rest": 1}, "token_loss": "dft", "reduction": "class_mean"}
CONFIGS: dict[str, dict[str, Any]] = {
    "nll": {"loss": "nll"},
    "schedule": {"loss": "dwl", "dwl": {**DWL, "schedule": MOVING}},
    "controller": {"loss": "dwl", "dwl": {**DWL, "controller": {"type": "group_dro", "eta": 1.0, "every": 100}}},
}
ON_A_CPU = ("run/collate.py", "loss/cpu_walk.py", "loss/linear_cross_entropy.py", "loss/tokens.py: if not bool(allowed.all())")
"""Data that is not on a device yet, and what the fused loss does on a CPU alone."""
FOUND_N = "nonzero in loss/tokens.py: found_N = (flat_T != given.ignore_index).nonzero()[:, 0]"


class Steps(TrainerCallback):
    """The waits from the end of the first step to the end of the third."""

    def __init__(self, waits: Waits) -> None:
        self._waits, self._ends = waits, list[Counter[str]]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._ends.append(self._waits.where.copy())

    @property
    def counted(self) -> Counter[str]:
        return self._ends[2] - self._ends[0]


def waits_of(trainer: Any) -> tuple[int, dict[str, int]]:
    """Outside the package, and at its lines."""
    with Waits() as waits:
        steps = Steps(waits)
        trainer.add_callback(steps)
        trainer.train()
    counted = steps.counted
    elsewhere = counted.pop("elsewhere", 0)
    return elsewhere, {place: count for place, count in counted.items() if not any(line in place for line in ON_A_CPU)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_trainer_waits_as_the_stock_one_and_for_the_number_of_targets(trainer_of: Build, name: str) -> None:
    stock, _ = waits_of(trainer_of(SETTINGS))
    trainer = trainer_of(SETTINGS)
    dwl_plugin.apply(trainer, CONFIGS[name])
    elsewhere, ours = waits_of(trainer)
    assert stock > 0
    assert elsewhere == stock
    assert ours == {FOUND_N: 4}


def test_trls_trainer_waits_less_than_without_the_loss(sft_of: Build) -> None:
    stock, _ = waits_of(sft_of(SETTINGS))
    trainer = sft_of(SETTINGS)
    dwl_plugin.apply(trainer, CONFIGS["schedule"])
    elsewhere, ours = waits_of(trainer)
    assert {place.partition("  #")[0]: count for place, count in ours.items()} == {
        FOUND_N: 4,
        "nonzero in hosts/trl.py: places = is_target.nonzero(as_tuple=True)": 4,
    }
    assert elsewhere + sum(ours.values()) <= stock
