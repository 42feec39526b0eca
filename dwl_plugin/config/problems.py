"""What is wrong with a config as `Problem`s: pydantic's errors with the path as the user wrote it, and numbers by class."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dwl_plugin.errors import ConfigError, Problem, did_you_mean
from dwl_plugin.values import missing_or_unknown

__all__ = ["alpha_problems", "collected", "nodes", "shown_key", "unfit", "unique", "validate"]

_Model = TypeVar("_Model", bound=BaseModel)

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


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


@contextmanager
def collected(problems: list[Problem]) -> Iterator[None]:
    """Put the problems of a `ConfigError` raised inside into a list, and go on."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def nodes(node: Any, path: str, shown: Callable[[Any], str] = str, depth: int = 1) -> Iterator[tuple[str, Any, int]]:
    """Yield everything in a YAML value, each with its path and depth; without end where a list holds itself."""
    yield path, node, depth
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from nodes(value, f"{path}.{shown(key)}", shown, depth + 1)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from nodes(value, f"{path}[{index}]", shown, depth + 1)


def shown_key(key: object) -> str:
    """A key in a path, before it is known to be one that can be printed."""
    return _HALF_CHARACTER.sub("?", key) if isinstance(key, str) else "?"


def unfit(path: str, node: object) -> Iterator[Problem]:
    """What no check could take, among the keys of a mapping or in a value alone."""
    for scalar in node if isinstance(node, Mapping) else [node]:
        if isinstance(scalar, int) and not -(2**63) <= scalar < 2**63:
            yield Problem(path, "no number here is that large: it has more than 63 bits")
        elif isinstance(scalar, str) and _HALF_CHARACTER.search(scalar):
            yield Problem(path, "is no text: it has half of a character (a surrogate) in it", scalar)


def unique(problems: list[Problem]) -> list[Problem]:
    """One problem per place: the schema and a cross-check may have seen the same thing."""
    first: dict[str, Problem] = {}
    for problem in problems:
        if not any(path.startswith(f"{problem.path}[") for path in first):  # a bad item empties its list: say one thing
            first.setdefault(problem.path, problem)
    return list(first.values())


def alpha_problems(path: str, alpha: object, names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with proportions, class by class."""
    if not isinstance(alpha, Mapping):
        return  # absent, or the schema says so already
    yield from missing_or_unknown(path, alpha, names, hint="0 leaves a class out of the loss")
    numbers = {name: value for name, value in alpha.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    for name, value in numbers.items():
        if value < 0:
            yield Problem(f"{path}.{name}", "a weight cannot be negative", value, allowed="numbers from 0 up")
    if numbers and len(numbers) == len(alpha) and all(value == 0 for value in numbers.values()):
        yield Problem(path, "all weights are 0, so nothing would be trained", dict(alpha), hint="at least one must be above 0")
