"""Every token's class against a brute-force oracle: decode every prefix to see which characters a token touches."""

from __future__ import annotations

import os
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import HealthCheck, given, reject, settings, strategies as st
from pydantic import TypeAdapter

from dwl_plugin.classes import Labeller, build_labeller
from dwl_plugin.classes.selectors import (
    AddedSelector,
    AllSelector,
    AnySelector,
    BetweenSelector,
    NotSelector,
    PositionSelector,
    RegexSelector,
    SelectorConfig,
    SpecialSelector,
    TokenIdsSelector,
    TurnSelector,
    WordsSelector,
)
from dwl_plugin.config import ClassConfig
from dwl_plugin.config.classes import Classes, RegexClass
from dwl_plugin.errors import ConfigError
from tests.classes.little_tokenizers import END, KINDS, START, decode, encode

CHARACTERS = st.one_of(
    st.sampled_from([*"0123456789aeinth .,#\n<>/", "é", "ß", "世", "界", "🤖", "👩‍👩‍👧", "ก็", "\u0301"]),
    st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
)
TEXTS = st.lists(CHARACTERS, max_size=24).map("".join)
SEGMENTS = st.lists(st.tuples(TEXTS, st.booleans(), st.booleans()), min_size=1, max_size=4)
"""Each a text, whether it is trained, and whether special tokens stand around it."""

PATTERNS = [
    (r"\d+", 0),
    (r"\w+", 0),
    (r"\s", 0),
    (r"^.", 0),
    (r"(?s).$", 0),
    (r"(\w)(\W+)", 2),
    (r"[^\x00-\x7f]", 0),
    (r"(?i)[a-h]\S*?(?=\s|$)", 0),
    (r"\b", 0),
    (r"(\d)|(\w)", 1),
    (r"\X\B", 0),
]
KEYWORDS = st.sampled_from(["a", "A", "th", "the", "1", "12", "a, b", "t h", "é", "ß", "世界", "n.", "ก็", "a\u0301", "i1"])
SELECTORS = st.recursive(
    st.one_of(
        st.sampled_from(PATTERNS).map(lambda it: {"regex": it[0], "group": it[1]}),
        st.fixed_dictionaries(
            {
                "between": st.lists(
                    st.sampled_from(["<", ">", "a", "世", "🤖", " ", "</", START, "th", "1"]), min_size=2, max_size=2
                ),
                "include_delimiters": st.booleans(),
            }
        ),
        st.fixed_dictionaries({"words": st.lists(KEYWORDS, min_size=1, max_size=5), "ignore_case": st.booleans()}),
        st.sampled_from(["first", "last", 1, 2, -2, 3]).map(lambda turn: {"turn": turn}),
        st.sampled_from([{"first": 1}, {"last": 2}, {"first": 2, "last": 1}]).map(lambda ends: {"position": ends}),
        st.sampled_from([{"special": True}, {"added": True}, {"token_ids": ["20-90"]}]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda them: {"any": them}),
        st.lists(inner, min_size=1, max_size=3).map(lambda them: {"all": them}),
        inner.map(lambda it: {"not": it}),
    ),
    max_leaves=4,
)


def as_class(selector: dict[str, Any]) -> ClassConfig:
    return TypeAdapter(Classes).validate_python({"c": {**selector, "allow_empty": True}})["c"]


CLASSES = SELECTORS.map(as_class)
EXAMPLES = int(os.environ.get("DWL_EXAMPLES", "60"))
"""Per kind of tokenizer; a long run sets more."""


def sample(tokenizer: Any, segments: list[tuple[str, bool, bool]]) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for text, trained, wrapped in segments:
        part = encode(tokenizer, START + text + END if wrapped else text)
        ids += part
        labels += part if trained else [-100] * len(part)
    return ids, labels


def touched(tokenizer: Any, ids: list[int]) -> tuple[str, list[range]]:
    """The sample's text, and the characters that each token touches."""
    text = decode(tokenizer, ids)
    whole, torn = [], []
    for stop in range(len(ids) + 1):
        prefix = decode(tokenizer, ids[:stop])
        same = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(prefix, text, strict=False))))
        whole.append(max([same, *whole[-1:]]))  # byte fallback shows all of a run of bytes as � until its end is whole
        torn.append(len(prefix) > whole[-1])
    return text, [range(whole[t], whole[t + 1] + torn[t + 1]) for t in range(len(ids))]


