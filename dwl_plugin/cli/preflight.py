"""`dwl preflight`: how probable the base model finds the tokens it would be trained on, before it is.

Sources: "Beyond Log Likelihood" (arXiv 2510.00526): under L = (1 − p^a)/a the base model's mean p on the training targets
tells which exponent a does better, 0 (NLL) or 1 (DFT). "On the Generalization of SFT" (arXiv 2508.05629): DFT itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from dwl_plugin.classes import FOLLOWS, trained_on
from dwl_plugin.classes.survey import predicted
from dwl_plugin.cli.analysis import LookedAt, analyse, looking
from dwl_plugin.cli.check import print_findings
from dwl_plugin.cli.first_look import Teller
from dwl_plugin.cli.nll import measuring
from dwl_plugin.cli.output import Console, number, print_json, say, table_of_classes
from dwl_plugin.cli.progress import counted, progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BINS", "MIDDLE_FROM", "STRONG", "ClassProbabilities", "advice", "load_model", "measure", "preflight", "summarise"]

BINS = 10
"""Of the histogram, of equal width between 0 and 1."""

_SOURCE = "Beyond Log Likelihood, arXiv 2510.00526"
STRONG, MIDDLE_FROM, _WEAK = 0.7, 0.35, 0.1
"""Mean p of the targets: from the first on DFT is expected to win, from the second on to tie."""

_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class ClassProbabilities:
    """p of the targets of one class under the base model; all numbers are NaN or empty where there is no token."""

    name: str
    tokens: int
    mean: float
    median: float
    nll: float
    histogram: tuple[int, ...]


def preflight(console: Console, config: Path, samples: int, trust: bool, as_json: bool) -> int:
    """The whole command; the exit status."""
    tell = Teller(None if as_json else console)
    found, seen = analyse(config, samples, trust, to_run=True, tell=tell)
    measured = None
    if seen is not None and not found.status:
        with looking(found, trust):
            measured = measure(load_model(seen), seen)
    if seen is None or measured is None or found.dangers:
        print_findings(console, found, seen, as_json, tell)
        return found.status
    rows = len(seen.rows.samples)
    nll_N, members_CN = measured
    *classes, everything = summarise(seen.class_names, nll_N, members_CN)
    verdict = advice(everything.mean)
    if as_json:
        told = {"config": str(found.path), "rows": rows, "all": _plain(everything), "classes": [_plain(row) for row in classes]}
        print_json(console, told | {"advice": verdict, "notes": found.notes})
        return 0
    console.print(_table(classes, everything, rows))
    say(console, verdict)
    for line in (*_by_class(classes, everything.mean), *found.notes):
        say(console, f"  · {line}")
    return 0


def load_model(seen: LookedAt) -> Any:
    from dwl_plugin.hosts import axolotl_preview as host

    with progress("The model is being loaded"):
        return host.load_model(seen.cfg, seen.tokenizer)


def measure(model: Any, seen: LookedAt) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """−log p in nats of every target, (N,), and its classes, (C, N), one row after the other. A token that the data gives a factor
    of 0 is no target."""
    nlls: list[NDArray[np.float64]] = [np.zeros(0)]
    members: list[NDArray[np.bool_]] = [np.zeros((len(seen.class_names), 0), np.bool_)]
    samples = seen.rows.samples
    with measuring(model) as nll_of, counted("Measuring p", 0, len(samples)) as advance:
        for sample in samples:
            sample = {**sample, FOLLOWS: False}  # nothing stands before it here, so nothing predicts its first token
            predicted_T, trained_T = predicted(sample), trained_on(sample)
            if trained_T.any():
                nlls.append(nll_of([sample])[0][trained_T[predicted_T]].astype(np.float64))
                members.append(seen.members(sample)[:, trained_T])
            advance(1)
    return np.concatenate(nlls), np.concatenate(members, 1)


def summarise(names: tuple[str, ...], nll_N: NDArray[np.float64], members_CN: NDArray[np.bool_]) -> list[ClassProbabilities]:
    """One entry per class and, last, one for all targets. The mean is of p, not of its logarithm."""
    groups = [(name, nll_N[members_N]) for name, members_N in zip(names, members_CN, strict=True)]
    return [_probabilities(name, nll) for name, nll in [*groups, ("all", nll_N)]]


def advice(mean_p: float) -> str:
    """What the exponent family's experiments say of a base model that finds its targets this probable."""
    known = f"({_SOURCE}: with a mean p of 0.75 and more DFT won by far, at about 0.5 the two tied, at 0.1 and less NLL won.)"
    if math.isnan(mean_p):
        return "There is no target to measure."
    if mean_p >= STRONG:
        say = "The model is strong here: expect `loss: dft` to beat plain cross-entropy."
    elif mean_p >= MIDDLE_FROM:
        say = "The model is in the middle: expect `loss: dft` and plain cross-entropy to come out about even."
    elif mean_p > _WEAK:
        say = "The model is below the middle: expect `loss: nll` to do as well as `loss: dft`, or better."
    else:
        say = "The model hardly knows this: expect `loss: nll` to win; under `loss: dft` it would learn little."
    return f"Mean p {mean_p:.3f}. {say} {known}"


def _probabilities(name: str, nll: NDArray[np.float64]) -> ClassProbabilities:
    if not len(nll):
        return ClassProbabilities(name, 0, math.nan, math.nan, math.nan, (0,) * BINS)
    p = np.exp(-nll)
    histogram = np.histogram(p, bins=BINS, range=(0.0, 1.0))[0]
    return ClassProbabilities(name, len(p), float(p.mean()), float(np.median(p)), float(nll.mean()), tuple(histogram.tolist()))


def _table(classes: Sequence[ClassProbabilities], everything: ClassProbabilities, rows: int) -> Table:
    table = table_of_classes(f"p of {everything.tokens:,} target tokens in {rows:,} rows, as training begins")
    for name in ("tokens", "mean p", "median p", "nll"):
        table.add_column(name, justify="right")
    table.add_column("p from 0 to 1")
    for row in (*classes, everything):
        if row is everything:
            table.add_section()
        cells = map(number, (row.mean, row.median, row.nll))
        table.add_row(row.name, f"{row.tokens:,}", *cells, Text(_bars(row.histogram)))
    return table


def _bars(histogram: tuple[int, ...]) -> str:
    """One character per bin; a bin with a token in it is never blank."""
    top = max(histogram, default=0)
    return "".join(_BARS[math.ceil(count / top * (len(_BARS) - 1))] if count else " " for count in histogram)


def _by_class(classes: Sequence[ClassProbabilities], mean_of_all: float) -> Iterator[str]:
    """Classes at the other end than the whole: what a config may say of them alone."""
    for row in classes:
        if row.tokens and row.mean <= _WEAK < mean_of_all:
            yield f"`{row.name}` has a mean p of {row.mean:.3f}: under dft it hardly learns; give it `token_loss: nll`, or a floor"
        elif row.tokens and row.mean >= STRONG > mean_of_all:
            yield f"`{row.name}` has a mean p of {row.mean:.3f}: if any class suits dft, this one does (`token_loss: dft`)"


def _plain(row: ClassProbabilities) -> dict[str, Any]:
    numbers = {"mean_p": row.mean, "median_p": row.median, "nll": row.nll}
    return {"name": row.name, "tokens": row.tokens, **numbers, "histogram": list(row.histogram)}
