"""Literal little samples: which token is in which class, and which config is refused."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch

from dwl_plugin.classes import FOLLOWS, Labeller, build_labeller, empty_class_problems, survey
from dwl_plugin.config import ClassConfig
from dwl_plugin.config.classes import BetweenClass, PositionClass, RegexClass, TokenIdsClass, TokenRegexClass, TokensClass
from dwl_plugin.errors import ConfigError, DWLError
from dwl_plugin.run.collate import LabellingCollator
from dwl_plugin.values import Overlap
from tests.classes.little_tokenizers import END, START, THINK, UNTHINK, byte_level, encode, sentencepiece

PROMPT = f"{START}user\nhello 7{END}\n{START}assistant\n"


def sample(prompt: str, answer: str, tokenizer: Any = None) -> tuple[list[int], list[int]]:
    """Ids and labels of a masked prompt and a trained answer."""
    tokenizer = tokenizer or byte_level()
    before, after = encode(tokenizer, prompt), encode(tokenizer, answer)
    return before + after, [-100] * len(before) + after


def label(ids: list[int], labels: list[int], **classes: ClassConfig) -> list[tuple[str, str]]:
    """(text, class) of each target."""
    tokenizer = byte_level()
    labeller = build_labeller(classes, tokenizer)
    found = labeller(ids, labels)
    assert [label == -100 for label in labels] == (found == -100).tolist()
    return [(tokenizer.decode([ids[t]]), labeller.names[found[t]]) for t in np.flatnonzero(found != -100)]


def members(name: str, labelled: list[tuple[str, str]]) -> str:
    """The text of one class's tokens."""
    return "".join(text for text, owner in labelled if owner == name)


def test_tokens_that_overlap_a_match_are_members() -> None:
    ids, labels = sample(PROMPT, "the answer is 1,234.5 apples 7")
    labelled = label(ids, labels, number=RegexClass(regex=r"\d[\d,]*(?:\.\d+)?"))
    assert members("number", labelled).strip() == "1,234.57"


def test_only_targets_are_classified() -> None:
    ids, labels = sample("7 apples ", "are")
    assert members("rest", label(ids, labels, number=RegexClass(regex=r"\d|apples"))) == "are"


def test_every_byte_of_a_character_split_over_tokens() -> None:
    ids, labels = sample("", "a🍉b")
    assert len(ids) > 3
    found = build_labeller({"melon": RegexClass(regex="🍉")}, byte_level())(ids, labels)
    assert found.tolist() == [1] + [0] * (len(ids) - 2) + [1]


def test_a_sample_cut_inside_a_character_keeps_its_other_classes() -> None:
    ids, labels = sample("", "12 🍉")
    found = build_labeller({"number": RegexClass(regex=r"\d+")}, byte_level())
    for stop in range(2, len(ids)):
        assert found(ids[:stop], labels[:stop]).tolist() == found(ids, labels)[:stop].tolist()


def test_group_selects_a_part_of_the_match() -> None:
    ids, labels = sample("", "so #### 72")
    labelled = label(ids, labels, final=RegexClass(regex=r"####\s*(.+)$", group=1))
    assert members("final", labelled).strip() == "72"
    assert "####" in members("rest", labelled)


def test_a_group_that_took_no_part_and_a_match_without_length_select_nothing() -> None:
    ids, labels = sample("", "aaa 1")
    assert members("c", label(ids, labels, c=RegexClass(regex=r"(x)?a", group=1))) == ""
    assert members("c", label(ids, labels, c=RegexClass(regex=r"x*"))) == ""


@pytest.mark.parametrize(("pattern", "expected"), [(r"^\w+", "one"), (r"\d$", "1"), (r"one.*two", "")])
def test_a_turn_ends_at_a_special_token(pattern: str, expected: str) -> None:
    one, special, two = encode(byte_level(), "one 1"), encode(byte_level(), END), encode(byte_level(), "two 2")
    ids = one + special + two
    labelled = label(ids, ids, c=RegexClass(regex=pattern))
    assert members("c", labelled[: len(one)]).strip() == expected
    assert labelled[len(one)] == (END, "rest")


def test_a_hole_in_the_labels_ends_a_turn() -> None:
    ids = encode(byte_level(), "1") + encode(byte_level(), "x") + encode(byte_level(), "2")
    labelled = label(ids, [ids[0], -100, ids[2]], c=RegexClass(regex=r"^\d$"))
    assert labelled == [("1", "c"), ("2", "c")]


