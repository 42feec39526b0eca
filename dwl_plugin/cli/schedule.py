"""`dwl schedule`: α(τ) and the moving numbers of dft before anything is trained, by the same functions that the run will use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.alpha.schedules import Curve
from dwl_plugin.cli.config_file import read_config
from dwl_plugin.cli.output import printable, say
from dwl_plugin.cli.trust import stop_at_packs
from dwl_plugin.config import Block, parse
from dwl_plugin.config.overrides import overridden, overrides_of
from dwl_plugin.errors import ConfigError, DWLError
from dwl_plugin.files import write_whole
from dwl_plugin.loss.token_losses import SCHEDULED, DFTConfig
from dwl_plugin.run.moving import alpha_of, end_hints, token_losses_of
from dwl_plugin.values import REST

__all__ = ["IMAGE_SUFFIXES", "schedule"]

IMAGE_SUFFIXES = (".png", ".svg", ".pdf")

_ALPHA = "α"
_BAR = 5
_POINTS = 400


def schedule(
    console: Console, config: Path, steps: int | None, epoch_steps: int | None, plot: Path | None, trust: bool = False
) -> None:
    """The whole command. Raises `DWLError` where the config is wrong, or a position needs a length that nobody gave."""
    raw, odd = read_config(config)
    if not trust:
        stop_at_packs(config, raw)
    for line in odd:
        say(console, f"hint: {line}")
    overrides = overrides_of(os.environ)
    for override in overrides:
        say(console, override)
    block = parse(overridden(raw, overrides), folder=config.parent)
    length = _length(raw, steps, epoch_steps)
    try:
        tables = [] if block is None else list(_tables(block, length))
    except ConfigError as error:
        raise DWLError(f"{error}{_what_is_needed(length, config)}") from error
    if block is None or not tables:
        raise DWLError(
            f"{printable(str(config))} has no α: `loss: {'…' if block is None else block.loss}` gives every class the same weight."
        )
    end = length.total_steps or _last_position(block)
    drawn = [table for table in tables if table.what != _ALPHA or block.controller is None]
    if block.controller is not None:
        how = f"controller `{block.controller.type}` moves α by the losses it will see"
        if plot is not None and not drawn:
            raise DWLError(f"There is no curve to draw before the run: the {how}.")
        say(console, f"The {how}, so only where α starts is known before the run. `dwl report` shows where it went.")
    elif tables[0].what == _ALPHA and block.schedule is None:
        say(console, "α is constant: the config has no `schedule`.")
    for table in tables:
        still = table.what == _ALPHA and block.schedule is None
        _print_tables(console, table, [0] if still else sorted({round(end * k / 10) for k in range(11)}), length.total_steps)
    for line in end_hints(block, length):
        say(console, line)
    if plot is not None:
        from dwl_plugin.cli.plots import MOST_LINES

        write_whole(plot, _image(drawn, end, plot.suffix.lower()))
        say(console, f"Figure: {plot}")
        if (count := sum(len(numbers.names) for numbers in drawn)) > MOST_LINES:
            say(console, f"It has the first {MOST_LINES} of {count:,} lines; all of them are in the tables.")


class _Numbers(NamedTuple):
    """Numbers that can move over the run: their names, and τ -> them."""

    what: str
    names: Sequence[str]
    at: Curve


def _tables(block: Block, length: RunLength) -> Iterator[_Numbers]:
    """α, and the numbers of dft that a schedule moves, by class where there are several."""
    if block.loss == "dwl":
        yield _Numbers(_ALPHA, block.class_names, alpha_of(block, length))
    at = token_losses_of(block, length)
    if at is not None:
        moving = [c for c, loss in enumerate(block.token_losses) if isinstance(loss, DFTConfig) and loss.schedule is not None]
        several = len(block.class_names) > 1
        names = [f"{option} {block.class_names[c]}" if several else option for c in moving for option in SCHEDULED]
        yield _Numbers("dft", names, lambda tau: tuple(getattr(at(tau)[c], option) for c in moving for option in SCHEDULED))


def _length(raw: Mapping[str, Any], steps: int | None, epoch_steps: int | None) -> RunLength:
    """`--steps` goes before `max_steps`. Epochs divide a run only where no `max_steps` cuts it short."""
    limit = raw.get("max_steps")
    limit = limit if isinstance(limit, int) and limit > 0 else None
    total = steps if steps is not None else limit
    epochs = raw.get("num_epochs", 1)
    if epoch_steps is None and total is not None and limit is None and isinstance(epochs, (int, float)) and epochs > 0:
        an_epoch = total / epochs
        return RunLength(total, an_epoch if math.isfinite(an_epoch) else None)
    return RunLength(total, epoch_steps)


def _what_is_needed(length: RunLength, config: Path) -> str:
    if length.total_steps is None:
        return f"\nThe length of the run is not in the YAML; say it: dwl schedule {printable(str(config))} --steps N"
    if length.steps_per_epoch is None:
        return f"\nThe length of an epoch is not in the YAML; say it: dwl schedule {printable(str(config))} --epoch-steps N"
    return ""


def _last_position(block: Block) -> int:
    """A run of unknown length is shown a little past the last step that the schedule names."""

    def named(node: object) -> Iterator[int]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield from named(value)
                yield from [int(key)] if str(key).isdecimal() else []
        elif isinstance(node, int) and not isinstance(node, bool):
            yield node

    steps = named({path: options.model_dump() for path, options in block.schedules.items()})
    return 10 * math.ceil(0.12 * max([1, *steps]))


def _print_tables(console: Console, numbers: _Numbers, at: Sequence[int], total: int | None) -> None:
    """A row a step, downwards in time; a column a name with its number and a bar. As many tables as it takes for the width."""
    names, rows = numbers.names, [numbers.at(tau) for tau in at]
    top = max(map(max, rows)) or 1.0
    for shown in _fitting(names, console.width):
        table = Table(box=SIMPLE_HEAD, show_edge=False)
        table.add_column("step", justify="right")
        if total:
            table.add_column("", justify="right")
        for c in shown:
            table.add_column(names[c], no_wrap=True)
        for tau, row in zip(at, rows, strict=True):
            cells = [f"{row[c]:.2f} {_bar(row[c] / top)}" for c in shown]
            table.add_row(str(tau), *([f"{round(100 * tau / total)} %"] if total else []), *cells)
        console.print(table)


def _fitting(names: Sequence[str], width: int) -> Iterator[list[int]]:
    """The classes, as many at a time as fit beside one another."""
    steps, shown = 16, list[int]()
    room = width - steps
    for c, name in enumerate(names):
        needed = max(len(name), len("0.00 ") + _BAR) + 2
        if shown and needed > room:
            yield shown
            shown, room = [], width - steps
        shown.append(c)
        room -= needed
    yield shown


def _bar(share: float) -> str:
    eighths = round(share * _BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _image(drawn: Sequence[_Numbers], end: int, suffix: str) -> bytes:
    from dwl_plugin.cli import plots

    plots.need_matplotlib()
    steps = sorted({round(end * k / _POINTS) for k in range(_POINTS + 1)})
    lines: list[plots.Line] = []
    for _, names, curve in drawn:
        for name, values in zip(names, zip(*map(curve, steps), strict=True), strict=True):
            lines.append(plots.Line(name, steps, values, plots.look_of(len(lines), plain=name == REST)))
    return plots.to_image(plots.draw_lines(lines[: plots.MOST_LINES], ", ".join(numbers.what for numbers in drawn)), suffix)
