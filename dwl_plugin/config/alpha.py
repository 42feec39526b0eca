"""α: a number for each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dwl_plugin.errors import Problem, did_you_mean

__all__ = ["alpha_problems"]


def alpha_problems(path: str, alpha: object, names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with proportions, class by class."""
    if alpha is None:
        return
    if not isinstance(alpha, Mapping):
        return  # the schema says so already
    for name in alpha:
        if name not in names:
            yield Problem(f"{path}.{name}", "no such class", allowed=", ".join(names), hint=did_you_mean(name, names))
    missing = [name for name in names if name not in alpha]
    if missing:
        yield Problem(path, f"every class needs a number; missing: {', '.join(missing)}", hint="0 leaves a class out of the loss")
    numbers = {name: value for name, value in alpha.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}
    for name, value in numbers.items():
        if value < 0:
            yield Problem(f"{path}.{name}", "a weight cannot be negative", value, allowed="numbers from 0 up")
    if numbers and len(numbers) == len(alpha) and all(value == 0 for value in numbers.values()):
        yield Problem(path, "all weights are 0, so nothing would be trained", dict(alpha), hint="at least one must be above 0")
