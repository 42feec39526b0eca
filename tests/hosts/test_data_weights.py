"""What Axolotl's rows say of their tokens reaches those tokens, whatever made tokens of the rows."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dwl_plugin.classes.data_codes import DATA_CODES, data_sets_of, factors_of, marks_of
from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError, RunError
from dwl_plugin.hosts import axolotl_preview as preview
from dwl_plugin.hosts.axolotl_args import block_of
from dwl_plugin.hosts.axolotl_data import data_set_names, reading_data
from dwl_plugin.run.collate import CLASS_IDS
from tests.hosts import harness

Runs = list[tuple[str, float]]
Rows = list[dict[str, Any]]
Prepare = Callable[..., Any]
CHAT = {"type": "chat_template"}


def user(text: Any, **said: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **said}


def assistant(text: Any, **said: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **said}


@pytest.fixture
def settings_of(configure: Callable[..., dict[str, Any]], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A config with these rows as its only data set; `entry` goes beside their path."""

    def make(rows: Rows, entry: dict[str, Any], dwl: Any = None, **settings: Any) -> dict[str, Any]:
        path = harness.write_rows(tmp_path / "said.jsonl", rows)
        own = {"datasets": [{"path": str(path), "ds_type": "json", **entry}], "dataset_prepared_path": str(tmp_path / "prepared")}
        own |= {"loss": "dwl", "dwl": {"data_weights": True} if dwl is None else dwl, "shuffle_merged_datasets": False}
        return configure(**{**own, **settings})

    return make


@pytest.fixture
def prepare(settings_of: Callable[..., dict[str, Any]], tmp_path: Path) -> Prepare:
    """The training set as a run prepares it."""

    def rows_of(*args: Any, **kwargs: Any) -> Any:
        return prepared(settings_of(*args, **kwargs), tmp_path)

    return rows_of


def prepared(settings: dict[str, Any], folder: Path) -> Any:
    from axolotl.common import datasets

    cfg, _ = preview.load_cfg(settings, folder / "config.yml")
    tokenizer = preview.load_tokenizer(cfg)
    with preview.quiet():
        return datasets.prepare_datasets(cfg, tokenizer)[0]


def runs(row: dict[str, Any], tokenizer: Any) -> Runs:
    """The text of a row's tokens, as far as they have one factor."""
    ids, factors = np.asarray(row["input_ids"]), factors_of(np.asarray(row[DATA_CODES]))[: len(row["input_ids"])]
    return [
        (tokenizer.decode(ids[[at for at, _ in run]], clean_up_tokenization_spaces=False), float(np.float32(factor)))
        for factor, run in ((factor, list(run)) for factor, run in groupby(enumerate(factors), key=lambda pair: pair[1]))
    ]


def rounded(found: Runs) -> Runs:
    return [(text, round(factor, 6)) for text, factor in found]


