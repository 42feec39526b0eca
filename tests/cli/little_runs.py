"""Run folders as a trainer leaves them, made by hand."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

Entry = dict[str, Any]

DWL = {
    "loss": "dwl",
    "dwl": {"classes": {"number": {"regex": r"\d+"}}, "alpha": {"number": 0.2, "rest": 0.8}, "reduction": "weighted_mean"},
}


def step(at: int, number: float = 3.0, rest: float = 1.0, alpha: float = 0.2, share: float = 0.25) -> Entry:
    """A logged training step; `number` and `rest` are nlls, `alpha` and `share` those of `number`."""
    weighted = share * alpha * number, (1 - share) * (1 - alpha) * rest
    return {
        "step": at,
        "epoch": at / 100,
        "loss": sum(weighted),
        "nll": share * number + (1 - share) * rest,
        "dwl/p": 0.5,
        "dwl/nll/number": number,
        "dwl/nll/rest": rest,
        "dwl/p/number": 0.5,
        "dwl/p/rest": 0.5,
        "dwl/alpha/number": alpha,
        "dwl/alpha/rest": 1 - alpha,
        "dwl/token_share/number": share,
        "dwl/token_share/rest": 1 - share,
        "dwl/loss_share/number": weighted[0] / sum(weighted),
        "dwl/loss_share/rest": weighted[1] / sum(weighted),
    }


def evaluation(at: int, number: float, rest: float, share: float = 0.25, p: float = 0.5) -> Entry:
    return {
        "step": at,
        "eval_loss": 1.0,
        "eval_nll": share * number + (1 - share) * rest,
        "eval_dwl/nll/number": number,
        "eval_dwl/nll/rest": rest,
        "eval_dwl/p": p,
        "eval_dwl/p/number": p,
        "eval_dwl/p/rest": p,
        "eval_dwl/token_share/number": share,
        "eval_dwl/token_share/rest": 1 - share,
    }


def write_state(folder: Path, history: Sequence[Entry], age: float = 0.0, **fields: Any) -> Path:
    """`trainer_state.json` in `folder`, written `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    last = max((entry.get("step", 0) for entry in history), default=0)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": last, "max_steps": last, "log_history": list(history), **fields}))
    now = path.stat().st_mtime - age
    os.utime(path, (now, now))
    return path


def write_run(folder: Path, history: Sequence[Entry], config: dict[str, Any] | None = DWL) -> Path:
    last = max((entry.get("step", 0) for entry in history), default=0)
    write_state(folder / f"checkpoint-{last}", history)
    if config is not None:
        (folder / "dwl_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return folder
