"""A search without a time limit: only where it is known to be short, and with the results of a search of each piece."""

from __future__ import annotations

import time

import numpy as np
import pytest
import regex
from hypothesis import given, settings, strategies as st

from dwl_plugin.classes.backtracking import conduct
from dwl_plugin.classes.masks import FAST_STEPS, InText
from dwl_plugin.classes.samples import Samples
from dwl_plugin.classes.token_bytes import TokenTable
from tests.classes.little_tokenizers import END, byte_level, encode

UNKNOWN = [
    r"(a+)+$",
    r"(a|aa)+$",
    r"(.*)*b\1$",
    r"(a*)*b",
    r"(?:a|a)*b",
    r"(x+x+)+y",
    r"(?:\w+\s?)*$",
    r"(\w)\1",
    r"a{e<=1}",
    r"(?R)?a",
    r"(?x) a+ b",
    r"[[:alpha:]]+",
    r"(?|a|b)",
    r"(?:a?){50}b",
    r"a{1,1000000}b",
    r"\X+",
    r"(?f)a",
    r"a)",
]


@pytest.mark.parametrize("pattern", UNKNOWN[:-1])
def test_what_is_not_plain_is_unknown(pattern: str) -> None:
    regex.compile(pattern)
    known = conduct(pattern)
    assert known is None or known.steps(100) > FAST_STEPS


@pytest.mark.parametrize(
    "pattern", [r"\d[\d,]*(?:\.\d+)?", r"\b(?:so|then)\b", r"[A-Z][a-z]+", r"\$\d+(?:\.\d\d)?", r"(?i)the|a", r"\w+?"]
)
def test_ordinary_patterns_need_no_limit_in_a_long_sample(pattern: str) -> None:
    known = conduct(pattern)
    assert known is not None
    assert known.steps(200_000) < FAST_STEPS


def test_a_pattern_is_read_as_it_is() -> None:
    for pattern, local, prefix in [
        (r"####\s*(.+)$", False, "####"),
        (r"<<[^>]*>>", True, "<<"),
        (r"\$\d", True, "$"),
        (r"a|b", True, ""),
        (r"ab*", True, "a"),
        (r"(?i)ab", True, ""),
        (r"(?>a)b", False, ""),
        (r"a++b", False, "a"),
        (r"(?=a)b", False, ""),
        (r"\ba", True, ""),
    ]:
        known = conduct(pattern)
        assert known is not None, pattern
        assert (known.local, known.prefix[: len(prefix)] == prefix, bool(known.prefix)) == (local, True, bool(prefix))


@pytest.mark.parametrize(
    ("pattern", "stays"),
    [
        (r"\d[\d,]*(?:\.\d+)?", True),
        (r"\b[A-Z]\w+ \s*x\b", True),
        (r"(?i)[a-z]+!", True),
        (r"a.b", False),
        (r"<[^>]*>", False),
        (r"a\W", False),
        (r"a\S+", False),
        (r"[\D]x", False),
        (r"\P{L}a", False),
        (r"a|.", False),
        (r"\ud800", False),
    ],
)
def test_what_can_match_between_two_pieces_is_known(pattern: str, stays: bool) -> None:
    known = conduct(pattern)
    assert known is not None
    assert known.stays is stays


def test_a_repetition_ends_where_the_next_character_is_none_of_it() -> None:
    def steps(pattern: str) -> float:
        known = conduct(pattern)
        assert known is not None
        return known.steps(1_000)

    assert steps(r"[ab]* [ab]* [ab]* x") < 5 * steps(r"[ab]* x")
    for pattern in (r"[ab ]* [ab ]* [ab ]* x", r"(?i)[ab]*A[ab]*B[ab]* x", r"(?i:[ab]*A[ab]*B)[ab]* x", r"[ab]*[a][ab]*[b] x"):
        assert steps(pattern) > 100 * steps(r"[ab]* x"), pattern


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
TEXTS = st.one_of(
    st.tuples(st.sampled_from(["a", "b", "ab", " a", "aab "]), st.integers(1, 400), st.sampled_from(["", "!", "x", "\n"])).map(
        lambda it: it[0] * it[1] + it[2]
    ),
    st.text("ab x!\n", max_size=40),
)


@settings(max_examples=150, deadline=None)
@given(pattern=PATTERNS, text=TEXTS)
def test_no_search_takes_longer_than_its_steps(pattern: str, text: str) -> None:
    known = conduct(pattern)
    if known is None or known.steps(len(text)) > 3e6:
        return
    compiled = regex.compile(pattern)
    began = time.process_time()
    for _ in compiled.finditer(text):
        pass
    assert time.process_time() - began < 0.5  # 3e6 steps of 10 ns take 0.03 s


@settings(max_examples=150, deadline=None)
@given(pattern=PATTERNS, texts=st.lists(TEXTS.map(lambda text: text[:60]), min_size=1, max_size=5))
def test_one_search_through_all_pieces_finds_what_a_search_of_each_does(pattern: str, texts: list[str]) -> None:
    table = TokenTable.of(byte_level())
    ids = np.array([token for text in texts for token in [*encode(byte_level(), text), *encode(byte_level(), END)]])
    samples = Samples(table, ids, np.ones(len(ids), np.bool_), np.zeros(1, np.int64))
    pieces = samples.pieces
    selector = InText("dwl.classes.c.regex", regex.compile(pattern))
    known = conduct(pattern)
    if known is None or known.steps(300) > 3e6:
        return
    expected = [
        (first + match.start(), first + match.end())
        for text, first in zip(pieces.texts, pieces.first_char.tolist(), strict=True)
        for match in regex.finditer(pattern, text)
        if match.end() > match.start()
    ]
    begin_M, end_M = selector._spans(pieces)
    found = [(begin, end) for begin, end in zip(begin_M.tolist(), end_M.tolist(), strict=True) if end > begin]
    assert found == expected
    if known.local and (joined := selector._spans_in_joined(pieces)) is not None:
        assert [pair for pair in zip(*map(np.ndarray.tolist, joined), strict=True) if pair[1] > pair[0]] == expected
