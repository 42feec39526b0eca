"""`dwl check`: all that is wrong with a config, and what its classes are, before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.analysis import Examination, examine
from dwl_plugin.errors import ConfigError, Problem

__all__ = ["as_dict", "check", "class_figures", "class_table", "overlaps", "print_findings", "progress"]

_ALPHA_COLUMNS = ("α", "one token, vs SFT", "share of the weight")


def check(config: Path, samples: int, *, trust: bool, as_json: bool) -> int:
    """The whole command; the exit status."""
    console = Console(highlight=False)
    with progress(Console(stderr=True)) as say:
        seen = examine(config, samples, trust=trust, spread=True, say=say)
    if as_json:
        print(json.dumps(as_dict(seen), indent=2, ensure_ascii=False))
        return seen.status
    print_findings(console, seen)
    if seen.survey is not None:
        console.print(class_table(seen))
        for line in _overlap_lines(seen):
            console.print(line, soft_wrap=True)
    _print_list(console, "Hints", seen.hints)
    _print_list(console, "Notes", seen.notes + _row_notes(seen))
    console.print(_verdict(seen), soft_wrap=True)
    return seen.status


@contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    """A spinner that says what is being looked at."""
    with console.status("") as status:

        def say(stage: str) -> None:
            status.update(f"{stage} …")

        yield say


def print_findings(console: Console, seen: Examination) -> None:
    """What stops a run, and what could not be looked at."""
    if seen.dangers:
        console.print(f"[bold]{seen.config} could do this on your machine:[/]", soft_wrap=True)
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for danger in seen.dangers:
            table.add_row(Text(f"  {danger.does}"), Text(danger.path), Text(str(danger.value)), Text(danger.what))
        console.print(table)
        console.print("Nothing of it was done. If you trust it, say so with --trust.\n", soft_wrap=True)
    if seen.problems:
        count = len(seen.problems)
        console.print(f"[bold red]{count} problem{'s' if count != 1 else ''}[/]")
        for problem in seen.problems:
            text = str(problem).replace("\n", "\n  ")
            console.print(Text(f"  {text}"), soft_wrap=True)
        console.print()
    _print_list(console, "Not looked at", seen.unseen)


def _print_list(console: Console, title: str, lines: list[str]) -> None:
    if lines:
        console.print(f"[bold]{title}[/]")
        for line in lines:
            console.print(Text(f"  · {line}"), soft_wrap=True)
        console.print()


def class_table(seen: Examination) -> Table:
    """The classes in the rows looked at, and what α does to each."""
    assert seen.block is not None
    assert seen.survey is not None
    found = seen.survey
    intact = seen.block.loss == "dwl" and not seen.problems
    title = f"{found.targets:,} target tokens in {found.rows:,} rows"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column("class", no_wrap=True)
    for name in ("tokens", "share", "rows without", *(_ALPHA_COLUMNS if intact else ())):
        table.add_column(name, justify="right", no_wrap=name == "α")
    for row in class_figures(seen):
        cells = [f"{row['tokens']:,}", f"{row['token_share']:.1%}", f"{row['rows_without']:,}"]
        if intact:
            alpha = f"{row['alpha']:.3f}" + (f" → {row['alpha_end']:.3f}" if row["alpha_end"] != row["alpha"] else "")
            cells += [alpha, f"{row['one_token_vs_sft']:.2f}×", f"{row['weight_share']:.1%}"]
        table.add_row(row["name"], *cells)
    return table


def class_figures(seen: Examination) -> list[dict[str, Any]]:
    """The table's numbers. The columns of α need a block without problems."""
    from dwl_plugin.loss.reduction import class_weight_table

    assert seen.block is not None
    assert seen.survey is not None
    alpha, end = _alpha(seen)
    rows = class_weight_table(seen.block.reduction, seen.block.class_names, alpha, seen.survey.counts)
    figures = []
    for row, last, tokens, without in zip(rows, end, seen.survey.tokens, seen.survey.rows_without, strict=True):
        figure: dict[str, Any] = {"name": row.name, "tokens": tokens, "token_share": row.token_share, "rows_without": without}
        if seen.block.loss == "dwl" and not seen.problems:
            figure |= {"alpha": row.alpha, "alpha_end": last, "one_token_vs_sft": row.one_token, "weight_share": row.weight_share}
        figures.append(figure)
    return figures


