"""A run, or several over one another, as one page: figures, tables, nothing that is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import yaml
from jinja2 import Environment, PackageLoader

from dwl_plugin.cli.output import printable
from dwl_plugin.cli.plots import MOST_LINES, Line, draw_panels, draw_shares, look_of, need_matplotlib, to_svg
from dwl_plugin.cli.report import tables
from dwl_plugin.cli.report.run import LoggedCurve, Run
from dwl_plugin.config import Block
from dwl_plugin.values import REST

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["page"]

_SETTINGS = 50_000  # characters


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document. Needs matplotlib."""
    need_matplotlib()
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"printable": printable, "settings": _settings}
    comparison = tables.compared(runs) if len(runs) > 1 else None
    return environment.get_template("page.html.j2").render(
        runs=runs, tables=tables, comparison=comparison, figures=list(_figures(runs)), version=version("axolotl-dwl")
    )


def _settings(block: Block) -> str:
    text = yaml.safe_dump(block.dump(), sort_keys=False, allow_unicode=True)
    left_out = len(text) - _SETTINGS
    return text if left_out <= 0 else f"{text[:_SETTINGS]}…\n# {left_out:,} more characters are left out here"


def _figures(runs: Sequence[Run]) -> Iterator[dict[str, str]]:
    """α over the run, nll by class, and of one run what else moves, and the share of the loss against the share of the tokens."""

    def drawn(title: str, caption: str, figure: Figure) -> dict[str, str]:
        return {"title": title, "caption": f"{caption} {left_out}".strip(), "svg": to_svg(figure, title)}

    run, single = runs[0], len(runs) == 1
    shown, left_out = tables.shown_of(runs, MOST_LINES)
    named = [name for name in shown if name != REST]
    classes = [*named, REST]
    weighing = [(each, look_of(at)) for at, each in enumerate(runs) if each.weighs_classes and each.train]
    if single and named and weighing:
        yield drawn("α over the run", "How much each class counts.", draw_panels({"": _by_class(run, shown, "alpha")}, "α"))
    elif named and weighing:
        panels = {name: [_line(each.name, each.curve(f"dwl/alpha/{name}"), look) for each, look in weighing] for name in classes}
        yield drawn("α by class", "How much the class counts.", draw_panels(panels, "α"))
    for key, title in tables.MOVING.items() if single else ():
        if lines := _by_class(run, shown, key):
            yield drawn(title, "", draw_panels({"": lines}, key))
    keys = {"all targets": "nll", **({name: f"dwl/nll/{name}" for name in classes} if named else {})}
    panels = {title: list(_nll_lines(runs, key)) for title, key in keys.items()}
    caption = "In nats per token, whatever α was. A gap: no such token in those steps."
    yield drawn("nll by class", caption, draw_panels(panels, "nll", from_zero=False))
    if single and named and run.train:
        rows = [(row.name, row.token_share, *row.loss_share) for row in tables.rows_of(run) if row.name in shown]
        caption = "Right of its bar a class has more say than its tokens, left of it less; means over a tenth of the steps."
        yield drawn("Share of the loss, share of the tokens", caption, draw_shares(*zip(*rows, strict=True)))


def _by_class(run: Run, names: Sequence[str], what: str) -> list[Line]:
    """A number of a run, a line a class that has it."""
    curves = [(name, run.curve(f"dwl/{what}/{name}"), look_of(at, plain=name == REST)) for at, name in enumerate(names)]
    return [_line(name, curve, look, limit=200) for name, curve, look in curves if curve]


def _nll_lines(runs: Sequence[Run], key: str) -> Iterator[Line]:
    """Training batches and held-out rows of every run; of a single one in two colours."""
    single = len(runs) == 1
    for at, run in enumerate(runs):
        if run.train:
            yield _line("training batches" if single else run.name, run.curve(key), look_of(at))
        if run.evals:
            label = "held-out rows" if single else f"{run.name}, held out"
            yield _line(label, run.eval_curve(key), look_of(1 if single else at), dots=True)


def _line(label: str, curve: LoggedCurve, look: Mapping[str, Any], dots: bool = False, limit: int = 80) -> Line:
    thin = curve.thinned(limit)
    return Line(label, thin.steps, thin.values, look, dots)
