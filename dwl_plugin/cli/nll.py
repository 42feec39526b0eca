"""−log p of every target of some rows, through the loss itself: in padded batches, without gradients and without full logits.

What a row gets depends on the others of its batch by no more than rounding.

Suffixes: N targets of a row, B rows of a batch, T tokens of its longest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dwl_plugin.classes.survey import predicted
from dwl_plugin.errors import ConfigError, DWLError, first_line
from dwl_plugin.values import IGNORE_INDEX

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Measure", "batches_of", "measuring"]

Rows = Sequence[Mapping[str, Any]]
"""Each with `input_ids` and `labels`; a row that is alone may hold several samples, told apart by `position_ids`."""
Measure = Callable[[Rows], list["NDArray[np.float32]"]]
"""The rows of one batch -> (N,) for each of them, in nats."""


def batches_of(rows: Rows, tokens: int) -> list[list[int]]:
    """The numbers of those `rows` that have a target, batch by batch, the longest first; a batch has up to `tokens`, padding
    counted, or one row."""
    batches: list[list[int]] = []
    lengths = [len(row["input_ids"]) for row in rows]
    for number in sorted((n for n, row in enumerate(rows) if predicted(row).any()), key=lambda n: -lengths[n]):
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens:
            batches.append([])
        batches[-1].append(number)
    return batches


@contextlib.contextmanager
def measuring(model: Any) -> Iterator[Measure]:
    """What measures one batch under `model`, which is as it was afterwards.

    It raises `ConfigError` where the model cannot be run, and `DWLError` where the batch does not fit into memory.
    """
    import torch

    from dwl_plugin.hosts.axolotl_preview import quiet
    from dwl_plugin.loss.seam import Seam
    from dwl_plugin.loss.spec import LossSpec, PendingLoss

    device = model.get_input_embeddings().weight.device
    seam = Seam(model, lambda line: None)

    def measure(rows: Rows) -> list[NDArray[np.float32]]:
        found: list[NDArray[np.float32]] = []

        def keep(tokens: Any) -> None:
            found.append(tokens.nll_N[tokens.members.is_target].float().cpu().numpy())

        given = {key: torch.tensor(values, device=device) for key, values in _padded(rows).items()}
        pending = PendingLoss(LossSpec(), labels=given["labels"], on_tokens=keep)
        try:
            with torch.no_grad(), quiet(), seam.armed(pending):
                model(**given)
        except (RuntimeError, NotImplementedError, MemoryError) as error:
            if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error):
                raise _does_not_fit(rows) from error
            raise ConfigError.at("base_model", f"cannot be run: {first_line(error)}") from error
        counts = [int(predicted(row).sum()) for row in rows]
        if sum(map(len, found)) != sum(counts):
            raise ConfigError.at("base_model", "its loss is not of its targets one by one, so they cannot be measured")
        return np.split(np.concatenate(found), np.cumsum(counts)[:-1])

    try:
        yield measure
    finally:
        seam.detach()


def _padded(rows: Rows) -> dict[str, list[list[int]]]:
    """What the model gets, padded on the right, where no token sees it."""
    longest = max(len(row["input_ids"]) for row in rows)

    def fill(key: str, value: int) -> list[list[int]]:
        return [[*row[key], *[value] * (longest - len(row[key]))] for row in rows]

    given = {"input_ids": fill("input_ids", 0), "labels": fill("labels", IGNORE_INDEX)}
    if len(rows) == 1 and list(rows[0].get("position_ids", ())).count(0) > 1:
        return given | {"position_ids": fill("position_ids", 0)}
    if any(len(row["input_ids"]) < longest for row in rows):
        given["attention_mask"] = [[1] * length + [0] * (longest - length) for length in (len(row["input_ids"]) for row in rows)]
    return given


def _does_not_fit(rows: Rows) -> DWLError:
    tokens = len(rows) * max(len(row["input_ids"]) for row in rows)
    if len(rows) == 1:
        return DWLError(f"A single row of {tokens:,} tokens does not fit into memory beside the model: shorten `sequence_len`.")
    return DWLError(f"A batch of {tokens:,} tokens does not fit into memory beside the model: name fewer with --batch-tokens.")