CONVERSATIONS: dict[str, tuple[dict[str, Any], dict[str, Any], Runs]] = {
    "a message": (
        {"messages": [user("Hi"), assistant("Yes.", weight=0.3), user("So?"), assistant("No.")]},
        {},
        [
            ("<|im_start|>user\nHi<|im_end|>\n", 1),
            ("<|im_start|>assistant\nYes.<|im_end|>\n", 0.3),
            ("<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n", 1),
        ],
    ),
    "a message in a row": (
        {"messages": [user("Hi"), assistant("Yes.", weight=0.5)], "weight": 3},
        {},
        [("<|im_start|>user\nHi<|im_end|>\n", 3), ("<|im_start|>assistant\nYes.<|im_end|>\n", 1.5)],
    ),
    "parts of a message in a row": (
        {
            "messages": json.dumps(
                [
                    user("Hi"),
                    assistant([{"type": "text", "text": "The"}, {"type": "text", "text": " answer", "weight": 0.5}], weight=3),
                ]
            ),
            "weight": 2,
        },
        {},
        [("<|im_start|>user\nHi<|im_end|>\n", 2), ("<|im_start|>assistant\nThe", 6), (" answer", 3), ("<|im_end|>\n", 6)],
    ),
    "other names": (
        {"chat": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes.", "weight": 0.3}]},
        {"field_messages": "chat", "message_property_mappings": {"role": "from", "content": "value"}},
        [("<|im_start|>user\nHi<|im_end|>\n", 1), ("<|im_start|>assistant\nYes.<|im_end|>\n", 0.3)],
    ),
    "a system column": (
        {"messages": [user("Hi", weight=0.5), assistant("Yes.", weight=0.3)], "system": "Be brief."},
        {},
        [
            ("<|im_start|>system\nBe brief.<|im_end|>\n", 1),
            ("<|im_start|>user\nHi<|im_end|>\n", 0.5),
            ("<|im_start|>assistant\nYes.<|im_end|>\n", 0.3),
        ],
    ),
    "a system message that is dropped": (
        {"messages": [{"role": "system", "content": "Be brief.", "weight": 9}, user("Hi"), assistant("Yes.", weight=0.3)]},
        {"drop_system_message": True},
        [("<|im_start|>user\nHi<|im_end|>\n", 1), ("<|im_start|>assistant\nYes.<|im_end|>\n", 0.3)],
    ),
    "said as a string": (
        {"messages": json.dumps([user("Hi"), assistant("Yes.", weight=0.3)])},
        {},
        [("<|im_start|>user\nHi<|im_end|>\n", 1), ("<|im_start|>assistant\nYes.<|im_end|>\n", 0.3)],
    ),
}


@pytest.mark.parametrize("case", CONVERSATIONS)
def test_messages_and_parts(prepare: Prepare, tokenizer: Any, case: str) -> None:
    row, entry, expected = CONVERSATIONS[case]
    (made,) = prepare([row], {**CHAT, **entry})
    assert rounded(runs(made, tokenizer)) == expected


def test_thoughts_are_a_text_of_their_own(prepare: Prepare, tokenizer: Any) -> None:
    template = (
        "{% for message in messages %}{{ message.role }}: {% if message.reasoning_content %}<t>{{ message.reasoning_content }}</t>"
        "{% endif %}{{ message.content }}<|im_end|>{% endfor %}"
    )
    said = [{"type": "text", "text": "as"}, {"type": "text", "text": " I see", "weight": 0.5}]
    row = {"messages": [user("Hi"), {**assistant([{"type": "text", "text": "Yes.", "weight": 0.25}]), "reasoning_content": said}]}
    (made,) = prepare([row], {**CHAT, "chat_template": "jinja", "chat_template_jinja": template})
    found = rounded(runs(made, tokenizer))
    assert found == [("user: Hi<|im_end|>assistant: <t>as", 1), (" I see", 0.5), ("</t>", 1), ("Yes.", 0.25), ("<|im_end|>", 1)]
    split = {"messages": [user("Hi"), assistant("<think>as I see</think>Yes.", weight=0.3)]}
    (made,) = prepare([split], {**CHAT, "chat_template": "jinja", "chat_template_jinja": template, "split_thinking": True})
    assert rounded(runs(made, tokenizer)) == [("user: Hi<|im_end|>", 1), ("assistant: <t>as I see</t>Yes.<|im_end|>", 0.3)]


def test_tools_stand_in_front(prepare: Prepare, tokenizer: Any) -> None:
    template = (
        "{% if tools %}tools: {{ tools | length }}<|im_end|>{% endif %}"
        "{% for message in messages %}{{ message.role }}: {{ message.content }}{% if message.tool_calls %}"
        "{% for c in message.tool_calls %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endif %}"
        "<|im_end|>{% endfor %}"
    )
    calls = [{"type": "function", "function": {"name": "add", "arguments": '{"weight": 2}'}}]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"properties": {"weight": {"type": "number"}}}}}]
    row = {"messages": [user("Hi"), {"role": "assistant", "content": "", "tool_calls": calls, "weight": 0.3}], "tools": tools}
    (made,) = prepare([row], {**CHAT, "chat_template": "jinja", "chat_template_jinja": template})
    first, second = rounded(runs(made, tokenizer))
    assert first == ("tools: 1<|im_end|>user: Hi<|im_end|>", 1)
    assert second == ('assistant: [add {"weight": 2}]<|im_end|>', 0.3)


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "alpaca": ({"instruction": "Hi", "input": "", "output": "Yes."}, {"type": "alpaca"}),
    "alpaca_chat.load_qa": ({"question": "Hi", "answer": "Yes."}, {"type": "alpaca_chat.load_qa"}),
    "completion": ({"text": "Hi. Yes."}, {"type": "completion"}),
    "context_qa": ({"context": "Hi", "question": "So?", "answer": "Yes."}, {"type": "context_qa.load_v2"}),
    "messages": ({"messages": [user("Hi"), assistant("Yes.")]}, {"type": "messages", "field_messages": "messages"}),
    "written in the config": (
        {"q": "Hi", "a": "Yes."},
        {"type": {"field_instruction": "q", "field_output": "a", "format": "Q {instruction} A:"}},
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_of_any_type_says_what_it_counts(prepare: Prepare, tokenizer: Any, kind: str) -> None:
    row, entry = ROWS[kind]
    made = prepare([{**row, "weight": 0.25}, {**row, "weight": None}, {**row, "weight": 2}], entry)
    assert [[factor for _, factor in runs(each, tokenizer)] for each in made] == [[0.25], [1], [2]]
    assert all(len(each[DATA_CODES]) == len(each["input_ids"]) for each in made)


def test_a_text_that_becomes_several_rows_counts_the_same_in_each(prepare: Prepare, tokenizer: Any) -> None:
    rows = [{"text": "one two three four five six", "weight": 0.5}, {"text": "one two three", "weight": 3.0}]
    made = prepare(rows, {"type": "completion"}, sequence_len=8)
    pieces = [runs(each, tokenizer) for each in made]
    assert [len(run) for run in pieces] == [1] * len(made)
    assert "".join(text for ((text, factor),) in pieces if factor == 0.5) == "one two three four five six<|im_end|>"
    assert "".join(text for ((text, factor),) in pieces if factor == 3) == "one two three<|im_end|>"


def test_segments_are_parts(prepare: Prepare, tokenizer: Any) -> None:
    segments = [{"label": False, "text": "Say it:"}, {"label": True, "text": " yes", "weight": 0.3}, {"label": True, "text": " no"}]
    (made,) = prepare([{"segments": segments, "weight": 2}], {"type": "input_output"})
    assert rounded(runs(made, tokenizer)) == [("Say it:", 2), (" yes", 0.6), (" no", 2)]


def tokens(tokenizer: Any, text: str, **said: Any) -> dict[str, Any]:
    ids = tokenizer(text)["input_ids"]
    return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids), **said}


