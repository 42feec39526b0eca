"""Literal little samples of the selectors that look at turns, words and other selectors."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import TypeAdapter

from dwl_plugin.classes import build_labeller
from dwl_plugin.config import ClassConfig
from dwl_plugin.config.classes import Classes
from dwl_plugin.errors import ConfigError
from tests.classes.little_tokenizers import END, START, THINK, byte_level, encode, tiktoken_like


def class_by(**spec: Any) -> ClassConfig:
    return TypeAdapter(Classes).validate_python({"c": spec})["c"]


def members(ids: list[int], labels: list[int], **spec: Any) -> list[int]:
    """The places of the tokens that a class has."""
    labeller = build_labeller({"c": class_by(**spec)}, byte_level())
    return [t for t, index in enumerate(labeller(ids, labels).tolist()) if index == 0]


def text_of(text: str, **spec: Any) -> str:
    ids = encode(byte_level(), text)
    return byte_level().decode([ids[t] for t in members(ids, ids, **spec)])


RUNS = [-100, 1, 1, -100, 1, -100, -100, 1, 1, 1]
"""Targets at 1–2, 4 and 7–9."""


@pytest.mark.parametrize(
    ("turn", "places"), [("first", [1, 2]), ("last", [7, 8, 9]), (1, [1, 2]), (2, [4]), (-2, [4]), (-3, [1, 2]), (4, []), (-4, [])]
)
def test_turns_are_runs_of_targets(turn: str | int, places: list[int]) -> None:
    assert members([40] * 10, RUNS, turn=turn) == places


@pytest.mark.parametrize(
    ("ends", "places"), [({"first": 1}, [1, 4, 7]), ({"last": 2}, [1, 2, 4, 8, 9]), ({"first": 1, "last": 1}, [1, 2, 4, 7, 9])]
)
def test_positions_are_counted_in_each_turn(ends: dict[str, int], places: list[int]) -> None:
    assert members([40] * 10, RUNS, position=ends) == places


def test_turns_and_positions_stay_in_their_sample() -> None:
    ids, labels, positions = [40] * 6, [1] * 6, [0, 1, 2, 0, 1, 2]
    last = build_labeller({"c": class_by(turn="last")}, byte_level())
    assert last.needs_boundaries
    assert last.label_batch([ids], [labels], [positions], packed=True).tolist() == [[0] * 6]
    tail = build_labeller({"c": class_by(position={"last": 1})}, byte_level())
    assert tail.label_batch([ids], [labels], [positions], packed=True).tolist() == [[1, 1, 0, 1, 1, 0]]


def test_special_and_added_tokens() -> None:
    text = f"{START}the {THINK}"
    assert text_of(text, special=True) == START
    assert text_of(text, added=True) == START + THINK
    assert text_of(text, all=[{"added": True}, {"not": {"special": True}}]) == THINK


def test_selectors_of_the_vocabulary_alone_stay_a_look_up() -> None:
    spec = {"any": [{"token_ids": [3]}, {"not": {"all": [{"special": True}, {"token_regex": r"\W.*"}]}}]}
    labeller = build_labeller({"c": class_by(**spec)}, byte_level())
    assert not labeller.needs_boundaries
    assert labeller.table.flat.size == 0


@pytest.mark.parametrize(
    ("words", "ignore_case", "text", "found"),
    [
        (["the"], False, "the other, The the", "the the"),
        (["THE"], True, "the other, The the", "the The the"),
        (["the answer"], False, "so the answer, the answers", " the answer"),
        (["the", "the answer"], False, "so the answers", " the"),
        (["Straße"], True, "STRAßE strasse", "STRAßE"),
        (["a.b"], False, "a.b a.bc", "a.b"),
        (["naïve", "世界"], False, "naïve 世界 世界世", "naïve 世界"),
    ],
)
def test_words_are_whole_words(words: list[str], ignore_case: bool, text: str, found: str) -> None:
    got = text_of(text, words=words, ignore_case=ignore_case)
    assert got.split() == found.split()


def test_a_word_does_not_run_on_into_the_next_turn() -> None:
    one, two = encode(byte_level(), "the"), encode(byte_level(), "re")
    between = encode(byte_level(), END)
    assert members(one + between + two, one + between + two, words=["there"]) == []
    assert members(one + between + two, one + between + two, words=["the"]) == list(range(len(one)))


def test_not_selects_targets_only() -> None:
    assert members([40] * 10, RUNS, **{"not": {"turn": "last"}}) == [1, 2, 4]


def test_a_regex_inside_others_sees_the_same_text() -> None:
    text = "a 1 b 22"
    assert text_of(text, all=[{"regex": r"\d+"}, {"not": {"regex": r"\d\d"}}]).strip() == "1"
    assert text_of(text, any=[{"regex": r"a"}, {"words": ["b"]}]).replace(" ", "") == "ab"


def test_nested_selectors_pickle() -> None:
    ids = encode(byte_level(), "the 1 answer")
    spec = {"any": [{"words": ["the"]}, {"all": [{"regex": r"\d"}, {"turn": -1}]}]}
    labeller = build_labeller({"c": class_by(**spec)}, byte_level())
    first = labeller(ids, ids).tolist()  # before and after its tables are made
    assert pickle.loads(pickle.dumps(labeller))(ids, ids).tolist() == first
    assert first.count(0)


def problems(tokenizer: Any = None, **classes: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        build_labeller({name: class_by(**spec) for name, spec in classes.items()}, tokenizer or byte_level())
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_problems_inside_have_their_path() -> None:
    found = problems(c={"any": [{"turn": 1}, {"not": {"tokens": ["zebra"]}}, {"all": [{"token_ids": [10**6]}]}]})
    assert list(found) == ["dwl.classes.c.any[1].not.tokens[0]", "dwl.classes.c.any[2].all[0].token_ids[0]"]


def test_a_tokenizer_without_added_tokens_is_told() -> None:
    assert "none of the" in problems(tiktoken_like(), c={"added": True})["dwl.classes.c"]


DIGIT, NUMBER = {"token_regex": r"\d"}, {"regex": r"\d+"}


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({"any": [NUMBER, {"turn": "last"}]}, {"turn": -1}),
        (NUMBER, {"all": [NUMBER, {"turn": "last"}]}),
        ({"any": [DIGIT, {"token_regex": "a"}]}, DIGIT),
        ({"any": [DIGIT, NUMBER]}, {"any": [NUMBER]}),
        ({"not": {"all": [NUMBER, {"turn": 1}]}}, {"not": NUMBER}),
        ({"position": {"first": 3, "last": 1}}, {"position": {"first": 2}}),
        ({"words": ["the", "a b"], "ignore_case": True}, {"words": ["The"]}),
        ({"added": True}, {"special": True}),
    ],
)
def test_a_class_that_an_earlier_one_contains_is_refused(earlier: dict[str, Any], later: dict[str, Any]) -> None:
    assert "`earlier`" in problems(earlier=earlier, later=later)["dwl.classes.later"]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({"all": [NUMBER, {"turn": "last"}]}, NUMBER),
        ({"turn": 1}, {"any": [{"turn": 1}, {"turn": 2}]}),
        ({"not": NUMBER}, NUMBER),
        ({"words": ["The"]}, {"words": ["the"]}),
        ({"position": {"first": 2}}, {"position": {"first": 1, "last": 1}}),
    ],
)
def test_a_class_that_an_earlier_one_only_meets_is_not(earlier: dict[str, Any], later: dict[str, Any]) -> None:
    build_labeller({"earlier": class_by(**earlier), "later": class_by(**later)}, byte_level())
