"""From the classes of a config to a class id for every target token.

Classes are numbered in their order, which is their priority, and `rest` comes last: a token's id is the smallest number among
the selectors that match it. Under `overlap: sum` its id is a set of bits instead, one for each selector that matches it, and
`rest` is 0. Selectors that look at the token alone are folded into one look-up table.

Where the data brings factors, or a reduction counts samples, an id also carries the factor of its token (`data_codes.py`).

Suffixes: V token ids, T tokens, B rows of a batch, S samples, K classes without `rest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from dwl_plugin.classes.data_codes import data_sets_of, encode, factors_of
from dwl_plugin.classes.masks import InVocabulary, Mask
from dwl_plugin.classes.samples import Samples
from dwl_plugin.classes.token_bytes import Bools, Floats, Ints, TokenTable
from dwl_plugin.errors import RunError, shortened
from dwl_plugin.values import FIRST_TARGET, IGNORE_INDEX, Overlap

__all__ = ["IGNORE_INDEX", "Labeller", "as_ints", "codes_of", "ids_and_targets", "sample_starts"]


@dataclass(frozen=True, eq=False)
class Labeller:
    """Class indices of samples. Picklable; made by `build_labeller`.

    Args:
        names: classes in priority order, then `rest`.
        masks: one per class without `rest`.
        lookup: (V + 1,) the class id as far as token selectors decide it; `rest` where there is none.
        table: the tokenizer's bytes; blank where no class looks at text.
        overlap: first or sum.
        marks_samples: add `FIRST_TARGET` to the id of each sample's first target; not at its first token, which nothing predicts.
        reads_data: rows come with codes of what the data says of their tokens. A token with a factor of 0 is no target.
        power: the factor of a token is divided by this power of the number of its sample's targets; the first token of a sample
            is none of them.
        data_sets: names of the data sets that codes number, from 1.
    """

    names: tuple[str, ...]
    masks: tuple[Mask, ...]
    lookup: Ints
    table: TokenTable
    overlap: Overlap = "first"
    marks_samples: bool = False
    reads_data: bool = False
    power: float = 0.0
    data_sets: tuple[str, ...] = ()

    @property
    def weighs(self) -> bool:
        """Whether class ids carry factors."""
        return self.reads_data or self.power > 0

    @cached_property
    def needs_boundaries(self) -> bool:
        """True where a class looks beyond the token itself, and so has to know where samples begin."""
        return not all(isinstance(mask, InVocabulary) for mask in self.masks)

    def __call__(self, input_ids: Any, labels: Any, codes: Any = None) -> Ints:
        """Class index of each target of one sample, -100 elsewhere.

        Args:
            input_ids: (T,) token ids; a list, an array or a tensor.
            labels: (T,) -100 where the token is no target; not shifted.
            codes: (T,) what the data says of each token, for a labeller that reads it.

        Returns:
            (T,) int64, an index into `names`, or the bits of its classes, or -100.

        Raises:
            PatternTooSlowError: a pattern backtracks on this sample.
        """
        return self.label_samples([(input_ids, labels, None)], [codes])[0]

    def label_samples(self, samples: Sequence[tuple[Any, Any, Any]], codes: Sequence[Any] = ()) -> list[Ints]:
        """The class ids of each (`input_ids`, `labels`, `position_ids`), in one pass: many short samples cost little more
        than a long one. `position_ids` may be None; a sample is taken apart where they do not increase. `codes` are one
        list for each sample, for a labeller that reads them."""
        try:
            ids_T, ends = _end_to_end([sample[0] for sample in samples])
            labels_T, label_ends = _end_to_end([sample[1] for sample in samples])
            if ends != label_ends:
                raise ValueError("of different lengths")
        except _NOT_INTEGERS:
            for input_ids, labels, _ in samples:
                ids_and_targets(input_ids, labels)  # says which
            raise
        edges = list(pairwise([0, *ends]))
        if not len(ids_T):
            return [ids_T for _ in edges]
        starts_T = np.zeros(len(ids_T), np.bool_)
        for (begin, end), (_, _, position_ids) in zip(edges, samples, strict=True):
            if begin < end:
                starts_T[begin] = True
                if position_ids is not None:
                    starts_T[begin:end] = sample_starts(ids_T[begin:end], position_ids)
        codes_T = (
            _end_to_end([codes_of(own, end - begin) for (begin, end), own in zip(edges, codes, strict=True)])[0]
            if self.reads_data
            else None
        )
        classes_T = self._classify(ids_T, labels_T != IGNORE_INDEX, np.flatnonzero(starts_T), codes_T)
        return [classes_T[begin:end] for begin, end in edges]

    def label_batch(
        self,
        input_ids: Any,
        labels: Any,
        position_ids: Any = None,
        attention_mask: Any = None,
        codes: Any = None,
        *,
        packed: bool = False,
    ) -> Ints:
        """Class indices of a batch that is already collated; padding and neighbours in a row change nothing.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T) -100 where the token is no target; not shifted.
            position_ids: (B, T); a sample begins where they do not increase.
            attention_mask: (B, T); 0 is padding, and a row may number its samples 1, 2, 3, ...
            codes: (B, T) as for one sample.
            packed: rows may hold several samples.

        Returns:
            (B, T) int64, as for one sample.

        Raises:
            RunError: `packed`, a class looks beyond one token, and nothing tells where samples begin.
            PatternTooSlowError: a pattern backtracks on a sample.
        """
        ids_BT, target_BT = ids_and_targets(input_ids, labels)
        mask_BT, position_BT = _aligned(attention_mask, ids_BT), _aligned(position_ids, ids_BT)
        if mask_BT is not None:
            target_BT &= mask_BT != 0
        codes_BT = as_ints(codes) if self.reads_data else None
        if not (self.needs_boundaries or self.marks_samples or self.weighs):
            return np.where(target_BT, self.lookup[self._known(ids_BT)], IGNORE_INDEX)
        numbered = mask_BT is not None and mask_BT.max(initial=0) > 1
        needs_boundaries = self.needs_boundaries or self.marks_samples or self.power > 0
        if packed and needs_boundaries and position_BT is None and not numbered:
            raise RunError(
                "classes that look beyond one token (by text, turn, position or role) end where a sample ends, and reductions by "
                "sample (`sequence_mean_token_sum`, `sample_mean`, `sample_sqrt`) need its end too, but this batch does not say "
                "where its samples begin: its rows are packed, and it has neither (batch, tokens) `position_ids` nor an "
                "`attention_mask` that numbers the samples. Turn packing off, or select by `token_ids`, `tokens`, `token_regex`, "
                "`special` or `added` and take another reduction."
            )
        first_BT = sample_starts(ids_BT, position_BT)
        if mask_BT is None:
            codes_N = None if codes_BT is None else codes_BT.ravel()
            classes_N = self._classify(ids_BT.ravel(), target_BT.ravel(), np.flatnonzero(first_BT), codes_N)
            return classes_N.reshape(ids_BT.shape)
        first_BT[:, 1:] |= mask_BT[:, 1:] != mask_BT[:, :-1]
        kept_BT = mask_BT != 0
        classes_BT = np.full(ids_BT.shape, IGNORE_INDEX, np.int64)
        codes_N = None if codes_BT is None else codes_BT[kept_BT]
        classes_BT[kept_BT] = self._classify(ids_BT[kept_BT], target_BT[kept_BT], np.flatnonzero(first_BT[kept_BT]), codes_N)
        return classes_BT

    def members(self, input_ids: Any, labels: Any, position_ids: Any = None, codes: Any = None) -> Bools:
        """(K, T) True where a target matches a class, whatever the priority; samples begin as in `label_batch`."""
        ids_T, target_T = ids_and_targets(input_ids, labels)
        matches_KT = np.zeros((len(self.masks), len(ids_T)), np.bool_)
        if target_T.any():
            starts_S = np.flatnonzero(sample_starts(ids_T, position_ids))
            codes_T = codes_of(codes, len(ids_T)) if self.reads_data else None
            samples = Samples(self.table, self._known(ids_T), target_T, starts_S, codes_T)
            for matches_T, mask in zip(matches_KT, self.masks, strict=True):
                np.logical_and(mask(samples), target_T, out=matches_T)
        return matches_KT

    def factors(self, input_ids: Any, labels: Any, position_ids: Any = None, codes: Any = None) -> Floats:
        """(T,) what the data and the reduction make each target of a row count; 0 where there is none. Samples begin as in
        `label_batch`."""
        ids_T, target_T = ids_and_targets(input_ids, labels)
        starts_S = np.flatnonzero(sample_starts(ids_T, position_ids))
        return self._factors(target_T, starts_S, codes_of(codes, len(ids_T)) if self.reads_data else None)

    def _known(self, ids: Ints) -> Ints:
        """Ids outside the vocabulary become V; as unsigned numbers the negative ones are large, too."""
        return np.minimum(ids.view(np.uint64), len(self.lookup) - 1).view(np.int64)

    def _classify(self, ids_T: Ints, target_T: Bools, starts_S: Ints, codes_T: Ints | None) -> Ints:
        ids_T = self._known(ids_T)
        classes_T = self.lookup[ids_T]
        if self.needs_boundaries and target_T.any():
            samples = Samples(self.table, ids_T, target_T, starts_S, codes_T)
            first_T = np.full(len(ids_T), len(self.masks))
            for index, mask in reversed(list(enumerate(self.masks))):
                if isinstance(mask, InVocabulary):
                    continue
                if self.overlap == "sum":
                    classes_T[mask(samples)] |= 1 << index
                else:
                    first_T[mask(samples)] = index
            if self.overlap == "first":
                np.minimum(classes_T, first_T, out=classes_T)
        if self.weighs:
            classes_T, target_T = self._weighed(classes_T, target_T, starts_S, codes_T)
        if self.marks_samples:
            targets = np.flatnonzero(target_T)
            targets = targets[~np.isin(targets, starts_S)]
            _, first = np.unique(np.searchsorted(starts_S, targets, "right"), return_index=True)
            classes_T[targets[first]] |= FIRST_TARGET
        return np.where(target_T, classes_T, IGNORE_INDEX)

    def _weighed(self, classes_T: Ints, target_T: Bools, starts_S: Ints, codes_T: Ints | None) -> tuple[Ints, Bools]:
        """Classes with the factor of each token, and the targets whose factor is not 0."""
        factors_T = self._factors(target_T, starts_S, codes_T)
        return encode(factors_T, classes_T, 0 if codes_T is None else data_sets_of(codes_T)), factors_T != 0

    def _factors(self, target_T: Bools, starts_S: Ints, codes_T: Ints | None) -> Floats:
        factors_T = target_T * (1.0 if codes_T is None else factors_of(codes_T).astype(np.float64))
        if self.power and len(starts_S):
            factors_T[starts_S] = 0  # what the sample before it in a row predicts
            lengths_S = np.diff(starts_S, append=len(factors_T))
            targets_T = np.repeat(np.add.reduceat(factors_T != 0, starts_S, dtype=np.int64), lengths_S)
            factors_T *= np.maximum(targets_T, 1) ** -self.power
        return factors_T


_NOT_INTEGERS = (TypeError, ValueError, OverflowError)


def ids_and_targets(input_ids: Any, labels: Any) -> tuple[Ints, Bools]:
    """The ids, and True at the targets. Raises `RunError` with what the row begins with, which finds it in the data."""
    try:
        ids, label = as_ints(input_ids), as_ints(labels)
        why = f"`input_ids` {ids.shape} and `labels` {label.shape} have to be of one shape"
        if ids.shape == label.shape:
            return ids, label != IGNORE_INDEX
    except _NOT_INTEGERS as error:
        why = f"`input_ids` and `labels` have to be integers: {error}"
    raise RunError(f"a row of the data cannot be classified: {why}. Its input_ids are {shortened(input_ids, 60)}")


def codes_of(codes: Any, tokens: int) -> Ints:
    """Those of a row's tokens; the host may have cut the row, which begins as it did."""
    if codes is None or len(codes) < tokens:
        raise RunError(
            "a row came without the weights and marks of its data (`data_weights`, `marked`, `dataset`): it was prepared by other "
            "means than the run's own datasets."
        )
    return as_ints(codes)[:tokens]


def _end_to_end(rows: Sequence[Any]) -> tuple[Ints, list[int]]:
    """Rows joined, and where each ends; lists, which is what a data set gives, are converted at once."""
    ends = list(accumulate(map(len, rows)))
    if rows and all(type(row) is list for row in rows):
        return np.fromiter(chain.from_iterable(rows), np.int64, ends[-1]), ends
    return np.concatenate([np.zeros(0, np.int64), *map(as_ints, rows)]), ends


def as_ints(values: Any) -> Ints:
    """A list, an array or a tensor as an array."""
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values, np.int64)


def _aligned(values: Any, ids: Ints) -> Ints | None:
    """`values` if they have one number per token; 3-D position ids and 4-D masks tell nothing that is used here."""
    array = None if values is None else as_ints(values)
    return array if array is not None and array.shape == ids.shape else None


def sample_starts(ids: Ints, position_ids: Any) -> Bools:
    """True at the first token of each row, and where positions stop increasing."""
    starts = np.zeros(ids.shape, np.bool_)
    starts[..., :1] = True
    positions = _aligned(position_ids, ids)
    if positions is not None:
        starts[..., 1:] |= positions[..., 1:] <= positions[..., :-1]
    return starts
