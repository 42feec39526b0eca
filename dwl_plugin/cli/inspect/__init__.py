"""`dwl inspect`: the rows that a config trains on, coloured by class, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dwl_plugin.cli.analysis import analyse
from dwl_plugin.cli.check import class_table, print_findings
from dwl_plugin.cli.first_look import Teller
from dwl_plugin.cli.inspect.rows import shown_rows
from dwl_plugin.cli.inspect.terminal import print_rows
from dwl_plugin.cli.output import say
from dwl_plugin.files import write_whole

__all__ = ["inspect"]


def inspect(console: Console, config: Path, samples: int, html: Path | None, trust: bool) -> int:
    """The whole command; the exit status."""
    tell = Teller(console)
    found, seen = analyse(config, samples, trust, tell=tell)
    print_findings(console, found, seen, tell=tell)
    if seen is None or not seen.rows.samples:
        return found.status
    rows = shown_rows(seen)
    if html is None:
        print_rows(console, seen, rows)
        if seen.survey is not None:
            console.print(class_table(seen.survey, seen.figures))
    else:
        from dwl_plugin.cli.inspect.page import render_page

        write_whole(html, render_page(config.name, seen, rows).encode())
        say(console, f"{len(rows)} rows in {html}; it opens in any browser, without a network")
    return found.status
