"""What the columns of a trainer's data sets say of their tokens, under `apply`: the loss from all logits, a token at a time.

The oracle takes a batch apart at its `<|im_start|>`, and knows by its words which message a piece is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dwl_plugin
from dwl_plugin.errors import ConfigError, RunError
from tests.hosts.harness import CHATML, Batches, Build, logged, rows
from tests.hosts.test_apply import MASKED

Row = dict[str, Any]

CONFIG = {"loss": "nll", "dwl": {"data_weights": True}}
FACTORS = (0.5, None, 2, 0.25, 1, 0)
PARTS = CHATML.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}",
)


def conversations() -> list[list[Row]]:
    """Little sums; each message has words of its own, and a factor."""
    return [
        [{**message, "weight": FACTORS[(number + at) % len(FACTORS)]} for at, message in enumerate(row["messages"])]
        for number, row in enumerate(rows(12))
    ]


def by_words(messages: list[Row]) -> Callable[[str], float]:
    """The factor of a piece of text, which may be cut off, by the message that it is."""
    known = {f"<|im_start|>{one['role']}\n{one['content']}<|im_end|>\n": one["weight"] for one in messages}

    def of(piece: str) -> float:
        (factor,) = {factor for text, factor in known.items() if text.startswith(piece)}
        return 1.0 if factor is None else float(factor)

    return of


def by_formula(model: Any, tokenizer: Any, fed: list[dict[str, torch.Tensor]], factor: Callable[[str], float]) -> list[float]:
    """Σ v·(−log p) over the step's targets, divided by those with v ≠ 0; and these, which are no targets if v = 0."""
    start, padding = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|endoftext|>"))
    paid, targets, without = 0.0, 0, 0
    for batch in fed:
        given = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
        with torch.no_grad():
            nll_BTV = -model(**given, use_cache=False).logits.double().log_softmax(-1)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            begins = [at for at, token in enumerate(ids) if token == start]
            for begin, end in zip(begins, [*begins[1:], len(ids)], strict=True):
                own = factor(tokenizer.decode([token for token in ids[begin:end] if token != padding]))
                for at in range(max(begin, 1), end):
                    if batch["labels"][row, at] == -100:
                        without += own == 0 and ids[at] != padding
                        continue
                    assert own != 0
                    paid += own * float(nll_BTV[row, at - 1, ids[at]])
                    targets += 1
    return [paid / targets, targets, without]


def chat(arguments: Row | None = None) -> tuple[list[Row], Row]:
    return [{"messages": conversation} for conversation in conversations()], arguments or {}


def prompt_completion(arguments: Row) -> tuple[list[Row], Row]:
    return [{"prompt": conversation[:1], "completion": conversation[1:]} for conversation in conversations()], arguments


WAYS: dict[str, tuple[list[Row], Row]] = {
    "messages": chat(),
    "assistant_only_loss": chat({"assistant_only_loss": True}),
    "padding_free": chat({"padding_free": True}),
    "prompt and completion": prompt_completion({"completion_only_loss": False}),
    "completion_only_loss": prompt_completion({"completion_only_loss": True}),
    "cut off": chat({"max_length": 40}),
}


@pytest.mark.parametrize("kind", ["rows", "stream"])
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_messages_are_those_of_their_tokens(
    sft_of: Build, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, way: str, kind: str
) -> None:
    from datasets import Dataset

    apart = copy.deepcopy(model)
    data, arguments = WAYS[way]
    dataset = Dataset.from_list(data)
    monkeypatch.setattr(tokenizer, "chat_template", MASKED)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 3, **arguments}
    trainer = sft_of(settings, train_dataset=dataset if kind == "rows" else dataset.to_iterable_dataset())
    dwl_plugin.apply(trainer, CONFIG)
    batches = Batches(trainer)
    trainer.train()
    messages = [message for conversation in conversations() for message in conversation]
    loss, targets, without = by_formula(apart, tokenizer, batches.fed, by_words(messages))
    assert targets > 100
    assert without > 5
    assert logged(trainer, "loss") == pytest.approx([loss], abs=1e-5)


