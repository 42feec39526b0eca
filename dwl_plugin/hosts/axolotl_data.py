"""What Axolotl's rows say of their tokens, in a column beside those tokens.

Each data set of the host goes through `get_dataset_wrapper`, which makes tokens of its rows, a row at a time or several. While
`reading_data` is entered, the strategy that does so is called for one row after the other, and what the row says goes with each
piece that comes of it. All that follows is the host's own: dropping, shuffling, splitting, packing. Where a config reads nothing of
its data, nothing here does anything.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from dwl_plugin import __version__
from dwl_plugin.classes.data_codes import DATA_CODES, MOST_DATA_SETS
from dwl_plugin.classes.selectors import DatasetSelector, walk
from dwl_plugin.classes.token_bytes import Ints
from dwl_plugin.config import Block
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.hosts.axolotl_args import block_of
from dwl_plugin.hosts.axolotl_fields import not_finite
from dwl_plugin.hosts.axolotl_rows import with_codes
from dwl_plugin.hosts.instead import instead
from dwl_plugin.run.row_codes import MARK, DataSet, RowCodes, RowError, row_number

__all__ = ["data_set_names", "prepare_as_ever", "read_what_is_prepared", "reading_data"]

_KEYS = ("pretraining_dataset", "datasets", "test_datasets")


@contextlib.contextmanager
def reading_data(cfg: Any, block: Block | None) -> Iterator[None]:
    """While entered, the rows that the host makes come with `DATA_CODES`, as `block` reads them, and are prepared apart from those
    that come without. What streams from them goes on reading afterwards."""
    if block is None or not block.reads_data:
        yield
        return
    from axolotl.utils.data import sft, shared, streaming, utils

    codes, names = RowCodes.of(block), data_set_names(cfg, block)
    text = DataSet(codes, _KEYS[0], names[0] if names else "", min(len(names), 1))
    hash_with_codes = _Hash(shared.generate_dataset_hash_from_config, codes, names)
    with (
        instead(sft, "get_dataset_wrapper", _Tokenise(sft.get_dataset_wrapper, codes, names)),
        instead(sft, "generate_dataset_hash_from_config", hash_with_codes),
        instead(shared, "generate_dataset_hash_from_config", hash_with_codes),
        instead(streaming, "encode_packed_streaming", _Packed(streaming.encode_packed_streaming)),
        instead(streaming, "encode_streaming", _Joined(streaming.encode_streaming, text)),
        instead(utils, "_deduplicate_dataset", _Deduplicate(utils._deduplicate_dataset)),
    ):
        yield


def read_what_is_prepared() -> None:
    """Have whatever data sets the host prepares read as their config says, also by commands that ask no plugin for them."""
    from axolotl.common import datasets

    if not isinstance(datasets.prepare_datasets, _Prepare):
        datasets.prepare_datasets = _Prepare(datasets.prepare_datasets)


def prepare_as_ever() -> None:
    """The end of `read_what_is_prepared`."""
    from axolotl.common import datasets

    if isinstance(datasets.prepare_datasets, _Prepare):
        datasets.prepare_datasets = datasets.prepare_datasets.host


@dataclass(frozen=True)
class _Prepare:
    """In the place of the host's `prepare_datasets`."""

    host: Callable[..., Any]

    def __call__(self, cfg: Any, *args: Any, **kwargs: Any) -> Any:
        block = block_of(cfg)
        ConfigError.raise_any(not_finite(cfg, block))
        with reading_data(cfg, block):
            return self.host(cfg, *args, **kwargs)


def data_set_names(cfg: Any, block: Block) -> tuple[str, ...]:
    """The names of the data sets, which are numbered from 1; none where they are more than can be told apart.

    Raises:
        ConfigError: a class of `block` asks for one of several that go by the same name, or for one of too many.
    """
    entries = {key: list(_entries(cfg.get(key))) for key in _KEYS}
    names = tuple(dict.fromkeys(_name(entry) for several in entries.values() for entry in several))
    twice = {name for several in entries.values() for name, count in Counter(map(_name, several)).items() if count > 1}
    problems = []
    for path, asked in _asked_for(block):
        if len(names) > MOST_DATA_SETS:
            problems.append(
                Problem(path, f"there are {len(names):,} data sets, and no more than {MOST_DATA_SETS} are told apart", asked)
            )
        elif asked in twice:
            problems.append(Problem(path, "several data sets go by this name", asked, hint="give each a `name` of its own"))
    ConfigError.raise_any(problems)
    return names if len(names) <= MOST_DATA_SETS else ()


