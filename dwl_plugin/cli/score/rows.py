"""The rows of a part as they are written: their tokens, what each target costs, and sums by class.

Suffixes: T tokens of a row, N targets, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from dwl_plugin.classes.data_codes import DATA_CODES, factors_of, marks_of
from dwl_plugin.classes.labeller import codes_of
from dwl_plugin.classes.survey import predicted
from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.config.block import USUAL_NAMES
from dwl_plugin.hosts.axolotl_preview import ROW
from dwl_plugin.run.row_codes import MARK

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["FIGURES", "table_of"]

FIGURES = {"targets": pa.int32(), "mean_nll": pa.float64(), "mean_p": pa.float64()}
"""Columns of each row, and with `/` and its name those of each class."""


def table_of(
    seen: LookedAt, data_set: str, samples: Sequence[Mapping[str, Any]], nlls: Mapping[int, NDArray[np.float32]]
) -> pa.Table:
    """One row for each sample; `nlls` (N,) in nats, by number of the sample, for those with targets. A token that is no target has
    neither nll nor p."""
    targets = [predicted(sample) for sample in samples]
    costs = [np.zeros(len(target_T), np.float32) for target_T in targets]
    for number, nll_N in nlls.items():
        costs[number][targets[number]] = nll_N
    members = [seen.members(sample) for sample in samples]
    columns = {
        "input_ids": _lists([sample["input_ids"] for sample in samples], pa.int32()),
        "labels": _lists([sample["labels"] for sample in samples], pa.int64()),
        "attention_mask": _lists([np.ones(len(target_T), np.int8) for target_T in targets], pa.int8()),
        **_said_by_the_data(seen, samples),
        "nll": _lists(costs, pa.float32(), targets),
        "p": _lists([np.exp(-nll_T.astype(np.float64)) for nll_T in costs], pa.float32(), targets),
        "data_set": pa.array([data_set] * len(samples), pa.string()),
        "row": pa.array([None if sample.get(ROW) is None else sample[ROW] + 1 for sample in samples], pa.int64()),
        **_figures(costs, targets),
    }
    for at, name in enumerate(seen.class_names):
        figures = _figures(costs, [members_CT[at] for members_CT in members])
        columns |= {f"{figure}/{name}": values for figure, values in figures.items()}
    return pa.table(columns)


def _said_by_the_data(seen: LookedAt, samples: Sequence[Mapping[str, Any]]) -> dict[str, pa.Array]:
    """Factors and marks of the tokens, in the columns in which rows that are tokenised bring them."""
    block, found = seen.block, {}
    if block is None or not block.reads_data:
        return {}
    codes = [codes_of(sample.get(DATA_CODES), len(sample["input_ids"])) for sample in samples]
    if block.data_weights is not None:
        found[block.data_weights.token or USUAL_NAMES["token"]] = _lists([factors_of(codes_T) for codes_T in codes], pa.float32())
    if block.marks:
        names = [
            [[name for bit, name in enumerate(block.marks) if mark >> bit & 1] for mark in marks_of(codes_T)] for codes_T in codes
        ]
        found[MARK] = pa.array(names, pa.list_(pa.list_(pa.string())))
    return found


def _lists(rows: Sequence[Any], kind: pa.DataType, valid: Sequence[Any] | None = None) -> pa.Array:
    """Lists of numbers, null where they are not `valid`."""
    ends = np.cumsum([0, *map(len, rows)])
    flat = np.concatenate([np.zeros(0, kind.to_pandas_dtype()), *rows]).astype(kind.to_pandas_dtype())
    mask = None if valid is None else ~np.concatenate([np.zeros(0, np.bool_), *valid])
    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(flat, kind, mask=mask))


def _figures(costs: Sequence[NDArray[np.float32]], members: Sequence[NDArray[np.bool_]]) -> dict[str, pa.Array]:
    """`FIGURES` of the tokens of each row that are members; null where there is none."""
    own = [nll_T[of_T].astype(np.float64) for nll_T, of_T in zip(costs, members, strict=True)]
    found = {
        "targets": list(map(len, own)),
        "mean_nll": [nll_N.mean() if len(nll_N) else None for nll_N in own],
        "mean_p": [np.exp(-nll_N).mean() if len(nll_N) else None for nll_N in own],
    }
    return {figure: pa.array(found[figure], kind) for figure, kind in FIGURES.items()}
