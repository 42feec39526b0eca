"""`dwl report`: what a run learned class by class, from its trainer's own log; several runs over one another.

In order: `run` (reading), `tables` (the terminal), `page` (the HTML, with `page.html.j2`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dwl_plugin.cli.report.run import read_runs
from dwl_plugin.cli.report.tables import print_comparison, print_run
from dwl_plugin.errors import DWLError
from dwl_plugin.files import write_whole

__all__ = ["report"]


def report(console: Console, folders: Sequence[Path], html: Path | None) -> None:
    """The whole command. Raises `DWLError` where a folder holds no run of ours or `html` cannot be written."""
    runs = read_runs(folders)
    if html is not None and os.path.exists(html) and any(_is_same(html, path) for run in runs for path in run.files):
        raise DWLError(f"{html} is a file of the run. Nothing was written; give the page a name of its own.")
    if len(runs) > 1:
        print_comparison(console, runs)
    else:
        print_run(console, runs[0])
    if html is not None:
        from dwl_plugin.cli.report.page import page

        write_whole(html, page(runs).encode())
        console.print(f"Page: {html}", markup=False, highlight=False, soft_wrap=True)


def _is_same(page: Path, path: Path) -> bool:
    try:
        return os.path.samefile(page, path)
    except OSError:  # removed by the running trainer since it was listed
        return False
