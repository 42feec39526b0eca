"""Rows with weights and marks at every level, the configs that train them, and what the oracle makes of both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tests.hosts import harness, weights_oracle as oracle
from tests.hosts.weights_oracle import ADDED_TOKENS, CALLS, ENDS_OF_TURN, Classes, Objective, Oracle, Sample, Watch

REDUCTIONS = ("token_mean", "weighted_mean", "class_mean", "sequence_mean_token_sum", "sample_mean", "sample_sqrt")
WEIGHTS = (None, None, 0, 0.3, 1, 2.5)


# classes, in YAML and in the oracle's words

ONE: Classes = lambda token, said, data_set: "rest"  # noqa: E731


def by_token(token: int, said: Any, data_set: str) -> str:
    return "low" if 100 <= token < 200 else "high" if 200 <= token < 330 else "rest"


def by_mark(token: int, said: Any, data_set: str) -> str:
    return "critical" if "critical" in said.marks else "seventh" if "7" in said.marks else "rest"


def by_data_set(token: int, said: Any, data_set: str) -> str:
    return data_set if data_set in ("chatml_parts", "calls") else "rest"


KINDS: dict[str, tuple[Classes, dict[str, Any]]] = {
    "no classes": (ONE, {}),
    "token ids": (by_token, {"low": {"token_ids": ["100-199"]}, "high": {"token_ids": ["200-329"]}}),
    "marked": (by_mark, {"critical": {"marked": "critical"}, "seventh": {"marked": 7}}),
    "data sets": (by_data_set, {"chatml_parts": {"dataset": "chatml_parts"}, "calls": {"dataset": "calls"}}),
}
ALPHAS = ((1.0,), (0.7, 0.3), (0.55, 0.15, 0.3))


def objective_of(kind: str, reduction: str, data_set: str = "", **weights: Any) -> tuple[Objective, dict[str, Any]]:
    """For the oracle, and for the config; `data_set` is the only class of the kind of that name."""
    of_one: Classes = lambda token, said, own: "own" if own == data_set else "rest"  # noqa: E731
    class_of, classes = (of_one, {"own": {"dataset": data_set}}) if kind == "data set" else KINDS[kind]
    alpha = dict(zip((*classes, "rest"), ALPHAS[len(classes)], strict=True))
    block: dict[str, Any] = {"reduction": reduction, "alpha": alpha, "data_weights": weights or True}
    if classes:
        block["classes"] = {name: {**selector, "allow_empty": True} for name, selector in classes.items()}
    return Objective(reduction, alpha, class_of), {"loss": "dwl", "dwl": block}


# conversations

WORDS = [
    "the answer",
    " is ",
    "12",
    " and 3",
    "café",
    "naïve",
    " 👩‍👩‍👧",
    "🦊",
    "日本語",
    "e\u0301",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "I see ",
]
WORDS += ["####", " so", "\u00a0", "Ω", "make", ". ", "?", "x" * 9, "<b>", "{}", "'\"\\"]


def text_of(rng: random.Random, longest: int = 9) -> str:
    edges = ["", "", " ", "\n", "  "]
    return rng.choice(edges) + "".join(rng.choices(WORDS, k=rng.randint(0, longest))) + rng.choice(edges)


def weighed(rng: random.Random, thing: dict[str, Any], marks: list[Any]) -> dict[str, Any]:
    """With a weight and a mark, or null where others have one."""
    return {**thing, "weight": rng.choice(WEIGHTS), "mark": rng.choice(marks)}


def cut_up(rng: random.Random, text: str) -> list[dict[str, Any]]:
    """Into parts, wherever it may be."""
    cuts = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 3)))
    texts = [text[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [weighed(rng, {"type": "text", "text": text}, [None, None, "critical", "7"]) for text in texts]


def message(rng: random.Random, role: str, start: str, parts: bool) -> dict[str, Any]:
    content: Any = start + text_of(rng)
    if parts:
        content = cut_up(rng, content)
    return weighed(rng, {"role": role, "content": content}, [None, None, ["other"], ["7", "critical"]])


def conversation(rng: random.Random, index: int, roles: tuple[str, ...], parts: bool) -> dict[str, Any]:
    """One that begins with a text of its own, so that no two have the same tokens."""
    turns: list[str] = [role for role in roles if role == "system" and rng.random() < 0.5]
    for _ in range(rng.randint(1, 2)):
        turns += ["user", "assistant"]
        if "tool" in roles and rng.random() < 0.4:
            turns += ["tool", "assistant"]
    messages = [message(rng, role, "" if at else f"{index}!", parts) for at, role in enumerate(turns)]
    return weighed(rng, {"messages": messages}, [None, None, None, "critical"])


def with_calls(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    for turn in row["messages"]:
        said = turn["role"] == "assistant" and rng.random() < 0.5
        thought = cut_up(rng, "so " + text_of(rng, 3)) if said else None
        turn["reasoning_content"] = thought
        call = {"function": {"name": "look_up", "arguments": {"of": rng.randint(0, 99)}}}
        turn["tool_calls"] = [call] if said and rng.random() < 0.5 else None
    return row


def with_system(rng: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """Marked by a number where it is marked."""
    return {**row, "system": text_of(rng, 3) + ".", "mark": None if row["mark"] is None else 7}


ALL = ("system", "user", "assistant", "tool")
TWO = ("user", "assistant")
SOURCES: dict[str, dict[str, Any]] = {
    "chatml_parts": {"template": "chatml", "roles": ALL, "parts": True},
    "llama3_parts": {"template": "llama3", "roles": ALL, "parts": True, "keys": {"roles_to_train": ["assistant", "user"]}},
    "calls": {"template": "calls", "roles": ALL, "parts": False, "change": with_calls},
    "gemma_parts": {"template": "gemma", "roles": TWO, "parts": True},
    "phi_3": {"template": "phi_3", "roles": TWO, "parts": False, "keys": {"roles_to_train": ["user", "assistant"]}},
    "exaone_parts": {"template": "exaone", "roles": ALL, "parts": True, "keys": {"train_on_eos": "all"}},
    "chatml": {"template": "chatml", "roles": TWO, "parts": False, "change": with_system},
}


def jinja_of(template: str) -> str:
    from axolotl.utils.chat_templates.templates import __path__ as where

    return CALLS if template == "calls" else Path(where[0], f"{template}.jinja").read_text()


def below_nothing(thing: Any) -> Any:
    """The same with 0.3 turned into -0.3."""
    if isinstance(thing, dict):
        return {key: -0.3 if key == "weight" and value == 0.3 else below_nothing(value) for key, value in thing.items()}
    return [below_nothing(item) for item in thing] if isinstance(thing, list) else thing


Rows = dict[str, list[dict[str, Any]]]


def sources(folder: Path, count: int, seed: int = 0, negative: bool = False) -> tuple[list[dict[str, Any]], Rows]:
    """`datasets:` of the config, and the rows of each."""
    rng = random.Random(seed)
    rows: Rows = {name: [] for name in SOURCES}
    for index in range(count):
        name = list(SOURCES)[index % len(SOURCES)]
        source = SOURCES[name]
        row = conversation(rng, index, source["roles"], source["parts"])
        row = source["change"](rng, row) if "change" in source else row
        rows[name].append(below_nothing(row) if negative else row)
    entries = []
    for name, source in SOURCES.items():
        template = {"chat_template": "jinja", "chat_template_jinja": jinja_of(source["template"])}
        path = harness.write_rows(folder / f"{name}.jsonl", rows[name])
        entries.append({"path": str(path), "name": name, "type": "chat_template", **template, **source.get("keys", {})})
    return [entry for entry in entries if rows[entry["name"]]], rows


def make_words_model(folder: Path) -> None:
    """A tokenizer that has the marks of every template, and a model that is smaller still."""
    from transformers import AutoTokenizer

    harness.make_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED_TOKENS})
    tokenizer.save_pretrained(folder)
    harness.make_model(folder, vocab_size=len(tokenizer) + 3, hidden_size=16, intermediate_size=24, num_attention_heads=2)


class Conversations:
    """Rows in files, and what the oracle makes of them."""

    def __init__(self, model: Path, folder: Path, count: int, seed: int = 0, negative: bool = False) -> None:
        from transformers import AutoTokenizer

        self.model, self.folder = model, folder
        self.datasets, rows = sources(folder, count, seed, negative)
        tokenizer = AutoTokenizer.from_pretrained(model)
        known = dict(oracle.samples_of_the_host(self.config(plugins=None, dataset_prepared_path=str(folder / "stock"))))
        self.samples: list[Sample] = []
        for name, source in SOURCES.items():
            for row in rows[name]:
                ids, said = oracle.tokens_of(tokenizer, row, source["template"], jinja_of(source["template"]))
                if tuple(ids) in known:  # the host drops rows of which it trains nothing
                    self.samples.append(Sample(tuple(ids), known[tuple(ids)], tuple(said), name))
        assert len(self.samples) == len(known)

    def config(self, **changes: Any) -> dict[str, Any]:
        settings = {
            "datasets": self.datasets,
            "eot_tokens": ENDS_OF_TURN,
            "dataset_prepared_path": str(self.folder / "prepared"),
            "shuffle_merged_datasets": False,
            "micro_batch_size": 4,
            "optimizer": "sgd",
            "save_strategy": "no",
            **changes,
        }
        out = settings.pop("out", self.folder)
        return harness.config(self.model, self.folder, out, **settings)

    def agree(self, kind: str, reduction: str, steps: int, **changes: Any) -> Watch:
        return self.agree_on(*objective_of(kind, reduction, **changes.pop("weights", {})), steps, **changes)

    def agree_on(self, objective: Objective, block: dict[str, Any], steps: int, **changes: Any) -> Watch:
        watch = Watch(Oracle(self.samples, objective))
        harness.train(self.config(**block, max_steps=steps, **changes), before=watch.join)
        assert len(watch.steps) == steps
        return watch
