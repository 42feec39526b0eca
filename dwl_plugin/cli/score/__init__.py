"""`dwl score`: every row of the training data with nll and p of each target under a model, for methods that pick or weigh tokens
before training. In order: the config and its rows as in the run, `folder` for what is there already, the model, part by part."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.box import SIMPLE_HEAD
from rich.table import Table

from dwl_plugin.classes.survey import predicted
from dwl_plugin.cli.analysis import LookedAt, analyse, looking
from dwl_plugin.cli.check import print_findings
from dwl_plugin.cli.first_look import Findings, Teller
from dwl_plugin.cli.nll import Measure, batches_of, measuring
from dwl_plugin.cli.output import Console, number, say, short, table_of_classes
from dwl_plugin.cli.preflight import load_model
from dwl_plugin.cli.progress import counted
from dwl_plugin.cli.score.folder import Folder, digest_of, weights_of
from dwl_plugin.cli.score.model import config_with, require_same_tokens
from dwl_plugin.cli.score.rows import FIGURES, table_of
from dwl_plugin.errors import ConfigError
from dwl_plugin.hosts import axolotl_preview as host

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["score"]

PART_ROWS = 256
"""Of the data, in each file: what a run that is killed loses at most."""

_LOOKED_AT = 64
_HARDEST, _LETTERS = 10, 48


def score(console: Console, config: Path, out: Path, rows: int | None, model: str | None, batch_tokens: int, trust: bool) -> int:
    """The whole command; the exit status."""
    folder = Folder(out)
    change = dict if model is None else functools.partial(config_with, model=model)
    tell = Teller(console)
    found, seen = analyse(config, min(rows or _LOOKED_AT, _LOOKED_AT), trust, to_run=True, change=change, tell=tell)
    scored = None
    if seen is not None and not found.status:
        with looking(found, trust):
            if model is not None:
                require_same_tokens(seen, model)
            scored = _scored(console, seen, folder, rows, batch_tokens)
    if seen is None or scored is None or found.dangers:
        print_findings(console, found, seen, tell=tell)
        return found.status
    _print(console, seen, folder, scored, found)
    return 0


def _scored(console: Console, seen: LookedAt, folder: Folder, rows: int | None, batch_tokens: int) -> pa.Table:
    """Write what is not there yet; what there is to say of each row, the hardest first."""
    if host.is_stream(seen.cfg) and rows is None:
        key = "pretraining_dataset" if seen.cfg.pretraining_dataset else "streaming"
        raise ConfigError.at(key, "a stream has no end that is known here", hint="say how many of its rows to score: --rows 10000")
    parts = host.every_part(seen.cfg, seen.tokenizer, PART_ROWS, rows, seen.block)
    names = [str(name) for name in (seen.cfg.base_model, seen.cfg.lora_model_dir) if name]
    loaded, weights = None, weights_of(names)
    if weights is None:  # on the hub, and not in its cache before it is loaded
        loaded, weights = load_model(seen), weights_of(names)
    folder.belongs_to(_settings(seen, rows, weights or ""))
    todo = [at for at, part in enumerate(parts) if not folder.has(at, part.digest())]
    total = sum(part.rows for part in parts)
    done = total - sum(parts[at].rows for at in todo)
    if done and todo:
        say(console, f"{done:,} of {total:,} rows were scored before.")
    if todo:
        with measuring(loaded or load_model(seen)) as measure, counted("Scoring", done, total) as advance:
            for at in todo:
                samples = parts[at].samples()
                advance(parts[at].rows - len(samples))
                nlls = _measured(measure, samples, parts[at].data_set, batch_tokens, advance)
                folder.write(at, parts[at].digest(), table_of(seen, parts[at].data_set, samples, nlls))
    return folder.finish(len(parts))


def _settings(seen: LookedAt, rows: int | None, weights: str) -> dict[str, Any]:
    """What the scores depend on. Not the size of a batch, which changes no more than the last digits."""
    ours = {} if seen.block is None else seen.block.dump()  # a pack is in it with what it stands for
    tokenizer = {"vocabulary": seen.tokenizer.get_vocab(), "template": seen.tokenizer.chat_template}
    return {
        "config": {key: digest_of(value) for key, value in {**seen.raw, **ours}.items()},
        "weights of the model": weights,
        "tokenizer": digest_of(tokenizer),
        "--rows": rows,
        "rows in a file": PART_ROWS,
    }


def _measured(
    measure: Measure, samples: Sequence[Mapping[str, Any]], data_set: str, batch_tokens: int, advance: Callable[[int], None]
) -> dict[int, NDArray[np.float32]]:
    """(N,) of each sample with targets, by its number."""
    found: dict[int, NDArray[np.float32]] = {}
    batches = batches_of(samples, batch_tokens)
    for batch in batches:
        nlls = measure([samples[at] for at in batch])
        for at, nll_N in zip(batch, nlls, strict=True):
            if not np.isfinite(nll_N).all():
                row = f"row {samples[at][host.ROW] + 1:,}" if host.ROW in samples[at] else "a row"
                raise ConfigError.at("base_model", f"gives targets of {row} of {data_set} no finite loss")
            found[at] = nll_N
        advance(len(batch))
    advance(len(samples) - len(found))
    return found


def _print(console: Console, seen: LookedAt, folder: Folder, rows: pa.Table, found: Findings) -> None:
    for table in (_by_class(seen, rows), _by_data_set(rows), _hardest(seen, folder, rows)):
        if table is not None:
            console.print(table)
    in_no_class = _targets(rows, "targets") - sum(_targets(rows, f"targets/{name}") for name in seen.class_names)
    if in_no_class > 0:  # where classes overlap, their sum may hide some
        say(console, f"  · {in_no_class:,} targets have a factor of 0 in the data: they are scored, and in no class")
    for line in found.notes:
        say(console, f"  · {line}")
    say(console, f"Rows with nll and p of each target: {folder.rows}")
    say(console, f"One line for each row, the hardest first: {folder.csv}")


def _targets(rows: pa.Table, column: str) -> int:
    return pc.sum(rows[column]).as_py() or 0


def _by_class(seen: LookedAt, rows: pa.Table) -> Table:
    targets = _targets(rows, "targets")
    table = table_of_classes(f"{targets:,} targets in {len(rows):,} rows")
    _columns(table, "tokens", "mean nll", "mean p")
    for name in seen.class_names:
        table.add_row(name, *_means(*(rows[f"{figure}/{name}"] for figure in FIGURES)))
    table.add_section()
    table.add_row("all", *_means(*(rows[figure] for figure in FIGURES)))
    return table


def _by_data_set(rows: pa.Table) -> Table | None:
    """Where there are several."""
    names = pc.unique(rows["data_set"]).to_pylist()
    if len(names) < 2:
        return None
    table = table_of_classes("By data set", of="data set")
    _columns(table, "rows", "tokens", "mean nll", "mean p")
    for name in sorted(names):
        own = rows.filter(pc.equal(rows["data_set"], name))
        table.add_row(name, f"{len(own):,}", *_means(*(own[figure] for figure in FIGURES)))
    return table


def _hardest(seen: LookedAt, folder: Folder, rows: pa.Table) -> Table:
    table = Table(title="The hardest rows", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    several = len(pc.unique(rows["data_set"])) > 1
    if several:
        table.add_column("data set", no_wrap=True)
    for name in ("row", "tokens", "mean nll", "mean p"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("its targets begin", overflow="fold")
    for row in rows.slice(0, _HARDEST).to_pylist():
        if row["targets"]:
            cells = [short(row["data_set"], 24)] if several else []
            cells += ["–" if row["row"] is None else f"{row['row']:,}", f"{row['targets']:,}"]
            table.add_row(*cells, number(row["mean_nll"]), number(row["mean_p"]), _beginning(seen, folder, row))
    return table


def _beginning(seen: LookedAt, folder: Folder, row: Mapping[str, Any]) -> str:
    """The text of a row's first targets."""
    tokens = folder.tokens(row["part"], row["at"])
    text = " ".join(seen.tokenizer.decode(np.asarray(tokens["input_ids"])[predicted(tokens)][:_LETTERS]).split())
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


def _means(targets: Any, mean_nll: Any, mean_p: Any) -> tuple[str, str, str]:
    """Of all tokens, from those of the rows."""
    total = pc.sum(targets).as_py() or 0
    means = [(pc.sum(pc.multiply(mean, targets)).as_py() or 0.0) / total if total else float("nan") for mean in (mean_nll, mean_p)]
    return f"{total:,}", number(means[0]), number(means[1])


def _columns(table: Table, *names: str) -> None:
    for name in names:
        table.add_column(name, justify="right")
