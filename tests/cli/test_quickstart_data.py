"""The quickstart's word problems: the same everywhere, right, and wrong where they are said to be."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import regex
import yaml

from dwl_plugin.cli.quickstart import ROWS, SEED, exercises, questions, template
from dwl_plugin.cli.quickstart.problems import SUM, Exercise, generate, holds, with_mistakes, write_jsonl

EACH_SUM = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)")
PINNED = [
    [
        {
            "role": "user",
            "content": "Samir pays 30 dollars at the school fair for 3 candles that cost 8 dollars each. How much is the change?",
        },
        {
            "role": "assistant",
            "content": "<think>The candles cost 8 * 3 = 26 dollars. Wait, that is wrong. The candles cost 8 * 3 = 24 dollars. "
            "The change is 30 - 24 = 6 dollars.</think>\n#### 6",
        },
    ],
    [
        {"role": "user", "content": "There are 6 stamps in every one of Chloe's 2 bags. After 2 get lost, how many remain?"},
        {
            "role": "assistant",
            "content": "<think>The bags hold 2 * 6 = 12 stamps. Without the 2 there are 12 - 2 = 10.</think>\n#### 10",
        },
    ],
]
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@pytest.fixture(scope="module")
def problems() -> list[Exercise]:
    return generate(ROWS, SEED)


def reply(problem: Exercise) -> str:
    return str(problem.row()["messages"][1]["content"])


def right(sum_: tuple[str, str, str, str]) -> bool:
    left, sign, by, value = sum_
    return OPERATIONS[sign](int(left), int(by)) == int(value)


def test_a_seed_gives_the_same_problems(problems: list[Exercise]) -> None:
    assert generate(ROWS, SEED) == problems
    assert exercises() == exercises()


def test_another_seed_gives_other_problems(problems: list[Exercise]) -> None:
    assert set(generate(ROWS, SEED + 1)).isdisjoint(problems[:50])


def test_the_text_of_a_seed_is_pinned() -> None:
    """A change of wording moves every number in the README: it should be a decision."""
    messages = [problem.row()["messages"] for problem in with_mistakes(generate(2, 1), 0.5, 3)]
    assert messages == PINNED


def test_no_question_stands_twice(problems: list[Exercise]) -> None:
    asked = [problem.question for problem in (*problems, *questions())]
    assert len(set(asked)) == len(asked) == ROWS + 24


def test_every_sum_is_right_before_mistakes_are_put_in(problems: list[Exercise]) -> None:
    for problem in problems:
        sums = EACH_SUM.findall(reply(problem))
        assert len(sums) == len(problem.reasoning)
        assert all(map(right, sums)), problem


def test_the_answer_is_the_last_result(problems: list[Exercise]) -> None:
    for problem in problems:
        assert reply(problem).split("\n#### ")[1] == EACH_SUM.findall(reply(problem))[-1][3] == problem.answer


def test_every_reply_has_one_pair_of_tags_and_one_answer_line() -> None:
    for problem in exercises():
        assert re.fullmatch(r"<think>[^<>]+</think>\n#### \d+", reply(problem)), problem


def test_every_number_of_a_question_is_used(problems: list[Exercise]) -> None:
    for problem in problems:
        assert set(re.findall(r"\d+", problem.question)) <= set(re.findall(r"\d+", reply(problem)))


def test_a_mistake_is_one_sum_that_is_taken_back_and_done_again(problems: list[Exercise]) -> None:
    for before, after in zip(problems, with_mistakes(problems, 1, 5), strict=True):
        (at,) = (at for at, step in enumerate(after.reasoning) if step.endswith(" Wait, that is wrong."))
        assert after.reasoning[:at] + after.reasoning[at + 1 :] == before.reasoning
        wrong, again = after.reasoning[at], after.reasoning[at + 1]
        assert not right(*EACH_SUM.findall(wrong))
        assert int(EACH_SUM.findall(wrong)[0][3]) > 0
        assert re.sub(r"= \d+", "=", wrong) == re.sub(r"= \d+", "=", again) + " Wait, that is wrong."


def test_three_of_four_rows_have_one() -> None:
    assert 0.7 * ROWS < sum("Wait" in reply(problem) for problem in exercises()) < 0.8 * ROWS


def test_the_class_of_the_config_is_the_wrong_result_and_what_takes_it_back() -> None:
    mistake = yaml.safe_load(template())["dwl"]["classes"]["mistake"]
    for problem in exercises():
        found = [match[mistake["group"]] for match in regex.finditer(mistake["regex"], reply(problem))]
        wrong = [step.split(" = ")[1] for step in problem.reasoning if "Wait" in step]
        assert found == wrong, problem
    text = "<think>The bags hold 2 * 5 = 9 stamps. Wait, that is wrong. The bags hold 2 * 5 = 10 stamps.</think>"
    assert [match[1] for match in regex.finditer(mistake["regex"], text)] == ["9 stamps. Wait, that is wrong."]


@pytest.mark.parametrize(
    ("text", "sums"),
    [
        ("so 2 * 5 = 10 stamps", [True]),
        ("12 - 5 = 6. Wait, that is wrong. 12 - 5 = 7.", [False, True]),
        ("3 + 4 + 5 = 12", []),  # `4 + 5 = 12` is not what it says
        ("3 + 14 + 5 = 22", []),
        ("1.5 * 2 = 3 and 5 + 2 = 7.5", []),
        ("5 + 2 = 7.", [True]),
    ],
)
def test_what_counts_as_a_sum(text: str, sums: list[bool]) -> None:
    assert [holds(*found) for found in SUM.findall(text)] == sums


def test_rows_are_messages_one_a_line(tmp_path: Path, problems: list[Exercise]) -> None:
    write_jsonl(problems[:5], tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [problem.row() for problem in problems[:5]]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
