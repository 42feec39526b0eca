"""Classes find their tokens whatever made the batch: dataset types, packing, padding, streams, loader workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dwl_plugin.config import parse
from dwl_plugin.run.collate import CLASS_IDS, LabellingCollator
from dwl_plugin.run.dataset_check import labeller_of
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


COUNTED = {"start": {"position": {"first": 1}, "allow_empty": True}, **CLASSES}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("stream", "pretraining")])
@pytest.mark.parametrize("overlap", ["first", "sum"])
def test_the_opening_counts_what_the_run_trains(
    configure: Configure, tmp_path: Path, model_folder: Path, kind: str, overlap: str
) -> None:
    """One epoch, logged at its end, beside the survey of the same 24 rows."""
    found: list[Any] = []
    dwl = {"classes": COUNTED, "overlap": overlap}
    once = {"max_steps": 12, "logging_steps": 12}
    settings = KINDS[kind](tmp_path, model_folder)
    run = train(configure(loss="dwl", dwl=dwl, **once, **settings), before=lambda trainer: found.append(trainer._dwl.survey))
    assert found[0].rows == 24
    for name, tokens in zip(found[0].names, found[0].tokens, strict=True):
        assert run.logged(f"dwl/token_share/{name}") == pytest.approx([tokens / found[0].targets], abs=1e-12)
    assert (found[0].tokens[0] == 0) == (kind == "completion")


def test_in_packed_rows_the_opening_counts_the_first_labels_that_are_trained(configure: Configure, tmp_path: Path) -> None:
    """Axolotl trains the first label of a sample that stands behind another."""
    found: list[Any] = []
    settings = {**completion(tmp_path, tmp_path), **WAYS["packed"], "num_epochs": 1, "max_steps": None}
    run = train(
        configure(loss="dwl", dwl={"classes": COUNTED}, logging_steps=1, **settings),
        before=lambda trainer: found.append(trainer._dwl.survey),
    )
    (classes,) = found
    rows = classes.rows - classes.tokens[0]
    assert classes.unpredicted[0] == rows
    assert 1 < rows < 12
    logged = run.logged("dwl/token_share/start")
    assert sum(logged) / len(logged) == pytest.approx(classes.tokens[0] / classes.targets, rel=0.25)
    assert max(logged) > 0


def test_packed_pretraining_stream(configure: Configure, tmp_path: Path, model_folder: Path) -> None:
    settings = pretraining(tmp_path, model_folder)
    run_both(configure, **settings, sample_packing=True, sequence_len=128, micro_batch_size=1)


def segments() -> list[list[tuple[bool, str]]]:
    """Samples as (trained on, text), which end in digits and begin with others: nothing but its place tells where one ends."""
    samples = []
    for i in range(24):
        a, b = 111 + 37 * i, 5 * i + 2
        asked, said = (False, f"What is {a} + {b}? "), (True, f"{a} and {b} make {'I see ' * (i % 5)}{a + b}")
        samples.append([[said], [asked, said], [asked, said, asked, said]][i % 3])
    return samples


def raw(folder: Path, layout: str) -> dict[str, Any]:
    """The samples as data of the host, with no template around them."""
    if "pretraining" in layout:
        path = write(folder / "pre.jsonl", [{"text": "".join(text for _, text in sample)} for sample in segments()])
        source = {"path": "json", "data_files": [path], "type": "pretrain", "text_column": "text"}
        return {"datasets": None, "pretraining_dataset": [source], "streaming": True}
    samples = [{"segments": [{"label": label, "text": text} for label, text in sample]} for sample in segments()]
    path = write(folder / "io.jsonl", samples)
    place = {"path": "json", "data_files": [path]} if layout == "packed stream" else {"path": path, "ds_type": "json"}
    return {"datasets": [{**place, "type": "input_output"}]}


OF_CONTEXT = {"start": {"position": {"first": 1}}, "edge": {"regex": r"\A\d+|\d+\Z"}, "second": {"turn": 2}}
PACKED = {"sample_packing": True, "sequence_len": 128}
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {},
    "padded to length": {"pad_to_sequence_len": True, "sequence_len": 128},
    "packed": PACKED,
    "cut": {"sequence_len": 34, "excess_length_strategy": "truncate"},
    "stream": {"streaming": True},
    "packed stream": {"streaming": True, **PACKED, "micro_batch_size": 1},
    "pretraining": {"sequence_len": 128},
    "packed pretraining": {**PACKED, "micro_batch_size": 1},
}


def samples_alone(model: Path, layout: str) -> dict[tuple[int, ...], list[int]]:
    """Token ids of each sample as the host is to make them, and the class ids it has by itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    block = parse({"loss": "nll", "dwl": {"classes": OF_CONTEXT}})
    assert block is not None
    labeller = labeller_of(block, tokenizer)
    assert labeller is not None
    length = LAYOUTS[layout].get("sequence_len")
    alone = {}
    for sample in segments():
        if "pretraining" in layout:
            ids = tokenizer("".join(text for _, text in sample))["input_ids"]
            ids += [tokenizer.eos_token_id] * ("packed" in layout)
            labels = ids
        else:
            pieces = [(label, tokenizer(text)["input_ids"]) for label, text in sample]
            ids = [token for _, piece in pieces for token in piece]
            labels = [token if label else -100 for label, piece in pieces for token in piece]
        alone[tuple(ids[:length])] = labeller(ids[:length], labels[:length]).tolist()
    found = {index for class_ids in alone.values() for index in class_ids}
    assert found == ({0, 1, 3} if "pretraining" in layout else {0, 1, 2, 3, -100})
    return alone


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sample_has_the_class_ids_that_it_has_alone(
    configure: Configure, tmp_path: Path, model_folder: Path, layout: str
) -> None:
    settings = raw(tmp_path, layout) | LAYOUTS[layout]
    loaders: list[Any] = []

    def keep_loader(trainer: Any) -> None:
        make = trainer.get_train_dataloader

        def kept() -> Any:
            loaders.append(make())
            return loaders[-1]

        trainer.get_train_dataloader = kept

    train(configure(loss="nll", dwl={"classes": OF_CONTEXT}, max_steps=1, **settings), before=keep_loader)
    alone = samples_alone(model_folder, layout)
    seen, in_row = [], []
    for batch in loaders[0]:
        for ids, class_ids in zip(batch["input_ids"].tolist(), batch[CLASS_IDS].tolist(), strict=True):
            at, before = 0, len(seen)
            while sample := next((known for known in alone if tuple(ids[at : at + len(known)]) == known), None):
                assert class_ids[at : at + len(sample)] == alone[sample]
                seen.append(sample)
                at += len(sample)
            assert set(class_ids[at:]) <= {-100}
            in_row.append(len(seen) - before)
    if "packed" in layout:  # the host drops the last batch
        assert len(set(seen)) == len(seen) > 12
        assert max(in_row) > 1
    else:
        assert sorted(seen) == sorted(alone)


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


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean_token_sum", "sample_mean"])
def test_a_row_that_is_full_keeps_its_class_ids(model_folder: Path, reduction: str) -> None:
    """Axolotl's collator takes one that it has nothing to pad with through float64."""
    from axolotl.utils.collators import V2BatchSamplerDataCollatorForSeq2Seq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    block = parse({"loss": "dwl", "dwl": {"classes": CLASSES, "reduction": reduction}})
    assert block is not None
    labeller = labeller_of(block, tokenizer)
    assert labeller is not None
    ids = tokenizer("7 and a word, 12 make 19")["input_ids"]
    sample = {"input_ids": ids, "labels": list(ids), "attention_mask": [1] * len(ids)}
    collate = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, return_tensors="pt", pad_to_multiple_of=2 * len(ids))
    batch = LabellingCollator(collate, labeller, packed=True)([[sample, sample]])
    assert batch[CLASS_IDS].tolist() == [labeller(ids, ids).tolist() * 2]
