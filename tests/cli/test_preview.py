"""The rows that are shown are the rows that are trained, in the host's own words: same ids, same labels, same order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwl_plugin.hosts import axolotl_preview as preview
from tests.hosts import harness, test_datasets

Write = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("host")


def look(config: Path, count: int) -> tuple[Any, Any, preview.Rows]:
    cfg, _ = preview.load_cfg(yaml.safe_load(config.read_text()), config)
    tokenizer = preview.load_tokenizer(cfg)
    return cfg, tokenizer, preview.load_rows(cfg, tokenizer, count)


def as_trained(cfg: Any, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """The whole training set, prepared by the host."""
    from axolotl.utils.data import prepare_datasets

    with preview.quiet():
        cfg.dataset_num_proc = None
        train = prepare_datasets(cfg, tokenizer)[0]
    return [(row["input_ids"], row["labels"]) for row in train]


def shown(rows: preview.Rows) -> list[tuple[list[int], list[int]]]:
    return [(sample["input_ids"], sample["labels"]) for sample in rows.samples]


def two_datasets(folder: Path) -> list[dict[str, Any]]:
    rows = harness.rows(60)
    halves = [harness.write_rows(folder / f"part{i}.jsonl", rows[i::2]) for i in range(2)]
    return [{"path": str(half), "type": "chat_template"} for half in halves]


@pytest.mark.parametrize(
    "changes",
    [
        {"val_set_size": 0.25},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"val_set_size": 7, "shuffle_merged_datasets": False}, marks=pytest.mark.slow),
        pytest.param({"sample_packing": True}, marks=pytest.mark.slow),
    ],
    ids=["validation set", "merged", "in order", "packed"],
)
def test_the_head_of_the_run(write_config: Write, tmp_path: Path, changes: dict[str, Any]) -> None:
    cfg, tokenizer, rows = look(write_config(loss="dft", datasets=two_datasets(tmp_path), **changes), 12)
    trained = as_trained(cfg, tokenizer)
    assert shown(rows) == trained[:12]
    assert rows.total == len(trained)


@pytest.mark.parametrize("strategy", ["drop", pytest.param("truncate", marks=pytest.mark.slow)])
def test_rows_that_are_too_long_are_treated_as_in_the_run(write_config: Write, strategy: str) -> None:
    cfg, tokenizer, rows = look(write_config(loss="dft", sequence_len=52, excess_length_strategy=strategy), 40)
    trained = as_trained(cfg, tokenizer)
    assert shown(rows) == trained
    assert rows.too_long == (40 - len(trained) if strategy == "drop" else 0)
    assert rows.too_long > 0 or strategy == "truncate"


@pytest.mark.slow
def test_prepared_rows_are_taken_as_the_run_would(write_config: Write, tmp_path: Path) -> None:
    config = write_config(loss="dft")
    cfg, tokenizer, _ = look(config, 5)
    trained = as_trained(cfg, tokenizer)
    (tmp_path / "rows.jsonl").write_text("")  # what was prepared is what is trained, whatever became of its source
    _, _, rows = look(config, 5)
    assert shown(rows) == trained[:5]
    assert any("prepared earlier" in note for note in rows.notes)


def test_packs_hold_every_row_once_and_fit(write_config: Write) -> None:
    _, _, rows = look(write_config(loss="dft", sample_packing=True, sequence_len=256, micro_batch_size=1), 30)
    assert rows.packs is not None
    assert sorted(index for pack in rows.packs for index in pack) == list(range(30))
    assert all(sum(len(rows.samples[index]["input_ids"]) for index in pack) <= 256 for pack in rows.packs)
    assert len(rows.packs) < 30


@pytest.mark.parametrize("kind", test_datasets.KINDS)
def test_every_kind_of_dataset_can_be_looked_at(write_config: Write, tmp_path: Path, little_model: Path, kind: str) -> None:
    settings = test_datasets.KINDS[kind](tmp_path, little_model)
    _, _, rows = look(write_config(loss="dft", **settings), 6)
    assert len(rows.samples) == 6
    assert all(len(sample["input_ids"]) == len(sample["labels"]) for sample in rows.samples)
    assert all(any(label != -100 for label in sample["labels"]) for sample in rows.samples)


def test_a_stream_that_packs_its_rows_itself(write_config: Write, tmp_path: Path, little_model: Path) -> None:
    settings = test_datasets.pretraining(tmp_path, little_model)
    _, _, rows = look(write_config(loss="dft", **settings, sample_packing=True, sequence_len=128, micro_batch_size=1), 2)
    assert rows.packs is None
    assert all(sample["position_ids"].count(0) > 1 for sample in rows.samples)