def test_parts_and_the_thoughts_of_a_message(sft_of: Build, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    apart = copy.deepcopy(model)
    monkeypatch.setattr(tokenizer, "chat_template", PARTS)
    parts = [("What is 1", 0.5), (" + 2?", None), ("", 9), (" Say.", 3)]
    conversation = [
        {"role": "user", "content": [{"type": "text", "text": text, "weight": weight} for text, weight in parts], "weight": None},
        {"role": "assistant", "content": [{"type": "text", "text": "3", "weight": None}], "weight": 2},
    ]
    trainer = sft_of(
        {"max_steps": 1, "gradient_accumulation_steps": 1}, train_dataset=Dataset.from_list([{"messages": conversation}])
    )
    dwl_plugin.apply(trainer, CONFIG)
    trainer.train()
    pieces = ["<|im_start|>user\n", *(text for text, _ in parts), "<|im_end|>\n", "<|im_start|>assistant\n3<|im_end|>\n"]
    factors = [1, *(1 if weight is None else weight for _, weight in parts), 1, 2]
    ids = [tokenizer(piece)["input_ids"] for piece in pieces]
    v = [factor for factor, own in zip(factors, ids, strict=True) for _ in own]
    row = torch.tensor([[token for own in ids for token in own]])
    assert tokenizer.apply_chat_template(conversation, return_dict=False) == row[0].tolist()
    with torch.no_grad():
        log_p_TV = apart(input_ids=row).logits[0].double().log_softmax(-1)
    paid = [factor * -float(log_p_TV[at, token]) for at, (token, factor) in enumerate(zip(row[0, 1:].tolist(), v[1:], strict=True))]
    assert logged(trainer, "loss") == pytest.approx([sum(paid) / len(paid)], abs=1e-5)


# columns


def tokenised(samples: list[Row]) -> list[Row]:
    """Rows with a factor of their own, one for each token, and marks."""
    out = []
    for number, sample in enumerate(samples[:8]):
        count = len(sample["input_ids"])
        own = [FACTORS[(number + at) % len(FACTORS)] for at in range(count)]
        marks = ["odd" if at % 2 else None for at in range(count)]
        out.append({**sample, "weight": 0.5 + number, "token_weight": own, "mark": marks})
    return out


class ByNumber:
    """Rows of no library's."""

    def __init__(self, data: list[Row]) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Row:
        return self.data[number]


def as_dataset(data: list[Row], kind: str) -> Any:
    from datasets import Dataset

    if kind == "by number":
        return ByNumber(data)
    dataset = Dataset.from_list(data)
    if kind == "transformed":
        return dataset.with_transform(lambda columns: columns)
    if kind == "tensors":
        return dataset.with_format("torch", columns=["input_ids", "labels", "token_weight"], output_all_columns=True)
    return dataset.to_iterable_dataset() if kind == "stream" else dataset


def expected_of(model: Any, data: list[Row]) -> float:
    paid, targets = 0.0, 0
    for row in data:
        with torch.no_grad():
            log_p_TV = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        for at in range(1, len(row["input_ids"])):
            own = row["token_weight"][at]
            factor = (1 if own is None else own) * row["weight"]
            if row["labels"][at] != -100 and factor:
                paid, targets = paid - factor * float(log_p_TV[at - 1, row["input_ids"][at]]), targets + 1
    return paid / targets


@pytest.mark.parametrize(
    ("host", "kind"),
    [("trainer_of", kind) for kind in ("rows", "stream", "by number", "transformed", "tensors")] + [("sft_of", "rows")],
)
def test_columns_of_tokenised_rows(host: str, kind: str, request: pytest.FixtureRequest, model: Any, samples: list[Row]) -> None:
    apart = copy.deepcopy(model)
    data = tokenised(samples)
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "per_device_eval_batch_size": 4}
    held_out = {"few": as_dataset(data[:3], "rows"), "one": as_dataset(data[3:4], kind)}
    parts = {"train_dataset": as_dataset(data, kind), "eval_dataset": held_out}
    trainer = request.getfixturevalue(host)({"max_steps": 1, **sizes}, **parts)
    prepared = trainer.train_dataset
    marked = {"classes": {"odd": {"marked": "odd"}}, "data_weights": True, "alpha": {"odd": 0.5, "rest": 0.5}}
    applied = dwl_plugin.apply(trainer, {"loss": "dwl", "dwl": marked})
    evaluated = trainer.evaluate()
    evaluated["eval_loss"] = trainer.evaluate(as_dataset(data[4:5], kind))["eval_loss"]
    for key, some in (("eval_few_loss", data[:3]), ("eval_one_loss", data[3:4]), ("eval_loss", data[4:5])):
        assert evaluated[key] == pytest.approx(0.5 * expected_of(apart, some), abs=1e-4)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([0.5 * expected_of(apart, data)], abs=1e-4)
    targets = [
        at for row in data for at in range(1, len(row["labels"])) if row["labels"][at] != -100 and row["token_weight"][at] != 0
    ]
    assert logged(trainer, "dwl/token_share/odd") == pytest.approx([sum(at % 2 for at in targets) / len(targets)])
    applied.detach()
    assert trainer.train_dataset is prepared
    assert trainer.eval_dataset["few"].column_names == held_out["few"].column_names or host == "sft_of"


