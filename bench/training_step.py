"""One whole training step of SmolLM2-135M in Axolotl, under the losses a user could choose: seconds and peak memory.

    uv run python bench/training_step.py                       # LoRA, 2,048 tokens
    uv run python bench/training_step.py --tokens 4096 --adapter full --rounds 5

Every measurement is a process of its own that trains on the same packed rows with `axolotl`'s own code; the losses take turns
within a round, so a machine that slows down slows them all. Time is the median of the steps after the first; memory is the
process's peak resident set (on CUDA: the peak allocated on the device).
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CLASSES = {"reasoning": {"between": ["<think>", "</think>"]}, "number": {"regex": r"\d+"}}
LOSSES: dict[str, dict[str, Any]] = {
    "stock": {},
    "use_dft": {"use_dft": True},
    "loss: dft": {"loss": "dft"},
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


def child(settings: dict[str, Any]) -> None:
    """Train in this process and print what it cost."""
    import axolotl.train as host
    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.utils.dict import DictDefault
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds: list[float] = []  # noqa: RUF012
        started = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.started)

    build = host.setup_model_and_trainer

    def with_clock(cfg: Any, dataset_meta: Any) -> Any:
        parts = build(cfg, dataset_meta)
        parts[0].add_callback(Clock())
        return parts

    host.setup_model_and_trainer = with_clock
    sys.argv = ["axolotl"]
    if not torch.cuda.is_available():
        settings["bf16"] = False
    do_train(load_cfg(DictDefault(settings)), TrainerCliArgs())
    cuda = torch.cuda.is_available()
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\nBENCH " + json.dumps({"seconds": Clock.seconds[1:], "peak_bytes": peak}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--adapter", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--losses", nargs="*", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(json.loads(options.child))

    from rich.console import Console

    from dwl_plugin.cli.quickstart.model import prepared_model
    from dwl_plugin.cli.quickstart.problems import generate, write_jsonl

    model = prepared_model(Console(stderr=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_jsonl(generate(2000, seed=7), folder / "rows.jsonl")
        found: dict[str, list[dict[str, Any]]] = {loss: [] for loss in options.losses}
        for _ in range(options.rounds):
            for loss in options.losses:
                settings = config(folder, model, loss, options.tokens, options.adapter, options.steps)
                command = [sys.executable, __file__, "--child", json.dumps(settings)]
                run = subprocess.run(command, capture_output=True, text=True, check=False)
                lines = [line for line in run.stdout.splitlines() if line.startswith("BENCH ")]
                if run.returncode or not lines:
                    sys.exit(f"{loss} failed:\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}")
                found[loss].append(json.loads(lines[-1].removeprefix("BENCH ")))
    print(f"\nSmolLM2-135M, {options.adapter}, {options.tokens:,} tokens, {options.rounds} rounds\n")
    print("| loss | seconds per step | against stock | peak memory, MiB | against stock |\n|---|---|---|---|---|")
    seconds = {loss: [statistics.median(run["seconds"]) for run in runs] for loss, runs in found.items()}
    memory = {loss: [run["peak_bytes"] / 2**20 for run in runs] for loss, runs in found.items()}
    first = options.losses[0]
    for loss in options.losses:
        ratio = statistics.median(a / b for a, b in zip(seconds[loss], seconds[first], strict=True))
        bigger = statistics.median(a / b for a, b in zip(memory[loss], memory[first], strict=True))
        print(
            f"| `{loss}` | {statistics.median(seconds[loss]):.2f} | {ratio:.3f}× "
            f"| {statistics.median(memory[loss]):,.0f} | {bigger:.3f}× |"
        )


if __name__ == "__main__":
    main()
