"""What is left of a block with errors, so that one mistake does not hide the next."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dwl_plugin.config.block import Block
from dwl_plugin.config.classes import name_problems
from dwl_plugin.config.parse import parse
from dwl_plugin.config.straighten import straightened
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.loss.token_losses import TOKEN_LOSSES

__all__ = ["salvage"]

_CLASSES = "dwl.classes"
_STAND_IN = {"of_the_pack": {"regex": "."}}
"""For a pack that is not to be looked into: what else is in the block can be checked."""
_ALONE = ("loss", "dwl.reduction", "dwl.token_loss")
"""What is wrong here is wrong whatever the classes are."""


def salvage(
    raw: Mapping[str, Any], leave_out: Collection[str] = (), folder: Path | None = None
) -> tuple[Block | None, list[Problem]]:
    """The block of the classes that parse, and every problem with the others.

    Once a class is missing, what refers to the classes goes too: the block is good for looking at classes, not for training.

    Args:
        raw: a config; other keys than ours are not looked at.
        leave_out: YAML paths that are dropped before parsing, in silence.
        folder: where the config lies, for the packs beside it.

    Returns:
        None as the block where nothing of ours is left.
    """
    straight, problems = straightened(raw)
    ours, paths = {key: straight[key] for key in Block.model_fields if straight.get(key) is not None}, list(leave_out)
    whole = not paths
    for _ in range(2):
        left = _without(ours, paths) if paths else ours
        no_pack = any(path.partition("[")[0] == "dwl.pack" for path in leave_out)
        if no_pack and isinstance(ours.get("dwl"), Mapping) and "dwl" not in left:
            keys = {key: value for key, value in ours["dwl"].items() if key != "pack" and f"dwl.{key}" not in paths}
            left = {**ours, "dwl": {**keys, "classes": _STAND_IN}}
        try:
            return parse(left, folder), problems
        except ConfigError as error:
            # Once something is missing, only what is said of a single class is certain to be the user's own mistake.
            problems += [problem for problem in error.problems if whole or _is_certain(problem)]
            paths += [problem.path for problem in error.problems]
            whole = False
    return None, problems


def _is_certain(problem: Problem) -> bool:
    return problem.path.startswith(f"{_CLASSES}.") or problem.path in _ALONE or problem.message == "unknown key"


def _without(ours: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Drop what the paths lead to; with a class goes what names all classes."""
    parts = [path.replace("[", ".").split(".") for path in paths]
    left = {key: value for key, value in ours.items() if key != "dwl" and key not in (part[0] for part in parts)}
    dwl = ours.get("dwl")
    if isinstance(dwl, Mapping):
        gone = {part[1] for part in parts if part[0] == "dwl" and len(part) > 1} - {"classes"}
        if isinstance(classes := dwl.get("classes"), Mapping):
            bad = {part[2] for part in parts if part[:2] == ["dwl", "classes"] and len(part) > 2}
            bad |= {name for name in classes if not isinstance(name, str) or list(name_problems([name]))}
            if bad & classes.keys():
                gone |= {"alpha", "schedule", "controller", *TOKEN_LOSSES}
                left.pop("dft", None)
            dwl = {**dwl, "classes": {name: spec for name, spec in classes.items() if name not in bad}}
        dwl = {key: value for key, value in dwl.items() if key not in gone}
        if dwl.get("classes") or "pack" in dwl or dwl.get("data_weights"):
            left["dwl"] = dwl
    if left.get("loss") == "dwl" and "dwl" not in left:
        return {}
    return {"loss": "dwl" if "dwl" in left else "dft", **left}
