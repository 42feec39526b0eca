"""The rows of the experiments: grade-school maths and tool calls, split into train, tuning and test.

Maths is GSM8K (MIT; arXiv 2110.14168), without its calculator marks: a folder with `train.jsonl` and `test.jsonl`, or the Hub's
`openai/gsm8k`. Tool calls are the single-function questions of the Berkeley Function-Calling Leaderboard (Apache-2.0), out of the
wheel of `bfcl-eval`, each with every answer that its authors accept. Prose that nobody trains on is Python's language reference.

Functions and problems are in one split each, which `divided` asserts; questions that are asked of several functions are taken once.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BFCL = "bfcl-eval==2026.3.23"
HERE = Path(__file__).parent / ".data"
CALLS_OF = ("simple_python", "live_simple")
CALLS_OF_A_FUNCTION = 2
"""At most: some have dozens."""
LONGEST = 520
"""Characters of a row, question and answer together: some 160 tokens, so that a run is a minute or two on one core."""

Message = dict[str, str]


@dataclass(frozen=True)
class Row:
    """A question, the reply that is trained on, and what else would be right."""

    kind: str
    """`maths` or `call`"""
    question: str
    reply: str
    group: str
    """What must not be in two splits: the function of a call, the question of a problem."""
    accepted: Mapping[str, list[Any]] | None = None
    """Of a call: for every argument the values that are right; `""` among them: it may be left out."""

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.question}, {"role": "assistant", "content": self.reply}]


@dataclass(frozen=True)
class Splits:
    """Disjoint lists of rows; `prose` is for what a model forgets."""

    train: list[Row]
    tune: list[Row]
    test: list[Row]
    prose: list[str]


def splits(gsm8k: Path | None, seed: int = 0) -> Splits:
    """The same on every machine. Ends the program with a remedy where the data cannot be had."""
    return divided(_calls(_bfcl()), *_maths(gsm8k), seed, tuning_problems=200)


def divided(calls: list[Row], learn: list[Row], held_out: list[Row], seed: int, tuning_problems: int) -> Splits:
    """Functions go to test (30 %), tuning (15 %) and train, their calls with them; problems stay where their authors put them."""
    rng = random.Random(seed)
    functions = sorted({row.group for row in calls})
    rng.shuffle(functions)
    first, second = math.ceil(0.3 * len(functions)), math.ceil(0.45 * len(functions))
    of_test, of_tuning = set(functions[:first]), set(functions[first:second])
    learn, held_out = learn.copy(), held_out.copy()
    rng.shuffle(learn)
    rng.shuffle(held_out)
    parts = {
        "train": [row for row in calls if row.group not in of_test | of_tuning] + learn[tuning_problems:],
        "tune": [row for row in calls if row.group in of_tuning] + learn[:tuning_problems],
        "test": [row for row in calls if row.group in of_test] + held_out,
    }
    for one, other in itertools.combinations(parts, 2):
        shared = {row.group for row in parts[one]} & {row.group for row in parts[other]}
        assert not shared, f"{one} and {other} share {sorted(shared)[:3]}"
    for rows in parts.values():
        rng.shuffle(rows)
    return Splits(**parts, prose=_prose())


def pick(rows: Iterable[Row], **count: int) -> list[Row]:
    """The first `count` rows of each kind, in their order."""
    left, out = dict(count), []
    for row in rows:
        if left.get(row.kind, 0) > 0:
            left[row.kind] -= 1
            out.append(row)
    assert not any(left.values()), f"too few rows: {left} are missing"
    return out


def _maths(folder: Path | None) -> tuple[list[Row], list[Row]]:
    """Train and test of GSM8K: the problems that are short enough."""
    out = []
    for name in ("train", "test"):
        if folder is not None:
            rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        else:
            from datasets import load_dataset

            rows = list(load_dataset("openai/gsm8k", "main", split=name))
        made = [Row("maths", row["question"], re.sub(r"<<.*?>>", "", row["answer"]), row["question"]) for row in rows]
        out.append([row for row in made if len(row.question) + len(row.reply) <= LONGEST])
    return out[0], out[1]


def _bfcl() -> zipfile.ZipFile:
    HERE.mkdir(exist_ok=True)
    pattern = BFCL.replace("-", "_").replace("==", "-") + "*.whl"
    if not any(HERE.glob(pattern)):  # its dependencies are the clients of every provider: only the data is wanted
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(HERE), BFCL]
        if subprocess.run(command, check=False).returncode:
            sys.exit(f"{BFCL} could not be downloaded. Put its wheel into {HERE}.")
    return zipfile.ZipFile(next(HERE.glob(pattern)))


def _calls(wheel: zipfile.ZipFile) -> list[Row]:
    out: list[Row] = []
    asked, of_function = set[str](), Counter[str]()
    for name in CALLS_OF:
        read = {
            part: [json.loads(line) for line in wheel.read(f"bfcl_eval/data/{folder}BFCL_v4_{name}.json").decode().splitlines()]
            for part, folder in (("questions", ""), ("answers", "possible_answer/"))
        }
        answers = {row["id"]: row["ground_truth"] for row in read["answers"]}
        for row in read["questions"]:
            ((messages,), (function,), ((answer,),)) = row["question"], row["function"], (answers[row["id"]],)
            ((called, accepted),) = answer.items()
            if len(messages) > 1 or any(not values or isinstance(values[0], dict) for values in accepted.values()):
                continue  # a conversation, or an object whose parts have alternatives of their own
            call = {key: values[0] for key, values in accepted.items() if "" not in values}
            reply = f"<tool_call>\n{json.dumps({'name': called, 'arguments': call}, ensure_ascii=False)}\n</tool_call>"
            question = f"{_signature(function)}\n\n{messages[0]['content'].strip()}"
            plain = re.sub(r"\W+", " ", messages[0]["content"]).strip().lower()
            if len(question) + len(reply) > LONGEST or of_function[called] == CALLS_OF_A_FUNCTION or plain in asked:
                continue
            asked.add(plain)
            of_function[called] += 1
            out.append(Row("call", question, reply, called, accepted))
    return out


def _signature(function: dict[str, Any]) -> str:
    """A function as one line of text: a JSON schema of it is three times as long."""
    parameters = function["parameters"]
    required = parameters.get("required", ())
    listed = (
        f"{name}{'' if name in required else '?'}: {about['type']}" for name, about in parameters.get("properties", {}).items()
    )
    return f"Function {function['name']}({', '.join(listed)}): {function['description'].strip()}"


def _prose(count: int = 24, characters: int = 560) -> list[str]:
    """Beginnings of the longest topics of Python's language reference, as `help()` shows it."""
    from pydoc_data.topics import topics

    texts = (re.sub(r"\s+", " ", text).strip() for text in topics.values())
    return [text[:characters] for text in sorted(texts, key=lambda text: (-len(text), text))[:count]]