def test_an_added_token_that_is_not_special_is_text() -> None:
    ids, labels = sample("", f"{THINK}x{UNTHINK}")
    assert members("c", label(ids, labels, c=RegexClass(regex=r"<think>x"))) == f"{THINK}x"


def test_between_opens_in_the_prompt() -> None:
    ids, labels = sample(f"{PROMPT}{THINK}", f"abc{UNTHINK} 42")
    assert members("think", label(ids, labels, think=BetweenClass(between=(THINK, UNTHINK)))) == f"abc{UNTHINK}"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([(f"use {THINK}\n{START}", f"the {THINK}x{UNTHINK}b")], f"{THINK}x{UNTHINK}"),
        ([(f"use {THINK}\n{START}", "the answer")], ""),
        ([(f"use {THINK} and {UNTHINK}\n{START}", f"{THINK}x{UNTHINK}b")], f"{THINK}x{UNTHINK}"),
        ([(f"{THINK}\n", f"a {THINK}b{UNTHINK}c")], f"a {THINK}b{UNTHINK}"),
        ([(f"{START}{THINK}\n", "cut off"), (f"{END}{START}", "the answer")], "cut off"),
        ([(f"{START}{THINK}\n", "cut off"), (f"{END}{THINK}\n", f"a{UNTHINK}b")], f"cut offa{UNTHINK}"),
        ([(f"use {THINK}{START}", "the"), (f"{END}{START}", f"{THINK}a{UNTHINK}b")], f"{THINK}a{UNTHINK}"),
        ([(START, f"{THINK}cut"), (f"{END}{START}", "off")], f"{THINK}cutoff"),
    ],
)
def test_what_the_prompt_only_mentions_opens_nothing(turns: list[tuple[str, str]], expected: str) -> None:
    parts = [sample(prompt, answer) for prompt, answer in turns]
    ids, labels = ([token for part in parts for token in part[which]] for which in (0, 1))
    assert members("think", label(ids, labels, think=BetweenClass(between=(THINK, UNTHINK)))) == expected


@pytest.mark.parametrize(("include", "expected"), [(True, "<b>hello</b>"), (False, "hello")])
def test_delimiters_of_several_tokens(include: bool, expected: str) -> None:
    # Apart, so that no token is shared by a delimiter and its neighbour.
    parts = [encode(byte_level(), text) for text in ("the", "<b>", "hello", "</b>", "the")]
    assert len(parts[1]) + len(parts[3]) > 2
    ids = [token_id for part in parts for token_id in part]
    config = BetweenClass(between=("<b>", "</b>"), include_delimiters=include)
    assert members("bold", label(ids, ids, bold=config)) == expected


@pytest.mark.parametrize("include", [True, False])
def test_a_token_shared_with_a_delimiter_is_the_delimiter(include: bool) -> None:
    ids, labels = sample("", "a the b")
    assert " the" in [byte_level().decode([token_id]) for token_id in ids]
    config = BetweenClass(between=("th", "b"), include_delimiters=include)
    assert (members("c", label(ids, labels, c=config)).startswith(" the")) is include


def test_an_unclosed_span_ends_with_its_sample() -> None:
    ids, labels = sample("", f"a{THINK}b")
    labeller = build_labeller({"think": BetweenClass(between=(THINK, UNTHINK))}, byte_level())
    assert labeller(ids, labels).tolist() == [1, 0, 0]
    packed = labeller.label_batch([ids * 2], [labels * 2], [[0, 1, 2] * 2], packed=True)
    assert packed.tolist() == [[1, 0, 0, 1, 0, 0]]


def test_an_opening_that_ends_a_masked_sample_does_not_lead_into_the_next() -> None:
    (first, _), (second, labels) = sample("", f"a{THINK}"), sample("", "bc")
    labeller = build_labeller({"think": BetweenClass(between=(THINK, UNTHINK))}, byte_level())
    masked = [first[0], *[-100] * (len(first) - 1)]
    positions = [*range(len(first)), *range(len(second))]
    packed = labeller.label_batch([first + second], [masked + labels], [positions], packed=True)
    assert packed.tolist() == [[*labeller(first, masked), *labeller(second, labels)]]
    assert 0 not in packed


def test_a_closing_delimiter_alone_opens_nothing() -> None:
    ids, labels = sample("", f"a{UNTHINK}b")
    assert members("think", label(ids, labels, think=BetweenClass(between=(THINK, UNTHINK)))) == ""


def test_equal_delimiters_alternate() -> None:
    ids, labels = sample("", f"a{THINK}b{THINK}c")
    assert members("c", label(ids, labels, c=BetweenClass(between=(THINK, THINK)))) == f"{THINK}b{THINK}"


