"""What a run, or several, came to: in the terminal, and as rows for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.output import fixed, number, printable, say, short, table_of_classes
from dwl_plugin.cli.report.run import MOST_CLASSES, LoggedCurve, Run, largest
from dwl_plugin.values import REST

__all__ = [
    "ComparedRow",
    "DataSetRow",
    "Row",
    "called",
    "compared",
    "data_sets_of",
    "facts",
    "made_of",
    "print_comparison",
    "print_run",
    "rows_of",
    "shown_of",
]

NONE = "–"
MOVING = {
    "signal": "Signal",
    "exponent": "Exponent of dft",
    "min_weight": "Least weight of dft",
    "kl": "KL to the base model",
    "factor": "Mean factor",
    "p_negative": "p where the factor is below 0",
}
DATA_SET_COLUMNS = ("tokens", "share of loss", "training nll", "p", "held-out nll")

Ends = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One class from the start of a run to its end; a NaN was never logged. `name` is None for all targets together."""

    name: str | None
    token_share: float
    loss_share: Ends
    alpha: Ends
    nll: Ends


def shown_of(runs: Sequence[Run], limit: int) -> tuple[list[str], str]:
    """The classes of the runs in their order; if there are too many, those with the most tokens, and a sentence that says so."""
    names = list(dict.fromkeys(name for run in runs for name in run.classes))
    if len(names) <= limit:
        return names, ""
    share = {name: sum(known for run in runs if math.isfinite(known := run.token_share.get(name, 0.0))) for name in names}
    return largest(names, share, limit), f"Of these {len(names)} classes the {limit} with the most tokens are shown."


def rows_of(run: Run) -> list[Row]:
    """The classes, then all targets; without classes only these."""
    unknown = (math.nan, math.nan)
    rows = [
        Row(
            name,
            run.token_share[name],
            run.curve(f"dwl/loss_share/{name}").tenths,
            run.curve(f"dwl/alpha/{name}").ends if run.weighs_classes else unknown,
            run.nll(name),
        )
        for name in run.classes
    ]
    return [*(rows if len(rows) > 1 else ()), Row(None, 1.0, unknown, unknown, run.nll(None))]


@dataclass(frozen=True)
class DataSetRow:
    """One data set from the start of a run to its end; all but `held_out` in training. A NaN was never logged."""

    name: str
    token_share: float
    loss_share: Ends
    nll: Ends
    p: Ends
    held_out: Ends
    """Its nll."""

    @property
    def cells(self) -> list[str]:
        means = [arrow(ends, partial(fixed, digits=2)) for ends in (self.nll, self.p, self.held_out)]
        return [percent(self.token_share), arrow(self.loss_share, _brief), *means]


def data_sets_of(run: Run) -> list[DataSetRow]:
    """Where several were told apart."""

    told = [entry for entry in run.train if any(f"dwl/dataset/token_share/{name}" in entry for name in run.data_sets)]

    def shares(what: str, name: str) -> LoggedCurve:
        """0 in batches that had none of it, unless none had."""
        key = f"dwl/dataset/{what}/{name}"
        missing = 0.0 if any(key in entry for entry in told) else math.nan
        return LoggedCurve(tuple(range(len(told))), tuple(entry.get(key, missing) for entry in told))

    def row(name: str) -> DataSetRow:
        share, loss = (shares(what, name) for what in ("token_share", "loss_share"))
        nll, p = (run.curve(f"dwl/dataset/{what}/{name}") for what in ("nll", "p"))
        return DataSetRow(name, share.mean, loss.tenths, nll.tenths, p.tenths, run.eval_curve(f"dwl/dataset/nll/{name}").ends)

    return [row(name) for name in run.data_sets]


def moving(run: Run) -> Iterator[tuple[str, list[tuple[str, Ends]]]]:
    """(name, start and end by class) of what a run logs only if it has it: a controller's signal, dft's numbers, KL."""
    for key, title in MOVING.items():
        if ends := [(name, curve.ends) for name in run.classes if (curve := run.curve(f"dwl/{key}/{name}"))]:
            yield title, ends


def facts(run: Run) -> list[str]:
    """The run in a few words."""
    steps = f"{run.step}{f' of {run.max_steps}' if run.max_steps > run.step else ''} optimizer steps"
    if run.block is None:
        return [steps]
    reduction = f", {run.block.reduction}" if run.block.loss == "dwl" else ""
    return [f"loss: {run.block.loss}{reduction}", steps]


def made_of(run: Run) -> list[str]:
    """Model, data, batch, versions: a few lines, each of bounded length."""
    return [] if run.record is None else [short(line, 1000) for line in run.record.lines()]


def called(name: str | None) -> str:
    """A class as tables write it; None is all targets."""
    return "all" if name is None else short(name, 100) or "‹no name›"


