"""A class by regex is the same for a sample alone, packed, padded, truncated and streamed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dwl_plugin.classes import Labeller, build_labeller
from dwl_plugin.classes.data_codes import factors_of
from dwl_plugin.config import ClassConfig
from dwl_plugin.config.classes import RegexClass
from dwl_plugin.run.collate import CLASS_IDS, LabellingCollator
from tests.classes.little_tokenizers import byte_level, encode

TEXTS = [("what is 7 and 8?", " 15 apples"), ("", "1,234 are 🍉 42"), ("100", ""), ("a", "hello 300")]
PAD, WIDTH = 0, 64


@pytest.fixture(scope="module")
def samples() -> list[dict[str, list[int]]]:
    made = []
    for prompt, answer in TEXTS:
        masked, trained = encode(byte_level(), prompt), encode(byte_level(), answer)
        made.append({"input_ids": masked + trained, "labels": [-100] * len(masked) + trained})
    return made


@pytest.fixture(scope="module")
def labeller() -> Labeller:
    classes: dict[str, ClassConfig] = {"number": RegexClass(regex=r"\d[\d,]*(?:\.\d+)?"), "word": RegexClass(regex=r"\pL+")}
    return build_labeller(classes, byte_level())


@pytest.fixture(scope="module")
def alone(labeller: Labeller, samples: list[dict[str, list[int]]]) -> list[list[int]]:
    found = [labeller(sample["input_ids"], sample["labels"]).tolist() for sample in samples]
    assert {0, 1, 2, -100} <= {index for row in found for index in row}
    return found


def pad(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A host's padding collator: it only knows `labels`."""
    fill = {"input_ids": PAD, "labels": -100}
    rows = {key: [list(row[key]) + [fill[key]] * (WIDTH - len(row[key])) for row in features] for key in fill}
    return {key: torch.tensor(row) for key, row in rows.items()}


def pack(features: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
    """A host's packing collator: rows of several samples, end to end."""
    joined = [
        {
            "input_ids": [token for sample in row for token in sample["input_ids"]],
            "labels": [label for sample in row for label in sample["labels"]],
        }
        for row in features
    ]
    positions = [[t for sample in row for t in range(len(sample["input_ids"]))] for row in features]
    padded = [[*row, *range(WIDTH - len(row))] for row in positions]
    return {**pad(joined), "position_ids": torch.tensor(padded)}


def test_padded(labeller: Labeller, samples: list[dict[str, list[int]]], alone: list[list[int]]) -> None:
    batch = LabellingCollator(pad, labeller, packed=False)(samples)
    assert batch[CLASS_IDS].tolist() == [row + [-100] * (WIDTH - len(row)) for row in alone]


def test_packed(labeller: Labeller, samples: list[dict[str, list[int]]], alone: list[list[int]]) -> None:
    batch = LabellingCollator(pack, labeller, packed=True)([samples[:3], samples[3:]])
    rows = [[index for row in part for index in row] for part in (alone[:3], alone[3:])]
    assert batch[CLASS_IDS].tolist() == [row + [-100] * (WIDTH - len(row)) for row in rows]


@pytest.mark.parametrize("packed", [True, False])
def test_streamed(labeller: Labeller, samples: list[dict[str, list[int]]], alone: list[list[int]], packed: bool) -> None:
    """A stream is packed before the loader sees it, or gets its labels only in the collator."""
    made = pack([samples]) if packed else pad(samples)
    batch = LabellingCollator(lambda _: dict(made), labeller, packed)([{"input_ids": []}])
    rows = [[index for row in alone for index in row]] if packed else alone
    assert batch[CLASS_IDS].tolist() == [row + [-100] * (WIDTH - len(row)) for row in rows]


@pytest.mark.parametrize("masks", [[[1, 1, 1, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0]], [[1, 1, 1], [2, 2, 2, 2, 2], [3, 3, 0]]])
def test_texts_that_the_mask_tells_apart_are_samples(labeller: Labeller, masks: list[list[int]]) -> None:
    """Axolotl joins texts of `pretraining_dataset` with padding between them, and a mask may number them."""
    mask = [0, *(number for text in masks for number in text)]
    row = {"input_ids": [7] * len(mask), "labels": [7 if number else -100 for number in mask], "attention_mask": mask}
    class_ids = LabellingCollator(pad, replace(labeller, power=1.0), packed=False)([row])[CLASS_IDS].numpy()
    assert factors_of(class_ids[class_ids >= 0]) == pytest.approx([1 / 2] * 2 + [1 / 4] * 4 + [1])


def test_truncated(labeller: Labeller, samples: list[dict[str, list[int]]], alone: list[list[int]]) -> None:
    for sample, whole in zip(samples, alone, strict=True):
        for stop in range(len(whole) + 1):
            cut = {key: values[:stop] for key, values in sample.items()}
            batch = LabellingCollator(pad, labeller, packed=False)([cut])
            assert batch[CLASS_IDS].tolist() == [whole[:stop] + [-100] * (WIDTH - stop)]


def test_all_samples_of_a_batch_are_labelled_in_one_pass(labeller: Labeller, alone: list[list[int]], samples: Any) -> None:
    empty: dict[str, list[int]] = {"input_ids": [], "labels": []}
    rows = [(sample["input_ids"], sample["labels"], None) for sample in (empty, *samples, empty, empty, samples[0], empty)]
    assert [row.tolist() for row in labeller.label_samples(rows)] == [[], *alone, [], [], alone[0], []]
    assert labeller.label_samples([]) == []
    assert [row.tolist() for row in labeller.label_samples([([], [], None)])] == [[]]
