"""The real model: SmolLM2-135M-Instruct, trained in full, with LoRA and with QLoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.hosts.harness import config, train

pytestmark = pytest.mark.slow

LORA = {"lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"adapter": "lora", **LORA},
    "qlora": {"adapter": "qlora", "load_in_4bit": True, **LORA},
}
CLASSES = {
    "reasoning": {"between": ["<think>", "</think>"]},
    "number": {"regex": r"\d+"},
    "end_of_turn": {"tokens": ["<|im_end|>"]},
}


@pytest.mark.parametrize("way", WAYS)
def test_steps_on_the_real_model(way: str, data_file: Path, tmp_path: Path) -> None:
    from dwl_plugin.cli.quickstart.model import prepared_model

    count = 6 if way == "full" else 10  # a step in full takes over 1 GB more than the one before on a CPU, without us as well
    dwl = {"classes": CLASSES, "reduction": "class_mean", "alpha": {"reasoning": 1, "number": 2, "end_of_turn": 1, "rest": 1}}
    settings = config(
        prepared_model(Console(stderr=True)),
        data_file,
        tmp_path,
        **WAYS[way],
        loss="dwl",
        dwl=dwl,
        max_steps=count,
        num_epochs=2,
        sample_packing=True,
        sequence_len=256,
        micro_batch_size=1,
        learning_rate=1e-5 if way == "full" else 1e-3,
        gradient_checkpointing=True,
        save_strategy="steps",
        save_steps=count,
        dataset_prepared_path=str(tmp_path / "prepared"),
    )
    run = train(settings)
    state = json.loads((tmp_path / "run" / f"checkpoint-{count}" / "trainer_state.json").read_text())
    steps = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(steps) == count
    for name in (*CLASSES, "rest"):
        assert all(f"dwl/nll/{name}" in entry and f"dwl/p/{name}" in entry for entry in steps)
    assert sum(entry["nll"] for entry in steps[-3:]) < sum(entry["nll"] for entry in steps[:3])
    assert run.logged("nll") == [entry["nll"] for entry in steps]
