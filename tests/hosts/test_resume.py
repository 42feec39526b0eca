"""A run that stopped goes on as if it had not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hosts.harness import CLASSES, train

Configure = Callable[..., dict[str, Any]]
DWL = {
    "classes": CLASSES,
    "alpha": {"reasoning": 1, "number": 5, "control": 2, "rest": 2},
    "reduction": "class_mean",
    "schedule": {
        "type": "linear",
        "to": {"reasoning": 4, "number": 1, "control": 1, "rest": 4},
        "start": "10%",
        "end": "90%",
    },
}


@pytest.mark.parametrize("packed", [False, True])
def test_resumed_run_has_the_alpha_and_losses_of_the_whole_run(
    configure: Configure, tmp_path: Path, packed: bool
) -> None:
    settings = {"loss": "dwl", "dwl": DWL, "max_steps": 10, "num_epochs": 3, "save_strategy": "steps", "save_steps": 5}
    settings |= (
        {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 1} if packed else {"micro_batch_size": 2}
    )
    whole = train(configure(**settings))
    checkpoint = tmp_path / "run" / "checkpoint-5"
    resumed = train(configure(**settings, out=tmp_path, resume_from_checkpoint=str(checkpoint)))
    first, second = whole.history, resumed.history
    for entry in (entry for entry in first if entry.get("step", 0) > 5 and "loss" in entry):
        twin = next(other for other in second if other.get("step") == entry["step"] and "loss" in other)
        for key, value in entry.items():
            if key.startswith("dwl/") or key in ("loss", "nll", "grad_norm"):
                assert twin[key] == value, (entry["step"], key)
