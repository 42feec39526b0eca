"""Patterns of any shape: ordinary ones are fast in long samples, and each turn is searched for itself."""

from __future__ import annotations

import time

import pytest
import regex
from hypothesis import given, reject, settings, strategies as st

from dwl_plugin.classes import PatternTooSlowError, build_labeller
from dwl_plugin.config.classes import RegexClass
from tests.classes.little_tokenizers import END, byte_level, encode


@pytest.mark.parametrize(
    "pattern", [r"\d[\d,]*(?:\.\d+)?", r"\b(?:so|then)\b", r"[A-Z][a-z]+", r"\$\d+(?:\.\d\d)?", r"(?i)the|a", r"\w+?"]
)
def test_ordinary_patterns_are_far_from_the_limit_in_a_long_sample(pattern: str) -> None:
    labeller = build_labeller({"c": RegexClass(regex=pattern)}, byte_level())
    ids = encode(byte_level(), "So 1,234.5 apples are $5 then, aaaa 17 The " * 5_000)  # 200,000 characters
    began = time.process_time()
    assert {0, 1} == set(labeller(ids, ids).tolist())
    assert time.process_time() - began < 2


PATTERNS = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", r"\w", r"\s", r"\b", "^", "$", "[^a]", "x", " "]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda them: f"(?:{'|'.join(them)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{1,3}", "*+"])).map(lambda it: f"(?:{it[0]}){it[1]}"),
        inner.map(lambda it: f"(?={it})"),
        inner.map(lambda it: f"(?>{it})"),
    ),
    max_leaves=6,
)
TEXTS = st.text("ab x!\n", max_size=40)


@settings(max_examples=150, deadline=None)
@given(pattern=PATTERNS, texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_each_piece_between_special_tokens_is_searched_for_itself(pattern: str, texts: list[str]) -> None:
    labeller = build_labeller({"c": RegexClass(regex=pattern)}, byte_level())
    pieces = [encode(byte_level(), text) for text in texts]
    end = encode(byte_level(), END)
    ids = [token for piece in pieces for token in [*piece, *end]]
    try:
        found = labeller(ids, ids).tolist()
        alone = [labeller(piece, piece).tolist() for piece in pieces]
    except PatternTooSlowError:
        reject()
    assert found == [index for piece in alone for index in [*piece, 1]]
    expected = [any(match.end() > match.start() for match in regex.finditer(pattern, text)) for text in texts]
    assert [0 in piece for piece in alone] == expected
