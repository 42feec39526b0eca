"""What `dwl suggest` proposes of counts: rows of ten tokens, drawn by hand, and the block that a person would have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from dwl_plugin.cli.suggest.block import block_lines
from dwl_plugin.cli.suggest.counting import Key, Matches
from dwl_plugin.cli.suggest.rules import Proposal, against, choose, propose
from dwl_plugin.config import parse
from dwl_plugin.config.pack_files import shipped_packs
from dwl_plugin.errors import DWLError

E, A, N, S = (Key("end_of_turn", "end_of_turn"), *(Key("tool_call", name) for name in ("arguments", "name", "syntax")))
CODE, JSON = Key("code", "code"), Key("json", "syntax")
PICTURES = {
    # Each letter is one target; E ends a turn.
    "calls": {E: "E", A: "a", N: "n", S: "s", JSON: "an"},
    "json in fences": {E: "E", JSON: "j", CODE: "j", Key("code", "fence"): "f"},
    "maths": {E: "E", Key("math_answer", "answer"): "A", Key("numbers", "number"): "9A"},
    "thoughts": {E: "E", Key("reasoning", "thinking"): "t", Key("reasoning", "tags"): "g"},
}


def matches(*rows: str, of: str, own: Mapping[str, str] | None = None, times: int = 1) -> Matches:
    text = np.array(list("".join(rows) * times))
    row_N = np.repeat(np.arange(len(rows) * times), [len(row) for row in rows] * times)
    classes = {**{Key("", name): letters for name, letters in (own or {}).items()}, **PICTURES[of]}
    return Matches({key: np.isin(text, list(letters)) for key, letters in classes.items()}, row_N, len(rows) * times, {})


def proposed(found: Matches, raw: dict[str, Any] | None = None, p: Mapping[str, float] | None = None, weigh: str = "") -> Proposal:
    specs = (raw or {}).get("dwl", {}).get("classes", {})
    proposal = propose(found, choose(found, specs)[0], raw or {}, p, weigh)
    assert parse(proposal.keys) is not None
    return proposal


CALLS = ("ssnsaassE.", "........wE")
"""Three parts of a call beside a reply in words: of 20 tokens 2 end, 2 + 1 + 5 are a call, 10 are words."""


def test_the_whole_block_as_it_is_printed() -> None:
    lines = block_lines(proposed(matches(*CALLS, of="calls")), 2)
    assert lines == [
        "loss: nll                                         # plain SFT, measured by class: nothing here speaks for weights",
        "dwl:",
        "  classes:",
        "    end_of_turn: {pack: end_of_turn.end_of_turn}  # 2 tokens (10.0%) in 2 of 2 rows",
        "    arguments: {pack: tool_call.arguments}        # 2 tokens (10.0%) in 1 of 2 rows",
        "    name: {pack: tool_call.name}                  # 1 tokens (5.0%) in 1 of 2 rows",
        "    syntax: {pack: tool_call.syntax}              # 5 tokens (25.0%) in 1 of 2 rows",
    ]


def test_a_weight_on_calls_takes_their_end_along() -> None:
    keys = proposed(matches(*CALLS, of="calls"), weigh="tool_call").keys
    assert keys["loss"] == "dwl"
    assert keys["dwl"]["reduction"] == "weighted_mean"
    assert keys["dwl"]["alpha"] == {"end_of_turn": 2, "arguments": 2, "name": 2, "syntax": 2, "rest": 1}


def test_what_a_weight_does_is_said_in_numbers() -> None:
    why = {line.key: line.why for line in proposed(matches(*CALLS, of="calls"), weigh="tool_call").why}
    # 10 of 20 tokens have 2: 20 of 30 parts of the weight, 20/30 · 2 = 1.33 times and 0.67 times what a token counts
    assert why["alpha"] == "above 1: 50% of tokens, 67% of weight; a token 1.33×, with 1 0.67×"


def test_a_rare_answer_needs_more_than_twice() -> None:
    row = "." * 20 + "99" + "." * 17 + "A"
    assert proposed(matches(row + "E", of="maths", times=5), weigh="math_answer").keys["dwl"]["alpha"] == {
        "end_of_turn": 2,
        "answer": 8,
        "rest": 1,
    }


def test_thoughts_are_what_counts_less_not_what_counts_more() -> None:
    found = matches("gttttttg..E", of="thoughts")
    assert proposed(found, weigh="reasoning").keys["dwl"]["alpha"] == {"end_of_turn": 2, "thinking": 1, "tags": 2, "rest": 2}


@pytest.mark.parametrize(
    ("rows", "pack", "why"),
    [
        (("ssnsaassE",), "tool_call", "100% of the targets are `tool_call`"),
        (("........wE",), "tool_call", "not in what the rows speak for. Packs that are: end_of_turn"),
    ],
)
def test_where_there_is_nothing_to_weigh(rows: tuple[str, ...], pack: str, why: str) -> None:
    with pytest.raises(DWLError, match=why):
        proposed(matches(*rows, of="calls"), weigh=pack)


def test_fenced_json_is_json_and_its_fences_code() -> None:
    chosen, _ = choose(matches("f...jjjjfE", of="json in fences"), {})
    assert [(entry.name, entry.found) for entry in chosen] == [("end_of_turn", (1, 1)), ("syntax", (4, 1)), ("fence", (2, 1))]
    half = Matches({**matches("jjjjkkkkfE", of="json in fences").matched, CODE: np.arange(10) < 8}, np.zeros(10, int), 1, {})
    assert [str(entry.key) for entry in choose(half, {})[0]] == ["end_of_turn.end_of_turn", "code.code", "code.fence"]


def test_why_the_other_packs_are_left_out() -> None:
    found = matches("ss.9.A9saE", of="maths")
    left = dict(line.split(": ", 1) for line in choose(found, {})[1])
    assert left["tool_call"] == "matches nothing"
    assert "numbers" not in left  # two of ten
    few = matches(*["." * 21 + "9E"] * 4, of="maths")
    assert dict(line.split(": ", 1) for line in choose(few, {})[1])["numbers"] == (
        "4 tokens (4.3%) in 4 of 4 rows; 4.3% of the targets are left to it, and any text has some: not below 10%"
    )
    calls = dict(line.split(": ", 1) for line in choose(matches(*CALLS, of="calls"), {})[1])
    assert calls["json"] == "3 tokens (15.0%) in 1 of 2 rows, of which the classes above take all but 0"
    chance = matches("An........E", *["..........E"] * 99, of="maths")
    assert (
        "1 of 100 rows; in less than 2% of the rows" in dict(line.split(": ", 1) for line in choose(chance, {})[1])["math_answer"]
    )


def test_every_shipped_pack_has_a_rule() -> None:
    from dwl_plugin.cli.suggest.rules import PACKS

    assert sorted(PACKS) == shipped_packs()


P = {"end_of_turn": 0.9, "arguments": 0.8, "name": 0.8, "syntax": 0.9, "rest": 0.6, "all": 0.8}


@pytest.mark.parametrize(
    ("p", "raw", "loss", "dft"),
    [
        (None, {}, "nll", None),
        (P, {}, "dft", {"min_weight": 0.1}),
        ({**P, "all": 0.7}, {}, "dft", {"min_weight": 0.1}),
        ({**P, "all": 0.69}, {}, "nll", None),
        ({**P, "end_of_turn": 0.04}, {}, "nll", None),  # new to the model, whatever the mean
        ({**P, "rest": 0.34}, {}, "nll", None),
        (dict.fromkeys(P, float("nan")), {}, "nll", None),
        (None, {"loss": "dft"}, "dft", {"min_weight": 0.1}),
        (None, {"loss": "dft", "dft": {"exponent": 0.5}}, "dft", {"exponent": 0.5, "min_weight": 0.1}),
        (None, {"loss": "dft", "dft": {"min_weight": 0.02}}, "dft", {"min_weight": 0.02}),
        ({**P, "all": 0.36}, {"loss": "dft"}, "dft", {"min_weight": 0.1}),
        ({**P, "all": 0.34}, {"loss": "dft"}, "nll", None),
        ({**P, "all": 0.69}, {"loss": "nll"}, "nll", None),
    ],
)
def test_the_loss_by_p(p: Mapping[str, float] | None, raw: dict[str, Any], loss: str, dft: dict[str, float] | None) -> None:
    keys = proposed(matches(*CALLS, of="calls"), raw, p).keys
    assert (keys["loss"], keys.get("dft")) == (loss, dft)
    assert "alpha" not in keys["dwl"]


def test_classes_of_the_config_stay_and_come_first() -> None:
    raw = {"loss": "nll", "dwl": {"data_weights": True, "classes": {"name": {"regex": "w"}, "call": {"pack": "tool_call.syntax"}}}}
    found = matches(*CALLS, of="calls", own={"name": "w", "call": "s"})
    proposal = proposed(found, raw)
    assert list(proposal.keys["dwl"]["classes"].items()) == [
        ("name", {"regex": "w"}),
        ("call", {"pack": "tool_call.syntax"}),
        ("end_of_turn", {"pack": "end_of_turn.end_of_turn"}),
        ("arguments", {"pack": "tool_call.arguments"}),
        ("tool_call_name", {"pack": "tool_call.name"}),
    ]
    assert proposal.keys["dwl"]["data_weights"] is True
    assert proposal.counts == (1, 5, 2, 2, 1, 9)
    assert [line.split(":")[0] for line in choose(found, proposal.keys["dwl"]["classes"])[1]] == [
        *("reasoning", "math_answer", "code", "json", "numbers", "markdown")
    ]
    again = proposed(found, proposal.keys, weigh="tool_call")  # what was written is known as what it is
    assert again.keys["dwl"]["alpha"] == {"name": 1, "call": 2, "end_of_turn": 2, "arguments": 2, "tool_call_name": 2, "rest": 1}


def test_an_end_that_loses_gets_its_alpha_and_the_rest_of_the_block_stays() -> None:
    dwl = {"classes": {"call": {"regex": "[san]"}}, "reduction": "weighted_mean", "alpha": {"call": 5, "rest": 1}}
    raw = {"loss": "dwl", "dwl": dwl}
    block = parse(raw)
    assert block is not None
    found = matches(*CALLS, of="calls", own={"call": "san"})
    proposal = against(raw, block, {"call": 1.92, "rest": 0.37}, found)  # α 1 / 0.37 = 2.7027 makes it 1, and no less
    assert proposal.keys["dwl"]["classes"] == {"end_of_turn": {"pack": "end_of_turn.end_of_turn"}, "call": {"regex": "[san]"}}
    assert proposal.keys["dwl"]["alpha"] == {"end_of_turn": 2.8, "call": 5, "rest": 1}
    assert proposal.counts == (2, 8, 10)
    assert any("in `rest`, where a token counts 0.37×" in line for line in proposal.advice)


@pytest.mark.parametrize(
    ("changes", "one_token", "said"),
    [
        ({}, {"call": 2.0, "rest": 1.0}, ""),
        ({}, {"call": 1.0, "rest": 0.5}, ""),
        ({"schedule": {"type": "linear", "to": {"call": 1, "rest": 1}}}, {"call": 2.0, "rest": 0.5}, "add `end_of_turn"),
        ({"reduction": "class_mean"}, {"call": 2.0, "rest": 0.5}, "add `end_of_turn"),
        ({"classes": {"call": {"regex": "E"}}}, {"call": 0.5, "rest": 2.0}, "give `call` more"),
    ],
)
def test_what_is_only_said_of_a_block_with_weights(changes: dict[str, Any], one_token: dict[str, float], said: str) -> None:
    dwl = {"classes": {"call": {"regex": "[san]"}}, "reduction": "weighted_mean", "alpha": {"call": 5, "rest": 1}} | changes
    raw = {"loss": "dwl", "dwl": dwl}
    block = parse(raw)
    assert block is not None
    own = "E" if "classes" in changes else "san"
    proposal = against(raw, block, one_token, matches(*CALLS, of="calls", own={"call": own}))
    assert proposal.keys == raw
    assert [said in line for line in proposal.advice[1:]] == ([True] if said else [])


def test_a_class_that_the_model_knows_is_named() -> None:
    advice = proposed(matches(*CALLS, of="calls"), p={**P, "syntax": 0.97}).advice
    assert [line for line in advice if "0.970" in line] == [
        "`syntax` has a mean p of 0.970: the model knows it, and a weight on it would move next to nothing"
    ]
