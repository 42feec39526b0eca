"""The quickstart's word problems: the same everywhere, and right."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path

import pytest

from dwl_plugin.cli.quickstart import ROWS, SEED
from dwl_plugin.cli.quickstart.problems import Exercise, generate, write_jsonl

SUM = re.compile(r"(\d+(?:\.\d+)?) ([-+*/]) (\d+(?:\.\d+)?) = (-?\d+(?:\.\d+)?)")


@pytest.fixture(scope="module")
def problems() -> list[Exercise]:
    return generate(ROWS, SEED)


def reply(problem: Exercise) -> str:
    return str(problem.row()["messages"][1]["content"])


def test_a_seed_gives_the_same_problems(problems: list[Exercise]) -> None:
    assert generate(ROWS, SEED) == problems


def test_another_seed_gives_other_problems(problems: list[Exercise]) -> None:
    assert set(generate(ROWS, SEED + 1)).isdisjoint(problems[:50])


def test_the_text_of_a_seed_is_pinned() -> None:
    """A change of wording moves every number in the README: it should be a decision."""
    assert generate(3, 1)[0].row()["messages"] == [
        {"role": "user", "content": "There are 12 stamps in every one of Chloe's 4 bags. After 5 get lost, how many remain?"},
        {
            "role": "assistant",
            "content": "<think>The bags hold 4 * 12 = 48 stamps. Without the 5 there are 48 - 5 = 43.</think>\n#### 43",
        },
    ]


def test_no_question_stands_twice(problems: list[Exercise]) -> None:
    questions = [problem.question for problem in problems]
    assert len(set(questions)) == len(questions) == ROWS


def test_every_sum_in_the_text_is_right(problems: list[Exercise]) -> None:
    for problem in problems:
        sums = SUM.findall(reply(problem))
        assert len(sums) == len(problem.reasoning)
        for left, sign, right, result in sums:
            a, b = Decimal(left), Decimal(right)
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert value == Decimal(result) >= 0, problem


def test_the_answer_is_the_last_result(problems: list[Exercise]) -> None:
    for problem in problems:
        assert reply(problem).split("\n#### ")[1] == SUM.findall(reply(problem))[-1][3] == problem.answer


def test_every_reply_has_one_pair_of_tags_and_one_answer_line(problems: list[Exercise]) -> None:
    for problem in problems:
        assert re.fullmatch(r"<think>[^<>]+</think>\n#### \d+(\.\d\d)?", reply(problem)), problem


def test_every_number_of_a_question_is_used(problems: list[Exercise]) -> None:
    for problem in problems:
        assert set(re.findall(r"\d+(?:\.\d+)?", problem.question)) <= set(re.findall(r"\d+(?:\.\d+)?", reply(problem)))


def test_rows_are_messages_one_a_line(tmp_path: Path, problems: list[Exercise]) -> None:
    write_jsonl(problems[:5], tmp_path / "rows.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [problem.row() for problem in problems[:5]]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]
