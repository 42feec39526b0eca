"""One training by Axolotl that takes a step whenever it is told to: the process that `train` starts for each loss."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import setup_model_and_trainer
from axolotl.utils.dict import DictDefault
from transformers import TrainerCallback

from bench.gpu.common import CUDA, MIB, synchronize
from bench.gpu.train import UNCOUNTED


def use_cut_cross_entropy() -> None:
    """Qwen2 with Apple's loss, as its authors patch it: Axolotl's plugin wants a fork that is on no package index."""
    from cut_cross_entropy import linear_cross_entropy
    from transformers import Qwen2ForCausalLM
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(self: Any, input_ids: Any = None, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        implementation = "cce" if CUDA else "torch_compile"
        total = linear_cross_entropy(hidden, self.lm_head.weight, labels, shift=True, reduction="sum", impl=implementation)
        return CausalLMOutputWithPast(loss=total / num_items_in_batch)

    Qwen2ForCausalLM.forward = forward


class InTurn(TrainerCallback):
    """Waits for its turn before a step, and says what the step took. The last uncounted one is watched for waits."""

    def __init__(self, turn: int, answers: int) -> None:
        self._turn, self._answers = os.fdopen(turn), os.fdopen(answers, "w")
        self._watched: Any = None
        self._started = self._peak_mib = 0.0

    def say(self, **what: Any) -> None:
        print(json.dumps(what), file=self._answers, flush=True)

    def on_train_begin(self, *args: Any, model: Any, **kwargs: Any) -> None:
        self.say(head=str(model.get_output_embeddings().weight.dtype))

    def on_step_begin(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        self._turn.readline()
        if CUDA and state.global_step == UNCOUNTED - 1:
            torch.cuda.set_sync_debug_mode("warn")
            self._watched = warnings.catch_warnings(record=True)
            self._said = self._watched.__enter__()
            warnings.simplefilter("always")
        synchronize()
        if CUDA:  # Axolotl resets it with every line that it logs
            torch.cuda.reset_peak_memory_stats()
        self._started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        waits: dict[str, dict[str, int]] = {}
        if self._watched is not None:
            torch.cuda.set_sync_debug_mode("default")
            self._watched.__exit__(None, None, None)
            self._watched = None
            found = [said for said in self._said if "synchroniz" in str(said.message)]
            waits["waits"] = Counter(f"{'/'.join(said.filename.split('/')[-2:])}:{said.lineno}" for said in found)
        synchronize()
        seconds = time.perf_counter() - self._started
        if CUDA:
            self._peak_mib = max(self._peak_mib, torch.cuda.max_memory_allocated() / MIB)
        self.say(seconds=seconds, peak_mib=self._peak_mib, graph_breaks=graph_breaks(), **waits)


def graph_breaks() -> int:
    """So far, where anything was compiled."""
    compiler = sys.modules.get("torch._dynamo.utils")
    return 0 if compiler is None else sum(compiler.counters["graph_break"].values())


def main() -> None:
    settings, go = json.loads(sys.argv[1]), Path(sys.argv[2])
    in_turn = InTurn(int(sys.argv[3]), int(sys.argv[4]))
    sys.argv = ["axolotl"]
    if settings.pop("bench", None) == "cut_cross_entropy":
        use_cut_cross_entropy()
    cfg = load_cfg(DictDefault(settings))
    meta = PluginManager.get_instance().load_datasets(cfg, preprocess=False) or load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    while not go.exists():
        time.sleep(0.2)
    trainer = setup_model_and_trainer(cfg, meta)[0]
    trainer.add_callback(in_turn)
    trainer.train()
    in_turn.say(loss=trainer.state.log_history[-1].get("train_loss"))


if __name__ == "__main__":
    main()
