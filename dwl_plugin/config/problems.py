"""What is wrong with a config as `Problem`s: pydantic's errors with the path as the user wrote it, and numbers by class."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dwl_plugin.errors import ConfigError, Problem, closest
from dwl_plugin.values import missing_or_unknown
from dwl_plugin.yaml_text import as_flow

__all__ = ["alpha_problems", "collected", "nodes", "shown_key", "to_write", "unfit", "unique", "validate"]

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
    context, kind, given = item.get("ctx", {}), item["type"], item["input"]
    if kind == "missing":
        return Problem(path, "is required")
    if kind == "literal_error":
        allowed = str(context["expected"]).replace("'", "").replace(" or ", ", ")
        meant = _USUAL.get(path.rpartition(".")[2], {}).get(str(given)) or closest(given, allowed.split(", "))
        return Problem(path, "not a known value", given, allowed, to_write(path, meant) if meant else "")
    if kind in ("tuple_type", "list_type"):
        return Problem(path, "is a list", given, hint=to_write(path, [given]) if isinstance(given, (str, int)) else "")
    if kind in _OTHERWISE:
        return Problem(path, _OTHERWISE[kind], given)
    hints = [to_write(path, context["write"])] if "write" in context else []
    hints += [context["hint"]] if context.get("hint") else []
    message = str(item["msg"]).replace("Input should be", "has to be")
    return Problem(path, message, given, context.get("allowed", ""), "; ".join(hints))


_USUAL = {"reduction": {"mean": "token_mean", "sum": "sequence_mean_token_sum"}}
"""What other libraries call a value, by the key."""

_OTHERWISE = {
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type", "mapping_type"), "is a mapping, with keys below it"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "has to be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "has to be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "has to be `true` or `false`"),
    "string_type": "is a text: put it in quotes",
}
"""pydantic's errors in words of a YAML."""

_LONGEST_LINE = 300


def to_write(path: str, value: object) -> str:
    """The hint with the line that belongs at `path`; "" where it would be too long to be read."""
    key = path.rpartition(".")[2]
    line = f"- {as_flow(value)}" if key.endswith("]") else f"{key}: {as_flow(value)}"
    return f"write `{line}`" if len(line) <= _LONGEST_LINE else ""


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
    if alpha is None:
        return
    if not isinstance(alpha, Mapping):
        hint = to_write(path, in_order(alpha, names))
        yield Problem(path, "is a mapping from each class to its number", alpha, hint=hint)
        return
    given = {name: alpha.get(name, 1) for name in names}
    yield from missing_or_unknown(path, alpha, names, hint=f"{to_write(path, given)}; 0 leaves a class out of the loss")
    numbers = {name: value for name, value in alpha.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    for name, value in numbers.items():
        if value < 0:
            hint = f"{to_write(f'{path}.{name}', 0)} to leave the class out of the loss"
            yield Problem(f"{path}.{name}", "a weight cannot be negative", value, allowed="numbers from 0 up", hint=hint)
    if numbers and len(numbers) == len(alpha) and all(value == 0 for value in numbers.values()):
        yield Problem(path, "all weights are 0, so nothing would be trained", dict(alpha), hint="at least one must be above 0")


def in_order(numbers: object, names: Sequence[str]) -> dict[str, Any]:
    """Numbers by name, made of what somebody wrote for that; each class counts 1 where it is not to be told."""
    if isinstance(numbers, (list, tuple)):
        if len(numbers) == len(names) and all(isinstance(number, (int, float)) for number in numbers):
            return dict(zip(names, numbers, strict=True))
        merged = {key: value for item in numbers if isinstance(item, Mapping) for key, value in item.items()}
        if set(merged) == set(names):
            return merged
    return dict.fromkeys(names, 1)