def _asked_for(block: Block) -> Iterator[tuple[str, str]]:
    for name, config in block.class_configs.items():
        for path, selector in walk(config, f"dwl.classes.{name}"):
            if isinstance(selector, DatasetSelector):
                yield f"{path}.dataset", selector.dataset


def _entries(value: Any) -> Iterator[Any]:
    """The entries of a key of the host, one for each of several names."""
    for entry in [value] if isinstance(value, (str, Mapping)) else value or ():
        if isinstance(entry, Mapping) and isinstance(entry.get("name"), list):
            yield from ({**entry, "name": name} for name in entry["name"])
        else:
            yield entry


def _name(entry: Any) -> str:
    return entry if isinstance(entry, str) else str(entry.get("name") or entry.get("path"))


@dataclass(frozen=True)
class _Hash:
    """What the host calls its prepared rows, for rows with codes."""

    host: Callable[..., str]
    codes: RowCodes
    names: tuple[str, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> str:
        said = [self.host(*args, **kwargs), DATA_CODES, __version__, asdict(self.codes), self.names]
        return hashlib.md5(json.dumps(said).encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class _Tokenise:
    """In the place of the host's `get_dataset_wrapper`."""

    host: Callable[..., tuple[Any, Any]]
    codes: RowCodes
    names: tuple[str, ...]

    def __call__(self, *, dataset_config: Any, cfg: Any, dataset: Any, **how: Any) -> tuple[Any, Any]:
        from axolotl.utils.data import wrappers

        name = _name(dataset_config)
        key = next((key for key in _KEYS if name in map(_name, _entries(cfg.get(key)))), _KEYS[1])
        source = DataSet(self.codes, key, name, self.names.index(name) + 1 if name in self.names else 0)
        wrap = wrappers.wrap_dataset_for_tokenized_prompt

        def wrap_with_codes(strategy: Any, rows: Any, **kwargs: Any) -> Any:
            return wrap(with_codes(strategy, source), rows, **kwargs)

        try:
            with instead(wrappers, "wrap_dataset_for_tokenized_prompt", wrap_with_codes):
                made, prompter = self.host(dataset_config=dataset_config, cfg=cfg, dataset=dataset, **how)
        except RowError as error:
            raise _numbered(error, dataset) from None
        if hasattr(made, "select") and DATA_CODES not in made.column_names:
            made = _beside(made, dataset, source, cfg)
        return made, prompter


def _numbered(error: RowError, dataset: Any) -> RowError:
    """The error with the number of its row, which is looked for among all: what makes tokens of it is not told."""
    if error.number is None and hasattr(dataset, "select"):
        for number, row in enumerate(dataset):
            if repr(row) == error.row:
                return error.numbered(row_number(dataset, number))
    return error


def _beside(made: Any, dataset: Any, source: DataSet, cfg: Any) -> Any:
    """Tokens that came with the data, or that a strategy made of the whole data set, with codes beside them."""
    from datasets import concatenate_datasets

    if "input_ids" not in made.column_names:
        why = "tokens are made only when a batch is, where nothing reads the weights and marks of the data"
        hint = "delete it, or what `dwl` reads of the data"
        raise ConfigError.at("skip_prepare_dataset", why, cfg.skip_prepare_dataset, hint=hint)
    said = [name for name in dataset.column_names if name in source.fields or _is_nested(dataset.features[name])]
    if made is not dataset and len(made) != len(dataset):
        why = f"{source.name}: the rows with this column are not those that its tokens are made for"
        ConfigError.raise_any(Problem(source.key, why, name) for name in said)
        said = []
    columns = [dataset.select_columns(said)] if said else []
    rows = concatenate_datasets([*columns, made.select_columns(["input_ids"])], axis=1)
    coded = rows.map(
        _OfTokens(source),
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=cfg.dataset_num_proc,
        keep_in_memory=cfg.dataset_keep_in_memory is True,
        desc="Weights and marks",
    )
    if made is dataset:  # a collator would not know what to do with what is there to be read
        made = made.remove_columns([name for name in made.column_names if name in {*source.fields, MARK}])
    return concatenate_datasets([made, coded], axis=1)


def _is_nested(feature: Any) -> bool:
    """Whether a column's values have fields of their own."""
    feature = getattr(feature, "feature", feature)
    if isinstance(feature, list):
        return _is_nested(feature[0])
    return isinstance(feature, dict) or type(feature).__name__ == "Json"  # of `datasets` from 5.0


@dataclass(frozen=True)
class _OfTokens:
    """A row that is tokenised, and its number -> its codes."""

    source: DataSet

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Ints]:
        row = dict(row)

        def nothing() -> tuple[()]:
            self.source.codes.require_none_beside(row)
            return ()

        return {DATA_CODES: self.source.of(row, len(row["input_ids"]), nothing, number)}


@dataclass(frozen=True)
class _Deduplicate:
    """In the place of the host's `_deduplicate_dataset`: rows of the same tokens are the same, whatever is said of them."""

    host: Callable[..., Any]

    def __call__(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return self.host(_Bare(dataset), *args, **kwargs)


@dataclass(frozen=True)
class _Bare:
    """A data set that shows its rows without codes."""

    dataset: Any

    def __iter__(self) -> Iterator[Any]:
        columns = [name for name in self.dataset.column_names if name != DATA_CODES]
        return iter(self.dataset.select_columns(columns))

    def select(self, numbers: Any) -> Any:
        return self.dataset.select(numbers)


@dataclass(frozen=True)
class _Packed:
    """In the place of the host's `encode_packed_streaming`, whose collator joins the codes of a pack, and pads all else."""

    host: Callable[..., dict[str, list[Any]]]

    def __call__(self, collate: Any, *args: Any, **kwargs: Any) -> dict[str, list[Any]]:
        from torch.nn.functional import pad

        packs = self.host(collate, *args, **kwargs)
        on_the_left = collate.tokenizer.padding_side == "left"
        for at, (codes, ids) in enumerate(zip(packs.get(DATA_CODES, ()), packs.get("input_ids", ()), strict=True)):
            missing = len(ids) - len(codes)
            packs[DATA_CODES][at] = pad(codes, (missing, 0) if on_the_left else (0, missing))
        return packs


@dataclass(frozen=True)
class _Joined:
    """In the place of the host's `encode_streaming`, which makes tokens of texts and joins these: it is called once more with each
    token's number for the token, so that where a token went is where its code goes. An end of text is its row's, padding nobody's.
    """

    host: Callable[..., dict[str, list[list[int]]]]
    source: DataSet

    def __call__(self, examples: Mapping[str, list[Any]], tokenizer: Any, **how: Any) -> dict[str, Any]:
        counting = _Counting(tokenizer)
        made = self.host(examples, tokenizer=counting, **how)
        joined = self.host(examples, tokenizer=_Numbering(counting.lengths), **how)["input_ids"]
        rows = [dict(zip(examples, values, strict=True)) for values in zip(*examples.values(), strict=True)]
        codes_N = np.concatenate([[0], *(self.source.of(row, length) for row, length in zip(rows, counting.lengths, strict=True))])
        ends = iter([self.source.of({**row, self.source.codes.token or "": None}, 1)[0] for row in rows])
        made[DATA_CODES] = [[next(ends) if number == _END else codes_N[number] for number in numbers] for numbers in joined]
        return made


_END = -1


class _Counting:
    """A tokenizer, and how many tokens it made of each text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.lengths: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        made = self.tokenizer(*args, **kwargs)
        self.lengths = list(map(len, made["input_ids"]))
        return made


class _Numbering:
    """A tokenizer whose tokens are the numbers from 1, through all texts."""

    eos_token_id, pad_token_id = _END, 0

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, list[list[int]]]:
        numbers = [list(range(begin + 1, end + 1)) for begin, end in pairwise(accumulate(self.lengths, initial=0))]
        return {"input_ids": numbers, "attention_mask": [[1] * length for length in self.lengths]}
