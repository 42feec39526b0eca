"""`parse`: the only way in."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dwl_plugin.config.alpha import alpha_problems
from dwl_plugin.config.block import Block, DWLConfig, LossName
from dwl_plugin.config.classes import ClassConfig, class_of, name_problems
from dwl_plugin.config.controllers import ControllerOptions, controller_of, controller_problems
from dwl_plugin.config.packs import Shelf
from dwl_plugin.config.schedules import order_problems, schedule_of, vectors
from dwl_plugin.config.selectors import group_problems
from dwl_plugin.config.validate import one_of, unique, validate
from dwl_plugin.errors import ConfigError, Problem, did_you_mean
from dwl_plugin.loss.token_losses import SCHEDULED, TOKEN_LOSSES
from dwl_plugin.values import MOST_OVERLAPPING, REST

__all__ = ["parse"]

_KEYS = tuple(Block.model_fields)
_WITHOUT_CLASSES = {"token_loss", "focal", "eaft", "reduction"}
"""Keys of `dwl` that do something where no class is named."""

_KEYFRAMES = re.compile(r"(dwl|dft|dwl\.classes\.\w+\.dft)\.schedule\.at")
"""Where a key may be a number: a step. It becomes a string here, before the host sorts the keys of what it writes down."""
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")

MAX_DEPTH = 64
MAX_VALUES = 200_000
"""A list of keywords may be long; aliases make billions of values out of ten lines."""


def parse(raw: Mapping[str, Any], folder: Path | None = None) -> Block | None:
    """Validate `loss`, `dft` and `dwl` of a config, and put the classes of packs in their place.

    Args:
        raw: the config; other keys are not looked at.
        folder: where the config lies; a pack's relative path is looked up there, then in the working directory.

    Returns:
        None when the config has none of the three.

    Raises:
        ConfigError: every problem found.
    """
    ours = {key: raw[key] for key in _KEYS if key in raw and raw[key] is not None}
    if not ours:
        return None
    unfit = list(_unfit(ours))
    if unfit:
        raise ConfigError(unique(unfit))
    if "loss" not in ours:
        which = " and ".join(f"`{key}`" for key in ours)
        raise ConfigError(
            [
                Problem(
                    next(iter(ours)),
                    f"{which} without `loss` would change nothing",
                    allowed=one_of(LossName),
                    hint=f"add the line `loss: {'dwl' if 'dwl' in ours else 'dft'}`",
                )
            ]
        )
    problems = list(_yaml_traps(ours))
    dwl = ours.get("dwl")
    controller = None
    classes: dict[str, ClassConfig] = {}
    complete = True
    if isinstance(dwl, Mapping):
        shelf = Shelf(([] if folder is None else [folder]) + [Path()], with_losses=ours["loss"] == "dwl")
        try:
            dwl = shelf.with_pack(dwl)
        except ConfigError as error:
            problems += error.problems
            dwl, complete = {key: value for key, value in dwl.items() if key != "pack"}, False
        ours["dwl"] = dwl
        # The model of a class, schedule or controller is chosen by its key, here: a typo gives one error, not one per kind.
        chosen = dict(dwl)
        if isinstance(dwl.get("classes"), Mapping):
            built = {
                name: class_of(_with_dft_chosen(spec, f"dwl.classes.{name}.dft", problems), f"dwl.classes.{name}", problems)
                for name, spec in dwl["classes"].items()
            }
            chosen["classes"] = classes = {
                str(name): shelf.without_packs(model, f"dwl.classes.{name}", problems)
                for name, model in built.items()
                if model is not None
            }
        if dwl.get("schedule") is not None:
            chosen["schedule"] = schedule_of(dwl["schedule"], "dwl.schedule", problems)
        if dwl.get("controller") is not None:
            chosen["controller"] = controller = controller_of(dwl["controller"], "dwl.controller", problems)
        block = validate(Block, _with_dft_chosen({**ours, "dwl": chosen}, "dft", problems), "", problems)
    else:
        block = validate(Block, _with_dft_chosen(ours, "dft", problems), "", problems)
    problems += group_problems(classes)
    problems += _cross_checks(ours, controller, block if not problems else None, complete)
    if problems or block is None:
        raise ConfigError(unique(problems))
    return block


def _with_dft_chosen(holder: object, path: str, problems: list[Problem]) -> Any:
    """`holder` with the schedule of its `dft`, if it has one, as a model."""
    dft = holder.get("dft") if isinstance(holder, Mapping) else None
    if not isinstance(holder, Mapping) or not isinstance(dft, Mapping) or dft.get("schedule") is None:
        return holder
    return {**holder, "dft": {**dft, "schedule": schedule_of(dft["schedule"], f"{path}.schedule", problems)}}


def _unfit(ours: Mapping[str, Any]) -> Iterator[Problem]:
    """What the checks themselves could not take. It ends at the first thing that has no end."""
    left: list[tuple[str, Any, int]] = [(key, value, 1) for key, value in ours.items()]
    seen = 0
    while left:
        path, node, depth = left.pop()
        seen += 1
        top = path.partition(".")[0]
        if depth > MAX_DEPTH:
            yield Problem(top, f"nested more than {MAX_DEPTH} deep", hint="an alias of YAML (`*`) may stand inside itself")
            return
        if seen > MAX_VALUES:
            yield Problem(top, f"holds more than {MAX_VALUES:,} values", hint="aliases of YAML (`*`) may have multiplied them")
            return
        inside: list[tuple[Any, Any]] = []
        if isinstance(node, Mapping):
            inside = [(f".{key if isinstance(key, str) else '?'}", value) for key, value in node.items()]
            named = [*node]
        else:
            named = [node]
            if isinstance(node, (list, tuple)):
                inside = [(f"[{index}]", value) for index, value in enumerate(node)]
        for scalar in named:
            if isinstance(scalar, int) and not -(2**63) <= scalar < 2**63:
                yield Problem(path, "no number here is that large: it has more than 63 bits")
            elif isinstance(scalar, str) and _HALF_CHARACTER.search(scalar):
                yield Problem(path, "is no text: it has half of a character (a surrogate) in it", scalar)
        left += [(path + _HALF_CHARACTER.sub("?", step), value, depth + 1) for step, value in reversed(inside)]


def _yaml_traps(ours: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that YAML turned into something that is not a string."""

    def walk(node: Any, path: str) -> Iterator[Problem]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                if not isinstance(key, str) and not (_KEYFRAMES.fullmatch(path) and type(key) in (int, float)):
                    hint = (
                        "YAML reads yes, no, on, off as booleans: put the name in quotes"
                        if isinstance(key, bool)
                        else f"put it in quotes: `'{key}'`"
                    )
                    yield Problem(path, "a key has to be a string", key, hint=hint)
                yield from walk(value, f"{path}.{key}")
        elif isinstance(node, list):
            for index, value in enumerate(node):
                yield from walk(value, f"{path}[{index}]")

    for key, value in ours.items():
        yield from walk(value, key)


