"""Class ids ride with the batch: the host's collator runs once more with class ids where the labels were.

Whatever the host does to its labels (packing, padding on either side, sharding) then happens to the class ids too, and the two
cannot come apart. Through the collator go their places in a table: Axolotl's takes a row that is full through float64, which leaves
of a class id with a factor or a flag no more than its upper 53 bits. What the data says of its tokens comes in a column of codes
(`classes/data_codes.py`) and goes on in the class ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.classes.labeller import Labeller, as_ints, codes_of
from dwl_plugin.classes.token_bytes import Ints
from dwl_plugin.loss.shift import IGNORE_INDEX, shift_left

__all__ = ["CLASS_IDS", "LabellingCollator", "collated_codes"]

CLASS_IDS = "dwl_class_ids"
"""Key of the (B, T) integer tensor in a batch: class id at each target, −100 elsewhere."""

Collate = Callable[[Any], Any]

_FIRST_PLACE = 1 << 40
"""The number of a table's first place: no token id is as large, and floats of 64 bits hold it and those after it."""


class LabellingCollator:
    """`collate` with `CLASS_IDS` added to its batches. Picklable, so it works in loader workers under spawn.

    With `shifted` class ids come as the host will shift its labels, for a host that does so after the collator and then cuts up
    every tensor of the batch.
    """

    def __init__(self, collate: Collate, labeller: Labeller, packed: bool, shifted: bool = False) -> None:
        self.collate = collate
        self.labeller = labeller
        self.packed = packed
        self.shifted = shifted

    def __call__(self, features: Any) -> Any:
        batch = self._labelled(features)
        if self.shifted and CLASS_IDS in batch:
            batch[CLASS_IDS] = shift_left(batch[CLASS_IDS])
        return batch

    def _labelled(self, features: Any) -> Any:
        if not _has_labels(features):
            known = _map_samples(features, _as_the_host_knows_it) if self.labeller.reads_data else features
            return self._label_after(self.collate(known), features)
        by_mask = self.labeller.power > 0
        rows = [(sample["input_ids"], sample["labels"], _positions(sample, by_mask)) for sample in _samples(features)]
        table = _Table(self.labeller.label_samples(rows, [sample.get(DATA_CODES) for sample in _samples(features)]), IGNORE_INDEX)
        twin = _map_samples(features, table.in_the_place_of("labels"))  # before the collator, which may overwrite what it is given
        batch = self.collate(_map_samples(features, _as_the_host_knows_it))
        places = self.collate(twin)
        key = "shift_labels" if "shift_labels" in places else "labels"
        if torch.equal(places[key], batch[key]):  # the collator makes labels of its own
            return self._label_after(batch, features)
        batch[CLASS_IDS] = table.at(places[key])
        if self.labeller.weighs:
            for key in {"labels", "shift_labels"} & places.keys() & batch.keys():
                batch[key] = batch[key].masked_fill(places[key] == IGNORE_INDEX, IGNORE_INDEX)
        return batch

    def _label_after(self, batch: Any, features: Any) -> Any:
        """The labels are made by the collator itself, so the classes are found in what it made."""
        if "labels" not in batch:  # rows to predict on
            return batch
        layout = {key: batch.get(key) for key in ("position_ids", "attention_mask")}
        if self.labeller.reads_data:
            layout["codes"] = collated_codes(self.collate, features)
        class_ids = self.labeller.label_batch(batch["input_ids"], batch["labels"], **layout, packed=self.packed)
        batch[CLASS_IDS] = torch.from_numpy(class_ids)
        if self.labeller.weighs:
            batch["labels"] = batch["labels"].masked_fill(batch[CLASS_IDS] == IGNORE_INDEX, IGNORE_INDEX)
        return batch


def collated_codes(collate: Collate, features: Any) -> Any:
    """(B, T) what the data says of each token, where the collator puts that; nothing where it pads."""
    codes = (codes_of(sample.get(DATA_CODES), len(sample["input_ids"])) for sample in _samples(features))
    table = _Table(list(codes), 0)
    return table.at(collate(_map_samples(features, table.in_the_place_of("input_ids")))["input_ids"])


def _as_the_host_knows_it(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without our column."""
    return {key: value for key, value in sample.items() if key != DATA_CODES}


class _Table:
    """What the tokens of samples have, one sample after the other; `nothing` is what is left out of the collator's sight."""

    def __init__(self, samples: Sequence[Ints], nothing: int) -> None:
        self.values = np.concatenate([*samples, [nothing]]).astype(np.int64)
        self.nothing = nothing
        places = np.arange(_FIRST_PLACE, _FIRST_PLACE + len(self.values))
        places[self.values == nothing] = nothing
        self._places = np.split(places, np.cumsum([len(sample) for sample in samples]))

    def in_the_place_of(self, key: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
        """Called with the samples in their order: copies with their places in this table under `key`."""
        left = iter(self._places)

        def copy(sample: Mapping[str, Any]) -> dict[str, Any]:
            own = next(left)
            return {**_as_the_host_knows_it(sample), key: own.tolist() if isinstance(sample[key], list) else own}

        return copy

    def at(self, places: torch.Tensor) -> torch.Tensor:
        """What stands there, in the layout of what came back."""
        index = places - _FIRST_PLACE
        return torch.where(index >= 0, torch.from_numpy(self.values)[index.clamp(min=0)], self.nothing)


def _positions(sample: Mapping[str, Any], by_mask: bool) -> Any:
    """Positions in a row that holds several samples, packed before it came to the loader; None: nothing says so. `by_mask`: texts
    with padding between them, as the host joins those of a stream, are samples, too."""
    if "seq_lengths" in sample:
        return np.concatenate([np.arange(length) for length in sample["seq_lengths"]])
    positions, mask = sample.get("position_ids"), sample.get("attention_mask")
    if positions is not None or mask is None or not by_mask:
        return positions
    mask_T = as_ints(mask)
    if mask_T.ndim != 1 or not len(mask_T) or mask_T.min() == mask_T.max():
        return None
    place_T = np.arange(len(mask_T))
    begins_T = (mask_T != 0) & (mask_T != np.append(0, mask_T[:-1]))
    return place_T - np.maximum.accumulate(np.where(begins_T, place_T, 0))


def _has_labels(features: Any) -> bool:
    first = features[0] if isinstance(features, (list, tuple)) and features else None
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return isinstance(first, Mapping) and "labels" in first and "input_ids" in first


def _samples(features: Any) -> Iterator[Mapping[str, Any]]:
    """Features are samples, or, packed, lists of samples."""
    for item in features:
        if isinstance(item, Mapping):
            yield item
        else:
            yield from _samples(item)


def _map_samples(features: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """`features` with every sample changed, in the same order."""
    return [change(item) if isinstance(item, Mapping) else _map_samples(item, change) for item in features]
