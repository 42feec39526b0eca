"""The page of the rows: one file in which a sample's text is never more than text (`dwl_plugin/cli/html.py`)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from markupsafe import Markup, escape

from dwl_plugin.cli import html
from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.cli.inspect.rows import MASKED, ShownRow, factors_in, look, row_notes
from dwl_plugin.cli.output import fixed

__all__ = ["render_page"]


def render_page(title: str, seen: LookedAt, rows: Sequence[ShownRow]) -> str:
    """The whole page as text."""
    names = seen.class_names
    return html.render(
        __package__,
        more_style=_class_styles(len(names)),
        config=title,
        loss=seen.block and seen.block.loss,
        names=names,
        masked=MASKED,
        figures=seen.figures,
        weighted=any(figures.weight is not None for figures in seen.figures),
        survey=seen.survey,
        massed=seen.survey is not None and seen.survey.mass[-1] != seen.survey.targets,
        factors=_few(factors_in(rows)),
        data_sets=0 if seen.labeller is None else len(seen.labeller.data_sets),
        shade=_shade,
        fixed=fixed,
        rows=rows,
        packed=any(len(row.samples) > 1 for row in rows),
        notes=row_notes(seen),
        model=str(getattr(seen.tokenizer, "name_or_path", "")).rstrip("/").rsplit("/", 1)[-1],
        visible=_visible,
    )


def _class_styles(count: int) -> str:
    """Colour and underline of each class, and how its box in the table takes them away."""
    rules = []
    for index in range(count - 1):
        colour, underline = look(index)
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        rules.append(
            f".c{index}{{--hue:{red} {green} {blue};--line:{underline}}}"
            f"body:has(#k{index}:not(:checked)) .t.c{index}{{background:none;text-decoration:none}}"
            f"body:has(#k{index}:not(:checked)) .t.c{index}::before{{content:none}}"
        )
    return "\n".join(rules)


_SHADES = (0.25, 0.5, 0.999, 1.001, 2.0)


def _shade(factor: float) -> str:
    """The style of a target with this factor of the data: fainter below 1, bolder above."""
    if factor == 0:
        return "f0"
    return f"{'neg ' if factor < 0 else ''}f{1 + bisect_left(_SHADES, abs(factor))}"


def _few(factors: Sequence[float]) -> list[float]:
    """Of many factors, the first of each shade."""
    return sorted({_shade(factor): factor for factor in reversed(factors)}.values()) if len(factors) > 8 else list(factors)


def _visible(text: str) -> Markup:
    """A token's text with its line ends and tabs to be seen; an empty one still takes room."""
    marked = escape(text).replace("\n", Markup('<i class="nl"></i>\n')).replace("\t", Markup('<i class="tab"></i>\t'))
    return marked or Markup('<i class="none"></i>')
