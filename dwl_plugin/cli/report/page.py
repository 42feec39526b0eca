"""A run, or several over one another, as one page: figures, tables, nothing that is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml

from dwl_plugin.cli import plots
from dwl_plugin.cli.plots import PALETTE, Line, Panel, Style, style_of, to_svg
from dwl_plugin.cli.report import tables
from dwl_plugin.cli.report.run import Curve, Run
from dwl_plugin.config import REST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document. Needs matplotlib and jinja2."""
    plots.need_matplotlib()
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dwl_plugin.cli.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    single = len(runs) == 1
    content: dict[str, Any] = {
        "title": " · ".join(tables.printable(run.name) for run in runs),
        "runs": [_summary(run) for run in runs],
        "figures": list(_figures_of_one(runs[0]) if single else _figures_of_many(runs)),
        "comparison": None if single else _comparison(runs),
        "version": version("axolotl-dwl"),
    }
    return environment.get_template("page.html.j2").render(content)


def _summary(run: Run) -> dict[str, Any]:
    rows = [
        (
            "all" if row.name is None else tables.printable(row.name),
            tables.percent(row.token_share),
            tables.arrow(row.loss_share, tables.percent),
            tables.arrow(row.alpha, "{:.3f}".format),
            tables.arrow(row.nll, "{:.3f}".format),
            tables.change_of(row.nll),
        )
        for row in tables.rows_of(run)
    ]
    return {
        "name": tables.printable(run.name),
        "facts": tables.facts(run),
        "rows": rows,
        "held_out": bool(run.evals),
        "loss": tables.arrow(run.curve("loss").tenths, "{:.3f}".format),
        "notes": run.notes,
        "config": None if run.block is None else yaml.safe_dump(run.block.dump(), sort_keys=False, allow_unicode=True),
    }


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    rows, source, notes = tables.compared(runs)
    return {"rows": rows, "source": source, "notes": notes, "names": [tables.printable(run.name) for run in runs]}


@dataclass(frozen=True)
class Drawn:
    title: str
    caption: str
    svg: str


def _drawn(title: str, caption: str, figure: Figure) -> Drawn:
    return Drawn(title, caption, to_svg(figure, title))


def _figures_of_one(run: Run) -> Iterator[Drawn]:
    many = len(run.classes) > 1
    if many and run.weighs_classes and run.train:
        lines = [_line(name, run.curve(f"dwl/alpha/{name}"), _class_style(run, name), limit=200) for name in run.classes]
        caption = "How much each class counts, step by step. They sum to 1."
        yield _drawn("α over the run", caption, plots.draw_labelled(Panel("", lines), "α"))
    for what, title in tables.MOVING.items():
        curves = {name: run.curve(f"dwl/{what}/{name}") for name in run.classes}
        shown = [_line(name, curve, _class_style(run, name), limit=200) for name, curve in curves.items() if curve]
        if shown:
            yield _drawn(title, _CAPTIONS[what], plots.draw_labelled(Panel("", shown), what))
    caption = "The plain cross-entropy in nats per token, whatever α was. A gap: no such token in those steps."
    yield _drawn("nll by class", caption, plots.draw_grid(_train_and_held_out(run), "nll"))
    if many and run.train:
        rows = [(row.name, row.token_share, *row.loss_share) for row in tables.rows_of(run) if row.name is not None]
        names, tokens, start, end = zip(*rows, strict=True)
        caption = (
            "Right of its bar, a class has more say than its number of tokens; left of it, less. "
            "Start and end are means over a tenth of the logged steps."
        )
        shares = plots.draw_shares([tables.printable(name) for name in names], tokens, start, end)
        yield _drawn("Share of the loss, share of the tokens", caption, shares)
    if run.train:
        caption = "The weighted loss moves when α moves; nll is what compares."
        yield _drawn(_LOSS, caption, plots.draw_labelled(Panel("", _loss_lines(run)), "nats per token"))


def _figures_of_many(runs: Sequence[Run]) -> Iterator[Drawn]:
    named = [name for run in runs for name in run.classes if name != REST]
    classes = [*dict.fromkeys(named), REST]

    def by_class(title: str, caption: str, y_label: str, keys: Mapping[str, str], shown: Sequence[Run] = runs) -> Drawn:
        """A panel a key, a line a run, which looks the same in every figure."""
        panels = [
            Panel(name, [_line(run.name, run.curve(key), style_of(at)) for at, run in enumerate(runs) if run in shown])
            for name, key in keys.items()
        ]
        return _drawn(title, caption, plots.draw_grid(panels, y_label, from_zero=y_label != "nll"))

    caption = "The plain cross-entropy in nats per token, on the same axes for every run and class."
    yield by_class("nll of the training batches", caption, "nll", _nll_keys(classes))
    if any(len(run.evals) > 1 for run in runs):
        panels = [
            Panel(title, [_line(run.name, run.eval_curve(key), style_of(at), dots=True) for at, run in enumerate(runs)])
            for title, key in _nll_keys(classes).items()
        ]
        caption = "Exact over each run's evaluation set."
        yield _drawn("nll of the held-out rows", caption, plots.draw_grid(panels, "nll"))
    if named:
        weighing = [run for run in runs if run.weighs_classes]
        if weighing:
            keys = {tables.printable(name): f"dwl/alpha/{name}" for name in classes}
            yield by_class("α by class", "How much the class counts, step by step.", "α", keys, weighing)
        keys = {tables.printable(name): f"dwl/loss_share/{name}" for name in classes}
        caption = "How much of what the run was trained on came from the class."
        yield by_class("Share of the loss by class", caption, "share of the loss", keys)
    panels = [Panel(tables.printable(run.name), _loss_lines(run)) for run in runs]
    caption = "Losses of different α do not compare; nll does."
    yield _drawn(_LOSS, caption, plots.draw_grid(panels, "nats per token", from_zero=True))


_CAPTIONS = {
    "signal": "What the controller compares: the running average of nll, as `signal` has it.",
    "exponent": "A token counts p^exponent times.",
    "min_weight": "No token counts less.",
    "kl": "KL(base‖θ) in nats per token, before the anchor's λ.",
}

_LOSS = "The loss that was trained on, and nll"


def _train_and_held_out(run: Run) -> list[Panel]:
    train, held_out = Style(PALETTE[0], "-", "."), Style(PALETTE[1], "-", "o")
    panels = []
    for title, key in _nll_keys(run.classes).items():
        lines = [_line("training batches", run.curve(key), train)] if run.train else []
        if run.evals:
            lines.append(_line("held-out rows", run.eval_curve(key), held_out, dots=True))
        panels.append(Panel(title, lines))
    return panels


def _class_style(run: Run, name: str) -> Style:
    return style_of(run.classes.index(name), plain=name == REST)


def _nll_keys(classes: Sequence[str]) -> dict[str, str]:
    """Title -> key; all targets first, and alone where there is one class."""
    per_class = {tables.printable(name): f"dwl/nll/{name}" for name in classes} if len(classes) > 1 else {}
    return {"all targets": "nll", **per_class}


def _loss_lines(run: Run) -> list[Line]:
    return [_line("nll", run.curve("nll"), style_of(0)), _line("loss", run.curve("loss"), style_of(1))]


def _line(label: str, curve: Curve, style: Style, dots: bool = False, limit: int = 80) -> Line:
    thin = curve.thinned(limit)
    return Line(tables.printable(label), thin.steps, thin.values, style, dots=dots)
