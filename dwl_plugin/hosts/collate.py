"""Class ids ride with the batch: the host's collator runs once more with class ids where the labels were.

Whatever the host does to its labels (packing, padding on either side, sharding) then happens to the class ids too, and the two
cannot come apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from dwl_plugin.classes.labeller import Labeller

__all__ = ["CLASS_IDS", "LabellingCollator"]

CLASS_IDS = "dwl_class_ids"
"""Key of the (B, T) integer tensor in a batch: class index at each target, −100 elsewhere."""

Collate = Callable[[Any], Any]


class LabellingCollator:
    """`collate` with `CLASS_IDS` added to its batches. Picklable, so it works in loader workers under spawn."""

    def __init__(self, collate: Collate, labeller: Labeller, packed: bool) -> None:
        self.collate = collate
        self.labeller = labeller
        self.packed = packed

    def __call__(self, features: Any) -> Any:
        if not _has_labels(features):
            return self._label_after(self.collate(features))
        twin = _map_samples(features, self._with_class_ids)  # before the collator, which may overwrite what it is given
        batch = self.collate(_map_samples(features, dict))
        batch[CLASS_IDS] = self.collate(twin)["labels"]
        return batch

    def _with_class_ids(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        labels = sample["labels"]
        class_ids = self.labeller(sample["input_ids"], labels)
        return {**sample, "labels": class_ids.tolist() if isinstance(labels, list) else class_ids}

    def _label_after(self, batch: Any) -> Any:
        """The labels are made by the collator itself, so the classes are found in what it made."""
        class_ids = self.labeller.label_batch(
            batch["input_ids"],
            batch["labels"],
            position_ids=batch.get("position_ids"),
            attention_mask=batch.get("attention_mask"),
            packed=self.packed,
        )
        batch[CLASS_IDS] = torch.from_numpy(class_ids)
        return batch


def _has_labels(features: Any) -> bool:
    first = features[0] if isinstance(features, (list, tuple)) and features else None
    while isinstance(first, (list, tuple)) and first:
        first = first[0]
    return isinstance(first, Mapping) and "labels" in first and "input_ids" in first


def _map_samples(features: Any, change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Any:
    """Features are samples, or, packed, lists of samples."""
    return [change(item) if isinstance(item, Mapping) else _map_samples(item, change) for item in features]
