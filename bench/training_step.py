"""One whole training step in Axolotl, under the losses a user could choose: seconds and peak memory.

    uv run python bench/training_step.py                       # SmolLM2-135M, LoRA, 2,048 tokens
    uv run python bench/training_step.py --tokens 4096 --adapter full
    uv run --group bench python bench/training_step.py --random 32,4096,14336,151936 --tokens 8192 --adapter qlora \\
        --losses "loss: dwl" "cut cross entropy" "liger fused"                       # 8B-shaped, for a GPU

Axolotl's own trainers on the same packed rows, a process for each loss. Time: one optimizer step in turn, so a machine that slows
down slows them all; the median of the steps' ratios after the first step. Memory: the peak resident set of the process (on CUDA:
the peak allocated on the device, the first step not counted either).
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
import time
from pathlib import Path
from typing import Any

CLASSES = {"reasoning": {"between": ["<think>", "</think>"]}, "number": {"regex": r"\d+"}}
LOSSES: dict[str, dict[str, Any]] = {
    "stock": {},
    "use_dft": {"use_dft": True},
    "loss: dft": {"loss": "dft"},
    "loss: dft, anchor": {"loss": "dft", "dft": {"anchor": 0.05}},  # with an adapter
    "cut cross entropy": {"bench": "cut_cross_entropy"},  # both count every token the same
    "liger fused": {
        "plugins": ["dwl_plugin.DWLPlugin", "axolotl.integrations.liger.LigerPlugin"],
        "liger_fused_linear_cross_entropy": True,
    },
    "loss: dwl": {"loss": "dwl", "dwl": {"classes": CLASSES, "alpha": {"reasoning": 1, "number": 5, "rest": 2}}},
}
USUAL = ("stock", "use_dft", "loss: dft", "loss: dwl")


def config(folder: Path, model: Path, loss: str, tokens: int, adapter: str, steps: int) -> dict[str, Any]:
    lora = {"lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
    adapters = {"lora": {"adapter": "lora", **lora}, "qlora": {"adapter": "qlora", "load_in_4bit": True, **lora}, "full": {}}
    return {
        "base_model": str(model),
        "plugins": ["dwl_plugin.DWLPlugin"],
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / "prepared"),
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


def child(settings: dict[str, Any], pipes: tuple[int, int]) -> None:
    """Train with Axolotl's own trainer; before each step wait for a line, after it say what it took."""
    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import setup_model_and_trainer
    from axolotl.utils.dict import DictDefault
    from transformers import TrainerCallback

    sys.argv = ["axolotl"]
    cuda = torch.cuda.is_available()
    turn, said = os.fdopen(pipes[0]), os.fdopen(pipes[1], "w")

    def say(what: Any) -> None:
        print(json.dumps(what), file=said, flush=True)

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            say("ready")

        peak = 0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.readline()
            if cuda:  # Axolotl resets it with every line that it logs
                torch.cuda.reset_peak_memory_stats()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            say(time.perf_counter() - self.started)
            if cuda and state.global_step > 1:  # the first step compiles
                self.peak = max(self.peak, torch.cuda.max_memory_allocated())

    if settings.pop("bench", None):
        cut_cross_entropy()
    cfg = load_cfg(DictDefault(settings if cuda else {**settings, "bf16": False}))
    meta = plugin_datasets(cfg) or load_datasets(cfg=cfg, cli_args=TrainerCliArgs())
    trainer = setup_model_and_trainer(cfg, meta)[0]
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    say(clock.peak if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def cut_cross_entropy() -> None:
    """Llama with Apple's loss, as its authors' patches have it; Axolotl's plugin wants a fork that is on no package index."""
    import torch
    from cut_cross_entropy import linear_cross_entropy
    from transformers import LlamaForCausalLM
    from transformers.modeling_outputs import CausalLMOutputWithPast

    def forward(self: Any, input_ids: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any) -> Any:
        hidden = self.model(input_ids=input_ids, **inputs).last_hidden_state
        impl = "cce" if torch.cuda.is_available() else "torch_compile"
        total = linear_cross_entropy(hidden, self.lm_head.weight, labels, shift=True, reduction="sum", impl=impl)
        return CausalLMOutputWithPast(loss=total / num_items_in_batch)

    LlamaForCausalLM.forward = forward


def plugin_datasets(cfg: Any) -> Any:
    """What `axolotl train` asks its plugins for before it loads the data itself."""
    from axolotl.integrations.base import PluginManager

    return PluginManager.get_instance().load_datasets(cfg, preprocess=False)


class Contestant:
    """A process that trains under one loss and takes a step when told to."""

    def __init__(self, loss: str, settings: dict[str, Any], log: Path) -> None:
        self.loss, self.log = loss, log
        turn, self._turn = os.pipe()
        self._said, said = os.pipe()
        command = [sys.executable, __file__, "--child", json.dumps(settings), "--pipes", f"{turn},{said}"]
        with log.open("w") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, pass_fds=(turn, said))
        os.close(turn)
        os.close(said)
        self.answers = os.fdopen(self._said)

    def answer(self) -> Any:
        line = self.answers.readline()
        if not line:
            sys.exit(f"{self.loss} failed:\n{self.log.read_text()[-5000:]}")
        return json.loads(line)

    def step(self) -> float:
        os.write(self._turn, b"go\n")
        return float(self.answer())


