"""Classes find their tokens whatever made the batch: dataset types, packing, padding, streams, loader workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwl_plugin.classes import labeller_of
from dwl_plugin.config import parse
from dwl_plugin.hosts.collate import CLASS_IDS, LabellingCollator
from tests.hosts.harness import rows, train

Configure = Callable[..., dict[str, Any]]
CLASSES = {"number": {"regex": r"\d+"}, "control": {"tokens": ["<|im_end|>"], "allow_empty": True}}


def write(path: Path, samples: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return str(path)


def pairs() -> list[tuple[str, str]]:
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows(24)]


def alpaca(folder: Path, _: Path) -> dict[str, Any]:
    path = write(folder / "alpaca.jsonl", [{"instruction": q, "input": "", "output": a} for q, a in pairs()])
    return {"datasets": [{"path": path, "type": "alpaca"}]}


def completion(folder: Path, _: Path) -> dict[str, Any]:
    path = write(folder / "completion.jsonl", [{"text": f"{q} {a}"} for q, a in pairs()])
    return {"datasets": [{"path": path, "type": "completion"}]}


def input_output(folder: Path, _: Path) -> dict[str, Any]:
    segments = [{"segments": [{"label": False, "text": q}, {"label": True, "text": a}]} for q, a in pairs()]
    return {"datasets": [{"path": write(folder / "io.jsonl", segments), "type": "input_output"}]}


def tokenized(folder: Path, model: Path) -> dict[str, Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    samples = []
    for q, a in pairs():
        prompt, answer = tokenizer(q)["input_ids"], tokenizer(a)["input_ids"] + [2]
        ids = prompt + answer
        labels = [-100] * len(prompt) + answer
        samples.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return {"datasets": [{"path": write(folder / "ids.jsonl", samples), "ds_type": "json", "type": None}]}


def stream(folder: Path, _: Path) -> dict[str, Any]:
    path = write(folder / "stream.jsonl", rows(24))
    return {"streaming": True, "datasets": [{"path": path, "ds_type": "json", "type": "chat_template"}]}


def pretraining(folder: Path, _: Path) -> dict[str, Any]:
    path = write(folder / "pre.jsonl", [{"text": f"{q} {a}"} for q, a in pairs()])
    source = {"path": "json", "data_files": [path], "type": "pretrain", "text_column": "text"}
    return {"datasets": None, "pretraining_dataset": [source], "streaming": True}


KINDS = {kind.__name__: kind for kind in (alpaca, completion, input_output, tokenized, stream, pretraining)}
WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded to length": {"pad_to_sequence_len": True, "sequence_len": 256},
    "packed": {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 1},
    "inputs too": {"train_on_inputs": True},
    "workers": {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 2},
}


def run_both(configure: Configure, **settings: Any) -> None:
    ours = train(configure(loss="nll", dwl={"classes": CLASSES}, max_steps=2, **settings))
    stock = train(configure(max_steps=2, **settings))
    assert ours.logged("loss") == pytest.approx(stock.logged("loss"), abs=1e-5)
    assert ours.logged("nll") == pytest.approx(ours.logged("loss"), abs=1e-5)
    shares = ours.logged("dwl/token_share/number")
    assert len(shares) == 2
    assert all(0.03 < share < 0.4 for share in shares)


@pytest.mark.parametrize("kind", KINDS)
def test_every_dataset_type_is_classified_and_keeps_its_loss(
    configure: Configure, tmp_path: Path, model_folder: Path, kind: str
) -> None:
    run_both(configure, **KINDS[kind](tmp_path, model_folder))


@pytest.mark.parametrize("way", WAYS)
def test_every_layout_is_classified_and_keeps_its_loss(configure: Configure, way: str) -> None:
    run_both(configure, **WAYS[way])


def test_packed_pretraining_stream(configure: Configure, tmp_path: Path, model_folder: Path) -> None:
    settings = pretraining(tmp_path, model_folder)
    run_both(configure, **settings, sample_packing=True, sequence_len=128, micro_batch_size=1)


def test_batches_of_batch_flattening_carry_class_ids(model_folder: Path) -> None:
    """`batch_flattening: true`, whose attention needs a GPU: its collator puts the rows of a batch into one."""
    from transformers import AutoTokenizer, DataCollatorWithFlattening

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    block = parse({"loss": "nll", "dwl": {"classes": {"number": {"regex": r"\d+"}}}})
    assert block is not None
    labeller = labeller_of(block, tokenizer)
    assert labeller is not None
    ids = [tokenizer(text)["input_ids"] for text in ("7 and a word", "one 12")]
    rows = [{"input_ids": row, "labels": list(row)} for row in ids]
    batch = LabellingCollator(DataCollatorWithFlattening(return_tensors="pt"), labeller, packed=True)(rows)
    numbers = [any(letter.isdigit() for letter in tokenizer.decode([token])) for row in ids for token in row]
    labels = batch["labels"][0].tolist()
    expected = [-100 if label == -100 else int(not number) for label, number in zip(labels, numbers, strict=True)]
    assert {0, 1, -100} == set(expected)
    assert [at % 2**62 if at >= 0 else at for at in batch[CLASS_IDS][0].tolist()] == expected
