"""pydantic's errors as `Problem`s: the path as the user wrote it, what is allowed, a "did you mean"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from dwl_plugin.errors import Problem, did_you_mean

__all__ = ["one_of", "unique", "validate"]

_Model = TypeVar("_Model", bound=BaseModel)


def validate(model: type[_Model], raw: object, path: str, problems: list[Problem]) -> _Model | None:
    """`model` of `raw`; what is wrong with it goes to `problems`."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems += [_problem(item, model, path) for item in error.errors()]
        return None


def one_of(literal: Any) -> str:
    return ", ".join(map(str, get_args(literal)))


def _problem(item: Any, model: type[BaseModel], prefix: str) -> Problem:
    """One pydantic error as a `Problem`, with the location as the user wrote it."""
    path = prefix
    for part in item["loc"]:
        if part == "[key]":  # of a mapping: the part before is the key itself
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    hint, allowed = "", ""
    if item["type"] == "missing":
        return Problem(path, "is required")
    if item["type"] == "extra_forbidden":
        known = [field.alias or name for name, field in _owner(model, item["loc"][:-1]).model_fields.items()]
        return Problem(path, "unknown key", item["input"], ", ".join(known), did_you_mean(item["loc"][-1], known))
    if item["type"] == "literal_error":
        allowed = str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ")
        return Problem(path, "not a known value", item["input"], allowed, did_you_mean(item["input"], allowed.split(", ")))
    return Problem(path, item["msg"], item["input"], allowed, hint)


def _owner(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """The model that `location` leads to, as far as it leads through fields that are models themselves."""
    for part in location:
        annotation = model.model_fields[str(part)].annotation if part in model.model_fields else None
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), model)
    return model


def unique(problems: list[Problem]) -> list[Problem]:
    """One problem per place: the schema and a cross-check may have seen the same thing."""
    first: dict[str, Problem] = {}
    for problem in problems:
        if not any(path.startswith(f"{problem.path}[") for path in first):  # a bad item empties its list: say one thing
            first.setdefault(problem.path, problem)
    return list(first.values())
