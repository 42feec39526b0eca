"""How our figures look: a palette that the colour-blind can tell apart, a line style and a marker of its own for every line, names
at the lines' ends. Needs matplotlib, which is an extra.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from dwl_plugin.errors import DWLError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "PALETTE",
    "Line",
    "Panel",
    "Style",
    "draw_grid",
    "draw_labelled",
    "draw_shares",
    "need_matplotlib",
    "style_of",
    "to_image",
    "to_svg",
]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito (2008), without its yellow and black, which vanish on white and on dark paper."""

INK, GRID = "#1b1d21", "#d4d7dc"

_DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (3, 1.5)))
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_FEW_POINTS = 30
_LABEL_INCHES = 0.19
_LABEL_LETTERS = 30

_RC = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial", "sans-serif"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,  # a `$` in a name is a dollar
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "svg.fonttype": "none",  # text stays text: it can be searched, read aloud, and takes the page's colour
    "svg.hashsalt": "dwl",  # the same run gives the same file
}


def need_matplotlib() -> None:
    """Raises `DWLError` with the remedy where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise DWLError("Figures need matplotlib, which is not installed here: pip install 'axolotl-dwl[plots]'")


@dataclass(frozen=True)
class Style:
    colour: str
    dash: Any
    marker: str


@dataclass(frozen=True)
class Line:
    """`dots`: only markers joined by a thin line, for what is measured now and then."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    style: Style
    dots: bool = False

    @property
    def points(self) -> list[tuple[float, float]]:
        return [(step, value) for step, value in zip(self.steps, self.values, strict=True) if math.isfinite(value)]


@dataclass(frozen=True)
class Panel:
    title: str
    lines: Sequence[Line]


def style_of(index: int, plain: bool = False) -> Style:
    """The look of the `index`-th line; no two of 210 agree in colour, dashes and marker. `plain`: ink, for what is no class."""
    if plain:
        return Style(INK, _DASHES[-1], "x")
    return Style(PALETTE[index % len(PALETTE)], _DASHES[index % len(_DASHES)], _MARKERS[index % len(_MARKERS)])


def draw_labelled(panel: Panel, y_label: str, x_label: str = "optimizer step") -> Figure:
    """One panel, every line named at its right end in its own colour."""
    from matplotlib.figure import Figure

    with _style():
        longest = max((len(_short(line.label)) for line in panel.lines), default=0)
        height = max(3.1, 0.8 + _LABEL_INCHES * len(panel.lines))
        figure = Figure(figsize=(7.6, height))
        figure.subplots_adjust(left=0.085, right=0.965 - 0.01 * longest, bottom=0.5 / height, top=1 - 0.12 / height)
        axes = figure.subplots()
        _draw(axes, panel.lines)
        axes.set(xlabel=x_label, ylabel=y_label)
        _from_zero(axes, [value for line in panel.lines for _, value in line.points])
        _scale_x(axes, panel.lines)
        _label_ends(axes, panel.lines, gap=_LABEL_INCHES / (height - 0.62))
    return figure


def draw_grid(panels: Sequence[Panel], y_label: str, from_zero: bool = False) -> Figure:
    """Small panels on the same axes, three in a row, with one legend for all of them."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    with _style():
        columns = min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure = Figure(figsize=(7.6, 0.65 + 1.75 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        values = [value for panel in panels for line in panel.lines for _, value in line.points]
        wide = not from_zero and bool(values) and min(values) > 0 and max(values) > 30 * min(values)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _draw(axes, panel.lines, width=1.6)
            axes.set_title(_short(panel.title))
            if wide:
                axes.set_yscale("log")
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
            if from_zero:
                _from_zero(axes, values)
            if not any(line.points for line in panel.lines):
                axes.text(0.5, 0.5, "nothing logged", ha="center", va="center", transform=axes.transAxes)
        _scale_x(grid[0, 0], [line for panel in panels for line in panel.lines])
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for at, axes in enumerate(grid.flat[: len(panels)]):
            axes.tick_params(labelbottom=at + columns >= len(panels))
        figure.supxlabel("optimizer step", fontsize=9)
        figure.supylabel(y_label, fontsize=9)
        handles = {line.get_label(): line for axes in grid.flat for line in axes.get_lines()}
        handles = {label: line for label, line in handles.items() if not label.startswith("_child")}
        figure.legend(handles.values(), map(_short, handles), loc="outside upper left", ncols=3)
    return figure


def draw_shares(names: Sequence[str], tokens: Sequence[float], start: Sequence[float], end: Sequence[float]) -> Figure:
    """One row a class: the share of the tokens as a bar, the share of the loss as an arrow from the start of the run to its end."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    with _style():
        figure = Figure(figsize=(7.6, 0.95 + 0.36 * len(names)), layout="constrained")
        axes = figure.subplots()
        rows = range(len(names))
        bars = [0.0 if math.isnan(share) else share for share in tokens]
        axes.barh(rows, bars, height=0.62, color=GRID, label="share of the tokens")
        axes.hlines(rows, start, end, color=PALETTE[0], linewidth=1.3, zorder=3)
        hollow: dict[str, Any] = {"color": PALETTE[0], "markerfacecolor": "none", "markersize": 6, "zorder": 3}
        axes.plot(start, rows, "o", label="share of the loss, start", **hollow)
        axes.plot(end, rows, "D", color=PALETTE[1], markersize=6, zorder=4, label="share of the loss, end")
        axes.set_yticks(rows, list(map(_short, names)))
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        figure.legend(loc="outside upper left", ncols=3)
    return figure