def test_a_column_of_a_row_that_the_host_cut_off_is_cut_with_it(sft_of: Build, model: Any, samples: list[Row]) -> None:
    from datasets import Dataset

    apart = copy.deepcopy(model)
    data = [{**row, "labels": row["input_ids"]} for row in tokenised(samples)]
    shortest = min(len(row["input_ids"]) for row in data) + 2
    trainer = sft_of(
        {"max_steps": 1, "gradient_accumulation_steps": 4, "max_length": shortest}, train_dataset=Dataset.from_list(data)
    )
    dwl_plugin.apply(trainer, CONFIG)
    trainer.train()
    cut = [{key: value[:shortest] if isinstance(value, list) else value for key, value in row.items()} for row in data]
    assert logged(trainer, "loss") == pytest.approx([expected_of(apart, cut)], abs=1e-4)


def test_a_column_that_is_too_long_is_no_cut_where_the_host_cuts_nothing(sft_of: Build, samples: list[Row]) -> None:
    row = {**samples[0], "token_weight": [1.0] * (len(samples[0]["input_ids"]) + 1)}
    asked = {"max_length": len(row["input_ids"]), "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = sft_of(asked, train_dataset=as_dataset([row] * 2, "rows"))
    with pytest.raises(ConfigError, match="row 1 of train_dataset: `token_weight`: has"):
        dwl_plugin.apply(trainer, CONFIG)


# what is wrong


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("by number", {"weight": "much"}, "`weight`: has to be a number (got 'much')"),
        ("by number", {"token_weight": [1.0]}, "`token_weight`: has 1 numbers, and the row has"),
        ("rows", {"weight": float("nan")}, "`weight`: has to be finite"),
        ("rows", {"weight": -1.0}, "`weight`: is below 0"),
        ("rows", {"token_weight": [1.0]}, "`token_weight`: has 1 numbers, and the row has"),
    ],
)
def test_a_row_that_says_it_wrongly_is_named_before_training(
    trainer_of: Build, samples: list[Row], kind: str, change: Row, message: str
) -> None:
    data = [{**row, "weight": 1.0, "token_weight": [1.0] * len(row["input_ids"])} for row in samples[:5]]
    data[2] |= change
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ConfigError) as caught:
            dwl_plugin.apply(trainer_of({}, **{name: as_dataset(data, kind)}), CONFIG)
        (problem,) = caught.value.problems
        assert problem.path == name
        assert f"row 3 of {name}: {message}" in str(problem)


def test_a_message_that_says_it_wrongly_is_named_before_training(sft_of: Build) -> None:
    from datasets import Dataset

    data = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows(6)]
    data[4]["completion"] = [{**data[4]["completion"][0], "weight": float("inf")}]
    with pytest.raises(ConfigError, match=r"row 5 of train_dataset: `completion\[0\].weight`: has to be finite"):
        dwl_plugin.apply(sft_of({}, train_dataset=Dataset.from_list(data)), CONFIG)


