"""pydantic's errors as `Problem`s: the path as the user wrote it, what is allowed, a "did you mean"."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dwl_plugin.errors import Problem, did_you_mean

__all__ = ["unique", "validate"]

_Model = TypeVar("_Model", bound=BaseModel)


def validate(model: type[_Model], raw: object, problems: list[Problem], context: object = None) -> _Model | None:
    """`model` of `raw`; what is wrong with it goes to `problems`."""
    try:
        return model.model_validate(raw, context=context)
    except ValidationError as error:
        problems += map(_problem, error.errors())
        return None


def _problem(item: Any) -> Problem:
    """One pydantic error as a `Problem`, with the location as the user wrote it."""
    path = ""
    for part in item["loc"]:
        if part != "[key]":  # of a mapping: the part before is the key itself
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    context = item.get("ctx", {})
    if item["type"] == "missing":
        return Problem(path, "is required")
    if item["type"] == "literal_error":
        allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        return Problem(path, "not a known value", item["input"], allowed, did_you_mean(item["input"], allowed.split(", ")))
    return Problem(path, item["msg"], item["input"], context.get("allowed", ""), context.get("hint", ""))


def unique(problems: list[Problem]) -> list[Problem]:
    """One problem per place: the schema and a cross-check may have seen the same thing."""
    first: dict[str, Problem] = {}
    for problem in problems:
        if not any(path.startswith(f"{problem.path}[") for path in first):  # a bad item empties its list: say one thing
            first.setdefault(problem.path, problem)
    return list(first.values())