def random_model(shape: str, tokenizer: Path, folder: Path) -> Path:
    """A Llama of "layers,hidden,intermediate,vocabulary" with random bf16 weights."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    layers, hidden, intermediate, vocab = (int(part) for part in shape.split(","))
    heads = max(1, hidden // 128)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=32768,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            LlamaForCausalLM(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--adapter", choices=["lora", "qlora", "full"], default="lora")
    parser.add_argument("--steps", type=int, default=6, help="steps of each loss; the first one is not counted")
    parser.add_argument("--losses", nargs="*", default=list(USUAL), choices=list(LOSSES))
    parser.add_argument("--random", help="layers,hidden,intermediate,vocabulary of a random Llama instead of SmolLM2")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--pipes", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        turn, said = (int(part) for part in options.pipes.split(","))
        return child(json.loads(options.child), (turn, said))

    from rich.console import Console

    from dwl_plugin.cli.quickstart.model import prepared_model
    from dwl_plugin.cli.quickstart.problems import generate, write_jsonl

    model = prepared_model(Console(stderr=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.random:
            model = random_model(options.random, model, folder / "model")
        write_jsonl(generate(options.steps * options.tokens // 40, seed=7), folder / "rows.jsonl")
        contestants = []
        for number, loss in enumerate(options.losses):
            settings = config(folder, model, loss, options.tokens, options.adapter, options.steps)
            settings["output_dir"] = str(folder / f"out {number}")
            contestants.append(Contestant(loss, settings, folder / f"{number}.log"))
            contestants[-1].answer()  # ready; one after the other, since loading takes memory of its own
        seconds: dict[str, list[float]] = {loss: [] for loss in options.losses}
        for _ in range(options.steps):
            for contestant in contestants:
                seconds[contestant.loss].append(contestant.step())
        memory = {contestant.loss: contestant.answer() / 2**20 for contestant in contestants}
    first = options.losses[0]
    name = f"random Llama {options.random}" if options.random else "SmolLM2-135M"
    print(f"\n{name}, {options.adapter}, {options.tokens:,} tokens, {options.steps - 1} steps of each\n")
    print(f"| loss | seconds per step | against {first} | peak memory, MiB | against {first} |\n|---|---:|---:|---:|---:|")
    for loss in options.losses:
        counted = seconds[loss][1:]
        ratio = statistics.median(a / b for a, b in zip(counted, seconds[first][1:], strict=True))
        cells = (
            f"{statistics.median(counted):.2f}",
            f"{ratio:.3f}×",
            f"{memory[loss]:,.0f}",
            f"{memory[loss] / memory[first]:.3f}×",
        )
        print(f"| `{loss}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
