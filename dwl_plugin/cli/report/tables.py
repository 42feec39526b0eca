"""What a run, or several, came to: in the terminal, and as rows for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.printable import printable
from dwl_plugin.cli.report.run import Run

__all__ = ["ComparedRow", "Row", "compared", "facts", "print_comparison", "print_run", "rows_of"]

NONE = "–"
MOVING = {"signal": "Signal", "exponent": "Exponent of dft", "min_weight": "Least weight of dft", "kl": "KL to the base model"}

Ends = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One class from the start of a run to its end; a NaN was never logged. `name` is None for all targets together."""

    name: str | None
    token_share: float
    loss_share: Ends
    alpha: Ends
    nll: Ends


def rows_of(run: Run) -> list[Row]:
    """The classes, then all targets; without classes only these."""
    unknown = (math.nan, math.nan)
    rows = [
        Row(
            name,
            run.curve(f"dwl/token_share/{name}").mean if run.train else run.eval_curve(f"dwl/token_share/{name}").mean,
            run.curve(f"dwl/loss_share/{name}").tenths,
            run.curve(f"dwl/alpha/{name}").ends if run.weighs_classes else unknown,
            run.nll(name),
        )
        for name in run.classes
    ]
    return [*(rows if len(rows) > 1 else ()), Row(None, 1.0, unknown, unknown, run.nll(None))]


def moving(run: Run) -> list[tuple[str, list[tuple[str, Ends]]]]:
    """(name, start and end by class) of what a run logs only if it has it: a controller's signal, dft's numbers, KL."""
    found = [
        (title, [(name, curve.ends) for name in run.classes if (curve := run.curve(f"dwl/{key}/{name}"))])
        for key, title in MOVING.items()
    ]
    return [(title, ends) for title, ends in found if ends]


def facts(run: Run) -> list[str]:
    """The run in a few words."""
    of = f" of {run.max_steps}" if run.max_steps > run.step else ""
    out = [f"{run.step}{of} optimizer steps"]
    if run.block is not None:
        reduction = f", {run.block.reduction}" if run.block.loss == "dwl" else ""
        out.insert(0, f"loss: {run.block.loss}{reduction}")
    return out


def print_run(console: Console, run: Run) -> None:
    rows = rows_of(run)
    source = "held-out rows" if run.evals else "training batches"
    table = Table(
        title=f"{printable(run.name)}: {', '.join(facts(run))}",
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
    )
    table.add_column("class", overflow="fold")
    for title in ("tokens", "share of loss", "α", "nll", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        if row.name is None and len(rows) > 1:
            table.add_section()
        cells = (percent(row.token_share), arrow(row.loss_share, _brief), arrow(row.alpha, "{:.2f}".format))
        change = Text(change_of(row.nll), style=_colour(row.nll))
        table.add_row(_name(row.name), *cells, arrow(row.nll, "{:.3f}".format), change, style="bold" if row.name is None else "")
    console.print(table)
    loss = run.curve("loss")
    if loss:
        ends, nll = arrow(loss.tenths, "{:.3f}".format), arrow(run.curve("nll").tenths, "{:.3f}".format)
        console.print(f"In training: loss {ends}, nll {nll}.", highlight=False)
    for title, by_class in moving(run):
        told = ", ".join(f"{printable(name)} {arrow(pair, '{:.3f}'.format)}" for name, pair in by_class)
        console.print(f"{title}: {told}.", markup=False, soft_wrap=True)
    console.print(f"Start → end, nll in nats per token of the {source}, whatever α was.", highlight=False)
    _print_notes(console, run)


@dataclass(frozen=True)
class ComparedRow:
    """nll at the end, run by run."""

    name: str | None
    nll: tuple[float, ...]

    @property
    def cells(self) -> list[str]:
        """The first run's nll, and every other's with its change against the first."""
        first = self.nll[0]
        return [_three(first), *(f"{_three(value)} ({change_of((first, value))})" for value in self.nll[1:])]

    @property
    def best(self) -> int | None:
        """The run with the lowest nll."""
        known = [at for at, value in enumerate(self.nll) if math.isfinite(value)]
        return min(known, key=lambda at: self.nll[at]) if len(known) > 1 else None


def compared(runs: Sequence[Run]) -> tuple[list[ComparedRow], str, list[str]]:
    """Rows over the classes of all runs, what was measured, and what to mind when reading them."""
    held_out = all(run.evals for run in runs)
    names = [name for name in dict.fromkeys(name for run in runs for name in run.classes) if name != "rest"]
    rows = [ComparedRow(name, tuple(_final(run, name, held_out) for run in runs)) for name in (*(names and [*names, "rest"]), None)]
    source = "the held-out rows" if held_out else "the last tenth of the training batches"
    notes = []
    if not held_out and any(run.evals for run in runs):
        notes.append("Not every run has an evaluation, so the training batches are compared.")
    if len({run.step for run in runs}) > 1:
        steps = ", ".join(f"{printable(run.name)} {run.step}" for run in runs)
        notes.append(f"The runs have not come equally far: {steps} steps.")
    shares = {tuple(_three(_share(run, name, held_out)) for name in names) for run in runs}
    if held_out and len(shares) > 1:
        notes.append(
            "The classes hold different shares of the evaluation sets: other classes or other data, so nll of a class "
            "is not of the same tokens."
        )
    return rows, source, notes


def print_comparison(console: Console, runs: Sequence[Run]) -> None:
    rows, source, notes = compared(runs)
    table = Table(title=f"nll at the end, {source}", title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("class", overflow="fold")
    for run in runs:
        table.add_column(Text(printable(run.name)), justify="right", overflow="fold")
    for row in rows:
        if row.name is None and len(rows) > 1:
            table.add_section()
        cells = [Text(cell, style="green" if at == row.best else "") for at, cell in enumerate(row.cells)]
        table.add_row(_name(row.name), *cells, style="bold" if row.name is None else "")
    console.print(table)
    console.print(f"In brackets: against {printable(runs[0].name)}. Green: the lowest of its row.", highlight=False, markup=False)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    for run in runs:
        _print_notes(console, run)


def _final(run: Run, name: str | None, held_out: bool) -> float:
    key = "nll" if name is None else f"dwl/nll/{name}"
    return run.eval_curve(key).ends[1] if held_out else run.curve(key).tenths[1]


def _share(run: Run, name: str, held_out: bool) -> float:
    key = f"dwl/token_share/{name}"
    return run.eval_curve(key).ends[1] if held_out else run.curve(key).mean


def percent(value: float) -> str:
    return f"{100 * value:.1f} %" if math.isfinite(value) else NONE


def _brief(value: float) -> str:
    return percent(value) if abs(value) < 0.0995 else f"{100 * value:.0f} %"


def arrow(ends: Ends, form: Callable[[float], str]) -> str:
    return f"{form(ends[0])} → {form(ends[1])}" if all(map(math.isfinite, ends)) else NONE


def change_of(ends: Ends) -> str:
    before, after = ends
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "−") if before > 0 and math.isfinite(after) else NONE


def _three(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else NONE


def _colour(ends: Ends) -> str:
    before, after = ends
    return "" if not before > 0 or not math.isfinite(after) else "green" if after < before else "red"


def _name(name: str | None) -> Text:
    return Text("all" if name is None else printable(name))


def _print_notes(console: Console, run: Run) -> None:
    for note in run.notes:
        console.print(printable(note), highlight=False, markup=False, soft_wrap=True)