def test_tokens_that_come_with_the_data(prepare: Prepare, tokenizer: Any) -> None:
    rows = [
        tokens(tokenizer, "The answer is", token_weight=[0.5, 1, 0], weight=2.0, mark=["a", None, "b"], other=1),
        tokens(tokenizer, "The answer is", mark=["a"], other=2),
        tokens(tokenizer, "The answer is", token_weight=[0.25, None, 4], mark=["b", "a"], other=3),
    ]
    classes = {"a": {"marked": "a"}, "b": {"marked": "b"}}
    made = prepare(rows, {"type": None}, {"data_weights": True, "classes": classes})
    assert [runs(row, tokenizer) for row in made] == [
        [("The", 1), (" answer", 2), (" is", 0)],
        [("The answer is", 1)],
        [("The", 0.25), (" answer", 1), (" is", 4)],
    ]
    assert [marks_of(np.asarray(row[DATA_CODES])).tolist() for row in made] == [[1, 0, 2], [1, 1, 1], [3, 3, 3]]
    assert set(made.column_names) == {"input_ids", "labels", "attention_mask", "other", DATA_CODES}


def test_rows_of_a_shard_keep_what_they_say(prepare: Prepare, tokenizer: Any) -> None:
    rows = [tokens(tokenizer, f"The answer is {at}", weight=float(at)) for at in range(20)]
    made = prepare(rows, {"type": None, "shards": 2, "shards_idx": 1, "weight": 0.5})
    assert len(made) == (10 if harness.AXOLOTL == (0, 19) else 5)  # which knows no weight of a data set
    assert all(run[0] == f"The answer is {int(run[1])}" for (run,) in (runs(row, tokenizer) for row in made))