def test_the_first_class_that_matches_wins() -> None:
    ids, labels = sample("", f"{THINK}7{UNTHINK}7")
    number, think = TokenRegexClass(token_regex=r"\d"), BetweenClass(between=(THINK, UNTHINK))
    assert members("number", label(ids, labels, number=number, think=think)) == "77"
    assert members("number", label(ids, labels, think=think, number=number)) == "7"


def test_token_classes() -> None:
    ids, labels = sample("", f"the 7{END}")
    classes: dict[str, ClassConfig] = {
        "control": TokensClass(tokens=(END,)),
        "digit": TokenRegexClass(token_regex=r"\s?\d"),
        "first": TokenIdsClass(token_ids=(ids[0], f"{ids[0]}-{ids[0]}")),
    }
    assert {owner: text for text, owner in label(ids, labels, **classes)}["control"] == END
    assert members("digit", label(ids, labels, **classes)) == "7"
    assert label(ids, labels, **classes)[0][1] == "first"


def test_a_token_may_be_given_by_its_text_or_its_name() -> None:
    ids = encode(byte_level(), " the")
    assert label(ids, ids, c=TokensClass(tokens=(" the",))) == [(" the", "c")]
    assert label(ids, ids, c=TokensClass(tokens=("Ġthe",))) == [(" the", "c")]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_takes_lists_arrays_and_tensors_and_changes_none(kind: Any) -> None:
    labeller = build_labeller({"n": RegexClass(regex=r"\d")}, byte_level())
    ids, labels = sample("a", "b 7")
    given = kind(ids), kind(labels)
    found = labeller(*given)
    assert found.dtype == np.int64
    assert list(map(int, given[0])) == ids
    assert list(map(int, given[1])) == labels


def test_ids_outside_the_vocabulary_are_rest() -> None:
    for config in (TokenRegexClass(token_regex=r"\d"), RegexClass(regex=r"\d")):
        assert build_labeller({"c": config}, byte_level())([-200, 10**6], [1, 1]).tolist() == [1, 1]


def test_no_tokens_and_no_targets() -> None:
    for config in (TokenRegexClass(token_regex=r"\d"), RegexClass(regex=r"\d"), BetweenClass(between=("a", "b"))):
        labeller = build_labeller({"c": config}, byte_level())
        assert labeller([], []).shape == (0,)
        assert labeller([5], [-100]).tolist() == [-100]
        assert labeller.label_batch(np.zeros((2, 0)), np.zeros((2, 0))).shape == (2, 0)
        assert labeller.label_batch([[5]], [[5]], attention_mask=[[0]]).tolist() == [[-100]]


def test_no_class_leaves_rest() -> None:
    labeller = build_labeller({}, byte_level())
    assert labeller.names == ("rest",)
    assert labeller([3, 4], [-100, 4]).tolist() == [-100, 0]


