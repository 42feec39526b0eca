"""What is left of a block with errors, so that one mistake does not hide the next."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dwl_plugin.config.block import Block
from dwl_plugin.config.parsing import parse
from dwl_plugin.errors import ConfigError, Problem

__all__ = ["salvage"]

_ROUNDS = 8
_CLASSES = "dwl.classes"


def salvage(
    raw: Mapping[str, Any], leave_out: Iterable[str] = (), folder: Path | None = None
) -> tuple[Block | None, list[Problem]]:
    """The block of the classes that parse, and every problem with the others.

    Where anything had to go, α and how it moves go too: they are about classes that are no longer there. The block is then good
    for looking at classes, not for training.

    Args:
        raw: a config; other keys than ours are not looked at.
        leave_out: YAML paths that are dropped before parsing, in silence.
        folder: where the config lies, for the packs beside it.

    Returns:
        None as the block where nothing of ours is left.
    """
    ours: dict[str, Any] | None = {key: copy.deepcopy(raw[key]) for key in Block.model_fields if raw.get(key) is not None}
    paths = list(leave_out)
    if paths and ours is not None:
        ours = _without(ours, [Problem(path, "") for path in paths])
    problems: dict[str, Problem] = {}
    whole = not paths
    for _ in range(_ROUNDS):
        if not ours:
            break
        try:
            return parse(ours, folder), list(problems.values())
        except ConfigError as error:
            # Once something is missing, only what is said of a single class is certain to be the user's own mistake.
            for problem in error.problems if whole else [p for p in error.problems if _class_of(p, ours)]:
                problems.setdefault(problem.path, problem)
            if "loss" not in ours:
                ours["loss"] = "dwl" if "dwl" in ours else "dft"
                continue
            whole, ours = False, _without(ours, error.problems)
    return None, list(problems.values())


def _without(ours: dict[str, Any], problems: Iterable[Problem]) -> dict[str, Any] | None:
    """`ours` less what the problems are about; None where that leaves nothing to look at."""
    dwl, classes_went = ours.get("dwl"), False
    for problem in problems:
        key, _, rest = problem.path.partition(".")
        if key == "loss":
            ours["loss"] = "dwl" if dwl is not None else "dft"
        elif key != "dwl":
            ours.pop(key.partition("[")[0], None)
        elif not isinstance(dwl, dict) or not rest:
            return None
        elif problem.path.startswith(_CLASSES) and isinstance(dwl.get("classes"), dict):
            classes_went = True
            name = _class_of(problem, ours)
            if name is not None:
                dwl["classes"].pop(name, None)
            else:
                _drop_named(dwl["classes"], problem)
        else:
            dwl.pop(rest.partition(".")[0].partition("[")[0], None)
    if isinstance(dwl, dict):
        if classes_went:
            for key in set(dwl) & {"alpha", "schedule", "controller"}:
                del dwl[key]
            ours.pop("dft", None)
        if not dwl.get("classes") and "pack" not in dwl:
            return None if ours["loss"] == "dwl" else {key: value for key, value in ours.items() if key != "dwl"}
    return ours


def _class_of(problem: Problem, ours: Mapping[str, Any]) -> str | None:
    """The class that a problem is about."""
    classes = ours.get("dwl", {}).get("classes") if isinstance(ours.get("dwl"), Mapping) else None
    rest = problem.path.removeprefix(f"{_CLASSES}.")
    if rest == problem.path or not isinstance(classes, Mapping):
        return None
    named = [str(name) for name in classes if rest == str(name) or rest.startswith((f"{name}.", f"{name}["))]
    return max(named, key=len, default=None)


def _drop_named(classes: dict[Any, Any], problem: Problem) -> None:
    """The names that a problem with the mapping itself is about; all of them if it does not say which."""
    bad = [name for name in classes if name == problem.value or not isinstance(name, str)]
    for name in bad or list(classes):
        del classes[name]
