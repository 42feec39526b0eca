"""What the commands print alike, and text of strangers made safe for a terminal."""

from __future__ import annotations

import math
import unicodedata

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

__all__ = ["fixed", "number", "printable", "say", "short", "table_of_classes"]


def printable(text: str, keep: str = "") -> str:
    """`text` with what could drive a terminal shown by its number, as ‹1b›; but for the characters of `keep`."""
    return "".join(
        char if char in keep or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else f"‹{ord(char):02x}›" for char in text
    )


def short(text: str, letters: int) -> str:
    """`text` printable, in so many letters: of a long one its two ends, which is where names differ."""
    text = printable(text if len(text) <= 2 * letters else text[:letters] + text[-letters:])
    return text if len(text) <= letters else f"{text[: letters // 2]}…{text[-(letters // 2) :]}"


def say(console: Console, line: object) -> None:
    """Print text as it is: without markup, and wrapped by nothing but the terminal."""
    console.out(printable(str(line), keep="\n\t"), highlight=False)


def table_of_classes(title: str, show_edge: bool = True) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=show_edge)
    table.add_column("class", overflow="fold")
    return table


def number(value: float) -> str:
    return fixed(value, 3) if math.isfinite(value) else "–"


def fixed(value: float, digits: int) -> str:
    """`value` with so many digits behind the point, if that is not longer than a column."""
    return f"{value:.{digits}f}" if abs(value) < 1e6 else f"{value:.1e}"