def test_data_sets_are_told_apart(prepare: Prepare, tmp_path: Path, configure: Any, tokenizer: Any) -> None:
    chat = harness.write_rows(tmp_path / "chat.jsonl", [{"messages": [user("Hi"), assistant("Yes.", weight=0.5)]}])
    sums = harness.write_rows(tmp_path / "sums.jsonl", [{"instruction": "Hi", "input": "", "output": "Yes.", "level": 3}])
    files = [{"path": str(chat), **CHAT}, {"path": str(sums), "type": "alpaca", "name": "sums"}]
    held = [{"path": str(sums), "type": "alpaca", "name": "sums", "split": "train"}, {"path": str(chat), "name": "held", **CHAT}]
    settings = configure(loss="dwl", dwl={"classes": {"sums": {"dataset": "sums"}}}, datasets=files, shuffle_merged_datasets=False)
    settings["dataset_prepared_path"] = str(tmp_path / "prepared")
    turned = prepared({**settings, "datasets": files[::-1]}, tmp_path)  # the host would take what it prepared in any order
    assert [data_sets_of(np.asarray(row[DATA_CODES]))[0] for row in turned] == [1, 2]
    assert tokenizer.decode(turned[0]["input_ids"]).startswith("Below is an instruction")
    made = prepared(settings, tmp_path)
    assert tokenizer.decode(made[0]["input_ids"]).startswith("<|im_start|>user")
    assert [set(data_sets_of(np.asarray(row[DATA_CODES]))) for row in made] == [{1}, {2}]
    assert {factor for row in made for _, factor in runs(row, tokenizer)} == {1}  # weights are not asked for
    block = parse({key: settings[key] for key in ("loss", "dwl")})
    assert data_set_names({"datasets": files, "test_datasets": held}, block) == (str(chat), "sums", "held")


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ([{"path": "a", "name": "x"}, {"path": "b", "name": "x"}], "several data sets go by this name"),
        ([{"path": "a", "name": ["x", "y"]}, {"path": "x"}], "several data sets go by this name"),
        ([{"path": "x"}] + [{"path": str(number)} for number in range(255)], "there are 256 data sets"),
    ],
)
def test_a_data_set_that_cannot_be_told_apart_is_refused_where_a_class_asks_for_it(entries: Any, why: str) -> None:
    asks = parse({"loss": "dwl", "dwl": {"classes": {"c": {"all": [{"dataset": "x"}, {"regex": "a"}]}}}})
    with pytest.raises(ConfigError, match=why) as raised:
        data_set_names({"datasets": entries}, asks)
    assert raised.value.problems[0].path == "dwl.classes.c.all[0].dataset"
    data_set_names({"datasets": entries}, parse({"loss": "dwl", "dwl": {"data_weights": True}}))
    assert data_set_names({"pretraining_dataset": "texts"}, asks) == ("texts",)


def faulty(rows: Rows, at: int, **fields: Any) -> Rows:
    return [{**row, **fields} if number == at else row for number, row in enumerate(rows)]