def expected(tokenizer: Any, classes: dict[str, ClassConfig], ids: list[int], labels: list[int]) -> list[int]:
    text, chars = touched(tokenizer, ids)
    sample = Sample(tokenizer, text, chars, ids, labels)
    result = [-100 if label == -100 else len(classes) for label in labels]
    for index, config in reversed(list(enumerate(classes.values()))):
        for t, selected in enumerate(sample.selected(config)):
            if labels[t] != -100 and selected:
                result[t] = index
    return result


class Sample:
    """One sample, and which of its tokens a selector means, told token by token."""

    def __init__(self, tokenizer: Any, text: str, chars: list[range], ids: list[int], labels: list[int]) -> None:
        self.text, self.chars, self.ids, self.labels = text, chars, ids, labels
        self.special = {encode(tokenizer, name)[-1] for name in (START, END)} | set(tokenizer.all_special_ids)
        self.added = set(getattr(tokenizer, "added_tokens_decoder", {}))

    def selected(self, config: SelectorConfig) -> list[bool]:
        every = range(len(self.ids))
        match config:
            case RegexSelector():
                spans = [
                    (begin + match.start(config.group), begin + match.end(config.group))
                    for begin, piece in self.pieces()
                    for match in regex.finditer(config.regex, piece)
                ]
                return [overlaps(chars, spans) for chars in self.chars]
            case WordsSelector():
                spans = [
                    (begin + at, begin + at + len(word))
                    for begin, piece in self.pieces()
                    for word in config.words
                    for at in range(len(piece))
                    if stands_at(word, piece, at, config.ignore_case)
                ]
                return [overlaps(chars, spans) for chars in self.chars]
            case BetweenSelector():
                spans, left_out = between_spans(config, self.text, self.turn_extents())
                return [overlaps(chars, spans) and not overlaps(chars, left_out) for chars in self.chars]
            case TurnSelector():
                turns = self.turns()
                number = {"first": 1, "last": -1}.get(str(config.turn), config.turn)
                place = int(number) - 1 if int(number) > 0 else len(turns) + int(number)
                return [0 <= place < len(turns) and t in turns[place] for t in every]
            case PositionSelector():
                first, last = config.position.first or 0, config.position.last or 0
                ends = [{*turn[:first], *turn[max(len(turn) - last, 0) :]} for turn in self.turns()]
                return [any(t in end for end in ends) for t in every]
            case SpecialSelector():
                return [token_id in self.special for token_id in self.ids]
            case AddedSelector():
                return [token_id in self.added for token_id in self.ids]
            case TokenIdsSelector():
                return [20 <= token_id <= 90 for token_id in self.ids]
            case AnySelector():
                return [any(them) for them in zip(*map(self.selected, config.any), strict=True)]
            case AllSelector():
                return [all(them) for them in zip(*map(self.selected, config.all), strict=True)]
            case NotSelector():
                return [not it for it in self.selected(config.not_)]
        raise AssertionError(config)

    def turns(self, without: frozenset[int] | set[int] = frozenset()) -> list[list[int]]:
        """The runs of targets; a token of `without` ends one and is in none."""
        runs: list[list[int]] = [[]]
        for token_id, label, t in zip(self.ids, self.labels, range(len(self.ids)), strict=True):
            if label != -100 and token_id not in without:
                runs[-1].append(t)
            else:
                runs.append([])
        return [run for run in runs if run]

    def turn_extents(self) -> list[tuple[int, int]]:
        ends = [(self.chars[run[0]].start, self.chars[run[-1]].stop) for run in self.turns()]
        return [(begin, end) for begin, end in ends if begin < end]

    def pieces(self) -> list[tuple[int, str]]:
        """Where the text of a run without special tokens begins, and the text."""
        ends = [(self.chars[run[0]].start, self.chars[run[-1]].stop) for run in self.turns(self.special)]
        return [(begin, self.text[begin:end]) for begin, end in ends]


def stands_at(word: str, text: str, at: int, ignore_case: bool) -> bool:
    """A whole word, or several."""

    def is_word(char: str) -> bool:
        return regex.fullmatch(r"\w", char) is not None

    def fold(char: str) -> str:
        return char.casefold() if ignore_case and len(char.casefold()) == 1 else char

    end = at + len(word)
    if list(map(fold, word)) != list(map(fold, text[at:end])) or (at and is_word(text[at - 1])):
        return False
    return not (end < len(text) and is_word(text[end - 1]) and is_word(text[end]))


