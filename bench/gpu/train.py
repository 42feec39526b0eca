"""A real training by Axolotl under each loss: tokens per second, peak memory, waits for the device.

A random Qwen2 in the shape of the 1.5B one, packed rows, QLoRA (LoRA on a CPU); one process for each loss. They import Axolotl and
read the data at once, touch the device only once their file exists, and then take their steps in turn, so that nothing runs beside
a step. Counted is the median of the steps after the third, and the median of their ratios to the same steps of CCE; of the third
step, the lines that wait for the device.

The first table is sdpa's. Flex attention and `torch_compile` follow while there is time: they compile for a minute or two.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import TIMEOUT_MAX, Thread
from typing import Any

import torch

from bench.gpu.common import CUDA, DEVICE, OUT, TOY, Table

CLASSES = {"number": {"regex": r"\d+"}, "word": {"regex": "[a-z]+"}}
LOSSES: dict[str, dict[str, Any]] = {
    "stock": {},
    "loss: dwl": {"loss": "dwl", "dwl": {"classes": CLASSES, "alpha": {"number": 5, "word": 1, "rest": 2}}},
    "loss: dft": {"loss": "dft"},
    "CCE": {"bench": "cut_cross_entropy"},
    "Liger": {
        "plugins": ["dwl_plugin.DWLPlugin", "axolotl.integrations.liger.LigerPlugin"],
        "liger_fused_linear_cross_entropy": True,
    },
}


@dataclass(frozen=True)
class Group:
    """Losses that train in turn, and fill a table."""

    name: str
    losses: tuple[str, ...]
    settings: dict[str, Any]
    steps: int
    seconds: int
    """What is left must be as much, or it does not begin."""


GROUPS = (
    Group("sdpa", ("loss: dwl",) if TOY else tuple(LOSSES), {}, 5 if TOY else 20, 0),
    Group("flex", ("stock", "loss: dwl", "CCE"), {"attn_implementation": "flex_attention"}, 12, 45),
    Group("compiled", ("stock", "loss: dwl"), {"torch_compile": True}, 12, 90),
)
SHAPE = {
    "num_hidden_layers": 2 if TOY else 28,
    "hidden_size": 128 if TOY else 1536,
    "intermediate_size": 256 if TOY else 8960,
    "vocab_size": 4096 if TOY else 151936,
    "num_attention_heads": 1 if TOY else 12,
    "num_key_value_heads": 1 if TOY else 2,
}
TOKENS = 1024 if TOY else 8192
UNCOUNTED = 3
"""Steps at the beginning, in which kernels are compiled and buffers are made. The last of them is watched for waits."""
IMPORTING = 40.0
"""Seconds that a group has the disk for itself, while other stages run."""
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def conversations(count: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(7)
    for _ in range(count):
        a, b, who = rng.randint(10, 9999), rng.randint(10, 9999), rng.choice(["anna", "bert", "clara", "david", "emma", "felix"])
        sums = [f"{who} has {a + i} apples, then {b * i} more, and that makes {a + i + b * i}." for i in range(rng.randint(4, 40))]
        answer = f"{' '.join(sums)} The answer is {a + b}."
        yield {"messages": [{"role": "user", "content": f"What is {a} and {b}?"}, {"role": "assistant", "content": answer}]}


def write_model(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["messages"][1]["content"] for row in conversations(300)), trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    config = Qwen2Config(
        **SHAPE,
        max_position_embeddings=32768,
        tie_word_embeddings=False,
        bos_token_id=wrapped.pad_token_id,
        eos_token_id=wrapped.eos_token_id,
        pad_token_id=wrapped.pad_token_id,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(DEVICE):
        Qwen2ForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    if CUDA:
        torch.cuda.empty_cache()


def settings(folder: Path, name: str, loss: str, group: Group) -> dict[str, Any]:
    """An Axolotl config, and beside it what `trainee` has to do by itself."""
    return {
        "base_model": str(folder / "model"),
        "plugins": ["dwl_plugin.DWLPlugin"],
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / f"prepared-{name}"),
        "output_dir": str(folder / f"out-{name}"),
        "sequence_len": TOKENS,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_steps": group.steps,
        "num_epochs": 1,
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "save_strategy": "no",
        "logging_steps": 10,
        "val_set_size": 0,
        "seed": 7,
        "dataset_num_proc": 1,
        "dataset_processes": 1,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_pin_memory": False,
        "bf16": CUDA,
        "tf32": False,
        "attn_implementation": "sdpa",
        "adapter": "qlora" if CUDA else "lora",
        "load_in_4bit": CUDA,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        **group.settings,
        **LOSSES[loss],
    }


class Trainee:
    """A process that trains under one loss, a step at a time, and what it said."""

    def __init__(self, loss: str, config: dict[str, Any], go: Path, log: Path) -> None:
        self.loss, self.log, self.ended = loss, log, False
        self.seconds, self.said = list[float](), dict[str, Any]()
        turn, self._turn = os.pipe()
        said, answers = os.pipe()
        command = [sys.executable, "-m", "bench.gpu.trainee", json.dumps(config), str(go), str(turn), str(answers)]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=(turn, answers))
        os.close(turn)
        os.close(answers)
        self._lines = SimpleQueue[str]()
        Thread(target=self._read, args=(said,), daemon=True).start()

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe) as answers:
            for line in answers:
                self._lines.put(line)
        self._lines.put("")

    def listen(self, until: float) -> None:
        """Take in what it says next; end it if that is not before `until`."""
        if self.ended:
            return
        try:
            line = self._lines.get(timeout=min(max(0.0, until - time.monotonic()), TIMEOUT_MAX))
        except Empty:
            self.ended = True
            self.process.kill()
            print(f"\n{self.loss} was out of time after {len(self.seconds)} steps", flush=True)
            return
        if not line:
            self.ended = True
            print(f"\n{self.loss} failed:\n{self.log.read_text()[-1500:]}", flush=True)
            return
        said = json.loads(line)
        if "seconds" in said:
            self.seconds.append(said.pop("seconds"))
        self.said |= said

    def step(self, until: float) -> None:
        if not self.ended:
            with suppress(BrokenPipeError):  # it has died since; what is heard of it says so
                os.write(self._turn, b"go\n")
        self.listen(until)


def train(group: Group, trainees: list[Trainee], until: float) -> None:
    """All steps of a group, and its table. Who fails or is out of time leaves the others what they have."""
    for trainee in trainees:
        trainee.listen(until)  # ready
    for _ in range(group.steps):
        for trainee in trainees:
            trainee.step(until)
    for trainee in trainees:
        trainee.listen(until)  # its end
    base = "CCE" if "CCE" in group.losses else group.losses[0]
    pace = next((trainee.seconds for trainee in trainees if trainee.loss == base), [])
    title = f"Axolotl, Qwen2 {tuple(SHAPE.values())}, {TOKENS} tokens a step, {group.name}"
    columns = ("tokens/s", f"x {base}", "s a step", "peak MiB", "dtype of the head", "mean loss", "waits of a step", "graph breaks")
    table = Table(title, "loss", *columns)
    for trainee in trainees:
        said, counted = trainee.said, trainee.seconds[UNCOUNTED:]
        if counted:
            ratios = [other / own for other, own in zip(pace[UNCOUNTED:], counted, strict=False)]
            speed = (
                TOKENS / statistics.median(counted),
                statistics.median(ratios) if ratios else math.nan,
                statistics.median(counted),
            )
            rest = (
                said["peak_mib"],
                said["head"],
                said.get("loss", math.nan),
                sum(said.get("waits", {}).values()),
                said["graph_breaks"],
            )
            table.add(trainee.loss, *speed, *rest)
    first = Counter(trainees[0].said.get("waits", {}))
    for trainee in trainees:
        more = Counter(trainee.said.get("waits", {})) - (Counter() if trainee is trainees[0] else first)
        if more:
            print(f"{trainee.loss} waits {'' if trainee is trainees[0] else f'more than {trainees[0].loss} '}at {dict(more)}")
        trainee.process.kill()  # it has said all, and its memory is free for the next group
        trainee.process.wait()


def pause_for(seconds: float, go: Path) -> None:
    """No longer than until the device is free."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not go.exists():
        time.sleep(0.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--go", type=Path, required=True, help="the device is free once this file exists")
    parser.add_argument("--until", type=float, default=math.inf, help="when to be done, in seconds of the monotonic clock")
    parser.add_argument(
        "--groups", nargs="*", choices=[group.name for group in GROUPS], help="tables (all; at toy sizes the first)"
    )
    parser.add_argument("--losses", nargs="*", choices=list(LOSSES), default=list(LOSSES))
    options = parser.parse_args()
    wanted = options.groups or [group.name for group in GROUPS[: 1 if TOY else None]]
    groups = [group for group in GROUPS if group.name in wanted]
    with tempfile.TemporaryDirectory(prefix="dwl-gpu-", ignore_cleanup_errors=True) as made:
        folder = Path(made)
        with (folder / "rows.jsonl").open("w") as file:
            most = max(group.steps for group in groups)
            file.writelines(json.dumps(row) + "\n" for row in conversations(60 if TOY else most * TOKENS // 200))
        write_model(folder / "model")
        trainees: dict[str, list[Trainee]] = {}
        for group in groups:
            # The first group begins when the other stages are done, each other when the one before it is.
            go = options.go if group is groups[0] else folder / f"go-{group.name}"
            if group is not groups[0]:
                pause_for(IMPORTING, options.go)
            names = {loss: f"{group.name}-{number}" for number, loss in enumerate(group.losses) if loss in options.losses}
            trainees[group.name] = [
                Trainee(loss, settings(folder, name, loss, group), go, OUT / f"train-{name}.log") for loss, name in names.items()
            ]
        for group in groups:
            if group is not groups[0]:
                if options.until - time.monotonic() < group.seconds:
                    print(f"\n{group.name}: no time left")
                    for trainee in trainees[group.name]:
                        trainee.process.kill()
                    continue
                (folder / f"go-{group.name}").touch()
            train(group, trainees[group.name], options.until)
        return int(any(trainee.ended for each in trainees.values() for trainee in each))


if __name__ == "__main__":
    sys.exit(main())