SUMS: Rows = [{"instruction": f"What is {at}?", "input": "", "output": f"It is {at}.", "weight": 0.5} for at in range(30)]
FAULTS: dict[str, tuple[Rows, dict[str, Any], str]] = {
    "below 0": (faulty(SUMS, 17, weight=-0.5), {"type": "alpaca"}, r"row 18 of .*: `weight`: is below 0 \(got -0.5\)"),
    "NaN": (faulty(SUMS, 17, weight=float("nan")), {"type": "alpaca"}, r"row 18 of .*: `weight`: has to be finite \(got nan\)"),
    "in a shard": (
        faulty(SUMS, 17, weight=-1.0),
        {"type": "alpaca", "shards": 2, "shards_idx": 0, "weight": 0.99},
        r"row 18 of .*: `weight`: is below 0",
    ),
    "a word": (
        [{**row, "weight": "much"} for row in SUMS],
        {"type": "alpaca"},
        r"row 1 of .*: `weight`: has to be a number \(got 'much'",
    ),
    "where nothing reads it": (
        faulty(SUMS, 17, meta={"weight": 2}),
        {"type": "alpaca"},
        r"row 18 of .*: `meta.weight`: stands where nothing reads it \(got 2\)",
    ),
    "a message": (
        [{"messages": [user("Hi"), assistant("Yes.", **({"weight": True} if at == 9 else {}))]} for at in range(12)],
        CHAT,
        r"row 10 of .*: `messages\[1\].weight`: has to be a number \(got True\)",
    ),
    "a message that a type does not read": (
        [{"messages": [user("Hi"), assistant("Yes.", **({"weight": 0.5} if at == 9 else {}))]} for at in range(12)],
        {"type": "messages", "field_messages": "messages"},
        r"row 10 of .*: `messages\[1\].weight`: stands where nothing reads it",
    ),
    "a number that the reader of files would drop": (
        [{"messages": [user("Hi"), assistant("Yes.", **({"weight": float("inf")} if at == 9 else {}))]} for at in range(12)],
        CHAT,
        r"row 10 of .*: `messages\[1\].weight`: has to be finite \(got inf\)",
    ),
    "and in a segment": (
        [{"segments": [{"label": True, "text": "Hi"} | ({"weight": float("nan")} if at == 9 else {})]} for at in range(12)],
        {"type": "input_output"},
        r"row 10 of .*: `segments\[0\].weight`: has to be finite \(got nan\)",
    ),
    "a segment": (
        [{"segments": [{"label": True, "text": "Hi", "weight": -1.0 if at == 9 else 1.0}]} for at in range(12)],
        {"type": "input_output"},
        r"row 10 of .*: `segments\[0\].weight`: is below 0",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_row_that_says_it_wrongly_is_named(prepare: Prepare, case: str) -> None:
    rows, entry, why = FAULTS[case]
    with pytest.raises(ConfigError, match=why) as raised:
        prepare(rows, entry)
    assert raised.value.problems[0].path == "datasets"


def test_a_row_to_evaluate_on_is_named_too(prepare: Prepare, tmp_path: Path) -> None:
    path = harness.write_rows(tmp_path / "held.jsonl", faulty(SUMS, 2, weight=-1.0))
    held = [{"path": str(path), "ds_type": "json", "type": "alpaca", "split": "train"}]
    with pytest.raises(ConfigError, match=r"row 3 of .*held.jsonl: `weight`: is below 0") as raised:
        prepare(SUMS, {"type": "alpaca"}, test_datasets=held)
    assert raised.value.problems[0].path == "test_datasets"


def test_a_column_of_another_length_than_the_tokens_is_named(prepare: Prepare, tokenizer: Any) -> None:
    rows = [tokens(tokenizer, "The answer is", token_weight=[1.0] * (3 - (at == 4))) for at in range(6)]
    with pytest.raises(ConfigError, match=r"row 5 of .*: `token_weight`: has 2 numbers, and the row has 3 tokens"):
        prepare(rows, {"type": None})
    rows = [tokens(tokenizer, "The answer is", mark=["x", None][: 2 + at]) for at in range(2)]
    with pytest.raises(ConfigError, match=r"row 1 of .*: `mark`: has 2 marks, and the row has 3 tokens"):
        prepare(rows, {"type": None}, {"classes": {"x": {"marked": "x"}}})


def test_the_command_names_the_same_row_of_many(settings_of: Any, tmp_path: Path) -> None:
    """It tokenises some rows, out of their order."""
    rows = [{**row, "weight": -1.0 if at in (5, 299) else 1.0} for at, row in enumerate(SUMS * 10)]
    cfg, _ = preview.load_cfg(settings_of(rows, {"type": "alpaca"}), tmp_path / "config.yml")
    tokenizer = preview.load_tokenizer(cfg)
    with pytest.raises(ConfigError, match=r"row 6 of .*: `weight`: is below 0"):
        preview.load_rows(cfg, tokenizer, 10, block_of(cfg))
    cfg.datasets[0].shards = 1  # shuffled, so the rows lie elsewhere than in the file
    with pytest.raises(ConfigError, match=r"row (6|300) of .*: `weight`: is below 0"):
        preview.load_rows(cfg, tokenizer, len(rows), block_of(cfg))


def test_a_row_of_a_stream_stops_the_run(settings_of: Any) -> None:
    settings = settings_of(faulty(SUMS, 3, weight=-1.0), {"type": "alpaca"}, streaming=True, max_steps=4)
    with pytest.raises(RunError, match=r"the row of .* that begins with \{'instruction': 'What is 3\?'.*`weight`: is below 0"):
        harness.train(settings)


def test_prepared_rows_are_those_of_what_is_read(settings_of: Any, tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "prepared"

    def kept(dwl: Any, rows: Rows = SUMS, **changes: Any) -> set[str]:
        prepared(settings_of(rows, {"type": "alpaca"}, dwl, **changes), tmp_path)
        return {path.name for path in folder.iterdir() if path.is_dir()}

    plain = kept({"classes": {"number": {"regex": r"\d"}}})
    with_weights = kept({"data_weights": True})
    assert len(plain) == 1
    assert plain < with_weights
    assert kept({"data_weights": True}) == kept({"data_weights": True, "reduction": "weighted_mean"}) == with_weights
    renamed = kept({"data_weights": {"row": "other"}})
    marked = kept({"data_weights": True, "classes": {"m": {"marked": "m", "allow_empty": True}}})
    negative = kept({"data_weights": {"row": "weight", "allow_negative": True}})
    assert with_weights < renamed < marked < negative
    again = prepared(settings_of(SUMS, {"type": "alpaca"}), tmp_path)
    assert runs(again[0], tokenizer)[0][1] == 0.5
    assert set(kept(None)) == negative


def test_without_the_keys_the_host_is_left_alone(settings_of: Any, tmp_path: Path) -> None:
    from axolotl.common import datasets
    from axolotl.utils.data import sft, shared, streaming, utils

    def in_place() -> list[Any]:
        return [
            sft.get_dataset_wrapper,
            sft.generate_dataset_hash_from_config,
            shared.generate_dataset_hash_from_config,
            streaming.encode_streaming,
            streaming.encode_packed_streaming,
            utils._deduplicate_dataset,
        ]

    before = in_place()
    cfg, _ = preview.load_cfg(settings_of(SUMS, {"type": "alpaca"}, {"classes": {"number": {"regex": r"\d"}}}), tmp_path / "c.yml")
    with reading_data(cfg, block_of(cfg)):
        assert in_place() == before
    asking = parse({"loss": "dwl", "dwl": {"data_weights": True}})
    with reading_data(cfg, asking):
        assert not set(map(id, in_place())) & set(map(id, before))
    assert in_place() == before
    with pytest.raises(ConfigError, match="below 0"):
        prepared(settings_of(faulty(SUMS, 3, weight=-1.0), {"type": "alpaca"}), tmp_path)
    assert in_place() == before
    settings = settings_of(SUMS, {"type": "alpaca"})
    preview.load_cfg({key: settings[key] for key in settings if key not in ("loss", "dwl")}, tmp_path / "c.yml")
    assert datasets.prepare_datasets is sft.prepare_datasets


def test_several_data_sets_that_nobody_asks_for_are_not_told_apart(configure: Any, tmp_path: Path) -> None:
    sets = [
        {"path": str(harness.write_rows(tmp_path / f"{name}.jsonl", harness.rows(8))), "type": "chat_template"} for name in "ab"
    ]
    for block in ({"classes": {"number": {"regex": r"\d"}}}, {"reduction": "sample_mean"}):
        run = harness.train(configure(datasets=sets, loss="dwl", dwl=block, dataset_prepared_path=str(tmp_path / "prepared")))
        assert len(run.logged("nll")) == 2
        assert not [key for entry in run.history for key in entry if "dwl/dataset" in key]


def test_a_strategy_goes_to_workers(settings_of: Any, tmp_path: Path) -> None:
    """Under fork as it is; under spawn as a pickle, which `datasets` takes its hash from too."""
    from axolotl.prompt_strategies import load
    from datasets.fingerprint import Hasher

    from dwl_plugin.hosts.axolotl_rows import with_codes
    from dwl_plugin.run.row_codes import DataSet, RowCodes

    cfg, _ = preview.load_cfg(settings_of(SUMS, CHAT), tmp_path / "config.yml")
    tokenizer = preview.load_tokenizer(cfg)

    def made(**codes: Any) -> Any:
        strategy = load("chat_template", tokenizer, cfg, cfg.datasets[0])
        return with_codes(strategy, DataSet(RowCodes(**codes), "datasets", "sums", 1))

    ours = made(message="weight")
    row = {"messages": [[user("Hi"), assistant("Yes.", weight=0.5)]]}
    there = pickle.loads(pickle.dumps(ours))
    assert {key: list(map(list, value)) for key, value in there.tokenize_prompt(row).items()} == {
        key: list(map(list, value)) for key, value in ours.tokenize_prompt(row).items()
    }
    assert there.supports_batched
    assert there.filter_rows is None
    assert there.prompter.field_messages == "messages"
    assert Hasher.hash(made(message="weight").tokenize_prompt) == Hasher.hash(made(message="weight").tokenize_prompt)
    assert Hasher.hash(made(message="weight").tokenize_prompt) != Hasher.hash(made(message="w").tokenize_prompt)


@pytest.mark.parametrize("entry", [{"type": "alpaca"}, CHAT, {"type": None}], ids=["a row", "rows", "tokens"])
def test_several_workers_say_the_same(
    prepare: Prepare, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = SUMS if entry["type"] == "alpaca" else [{"messages": [user("Hi"), assistant("Yes.", weight=0.5)]}] * 30
    rows = [tokens(tokenizer, "The answer is", weight=0.5)] * 30 if entry["type"] is None else rows
    alone = [row[DATA_CODES] for row in prepare(rows, entry)]
    assert [row[DATA_CODES] for row in prepare(rows, entry, dataset_num_proc=2, dataset_prepared_path="there")] == alone
    with pytest.raises(ConfigError, match=r"row 18 of"):
        prepare(faulty(rows, 17, weight=-1.0), entry, dataset_num_proc=2, dataset_prepared_path="elsewhere")


def test_the_same_tokens_are_the_same_row_whatever_is_said_of_them(prepare: Prepare, tokenizer: Any) -> None:
    rows = [{"text": text, "weight": weight} for text, weight in (("one", 1.0), ("two", 2.0), ("one", 3.0), ("two", 4.0))]
    made = prepare(rows, {"type": "completion"}, dataset_exact_deduplication=True)
    assert [runs(row, tokenizer) for row in made] == [[("one<|im_end|>", 1)], [("two<|im_end|>", 2)]]


def test_rows_cut_off_and_held_out_keep_what_they_say(settings_of: Any, tokenizer: Any) -> None:
    texts = [f"{at}{' long' * (at % 3 * 20 + 1)}" for at in range(12)]
    rows = [{"segments": [{"label": True, "text": text}], "weight": float(at + 1)} for at, text in enumerate(texts)]
    seen: list[tuple[int, int, set[float]]] = []

    def look(trainer: Any) -> None:
        for batch in (batch for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()) for batch in loader):
            for ids, classes in zip(batch["input_ids"].numpy(), batch[CLASS_IDS].numpy(), strict=True):
                kept = classes != -100
                number = int(tokenizer.decode(ids[kept]).split()[0])
                seen.append((number, int(kept.sum()), set(factors_of(classes[kept]).tolist())))

    cut = {"sequence_len": 32, "excess_length_strategy": "truncate"}
    harness.train(settings_of(rows, {"type": "input_output"}, val_set_size=4, eval_strategy="no", max_steps=1, **cut), before=look)
    assert sorted(number for number, _, _ in seen) == list(range(12))
    assert max(length for _, length, _ in seen) == 32
    assert all(factors == {number + 1} for number, _, factors in seen)


def stream(folder: Path, rows: Rows, **settings: Any) -> dict[str, Any]:
    path = harness.write_rows(folder / "texts.jsonl", rows)
    source = {"path": "json", "data_files": [str(path)], "type": "pretrain", "text_column": "text"}
    return {"datasets": None, "pretraining_dataset": [source], "streaming": True, "shuffle_merged_datasets": False, **settings}


TEXTS: Rows = [{"text": " ".join(["one"] * at + ["two"] * (10 - at)), "weight": at / 8} for at in range(1, 9)]


def texts(row: dict[str, Any], tokenizer: Any) -> Iterator[tuple[str, list[float]]]:
    """Each text of a joined row, without padding, and the factors in it."""
    ids, codes = np.asarray(row["input_ids"]).ravel(), np.asarray(row[DATA_CODES]).ravel()
    assert len(ids) == len(codes)
    ends = [0, *(np.flatnonzero(ids == tokenizer.eos_token_id) + 1)]
    for begin, end in pairwise(ends):
        kept = [at for at in range(begin, end) if ids[at] != tokenizer.pad_token_id]
        yield tokenizer.decode(ids[kept]), sorted({float(factor) for factor in factors_of(codes[kept])})


@pytest.mark.parametrize(
    "how",
    [
        {"pretraining_sample_concatenation": True},
        {"sample_packing": True, "micro_batch_size": 1},
        {"sample_packing": True, "micro_batch_size": 1, "pretrain_multipack_attn": False},
    ],
    ids=["joined", "packed", "packed in one attention"],
)
def test_texts_of_a_stream_that_are_joined(prepare: Prepare, tmp_path: Path, configure: Any, tokenizer: Any, how: Any) -> None:
    settings = configure(loss="dwl", dwl={"data_weights": True}, sequence_len=64, **stream(tmp_path, TEXTS, **how))
    found = [text for row in prepared(settings, tmp_path) for text in texts(row, tokenizer)]
    expected = {f"{row['text']}<|im_end|>": [row["weight"]] for row in TEXTS}
    assert len(found) > 3
    assert all(expected[text] == factors for text, factors in found)


@pytest.mark.parametrize("side", ["right", "left"])
def test_packs_of_a_stream_are_padded_as_their_tokens_are(
    tmp_path: Path, configure: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"messages": [user("Hi"), assistant(f"{row['text']}", weight=row["weight"])]} for row in TEXTS]
    harness.write_rows(folder / "train.jsonl", rows)
    settings = configure(
        loss="dwl",
        dwl={"data_weights": True},
        datasets=[{"path": str(folder), **CHAT}],
        streaming=True,
        sample_packing=True,
        sequence_len=128,
        micro_batch_size=1,
        shuffle_merged_datasets=False,
    )
    inner = preview.load_tokenizer
    monkeypatch.setattr(preview, "load_tokenizer", lambda cfg: _padded(inner(cfg), side))
    packs = list(prepared(settings, tmp_path))
    assert packs
    for row in packs:
        ids, codes = (np.asarray(row[name]).ravel() for name in ("input_ids", DATA_CODES))
        assert len(ids) == len(codes) == 128
        assert (ids[0 if side == "left" else -1]) == tokenizer.pad_token_id
        found = set(factors_of(codes).tolist()) - {1}
        assert found
        for factor in found:
            reply = next(row["text"] for row in TEXTS if row["weight"] == factor)
            assert tokenizer.decode(ids[factors_of(codes) == factor]) == f"<|im_start|>assistant\n{reply}<|im_end|>\n"


def _padded(tokenizer: Any, side: str) -> Any:
    tokenizer.padding_side = side
    return tokenizer


def test_rows_that_become_tokens_with_a_batch_are_refused(prepare: Prepare) -> None:
    with pytest.raises(ConfigError, match="nothing reads the weights and marks") as raised:
        prepare(SUMS, {"type": "alpaca"}, skip_prepare_dataset=True, remove_unused_columns=False)
    assert raised.value.problems[0].path == "skip_prepare_dataset"


def test_rows_that_another_plugin_makes_are_refused(settings_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dwl_plugin.hosts import axolotl

    monkeypatch.setattr(axolotl, "_loaded_elsewhere", lambda plugin: True)
    monkeypatch.setattr(axolotl, "read_what_is_prepared", lambda: None)
    settings = settings_of(SUMS, {"type": "alpaca"})
    with pytest.raises(ConfigError, match="another plugin makes the rows"):
        harness.train(settings)
    harness.train({**settings, "dwl": {"reduction": "weighted_mean"}, "max_steps": 1})


def test_what_the_host_evaluates_on_says_what_it_counts(settings_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`axolotl evaluate` asks no plugin for its rows."""
    import csv

    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.evaluate import do_evaluate
    from axolotl.utils.dict import DictDefault

    monkeypatch.setattr("sys.argv", ["axolotl"])
    losses = []
    for weight in (1.0, 0.5):
        rows = [{**row, "weight": weight} for row in SUMS]
        settings = settings_of(rows, {"type": "alpaca"}, val_set_size=8, dataset_prepared_path=str(tmp_path / str(weight)))
        do_evaluate(load_cfg(DictDefault(settings)), TrainerCliArgs())
        with (tmp_path / "run" / "eval_summary.csv").open() as table:
            losses.append(next(float(line["validation"]) for line in csv.DictReader(table) if line["metric"] == "loss"))
    assert losses[1] == pytest.approx(losses[0] / 2, rel=1e-6)


def test_what_is_preprocessed_is_what_is_trained(settings_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from axolotl.cli.preprocess import do_cli
    from axolotl.utils.data import shared

    settings = settings_of(SUMS, {"type": "alpaca"}, max_steps=1)
    config = tmp_path / "config.yml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.setenv("AXOLOTL_IS_PREPROCESS", "1")
    monkeypatch.setattr("sys.argv", ["axolotl"])
    do_cli(str(config))
    monkeypatch.delenv("AXOLOTL_IS_PREPROCESS")
    kept = sorted(path.name for path in (tmp_path / "prepared").iterdir())
    read: list[Any] = []
    load = shared.load_from_disk
    monkeypatch.setattr(shared, "load_from_disk", lambda path: read.append(path) or load(path))
    run = harness.train(settings)
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == kept
    assert len(read) == 1
    assert DATA_CODES in run.trainer.train_dataset.column_names
