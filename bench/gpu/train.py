"""A real training by Axolotl under each loss: tokens per second, peak memory, waits for the device.

A random Qwen2 in the shape of the 1.5B one, packed rows, QLoRA (LoRA on a CPU); one process for each loss. They import Axolotl and
read the data at once, touch the device only once the file named by --go exists, and then take their steps in turn, so that nothing
runs beside a step. Counted is the median of the steps after the third; of the last step, the lines that wait for the device.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from bench.gpu.common import CUDA, DEVICE, OUT, TOY, Table

CLASSES = {"number": {"regex": r"\d+"}, "word": {"regex": "[a-z]+"}}
LOSSES: dict[str, dict[str, Any]] = {
    "stock": {},
    "loss: dwl": {"loss": "dwl", "dwl": {"classes": CLASSES, "alpha": {"number": 5, "word": 1, "rest": 2}}},
    "CCE": {"bench": "cut_cross_entropy"},
    "Liger": {
        "plugins": ["dwl_plugin.DWLPlugin", "axolotl.integrations.liger.LigerPlugin"],
        "liger_fused_linear_cross_entropy": True,
    },
}
SHAPE = {
    "num_hidden_layers": 2 if TOY else 28,
    "hidden_size": 128 if TOY else 1536,
    "intermediate_size": 256 if TOY else 8960,
    "vocab_size": 4096 if TOY else 151936,
    "num_attention_heads": 1 if TOY else 12,
    "num_key_value_heads": 1 if TOY else 2,
}
TOKENS, STEPS = (1024, 5) if TOY else (8192, 20)
UNCOUNTED = 3
"""Steps at the beginning, in which kernels are compiled and buffers are made."""
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


def settings(folder: Path, number: int, loss: str) -> dict[str, Any]:
    """An Axolotl config, and beside it what `trainee` has to do by itself."""
    return {
        "base_model": str(folder / "model"),
        "plugins": ["dwl_plugin.DWLPlugin"],
        "datasets": [{"path": str(folder / "rows.jsonl"), "type": "chat_template"}],
        "dataset_prepared_path": str(folder / f"prepared{number}"),
        "output_dir": str(folder / f"out{number}"),
        "sequence_len": TOKENS,
        "sample_packing": True,
        "pad_to_sequence_len": True,
        "micro_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": True,
        "max_steps": STEPS,
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
        **LOSSES[loss],
    }


class Trainee:
    """A process that trains under one loss, a step at a time."""

    def __init__(self, loss: str, config: dict[str, Any], go: Path, log: Path) -> None:
        self.loss, self.log, self.ended = loss, log, False
        turn, self._turn = os.pipe()
        said, answers = os.pipe()
        command = [sys.executable, "-m", "bench.gpu.trainee", json.dumps(config), str(go), str(turn), str(answers)]
        with log.open("w") as file:
            subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, pass_fds=(turn, answers))
        os.close(turn)
        os.close(answers)
        self._answers = os.fdopen(said)

    def answer(self) -> Any:
        """What it says next; None once it has died."""
        line = "" if self.ended else self._answers.readline()
        if line:
            return json.loads(line)
        if not self.ended:
            self.ended = True
            print(f"\n{self.loss} failed:\n{self.log.read_text()[-1500:]}", flush=True)
        return None

    def step(self) -> Any:
        if not self.ended:
            with suppress(BrokenPipeError):  # it has died since; its answer says so
                os.write(self._turn, b"go\n")
        return self.answer()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--go", type=Path, required=True, help="the device is free once this file exists")
    parser.add_argument("--losses", nargs="*", choices=list(LOSSES), default=["loss: dwl"] if TOY else list(LOSSES))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dwl-gpu-") as made:
        folder = Path(made)
        with (folder / "rows.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in conversations(60 if TOY else STEPS * TOKENS // 200))
        write_model(folder / "model")
        trainees = [
            Trainee(loss, settings(folder, number, loss), options.go, OUT / f"train-{number}.log")
            for number, loss in enumerate(options.losses)
        ]
        for trainee in trainees:
            trainee.answer()  # ready
        seconds: dict[str, list[float]] = {loss: [] for loss in options.losses}
        waits: dict[str, dict[str, int]] = {}
        for _ in range(STEPS):
            for trainee in trainees:
                step = trainee.step()
                if step is not None:
                    seconds[trainee.loss].append(step["seconds"])
                    waits[trainee.loss] = step["waits"]
        columns = ("tokens/s", "s a step", "peak MiB", "dtype of the head", "mean loss", "waits of a step")
        table = Table(f"Axolotl, Qwen2 {tuple(SHAPE.values())}, {TOKENS} tokens a step", "loss", *columns)
        for trainee in trainees:
            end, counted = trainee.answer(), seconds[trainee.loss][UNCOUNTED:-1]
            if end is not None and counted:
                step_s = statistics.median(counted)
                head = (end["peak_mib"], end["head"], end["loss"])
                table.add(trainee.loss, TOKENS / step_s, step_s, *head, sum(waits[trainee.loss].values()))
        for loss, places in waits.items():
            if places:
                print(f"{loss} waits at {places}")
        return int(any(trainee.ended for trainee in trainees))


if __name__ == "__main__":
    sys.exit(main())
