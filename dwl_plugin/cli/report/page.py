"""A run, or several over one another, as one page: figures, tables, and the values of every curve for whoever points at it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import yaml
from markupsafe import Markup

from dwl_plugin.cli import html
from dwl_plugin.cli.output import printable, short
from dwl_plugin.cli.plots import MOST_LINES, Line, draw_panels, draw_shares, frame_of, look_of, need_matplotlib, stroke_of, to_svg
from dwl_plugin.cli.report import tables
from dwl_plugin.cli.report.metrics import MOVING, OF_THE_WHOLE, SHOWN_ALWAYS, Metric, marked
from dwl_plugin.cli.report.run import Run
from dwl_plugin.config import Block
from dwl_plugin.run.curve import LoggedCurve, key_of
from dwl_plugin.values import REST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]

_SETTINGS = 50_000  # characters
_POINTS, _PANEL_POINTS = 200, 80
"""Of a curve, and of one of several panels."""


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document. Needs matplotlib."""
    need_matplotlib()
    filters: dict[str, Callable[[Any], str]] = {"printable": printable, "settings": _settings, "whole": _whole, "dotted": _dotted}
    return html.render(
        __package__,
        filters=filters,
        runs=runs,
        names=[printable(run.name) for run in runs],
        tables=tables,
        comparison=_comparison(runs) if len(runs) > 1 else None,
        figures=list(_figures(runs)),
        metrics=list(_metrics(runs)),
    )


def _settings(block: Block) -> str:
    text = yaml.safe_dump(block.dump(), sort_keys=False, allow_unicode=True)
    left_out = len(text) - _SETTINGS
    return text if left_out <= 0 else f"{text[:_SETTINGS]}…\n# {left_out:,} more characters are left out here"


def _whole(cell: str) -> str:
    """A cell that a narrow page breaks behind its arrow and nowhere else."""
    return cell.replace(" %", "\N{NO-BREAK SPACE}%").replace(" →", "\N{NO-BREAK SPACE}→")


def _dotted(path: str) -> Markup:
    """A path of the YAML, which a narrow page breaks behind its dots."""
    return Markup(".<wbr>").join(path.split("."))


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    differing, told = tables.differing(runs)
    results = []
    for what in ("nll", "p"):
        rows, source, notes = tables.compared(runs, what)
        if any(math.isfinite(value) for row in rows for value in row.values):
            results.append((marked(SHOWN_ALWAYS[what]), [(row.name, row.cells, row.best) for row in rows]))
    return {
        "differing": [(name, cells, None) for name, cells in differing],
        "told": told,
        "results": results,
        "source": source,
        "notes": notes,
    }


def _metrics(runs: Sequence[Run]) -> Iterator[Metric]:
    """Those that are on the page."""
    yield from SHOWN_ALWAYS.values()
    logged = {key for run in runs for entry in run.train for key in entry}
    yield from (metric for key, metric in MOVING.items() if any(name.startswith(f"dwl/{key}/") for name in logged))
    yield from (metric for key, metric in OF_THE_WHOLE.items() if key in logged)


