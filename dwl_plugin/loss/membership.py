"""Which classes a token is in, whatever `overlap` says, and what follows from it.

Class ids are one integer per token. overlap `first`: the index of its class. overlap `sum`: a set of bits, bit c for class c,
none of them for `rest`, so at most 62 classes. Either way the first target of each sample carries `FIRST_TARGET` on top, which is
how samples are counted through packing, padding and sharding, and -100 is no target.

Shapes: N positions, C classes (the last one is `rest`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dwl_plugin.values import FIRST_TARGET, IGNORE_INDEX, Overlap

__all__ = ["Membership", "count_classes"]


@dataclass(frozen=True)
class Membership:
    """The classes of N positions; `ids_N` is negative where there is no target, and free of `FIRST_TARGET`."""

    ids_N: torch.Tensor
    classes: int
    overlap: Overlap

    @classmethod
    def read(cls, class_ids: torch.Tensor, classes: int, overlap: Overlap) -> Membership:
        """From the class ids of a batch, any shape."""
        ids_N = class_ids.reshape(-1)
        return cls(torch.where(ids_N >= 0, ids_N & (FIRST_TARGET - 1), ids_N), classes, overlap)

    @classmethod
    def all_rest(cls, is_target: torch.Tensor, classes: int, overlap: Overlap) -> Membership:
        """Every target in the last class."""
        rest = classes - 1 if overlap == "first" else 0
        return cls(torch.where(is_target.reshape(-1), rest, IGNORE_INDEX), classes, overlap)

    @property
    def is_target(self) -> torch.Tensor:
        return self.ids_N >= 0

    def weigh(self, values_C: torch.Tensor) -> torch.Tensor:
        """Σ over the classes of each token of `values_C`; (N,), 0 where there is no target."""
        if self.overlap == "first":
            return torch.where(self.is_target, values_C[self.ids_N.clamp(min=0)], 0.0)
        total_N = torch.where(self.ids_N == 0, values_C[-1], 0.0)
        for c in range(self.classes - 1):
            total_N += torch.where(self._in(c), values_C[c], 0.0)
        return total_N

    def sums(self, rows_RN: torch.Tensor) -> torch.Tensor:
        """Σ of each row over the tokens of each class, and over all targets in one more column; (R, C + 1)."""
        if self.overlap == "first":
            slot_N = torch.where(self.is_target, self.ids_N, self.classes)
            sums_RC = rows_RN.new_zeros(len(rows_RN), self.classes + 1).index_add_(1, slot_N, rows_RN)
            sums_RC[:, -1] = sums_RC[:, :-1].sum(1)
            return sums_RC
        columns = [self._in(c) for c in range(self.classes - 1)] + [self.ids_N == 0, self.is_target]
        zero = rows_RN.new_zeros(())
        return torch.stack([torch.where(column_N, rows_RN, zero).sum(1) for column_N in columns], 1)

    def _in(self, c: int) -> torch.Tensor:
        return self.is_target & ((self.ids_N >> c) & 1).bool()


def count_classes(class_ids: torch.Tensor, classes: int, overlap: Overlap) -> torch.Tensor:
    """(C + 2,) int64: tokens of each class, targets, and first targets of samples."""
    members = Membership.read(class_ids, classes, overlap)
    ones_1N = torch.ones_like(members.ids_N)[None]
    return torch.cat([members.sums(ones_1N)[0], (class_ids >= FIRST_TARGET).sum()[None]])
