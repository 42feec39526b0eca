"""The values a YAML holds, checked one by one: steps, shares and epochs, weights, patterns, token ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any, Literal

import regex
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError, ValidationError

from dwl_plugin.errors import Problem, closest, did_you_mean

if TYPE_CHECKING:
    from pydantic import ModelWrapValidatorHandler
    from typing_extensions import Self

__all__ = [
    "FIRST_TARGET",
    "IGNORE_INDEX",
    "MOST_OVERLAPPING",
    "REST",
    "SAMPLE_POWERS",
    "Mark",
    "Overlap",
    "Pattern",
    "Position",
    "Reduction",
    "Share",
    "Strict",
    "Text",
    "TokenId",
    "Weight",
    "Word",
    "invalid",
    "line_error",
    "missing_or_unknown",
    "position",
]

IGNORE_INDEX = -100
"""The label of a position that is no target."""

FIRST_TARGET = 1 << 62
"""Added to the class id of the first target of each sample, so that samples can be counted in any layout of a batch."""

MOST_OVERLAPPING = 62
"""Classes that an integer below `FIRST_TARGET` has bits for."""

Overlap = Literal["first", "sum"]
"""`first`: a token is in the first class that matches. `sum`: in every class that matches."""

Reduction = Literal["token_mean", "weighted_mean", "class_mean", "sequence_mean_token_sum", "sample_mean", "sample_sqrt"]
"""How the losses of tokens become one number; the formulas are in `loss.reduction`."""

SAMPLE_POWERS: dict[Reduction, float] = {"sample_mean": 1.0, "sample_sqrt": 0.5}
"""The power of the number of its sample's targets by which a reduction divides each token."""

REST = "rest"
"""The class of every target token that no other class claims."""

_POSITION = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>%|ep)|(?P<step>\d+)")
_EXPONENT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
_DECIMAL = re.compile(r"[+-]?(\d{1,100}(\.\d{0,100})?|\.\d{1,100})")
_FRACTION = re.compile(r"\d*\.\d+")
_SHARE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(percent|per cent|pct|prozent)", re.IGNORECASE)
_TOKEN_ID = re.compile(r"(?P<first>\d+)(?:\s*-\s*(?P<last>\d+))?")
_PIECE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]?|\{(?P<least>\d+)(?:,\d*)?\}|.", re.DOTALL)

_MAX_PARTS = 100_000
"""Of a compiled pattern; ten times as many take a second and 400 MB."""


_NOTHING: Any = object()


def invalid(message: str, allowed: str = "", hint: str = "", write: Any = _NOTHING) -> PydanticCustomError:
    """What a validator raises: a `Problem` whose path and value pydantic knows; `write` is the value that belongs in its place."""
    context = {"allowed": allowed, "hint": hint}
    return PydanticCustomError("dwl", message, context if write is _NOTHING else {**context, "write": write})


def line_error(
    path: Sequence[int | str], message: str, value: object, allowed: str = "", hint: str = "", write: Any = _NOTHING
) -> InitErrorDetails:
    """An error at `path` below what a validator looks at, for `ValidationError.from_exception_data`."""
    return InitErrorDetails(type=invalid(message, allowed, hint, write), loc=tuple(path), input=value)


def missing_or_unknown(path: str, numbers: Mapping[Any, object], names: Sequence[str], hint: str = "") -> Iterator[Problem]:
    """Names of no class in numbers by class, then the classes without a number. `hint` is for the latter.

    A misspelt name is one mistake: the class that is meant is not missing too.
    """
    missing = [name for name in names if name not in numbers]
    for name in numbers:
        if name in names:
            continue
        meant = closest(name, missing)
        missing = [other for other in missing if other != meant]
        what = did_you_mean(name, [meant] if meant else names) or "name it under `classes`, or delete this number"
        yield Problem(f"{path}.{name}", "no such class", allowed=", ".join(names), hint=what)
    if missing:
        yield Problem(path, f"every class needs a number; missing: {', '.join(missing)}", hint=hint)