def _figures(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """α over the run, nll and p by class, what else there is of all targets; of one run what else moves, and the share of the loss
    against the share of the tokens.
    """
    run, single = runs[0], len(runs) == 1
    shown, left_out = tables.shown_of(runs, MOST_LINES)
    named = [name for name in shown if name != REST]
    classes = [*named, REST]
    weighing = [(each, look_of(at)) for at, each in enumerate(runs) if each.weighs_classes and each.train]

    def drawn(
        title: str, caption: str, y_label: str, panels: Sequence[tuple[str, Sequence[Line]]], from_zero: bool = True
    ) -> dict[str, Any]:
        of, lines = zip(*panels, strict=True)
        logged = max(max(len(each.train), len(each.evals)) for each in runs)
        width = math.ceil(logged / (_POINTS if len(panels) == 1 else _PANEL_POINTS))
        thinned = f"Each point is the mean of up to {width:,} logged steps." if width > 1 else ""
        return {
            "title": title,
            "caption": " ".join(part for part in (caption, left_out, thinned) if part),
            "panels": list(map(partial(_panel, title), of, lines, draw_panels(lines, y_label, from_zero))),
            "lines": [_legend(line) for line in {line.label: line for some in lines for line in some}.values()],
        }

    if single and named and weighing:
        yield drawn("α over the run", "How much each class counts.", "α", [("", _by_class(run, shown, "alpha"))])
    elif named and weighing:
        alphas = {name: [_line(each.name, each.curve(f"dwl/alpha/{name}"), look) for each, look in weighing] for name in classes}
        yield drawn(
            "α by class", "How much the class counts.", "α", [(tables.called(name), lines) for name, lines in alphas.items()]
        )
    for key, metric in MOVING.items() if single else ():
        if lines := _by_class(run, shown, key):
            yield drawn(metric.title, metric.says, key, [("", lines)])
    measured = [("all targets", None), *((tables.called(name), name) for name in (classes if named else ()))]
    for what, caption in (("nll", "In nats per token, whatever α was; lower is better."), ("p", "Higher is better.")):
        panels = [(title, list(_measured_lines(runs, key_of(what, name)))) for title, name in measured]
        if what == "nll" or any(_is_known(line) for _, lines in panels for line in lines):
            title = f"{what} by class" if named else what
            yield drawn(title, f"{caption} A gap: no such token in those steps.", what, panels, from_zero=what != "nll")
    for key, metric in OF_THE_WHOLE.items():
        if lines := list(filter(_is_known, _measured_lines(runs, key, _POINTS))):
            yield drawn(metric.title, metric.says, metric.title.lower(), [("", lines)])
    if single and named and run.train:
        rows = [(row.name, row.token_share, *row.loss_share) for row in tables.rows_of(run) if row.name in shown]
        title = "Share of the loss, share of the tokens"
        caption = "Right of its bar a class has more say than its tokens, left of it less; means over a tenth of the steps."
        shares = {"title": "", "curves": None, "svg": Markup(to_svg(draw_shares(*zip(*rows, strict=True)), title))}
        yield {"title": title, "caption": f"{caption} {left_out}".strip(), "panels": [shares], "lines": []}


def _is_known(line: Line) -> bool:
    return any(map(math.isfinite, line.values))


def _panel(title: str, of: str, lines: Sequence[Line], figure: Figure) -> dict[str, Any]:
    """`curves` is what the page's script reads: NaN is null there, and a number has as many digits as a person reads."""
    svg = Markup(to_svg(figure, f"{title}: {of}" if of else title))
    curves = [
        {
            "name": short(line.label, 100),
            "dots": line.dots,
            "steps": line.steps,
            "values": [float(f"{value:.6g}") if math.isfinite(value) else None for value in line.values],
        }
        for line in lines
    ]
    return {"title": of, "svg": svg, "curves": {**frame_of(figure), "lines": curves}}


def _legend(line: Line) -> dict[str, Any]:
    colour, dashes = stroke_of(line)
    return {"name": short(line.label, 100), "colour": colour, "dashes": dashes, "dots": line.dots}


def _by_class(run: Run, names: Sequence[str], what: str) -> list[Line]:
    """A number of a run, a line a class that has it."""
    curves = [(name, run.curve(f"dwl/{what}/{name}"), look_of(at, plain=name == REST)) for at, name in enumerate(names)]
    return [_line(name, curve, look, limit=_POINTS) for name, curve, look in curves if curve]


def _measured_lines(runs: Sequence[Run], key: str, limit: int = _PANEL_POINTS) -> Iterator[Line]:
    """Training batches and held-out rows of every run; of a single one in two colours."""
    single = len(runs) == 1
    for at, run in enumerate(runs):
        if run.train:
            yield _line("training batches" if single else run.name, run.curve(key), look_of(at), limit=limit)
        if run.evals:
            label = "held-out rows" if single else f"{run.name}, held out"
            yield _line(label, run.eval_curve(key), look_of(1 if single else at), dots=True, limit=limit)


def _line(label: str, curve: LoggedCurve, look: Mapping[str, Any], dots: bool = False, limit: int = _PANEL_POINTS) -> Line:
    thin = curve.thinned(limit)
    return Line(label, thin.steps, thin.values, look, dots)