def print_run(console: Console, run: Run) -> None:
    table = table_of_classes(f"{printable(run.name)}: {', '.join(facts(run))}", show_edge=False)
    for title in ("tokens", "share of loss", "α", "nll", "change"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows_of(run):
        cells = (
            percent(row.token_share),
            arrow(row.loss_share, _brief),
            arrow(row.alpha, partial(fixed, digits=2)),
            arrow(row.nll),
        )
        _add_row(table, row.name, [*map(Text, cells), Text(change_of(row.nll), style=_colour(row.nll))])
    console.print(table)
    if data_sets := data_sets_of(run):
        table = table_of_classes("", show_edge=False, of="data set")
        for title in DATA_SET_COLUMNS:
            table.add_column(title, justify="right", no_wrap=True)
        for data_set in data_sets:
            _add_row(table, short(data_set.name, 36), [*map(Text, data_set.cells)])
        console.print(table)
    if loss := run.curve("loss"):
        say(console, f"In training: loss {arrow(loss.tenths)}, nll {arrow(run.curve('nll').tenths)}.")
    for title, by_class in moving(run):
        say(console, f"{title}: {', '.join(f'{called(name)} {arrow(pair)}' for name, pair in by_class)}.")
    for line in made_of(run):
        say(console, line)
    source = "held-out rows" if run.evals else "training batches"
    say(console, f"Start → end, nll in nats per token of the {source}, whatever α was.")
    for note in run.notes:
        say(console, note)


@dataclass(frozen=True)
class ComparedRow:
    """nll at the end, run by run."""

    name: str | None
    nll: tuple[float, ...]

    @property
    def cells(self) -> list[str]:
        """The first run's nll, and every other's with its change against the first."""
        first = self.nll[0]
        return [number(first), *(f"{number(value)} ({change_of((first, value))})" for value in self.nll[1:])]

    @property
    def best(self) -> int | None:
        """The run with the lowest nll."""
        known = [at for at, value in enumerate(self.nll) if math.isfinite(value)]
        return min(known, key=lambda at: self.nll[at]) if len(known) > 1 else None


def compared(runs: Sequence[Run]) -> tuple[list[ComparedRow], str, list[str]]:
    """Rows over the classes of all runs, what was measured, and what to mind when reading them."""
    held_out = all(run.evals for run in runs)
    names, left_out = shown_of(runs, MOST_CLASSES)
    names = [name for name in names if name != REST]
    keys: dict[str | None, str] = {**({name: f"dwl/nll/{name}" for name in (*names, REST)} if names else {}), None: "nll"}
    ends = {name: [run.eval_curve(key).ends if held_out else run.curve(key).tenths for run in runs] for name, key in keys.items()}
    rows = [ComparedRow(name, tuple(last for _, last in by_run)) for name, by_run in ends.items()]
    source = "the held-out rows" if held_out else "the last tenth of the training batches"
    notes = [left_out] if left_out else []
    if not held_out and any(run.evals for run in runs):
        notes.append("Not every run has an evaluation, so the training batches are compared.")
    if len({run.step for run in runs}) > 1:
        steps = ", ".join(f"{run.name} {run.step}" for run in runs)
        notes.append(f"The runs have not come equally far: {steps} steps.")
    shares = {tuple(number(run.eval_curve(f"dwl/token_share/{name}").ends[1]) for name in names) for run in runs}
    if held_out and len(shares) > 1:
        why = "other classes or other data, so nll of a class is not of the same tokens"
        notes.append(f"The classes hold different shares of the evaluation sets: {why}.")
    return rows, source, notes


def print_comparison(console: Console, runs: Sequence[Run]) -> None:
    rows, source, notes = compared(runs)
    table = table_of_classes(f"nll at the end, {source}", show_edge=False)
    for run in runs:
        table.add_column(Text(printable(run.name)), justify="right", overflow="fold")
    for row in rows:
        _add_row(table, row.name, [Text(cell, style="green" if at == row.best else "") for at, cell in enumerate(row.cells)])
    console.print(table)
    say(console, f"In brackets: against {runs[0].name}. Green: the lowest of its row.")
    for line in (*notes, *(note for run in runs for note in run.notes)):
        say(console, line)


def _add_row(table: Table, name: str | None, cells: Sequence[Text]) -> None:
    if name is None and table.row_count:
        table.add_section()
    table.add_row(Text(called(name)), *cells, style="bold" if name is None else "")


def percent(value: float) -> str:
    return f"{fixed(100 * value, 1)} %" if math.isfinite(value) else NONE


def _brief(value: float) -> str:
    return percent(value) if abs(value) < 0.0995 else f"{fixed(100 * value, 0)} %"


def arrow(ends: Ends, form: Callable[[float], str] = number) -> str:
    return f"{form(ends[0])} → {form(ends[1])}" if all(map(math.isfinite, ends)) else NONE


def change_of(ends: Ends) -> str:
    before, after = ends
    change = 100 * (after / before - 1) if before > 0 else math.nan
    return f"{'+' * (change >= 0)}{fixed(change, 1)} %".replace("-", "−") if math.isfinite(change) else NONE


def _colour(ends: Ends) -> str:
    before, after = ends
    return "" if not before > 0 or not math.isfinite(after) else "green" if after < before else "red"
