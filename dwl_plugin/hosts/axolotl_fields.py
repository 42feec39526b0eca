"""What rows of the data say beside their text, read before Axolotl makes tokens of them: weights that it drops or makes 1 of,
values that are no factors, marks that no class asks for.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeGuard

from dwl_plugin.config.block import USUAL_NAMES, Block, DataWeights
from dwl_plugin.errors import ConfigError, Problem, shortened
from dwl_plugin.hosts.instead import instead
from dwl_plugin.run.dataset_check import SURVEY_ROWS, picked_rows
from dwl_plugin.run.row_codes import MARK, Level, RowCodes, RowError, row_number

__all__ = ["DroppedWeight", "NumberedRow", "dropped_weights", "not_finite", "numbered", "unnamed_marks", "watching", "wrong_values"]

NumberedRow = tuple[int | None, Mapping[str, Any]]
"""A row as the data has it, and which it is, from 0; None in a stream that is shuffled."""

_Place = Level | Literal["token", "masked", "unmasked"]
"""`masked`: of a message that is not trained; `unmasked`: of a part, and the host trains the message because it is there."""

_WEIGHT, _TOKEN_WEIGHT = USUAL_NAMES["row"], USUAL_NAMES["token"]
_CONVERSATIONS = ("messages", "conversations")
_TEXTS = ("content", "value", "reasoning_content")
_ROLES = {"human": "user", "gpt": "assistant"}
_MOST_PROBLEMS = 20
_BEGINNING = 4096
_NOT_FINITE = re.compile(rb"\b(?:NaN|Infinity)\b")


def numbered(dataset: Any, numbers: Sequence[int]) -> list[NumberedRow]:
    """These rows, each with its number where it was read."""
    return [(row_number(dataset, number), row) for number, row in zip(numbers, dataset.select(numbers), strict=True)]


class _Said(NamedTuple):
    """A row, a message or a part as the data has it, and where in the row it is."""

    level: Level
    at: str
    said: Mapping[str, Any]


def _said_in(row: Mapping[str, Any], source: Any) -> Iterator[_Said]:
    """The row, its messages and their parts, or its segments; `source` is the host's entry for the data set."""
    yield _Said("row", "", row)
    mapped = source.get("message_property_mappings") or {}
    texts = {*_TEXTS, mapped.get("content"), source.get("template_thinking_key")}
    for name in dict.fromkeys((source.get("field_messages"), *_CONVERSATIONS)):
        for index, message in enumerate(_mappings(row.get(name))):
            yield _Said("message", f"{name}[{index}]", message)
            for field in message:
                if field in texts:
                    for number, part in enumerate(_mappings(message[field])):
                        yield _Said("part", f"{name}[{index}].{field}[{number}]", part)
    if source.get("type") == "input_output":
        for number, segment in enumerate(_mappings(row.get("segments"))):
            yield _Said("part", f"segments[{number}]", segment)


