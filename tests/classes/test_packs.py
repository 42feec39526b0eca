"""Every pack keeps what its own cases say, on tokenizers of every kind, and its cases would notice if it did not."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
import tiktoken
from tokenizers import AddedToken

from dwl_plugin.classes import TokenTable, build_labeller
from dwl_plugin.classes.selectors import AllSelector, AnySelector, BetweenSelector, NotSelector, RegexSelector, SelectorConfig, walk
from dwl_plugin.config.classes import BetweenClass, RegexClass
from dwl_plugin.config.pack_cases import class_of_bytes, run_case, untouched_classes
from dwl_plugin.config.pack_files import PackText, shipped_packs
from dwl_plugin.config.packs import Pack, PackCase, PackTurn, parse_pack
from tests.classes.little_tokenizers import KINDS, TiktokenLike, encode

FOLDER = Path(__file__).parents[2] / "dwl_plugin" / "classes" / "packs"
PACKS = {path.stem: parse_pack(PackText(path.stem, path.read_text(encoding="utf-8"))) for path in sorted(FOLDER.glob("*.yml"))}
each = pytest.mark.parametrize("name", PACKS)


def test_the_packs_are_these() -> None:
    assert list(PACKS) == shipped_packs()
    assert list(PACKS) == ["code", "end_of_turn", "json", "markdown", "math_answer", "numbers", "reasoning", "tool_call"]


@each
def test_a_pack_is_complete(name: str) -> None:
    pack = PACKS[name]
    assert len(pack.tests) >= 8
    assert untouched_classes(pack) == []
    assert pack.sources
    assert pack.description
    assert pack.alpha is not None
    assert set(pack.alpha) == {*pack.classes, "rest"}
    assert pack.reduction is not None
    assert not all(config.allow_empty for config in pack.classes.values()), "on data it does not suit, a pack has to say so"


@each
def test_its_cases_pass(name: str) -> None:
    for case in PACKS[name].tests:
        result = run_case(PACKS[name], case)
        assert result.found == result.expected


# The cases on tokenizers whose tokens are longer than a byte


@cache
def with_tokens(kind: str, special: tuple[str, ...], added: tuple[str, ...]) -> Any:
    """A tokenizer of a kind, with the tokens that a case asks for."""
    if kind == "tiktoken":
        return _Tiktoken(special, added)
    tokenizer = copy.deepcopy(smollm2() if kind == "smollm2" else KINDS[kind]())
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in added])
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in special], special_tokens=True)
    return tokenizer


class _Tiktoken(TiktokenLike):
    def __init__(self, special: Sequence[str], added: Sequence[str]) -> None:
        super().__init__()
        texts = [text for text in (*special, *added) if text not in self.special]
        self.special |= {text: len(self.ranks) + len(self.special) + n for n, text in enumerate(texts)}
        self.encoding = tiktoken.Encoding(
            "cases", pat_str=r"\s?\w+|\s?[^\w\s]+|\s+", mergeable_ranks=self.ranks, special_tokens=self.special
        )
        self.all_special_ids = [token_id for text, token_id in self.special.items() if text not in added]


@cache
def smollm2() -> Any:
    from rich.console import Console
    from transformers import AutoTokenizer

    from dwl_plugin.cli.quickstart.model import prepared_model

    return AutoTokenizer.from_pretrained(prepared_model(Console(stderr=True)))


def check_on(kind: str, pack: Pack, *, exact: bool) -> None:
    """A token has one of the classes that its bytes have; the text is what the tokenizer makes of the case's."""
    for case in pack.tests:
        tokenizer = with_tokens(kind, case.special, case.added)
        table = TokenTable.of(tokenizer)
        ids: list[int] = []
        labels: list[int] = []
        edges = [0]
        for turn in case.sample:
            for text, trained in ((turn.prompt, False), (turn.text, True)):
                part = encode(tokenizer, text) if text else []
                ids += part
                labels += part if trained else [-100] * len(part)
                edges.append(len(ids))
        data, offsets = table.decode(np.array(ids, np.int64), np.zeros(1, np.int64))
        texts = [data[offsets[begin] : offsets[end]].decode() for begin, end in pairwise(edges)]
        turns = tuple(PackTurn(prompt=prompt, text=text) for prompt, text in zip(texts[::2], texts[1::2], strict=True))
        if exact:
            assert turns == case.sample
        special = set(np.flatnonzero(table.special[:-1]).tolist())
        spelled = {
            "special": tuple(sorted(spellings(table, special))),
            "added": tuple(sorted(spellings(table, {tokenizer.get_vocab()[text] for text in case.added} - special))),
        }
        as_decoded = case.model_copy(update={"turns": turns, "prompt": None, "text": None, **spelled})
        _, class_of_byte = class_of_bytes(pack, as_decoded)
        found = build_labeller(pack.classes, tokenizer)(ids, labels).tolist()
        for index, begin, end in zip(found, offsets, offsets[1:], strict=False):
            assert begin == end or index in class_of_byte[begin:end], (case.text, data[begin:end])


