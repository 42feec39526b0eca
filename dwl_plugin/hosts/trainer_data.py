"""What the rows of a trainer's data sets say of their tokens, in a column beside these."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset as TorchDataset, IterableDataset as TorchStream
from transformers import Trainer

from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.config import Block
from dwl_plugin.errors import ConfigError
from dwl_plugin.run.message_spans import FIELDS, Span, message_spans
from dwl_plugin.run.row_codes import MARK, DataSet, RowCodes, RowError, row_number

__all__ = ["Reader"]

Row = Mapping[str, Any]

_FIELDS = (*FIELDS, "thinking")


@dataclass(frozen=True)
class Reader:
    """A data set of a trainer -> the same with `DATA_CODES` in its rows.

    Args:
        codes: the fields that are read.
        tokenizer: with the chat template of the rows' messages.
        chat_template: in place of the tokenizer's.
        cut: the length at which the host cut rows off at their end, their tokens and labels and nothing else.
        workers: processes that read a data set.
    """

    codes: RowCodes
    tokenizer: Any
    chat_template: str | None = None
    cut: int | None = None
    workers: int | None = None

    @classmethod
    def of(cls, trainer: Trainer, block: Block, tokenizer: Any) -> Reader:
        """That of a trainer, whose own template and cut are TRL's."""
        args: Any = trainer.args
        as_they_are = (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset", False)
        cut = None if as_they_are else getattr(args, "max_length", None)
        template, workers = getattr(trainer, "chat_template", None), getattr(args, "dataset_num_proc", None)
        return cls(RowCodes.of(block), tokenizer, template, cut, workers)

    def __call__(self, dataset: Any, name: str, *, streams: bool = True) -> Any:
        """The data set, or each of several; `streams`: one whose rows are not known before they come, too.

        Raises `RowError` for a row that says something wrongly; of a stream, as it comes.
        """
        from datasets import Dataset, IterableDataset

        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {key: self(own, f"{name}[{key!r}]", streams=streams) for key, own in dataset.items()}
        if DATA_CODES in (getattr(dataset, "column_names", None) or ()) or isinstance(dataset, _Rows):
            return dataset
        of_row = _OfRow(self, DataSet(self.codes, name, name, 0))
        if isinstance(dataset, Dataset) and dataset.format["type"] != "custom":  # what a transform gives may differ each time
            return _mapped(dataset, of_row, self.workers)
        if isinstance(dataset, TorchStream) or not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            if not streams:
                return dataset
            return dataset.map(of_row) if isinstance(dataset, IterableDataset) else _Stream(dataset, of_row)
        rows = _Rows(dataset, of_row)
        for _ in rows:
            pass
        return rows


def _mapped(dataset: Any, of_row: _OfRow, workers: int | None) -> Any:
    shown = dataset.format
    try:
        made = dataset.with_format(None).map(of_row, with_indices=True, num_proc=workers, desc="Weights and marks")
    except RowError as error:
        raise (error if error.number is None else error.numbered(row_number(dataset, error.number))) from None
    columns = [*shown["columns"], DATA_CODES]
    return made.with_format(shown["type"], columns, shown["output_all_columns"], **shown["format_kwargs"])


@dataclass(frozen=True)
class _OfRow:
    """A row, and its number -> its codes."""

    reader: Reader
    source: DataSet

    def __call__(self, row: Row, number: int | None = None) -> dict[str, Any]:
        if not isinstance(row, Mapping) or "input_ids" not in row:
            why = "has rows without `input_ids`: where the collator makes the tokens, nothing reads what the data says of them"
            raise ConfigError.at(self.source.key, why, hint="tokenise the rows before, and leave the columns that say it")
        tokens, codes = len(row["input_ids"]), self.reader.codes
        if tokens == self.reader.cut:
            named = {name: row[name] for name in (codes.token, MARK) if name is not None and hasattr(row.get(name), "__len__")}
            row = {**row, **{name: said[:tokens] for name, said in named.items() if not isinstance(said, str)}}
        return {DATA_CODES: self.source.of(row, tokens, lambda: self._spans(row), number)}

    def _spans(self, row: Row) -> Iterable[Span]:
        reader, codes = self.reader, self.reader.codes
        columns = [name for name in (("prompt", "completion") if "prompt" in row else ("messages",)) if _is_chat(row.get(name))]
        codes.require_none_beside(row, (*columns, "tools"))
        places = [f"{name}[{number}]" for name in columns for number in range(len(row[name]))]
        messages = [message for name in columns for message in row[name]]
        for place, message in zip(places, messages, strict=True):
            codes.require_none_beside(message, (*_FIELDS, "tool_calls"), f"{place}.")
        tools, options = row.get("tools"), row.get("chat_template_kwargs") or {}
        options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "chat_template": reader.chat_template,
            **options,
        }

        def render(messages: list[Any]) -> str:
            return str(reader.tokenizer.apply_chat_template(messages, tokenize=False, **options))

        return message_spans(
            messages,
            render,
            row["input_ids"],
            reader.tokenizer,
            message_keys=codes.fields("message"),
            part_keys=codes.fields("part"),
            fields=_FIELDS,
            at=places.__getitem__,
        )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(message, Mapping) for message in value)


class _Rows(TorchDataset[Any]):
    """Rows by their number, with codes."""

    def __init__(self, rows: Any, of_row: _OfRow) -> None:
        self.rows, self.of_row = rows, of_row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        row = self.rows[number]
        return {**row, **self.of_row(row, number)}

    def __iter__(self) -> Iterator[Any]:
        return (self[number] for number in range(len(self)))


class _Stream(TorchStream[Any]):
    """Rows as they come, with codes."""

    def __init__(self, rows: Iterable[Any], of_row: _OfRow) -> None:
        self.rows, self.of_row = rows, of_row

    def __iter__(self) -> Iterator[Any]:
        return ({**row, **self.of_row(row)} for row in self.rows)
