"""A tiny model, a tiny dataset, and `axolotl train` in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, set_seed

from dwl_plugin.hosts.versions import release

AXOLOTL = release("axolotl") if find_spec("axolotl") else None

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def import_host() -> None:
    """Import Axolotl once, keep its heap out of the collections that every run asks for, and let it prepare these few rows
    in this process: a pool that imports everything again takes longer than the test."""
    import gc

    import axolotl.core.builders
    import axolotl.train  # noqa: F401
    from datasets import Dataset

    for name in ("save_to_disk", "map", "filter"):
        method = getattr(Dataset, name)

        def alone(*args: Any, _method: Any = method, num_proc: Any = None, **kwargs: Any) -> Any:
            return _method(*args, **kwargs)

        setattr(Dataset, name, alone)
    gc.collect()
    gc.freeze()


def rows(count: int) -> list[dict[str, Any]]:
    """Little sums of different lengths, some without a `<think>` part."""
    out = []
    for i in range(count):
        a, b = 3 * i + 2, 7 * i % 11 + 1
        thought = "" if i % 4 == 3 else f"<think>{a} and {b} make {a + b}, as {'I see ' * (i % 5)}it.</think>\n"
        out.append(
            {
                "messages": [
                    {"role": "user", "content": f"What is {a} + {b}?"},
                    {"role": "assistant", "content": f"{thought}The answer is {a + b}. Café №{i}."},
                ]
            }
        )
    return out


def write_rows(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")
    return path


def tokenized(tokenizer: Any, text: str, targets: int | None = None) -> dict[str, Any]:
    """A row whose last `targets` tokens are trained on, all but the first by default. 0: only the first label, which no token
    predicts, so that the host, which drops rows without labels, keeps it."""
    ids = tokenizer(text)["input_ids"] + [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    first = 1 if targets is None else len(ids) - targets
    labels = [-100] * first + ids[first:]
    if targets == 0:
        labels[0] = ids[0]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def make_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = [message["content"] for row in rows(200) for message in row["messages"]]
    tokenizer.train_from_iterator([*texts, "user assistant system"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[1], eos_token=special[2], pad_token=special[0], unk_token=special[0]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)


def make_model(folder: Path, **changes: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.2,  # spread the logits, so that p is not the same everywhere
        "tie_word_embeddings": True,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)


CPU = {
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "attn_implementation": "sdpa",
    "lora_mlp_kernel": False,
    "lora_qkv_kernel": False,
    "lora_o_kernel": False,
}

CLASSES = {
    "reasoning": {"between": ["<think>", "</think>"]},
    "number": {"regex": r"\d+"},
    "control": {"tokens": ["<|im_end|>"], "token_loss": "nll"},
}


def config(base_model: Path, data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "base_model": str(base_model),
        "plugins": ["dwl_plugin.DWLPlugin"],
        "datasets": [{"path": str(data), "type": "chat_template"}],
        "dataset_prepared_path": str(base_model / "prepared"),
        "output_dir": str(out / "run"),
        "val_set_size": 0,
        "sequence_len": 512,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "max_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_pin_memory": False,
        "include_tkps": False,
        **CPU,
    }
    return {key: value for key, value in {**settings, **changes}.items() if value is not None}


stock = pytest.mark.skipif(
    find_spec("trl") is not None and release("trl") == (1, 15) and not torch.cuda.is_available(),
    reason="TRL 1.15's own loss needs a GPU",
)
"""On a test that runs TRL's own loss."""

Build = Callable[..., Any]
"""Of a trainer: `trainer_of` and `sft_of`."""

ARGUMENTS: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 10,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1e9,
    "logging_steps": 1,
    "save_strategy": "no",
    "seed": 7,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}
"""What `TrainingArguments` and `SFTConfig` take."""


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Batches:
    """What each optimizer step was fed."""

    def __init__(self, trainer: Any) -> None:
        self.fed: list[dict[str, torch.Tensor]] = []
        inner = trainer.get_batch_samples

        def get_batch_samples(*args: Any) -> Any:
            out = inner(*args)
            self.fed += out[0]
            return out

        trainer.get_batch_samples = get_batch_samples


class Recorder(TrainerCallback):
    """Gradients of every optimizer step, before it is taken."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.gradients.append(
            {
                name: parameter.grad.detach().double().clone()
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        )


class Run:
    """What a finished run left behind."""

    def __init__(self, trainer: Any, recorder: Recorder) -> None:
        self.trainer, self.gradients = trainer, recorder.gradients

    @property
    def history(self) -> list[dict[str, float]]:
        return list(self.trainer.state.log_history)

    def logged(self, key: str) -> list[float]:
        return [entry[key] for entry in self.history if key in entry]


def train(settings: dict[str, Any], before: Callable[[Any], None] | None = None, options: dict[str, Any] | None = None) -> Run:
    """`axolotl train`, in process, through the host's own `load_cfg` and `do_train`; `options` are its command line's."""
    import axolotl.cli.train as command
    import axolotl.train as host
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.train import setup_model_and_trainer, train as host_train
    from axolotl.utils.dict import DictDefault

    recorder, built = Recorder(), []

    def with_recorder(cfg: Any, dataset_meta: Any) -> Any:
        parts = setup_model_and_trainer(cfg, dataset_meta)
        built.append(parts[0])
        parts[0].add_callback(recorder)
        if before is not None:
            before(parts[0])
        return parts

    set_seed(settings.get("seed", 0))  # Axolotl 0.19 draws an adapter's weights before it seeds
    argv, sys.argv = sys.argv, ["axolotl"]
    host.setup_model_and_trainer, command.train = with_recorder, host_train
    try:
        cfg = load_cfg(DictDefault(settings), **(options or {}))
        if cfg.world_size > 1:
            cfg.device_map = {"": "cpu"}  # the host takes each rank for a GPU
        command.do_train(cfg, TrainerCliArgs())
    finally:
        host.setup_model_and_trainer, sys.argv = setup_model_and_trainer, argv
        del command.train
    return Run(built[0], recorder)