def spellings(table: TokenTable, ids: set[int]) -> set[str]:
    """The texts of tokens, inside a sample and at its beginning."""
    rows = [row for token_id in ids for row in (token_id, table.first_in_sample_row[token_id])]
    return {table.flat[table.row_offsets[row] : table.row_offsets[row + 1]].tobytes().decode() for row in rows}


@each
@pytest.mark.parametrize("kind", KINDS)
def test_its_cases_pass_on(kind: str, name: str) -> None:
    check_on(kind, PACKS[name], exact=kind in ("byte_level", "tiktoken"))


@pytest.mark.slow
@each
def test_its_cases_pass_on_smollm2(name: str) -> None:
    check_on("smollm2", PACKS[name], exact=True)


# What the cases would notice

NEVER = r"(?!)"


def mutants(pack: Pack) -> Iterator[tuple[str, Pack]]:
    """The pack with one of its patterns or pairs of delimiters matching nothing; not those of a pack that it uses."""
    elsewhere = {
        leaf.regex
        for other in PACKS.values()
        for config in other.classes.values()
        for _, leaf in walk(config, "")
        if other is not pack and isinstance(leaf, RegexSelector)
    }
    for name, config in pack.classes.items():
        for path, leaf in walk(config, name):
            own = isinstance(leaf, BetweenSelector) or (isinstance(leaf, RegexSelector) and leaf.regex not in elsewhere)
            if own:
                yield path, pack.model_copy(update={"classes": {**pack.classes, name: without(config, leaf)}})


def without(config: Any, leaf: SelectorConfig) -> Any:
    if config is leaf:
        return (RegexClass if isinstance(config, (RegexClass, BetweenClass)) else RegexSelector)(regex=NEVER)
    if isinstance(config, (AnySelector, AllSelector)):
        inside = tuple(without(item, leaf) for item in getattr(config, config.key))
        return config.model_copy(update={config.key: inside})
    if isinstance(config, NotSelector):
        return config.model_copy(update={"not_": without(config.not_, leaf)})
    return config


@each
def test_no_pattern_can_break_unnoticed(name: str) -> None:
    unnoticed = [path for path, mutant in mutants(PACKS[name]) if all(run_case(mutant, case).passed for case in mutant.tests)]
    assert unnoticed == []


def test_a_wrong_span_fails() -> None:
    pack = PACKS["numbers"]
    case = pack.tests[0]
    for spans in ({**case.spans, "result": ("25",)}, {**case.spans, "result": ()}, {"number": case.spans["number"]}):
        assert not run_case(pack, PackCase(text=case.text, spans=spans)).passed


UNITS = [
    "{",
    "}",
    '"',
    "\\",
    "`",
    "```\n",
    "```py\n#",
    "*",
    " *a",
    "**a ",
    "_a ",
    "[",
    "[[",
    "(",
    "[a(",
    "f(x=",
    '{"a":',
    '{"name": "f", "arguments": {',
    "\\boxed{",
    "#### 1\n",
    "the answer is ",
    "答案",
    "1",
    "1,",
    "1.",
    "= ",
    "=$ ",
    "a",
    "x_",
    " ",
    "\n",
    "<think>",
    "|",
    "> ",
    "- ",
    "<function=a>",
    "<parameter=",
    "//",
    "/*",
    '"""',
    "'",
    "[a](",
    "<!--",
    "a.call(",
    "1{,}",
    "~~~\n",
]


@pytest.mark.slow
@each
def test_no_pattern_backtracks(name: str) -> None:
    """A text of one thing again and again; what takes a tenth of a second here would be seconds in a long sample."""
    patterns = {
        leaf.regex: path
        for config in PACKS[name].classes.values()
        for path, leaf in walk(config, name)
        if isinstance(leaf, RegexSelector)
    }
    slow = []
    for pattern, path in patterns.items():
        for unit in UNITS:
            text = "x = 1\n" + (unit * 4000)[:4000] + "!"
            try:
                list(regex.finditer(pattern, text, timeout=0.2))
            except TimeoutError:
                slow.append((path, unit))
    assert slow == []
