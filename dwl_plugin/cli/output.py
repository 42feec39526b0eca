"""What the commands print, and what they print alike. Text of strangers is never more than text."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import rich.console
from rich.box import SIMPLE_HEAD
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from dwl_plugin.errors import printable
from dwl_plugin.files import require_new, write_whole

__all__ = ["Console", "deliver", "fixed", "number", "print_json", "printable", "say", "say_list", "short", "table_of_classes"]


class Console(rich.console.Console):
    """The one way to a terminal: whatever is printed through it, nothing but our own styles and bars moves or colours anything."""

    def __init__(self, *, stderr: bool = False) -> None:
        # `datasets` puts another mapping in the place of `os.environ` now and then, and rich would keep the one before.
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, _environ=os.environ)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text, keep="\n\t"), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n\t"))


def short(text: str, letters: int) -> str:
    """`text` printable, in so many letters: of a long one its two ends, which is where names differ."""
    text = printable(text if len(text) <= 2 * letters else text[:letters] + text[-letters:])
    return text if len(text) <= letters else f"{text[: letters // 2]}…{text[-(letters // 2) :]}"


def say(console: rich.console.Console, line: object, style: str | None = None) -> None:
    """Print one line: without markup, wrapped by nothing but the terminal, and still one where a stranger's name has line ends."""
    console.out(printable(str(line), keep="\t"), style=style, highlight=False)


def say_list(console: rich.console.Console, title: str, lines: Sequence[str]) -> None:
    """Print lines below a title, which may be ""; nothing where there are none."""
    if lines:
        if title:
            say(console, title, "bold")
        for line in lines:
            say(console, f"  · {line}")
        console.print()


def deliver(text: str, out: Path | None) -> None:
    """Write a file to `out`, or to stdout, byte for byte unless that is a terminal. Raises `DWLError` if `out` is there already."""
    if out is not None:
        require_new(out)
        write_whole(out, text.encode())
    elif sys.stdout.isatty():
        Console().out(text, end="", highlight=False)
    else:
        sys.stdout.buffer.write(text.encode())


def print_json(console: rich.console.Console, data: object) -> None:
    """Print one JSON value in ASCII, which drives no terminal; null for a number that JSON does not have."""
    finite = json.loads(json.dumps(data), parse_constant=lambda name: None)
    console.print_json(data=finite, highlight=False, ensure_ascii=True)


def table_of_classes(title: str, show_edge: bool = True, *, of: str = "class") -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=show_edge)
    table.add_column(of, overflow="fold")
    return table


def number(value: float) -> str:
    return fixed(value, 3) if math.isfinite(value) else "–"


def fixed(value: float, digits: int) -> str:
    """`value` with so many digits behind the point, if that is not longer than a column."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"
