"""`dwl check`: all that is wrong with a config, and what its classes are, before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.analysis import ClassFigures, LookedAt, analyse
from dwl_plugin.cli.data_table import data_figures
from dwl_plugin.cli.first_look import WITHOUT_LOSS, Findings, Teller
from dwl_plugin.cli.output import fixed, number, print_json, say, say_list, table_of_classes
from dwl_plugin.errors import Problem

if TYPE_CHECKING:
    from dwl_plugin.classes import ClassSurvey

__all__ = ["check", "class_table", "print_findings"]

_ALPHA_COLUMNS = ("α", "one token, vs SFT", "share of the weight")


def check(console: Console, config: Path, samples: int, trust: bool, as_json: bool) -> int:
    """The whole command; the exit status."""
    tell = Teller(None if as_json else console)
    found, seen = analyse(config, samples, trust, spread=True, tell=tell)
    print_findings(console, found, seen, as_json, tell)
    if not as_json:
        if seen is not None and seen.survey is not None:
            console.print(class_table(seen.survey, seen.figures))
            if figures := data_figures(seen):
                if seen.block is not None and seen.block.data_weights is not None:
                    console.print(figures.table())
                for table in figures.group_tables():
                    console.print(table)
                say_list(console, "", list(figures.sentences()))
            if len(seen.class_names) > 1:
                _print_overlaps(console, seen)
        say_list(console, "Hints", found.hints)
        say_list(console, "Notes", found.notes + _row_notes(seen))
        say(console, *_verdict(found))
    return found.status


def print_findings(
    console: Console, found: Findings, seen: LookedAt | None, as_json: bool = False, tell: Teller | None = None
) -> None:
    """What stops a run, as far as `tell` has not told it yet, and what could not be looked at; or everything, for machines."""
    if as_json:
        print_json(console, as_dict(found, seen))
        return
    (tell or Teller(console))(found)
    say_list(console, "Not looked at", found.unseen)


def class_table(survey: ClassSurvey, figures: Sequence[ClassFigures]) -> Table:
    """The classes in the rows looked at, and what α does to each."""
    table = table_of_classes(f"{survey.targets:,} target tokens in {survey.rows:,} rows")
    weighs = survey.mass[-1] != survey.targets
    for name in (
        "tokens",
        "share",
        *(["Σ|w|"] if weighs else []),
        "rows without",
        *(_ALPHA_COLUMNS if figures[0].weight is not None else ()),
    ):
        table.add_column(name, justify="right", no_wrap=name == "α")
    for row in figures:
        mass = [fixed(row.mass, 1)] if weighs else []
        cells = [f"{row.tokens:,}", f"{row.token_share:.1%}", *mass, f"{row.rows_without:,}"]
        if row.weight is not None:
            alpha = number(row.weight.alpha) + (f" → {number(row.alpha_end)}" if row.alpha_end != row.weight.alpha else "")
            cells += [alpha, f"{row.weight.one_token:.2f}×", f"{row.weight.weight_share:.1%}"]
        table.add_row(row.name, *cells)
    return table


def overlaps(seen: LookedAt) -> list[tuple[str, str, int]]:
    """Pairs of classes that match the same targets, and how many; the one that wins first."""
    names = seen.class_names
    shared = np.zeros((len(names), len(names)), np.int64)
    for sample in seen.rows.samples:
        members = seen.members(sample, matched=True).astype(np.int64)
        shared += members @ members.T
    return [(names[i], names[j], int(shared[i, j])) for i, j in np.argwhere(np.triu(shared, 1))]


def _print_overlaps(console: Console, seen: LookedAt) -> None:
    pairs = overlaps(seen)
    if not pairs:
        console.print("No token is matched by two classes.\n")
        return
    whose = "they pay in both" if seen.labeller is not None and seen.labeller.overlap == "sum" else "the first keeps them"
    console.print(Text.assemble(("Tokens that two classes match", "bold"), f"; {whose}"))
    for first, second, count in pairs:
        say(console, f"  · {first} and {second}: {count:,}")
    console.print()


def _row_notes(seen: LookedAt | None) -> list[str]:
    if seen is None:
        return []
    rows, steps, notes = seen.rows, seen.length.total_steps, list(seen.rows.notes)
    for count, why in ((rows.too_long, " by `sequence_len` and `min_sample_len`"), (rows.masked, ": every label is -100")):
        if count:
            notes.append(f"{count:,} of the {rows.looked_at:,} rows looked at are dropped{why}")
    if rows.total is not None and steps and (rows.samples or not rows.looked_at):
        notes.append(f"{rows.total:,} rows to train on; about {steps:,} optimizer steps")
    return notes


def _verdict(found: Findings) -> tuple[str, str]:
    if found.problems and all(problem.message == WITHOUT_LOSS for problem in found.problems):
        return "This config would train, and without this package.", "bold yellow"
    if found.status == 1:
        return "This config would not train.", "bold red"
    if found.status == 2:
        return f"Not all of it could be looked at. No problem in what was: {', '.join(found.looked_at)}.", "bold yellow"
    return "No problem found.", "bold green"


def as_dict(found: Findings, seen: LookedAt | None) -> dict[str, Any]:
    """For machines; what could not be found out is left out."""
    out: dict[str, Any] = {
        "config": str(found.path),
        "status": found.status,
        "problems": [_problem(problem) for problem in found.problems],
        "dangers": [asdict(danger) | {"value": str(danger.value)} for danger in found.dangers],
        "not_looked_at": found.unseen,
        "hints": found.hints,
        "notes": found.notes + _row_notes(seen),
    }
    if seen is not None and seen.survey is not None:
        out |= {
            "rows": seen.survey.rows,
            "targets": seen.survey.targets,
            "classes": [_figures(row) for row in seen.figures],
            **({"data": figures.as_dict()} if (figures := data_figures(seen)) else {}),
            "overlaps": [{"classes": [first, second], "tokens": count} for first, second, count in overlaps(seen)],
        }
    return out


def _figures(row: ClassFigures) -> dict[str, Any]:
    plain = {
        "name": row.name,
        "tokens": row.tokens,
        "token_share": row.token_share,
        "mass": row.mass,
        "rows_without": row.rows_without,
    }
    if (weight := row.weight) is not None:
        plain |= {"alpha": weight.alpha, "alpha_end": row.alpha_end}
        plain |= {"one_token_vs_sft": weight.one_token, "weight_share": weight.weight_share}
    return plain


def _problem(problem: Problem) -> dict[str, Any]:
    plain: dict[str, Any] = {"path": problem.path, "message": problem.message}
    plain |= {key: text for key, text in (("allowed", problem.allowed), ("hint", problem.hint)) if text}
    if problem.has_value:
        value = problem.value
        is_json = value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
        plain["value"] = value if is_json else str(value)
    return plain
