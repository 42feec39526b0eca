"""Word problems with their reasoning: the quickstart's data, made from a seed.

A sum is written and worked out by one function, so the text cannot disagree with the arithmetic.
"""

from __future__ import annotations

import json
import operator
import random
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

__all__ = ["Exercise", "generate", "write_jsonl"]

_NAMES = ("Ada", "Ben", "Chloe", "Dev", "Elif", "Grace", "Hugo", "Ines", "Keiko", "Liam", "Olga", "Priya", "Samir", "Zoe")
_GOODS = ("pencils", "marbles", "stickers", "apples", "postcards", "buttons", "shells", "candles", "walnuts", "stamps")
_SHOPS = ("bakery", "corner shop", "farm stall", "school fair", "flea market", "garden centre")

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


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


def _work_out(left: int | Decimal, sign: str, right: int | Decimal) -> tuple[str, Any]:
    """The sum as text, and its value."""
    assert sign != "/" or left % right == 0, "a division in a word problem has to come out even"
    value = _OPERATIONS[sign](left, right)
    return f"{left} {sign} {right} = {value}", value


def _collection(rng: random.Random) -> Exercise:
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    bags, each = rng.randint(3, 12), rng.randint(4, 25)
    lost = rng.randint(2, bags * each // 2)
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
    price = (Decimal(rng.randint(2, 15)) / 4).quantize(Decimal("0.01"))
    count = rng.randint(3, 12)
    product, cost = _work_out(price, "*", count)
    paid = (int(cost) // 10 + rng.randint(1, 2)) * 10
    difference, change = _work_out(paid, "-", cost)
    questions = (
        f"At the {shop}, {name} buys {count} {goods} at {price} dollars each and pays with {paid} dollars. "
        f"How many dollars come back?",
        f"{name} pays {paid} dollars at the {shop} for {count} {goods} that cost {price} dollars each. How much is the change?",
    )
    steps = (f"The {goods} cost {product} dollars.", f"The change is {difference} dollars.")
    return Exercise(rng.choice(questions), steps, str(change))


def _journey(rng: random.Random) -> Exercise:
    name = rng.choice(_NAMES)
    speeds, hours = (rng.randint(8, 30), rng.randint(35, 95)), (rng.randint(2, 5), rng.randint(2, 6))
    first, cycled = _work_out(speeds[0], "*", hours[0])
    second, driven = _work_out(speeds[1], "*", hours[1])
    total, distance = _work_out(cycled, "+", driven)
    questions = (
        f"{name} cycles {hours[0]} hours at {speeds[0]} km per hour and then rides a train for {hours[1]} hours at "
        f"{speeds[1]} km per hour. How many km is the whole way?",
        f"How far does {name} get with {hours[0]} hours on a bike at {speeds[0]} km/h and {hours[1]} hours on a train "
        f"at {speeds[1]} km/h?",
    )
    steps = (f"The bike covers {first} km.", f"The train covers {second} km.", f"Together that is {total} km.")
    return Exercise(rng.choice(questions), steps, str(distance))


def _sharing(rng: random.Random) -> Exercise:
    name, goods = rng.choice(_NAMES), rng.choice(_GOODS)
    friends, each, kept = rng.randint(3, 9), rng.randint(5, 24), rng.randint(2, 20)
    start = friends * each + kept
    difference, shared = _work_out(start, "-", kept)
    quotient, part = _work_out(shared, "/", friends)
    questions = (
        f"{name} keeps {kept} of {start} {goods} and splits the others evenly among {friends} friends. "
        f"How many {goods} does each friend get?",
        f"Of {start} {goods}, {kept} stay with {name}. {friends} friends share the remaining ones equally. "
        f"How many {goods} is that for each?",
    )
    steps = (f"To share: {difference} {goods}.", f"For each friend: {quotient}.")
    return Exercise(rng.choice(questions), steps, str(part))


def _saving(rng: random.Random) -> Exercise:
    name = rng.choice(_NAMES)
    start, weekly, weeks = rng.randint(10, 120), rng.randint(5, 35), rng.randint(4, 16)
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
    width, length = sorted((rng.randint(8, 40), rng.randint(5, 25)))
    bed = rng.randint(6, 38)
    product, area = _work_out(length, "*", width)
    difference, grass = _work_out(area, "-", bed)
    questions = (
        f"{name}'s garden is {length} m long and {width} m wide. A pond takes {bed} square metres. "
        f"How many square metres are left for grass?",
        f"A lawn of {length} m by {width} m loses {bed} square metres to {name}'s new flower bed. How big is the lawn now?",
    )
    steps = (f"All of it measures {product} square metres.", f"What is left: {difference}.")
    return Exercise(rng.choice(questions), steps, str(grass))


def _reading(rng: random.Random) -> Exercise:
    name = rng.choice(_NAMES)
    daily, days, rest = rng.randint(9, 45), rng.randint(3, 12), rng.randint(3, 12)
    remaining = daily * rest
    product, read = _work_out(daily, "*", days)
    pages = read + remaining
    difference, missing = _work_out(pages, "-", read)
    quotient, more = _work_out(missing, "/", daily)
    questions = (
        f"{name} reads {daily} pages a day of a book with {pages} pages. After {days} days, how many more days will it take?",
        f"A book has {pages} pages. {name} has read {daily} of them on each of {days} days. How many days are still to come?",
    )
    steps = (f"Read so far: {product} pages.", f"Still to read: {difference} pages.", f"That takes {quotient} days.")
    return Exercise(rng.choice(questions), steps, str(more))


_KINDS = (_collection, _shopping, _journey, _sharing, _saving, _garden, _reading)


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


def write_jsonl(exercises: list[Exercise], path: Path) -> None:
    """One row a line."""
    lines = (json.dumps(exercise.row(), ensure_ascii=False) + "\n" for exercise in exercises)
    path.write_text("".join(lines), encoding="utf-8")