def _title(model: type) -> str:
    return model.__qualname__.replace(".", "")  # in a JSON Schema: that of `Linear.Options` is not just `Options`


class Strict(BaseModel):
    """Frozen and closed. An unknown key is reported with the known ones, beside what is wrong with the others."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, model_title_generator=_title)

    @classmethod
    def cross_errors(cls, written: Mapping[str, Any]) -> Iterable[InitErrorDetails]:
        """What no single field can see, in a mapping as it was written, whatever else is wrong with it."""
        return ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_errors(cls, written: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        cross = isinstance(written, Mapping) and getattr(info.context, "cross_checks", True)
        wrong = list(cls.cross_errors(written)) if cross else []
        try:
            model = handler(written)
        except ValidationError as error:
            wrong = [*map(cls._of_a_field, error.errors(include_url=False)), *wrong]
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return model

    @classmethod
    def _of_a_field(cls, item: ErrorDetails) -> InitErrorDetails:
        """pydantic's own error, to be raised again together with others."""
        if item["type"] == "extra_forbidden" and len(item["loc"]) == 1:
            known = [field.alias or name for name, field in cls.model_fields.items()]
            return line_error(item["loc"], "unknown key", item["input"], ", ".join(known), did_you_mean(item["loc"][0], known))
        error = PydanticCustomError(item["type"], item["msg"], item.get("ctx"))
        return InitErrorDetails(type=error, loc=item["loc"], input=item["input"])


def position(value: object) -> object:
    """A step (`200`), a share of the run (`10%`) or an epoch (`2ep`)."""
    if isinstance(value, bool):
        raise invalid("YAML read this as a boolean, not as a position")
    if isinstance(value, int):
        if value < 0:
            raise invalid("a step cannot be negative")
        return value
    if isinstance(value, float) or (isinstance(value, str) and _FRACTION.fullmatch(value.strip())):
        share = f"{float(value) * 100:g}%"
        raise invalid(f"is {value} a share of the run or a step?", write=share, hint="or a whole number of steps")
    match = _POSITION.fullmatch(str(value).strip())
    if match is None:
        number = _SHARE.fullmatch(str(value).strip())
        forms = "200 (a step), 10% (a share of the run), 2ep (epochs)"
        raise invalid("is not a position", forms, write=f"{number['number']}%") if number else invalid("is not a position", forms)
    if match["step"] is not None:
        return int(match["step"])
    if not isfinite(float(match["number"])):
        raise invalid("past the end of any run")
    if match["unit"] == "%" and float(match["number"]) > 100:
        raise invalid("past the end of the run: a share is at most `100%`", write="100%")
    return f"{Decimal(match['number']).normalize():f}{match['unit']}"


_POSITION_SCHEMA = {
    "anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\s*(\d+(\.\d+)?\s*(%|ep)|\d+)\s*$"}]
}

Position = Annotated[int | str, BeforeValidator(position), WithJsonSchema(_POSITION_SCHEMA)]


def _number(value: object) -> object:
    """A number; also one that YAML 1.1 takes for a text, because it has an exponent and no point: `1e-5`."""
    if isinstance(value, bool):
        raise invalid("YAML read this as a boolean; a number is needed")
    if isinstance(value, str) and not _EXPONENT.fullmatch(value):
        if not _DECIMAL.fullmatch(value):
            raise invalid("is a text, and a number is needed", write=1, hint="or another number")
        number = float(value) if "." in value else int(value)
        raise invalid("is a text, as it stands in quotes, and a number is needed", write=number)
    return value


Weight = Annotated[float, BeforeValidator(_number)]
Share = Annotated[float, Field(gt=0.0, le=1.0), BeforeValidator(_number)]
"""More than 0, at most 1. The bounds stand in front: behind the check the JSON Schema of `Share | None` would not have them."""


