"""What a row of the data says of its tokens, as their codes: the factors and marks of the row, its messages, parts and tokens.

Factors are multiplied in fp64 and kept in fp32. Marks add up. What is missing, or null, says nothing.

Suffixes: T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from dwl_plugin import __version__
from dwl_plugin.classes.data_codes import encode
from dwl_plugin.classes.token_bytes import Ints
from dwl_plugin.config import Block
from dwl_plugin.errors import PREFIX, ConfigError, Problem
from dwl_plugin.run.message_spans import Span

__all__ = ["MARK", "DataSet", "Level", "RowCodes", "RowError", "row_number"]

MARK = "mark"
"""The field of a row, a message or a part with its marks."""

Level = Literal["row", "message", "part"]

_TOKENISED = "input_ids"
_NUMBER = "a number, 1 if absent"
_ELSEWHERE = "write it into the row, or give `data_weights` other names than the data has for other things"


@dataclass(frozen=True)
class RowCodes:
    """The fields that a block reads of rows.

    Args:
        row, message, part, token: names of the fields with factors; None is not read.
        allow_negative: whether factors may be below 0.
        marks: names of the marks that classes ask for, in the order of their bits; without any, marks are not read.
    """

    row: str | None = None
    message: str | None = None
    part: str | None = None
    token: str | None = None
    allow_negative: bool = False
    marks: tuple[str, ...] = ()

    @classmethod
    def of(cls, block: Block) -> RowCodes:
        """What `block` reads."""
        weights = block.data_weights
        return cls(**({} if weights is None else weights.model_dump()), marks=block.marks)

    def __call__(self, row: Mapping[str, Any], tokens: int, spans: Iterable[Span] = (), data_set: int = 0) -> Ints:
        """The code of each token.

        Args:
            row: as the data has it. One with `input_ids` may give each token its mark.
            tokens: how many its tokens are.
            spans: its messages and parts.
            data_set: the number of its data set, from 1; 0: none.

        Returns:
            (T,) int64.

        Raises:
            ConfigError: the field and what is wrong with its value.
        """
        spans, column = tuple(spans), None if self.token is None else row.get(self.token)
        if not spans and column is None and not self.says(row, "row"):
            return np.full(tokens, encode(1, 0, data_set), np.int64)
        factors_T, marks_T = np.full(tokens, self.factor(row, "row")), self._marks_of(row, tokens)
        if column is not None:
            factors_T *= self._factors_of(column, tokens)
        for span in spans:
            factors_T[span.begin : span.end] *= self.factor(span.said, span.level, span.at)
            marks_T[span.begin : span.end] |= self.bits(span.said, span.at)
        return encode(self._as_stored(factors_T), marks_T, data_set)

    def fields(self, level: Level) -> list[str]:
        """The names of what is read of a row, a message or a part."""
        return [field for field in (getattr(self, level), MARK if self.marks else None) if field is not None]

    def says(self, said: Any, level: Level) -> bool:
        """Whether a row, message or part says something of its tokens."""
        return isinstance(said, Mapping) and any(said.get(field) is not None for field in self.fields(level))

    def factor(self, said: Mapping[str, Any], level: Level, at: str = "") -> float:
        """That of a row, message or part, which is at `at`. Raises `ConfigError`."""
        field = getattr(self, level)
        value = None if field is None else said.get(field)
        return 1.0 if value is None else self._number(value, f"{at}.{field}".lstrip("."))

    def bits(self, said: Mapping[str, Any], at: str = "") -> int:
        """The marks of a row, message or part, which is at `at`. Raises `ConfigError`."""
        return self._bits_of(said.get(MARK), f"{at}.{MARK}".lstrip(".")) if self.marks else 0

    def require_none_beside(self, said: Mapping[str, Any], read: Collection[str] = (), at: str = "") -> None:
        """As `require_none_in`, for the fields of a row or a message that are not `read`; `at` stands before their names."""
        for name, value in said.items():
            if name not in read:
                self.require_none_in(value, f"{at}{name}")

    def require_none_in(self, value: Any, at: str, fields: Collection[str | None] | None = None) -> None:
        """Raise `ConfigError` for a message's or part's factor, or a mark that is asked for, anywhere in `value`, where nothing
        reads it. `fields`: only these."""
        if isinstance(value, Mapping):
            for field, own in value.items():
                path = f"{at}.{field}"
                if field in (fields or (self.message, self.part)) and isinstance(own, (int, float)) and not isinstance(own, bool):
                    raise ConfigError.at(path, "stands where nothing reads it", own, hint=_ELSEWHERE)
                if field == MARK and fields is None and self._is_asked_for(own):
                    raise ConfigError.at(path, "stands where nothing reads it", own, hint=_ELSEWHERE)
                self.require_none_in(own, path, fields)
        elif isinstance(value, list) and isinstance(next((own for own in value if own is not None), None), (Mapping, list)):
            for number, own in enumerate(value):
                self.require_none_in(own, f"{at}[{number}]", fields)

    def _is_asked_for(self, mark: Any) -> bool:
        return any(isinstance(own, (str, int)) and str(own) in self.marks for own in (mark if isinstance(mark, list) else [mark]))

    def _number(self, value: Any, path: str) -> float:
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.number)):
            raise ConfigError.at(path, "has to be a number", value, _NUMBER)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise ConfigError.at(path, "has to be finite", value, _NUMBER)
        if number < 0 and not self.allow_negative:
            raise ConfigError.at(
                path, "is below 0", value, "0 or more", "`data_weights: {allow_negative: true}` takes it as unlikelihood"
            )
        return number

    def _factors_of(self, values: Any, tokens: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Those of a column with one for each token."""
        path, values = self.token or "", _listed(values)
        if not isinstance(values, list):
            raise ConfigError.at(path, "has to be a list of numbers, one for each token", values)
        if len(values) != tokens:
            raise ConfigError.at(path, f"has {len(values):,} numbers, and the row has {tokens:,} tokens", values)
        if set(map(type, values)) == {float}:
            factors_T = np.asarray(values, np.float64)
            if np.isfinite(factors_T).all() and (self.allow_negative or (factors_T >= 0).all()):
                return factors_T
        checked = [1.0 if own is None else self._number(own, f"{path}[{at}]") for at, own in enumerate(values)]
        return np.asarray(checked, np.float64)

    def _marks_of(self, row: Mapping[str, Any], tokens: int) -> Ints:
        """The marks of a row, which are those of all its tokens, or one for each where the data is tokenised."""
        own = _listed(row.get(MARK)) if self.marks and _TOKENISED in row else None
        if not isinstance(own, list) or len(own) != tokens:
            if isinstance(own, list) and (None in own or len(set(map(str, own))) < len(own)):  # no row's, which are all different
                raise ConfigError.at(MARK, f"has {len(own):,} marks, and the row has {tokens:,} tokens", own)
            return np.full(tokens, self.bits(row), np.int64)
        return np.asarray([self._bits_of(mark, f"{MARK}[{at}]") for at, mark in enumerate(own)], np.int64)

    def _bits_of(self, value: Any, path: str) -> int:
        value = _listed(value)
        if value is None:
            return 0
        if isinstance(value, list):
            bits = 0
            for at, own in enumerate(value):
                bits |= self._bits_of(own, f"{path}[{at}]")
            return bits
        if isinstance(value, (bool, np.bool_)) or not isinstance(value, (str, int, np.integer)):
            raise ConfigError.at(path, "has to be a name or a number", value, "a name, a number, or a list of them")
        name = str(value)
        return 1 << self.marks.index(name) if name in self.marks else 0

    def _as_stored(self, factors_T: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """In fp32, where a product may be too large, or so small that it would be 0, which takes a token out."""
        with np.errstate(over="ignore", under="ignore"):
            stored_T: np.ndarray[Any, np.dtype[np.float32]] = factors_T.astype(np.float32) + np.float32(0)  # -0.0 is 0.0
        odd_T = ~np.isfinite(stored_T) | ((stored_T == 0) & (factors_T != 0))
        if odd_T.any():
            at = int(odd_T.argmax())
            names = ", ".join(name for name in dict.fromkeys((self.row, self.message, self.part, self.token)) if name)
            raise ConfigError.at(names, f"the product of the factors of token {at} is beyond fp32", float(factors_T[at]))
        return stored_T


class RowError(ConfigError):
    """What is wrong in the fields of a row, and which row it is. `said` is only that.

    Args:
        problems: by field; or the text of another, of which a data loader makes it again.
        key: where the data set stands in the config.
        data_set: what it is called.
        row: as Python writes it.
        number: from 0; None where it is not known, as in a stream.
    """

    def __init__(
        self, problems: Iterable[Problem] | str, key: str = "", data_set: str = "", row: str = "", number: int | None = None
    ) -> None:
        self.key, self.data_set, self.row, self.number = key, data_set, row, number
        self.of_fields = () if isinstance(problems, str) else tuple(problems)
        if isinstance(problems, str):
            own = problems[problems.rfind(PREFIX) :]  # below the worker's traceback
            self.said = own.partition("\n")[2].strip()
            super().__init__(own)
            return
        which = f"the row of {data_set} that begins with {row[:60]}" if number is None else f"row {number + 1:,} of {data_set}"
        super().__init__(replace(at, path=key, message=f"{which}: `{at.path}`: {at.message}") for at in self.of_fields)
        self.said = "\n".join(map(str, self.problems))

    def numbered(self, number: int) -> RowError:
        """The same, with the row's number."""
        return RowError(self.of_fields, self.key, self.data_set, self.row, number)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.of_fields, self.key, self.data_set, self.row, self.number))


