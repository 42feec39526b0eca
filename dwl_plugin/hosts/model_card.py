"""The section on the loss in a model card. Without it the host's table of results has a column for each metric of each class."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dwl_plugin.errors import DWLError
from dwl_plugin.files import write_whole
from dwl_plugin.run.curve import LoggedCurve, key_of
from dwl_plugin.run.session import Session
from dwl_plugin.run.startup import log_line

__all__ = ["add_section", "section", "without_our_metrics"]

_BEFORE = "\n## Model description\n"


@contextmanager
def without_our_metrics(trainer: Any) -> Iterator[None]:
    """For a while a trainer's log has `loss`, `nll` and what is the host's."""
    whole = trainer.state
    trainer.state = copy.copy(whole)
    trainer.state.log_history = [{key: value for key, value in entry.items() if "dwl/" not in key} for entry in whole.log_history]
    try:
        yield
    finally:
        trainer.state = whole


def add_section(card: Path, text: str) -> None:
    """Put `text` above the description of the model, or at the end of a card that has none."""
    try:
        written = card.read_text(encoding="utf-8")
        before, mark, behind = written.partition(_BEFORE)
        write_whole(card, f"{before.rstrip()}\n\n{text}\n{mark}{behind}".encode())
    except (OSError, DWLError) as error:
        log_line(f"the model card has no section on the loss: {error}")


def section(session: Session, log: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: what was trained, what each class came to, how to repeat it."""
    block = session.block
    settings = [f"`loss: {block.loss}`"]
    if block.loss == "dwl":
        settings += [f"`reduction: {block.reduction}`"]
        moved_by = block.schedule or block.controller
        settings += [] if moved_by is None else [f"α moved by `{moved_by.type}`"]
    evals = any("eval_nll" in entry for entry in log)
    when = "on the evaluation set, first → last" if evals else "in training, first → last tenth of the steps"
    again = "`dwl_config.yaml` has every class and number"
    if session.source is not None and session.source.config is not None:
        again += "; `dwl export .` beside it prints one config that `axolotl train` takes"
    return (
        f"## Loss\n\nTrained with [axolotl-dwl](https://pypi.org/project/axolotl-dwl/) {version('axolotl-dwl')}: "
        f"{', '.join(settings)}. nll is the plain cross-entropy in nats per token, whatever α is, {when}; it compares with other "
        f"runs, which `loss` does not.\n\n{_table(session, log, evals)}\n\nTo train it again: {again}."
    )


def _table(session: Session, log: Sequence[Mapping[str, Any]], evals: bool) -> str:
    rows = ["| class | share of the targets | α | nll |", "|---|---:|---:|---:|"]
    names = session.names if len(session.names) > 1 else ()
    for name in (*names, None):
        nll = _curve(log, f"eval_{key_of('nll', name)}").ends if evals else _curve(log, key_of("nll", name)).tenths
        share = 1.0 if name is None else _curve(log, f"dwl/token_share/{name}").mean
        weighs = session.block.loss == "dwl" and name is not None
        alpha = _arrow(_curve(log, f"dwl/alpha/{name}").ends) if weighs else ""
        rows.append(f"| {'all' if name is None else f'`{name}`'} | {share:.1%} | {alpha} | {_arrow(nll)} |")
    return "\n".join(rows)


def _curve(log: Sequence[Mapping[str, Any]], key: str) -> LoggedCurve:
    return LoggedCurve((), tuple(float(entry[key]) for entry in log if key in entry))


def _arrow(ends: tuple[float, float]) -> str:
    first, last = (f"{end:.3f}" if math.isfinite(end) else "–" for end in ends)
    return first if first == last else f"{first} → {last}"
