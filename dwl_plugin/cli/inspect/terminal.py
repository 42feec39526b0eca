"""Rows in the terminal. Colour is never the only sign: each run of a class begins with the number of the class, and each run of a
factor of the data with that, as ×₀.₃."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.rule import Rule
from rich.style import Style
from rich.text import Text

from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.cli.inspect.rows import MASKED, ShownRow, ShownSample, factors_in, look, row_notes
from dwl_plugin.cli.output import printable

__all__ = ["print_rows"]

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_LOWERED = str.maketrans("0123456789+-", "₀₁₂₃₄₅₆₇₈₉₊₋")
_TAKEN_OUT, _NEGATIVE = Style(dim=True, strike=True), Style(color="red")


def print_rows(console: Console, seen: LookedAt, rows: Sequence[ShownRow]) -> None:
    """A legend, then each row under a rule."""
    names = seen.class_names
    console.print(_legend(names))
    factors = factors_in(rows)
    if factors:
        console.print(_factor_legend(factors))
    for note in row_notes(seen):
        console.print(Text(note, "dim"), soft_wrap=True)
    for number, row in enumerate(rows, 1):
        console.print(Rule(Text(f"row {number} of {len(rows)}, {row.tokens:,} tokens"), align="left", style="bold"))
        for index, sample in enumerate(row.samples, 1):
            if len(row.samples) > 1:
                title = f"sample {index} of {len(row.samples)} in this row, {sample.targets:,} targets"
                console.print(Rule(Text(title), align="left", characters="╌", style="dim"))
            console.print(_coloured(sample, len(names) - 1, bool(factors)), soft_wrap=True)


def _legend(names: Sequence[str]) -> Text:
    legend = Text()
    for index, name in enumerate(names[:-1]):
        legend.append(f"{_raised(index)}{name}", _style(index)).append("  ")
    return legend.append(f"{names[-1]}  ").append("not trained on", "dim")


def _factor_legend(factors: Sequence[float]) -> Text:
    legend = Text.assemble((f"{_lowered(0.3)}", "bold"), " what the data makes each target count from here on")
    if 0 in factors:
        legend.append("  ").append(f"{_lowered(0)}taken out by the data", _TAKEN_OUT)
    if factors[0] < 0:
        legend.append("  ").append(f"{_lowered(-1)}made less probable", _NEGATIVE)
    return legend


def _coloured(sample: ShownSample, rest: int, with_factors: bool) -> Text:
    text, before, factor = Text(), MASKED, 1.0
    for token in sample.tokens:
        index = token.class_index
        if with_factors and token.counted is not None and token.counted != factor:
            factor = token.counted
            text.append(_lowered(factor), "bold")
        if index not in (before, rest, MASKED):
            text.append(_raised(index), _style(index) + Style(bold=True))
        style = Style(dim=True) if index == MASKED else Style() if index == rest else _style(index)
        if token.taken_out:
            style = _TAKEN_OUT
        elif token.counted is not None and token.counted < 0:
            style += _NEGATIVE
        text.append(printable(token.text, keep="\n\t"), style)
        before = index
    return text


def _style(index: int) -> Style:
    colour, underline = look(index)
    dark = colour in ("#0072b2", "#009e73", "#d55e00")
    return Style(bgcolor=colour, color="white" if dark else "black", underline=underline == "double", italic=underline == "dashed")


def _lowered(factor: float) -> str:
    return f"×{factor:.3g}".translate(_LOWERED)


def _raised(index: int) -> str:
    return str(index + 1).translate(_RAISED)
