"""What came of the quickstart: its replies counted, and its two runs beside one another, class by class."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from textwrap import shorten

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.output import fixed, number, say, table_of_classes
from dwl_plugin.cli.quickstart.problems import SUM, TAKEN_BACK, holds
from dwl_plugin.cli.quickstart.replies import MOST_TOKENS
from dwl_plugin.cli.report.run import Run
from dwl_plugin.cli.report.tables import difference, percent

__all__ = ["Judged", "Row", "compared", "judge", "print_comparison", "print_replies"]

_SAME = 0.01
"""A difference in nll that is not worth a word."""


@dataclass(frozen=True)
class Judged:
    """Counts over the replies to some questions."""

    replies: int
    taken_back: int
    """Replies that take one of their sums back."""
    sums: int
    wrong_sums: int
    right_answers: int
    """Replies whose last number is the answer."""
    words: float


def judge(replies: Sequence[str], answers: Sequence[str]) -> Judged:
    sums = [SUM.findall(reply) for reply in replies]
    last = [(re.findall(r"\d+", reply) or [None])[-1] for reply in replies]
    return Judged(
        replies=len(replies),
        taken_back=sum(TAKEN_BACK in reply for reply in replies),
        sums=sum(map(len, sums)),
        wrong_sums=sum(not holds(*found) for of_reply in sums for found in of_reply),
        right_answers=sum(said == answer for said, answer in zip(last, answers, strict=True)),
        words=fmean(len(reply.split()) for reply in replies),
    )


def print_replies(console: Console, file: Path, names: Mapping[str, str]) -> None:
    """Of the models of `names`, titles of the file's keys: the first question with its replies, then the counts."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    console.print(f"\nThe first of {len(rows)} questions that are not in the data, and what the models write", style="bold")
    console.print(f"{rows[0]['question']} ({rows[0]['answer']})")
    for key, title in names.items():
        console.print(Text(f"{title}  ", style="bold").append(shorten(rows[0][key], 240, placeholder=" …"), style="not bold"))
    console.print()
    table = table_of_classes(f"Replies to {len(rows)} questions", show_edge=False, of="")
    judged = [judge([row[key] for row in rows], [row["answer"] for row in rows]) for key in names]
    for title in names.values():
        table.add_column(title, justify="right", no_wrap=True)
    for what, cells in (
        (f"that say “{TAKEN_BACK}”", [f"{each.taken_back}" for each in judged]),
        ("sums in them that are wrong", [f"{each.wrong_sums} of {each.sums}" for each in judged]),
        ("right answers", [f"{each.right_answers}" for each in judged]),
        ("words in a reply", [fixed(each.words, 0) for each in judged]),
    ):
        table.add_row(what, *cells)
    console.print(table)
    say(console, f"By greedy decoding, to {MOST_TOKENS} tokens at most. An answer is the last number of a reply.")


@dataclass(frozen=True)
class Row:
    """nll of a class before training, after plain SFT, and after the weighted run. `unwanted`: its α was 0 all along."""

    name: str
    token_share: float
    alpha: tuple[float, float]
    before: float
    sft: float
    dwl: float
    unwanted: bool = False

    @property
    def verdict(self) -> str:
        """Whether the difference is what was wished for."""
        difference = self.dwl - self.sft
        if not math.isfinite(difference) or abs(difference) < _SAME:
            return ""
        if self.unwanted:
            return "wished" if difference > 0 else "learned"
        return "better" if difference < 0 else "worse"


def compared(dwl: Run, sft: Run) -> list[Row]:
    """The classes, what they come to without those that were not wanted, and all targets."""
    rows = []
    for name in dwl.classes:
        alpha = dwl.curve(f"dwl/alpha/{name}").ends
        share = dwl.eval_curve(f"dwl/token_share/{name}").ends[1]
        rows.append(Row(name, share, alpha, dwl.nll(name)[0], sft.nll(name)[1], dwl.nll(name)[1], unwanted=not any(alpha)))
    wanted = [row for row in rows if not row.unwanted]
    left_out = ", ".join(row.name for row in rows if row.unwanted)
    total = sum(row.token_share for row in wanted)
    before, after_sft, after_dwl = (
        sum(row.token_share * nll for row, nll in zip(wanted, column, strict=True)) / total
        for column in zip(*((row.before, row.sft, row.dwl) for row in wanted), strict=True)
    )
    none = (math.nan, math.nan)
    together = [Row(f"all but {left_out}", total, none, before, after_sft, after_dwl)] if left_out else []
    return [*rows, *together, Row("all", 1.0, none, dwl.nll(None)[0], sft.nll(None)[1], dwl.nll(None)[1])]


def print_comparison(console: Console, dwl: Run, sft: Run) -> None:
    rows = compared(dwl, sft)
    table = table_of_classes("nll of each class, before training and after", show_edge=False)
    for title in ("tokens", "α", "before", "SFT", "dwl"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("dwl − SFT", no_wrap=True)
    table.columns[0].no_wrap, table.pad_edge = True, False  # so that it fits 80 columns
    for at, row in enumerate(rows):
        if at == len(dwl.classes):
            table.add_section()
        _add(table, row)
    console.print(table)
    say(console, "In nats per token of the held-out rows. Lower is better, but for what has α 0; `all` has")
    say(console, f"that in it, too. SFT counts every token alike. Differences below {_SAME} go without a word.")
    worse = ", ".join(row.name for row in rows[: len(dwl.classes)] if row.verdict == "worse")
    if worse:
        say(console, f"The price: {worse}.")


def _add(table: Table, row: Row) -> None:
    start, end = row.alpha
    alpha = "–" if math.isnan(start) else f"{start:.2g}" if start == end else f"{start:.2g} → {end:.2g}"
    told = f"{difference((row.sft, row.dwl))} {row.verdict}"
    style = {"better": "green", "wished": "green", "": ""}.get(row.verdict, "red")
    cells = (percent(row.token_share), alpha, number(row.before), number(row.sft), number(row.dwl))
    table.add_row(row.name, *cells, Text(told, style=style))