def _parts(pattern: str) -> int:
    """About how many parts a pattern has after the least number of each repetition is written out, as the compiler does."""
    groups, last = [0], 0  # parts of each open group; of what a repetition would repeat
    for piece in _PIECE.finditer(pattern):
        if piece[0] == "(":
            groups.append(0)
        elif piece[0] == ")" and len(groups) > 1:
            last = groups.pop()
            groups[-1] += last
        elif piece["least"]:
            last, before = last * max(int(piece["least"]), 1), last
            groups[-1] += last - before
        else:
            last = 1
            groups[-1] += 1
    return sum(groups)


def _pattern(value: object) -> object:
    if value is None:
        hint = "put a pattern with a `#` in single quotes, such as `'#### (.+)'`"
        raise invalid("the pattern is empty: an unquoted `#` starts a YAML comment", hint=hint)
    if isinstance(value, bool):
        raise invalid("YAML read this as a boolean; put the pattern in single quotes")
    if not isinstance(value, str):
        meant = f"[{', '.join(map(str, value))}]" if isinstance(value, (list, tuple)) else str(value)
        raise invalid("a pattern is a text, in single quotes", write=meant)
    if value == "":
        raise invalid("an empty pattern matches nothing")
    if "\b" in value:
        meant = value.replace("\b", "\\b")
        raise invalid("has a backspace in it, which is what YAML makes of `\\b` in double quotes: use single quotes", write=meant)
    if _parts(value) > _MAX_PARTS:
        raise invalid("too large: the compiler writes its repetitions out")
    try:
        regex.compile(value)
    except RecursionError:
        raise invalid("its groups are nested too deep") from None
    except regex.error as error:
        position = getattr(error, "pos", None)
        at = "" if position is None else f" at position {position}, before {value[position : position + 12]!r}"
        why = f"{getattr(error, 'msg', error)}{' at its end' if position == len(value) else at}"
        hint = "close what is open, or write a backslash before a character that is meant as it stands: `\\(`, `\\[`, `\\*`"
        raise invalid(f"this does not compile: {why}", hint=hint) from None
    return value


Pattern = Annotated[str, BeforeValidator(_pattern)]


def _text(value: object) -> object:
    if isinstance(value, bool):
        raise invalid("YAML reads yes, no, on, off, true and false as booleans: put it in quotes")
    if value is None or value == "":
        raise invalid("empty: an unquoted `#` starts a YAML comment, so put the text in quotes", hint="for example `'#'`")
    if isinstance(value, (int, float)):
        raise invalid("YAML read this as a number: put it in quotes")
    return value


Text = Annotated[str, BeforeValidator(_text)]


def _mark(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, (list, tuple)):
        raise invalid("is one mark", hint="for several write `any: [{marked: a}, {marked: b}]`, or a class for each")
    return _text(value)


Mark = Annotated[str, BeforeValidator(_mark), WithJsonSchema({"type": ["string", "integer"]})]


def _word(value: object) -> object:
    value = _text(value)
    if isinstance(value, str) and not regex.match(r"\w", value):
        raise invalid("a keyword begins with a letter, a digit or _; for other text use `regex`")
    return value


Word = Annotated[str, BeforeValidator(_word)]


def _token_id(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise invalid("a token id cannot be negative")
        return value
    match = _TOKEN_ID.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise invalid('a token id is a whole number (`11`) or a range with both ends in it (`"100-199"`)')
    if match["last"] is not None and int(match["last"]) < int(match["first"]):
        raise invalid("the range ends before it begins")
    return f"{match['first']}-{match['last']}" if match["last"] is not None else int(match["first"])


_TOKEN_ID_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"^\s*\d+(\s*-\s*\d+)?\s*$"}]}

TokenId = Annotated[int | str, BeforeValidator(_token_id), WithJsonSchema(_TOKEN_ID_SCHEMA)]
