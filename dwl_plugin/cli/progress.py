"""What a command tells on stderr while it works: a line or a bar that moves on a terminal, plain lines where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from dwl_plugin.cli.output import Console, say

__all__ = ["counted", "progress"]

_SAY_EVERY = 10.0
"""Seconds between two plain lines."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Say what is going on, and with what is given back what comes next."""
    console = _console()
    if console.is_terminal:
        with console.status(f"{what} …") as status:
            yield lambda what: status.update(f"{what} …")
    else:
        say(console, f"{what} …")
        yield lambda what: say(console, f"{what} …")


@contextmanager
def counted(what: str, done: int, total: int) -> Iterator[Callable[[int], None]]:
    """What is given back is told of rows that are done."""
    console = _console()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task, began = bar.add_task("", completed=done, total=total), time.monotonic()
        fresh, said = 0, began

        def advance(rows: int) -> None:
            nonlocal fresh, said
            bar.advance(task, rows)
            fresh, now = fresh + rows, time.monotonic()
            if not console.is_terminal and rows and now - said >= _SAY_EVERY:
                said, speed = now, fresh / (now - began)
                left = _minutes((total - done - fresh) / speed)
                say(console, f"{done + fresh:,} of {total:,} rows, {speed:,.1f} rows/s, {left} left")

        yield advance


def _console() -> Console:
    console = Console(stderr=True)
    console.file = sys.stderr  # also while a host's own output is kept from it
    return console


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:,.1f} rows/s")


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:,.0f} min"