def _cross_checks(
    ours: Mapping[str, Any], controller: ControllerOptions | None, block: Block | None, complete: bool
) -> list[Problem]:
    """What no single field can see. Runs on the raw mapping too, so that one typo does not hide the other problems.

    `complete`: every class is known; without the pack's, a name may be one of its own.
    """
    problems: list[Problem] = []
    dwl = ours.get("dwl")
    if ours["loss"] == "dwl" and dwl is None:
        problems.append(Problem("dwl", "`loss: dwl` needs a `dwl` block", hint="name at least one class under `dwl.classes`"))
    if not isinstance(dwl, Mapping):
        dwl = {}
    classes = dwl.get("classes") if isinstance(dwl.get("classes"), Mapping) else {}
    assert isinstance(classes, Mapping)
    problems += name_problems(classes)
    names = [*(str(name) for name in classes if name != REST), REST]
    for path, proportions in [("dwl.alpha", dwl.get("alpha")), *vectors(dwl.get("schedule"), "dwl.schedule")]:
        also = [] if complete or not isinstance(proportions, Mapping) else proportions
        problems += alpha_problems(path, proportions, list(dict.fromkeys([*names, *also])))
    if ours["loss"] == "dwl" and dwl.get("classes") == {} and not dwl.keys() & _WITHOUT_CLASSES:
        problems.append(
            Problem("dwl.classes", "has no class in it, so this is plain cross-entropy", hint="name at least one class")
        )
    problems += order_problems(dwl.get("schedule"), "dwl.schedule")
    if dwl.get("schedule") is not None and dwl.get("controller") is not None:
        problems.append(
            Problem(
                "dwl.controller",
                "`dwl.schedule` moves α already; one of the two can",
                hint="delete `dwl.controller` or `dwl.schedule`",
            )
        )
    problems += _dft_problems(ours.get("dft"), "dft")
    for name, spec in classes.items():
        if isinstance(spec, Mapping):
            problems += _dft_problems(spec.get("dft"), f"dwl.classes.{name}.dft")
    if ours["loss"] == "dwl" and complete:
        problems += controller_problems(controller, "dwl.controller", dwl.get("alpha"), names)
    if ours["loss"] in ("nll", "dft"):
        for key in ("alpha", "schedule", "controller", "reduction", "token_loss", "focal", "eaft"):
            if dwl.get(key) is not None and not _is_default(key, dwl[key]):
                problems.append(
                    Problem(
                        f"dwl.{key}",
                        f"has no effect under `loss: {ours['loss']}`, where classes are only measured",
                        dwl[key],
                        hint="write `loss: dwl`, or delete this line",
                    )
                )
        for name, spec in classes.items():
            for key in ("token_loss", *TOKEN_LOSSES):
                if isinstance(spec, Mapping) and spec.get(key) is not None:
                    problems.append(
                        Problem(
                            f"dwl.classes.{name}.{key}",
                            f"has no effect under `loss: {ours['loss']}`",
                            spec[key],
                            hint="write `loss: dwl`, or delete this line",
                        )
                    )
    if block is not None:
        problems += _useless_options(block)
        problems += _too_many_classes(block)
    return problems


