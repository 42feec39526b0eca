"""Figures: one palette that the colour-blind can tell apart, and a dash of its own for every line. matplotlib is an extra."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from dwl_plugin.cli.output import short
from dwl_plugin.errors import DWLError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "MOST_LINES",
    "PALETTE",
    "Line",
    "draw_panels",
    "draw_shares",
    "look_of",
    "need_matplotlib",
    "to_image",
    "to_svg",
]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito (2008), without its yellow and black, which vanish on white and on dark paper."""

INK, GRID = "#1b1d21", "#d4d7dc"

_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)))

MOST_LINES = len(PALETTE) * len(_DASHES)
"""Above it two lines of a figure look alike, and panels take longer than a person waits."""

_WIDTH = 7.6  # inches

_STYLE = "dwl_plugin.cli.plots"  # plots.mplstyle


def need_matplotlib() -> None:
    """Raises `DWLError` with the remedy where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise DWLError("Figures need matplotlib, which is not installed here: pip install 'axolotl-dwl[plots]'")


@dataclass(frozen=True)
class Line:
    """`look`: options of matplotlib. `dots`: markers on a thin line, for what is measured now and then."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    look: Mapping[str, Any]
    dots: bool = False


def look_of(index: int, plain: bool = False) -> dict[str, Any]:
    """Colour and dash of the line with this index; no two of 30 agree in both. `plain`: ink, for what is no class."""
    dash = _DASHES[-1] if plain else _DASHES[index % len(_DASHES)]
    return {"color": INK if plain else PALETTE[index % len(PALETTE)], "linestyle": dash}


def draw_panels(panels: Mapping[str, Sequence[Line]], y_label: str, from_zero: bool = True) -> Figure:
    """A panel a title, three in a row on the same axes, with one legend."""
    from matplotlib import style
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    labels = dict.fromkeys(line.label for lines in panels.values() for line in lines)
    beside = len(panels) == 1
    height = max(3.1, 0.8 + 0.19 * len(labels)) if beside else 0.65 + 1.75 * rows + 0.19 * (len(labels) // 3)
    with style.context(_STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
            _draw(axes, lines)
            axes.set_title(short(title, 24))
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        for lowest in grid.flat[len(panels) - columns : len(panels)]:
            lowest.tick_params(labelbottom=True)
        values = np.array([value for lines in panels.values() for line in lines for value in line.values], float)
        _scale(grid[0, 0], values[np.isfinite(values)], from_zero)
        if beside:
            grid[0, 0].set(xlabel="optimizer step", ylabel=y_label)
        else:
            figure.supxlabel("optimizer step", fontsize=9)
            figure.supylabel(y_label, fontsize=9)
        handles = {line.get_label(): line for axes in grid.flat[: len(panels)] for line in axes.get_lines()}
        where = {"loc": "outside right upper"} if beside else {"loc": "outside upper left", "ncols": 3}
        figure.legend(handles.values(), [short(str(label), 30) for label in handles], **where)
    return figure


def draw_shares(names: Sequence[str], tokens: Sequence[float], start: Sequence[float], end: Sequence[float]) -> Figure:
    """A row a class: the share of the tokens as a bar, the share of the loss from the start of the run to its end."""
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with style.context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.95 + 0.36 * len(names)), layout="constrained")
        axes = figure.subplots()
        rows = range(len(names))
        axes.barh(rows, np.nan_to_num(tokens), height=0.62, color=GRID, label="share of the tokens")
        axes.hlines(rows, start, end, color=PALETTE[0], linewidth=1.3, zorder=3)
        hollow: dict[str, Any] = {"color": PALETTE[0], "markerfacecolor": "none", "markersize": 6, "zorder": 3}
        axes.plot(start, rows, "o", label="share of the loss, start", **hollow)
        axes.plot(end, rows, "D", color=PALETTE[1], markersize=6, zorder=4, label="share of the loss, end")
        axes.set_yticks(rows, [short(name, 30) for name in names])
        axes.invert_yaxis()
        widest = max((value for values in (tokens, start, end) for value in values if value > 0), default=0.0)
        axes.set_xlim(0, 1.05 * widest or 1.0)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def to_svg(figure: Figure, label: str) -> str:
    """`figure` as an SVG element to stand in a page: its colours are the page's CSS variables, its size the column's."""
    text = to_image(figure, ".svg", transparent=True).decode()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[^"]*"', "", text, count=2)  # those of the <svg> itself
    text = text.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    for colour, name in ((INK, "ink"), (GRID, "grid"), *((colour, f"c{at}") for at, colour in enumerate(PALETTE))):
        text = text.replace(colour, f"var(--{name})")
    return text


def to_image(figure: Figure, suffix: str, transparent: bool = False) -> bytes:
    """`figure` as a file of that suffix: .png, .svg, .pdf; on white unless transparent."""
    from matplotlib import style

    out, metadata = io.BytesIO(), {"Date": None} if suffix == ".svg" else None
    with style.context(_STYLE):
        figure.savefig(out, format=suffix[1:], dpi=160, transparent=transparent, metadata=metadata)
    return out.getvalue()


def _draw(axes: Axes, lines: Sequence[Line]) -> None:
    for at, line in enumerate(lines):
        look = dict(line.look)
        known = np.pad(np.isfinite(np.array(line.values, float)), 1)
        alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()
        if line.dots:
            look |= {"marker": "o", "linewidth": 0.9} | ({"linestyle": "none"} if len(line.steps) < 3 else {})
        elif alone:  # a value between two gaps is no line by itself
            look |= {"marker": ".", "markevery": alone}
        # Lines may lie on one another: the earlier are wider, so that both are seen.
        axes.plot(line.steps, line.values, label=line.label, **{"linewidth": max(2.2 - 0.3 * at, 1.2)} | look)
    if not any(map(math.isfinite, (value for line in lines for value in line.values))):
        axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes)


def _scale(axes: Axes, values: np.ndarray[Any, np.dtype[np.float64]], from_zero: bool) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.locator_params(axis="x", nbins=6, integer=True)
    if from_zero and values.size and values.min() >= 0:
        axes.set_ylim(0, values.max() * 1.05 or 1.0)
    elif values.size and 0 < 30 * values.min() < values.max():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