def _mappings(value: Any) -> list[Mapping[str, Any]]:
    """A list of mappings, also where it is written as JSON; nothing where it is something else."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    return value if isinstance(value, list) and all(isinstance(item, Mapping) for item in value) else []


def _which(number: int | None) -> str:
    return "a row" if number is None else f"row {number + 1:,}"


class DroppedWeight(NamedTuple):
    """The first weight of a level, in one data set, that changes nothing in training."""

    level: _Place
    path: str
    row: int | None
    at: str
    value: float
    rows: int
    looked_at: int

    @property
    def is_certain(self) -> bool:
        """Whether it is meant for training; a column of the rows may be of anything."""
        return self.level not in ("row", "token")

    def sentence(self, weights: DataWeights | None, has_loss: bool) -> str:
        """What becomes of it, and the line to write; `weights` are those that the config reads."""
        name = _TOKEN_WEIGHT if self.level == "token" else _WEIGHT
        where = ", ".join(filter(None, (self.path, _which(self.row), self.at)))
        what = f"`{name}: {self.value:g}`" if self.level != "token" else f"`{name}` with {self.value:g} in it"
        line = "`dwl: {data_weights: true}`" if weights is None else f"`{self.level}: {name}` under `dwl.data_weights`"
        line = line if has_loss else f"`loss: nll` and {line}"
        fate = {
            "part": f"Axolotl trains {what} as 1",
            "message": f"Axolotl drops {what}, and the message counts 1",
            "row": f"Axolotl drops {what}",
            "token": f"Axolotl drops {what}",
            "masked": f"{what} changes nothing, as messages of this role are not trained",
            "unmasked": f"{what} makes Axolotl train the message and its end, though its role is not trained",
        }[self.level]
        whose = "each token" if self.level == "token" else "the row"
        meant = f"write {line} to make it count" if self.is_certain else f"if it says what {whose} counts, write {line}"
        if self.level == "masked":
            meant = "add the role to `roles_to_train`, or delete it"
        if self.level == "unmasked":
            meant = "to keep it masked, give the field another name, which `dwl: {data_weights: {part: …}}` reads"
        return f"{where}: {fate}; {meant} (so in {self.rows:,} of the {self.looked_at:,} rows looked at)"


def dropped_weights(
    rows: Sequence[NumberedRow], source: Any, weights: DataWeights | None, trains_inputs: bool = False
) -> list[DroppedWeight]:
    """Numbers called `weight` and `token_weight` in rows of one data set that neither the host nor `weights` looks at, or that the
    host makes 1 of, or that stand where the role is not trained; one for each level. What the host takes for a switch, 0 or 1, is
    none, and neither is a column of ones. `trains_inputs`: whether every role is trained."""
    read = {} if weights is None else weights.names
    first: dict[_Place, tuple[int | None, str, float]] = {}
    counts: dict[_Place, int] = {}
    for number, row in rows:
        here: dict[_Place, tuple[int | None, str, float]] = {}
        for level, at, value in _weights_in(row, source, trains_inputs):
            if level not in read and math.isfinite(value):
                here.setdefault(level, (number, at, value))
        first = here | first
        for level in here:
            counts[level] = counts.get(level, 0) + 1
    return [DroppedWeight(level, str(source["path"]), *found, counts[level], len(rows)) for level, found in first.items()]


def _weights_in(row: Mapping[str, Any], source: Any, trains_inputs: bool) -> Iterator[tuple[_Place, str, float]]:
    is_switch, is_masked = source.get("message_field_training") == _WEIGHT, False
    for level, at, said in _said_in(row, source):
        value = said.get(_WEIGHT)
        is_segment = at.startswith("segments")
        if level == "message":
            is_masked = not (trains_inputs or _is_trained(said, source))
        if not _is_number(value):
            continue
        if level == "part" and not is_segment and is_masked:
            yield "unmasked", at, value
        if value == 1 or (is_segment and not said.get("label")):
            continue
        if level == "message" and is_masked:
            if value != 0:
                yield "masked", at, value
        elif value != 0 or level == "row" or is_segment or not (level == "part" or is_switch):
            yield level, at, value
    numbers = row.get(_TOKEN_WEIGHT)
    if isinstance(numbers, list) and numbers and all(map(_is_number, numbers)):
        for number in numbers:
            if number != 1:
                yield "token", "", number


def _is_trained(message: Mapping[str, Any], source: Any) -> bool:
    """Whether the host trains a message by its role, or it says itself whether it is."""
    if any(message.get(source.get(f"message_field_{field}")) is not None for field in ("training", "training_detail")):
        return True
    names = {own: role for role, all_own in (source.get("roles") or {}).items() for own in all_own} or _ROLES
    role = message.get((source.get("message_property_mappings") or {}).get("role", "role"), message.get("from"))
    trained = source.get("roles_to_train")
    trained = ("assistant",) if trained is None else trained
    return names.get(role, role) in {names.get(own, own) for own in trained}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def wrong_values(rows: Sequence[NumberedRow], source: Any, codes: RowCodes, key: str = "datasets") -> list[Problem]:
    """What of rows is no factor or no mark where `codes` looks for one: each by its row and field, and the rest by their number."""
    problems: list[Problem] = []
    for number, row in rows:
        problems += RowError(_wrong_in(row, source, codes), key, source["path"], repr(dict(row)), number).problems
    if len(problems) > _MOST_PROBLEMS + 1:
        more = f"{len(problems) - _MOST_PROBLEMS:,} more such values in the {len(rows):,} rows of {source['path']} looked at"
        problems[_MOST_PROBLEMS:] = [Problem(key, more)]
    return problems


def _wrong_in(row: Mapping[str, Any], source: Any, codes: RowCodes) -> Iterator[Problem]:
    is_tokenised = "input_ids" in row
    for level, at, said in _said_in(row, source):
        try:
            if level != "row":
                codes.factor(said, level, at)
                codes.bits(said, at)
            else:
                known = row if is_tokenised else {name: value for name, value in row.items() if name != codes.token}
                codes(known, len(row["input_ids"]) if is_tokenised else 0)
        except ConfigError as error:
            yield from error.problems


def not_finite(cfg: Any, block: Block | None) -> list[Problem]:
    """Factors that JSON files of this disk call NaN or Infinity: what reads them makes null of these, and null says nothing."""
    if block is None or block.data_weights is None:
        return []
    codes, problems = RowCodes.of(block), list[Problem]()
    for key in ("datasets", "pretraining_dataset", "test_datasets"):
        entries = cfg.get(key) or ()
        for source in entries if isinstance(entries, (list, tuple)) else ():
            for file in _json_files(source):
                path = source["path"] if file == Path(str(source["path"])) else str(file)
                problems += wrong_values(list(_rows_with_constants(file)), {**source, "path": path}, codes, key)
    return problems


def _json_files(source: Mapping[str, Any]) -> Iterator[Path]:
    named = source.get("data_files") or ()
    inside = [named] if isinstance(named, str) else named
    folder = Path(str(source["path"]))  # or the name of a format
    for path in (folder, *(base / str(name) for name in inside for base in (folder, Path()))):
        for file in sorted(path.iterdir()) if path.is_dir() and not inside else [path]:
            if ({".json", ".jsonl"} & {*file.suffixes} or source.get("ds_type") == "json") and file.is_file():
                yield file


def _rows_with_constants(file: Path) -> Iterator[NumberedRow]:
    """The rows of a file in which a number may be none."""
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    # A file that cannot be read is told by others.
    with suppress(ValueError, OSError), LocalFileSystem().open(str(file), "rb", compression="infer") as lines:
        is_list = lines.read(_BEGINNING).lstrip().startswith(b"[")
        lines.seek(0)
        if is_list:
            whole = lines.read()
            yield from enumerate(json.loads(whole)) if _NOT_FINITE.search(whole) else ()
            return
        for number, line in enumerate(filter(bytes.strip, lines)):
            if _NOT_FINITE.search(line):
                yield number, json.loads(line)


def unnamed_marks(rows: Iterable[NumberedRow], source: Any, named: Sequence[str]) -> Iterator[str]:
    """A sentence for each mark in the rows that no class asks for, with the first row that has it."""
    told = set(named)
    for number, row in rows:
        for _, _, said in _said_in(row, source):
            marks = said.get(MARK)
            for mark in marks if isinstance(marks, list) else [marks]:
                if isinstance(mark, (str, int)) and not isinstance(mark, bool) and mark != "" and str(mark) not in told:
                    told.add(str(mark))
                    yield f"{source['path']}, {_which(number)}: no class is `marked: {shortened(str(mark))[1:-1]}`"


@contextmanager
def watching(see: Callable[[Sequence[NumberedRow], Any], None]) -> Iterator[None]:
    """While entered, `see` is shown rows of each data set, and its entry in the config, before the host makes tokens of them."""
    from axolotl.utils.data import sft

    tokenise = sft.get_dataset_wrapper

    def show_and_tokenise(*, dataset_config: Any, dataset: Any, **how: Any) -> Any:
        see(_some_of(dataset), dataset_config)
        return tokenise(dataset_config=dataset_config, dataset=dataset, **how)

    with instead(sft, "get_dataset_wrapper", show_and_tokenise):
        yield


def _some_of(dataset: Any) -> list[NumberedRow]:
    if not hasattr(dataset, "select"):
        return [*enumerate(islice(dataset, SURVEY_ROWS))]
    return numbered(dataset, picked_rows(len(dataset), 0, SURVEY_ROWS))
