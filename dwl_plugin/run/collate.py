"""Class ids ride with the batch: the host's collator runs once more with class ids where the labels were.

Whatever the host does to its labels (packing, padding on either side, sharding) then happens to the class ids too, and the two
cannot come apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from dwl_plugin.classes.labeller import Labeller
from dwl_plugin.loss.shift import shift_left

__all__ = ["CLASS_IDS", "LabellingCollator"]

CLASS_IDS = "dwl_class_ids"
"""Key of the (B, T) integer tensor in a batch: class id at each target, −100 elsewhere."""

Collate = Callable[[Any], Any]


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
            return self._label_after(self.collate(features))
        twin = self._with_class_ids(features)  # before the collator, which may overwrite what it is given
        batch = self.collate(_map_samples(features, dict))
        classes = self.collate(twin)
        key = "shift_labels" if "shift_labels" in classes else "labels"
        if torch.equal(classes[key], batch[key]):  # the collator makes labels of its own
            return self._label_after(batch)
        batch[CLASS_IDS] = classes[key]
        return batch

    def _with_class_ids(self, features: Any) -> Any:
        """Copies of the samples with class ids for labels, all of them found in one pass."""
        rows = [(sample["input_ids"], sample["labels"], _positions(sample)) for sample in _samples(features)]
        found = iter(self.labeller.label_samples(rows))

        def relabelled(sample: Mapping[str, Any]) -> dict[str, Any]:
            class_ids = next(found)
            return {**sample, "labels": class_ids.tolist() if isinstance(sample["labels"], list) else class_ids}

        return _map_samples(features, relabelled)

    def _label_after(self, batch: Any) -> Any:
        """The labels are made by the collator itself, so the classes are found in what it made."""
        if "labels" not in batch:  # rows to predict on
            return batch
        layout = {key: batch.get(key) for key in ("position_ids", "attention_mask")}
        class_ids = self.labeller.label_batch(batch["input_ids"], batch["labels"], **layout, packed=self.packed)
        batch[CLASS_IDS] = torch.from_numpy(class_ids)
        return batch


def _positions(sample: Mapping[str, Any]) -> Any:
    """Positions in a row that holds several samples, packed before it came to the loader; None: nothing says so."""
    if "seq_lengths" in sample:
        return np.concatenate([np.arange(length) for length in sample["seq_lengths"]])
    return sample.get("position_ids")


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
