"""What a config's file says of itself, told at once: nothing here imports Axolotl or torch, which take longer than all else."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rich.console
from rich.table import Table
from rich.text import Text

from dwl_plugin.cli.config_file import read_config
from dwl_plugin.cli.output import printable, say
from dwl_plugin.cli.trust import Danger, fetched_packs
from dwl_plugin.cli.wall import came_from_wall
from dwl_plugin.config import Block
from dwl_plugin.config.overrides import overridden, overrides_of
from dwl_plugin.config.salvage import salvage
from dwl_plugin.config.straighten import straightened
from dwl_plugin.errors import ConfigError, Problem, did_you_mean
from dwl_plugin.hosts.incompatible import refused
from dwl_plugin.hosts.needed_files import MISSING_DATA, file_problems, on_the_hub_perhaps
from dwl_plugin.hosts.plugin_line import named_right

__all__ = ["WITHOUT_LOSS", "Findings", "Raw", "Teller", "first_look"]

Raw = dict[str, Any]
"""A config as it is written."""

WITHOUT_LOSS = "this config has no `loss`, so dwl_plugin does nothing in it"
_LONGEST = 200
"""Characters of a value in the list of dangers."""


@dataclass(frozen=True)
class Findings:
    """What there is to say of a config, from all stages together."""

    path: Path
    problems: list[Problem] = field(default_factory=list)
    dangers: list[Danger] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    looked_at: list[str] = field(default_factory=list)

    @property
    def status(self) -> int:
        """0: nothing wrong; 1: problems; 2: no problem, but not all could be looked at."""
        return 1 if self.problems else 2 if self.unseen or self.dangers else 0

    def add(self, error: ConfigError) -> None:
        """The problems of an error that are not known yet; none where the wall is what they come from."""
        if came_from_wall(error):
            return
        self.problems.extend(problem for problem in error.problems if problem not in self.problems)


class Teller:
    """Prints problems and dangers as soon as they are found, each once. Without a console it only keeps silent."""

    def __init__(self, console: rich.console.Console | None) -> None:
        self._console = console
        self._told: list[Problem | Danger] = []

    def __call__(self, found: Findings, *, but: tuple[str, ...] = ()) -> None:
        """Tell what is new; `but`: not what has one of these messages, and may yet be none."""
        if self._console is None:
            return
        if dangers := [danger for danger in found.dangers if danger not in self._told]:
            say(self._console, f"{found.path} could do this on your machine:", "bold")
            self._console.print(_list_of(dangers))
            say(self._console, "Nothing of it was done. If you trust it, say so with --trust.")
            self._console.print()
        if problems := [problem for problem in found.problems if problem not in self._told and problem.message not in but]:
            more = " more" if any(isinstance(told, Problem) for told in self._told) else ""
            say(self._console, f"{len(problems)}{more} problem{'s' if len(problems) != 1 else ''}", "bold red")
            for line in (line for problem in problems for line in str(problem).splitlines()):
                say(self._console, f"  {line}")
            self._console.print()
        self._told += [*dangers, *problems]


def _list_of(dangers: list[Danger]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")  # a name is told to its end
    for danger in dangers:
        value = printable(str(danger.value))
        cut = value if len(value) <= _LONGEST else f"{value[: _LONGEST - 1]}…"  # nothing scrolls the others away
        table.add_row(*map(Text, (f"  {danger.does}", printable(danger.path), cut, danger.what)))
    return table


def first_look(found: Findings, trust: bool, tell: Teller, change: Callable[[Raw], Raw] = dict) -> tuple[Raw, Block | None]:
    """The file, with what the environment sets over it; where there are problems, the block is what is left of ours.

    A mistake whose remedy is certain is told, and put right in what is given back: all else is looked at as if it were not there.
    """
    path = found.path
    raw, odd = read_config(path)
    found.hints.extend(odd)
    try:
        overrides = overrides_of(os.environ)
        raw |= overridden(raw, overrides) if overrides else {}
        found.notes.extend(map(str, overrides))
    except ConfigError as error:
        found.add(error)
    raw, wrong = straightened(change(raw))
    found.problems.extend(wrong)
    raw, wrong = named_right(raw)
    found.problems.extend(wrong)
    packs = [] if trust else [danger.path for danger in fetched_packs(raw)]
    found.looked_at.append(f"`loss`, `dft` and `dwl`{' without its packs' if packs else ''}")
    block, problems = salvage(raw, packs, folder=path.parent)
    found.problems.extend(problems)
    loss = raw.get("loss")
    if loss is not None:
        found.problems.extend(refused(raw, loss if loss in ("nll", "dft", "dwl") else "dwl"))
    elif all(raw.get(key) is None for key in Block.model_fields):
        close = [f"`{key}`: {hint}" for key in raw if (hint := did_you_mean(key, list(Block.model_fields)))]
        found.problems.append(Problem("loss", WITHOUT_LOSS, allowed="nll, dft, dwl", hint="; ".join(close)))
    tell(found)
    found.problems.extend(_beside(path, problem) for problem in file_problems(raw))
    found.unseen.extend(on_the_hub_perhaps(raw))
    prepared = raw.get("dataset_prepared_path") or "last_run_prepared"
    tell(found, but=MISSING_DATA if os.path.isdir(str(prepared)) else ())
    return raw, block


def _beside(config: Path, problem: Problem) -> Problem:
    """Axolotl takes relative paths from where it is started, not from where the config lies."""
    name = problem.value
    if not isinstance(name, str) or os.path.exists(name) or not (config.parent / name).exists() or name.startswith("~"):
        return problem
    return replace(problem, hint="it lies beside the config, and Axolotl looks in the folder it is started from")
