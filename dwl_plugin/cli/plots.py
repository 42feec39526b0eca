"""Figures: one palette that the colour-blind can tell apart, and a dash of its own for every line. matplotlib is an extra."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
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
    "OURS",
    "PALETTE",
    "STYLE",
    "Line",
    "draw_lines",
    "draw_panels",
    "draw_shares",
    "frame_of",
    "look_of",
    "need_matplotlib",
    "stroke_of",
    "to_image",
    "to_svg",
]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito (2008), without its yellow and black, which vanish on white and on dark paper."""

OURS = PALETTE[0]
"""This package among others, in every figure that has both; what it is compared with is in ink."""

INK, GRID = "#1b1d21", "#d4d7dc"

_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)))

MOST_LINES = len(PALETTE) * len(_DASHES)
"""Above it two lines of a figure look alike, and panels take longer than a person waits."""

_WIDTH, _PAGE_WIDTH, _PANEL_WIDTH = 7.6, 4.2, 3.0
"""Inches: of an image, of a figure on a page, which a phone shows at 0.85 of its size, and of one of several beside one another."""

STYLE = "dwl_plugin.cli.plots"  # plots.mplstyle


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


def stroke_of(line: Line) -> tuple[str, str]:
    """The same for a page: the CSS variable of the colour, and the dashes of a stroke that is 2 wide."""
    colour, dash = line.look["color"], line.look["linestyle"]
    name = "ink" if colour == INK else f"c{PALETTE.index(colour)}"
    return f"--{name}", "" if dash == "-" else " ".join(f"{2 * length:g}" for length in dash[1])


def draw_lines(lines: Sequence[Line], y_label: str) -> Figure:
    """One image, whose lines are named beside it."""
    from matplotlib import style

    with style.context(STYLE):
        figure, axes = _figure(_WIDTH, max(3.1, 0.8 + 0.19 * len(lines)))
        _draw(axes, lines)
        axes.set(xlabel="optimizer step", ylabel=y_label + _scale(axes, lines, from_zero=True))
        figure.legend(axes.get_lines(), [short(line.label, 30) for line in lines], loc="outside right upper")
    return figure


def draw_panels(panels: Sequence[Sequence[Line]], y_label: str, from_zero: bool = True) -> Iterator[Figure]:
    """Figures for a page, on the same axes: it names the lines, says what each panel shows, and puts them beside one another."""
    from matplotlib import style

    width = _PAGE_WIDTH if len(panels) == 1 else _PANEL_WIDTH
    every = [line for lines in panels for line in lines]
    for lines in panels:
        with style.context(STYLE):
            figure, axes = _figure(width, 0.55 * width)
            _draw(axes, lines)
            axes.set(xlabel="optimizer step", ylabel=y_label + _scale(axes, every, from_zero))
        yield figure


def draw_shares(names: Sequence[str], tokens: Sequence[float], start: Sequence[float], end: Sequence[float]) -> Figure:
    """A row a class: the share of the tokens as a bar, the share of the loss from the start of the run to its end."""
    from matplotlib import style
    from matplotlib.ticker import PercentFormatter

    with style.context(STYLE):
        figure, axes = _figure(_PAGE_WIDTH, 0.95 + 0.42 * len(names))
        rows = range(len(names))
        axes.barh(rows, np.nan_to_num(tokens), height=0.5, color=GRID, label="tokens")
        axes.hlines(rows, start, end, color=PALETTE[0], linewidth=1.3, zorder=3)
        hollow: dict[str, Any] = {"color": PALETTE[0], "markerfacecolor": "none", "markersize": 6, "zorder": 3}
        axes.plot(start, rows, "o", label="loss, start", **hollow)
        axes.plot(end, rows, "D", color=PALETTE[1], markersize=6, zorder=4, label="loss, end")
        for row, name in zip(rows, names, strict=True):  # above its bar, so that the bars have the whole width
            axes.annotate(short(name, 40), (0, row - 0.25), xytext=(2, 1.5), textcoords="offset points", fontsize=8)
        axes.set_yticks([])
        axes.set_ylim(len(names) - 0.6, -0.75)
        widest = max((value for values in (tokens, start, end) for value in values if value > 0), default=0.0)
        axes.set_xlim(0, 1.05 * widest or 1.0)
        axes.locator_params(axis="x", nbins=6)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def frame_of(figure: Figure) -> dict[str, Any]:
    """Of a figure with one panel that has been written: where its axes lie, in shares of width and height, and what they span."""
    (axes,) = figure.axes
    box = axes.get_position()
    return {
        "box": [box.x0, 1 - box.y1, box.x1, 1 - box.y0],
        "x": list(axes.get_xlim()),
        "y": list(axes.get_ylim()),
        "log": axes.get_yscale() == "log",
    }


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
    with style.context(STYLE):
        figure.savefig(out, format=suffix[1:], transparent=transparent, metadata=metadata)
    return out.getvalue()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


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


def _scale(axes: Axes, lines: Sequence[Line], from_zero: bool) -> str:
    """Both axes over all that `lines` span, which may be more than is drawn; what the label of the second has to say of it."""
    from matplotlib.ticker import FuncFormatter

    axes.locator_params(axis="x", nbins=6, integer=True)
    steps = [step for line in lines for step in line.steps]
    if steps and min(steps) < max(steps):
        margin = 0.03 * (max(steps) - min(steps))
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    values = [value for line in lines for value in line.values if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=0.0)
    if from_zero and values and low >= 0:
        axes.set_ylim(0, high * 1.05 or 1.0)
    elif 0 < 30 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.4, high * 1.4)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
        return ", logarithmic"
    elif low < high:
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    return ""