def _is_default(key: str, value: object) -> bool:
    return bool(value == DWLConfig.model_fields[key].default)


def _useless_options(block: Block) -> Iterator[Problem]:
    """Options of a token loss that nothing pays: the user believes in a loss that is not there."""
    default = block.dwl.token_loss if block.dwl is not None and block.loss == "dwl" else block.loss
    used = {default}
    for name, spec in block.class_configs.items():
        kind = spec.token_loss if spec.token_loss is not None else default
        used.add(kind)
        for option in TOKEN_LOSSES:
            if block.loss == "dwl" and getattr(spec, option) is not None and kind != option:
                yield Problem(
                    f"dwl.classes.{name}.{option}",
                    f"this class pays {kind}, so the options do nothing",
                    hint=f"add `token_loss: {option}` to the class, or delete `{option}`",
                )
    if block.dft is not None and "dft" not in used:
        yield Problem(
            "dft",
            "no token pays dft, so the options do nothing",
            hint="write `loss: dft`, or `dwl.token_loss: dft`, or delete `dft`",
        )
    for option in ("focal", "eaft"):
        if block.loss == "dwl" and getattr(block.dwl, option, None) is not None and option not in used:
            yield Problem(
                f"dwl.{option}",
                f"no token pays {option}, so the options do nothing",
                hint=f"write `token_loss: {option}`, or delete `{option}`",
            )


def _too_many_classes(block: Block) -> Iterator[Problem]:
    """Class ids under `overlap: sum` are the bits of an int64."""
    if block.overlap == "sum" and len(block.class_configs) > MOST_OVERLAPPING:
        yield Problem(
            "dwl.overlap",
            f"`sum` takes at most {MOST_OVERLAPPING} classes, and there are {len(block.class_configs)}",
            "sum",
            hint="write `overlap: first`, or join classes",
        )


def _dft_problems(dft: object, path: str) -> Iterator[Problem]:
    """What no single field of `dft` can see, from the mapping as it was written."""
    spec = dft.get("schedule") if isinstance(dft, Mapping) else None
    for where, numbers in vectors(spec, f"{path}.schedule"):
        if not isinstance(numbers, Mapping):
            continue  # the schema says so already
        if not numbers:
            yield Problem(where, "names nothing that moves", allowed=", ".join(SCHEDULED))
        for name, value in numbers.items():
            if name not in SCHEDULED:
                hint = did_you_mean(name, SCHEDULED)
                yield Problem(f"{where}.{name}", "not an option of dft that can move", allowed=", ".join(SCHEDULED), hint=hint)
            elif isinstance(value, (int, float)) and not 0 <= value <= (1 if name == "min_weight" else value):
                allowed = "numbers from 0 to 1" if name == "min_weight" else "numbers from 0 up"
                yield Problem(f"{where}.{name}", "out of range", value, allowed=allowed)
    yield from order_problems(spec, f"{path}.schedule")