@dataclass(frozen=True)
class DataSet:
    """What is read of the rows of one data set.

    Args:
        codes: the fields that are read.
        key: where it stands in the config.
        name: what it is called.
        number: its own, from 1; 0: data sets are not told apart.
        version: of this package: what it made of rows may be in the cache of `datasets`.
    """

    codes: RowCodes
    key: str
    name: str
    number: int
    version: str = __version__

    def of(
        self, row: Mapping[str, Any], tokens: int, spans: Callable[[], Iterable[Span]] = tuple, number: int | None = None
    ) -> Ints:
        """The codes of a row's tokens; `number`: the row's, from 0. Raises `RowError`."""
        try:
            return self.codes(row, tokens, spans(), self.number)
        except ConfigError as error:
            raise RowError(error.problems, self.key, self.name, repr(dict(row)), number) from error

    @property
    def fields(self) -> set[str]:
        """The columns that are read."""
        return {*self.codes.fields("row"), *([] if self.codes.token is None else [self.codes.token])}


def row_number(dataset: Any, number: int) -> int:
    """The number of a row where it was read, before its data set was shuffled or rows of it were dropped."""
    return number if dataset._indices is None else int(dataset._indices.column(0)[number].as_py())


def _listed(values: Any) -> Any:
    """An array or a tensor as a list; whatever else as it is."""
    if hasattr(values, "tolist") and not isinstance(values, np.generic):
        return values.tolist()
    return list(values) if isinstance(values, Sequence) and not isinstance(values, (str, bytes)) else values
