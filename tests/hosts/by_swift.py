"""ms-swift's side of the pairs of `docs/migrating.md`, in a process of its own: its import gives every `transformers.Trainer` other
callbacks.

    python -m tests.hosts.by_swift JOBS.json OUT.pt

JOBS are the arguments of `swift sft` by the pair's heading. OUT has, by the same, the rows as swift encoded them, the losses, norms
of gradients, and the weights before and after.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().double().clone() for name, weight in model.named_parameters()}


def main(jobs: Path, out: Path) -> None:
    from swift.pipelines import sft_main
    from swift.pipelines.train.sft import SwiftSft

    done: dict[str, dict[str, Any]] = {}
    train = SwiftSft.train

    def and_keep(self: Any, trainer: Any) -> Any:
        kept["start"] = weights(trainer.model)
        train(self, trainer)
        kept["losses"] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        kept["norms"] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        kept["end"] = weights(trainer.model)
        kept["rows"] = [{key: row[key] for key in ("input_ids", "labels")} for row in trainer.train_dataset]
        return {}

    SwiftSft.train = and_keep
    for title, words in json.loads(jobs.read_text(encoding="utf-8")).items():
        kept = done[title] = {}
        sft_main(words)
    torch.save(done, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
