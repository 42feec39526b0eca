"""What the data says of the targets looked at: how many have which factor, come from which data set, have which mark."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from dwl_plugin.classes.data_codes import data_sets_of, factors_of, marks_of
from dwl_plugin.classes.survey import codes_in, predicted
from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.cli.output import fixed, printable, table_of_classes

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DataFigures", "data_figures"]

_MOST_VALUES, _BINS = 12, 10
_BAR = 24


class _Bin(NamedTuple):
    """Targets with a factor from `low` to `high`; of one factor where both are the same."""

    low: float
    high: float
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.low:g}" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g}"


class _Group(NamedTuple):
    """Tokens of a data set, or with a mark: those that are trained, and Σ|factor| of them."""

    name: str
    tokens: int
    mass: float


@dataclass(frozen=True)
class DataFigures:
    """`factors_N`: of every target, also of those that are taken out by a factor of 0."""

    factors_N: NDArray[np.float32]
    data_sets: tuple[_Group, ...]
    marks: tuple[_Group, ...]

    @property
    def taken_out(self) -> int:
        return int((self.factors_N == 0).sum())

    @property
    def negative(self) -> int:
        return int((self.factors_N < 0).sum())

    @cached_property
    def bins(self) -> list[_Bin]:
        """Every factor with its tokens; or, of many, ranges, beside which 0 and 1 stand alone."""
        values, counts = np.unique(self.factors_N, return_counts=True)
        each = [_Bin(value, value, count) for value, count in zip(values.tolist(), counts.tolist(), strict=True)]
        if len(each) <= _MOST_VALUES:
            return each
        others = self.factors_N[~np.isin(self.factors_N, (0, 1))].astype(np.float64)
        counts_B, edges = np.histogram(others, bins=_BINS)
        ranges = map(_Bin, edges.tolist(), edges[1:].tolist(), counts_B.tolist())
        return sorted([*ranges, *(found for found in each if found.low in (0, 1))])

    def table(self) -> Table:
        """The histogram."""
        mean = float(self.factors_N.mean())
        title = f"Factors of the data: {mean:.3g} on average in {len(self.factors_N):,} targets"
        table = table_of_classes(title, of="factor")
        table.columns[0].justify = "right"
        for name in ("tokens", "share"):
            table.add_column(name, justify="right")
        table.add_column("")
        most = max(found.tokens for found in self.bins)
        for found in self.bins:
            share = found.tokens / len(self.factors_N)
            table.add_row(found.name, f"{found.tokens:,}", f"{share:.1%}", Bar(most, 0, found.tokens, width=_BAR))
        return table

    def group_tables(self) -> Iterator[Table]:
        """Of data sets, where there are several, and of marks."""
        for title, groups in (("Data sets", self.data_sets if len(self.data_sets) > 1 else ()), ("Marks", self.marks)):
            if groups:
                table = table_of_classes(title, of=title.lower().removesuffix("s"))
                table.add_column("tokens", justify="right")
                table.add_column("Σ|w|", justify="right")
                for group in groups:
                    table.add_row(Text(printable(group.name)), f"{group.tokens:,}", fixed(group.mass, 1))
                yield table

    def sentences(self) -> Iterator[str]:
        """What becomes of targets that are not trained as the others are."""
        if self.taken_out:
            yield f"{self.taken_out:,} targets have a factor of 0: they are not trained, and count nowhere"
        if self.negative:
            yield f"{self.negative:,} targets have a factor below 0: they pay |factor| · −log(1 − p), and become less probable"

    def as_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "targets": len(self.factors_N),
            "taken_out": self.taken_out,
            "negative": self.negative,
            "factors": [{"from": found.low, "to": found.high, "tokens": int(found.tokens)} for found in self.bins],
            "data_sets": [group._asdict() for group in self.data_sets],
            "marks": [group._asdict() for group in self.marks],
        }


def data_figures(seen: LookedAt) -> DataFigures | None:
    """What the rows looked at say of their targets; None where the config reads nothing of them."""
    if seen.block is None or seen.labeller is None or not seen.block.reads_data or not seen.rows.samples:
        return None
    codes_N = np.concatenate([codes_in(sample)[predicted(sample)] for sample in seen.rows.samples])
    if not len(codes_N):
        return None
    factors_N, marks_N, numbers_N = factors_of(codes_N), marks_of(codes_N), data_sets_of(codes_N)
    data_sets = enumerate(seen.labeller.data_sets, 1)

    def group(name: str, member_N: NDArray[np.bool_]) -> _Group:
        own = factors_N[member_N & (factors_N != 0)]
        return _Group(name, len(own), float(np.abs(own).sum()))

    return DataFigures(
        factors_N,
        tuple(group(name, numbers_N == number) for number, name in data_sets if (numbers_N == number).any()),
        tuple(group(mark, (marks_N >> bit & 1).astype(np.bool_)) for bit, mark in enumerate(seen.block.marks)),
    )
