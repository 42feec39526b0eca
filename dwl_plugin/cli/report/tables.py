"""What a run, or several, came to: in the terminal, and as rows for the page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.output import fixed, number, printable, say, short, table_of_classes
from dwl_plugin.cli.report.metrics import MOVING, OF_THE_WHOLE, SHOWN_ALWAYS, marked
from dwl_plugin.cli.report.run import MOST_CLASSES, Run, largest
from dwl_plugin.run.curve import LoggedCurve, key_of
from dwl_plugin.values import REST

__all__ = [
    "ComparedRow",
    "DataSetRow",
    "Row",
    "called",
    "compared",
    "data_sets_of",
    "difference",
    "differing",
    "facts",
    "in_training",
    "made_of",
    "percent",
    "print_comparison",
    "print_run",
    "rows_of",
    "shown_of",
]

NONE = "–"
COLUMNS = ("tokens", *(marked(SHOWN_ALWAYS[key]) for key in ("loss_share", "alpha", "nll", "p")))
DATA_SET_COLUMNS = ("tokens", "share of loss", "training nll ↓", "p ↑", "held-out nll ↓")
ARROWS = "↓: lower is better. ↑: higher is better. Shares and α say what the loss looks at, not how good the model is."

_MOST_DIFFERENCES = 40

Ends = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One class from the start of a run to its end; a NaN was never logged. `name` is None for all targets together."""

    name: str | None
    token_share: float
    loss_share: Ends
    alpha: Ends
    nll: Ends
    p: Ends


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
            run.measured(key_of("p", name)),
        )
        for name in run.classes
    ]
    return [*(rows if len(rows) > 1 else ()), Row(None, 1.0, unknown, unknown, run.nll(None), run.measured(key_of("p", None)))]


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
        return [percent(self.token_share), arrow(self.loss_share, brief), *means]


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
    for key, metric in MOVING.items():
        if ends := [(name, curve.ends) for name in run.classes if (curve := run.curve(f"dwl/{key}/{name}"))]:
            yield marked(metric), ends


def in_training(run: Run) -> str:
    """The loss and what else is of all targets of the training batches, at the start and at the end."""
    metrics = {"loss": SHOWN_ALWAYS["loss"], "nll": SHOWN_ALWAYS["nll"], **OF_THE_WHOLE}
    known = [f"{marked(metric).lower()} {arrow(curve.tenths)}" for key, metric in metrics.items() if (curve := run.curve(key))]
    return f"In training: {', '.join(known)}." if known else ""


def facts(run: Run) -> list[str]:
    """The run in a few words."""
    steps = f"{run.step}{f' of {run.max_steps}' if run.max_steps > run.step else ''} optimizer steps"
    if run.block is None:
        return [steps]
    reduction = f", {run.block.reduction}" if run.block.loss == "dwl" else ""
    return [f"loss: {run.block.loss}{reduction}", steps]


def made_of(run: Run) -> dict[str, str]:
    """Model, data, learning rate, batch, date, versions, by name, each of bounded length."""
    return {} if run.record is None else {name: short(fact, 1000) for name, fact in run.record.facts().items()}


def differing(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str]]], str]:
    """What the runs were made of and how their losses were set, where they differ: a name, and a cell a run; and a sentence."""
    kept = [run for run in runs if run.record is not None and run.block is not None]
    if len(kept) < len(runs):
        missing = ", ".join(run.name for run in runs if run not in kept)
        return [], f"What differs between the runs is not known: {missing} has no dwl_config.yaml that tells all of it."
    settings = [dict(_settings(run)) for run in runs]
    names = dict.fromkeys(name for each in settings for name in each)
    rows = [(short(name, 40), [short(each.get(name, NONE), 200) for each in settings]) for name in names]
    rows = [(name, cells) for name, cells in rows if len(set(cells)) > 1]
    more = len(rows) - _MOST_DIFFERENCES
    return rows[:_MOST_DIFFERENCES], f"{more} more settings differ." if more > 0 else "" if rows else "No setting differs."


def _settings(run: Run) -> Iterator[tuple[str, str]]:
    """By name, from the outside to the loss."""
    assert run.record is not None
    assert run.block is not None
    facts = run.record.facts()
    facts.pop("with", None)
    yield from facts.items()
    yield from (run.record.versions or {}).items()
    yield "optimizer steps", str(run.step)
    yield from _leaves(run.block.dump(), "")


