"""Word problems with their reasoning: the quickstart's data, made from a seed.

A sum is written and worked out by one function, so the text cannot disagree with the arithmetic. The numbers are small, so that a
model of 135 million parameters can do most of the sums. `with_mistakes` then puts wrong results in, each taken back at once, as in
the reasoning that larger models write.
"""

from __future__ import annotations

import json
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["SUM", "TAKEN_BACK", "Exercise", "generate", "holds", "with_mistakes", "write_jsonl"]

TAKEN_BACK = "Wait, that is wrong."
SUM = re.compile(r"(?<![\d.])(?<![-+*/] )(\d+) ([-+*]) (\d+) = (\d+)(?!\.?\d)")
"""A sum of two whole numbers that is no part of a longer one; `holds` takes its groups."""

_NAMES = ("Ada", "Ben", "Chloe", "Dev", "Elif", "Grace", "Hugo", "Ines", "Keiko", "Liam", "Olga", "Priya", "Samir", "Zoe")
_GOODS = ("pencils", "marbles", "stickers", "apples", "postcards", "buttons", "shells", "candles", "walnuts", "stamps")
_SHOPS = ("bakery", "corner shop", "farm stall", "school fair", "flea market", "garden centre")

_OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Exercise:
    """A question, the sentences that solve it, and the number they arrive at."""

    question: str
    reasoning: tuple[str, ...]
    answer: str

    def row(self) -> dict[str, Any]:
        """The OpenAI messages form that Axolotl's `type: chat_template` reads."""
        reply = f"<think>{' '.join(self.reasoning)}</think>\n#### {self.answer}"
        return {"messages": [{"role": "user", "content": self.question}, {"role": "assistant", "content": reply}]}


def _work_out(left: int, sign: str, right: int) -> tuple[str, int]:
    """The sum as text, and its value."""
    value = _OPERATIONS[sign](left, right)
    return f"{left} {sign} {right} = {value}", value


def holds(left: str, sign: str, right: str, value: str) -> bool:
    """Whether a sum that `SUM` found is right."""
    return _OPERATIONS[sign](int(left), int(right)) == int(value)


def _collection(rng: random.Random) -> Exercise:
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    bags, each = rng.randint(2, 5), rng.randint(2, 9)
    lost = rng.randint(1, bags * each - 1)
    product, total = _work_out(bags, "*", each)
    difference, left = _work_out(total, "-", lost)
    questions = (
        f"{name} has {bags} bags with {each} {goods} in each and gives away {lost} {goods}. How many {goods} are left?",
        f"There are {each} {goods} in every one of {name}'s {bags} bags. After {lost} get lost, how many remain?",
    )
    steps = (f"The bags hold {product} {goods}.", f"Without the {lost} there are {difference}.")
    return Exercise(rng.choice(questions), steps, str(left))


def _shopping(rng: random.Random) -> Exercise:
    name, goods, shop = rng.choice(_NAMES), rng.choice(_GOODS), rng.choice(_SHOPS)
    price, count = rng.randint(2, 9), rng.randint(2, 5)
    product, cost = _work_out(price, "*", count)
    paid = (cost // 10 + rng.randint(1, 2)) * 10
    difference, change = _work_out(paid, "-", cost)
    questions = (
        f"At the {shop}, {name} buys {count} {goods} at {price} dollars each and pays with {paid} dollars. "
        f"How many dollars come back?",
        f"{name} pays {paid} dollars at the {shop} for {count} {goods} that cost {price} dollars each. How much is the change?",
    )
    steps = (f"The {goods} cost {product} dollars.", f"The change is {difference} dollars.")
    return Exercise(rng.choice(questions), steps, str(change))


def _saving(rng: random.Random) -> Exercise:
    name = rng.choice(_NAMES)
    start, weekly, weeks = rng.randint(5, 20), rng.randint(2, 9), rng.randint(2, 5)
    product, saved = _work_out(weekly, "*", weeks)
    total, money = _work_out(start, "+", saved)
    questions = (
        f"{name} has {start} dollars and saves {weekly} dollars a week. How much money is there after {weeks} weeks?",
        f"Every week for {weeks} weeks {name} adds {weekly} dollars to a jar that already held {start}. What is in the jar?",
    )
    steps = (f"Saved in {weeks} weeks: {product}.", f"With the first {start} it is {total}.")
    return Exercise(rng.choice(questions), steps, str(money))


def _garden(rng: random.Random) -> Exercise:
    name = rng.choice(_NAMES)
    width, length = rng.randint(3, 5), rng.randint(5, 9)
    bed = rng.randint(2, 9)
    product, area = _work_out(length, "*", width)
    difference, grass = _work_out(area, "-", bed)
    questions = (
        f"{name}'s garden is {length} m long and {width} m wide. A pond takes {bed} square metres. "
        f"How many square metres are left for grass?",
        f"A lawn of {length} m by {width} m loses {bed} square metres to {name}'s new flower bed. How big is the lawn now?",
    )
    steps = (f"All of it measures {product} square metres.", f"What is left: {difference}.")
    return Exercise(rng.choice(questions), steps, str(grass))


_KINDS = (_collection, _shopping, _saving, _garden)


def generate(count: int, seed: int) -> list[Exercise]:
    """`count` different exercises, kinds in turn, then shuffled; a seed gives the same list on every machine."""
    rng = random.Random(seed)
    exercises: dict[str, Exercise] = {}  # by question: one that is in train and validation would flatter the result
    while len(exercises) < count:
        exercise = _KINDS[len(exercises) % len(_KINDS)](rng)
        exercises.setdefault(exercise.question, exercise)
    result = list(exercises.values())
    rng.shuffle(result)
    return result


def with_mistakes(exercises: list[Exercise], share: float, seed: int) -> list[Exercise]:
    """In `share` of them, one of the sums comes out wrong at first, is taken back, and then comes out right."""
    rng = random.Random(seed)

    def mistaken(exercise: Exercise) -> Exercise:
        at = rng.randrange(len(exercise.reasoning))
        before, right, after = exercise.reasoning[:at], exercise.reasoning[at], exercise.reasoning[at:]
        wrong = re.sub(r"(?<== )\d+", lambda value: str(_near(int(value[0]), rng)), right)
        return replace(exercise, reasoning=(*before, f"{wrong} {TAKEN_BACK}", *after))

    return [mistaken(exercise) if rng.random() < share else exercise for exercise in exercises]


def _near(value: int, rng: random.Random) -> int:
    return value + rng.choice([offset for offset in (-10, -3, -2, -1, 1, 2, 3, 10) if value + offset > 0])


def write_jsonl(exercises: list[Exercise], path: Path) -> None:
    """One row a line."""
    lines = (json.dumps(exercise.row(), ensure_ascii=False) + "\n" for exercise in exercises)
    path.write_text("".join(lines), encoding="utf-8")