def overlaps(chars: range, spans: list[tuple[int, int]]) -> bool:
    return any(begin < chars.stop and end > chars.start for begin, end in spans if begin < end and len(chars))


def between_spans(
    config: BetweenSelector, text: str, turns: list[tuple[int, int]]
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    opening, closing = config.between
    spans, delimiters, at = [], [], 0
    while (begin := text.find(opening, at)) >= 0:
        inner = begin + len(opening)
        end = text.find(closing, inner)
        masked = all(stop <= begin or inner <= start for start, stop in turns)
        mentioned = masked and (end < 0 or opening in text[inner:end])
        next_turn = next((turn for turn in turns if turn[0] >= inner), None)
        leads = next_turn is not None and not text[inner : next_turn[0]].strip(" \t\n\r\v\f")
        if mentioned and not leads:
            at = inner
            continue
        if mentioned and next_turn is not None and not inner <= end < next_turn[1]:
            end = at = next_turn[1]
        else:
            at = len(text) if end < 0 else end + len(closing)
        spans.append((begin, at))
        delimiters += [(begin, inner), (at if end < 0 else end, at)]
    return spans, [] if config.include_delimiters else delimiters


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(segments=SEGMENTS, classes=st.lists(CLASSES, min_size=1, max_size=3))
def test_no_token_is_in_the_wrong_class(kind: str, segments: list[tuple[str, bool, bool]], classes: list[ClassConfig]) -> None:
    tokenizer = KINDS[kind]()
    named = {f"c{n}": config for n, config in enumerate(classes)}
    labeller = labeller_of(named, tokenizer)
    ids, labels = sample(tokenizer, segments)
    assert labeller(ids, labels).tolist() == expected(tokenizer, named, ids, labels)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=EXAMPLES // 3, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(SEGMENTS, min_size=1, max_size=4), config=CLASSES, pad=st.integers(0, 3))
def test_packed_padded_and_alone_are_one(
    kind: str, rows: list[list[tuple[str, bool, bool]]], config: ClassConfig, pad: int
) -> None:
    tokenizer = KINDS[kind]()
    labeller = labeller_of({"c": config}, tokenizer)
    samples = [sample(tokenizer, row) for row in rows]
    alone = [labeller(ids, labels).tolist() for ids, labels in samples]

    flat = [[*(x for ids, _ in samples for x in ids), *[0] * pad], [*(x for _, labels in samples for x in labels)]]
    flat[1] += [-100] * pad
    positions = [*(t for ids, _ in samples for t in range(len(ids))), *range(pad)]
    packed = labeller.label_batch([flat[0]], [flat[1]], [positions], packed=True)[0].tolist()
    assert packed == [x for classes in alone for x in classes] + [-100] * pad

    width = max(len(ids) for ids, _ in samples) + pad
    for left in (False, True):
        ids_BT = [padded(ids, width, 0, left) for ids, _ in samples]
        labels_BT = [padded(labels, width, -100, left) for _, labels in samples]
        mask_BT = [padded([1] * len(ids), width, 0, left) for ids, _ in samples]
        got = labeller.label_batch(ids_BT, labels_BT, attention_mask=mask_BT)
        assert got.tolist() == [padded(classes, width, -100, left) for classes in alone]


def padded(row: list[int], width: int, value: int, left: bool) -> list[int]:
    fill = [value] * (width - len(row))
    return fill + row if left else row + fill


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_rejects_classes_off_by_one(kind: str) -> None:
    tokenizer = KINDS[kind]()
    classes: dict[str, ClassConfig] = {"number": RegexClass(regex=r"\d+")}
    ids, labels = sample(tokenizer, [("the answer is", False, True), ("hello 100 hello", True, True)])
    right, oracle = labeller_of(classes, tokenizer)(ids, labels), expected(tokenizer, classes, ids, labels)
    assert right.tolist() == oracle
    targets = np.flatnonzero(right != -100)
    for shift in (1, -1):
        mutant = right.copy()
        mutant[targets] = np.roll(right[targets], shift)
        assert mutant.tolist() != oracle


_built: dict[tuple[int, str], Labeller] = {}


def labeller_of(classes: dict[str, ClassConfig], tokenizer: Any) -> Labeller:
    key = (id(tokenizer), repr(classes))
    if key not in _built:
        try:
            _built[key] = build_labeller(classes, tokenizer, may_be_empty=classes)
        except ConfigError:  # of one draw, the second class may be the first again
            reject()
    return _built[key]