BAD_ROWS: dict[str, tuple[Any, Any, str]] = {
    "shapes that differ": ([41, 42], [41], r"\(2,\) and `labels` \(1,\) have to be of one shape.*\[41, 42\]"),
    "an array and a list": (np.array([41, 42]), [41], r"\(2,\) and `labels` \(1,\).*\[41, 42\]"),
    "no labels": ([41, 42], None, r"integers: .*None.*\[41, 42\]"),
    "a label that is none": ([41, 42], [41, None], r"integers: .*None.*\[41, 42\]"),
    "an id that is text": ([41, "x"], [41, 42], r"integers: .*'x'.*\[41, 'x'\]"),
    "an id of more than 64 bits": ([41, 2**70], [41, 42], r"integers: .*\[41, 1180591620717411303424\]"),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_row_that_cannot_be_classified_is_named(bad: str) -> None:
    ids, labels, message = BAD_ROWS[bad]
    labeller = build_labeller({"a": RegexClass(regex="a")}, byte_level())
    good = {"input_ids": [7], "labels": [7]}
    row = {"input_ids": ids, "labels": labels}
    for classify in (
        lambda: labeller(ids, labels),
        lambda: labeller.label_samples([([7], [7], None), (ids, labels, None)]),
        lambda: survey(labeller, [good, row]),
        lambda: LabellingCollator(list, labeller, packed=False)([good, row]),  # in the loader's worker
    ):
        with pytest.raises(DWLError, match=f"a row of the data cannot be classified.*{message}"):
            classify()


def test_ids_outside_the_vocabulary_and_bytes_that_are_no_character_leave_the_rest_of_a_row_as_it_is() -> None:
    labeller = build_labeller({"number": RegexClass(regex=r"\d+"), "hello": RegexClass(regex="hello")}, byte_level())
    before, after, melon = (encode(byte_level(), text) for text in ("12 ", " hello", "🍉"))
    whole = labeller(before + after, before + after).tolist()
    for strange in ([-200], [10**6], melon[:1], melon[1:2] * 3):
        ids = before + strange + after
        found = labeller(ids, ids).tolist()
        assert found == whole[: len(before)] + [2] * len(strange) + whole[len(before) :]
        assert survey(labeller, [{"input_ids": ids, "labels": ids}]).tokens == tuple(map(found[1:].count, range(3)))
    assert {0, 1, 2} <= set(whole)


def test_a_batch_of_numbered_samples_needs_no_positions() -> None:
    ids, labels = sample("", f"a{THINK}b")
    labeller = build_labeller({"think": BetweenClass(between=(THINK, UNTHINK))}, byte_level())
    found = labeller.label_batch([ids * 2], [labels * 2], attention_mask=[[1, 1, 1, 2, 2, 2]], packed=True)
    assert found.tolist() == [[1, 0, 0, 1, 0, 0]]


def test_a_packed_batch_without_boundaries_is_refused_where_text_matters() -> None:
    ids, labels = sample("", "a 7")
    with pytest.raises(DWLError, match="position_ids"):
        build_labeller({"n": RegexClass(regex=r"\d")}, byte_level()).label_batch([ids], [labels], packed=True)
    by_token = build_labeller({"n": TokenRegexClass(token_regex=r"\d")}, byte_level())
    assert by_token.label_batch([ids], [labels], packed=True).shape == (1, len(ids))


def test_pickles_with_its_answers() -> None:
    ids, labels = sample(PROMPT, f"{THINK}7{UNTHINK} 42")
    classes: dict[str, ClassConfig] = {
        "think": BetweenClass(between=(THINK, UNTHINK)),
        "number": RegexClass(regex=r"\d+"),
        "space": TokenRegexClass(token_regex=r"\s+"),
    }
    labeller = build_labeller(classes, byte_level())
    copy: Labeller = pickle.loads(pickle.dumps(labeller))
    assert copy(ids, labels).tolist() == labeller(ids, labels).tolist()


def test_a_labeller_of_token_classes_carries_no_text() -> None:
    by_token = build_labeller({"n": TokenRegexClass(token_regex=r"\d")}, byte_level())
    assert not by_token.needs_boundaries
    assert by_token.table.flat.size == 0
    assert build_labeller({"n": RegexClass(regex=r"\d")}, byte_level()).needs_boundaries


def test_ids_alone_need_no_bytes() -> None:
    class Opaque:
        all_special_ids: tuple[int, ...] = ()

        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "b": 1}

    assert build_labeller({"b": TokenIdsClass(token_ids=(1,))}, Opaque())([0, 1], [0, 1]).tolist() == [1, 0]


def problems(tokenizer: Any = None, **classes: ClassConfig) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        build_labeller(classes, tokenizer or byte_level())
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_all_problems_are_told_at_once() -> None:
    found = problems(
        words=TokensClass(tokens=("zebra", END, "apples were")),
        far=TokenIdsClass(token_ids=(1, 10**6, "300-99999999999")),
        none=TokenRegexClass(token_regex=r"zebra"),
        number=RegexClass(regex=r"\d"),
        again=RegexClass(regex=r"\d"),
    )
    assert list(found) == [
        "dwl.classes.words.tokens[0]",
        "dwl.classes.words.tokens[2]",
        "dwl.classes.far.token_ids[1]",
        "dwl.classes.far.token_ids[2]",
        "dwl.classes.none.token_regex",
        "dwl.classes.again",
    ]
    assert "'z', 'e', 'b', 'r', 'a'" in found["dwl.classes.words.tokens[0]"]
    assert "404 ids" in found["dwl.classes.far.token_ids[1]"]
    assert "`number`" in found["dwl.classes.again"]


def test_a_token_that_lacks_its_space_is_shown_with_it() -> None:
    vocabulary = byte_level().get_vocab()
    words = [name[1:] for name in vocabulary if name.startswith("Ġ") and len(name) > 4]
    word = next(word for word in words if word.isascii() and word not in vocabulary)
    assert f"did you mean ' {word}'" in problems(c=TokensClass(tokens=(word,)))["dwl.classes.c.tokens[0]"]


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        (TokenRegexClass(token_regex=r"\d|a"), TokenRegexClass(token_regex=r"\d")),
        (BetweenClass(between=("a", "b")), BetweenClass(between=("a", "b"), include_delimiters=False)),
        (RegexClass(regex=r"(a)b"), RegexClass(regex=r"(a)b", group=1)),
    ],
)
def test_a_class_that_an_earlier_one_shadows_is_refused(earlier: ClassConfig, later: ClassConfig) -> None:
    assert "`earlier`" in problems(earlier=earlier, later=later)["dwl.classes.later"]
    build_labeller({"later": later, "earlier": earlier}, byte_level())


