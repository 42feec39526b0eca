"""`dwl examples`: the configs of `example_configs/`, which a wheel carries inside the package."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

import dwl_plugin
from dwl_plugin.cli.output import deliver, say
from dwl_plugin.errors import DWLError, did_you_mean

__all__ = ["examples", "folder", "write_example"]


def folder() -> Path:
    """Of the configs: in an installed package, or in a clone beside it."""
    package = Path(dwl_plugin.__file__).parent
    return next(path for path in (package / "example_configs", package.parent / "example_configs") if path.is_dir())


def examples(console: Console) -> None:
    """Each with what it is for."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for path in sorted(folder().glob("*.yml")):
        what = re.search(r"^# What for: +(.*\n(?:#  .*\n)*)", path.read_text(encoding="utf-8"), re.MULTILINE)
        table.add_row(Text(path.stem), Text("" if what is None else re.sub(r"\n# *", " ", what[1]).strip()))
    console.print(table)
    say(console, "dwl examples NAME prints one, with --out FILE into a file.")


def write_example(console: Console, name: str, out: Path | None) -> None:
    """Print a config, or write it to `out`. Raises `DWLError` for a name that is none, and where `out` is there."""
    known = {path.stem: path for path in sorted(folder().glob("*.yml"))}
    path = known.get(name.removesuffix(".yml"))
    if path is None:
        hint = did_you_mean(name, list(known))
        raise DWLError(f"There is no example {name}; there are {', '.join(known)}.{f' ({hint})' if hint else ''}")
    deliver(path.read_text(encoding="utf-8"), out)
    if out is not None:
        say(console, f"{out} is written. Next: dwl check {out}")
