"""Which classes a token is in, whatever `overlap` says, and what follows from it.

Class ids are one integer per token. overlap `first`: the index of its class. overlap `sum`: a set of bits, bit c for class c,
none of them for `rest`, so at most 62 classes. Either way the first target of each sample carries `FIRST_TARGET` on top, which is
how samples are counted through packing, padding and sharding, and -100 is no target. Where tokens have factors, an id holds those
too, and the number of a data set (`classes/data_codes.py`).

Shapes: N positions, C classes (the last one is `rest`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dwl_plugin.classes.data_codes import CLASS_BITS, DATA_SET_BITS, FACTOR_SHIFT, ONE
from dwl_plugin.values import FIRST_TARGET, IGNORE_INDEX, Overlap

__all__ = ["Membership", "count_classes", "widest"]


@dataclass(frozen=True)
class Membership:
    """The classes of N positions; `ids_N` is negative where there is no target, and holds nothing but classes.

    `factors_N` is fp32, `data_sets_N` counts from 1; None where ids hold neither.
    """

    ids_N: torch.Tensor
    classes: int
    overlap: Overlap
    factors_N: torch.Tensor | None = None
    data_sets_N: torch.Tensor | None = None

    @classmethod
    def read(cls, class_ids: torch.Tensor, classes: int, overlap: Overlap, weighs: bool = False) -> Membership:
        """From the class ids of a batch, any shape; `weighs`: they hold factors."""
        ids_N = class_ids.reshape(-1)
        is_target_N = ids_N >= 0
        if not weighs:
            return cls(torch.where(is_target_N, ids_N & (FIRST_TARGET - 1), ids_N), classes, overlap)
        bits_N = (ids_N >> FACTOR_SHIFT & 0xFFFFFFFF) ^ ONE
        signed_N = torch.where(bits_N >= 1 << 31, bits_N - (1 << 32), bits_N).to(torch.int32)
        factors_N = torch.where(is_target_N, signed_N.view(torch.float32), 0.0)
        data_sets_N = torch.where(is_target_N, ids_N >> CLASS_BITS & ((1 << DATA_SET_BITS) - 1), 0)
        return cls(torch.where(is_target_N, ids_N & ((1 << CLASS_BITS) - 1), ids_N), classes, overlap, factors_N, data_sets_N)

    @classmethod
    def all_rest(cls, is_target: torch.Tensor, classes: int, overlap: Overlap) -> Membership:
        """Every target in the last class."""
        rest = classes - 1 if overlap == "first" else 0
        return cls(torch.where(is_target.reshape(-1), rest, IGNORE_INDEX), classes, overlap)

    def in_rest(self) -> Membership:
        """The same tokens, each of them in the last class."""
        return replace(self, ids_N=self.all_rest(self.is_target, self.classes, self.overlap).ids_N)

    @property
    def is_target(self) -> torch.Tensor:
        return self.ids_N >= 0

    def weigh(self, values_C: torch.Tensor, sign: int = 1) -> torch.Tensor:
        """Σ over the classes of each token of `values_C`, times its factor; (N,), 0 where there is no target, or where the factor
        is not of this `sign`."""
        total_N = self.add_up(values_C)
        return total_N if self.factors_N is None else total_N * (sign * self.factors_N).clamp(min=0)

    def add_up(self, values_C: torch.Tensor) -> torch.Tensor:
        """As `weigh`, without factors."""
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

    def sums_of_data_sets(self, rows_RN: torch.Tensor, data_sets: int) -> torch.Tensor:
        """Σ of each row over the targets of each data set; (R, D)."""
        assert self.data_sets_N is not None
        is_of_one_N = self.is_target & (self.data_sets_N > 0) & (self.data_sets_N <= data_sets)
        slot_N = torch.where(is_of_one_N, self.data_sets_N - 1, data_sets)
        return rows_RN.new_zeros(len(rows_RN), data_sets + 1).index_add_(1, slot_N, rows_RN)[:, :-1]

    def _in(self, c: int) -> torch.Tensor:
        return self.is_target & ((self.ids_N >> c) & 1).bool()


def count_classes(class_ids: torch.Tensor, classes: int, overlap: Overlap, weighs: bool = False) -> torch.Tensor:
    """(1, C + 2) int64: tokens of each class, targets, and first targets of samples. `weighs`: (2, C + 2) in `widest`, the second
    row with |factor| in the place of each token."""
    members = Membership.read(class_ids, classes, overlap, weighs)
    ones_N, samples = torch.ones_like(members.ids_N), (class_ids >= FIRST_TARGET).sum()
    if members.factors_N is None:
        return torch.cat([members.sums(ones_N[None]), samples[None, None]], 1)
    dtype = widest(class_ids.device)
    sums_2C = members.sums(torch.stack([ones_N.to(dtype), members.factors_N.abs().to(dtype)]))
    return torch.cat([sums_2C, samples.to(dtype).expand(2, 1)], 1)


def widest(device: torch.device) -> torch.dtype:
    """fp64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64