def test_two_earlier_classes_may_shadow_together() -> None:
    found = problems(
        low=TokenRegexClass(token_regex="[0-4]"),
        high=TokenRegexClass(token_regex="[5-9]"),
        digit=TokenRegexClass(token_regex="[0-9]"),
    )
    assert "`low` and `high`" in found["dwl.classes.digit"]


def test_both_tokens_of_one_text_are_meant() -> None:
    tokenizer = sentencepiece()
    labeller = build_labeller({"c": TokensClass(tokens=("a",))}, tokenizer)
    ids = [tokenizer.get_vocab()["a"], tokenizer.get_vocab()["<0x61>"]]
    assert labeller(ids, ids).tolist() == [0, 0]


def test_the_survey_counts() -> None:
    classes: dict[str, ClassConfig] = {
        "think": BetweenClass(between=(THINK, UNTHINK)),
        "number": RegexClass(regex=r"\d"),
        "hidden": RegexClass(regex="x"),
        "never": RegexClass(regex="zebra"),
        "maybe": RegexClass(regex="okapi", allow_empty=True),
    }
    labeller = build_labeller(classes, byte_level())
    rows = [sample(" ", f"{THINK}x7{UNTHINK} 7"), sample("a", "b")]
    found = survey(labeller, [{"input_ids": ids, "labels": labels} for ids, labels in rows])
    assert (found.rows, found.targets) == (2, sum(label != -100 for _, labels in rows for label in labels))
    assert found.tokens[:5] == (4, 1, 0, 0, 0)
    assert found.matches[:5] == (4, 2, 1, 0, 0)
    assert found.rows_without[:5] == (1, 1, 2, 2, 2)
    assert sum(found.tokens) == found.targets

    told = {problem.path: str(problem) for problem in empty_class_problems(found, classes, may_be_empty=["maybe"])}
    assert list(told) == ["dwl.classes.hidden", "dwl.classes.never"]
    assert "classes above" in told["dwl.classes.hidden"]
    assert f"{found.targets} target tokens in 2 rows" in told["dwl.classes.never"]


def test_the_survey_splits_rows_that_are_packed() -> None:
    ids, labels = sample("", f"a{THINK}b")
    labeller = build_labeller({"think": BetweenClass(between=(THINK, UNTHINK))}, byte_level())
    row = {"input_ids": ids * 2, "labels": labels * 2, "position_ids": [0, 1, 2] * 2}
    found = survey(labeller, [row])
    assert found.tokens == (4, 1)  # the second `a` is predicted by the first sample's end
    assert (found.rows, found.rows_with_targets) == (1, 2)


@pytest.mark.parametrize("overlap", ["first", "sum"])
def test_the_first_label_of_a_row_is_no_target(overlap: Overlap) -> None:
    """It is classified, and nothing predicts it; behind another sample of its row something does."""
    classes: dict[str, ClassConfig] = {"start": PositionClass(position={"first": 1}), "digit": TokenRegexClass(token_regex="[0-9]")}
    labeller = build_labeller(classes, byte_level(), overlap)
    ids, labels = sample("", "7 7")
    row = {"input_ids": ids, "labels": labels}
    found = survey(labeller, [row, row])
    assert found.tokens == found.matches == (0, 2, 2)
    assert found.unpredicted == (2, 2, 0)
    assert (found.targets, found.rows_without) == (4, (2, 0, 0))
    (problem,) = empty_class_problems(found, classes)
    assert problem.path == "dwl.classes.start"
    assert problem.message.startswith("matches nothing (looked at 4 target tokens in 2 rows")
    assert "The 2 it does match are first in their rows" in problem.hint
    behind = survey(labeller, [row, {**row, FOLLOWS: True}])
    assert (behind.tokens[0], behind.targets) == (1, 5)


def test_without_a_labeller_every_target_is_rest() -> None:
    found = survey(None, [{"input_ids": [1, 2, 3], "labels": [1, -100, 3]}, {"input_ids": [1], "labels": [1]}])
    assert (found.names, found.tokens, found.targets, found.rows_with_targets) == (("rest",), (1,), 1, 1)
