"""One whole training step of SmolLM2-135M in Axolotl, under the losses a user could choose: seconds and peak memory.

    uv run python bench/training_step.py                       # LoRA, 2,048 tokens
    uv run python bench/training_step.py --tokens 4096 --adapter full

Axolotl's own trainers on the same packed rows. Time: all of them in one process, one optimizer step in turn, so a machine that
slows down slows them all; the median of the steps' ratios after the first step. Memory: a process of its own for each, its peak
resident set (on CUDA: the peak allocated on the device).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

CLASSES = {"reasoning": {"between": ["<think>", "</think>"]}, "number": {"regex": r"\d+"}}
LOSSES: dict[str, dict[str, Any]] = {
    "stock": {},
    "use_dft": {"use_dft": True},
    "loss: dft": {"loss": "dft"},
    "loss: dft, anchor": {"loss": "dft", "dft": {"anchor": 0.05}},  # with an adapter
    "loss: dwl": {"loss": "dwl", "dwl": {"classes": CLASSES, "alpha": {"reasoning": 1, "number": 5, "rest": 2}}},
}


def config(folder: Path, model: Path, loss: str, tokens: int, adapter: str, steps: int) -> dict[str, Any]:
    lora = {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
    adapters = {
        "lora": {"adapter": "lora", **lora},
        "qlora": {"adapter": "qlora", "load_in_4bit": True, **lora},
        "full": {},
    }
    return {
        "base_model": str(model),
        "plugins": ["dwl_plugin.DWLPlugin"],
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "sequence_len": tokens,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_steps": steps,
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "save_strategy": "no",
        "logging_steps": 1,
        "val_set_size": 0,
        "seed": 7,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_pin_memory": False,
        "bf16": "auto",
        "tf32": False,
        "attn_implementation": "sdpa",
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        **adapters[adapter],
        **LOSSES[loss],
    }


class Turns:
    """Trainers in threads of one process, one optimizer step at a time: whatever slows the machine slows them all."""

    def __init__(self, names: list[str], steps: int) -> None:
        self.order = [name for _ in range(steps) for name in names]
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.changed = threading.Condition()

    def wait(self, name: str) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.order or self.order[0] == name)
        self.started = time.perf_counter()

    def done(self, name: str) -> None:
        self.seconds[name].append(time.perf_counter() - self.started)
        with self.changed:
            self.order.pop(0)
            self.changed.notify_all()


def clock(turns: Turns, name: str) -> Any:
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.wait(name)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            turns.done(name)

    return Clock()


def child(every: dict[str, dict[str, Any]], steps: int) -> None:
    """Train each config with Axolotl's own trainer, in turns, and print what the steps cost."""
    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault

    sys.argv = ["axolotl"]
    cuda = torch.cuda.is_available()
    configs = {
        name: load_cfg(DictDefault(settings if cuda else {**settings, "bf16": False}))
        for name, settings in every.items()
    }
    turns = Turns(list(every), steps)
    threads = []
    for name, cfg in configs.items():
        meta = plugin_datasets(cfg) or load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
        trainer = setup_model_and_trainer(cfg, meta)[0]
        trainer.add_callback(clock(turns, name))
        threads.append(threading.Thread(target=train, args=(trainer,), name=name))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\nBENCH " + json.dumps({"seconds": turns.seconds, "peak_bytes": peak}), flush=True)


def train(trainer: Any) -> None:
    try:
        trainer.train()
    except BaseException:  # the others would wait for their turn for ever
        traceback.print_exc()
        os._exit(1)


def plugin_datasets(cfg: Any) -> Any:
    """What `axolotl train` asks its plugins for before it loads the data itself."""
    from axolotl.integrations.base import PluginManager

    return PluginManager.get_instance().load_datasets(cfg, preprocess=False)


def run_child(configs: dict[str, dict[str, Any]], steps: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", json.dumps(configs), "--steps", str(steps)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line for line in run.stdout.splitlines() if line.startswith("BENCH ")]
    if run.returncode or not lines:
        sys.exit(f"{', '.join(configs)} failed:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("BENCH "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--adapter", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--steps", type=int, default=6, help="steps of each loss; the first one is not counted")
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--no-memory", action="store_true", help="only the times")
    parser.add_argument("--no-time", action="store_true", help="only the memory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(json.loads(options.child), options.steps)

    from rich.console import Console

    from dwl_plugin.cli.quickstart.model import prepared_model
    from dwl_plugin.cli.quickstart.problems import generate, write_jsonl

    model = prepared_model(Console(stderr=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(generate(2000, seed=7), folder / "rows.jsonl")
        configs = {
            loss: config(folder, model, loss, options.tokens, options.adapter, options.steps) for loss in options.losses
        }
        seconds = {} if options.no_time else run_child(configs, options.steps)["seconds"]
        memory = {}
        for loss, settings in configs.items() if not options.no_memory else ():
            memory[loss] = run_child({loss: {**settings, "max_steps": 2}}, 2)["peak_bytes"] / 2**20
    first = options.losses[0]
    print(f"\nSmolLM2-135M, {options.adapter}, {options.tokens:,} tokens, {options.steps - 1} steps of each\n")
    print("| loss | seconds per step | against stock | peak memory, MiB | against stock |\n|---|---:|---:|---:|---:|")
    for loss in options.losses:
        cells = ["–"] * 4
        if seconds:
            counted = seconds[loss][1:]
            ratio = statistics.median(a / b for a, b in zip(counted, seconds[first][1:], strict=True))
            cells[:2] = [f"{statistics.median(counted):.2f}", f"{ratio:.3f}×"]
        if memory:
            cells[2:] = [f"{memory[loss]:,.0f}", f"{memory[loss] / memory[first]:.3f}×"]
        print(f"| `{loss}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
