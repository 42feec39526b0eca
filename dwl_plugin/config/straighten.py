"""Mistakes of form whose remedy is certain: each is one `Problem`, and the rest of the config is read as if it were not there.

A list where a mapping belongs, a key one level too high or too low, another name of a loss: without this each of them drags along
what is wrong only because of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args

from dwl_plugin.classes.selectors import SELECTORS
from dwl_plugin.config.block import DWLConfig, LossName
from dwl_plugin.config.problems import to_write
from dwl_plugin.errors import Problem, closest
from dwl_plugin.loss.token_losses import NLL_NAMES, TOKEN_LOSSES
from dwl_plugin.values import Overlap, Reduction

__all__ = ["EXAMPLE", "straightened"]

_LOSSES = get_args(LossName)
EXAMPLE = {"classes": {"number": {"regex": r"\d+"}}}
"""A `dwl` block for a message."""

_BESIDE_CLASSES = tuple(key for key in DWLConfig.model_fields if key not in ("classes", "pack"))
_OF_CLASSES = ("alpha", "schedule", "controller")
"""What means nothing once nobody knows the classes."""


def straightened(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """A config put right where it is certain what was meant, and what was wrong there. `raw` stays as it is."""
    left, problems = dict(raw), list[Problem]()
    for step in (_loss, _above_dwl, _dwl, _above_or_below_classes, _classes, _dft):
        problems += step(left)
    return left, problems


def _loss(left: dict[str, Any]) -> Iterator[Problem]:
    loss = left.get("loss")
    if loss is None or loss in _LOSSES:
        return
    name, dwl = str(loss).strip().lower(), left.get("dwl")
    if name in NLL_NAMES and isinstance(dwl, Mapping) and dwl.get("alpha") is not None:
        meant, more = "dwl", ", whose `alpha` stands below; plain cross-entropy is `loss: nll`, without an `alpha`"
    elif name in NLL_NAMES:
        meant, more = "nll", ", which measures by class and trains as Axolotl does; without a `loss` dwl_plugin does nothing"
    elif name in TOKEN_LOSSES and name not in _LOSSES:
        meant, more = "dwl", f", and below it `dwl: {{token_loss: {name}}}`"
        left["dwl"] = dwl or {"token_loss": name}
    else:
        meant, more = closest(name, _LOSSES), ""
    yield Problem("loss", "not a known value", loss, ", ".join(_LOSSES), f"{to_write('loss', meant)}{more}" if meant else "")
    left["loss"] = meant or ("dwl" if "dwl" in left else "dft")


def _above_dwl(left: dict[str, Any]) -> Iterator[Problem]:
    """Options of `dwl` that stand beside it."""
    dwl = left.get("dwl")
    if (left.get("loss") is None and dwl is None) or not (dwl is None or isinstance(dwl, Mapping)):
        return
    inside = {} if dwl is None else dict(dwl)
    moved = {key: left[key] for key in DWLConfig.model_fields if key not in inside and _is_ours(key, left.get(key))}
    if not moved:
        return
    for key in moved:
        del left[key]
    left["dwl"] = inside | moved
    names, they = " and ".join(f"`{key}`" for key in moved), "it" if len(moved) == 1 else "them"
    hint = f"move {they} below `dwl`"
    if inside:
        hint += f", as far in as `{next(iter(inside))}`: {' and '.join(to_write(key, moved[key]) for key in moved)}"
    else:
        hint += f": {to_write('dwl', moved)}"
    yield Problem(next(iter(moved)), f"{names} at the top level: nothing reads {they} there", hint=hint)


def _is_ours(key: str, value: object) -> bool:
    """Whether a key of the top level can only be ours: another plugin may have one of the same name."""
    if key in ("reduction", "overlap"):
        return value in get_args(Reduction) + get_args(Overlap)
    return key in ("classes", *_OF_CLASSES) and isinstance(value, (Mapping, list)) and bool(value)


def _dwl(left: dict[str, Any]) -> Iterator[Problem]:
    dwl = left.get("dwl")
    if dwl is None or isinstance(dwl, Mapping):
        return
    hint = "" if left.get("loss") in (None, "dwl") else "; or delete it"
    yield Problem("dwl", "is a mapping, with `classes` below it", dwl, hint=f"{to_write('dwl', EXAMPLE)}{hint}")
    del left["dwl"]
    if left.get("loss") == "dwl":
        left["loss"] = "nll"


def _above_or_below_classes(left: dict[str, Any]) -> Iterator[Problem]:
    """`dft` inside `dwl`, and options of `dwl` among its classes."""
    dwl = left.get("dwl")
    if not isinstance(dwl, Mapping):
        return
    dwl = left["dwl"] = dict(dwl)
    if "dft" in dwl and left.get("dft") is None:
        left["dft"] = dwl.pop("dft")
        yield Problem("dwl.dft", "`dft` stands at the top level, beside `loss`", hint=to_write("dft", left["dft"]))
    if not isinstance(classes := dwl.get("classes"), Mapping):
        return
    for key in _BESIDE_CLASSES:
        value = classes.get(key)
        if key in dwl or value is None or (isinstance(value, Mapping) and set(value) & SELECTORS.keys()):
            continue
        if key in _OF_CLASSES or not isinstance(value, Mapping):
            dwl["classes"] = classes = {name: spec for name, spec in classes.items() if name != key}
            dwl[key] = value
            hint = f"move it to the left, beside `classes`: {to_write(key, value)}"
            yield Problem(f"dwl.classes.{key}", f"`{key}` stands among the classes, one level too deep", hint=hint)


def _classes(left: dict[str, Any]) -> Iterator[Problem]:
    dwl = left.get("dwl")
    if not isinstance(dwl, Mapping) or (classes := dwl.get("classes")) is None or isinstance(classes, Mapping):
        return
    meant = _by_name(classes)
    hint = f"leave the dashes out: {to_write('classes', meant)}" if meant else to_write("classes", EXAMPLE["classes"])
    yield Problem("dwl.classes", "is a mapping from names to selectors", classes, hint=hint)
    left["dwl"] = {**dwl, "classes": meant} if meant else {key: dwl[key] for key in dwl if key not in ("classes", *_OF_CLASSES)}


def _by_name(classes: object) -> dict[str, Any]:
    """The classes of a list in which each item has its name as its only key, or under `name`; {} where it is something else."""
    found = dict[str, Any]()
    for item in classes if isinstance(classes, (list, tuple)) else ():
        if not isinstance(item, Mapping):
            return {}
        if isinstance(name := item.get("name"), str):
            item = {name: {key: value for key, value in item.items() if key != "name"}}
        if found.keys() & item.keys() or not all(isinstance(spec, Mapping) for spec in item.values()):
            return {}
        found |= item
    return found


def _dft(left: dict[str, Any]) -> Iterator[Problem]:
    dft = left.get("dft")
    if dft is None or isinstance(dft, (Mapping, TOKEN_LOSSES["dft"].Options)):
        return
    if isinstance(dft, (int, float)) and not isinstance(dft, bool):
        left["dft"] = {"exponent": dft}
        yield Problem("dft", "is a mapping of options", dft, hint=to_write("dft", left["dft"]))
        return
    del left["dft"]
    alone = "delete this line: `loss: dft` is enough" if left.get("loss") == "dft" else "delete this line"
    if left.get("loss") is None and left.get("dwl") is None:
        left["loss"], alone = "dft", "write `loss: dft` in its place"
    yield Problem("dft", "is a mapping of options", dft, hint=f"{alone}; for another exponent {to_write('dft', {'exponent': 0.5})}")
