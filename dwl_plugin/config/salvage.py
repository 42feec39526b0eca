"""What is left of a block with errors, so that one mistake does not hide the next."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dwl_plugin.config.block import Block
from dwl_plugin.config.classes import name_problems
from dwl_plugin.config.parse import parse
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.loss.token_losses import TOKEN_LOSSES

__all__ = ["salvage"]

_CLASSES = "dwl.classes"


def salvage(
    raw: Mapping[str, Any], leave_out: Iterable[str] = (), folder: Path | None = None
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
    ours, paths = {key: raw[key] for key in Block.model_fields if raw.get(key) is not None}, list(leave_out)
    problems: list[Problem] = []
    whole = not paths
    for _ in range(2):
        left = _without(ours, paths) if paths else ours
        try:
            return parse(left, folder), problems
        except ConfigError as error:
            # Once something is missing, only what is said of a single class is certain to be the user's own mistake.
            problems += [problem for problem in error.problems if whole or problem.path.startswith(f"{_CLASSES}.")]
            paths += [problem.path for problem in error.problems]
            whole = False
    return None, problems


def _without(ours: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """Drop the keys and the classes that the paths lead to; with a class goes what names all classes."""
    lead_to = [path.replace("[", ".").split(".") for path in paths]
    gone = {at[0] for at in lead_to} - {"dwl"}
    dwl, loss = ours.get("dwl"), ours.get("loss")
    if isinstance(dwl, Mapping):
        bad, classes = {at[1] for at in lead_to if at[0] == "dwl" and len(at) > 1}, dwl.get("classes")
        if isinstance(classes, Mapping):
            bad_names = {at[2] for at in lead_to if at[:2] == ["dwl", "classes"] and len(at) > 2}
            good = {name: spec for name, spec in classes.items() if isinstance(name, str) and _is_good(name, bad_names)}
            if len(good) < len(classes):
                bad, gone = bad | {"alpha", "schedule", "controller", *TOKEN_LOSSES}, gone | {"dft"}
            dwl = {**dwl, "classes": good}
            bad.discard("classes")
        dwl = {key: value for key, value in dwl.items() if key not in bad}
        if not dwl.get("classes") and "pack" not in dwl:
            dwl = None
    left = {"loss": loss, "dft": ours.get("dft"), "dwl": dwl}
    if loss is None or "loss" in gone:
        left["loss"] = "dft" if dwl is None else "dwl"
    elif dwl is None and loss == "dwl":
        return {}
    return {key: value for key, value in left.items() if value is not None and (key == "loss" or key not in gone)}


def _is_good(name: str, bad: set[str]) -> bool:
    return name not in bad and not list(name_problems({name: None}))