def to_svg(figure: Figure, label: str) -> str:
    """`figure` as an SVG element to stand in a page: its colours are the page's CSS variables, its size the column's."""
    out = io.StringIO()
    with _style():
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1)
    text = text.replace("<svg ", f'<svg role="img" aria-label="{_attribute(label)}" ', 1)
    for colour, name in ((INK, "ink"), (GRID, "grid"), *((colour, f"c{at}") for at, colour in enumerate(PALETTE))):
        text = text.replace(colour, f"var(--{name})")
    return text


def to_image(figure: Figure, suffix: str) -> bytes:
    """`figure` as a file of that suffix: .png, .svg, .pdf. On white."""
    out = io.BytesIO()
    with _style():
        figure.savefig(out, format=suffix.removeprefix("."), dpi=160, metadata={"Date": None} if suffix == ".svg" else None)
    return out.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_RC):  # type: ignore[arg-type]
        yield


def _draw(axes: Axes, lines: Sequence[Line], width: float = 2.4) -> None:
    for at, line in enumerate(lines):
        style, count = line.style, len(line.steps)
        every = 1 if line.dots or count <= _FEW_POINTS else (at * 7 % (count // 8), count // 8)
        between = "-" if count > 2 else "none"  # what lies between two points is not known
        # Lines may lie on one another: the earlier are wider, so that both are seen.
        axes.plot(
            line.steps,
            line.values,
            label=line.label,
            color=style.colour,
            linestyle=between if line.dots else style.dash,
            marker=style.marker,
            markevery=every,
            linewidth=0.9 if line.dots else max(width - 0.3 * at, 1.0),
        )
        alone = list(_alone(line.steps, line.values))  # between two gaps, and no line by itself
        axes.plot([step for step, _ in alone], [value for _, value in alone], ".", color=style.colour, markersize=3)


def _alone(steps: Sequence[float], values: Sequence[float]) -> Iterator[tuple[float, float]]:
    padded = [math.nan, *values, math.nan]
    for at, step in enumerate(steps):
        before, value, after = padded[at : at + 3]
        if math.isfinite(value) and not math.isfinite(before) and not math.isfinite(after):
            yield step, value


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    if values and min(values) >= 0:
        axes.set_ylim(0, max(values) * 1.05 or 1.0)


def _scale_x(axes: Axes, lines: Sequence[Line]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = [step for line in lines for step in line.steps] or [0]
    low, high = min(steps), max(steps)
    pad = 0.5 if low == high else 0.02 * (high - low)
    axes.set_xlim(low - pad, high + pad)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _label_ends(axes: Axes, lines: Sequence[Line], gap: float) -> None:
    """Names at the right, moved apart where the lines end close together, and tied to their lines."""
    ends = sorted(((line.points[-1], line) for line in lines if line.points), key=lambda item: item[0][1])
    if not ends:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    heights = [float(to_axes.transform(point)[1]) for point, _ in ends]
    places = _apart(heights, gap)
    for (point, line), place in zip(ends, places, strict=True):
        thread = {"arrowstyle": "-", "color": line.style.colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2}
        axes.annotate(
            _short(line.label),
            xy=point,
            xycoords="data",
            xytext=(1.035, place),
            textcoords="axes fraction",
            color=line.style.colour,
            va="center",
            ha="left",
            fontsize=9,
            annotation_clip=False,
            arrowprops={**thread, "relpos": (0.0, 0.5)},
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """`heights`, ascending, moved as little as it takes to lie `gap` apart and inside 0…1: neighbours that would touch share
    their middle."""
    groups: list[tuple[float, int]] = []  # sum of the members' heights, members

    def middle(group: tuple[float, int]) -> float:
        half = gap * (group[1] - 1) / 2
        return max(min(group[0] / group[1], 1.0 - half), half)

    for height in heights:
        groups.append((height, 1))
        while len(groups) > 1 and middle(groups[-1]) - middle(groups[-2]) < gap * (groups[-1][1] + groups[-2][1]) / 2:
            (last, m), (before, n) = groups.pop(), groups.pop()
            groups.append((last + before, m + n))
    return [middle(group) + gap * (k - (group[1] - 1) / 2) for group in groups for k in range(group[1])]


def _short(label: str) -> str:
    """A label that fits; of a long one its two ends, which is where names differ."""
    half = _LABEL_LETTERS // 2
    return label if len(label) <= _LABEL_LETTERS else f"{label[:half]}…{label[-half:]}"


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")
