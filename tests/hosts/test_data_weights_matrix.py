"""Every type of data set × every way from its rows to a batch: two steps, each held to the oracle; what rows may not say."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from dwl_plugin.errors import ConfigError
from tests.hosts import harness, weights_oracle as oracle
from tests.hosts.harness import AXOLOTL
from tests.hosts.weighed_rows import REDUCTIONS, WEIGHTS, conversation, jinja_of, objective_of, text_of, weighed
from tests.hosts.weights_oracle import ENDS_OF_TURN, Objective, Oracle, Row, Said, Sample, Watch

pytestmark = pytest.mark.skipif(AXOLOTL is not None and AXOLOTL < (0, 21), reason="its content parts and its streams are 0.21's")
ROWS = 16


# types of data sets


@dataclass(frozen=True)
class Data:
    """Rows in files, and how the oracle reads each of them."""

    settings: dict[str, Any]
    rows: list[tuple[str, str, Row]]
    """(data set, how it is read, row)"""
    short: int = 60
    """Tokens at which many rows are too long, and no row is without a target."""


def marked(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    return weighed(rng, row, [None, None, "critical", "7"])


def entry(folder: Path, name: str, rows: Sequence[Row], kind: Any, **keys: Any) -> dict[str, Any]:
    path = harness.write_rows(folder / f"{name}.jsonl", [dict(row) for row in rows])
    return {"path": str(path), "name": name, "ds_type": "json", "type": kind, **keys}


def chat(folder: Path, count: int = ROWS) -> Data:
    rng = random.Random(11)
    rows = [conversation(rng, i, ("system", "user", "assistant", "tool"), parts=True) for i in range(count)]
    template = {"chat_template": "jinja", "chat_template_jinja": jinja_of("chatml")}
    return Data({"datasets": [entry(folder, "chat", rows, "chat_template", **template)]}, [("chat", "chatml", row) for row in rows])


def mapped(folder: Path) -> Data:
    """Other names for everything, and `train_detail` beside the weights."""
    rng = random.Random(12)
    plain = [conversation(rng, i, ("user", "assistant"), parts=False) for i in range(ROWS)]
    names = {"user": "human", "assistant": "gpt"}
    rows = []
    for row in plain:
        turns = []
        for turn in row["messages"]:
            text = turn["content"]
            half = len(text) // 2
            detail = [
                {"begin_offset": 0, "end_offset": half, "train": rng.random() < 0.5},
                {"begin_offset": half + 1, "end_offset": len(text) - 1, "train": True},
            ]
            spans = detail if turn["role"] == "assistant" and len(text) > 4 else None
            said = {"weight": turn["weight"], "mark": turn["mark"]}
            turns.append({"from": names[turn["role"]], "value": text, "detail": spans, **said})
        rows.append({"talk": turns, "weight": row["weight"], "mark": row["mark"]})
    keys = {
        "field_messages": "talk",
        "message_property_mappings": {"role": "from", "content": "value"},
        "message_field_training_detail": "detail",
        "roles": {"user": ["human"], "assistant": ["gpt"]},
        "roles_to_train": ["user", "assistant"],
        "chat_template": "jinja",
        "chat_template_jinja": jinja_of("exaone"),
    }
    return Data(
        {"datasets": [entry(folder, "mapped", rows, "chat_template", **keys)]}, [("mapped", "exaone", row) for row in plain]
    )


def pairs(seed: str, count: int = ROWS) -> list[tuple[str, str, str]]:
    """(tag, question, answer), the tag in the question alone."""
    rng = random.Random(seed)
    tags = [f"case {seed}-{i}:" for i in range(100, 100 + count)]
    return [(tag, f"{tag} what is {i} + 1?", f"{i + 1}, " + text_of(rng, 20) + " so.") for i, tag in enumerate(tags)]


def by_row(folder: Path, name: str, kind: Any, make: Callable[[str, str], dict[str, Any]], short: int) -> Data:
    rng = random.Random(name)
    found = [(tag, marked(rng, make(q, a))) for tag, q, a in pairs(name)]
    entries = [entry(folder, name, [row for _, row in found], kind)]
    return Data({"datasets": entries}, [(name, "row", {**row, "tag": tag}) for tag, row in found], short)


def alpaca(folder: Path) -> Data:
    return by_row(folder, "alpaca", "alpaca", lambda q, a: {"instruction": q, "input": "", "output": a}, 190)


def alpaca_chat(folder: Path) -> Data:
    return by_row(folder, "alpaca_chat", "alpaca_chat.load_qa", lambda q, a: {"question": q, "answer": a}, 190)


def user_defined(folder: Path) -> Data:
    kind = {
        "field_instruction": "ask",
        "field_output": "say",
        "format": "Q {instruction} {input}",
        "no_input_format": "Q {instruction}",
    }
    return by_row(folder, "user_defined", kind, lambda q, a: {"ask": q, "say": a}, 60)


def input_output(folder: Path) -> Data:
    """Its segments are parts."""
    rng = random.Random(16)
    rows = []
    for _, question, answer in pairs("io"):
        texts = [(False, question), (True, answer), (False, " and?"), (True, text_of(rng, 6) + ".")]
        segments = [marked(rng, {"label": label, "text": text}) for label, text in texts]
        rows.append(marked(rng, {"segments": segments}))
    entries = [entry(folder, "input_output", rows, "input_output")]
    return Data({"datasets": entries}, [("input_output", "segments", row) for row in rows], 40)


def completion(folder: Path) -> Data:
    rng = random.Random(13)
    rows = [marked(rng, {"text": f"{q} {a}"}) for _, q, a in pairs("c")]
    return Data({"datasets": [entry(folder, "completion", rows, "completion")]}, [("completion", "text", row) for row in rows])


def pretraining(folder: Path) -> Data:
    rng = random.Random(14)
    rows = [marked(rng, {"text": f"{q} {a}"}) for _, q, a in pairs("p")]
    path = harness.write_rows(folder / "pretraining.jsonl", rows)
    source = {"path": "json", "data_files": [str(path)], "name": "pretraining", "type": "pretrain", "text_column": "text"}
    settings = {"datasets": None, "pretraining_dataset": [source], "streaming": True}
    return Data(settings, [("pretraining", "window", row) for row in rows])


def tokenized(folder: Path) -> Data:
    rng = random.Random(15)
    rows = []
    for i in range(ROWS):
        length = rng.randint(20, 90)
        ids = [3 + i] + [rng.randint(3, 390) for _ in range(length)] + [2]
        labels = [-100] * rng.randint(1, 9)
        labels += ids[len(labels) :]
        weights = [rng.choice([0, 0.3, 1, 2.5, 1.0]) for _ in ids]
        marks = [rng.choice(["", "", "critical", "7"]) for _ in ids]  # pyarrow 26 misreads a JSON list of texts that ends in null
        row = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids), "token_weight": weights, "mark": marks}
        rows.append({**row, "weight": rng.choice(WEIGHTS)})
    return Data({"datasets": [entry(folder, "tokenized", rows, None)]}, [("tokenized", "tokens", row) for row in rows])


def several(folder: Path) -> Data:
    """Of different columns, with weights in different places."""
    made = [chat(folder), alpaca(folder), input_output(folder), user_defined(folder)]
    kept = [data.rows[:5] for data in made]
    entries = [source for data in made for source in data.settings["datasets"]]
    for source, rows in zip(entries, kept, strict=True):
        lines = Path(source["path"]).read_text().splitlines(keepends=True)
        Path(source["path"]).write_text("".join(lines[: len(rows)]))
    return Data({"datasets": entries}, [row for rows in kept for row in rows], 190)


TYPES: dict[str, Callable[[Path], Data]] = {
    "chat_template": chat,
    "mappings": mapped,
    "alpaca": alpaca,
    "alpaca_chat": alpaca_chat,
    "user_defined": user_defined,
    "input_output": input_output,
    "completion": completion,
    "tokenized": tokenized,
    "several": several,
    "pretraining": pretraining,
}


def samples_of(data: Data, settings: dict[str, Any], tokenizer: Any) -> list[Sample]:
    """What the host makes of the rows, with what they say."""
    length = settings["sequence_len"]
    raw = any(how not in ("tokens", "window") for _, how, _ in data.rows)
    stock = dict(oracle.samples_of_the_host(settings)) if raw else {}
    words = {tokenizer.decode(ids): ids for ids in stock}
    out = []
    for name, how, row in data.rows:
        said = Said().also(row) if how != "tokens" else Said().also({"weight": row["weight"]})
        if how in ("text", "window"):
            ids = tokenizer(row["text"])["input_ids"]
            for piece in windows(ids, length, settings) if how == "window" else pieces([*ids, 2], length):
                out.append(Sample(tuple(piece), (True,) * len(piece), (said,) * len(piece), name))
        elif how == "row":
            for ids in (ids for text, ids in words.items() if row["tag"] in text):  # one, or, where it was too long, none
                out.append(Sample(ids, stock[ids], (said,) * len(ids), name))
        elif how == "segments":
            ids, said_T = [], []
            for segment in row["segments"]:
                tokens = tokenizer(segment["text"])["input_ids"]
                ids, said_T = [*ids, *tokens], [*said_T, *[said.also(segment)] * len(tokens)]
            ids = tuple(ids[:length])
            out.append(Sample(ids, stock[ids], tuple(said_T[:length]), name))
        elif how == "tokens":
            ids = tuple(row["input_ids"][:length])
            said_T = [said.also({"weight": w, "mark": m}) for w, m in zip(row["token_weight"], row["mark"], strict=True)]
            is_target = tuple(label != -100 for label in row["labels"][:length])
            out.append(Sample(ids, is_target, tuple(said_T[:length]), name))
        else:
            ids, said_T = oracle.tokens_of(tokenizer, row, how, jinja_of(how))
            ids = tuple(ids[:length])
            if ids in stock:
                out.append(Sample(ids, stock[ids], tuple(said_T[:length]), name))
    assert len({sample.ids for sample in out}) == len(out)
    assert {sample.ids for sample in out} >= set(stock)
    return out


def pieces(ids: list[int], length: int) -> list[list[int]]:
    return [ids[at : at + length] for at in range(0, len(ids), length)]


def windows(ids: list[int], length: int, settings: dict[str, Any]) -> list[list[int]]:
    """Of a stream: cut off, or, packed, in windows that overlap."""
    if not settings.get("sample_packing"):
        return [ids[: length - 2]]
    stride = min(256, (length - 1) // 2)
    out, at = [], 0
    while True:
        out.append([*ids[at : at + length - 1], 2])
        if at + length - 1 >= len(ids):
            return out
        at += length - 1 - stride


# ways


WAYS: dict[str, dict[str, Any]] = {
    "padded": {},
    "packed": {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 1, "gradient_accumulation_steps": 1},
    "packed in rows": {"sample_packing": True, "sequence_len": 256, "pad_to_sequence_len": True, "gradient_accumulation_steps": 1},
    "streamed": {"streaming": True},
    "prepared twice": {},
    "preprocessed": {},
    "resumed": {},
    "truncated": {"excess_length_strategy": "truncate"},
    "workers": {"dataset_num_proc": 2},
}


def allowed(kind: str, way: str) -> bool:
    """What the host itself lets through."""
    if kind == "pretraining":
        return way in ("padded", "packed", "resumed", "truncated")
    return way != "streamed" or kind not in ("tokenized", "several")


CELLS = [(kind, way) for kind in TYPES for way in WAYS if allowed(kind, way)]
EACH_ONCE = {
    ("chat_template", "prepared twice"),
    ("mappings", "packed"),
    ("alpaca", "streamed"),
    ("alpaca_chat", "padded"),
    ("user_defined", "truncated"),
    ("input_output", "padded"),
    ("completion", "preprocessed"),
    ("tokenized", "resumed"),
    ("several", "padded"),
    ("pretraining", "packed"),
}
QUICK = {("mappings", "packed"), ("tokenized", "resumed"), ("several", "padded"), ("alpaca", "streamed")}


SLOW = (
    EACH_ONCE
    | {cell for at, cell in enumerate(CELLS) if at % 10 == 0}
    | {("alpaca_chat", "workers"), ("input_output", "packed in rows")}
)
"""The others are for every week."""


def mark_of(case: Any, quick: Collection[Any], slow: Collection[Any]) -> Any:
    return () if case in quick else pytest.mark.slow if case in slow else pytest.mark.weekly


def settings_of(model: Path, data: Data, way: str, folder: Path, **changes: Any) -> dict[str, Any]:
    settings = {
        "eot_tokens": ENDS_OF_TURN,
        "dataset_prepared_path": str(folder / "prepared"),
        "shuffle_merged_datasets": False,
        "sequence_len": data.short if way == "truncated" else 512,
        "gradient_accumulation_steps": 2,
        "num_epochs": 4,
        "optimizer": "sgd",
        **data.settings,
        **WAYS[way],
        **changes,
    }
    return harness.config(model, folder, settings.pop("out", folder), **settings)


def train(settings: dict[str, Any], samples: list[Sample], objective: Objective, steps: int = 2) -> Watch:
    watch = Watch(Oracle(samples, objective))
    harness.train({**settings, "max_steps": settings["max_steps"]}, before=watch.join)
    assert len(watch.steps) == steps
    return watch


@pytest.fixture(scope="module")
def words(words_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(words_folder)


def preprocess(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from axolotl.cli.args import PreprocessCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.preprocess import do_preprocess
    from axolotl.utils.dict import DictDefault

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["axolotl"])
        patch.setenv("AXOLOTL_IS_PREPROCESS", "1")
        do_preprocess(load_cfg(DictDefault({**settings, "is_preprocess": True})), PreprocessCliArgs(download=False))


def from_disk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes tokens of rows from here on fails."""
    from axolotl.utils.data import sft

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("rows were tokenised once more")

    monkeypatch.setattr(sft, "_load_raw_datasets", load)