def test_a_row_has_the_number_it_had_before_it_was_shuffled(sft_of: Build) -> None:
    from datasets import Dataset

    data = [
        {"messages": [*row["messages"][:1], row["messages"][1] | {"weight": -1.0 if number == 4 else 1.0}]}
        for number, row in enumerate(rows(6))
    ]
    for row in data:
        row["messages"][0]["weight"] = None
    trainer = sft_of({"shuffle_dataset": True, "seed": 3}, train_dataset=Dataset.from_list(data))
    assert trainer.train_dataset[4]["messages"] != data[4]["messages"]
    with pytest.raises(ConfigError, match=r"row 5 of train_dataset: `messages\[1\].weight`: is below 0"):
        dwl_plugin.apply(trainer, CONFIG)


def test_a_row_of_a_stream_that_says_it_wrongly_stops_the_run(trainer_of: Build, samples: list[Row]) -> None:
    data = [{**row, "weight": 1.0 if number < 6 else -1.0} for number, row in enumerate(samples[:8])]
    trainer = trainer_of({"max_steps": 2, "per_device_train_batch_size": 4}, train_dataset=as_dataset(data, "stream"))
    dwl_plugin.apply(trainer, CONFIG)
    with pytest.raises(RunError, match=r"the row of train_dataset that begins with .*`weight`: is below 0"):
        trainer.train()


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"packing": True, "max_length": 256}, "args.packing"),
        ({"eval_packing": True, "max_length": 256}, "args.eval_packing"),
        ({"truncation_mode": "keep_end", "max_length": 256}, "args.truncation_mode"),
    ],
)
def test_settings_that_lose_what_rows_say_are_refused(sft_of: Build, arguments: Row, path: str) -> None:
    from datasets import Dataset

    data = Dataset.from_list([{"messages": row["messages"]} for row in rows(6)])
    trainer = sft_of(arguments, train_dataset=data)
    with pytest.raises(ConfigError) as caught:
        dwl_plugin.apply(trainer, CONFIG)
    assert path in {problem.path for problem in caught.value.problems}
    dwl_plugin.apply(trainer, {"loss": "nll"}).detach()


def test_rows_that_the_user_packed_keep_what_they_say(sft_of: Build, model: Any, samples: list[Row]) -> None:
    """As the error on `packing` is not the end of it."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    apart = copy.deepcopy(model)
    data = [
        {
            "input_ids": row["input_ids"],
            "labels": row["labels"],
            "token_weight": [1.0 if w is None else w for w in row["token_weight"]],
        }
        for row in tokenised(samples)
    ]
    dataset = pack_dataset(Dataset.from_list(data), 128)
    assert len(dataset) < len(data)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 1, "per_device_train_batch_size": len(dataset), "padding_free": True}
    trainer = sft_of(settings, train_dataset=dataset)
    dwl_plugin.apply(trainer, CONFIG)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([expected_of(apart, [{**row, "weight": 1} for row in data])], abs=1e-4)


def test_rows_without_tokens_are_refused(trainer_of: Build) -> None:
    trainer = trainer_of({"remove_unused_columns": False}, train_dataset=as_dataset([{"text": "hi", "weight": 1.0}] * 4, "rows"))
    with pytest.raises(ConfigError, match="train_dataset: has rows without `input_ids`"):
        dwl_plugin.apply(trainer, CONFIG)


def test_a_data_set_by_its_name_is_no_word_of_a_trainer_s(trainer_of: Build) -> None:
    with pytest.raises(ConfigError, match="nothing here tells which data set a row is from"):
        dwl_plugin.apply(trainer_of(), {"loss": "dwl", "dwl": {"classes": {"math": {"dataset": "math"}}}})


def test_nothing_changes_where_nothing_is_read(sft_of: Build) -> None:
    trainer = sft_of()
    prepared = trainer.train_dataset
    dwl_plugin.apply(trainer, {"loss": "dwl", "dwl": {"classes": {"number": {"regex": r"\d+"}}}})
    assert trainer.train_dataset is prepared