def _leaves(node: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node if isinstance(node, str) else json.dumps(node, ensure_ascii=False)


def called(name: str | None) -> str:
    """A class as tables write it; None is all targets."""
    return "all" if name is None else short(name, 100) or "‹no name›"


def print_run(console: Console, run: Run) -> None:
    say(console, f"{run.name}: {', '.join(facts(run))}", style="bold")
    _print_made_of(console, run)
    table = table_of_classes("", show_edge=False)
    table.collapse_padding = True  # so that it fits into 80 columns
    for title in COLUMNS:
        table.add_column(title, justify="right", no_wrap=True)
    two = partial(fixed, digits=2)
    for row in rows_of(run):
        cells = percent(row.token_share), arrow(row.loss_share, brief), arrow(row.alpha, two)
        measured = Text(arrow(row.nll), style=_colour(row.nll)), Text(arrow(row.p, two), style=_colour(row.p[::-1]))
        _add_row(table, row.name, [*map(Text, cells), *measured])
    console.print(table)
    if data_sets := data_sets_of(run):
        table = table_of_classes("", show_edge=False, of="data set")
        for title in DATA_SET_COLUMNS:
            table.add_column(title, justify="right", no_wrap=True)
        for data_set in data_sets:
            _add_row(table, short(data_set.name, 36), [*map(Text, data_set.cells)])
        console.print(table)
    if known := in_training(run):
        say(console, known)
    for title, by_class in moving(run):
        say(console, f"{title}: {', '.join(f'{called(name)} {arrow(pair)}' for name, pair in by_class)}.")
    source = "held-out rows" if run.evals else "training batches"
    say(console, f"Start → end; nll in nats per token of the {source}, whatever α was, and p of the same.")
    say(console, ARROWS)
    for note in run.notes:
        say(console, note)


def _print_made_of(console: Console, run: Run) -> None:
    made = made_of(run)
    for names in (("model", "data", "rows"), ("learning rate", "batch"), ("began", "with")):
        if told := [f"{name} {made[name]}" for name in names if name in made]:
            say(console, "; ".join(told))


@dataclass(frozen=True)
class ComparedRow:
    """nll or p of a class at the end, run by run."""

    name: str | None
    what: str
    values: tuple[float, ...]

    @property
    def cells(self) -> list[str]:
        """The first run's number, and every other's with its change against the first."""
        first = self.values[0]
        change = change_of if self.what == "nll" else difference
        return [number(first), *(f"{number(value)} ({change((first, value))})" for value in self.values[1:])]

    @property
    def best(self) -> int | None:
        """The run with the lowest nll, or the highest p."""
        known = [at for at, value in enumerate(self.values) if math.isfinite(value)]
        best = min if SHOWN_ALWAYS[self.what].better == "lower" else max
        return best(known, key=lambda at: self.values[at]) if len(known) > 1 else None


def compared(runs: Sequence[Run], what: str = "nll") -> tuple[list[ComparedRow], str, list[str]]:
    """Rows over the classes of all runs, what was measured, and what to mind when reading them."""
    held_out = all(run.evals for run in runs)
    names, left_out = shown_of(runs, MOST_CLASSES)
    names = [name for name in names if name != REST]
    keys = {name: key_of(what, name) for name in (*((*names, REST) if names else ()), None)}
    ends = {name: [run.eval_curve(key).ends if held_out else run.curve(key).tenths for run in runs] for name, key in keys.items()}
    rows = [ComparedRow(name, what, tuple(last for _, last in by_run)) for name, by_run in ends.items()]
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
    rows, told = differing(runs)
    if rows:
        _print_by_run(console, "What differs", "setting", runs, [(name, [*map(Text, cells)]) for name, cells in rows])
    if told:
        say(console, told)
    for what in ("nll", "p"):
        compared_rows, source, notes = compared(runs, what)
        if any(math.isfinite(value) for row in compared_rows for value in row.values):
            cells = [
                [Text(cell, style="green" if at == row.best else "") for at, cell in enumerate(row.cells)] for row in compared_rows
            ]
            title = f"{marked(SHOWN_ALWAYS[what])} at the end, {source}"
            _print_by_run(console, title, "class", runs, [(row.name, each) for row, each in zip(compared_rows, cells, strict=True)])
    say(console, f"In brackets: against {runs[0].name}. Green: the best of its row, the lowest nll or the highest p.")
    for line in (*notes, *(note for run in runs for note in run.notes)):
        say(console, line)


def _print_by_run(
    console: Console, title: str, of: str, runs: Sequence[Run], rows: Sequence[tuple[str | None, list[Text]]]
) -> None:
    """A column a run."""
    table = table_of_classes(title, show_edge=False, of=of)
    table.columns[0].no_wrap = of == "setting"
    for run in runs:
        table.add_column(Text(printable(run.name)), justify="right", overflow="fold")
    for name, cells in rows:
        _add_row(table, name, cells)
    console.print(table)
    console.print()


def _add_row(table: Table, name: str | None, cells: Sequence[Text]) -> None:
    if name is None and table.row_count:
        table.add_section()
    table.add_row(Text(called(name)), *cells, style="bold" if name is None else "")


def percent(value: float) -> str:
    return f"{fixed(100 * value, 1)} %" if math.isfinite(value) else NONE


def brief(value: float) -> str:
    return percent(value) if abs(value) < 0.0995 else f"{fixed(100 * value, 0)} %"


def arrow(ends: Ends, form: Callable[[float], str] = number) -> str:
    return f"{form(ends[0])} → {form(ends[1])}" if all(map(math.isfinite, ends)) else NONE


def difference(ends: Ends) -> str:
    change = ends[1] - ends[0]
    return f"{'+' * (change >= 0)}{number(change)}".replace("-", "−") if math.isfinite(change) else NONE


def change_of(ends: Ends) -> str:
    before, after = ends
    change = 100 * (after / before - 1) if before > 0 else math.nan
    return f"{'+' * (change >= 0)}{fixed(change, 1)} %".replace("-", "−") if math.isfinite(change) else NONE


def _colour(ends: Ends) -> str:
    before, after = ends
    return "" if not before > 0 or not math.isfinite(after) else "green" if after < before else "red"
