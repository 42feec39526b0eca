"""One run: `axolotl train` of a written config in this process, and what the model is worth afterwards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ ('END' if message['role'] == 'assistant' else '<|im_end|>') + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML without a system message; END is what ends a turn of the assistant."""


def settings(
    model: str, rows: Path, out: Path, arm: Mapping[str, Any], *, lr: float, seed: int, end: str, layers: float
) -> dict[str, Any]:
    """The config of a run: what all arms share, and the keys of an arm. `layers`: the share, from the top, with adapters.

    Every row is trained on once: packing could leave some out, for how many packs there are hangs on their order. Gradients are not
    clipped: Adam does not see the scale of a loss, and clipping would.
    """
    from transformers import AutoConfig

    depth = AutoConfig.from_pretrained(model).num_hidden_layers
    return {
        "base_model": model,
        "plugins": ["dwl_plugin.DWLPlugin", "bench.experiments.half_way.StopsHalfWay"],
        "datasets": [{"path": str(rows), "type": "chat_template"}],
        "chat_template": "jinja",
        "chat_template_jinja": TEMPLATE.replace("END", end),
        "special_tokens": {"eos_token": end, "pad_token": "<|endoftext|>"},
        "dataset_prepared_path": str(out / "prepared"),
        "output_dir": str(out / "run"),
        "val_set_size": 0,
        "adapter": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_linear": True,
        "peft_layers_to_transform": None if layers == 1 else list(range(round((1 - layers) * depth), depth)),
        "sequence_len": 512,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_epochs": 1,
        "optimizer": "adamw_torch",
        "learning_rate": lr,
        "lr_scheduler": "cosine",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": seed,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "dataloader_prefetch_factor": None,
        "dataloader_pin_memory": False,
        "include_tkps": False,
        **arm,
    }


def axolotl_train(config: Mapping[str, Any], dtype: Any) -> tuple[Any, Any, Any]:
    """Trainer, model and tokenizer after `axolotl train`."""
    import axolotl.cli.train as command
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault
    from transformers import set_seed

    kept: list[tuple[Any, Any, Any]] = []
    host_train = command.train

    def train(cfg: Any, dataset_meta: Any) -> Any:
        model, tokenizer, trainer = host_train(cfg=cfg, dataset_meta=dataset_meta)
        kept.append((trainer, model, tokenizer))
        return model, tokenizer, trainer

    set_seed(config["seed"])
    argv, sys.argv = sys.argv, ["axolotl"]
    command.train = train
    try:
        cfg = load_cfg(DictDefault({key: value for key, value in config.items() if value is not None}))
        cfg.torch_dtype = dtype  # Axolotl's `bf16` asks for a GPU
        command.do_train(cfg, TrainerCliArgs())
    finally:
        command.train, sys.argv = host_train, argv
    return kept[0]