@pytest.mark.parametrize(
    ("kind", "way"), [pytest.param(*cell, marks=mark_of(cell, QUICK, SLOW), id=", ".join(cell)) for cell in CELLS]
)
def test_two_steps_agree_with_the_oracle(
    words_folder: Path, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    data = TYPES[kind](tmp_path)
    at = list(TYPES).index(kind) + list(WAYS).index(way)
    objective, block = objective_of(("marked", "no classes", "data set")[at % 3], REDUCTIONS[at % 6], data_set=data.rows[0][0])
    settings = settings_of(words_folder, data, way, tmp_path)
    stock = {**settings, "plugins": None, "streaming": None, "dataset_prepared_path": str(tmp_path / "stock")}
    samples = samples_of(data, {key: value for key, value in stock.items() if value is not None}, words)
    settings |= block
    if way == "preprocessed":
        preprocess(settings, monkeypatch)
        from_disk_alone(monkeypatch)
    if way == "prepared twice":
        first = train(settings, samples, objective)
        from_disk_alone(monkeypatch)
        assert train(settings, samples, objective).steps == first.steps
        return
    if way == "resumed":
        whole = train({**settings, "output_dir": str(tmp_path / "whole")}, samples, objective)
        saving = {"save_strategy": "steps", "save_steps": 1}
        train({**settings, **saving, "max_steps": 1}, samples, objective, 1)
        resumed = {**settings, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-1")}
        assert train(resumed, samples, objective, 1).steps == pytest.approx(whole.steps[1:], rel=1e-7)
        return
    watch = train(settings, samples, objective)
    if way == "truncated":
        assert any(len(sample.ids) >= data.short - 2 for sample in watch.oracle.met)


@pytest.mark.slow
def test_rows_prepared_without_weights_are_not_those_with_them_nor_the_other_way_round(
    words_folder: Path, words: Any, tmp_path: Path
) -> None:
    data = alpaca(tmp_path)
    objective, block = objective_of("no classes", "weighted_mean")
    settings = settings_of(words_folder, data, "padded", tmp_path)
    weighed_samples = samples_of(data, settings | {"plugins": None, "dataset_prepared_path": str(tmp_path / "stock")}, words)
    plain_samples = [replace(sample, said=(Said(),) * len(sample.ids)) for sample in weighed_samples]
    plain = {"loss": "dwl", "dwl": {"reduction": "weighted_mean", "alpha": {"rest": 1}}}
    for keys, samples in ((plain, plain_samples), (block, weighed_samples), (plain, plain_samples), (block, weighed_samples)):
        train(settings | keys, samples, objective)
    assert sum(path.is_dir() for path in (tmp_path / "prepared").iterdir()) == 2


@pytest.mark.weekly
def test_workers_under_spawn(words_folder: Path, words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a system cannot fork."""
    import multiprocessing

    from axolotl.utils.data import work_queue

    data = chat(tmp_path)
    objective, block = objective_of("marked", "sample_sqrt")
    settings = settings_of(words_folder, data, "workers", tmp_path)
    samples = samples_of(data, settings | {"plugins": None, "dataset_prepared_path": str(tmp_path / "stock")}, words)
    monkeypatch.setattr(work_queue, "_mp_context", lambda: multiprocessing.get_context("spawn"))
    train(settings | block, samples, objective)


# fields of a wrong type

VALUES: dict[str, Any] = {
    "a text": "low",
    "a boolean": True,
    "NaN": float("nan"),
    "an infinity": float("inf"),
    "below 0": -1,
    "a list": [0.3],
    "an integer beyond all floats": 10**400,
}
ROW = 5


def put_at(row: dict[str, Any], path: str, value: Any) -> None:
    """At `messages[1].weight` and the like."""
    *inside, last = path.replace("[", ".").replace("]", "").split(".")
    for name in inside:
        row = row[int(name)] if isinstance(row, list) else row[name]
    row[int(last) if isinstance(row, list) else last] = value  # type: ignore[index]


PLACES = {
    "chat_template": ("weight", "messages[1].weight", "messages[1].content[0].weight"),
    "mappings": ("weight", "talk[1].weight"),
    "alpaca": ("weight",),
    "alpaca_chat": ("weight",),
    "user_defined": ("weight",),
    "input_output": ("weight", "segments[1].weight"),
    "completion": ("weight",),
    "tokenized": ("weight", "token_weight[3]"),
}
FAULTS = [(kind, path, name) for kind, paths in PLACES.items() for path in paths for name in VALUES]


def refused(model: Path, folder: Path, kind: str, change: Callable[[dict[str, Any]], None]) -> str:
    """What a run says whose sixth row is changed."""
    data = TYPES[kind](folder)
    (source,) = data.settings["datasets"]
    path = Path(source["path"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[ROW])
    harness.write_rows(path, rows)
    with pytest.raises(ConfigError) as caught:
        harness.train({**settings_of(model, data, "padded", folder), "loss": "dwl", "dwl": {"data_weights": True}})
    said = str(caught.value)
    assert "1 problem in the config" in said
    assert re.search(rf"datasets: row {ROW + 1} of \S*{source['name']}", said), said
    return said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("kind", "path", "name"),
    [pytest.param(*case, marks=mark_of(case, FAULTS[::26], FAULTS[::6]), id=", ".join(case)) for case in FAULTS],
)
def test_a_weight_of_a_wrong_type_is_named_by_data_set_row_and_field(
    words_folder: Path, tmp_path: Path, kind: str, path: str, name: str
) -> None:
    said = refused(words_folder, tmp_path, kind, lambda row: put_at(row, path, VALUES[name]))
    assert f"`{path}`" in said


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("kind", ["alpaca", "tokenized", "chat_template"])
def test_a_weight_where_the_type_does_not_look_is_named(words_folder: Path, tmp_path: Path, kind: str) -> None:
    def change(row: dict[str, Any]) -> None:
        row["turns"] = [{"role": "user", "weight": 0.3}]

    assert "turns[0]" in refused(words_folder, tmp_path, kind, change)


@pytest.mark.slow
def test_null_says_nothing(words_folder: Path, words: Any, tmp_path: Path) -> None:
    data = alpaca(tmp_path)
    objective, block = objective_of("no classes", "token_mean")
    (source,) = data.settings["datasets"]
    harness.write_rows(Path(source["path"]), [{**row, "weight": None} for _, _, row in data.rows])
    silent = replace(data, rows=[(name, how, {**row, "weight": None}) for name, how, row in data.rows])
    settings = settings_of(words_folder, silent, "padded", tmp_path)
    stock = settings | {"plugins": None, "dataset_prepared_path": str(tmp_path / "stock")}
    train(settings | block, samples_of(silent, stock, words), objective)