def _alpha(seen: Examination) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """α at the first step and at the last."""
    from dwl_plugin.alpha.schedule import alpha_of

    assert seen.block is not None
    try:
        assert seen.length is not None
        alpha_at = alpha_of(seen.block, seen.length)
    except ConfigError:  # it is among the problems
        return seen.block.alpha, seen.block.alpha
    return alpha_at(0), alpha_at(seen.length.total_steps or 0)


def overlaps(seen: Examination) -> list[tuple[str, str, int]]:
    """Pairs of classes that match the same targets, and how many; the one that wins first."""
    if seen.labeller is None or seen.rows is None or seen.survey is None:
        return []
    names = seen.labeller.names[:-1]
    shared = np.zeros((len(names), len(names)), np.int64)
    for sample in seen.rows.samples:
        members = seen.labeller.members(sample["input_ids"], sample["labels"], sample.get("position_ids")).astype(np.int64)
        shared += members @ members.T
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names)) if shared[i, j]]
    return [(names[i], names[j], int(shared[i, j])) for i, j in pairs]


def _overlap_lines(seen: Examination) -> list[str]:
    found = overlaps(seen)
    if not found:
        return ["No token is matched by two classes.\n"]
    dwl = None if seen.block is None else seen.block.dwl
    whose = "the first keeps them" if dwl is None or dwl.overlap == "first" else "they pay in both"
    lines = [f"  · {first} and {second}: {count:,}" for first, second, count in found]
    return [f"[bold]Tokens that two classes match[/]; {whose}", *lines, ""]


def _row_notes(seen: Examination) -> list[str]:
    if seen.rows is None:
        return []
    rows, notes = seen.rows, list(seen.rows.notes)
    if rows.too_long:
        notes.append(
            f"{rows.too_long:,} of the {rows.looked_at:,} rows looked at are dropped by `sequence_len` and `min_sample_len`"
        )
    if rows.masked:
        notes.append(f"{rows.masked:,} of the {rows.looked_at:,} rows looked at are dropped: every label is -100")
    if rows.total is not None and seen.length is not None and seen.length.total_steps:
        notes.append(f"{rows.total:,} rows to train on; about {seen.length.total_steps:,} optimizer steps")
    return notes


def _verdict(seen: Examination) -> str:
    if seen.problems:
        return "[bold red]This config would not train.[/]"
    if seen.stopped or seen.unseen:
        return "[bold yellow]No problem found, but not all of it could be looked at.[/]"
    return "[bold green]No problem found.[/]"


def as_dict(seen: Examination) -> dict[str, Any]:
    """For machines; what could not be found out is left out."""
    out: dict[str, Any] = {
        "config": str(seen.config),
        "status": seen.status,
        "problems": [_plain(problem) for problem in seen.problems],
        "dangers": [{"path": d.path, "value": str(d.value), "does": d.does, "what": d.what} for d in seen.dangers],
        "not_looked_at": seen.unseen,
        "hints": seen.hints,
        "notes": seen.notes + _row_notes(seen),
    }
    if seen.survey is not None:
        out |= {
            "rows": seen.survey.rows,
            "targets": seen.survey.targets,
            "classes": class_figures(seen),
            "overlaps": [{"classes": [first, second], "tokens": count} for first, second, count in overlaps(seen)],
        }
    return out


def _plain(problem: Problem) -> dict[str, Any]:
    plain: dict[str, Any] = {"path": problem.path, "message": problem.message}
    plain |= {key: text for key, text in (("allowed", problem.allowed), ("hint", problem.hint)) if text}
    if problem.has_value:
        value = problem.value
        plain["value"] = value if value is None or isinstance(value, (str, int, float)) else str(value)
    return plain
