"""What a finished run logged, as a table of its token classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dwl_plugin.errors import DWLError

__all__ = ["ClassRow", "print_report", "read_history", "summarise"]

_NEXT = """\
What to try next, in [bold]{config}[/]:
  · the baseline: `loss: nll` without reduction, alpha and schedule
    (the same classes, measured under plain cross-entropy)
  · DFT: `loss: dft` without the same three
    (a token counts as much as the model believes it)
  · your data: a regex for what matters in it, and its number under alpha
  · your run: the `plugins:`, `loss:` and `dwl:` blocks go into any config
Run it again with
  axolotl train {config} --launcher python"""

History = list[dict[str, Any]]

ClassRow = tuple[str, float, float, float, float, float]
"""Class, share of the held-out targets, α at the start, α at the end, nll before, nll after."""


def read_history(output_dir: Path) -> History:
    """The `log_history` of the newest checkpoint."""
    states = sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise DWLError(f"The run ended, but no checkpoint with a trainer_state.json is in {output_dir}.")
    history: History = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    return history


def summarise(history: History, names: Sequence[str]) -> tuple[list[ClassRow], tuple[float, float]]:
    """A row for each class of `names`, and the nll of all held-out targets before and after."""
    evals = [entry for entry in history if "eval_nll" in entry]
    steps = [entry for entry in history if any(key.startswith("dwl/alpha/") for key in entry)]
    if len(evals) < 2 or not steps:
        raise DWLError("The run logged no losses before and after training; was `loss:` or `eval_steps:` changed?")
    before, after = evals[0], evals[-1]
    missing = float("nan")  # a class without a single held-out token has no nll
    rows = [
        (
            name,
            before.get(f"eval_dwl/token_share/{name}", 0.0),
            steps[0][f"dwl/alpha/{name}"],
            steps[-1][f"dwl/alpha/{name}"],
            before.get(f"eval_dwl/nll/{name}", missing),
            after.get(f"eval_dwl/nll/{name}", missing),
        )
        for name in names
    ]
    return rows, (before["eval_nll"], after["eval_nll"])


def print_report(console: Console, history: History, names: Sequence[str], config: str, seconds: float) -> None:
    """The table, and what to try next."""
    rows, (before, after) = summarise(history, names)
    table = Table(title="Held-out rows, before and after", title_justify="left", title_style="bold")
    table.add_column("class")
    for title in ("token share", "α start → end", "nll before", "nll after", "change"):
        table.add_column(title, justify="right")
    for name, share, start, end, nll_before, nll_after in rows:
        losses = (f"{nll_before:.3f}", f"{nll_after:.3f}", _change(nll_before, nll_after))
        table.add_row(name, f"{share:.1%}", f"{start:.2f} → {end:.2f}", *losses)
    table.add_section()
    table.add_row("all", "100.0%", "", f"{before:.3f}", f"{after:.3f}", _change(before, after), style="bold")
    console.print(table)
    console.print("nll is the plain cross-entropy in nats per token, whatever α was.")
    console.print(f"All in all {_duration(seconds)}.\n")
    console.print(_NEXT.format(config=config), soft_wrap=True)


def _change(before: float, after: float) -> str:
    if not before > 0:  # nan: a class without a held-out token
        return "–"
    colour = "green" if after < before else "red"
    return f"[{colour}]{after / before - 1:+.1%}[/]"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
