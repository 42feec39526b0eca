"""`parse`: the only way in. One validation, then what no single field can see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, get_args

from dwl_plugin.alpha.controllers import controller_problems
from dwl_plugin.alpha.schedules import required_vectors, vectors
from dwl_plugin.classes.data_codes import CLASS_BITS, MOST_MARKS
from dwl_plugin.classes.selectors import Context
from dwl_plugin.config.block import Block, DWLConfig, LossName
from dwl_plugin.config.classes import name_problems
from dwl_plugin.config.packs import PackLibrary
from dwl_plugin.config.problems import alpha_problems, collected, nodes, shown_key, to_write, unfit, unique, validate
from dwl_plugin.config.straighten import EXAMPLE, straightened
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.loss.token_losses import TOKEN_LOSSES, DFTConfig, TokenLossOptions
from dwl_plugin.values import MOST_OVERLAPPING, REST
from dwl_plugin.yaml_io import read_yaml

__all__ = ["parse", "read_block"]

_LOSSES = ", ".join(get_args(LossName))
_OPTIONS = tuple(name for name in TOKEN_LOSSES if name in DWLConfig.model_fields)
"""Keys of `dwl` that are the options of a token loss; those of dft stand above it."""

_KEYFRAMES = re.compile(r"(dwl|dft|dwl\.classes\.\w+\.dft)\.schedule\.at")
"""Where a key may be a number: a step. It becomes a string before the host sorts the keys of what it writes down."""

_MAX_DEPTH = 64
_MAX_VALUES = 200_000
"""A list of keywords may be long; aliases make billions of values out of ten lines."""


def read_block(source: Mapping[str, Any] | str | PathLike[str]) -> Block:
    """`loss`, `dft` and `dwl` of a mapping, or of a YAML file that may be a whole Axolotl config.

    Raises:
        ConfigError: the file cannot be read, it has no `loss`, or what `parse` finds.
    """
    raw = source if isinstance(source, Mapping) else read_yaml(Path(fspath(source)))
    if not isinstance(raw, Mapping):
        raise ConfigError.at(fspath(source), f"a config is a mapping of keys to values, not a {type(raw).__name__}")  # type: ignore[arg-type]
    block = parse(raw)
    if block is None:
        hint = "add a line such as `loss: dft`, or a `loss: dwl` with its `dwl` block"
        raise ConfigError.at("loss", "is missing, so there is no loss to train with", allowed=_LOSSES, hint=hint)
    return block


def parse(raw: Mapping[str, Any], folder: Path | None = None) -> Block | None:
    """Validate `loss`, `dft` and `dwl` of a config, and put the classes of packs in their place.

    Args:
        raw: the config; of other keys only those are looked at that belong below `dwl`.
        folder: where the config lies; a pack's relative path is looked up there, then in the working directory.

    Returns:
        None when the config has none of the three.

    Raises:
        ConfigError: every problem found.
    """
    ours = {key: raw[key] for key in Block.model_fields if raw.get(key) is not None}
    if not ours:
        return None
    ConfigError.raise_any(unique(list(_unfit(ours))))
    straight, problems = straightened(raw)
    ours = {key: straight[key] for key in Block.model_fields if straight.get(key) is not None}
    if not ours:
        raise ConfigError(problems)
    if "loss" not in ours:
        which, hint = " and ".join(f"`{key}`" for key in ours), f"add the line `loss: {'dwl' if 'dwl' in ours else 'dft'}`"
        problems.append(Problem(next(iter(ours)), f"{which} without `loss` would change nothing", allowed=_LOSSES, hint=hint))
        raise ConfigError(unique(problems))
    problems += _odd_keys(ours)
    packs = PackLibrary([*([] if folder is None else [folder]), Path()], with_losses=ours["loss"] == "dwl")
    if isinstance(ours.get("dwl"), Mapping):
        with collected(problems):
            ours["dwl"] = packs.with_packs(ours["dwl"])
    dwl = ours["dwl"] if isinstance(ours.get("dwl"), Mapping) else {}
    classes = dwl["classes"] if isinstance(dwl.get("classes"), Mapping) else {}
    names = [*(str(name) for name in classes if name != REST), REST]
    in_fields = list(problems)  # without what only several keys together show
    problems += _number_problems(dwl, names)
    block = validate(Block, ours, problems, Context(packs))
    sound = block or validate(Block, ours, in_fields, Context(packs, cross_checks=False))
    problems += packs.problems
    if block is None:
        problems += _schedule_problems(classes)
    problems += name_problems(classes)
    if ours["loss"] == "dwl" and "pack" not in dwl:
        # A controller may be right in a block that is not.
        holder = block or validate(DWLConfig, {"controller": dwl.get("controller")}, [])
        problems += controller_problems(None if holder is None else holder.controller, dwl.get("alpha"), names)
    problems += _useless_keys(ours["loss"], dwl, classes)
    if ours["loss"] == "dwl" and "dwl" not in ours:
        hint = f"name at least one class: {to_write('dwl', EXAMPLE)}"
        problems.append(Problem("dwl", "`loss: dwl` needs a `dwl` block", hint=hint))
    if sound is not None and not in_fields and not packs.problems:
        problems += _useless_options(sound)
        count = len(sound.class_configs)
        most = CLASS_BITS if sound.weighs_tokens else MOST_OVERLAPPING  # class ids are the bits of an int64
        if sound.overlap == "sum" and count > most:
            beside = " beside weights of the data or a reduction by sample" if sound.weighs_tokens else ""
            why = f"`sum` takes at most {most} classes{beside}, and there are {count}"
            problems.append(Problem("dwl.overlap", why, "sum", hint="write `overlap: first`, or join classes"))
        if len(sound.marks) > MOST_MARKS:
            hint = "give what belongs together one mark in the data"
            problems.append(
                Problem("dwl.classes", f"at most {MOST_MARKS} marks of the data can be told apart", len(sound.marks), hint=hint)
            )
    if problems or block is None:
        raise ConfigError(unique(problems))
    return block


def _unfit(ours: Mapping[str, Any]) -> Iterator[Problem]:
    """What the checks themselves could not take. It ends at the first thing that has no end."""
    seen = 0
    for top, whole in reversed(list(ours.items())):
        for path, node, depth in nodes(whole, top, shown_key):
            seen, at = seen + 1, path.partition(".")[0]
            if depth > _MAX_DEPTH:
                yield Problem(at, f"nested more than {_MAX_DEPTH} deep", hint="an alias of YAML (`*`) may stand inside itself")
                return
            if seen > _MAX_VALUES:
                yield Problem(at, f"holds more than {_MAX_VALUES:,} values", hint="aliases of YAML (`*`) may have multiplied them")
                return
            yield from unfit(path, node)


def _odd_keys(ours: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that YAML turned into something that is not a string."""
    for top, whole in ours.items():
        for path, node, _ in nodes(whole, top):
            for key in node if isinstance(node, Mapping) else ():
                if not isinstance(key, str) and not (_KEYFRAMES.fullmatch(path) and type(key) in (int, float)):
                    boolean = "YAML reads yes, no, on, off as booleans: put the name in quotes, such as `'on':`"
                    hint = boolean if isinstance(key, bool) else f"put it in quotes: `'{key}':`"
                    yield Problem(path, "a key has to be a string", key, hint=hint)


def _schedule_problems(classes: Mapping[str, Any]) -> Iterator[Problem]:
    """What is wrong with the schedules of dft, also in a class whose selector is wrong, so that nothing beside it was looked at."""
    for name, spec in classes.items():
        dft = spec.get("dft") if isinstance(spec, Mapping) else None
        if isinstance(dft, Mapping) and "schedule" in dft:
            found: list[Problem] = []
            validate(DFTConfig, {"schedule": dft["schedule"]}, found)
            yield from (replace(problem, path=f"dwl.classes.{name}.dft.{problem.path}") for problem in found)


def _number_problems(dwl: Mapping[str, Any], names: Sequence[str]) -> Iterator[Problem]:
    """What is wrong with numbers by class. Beside a pack that could not be used, a name may be one of its classes."""
    if isinstance(schedule := dwl.get("schedule"), str):
        hint = f"{to_write('schedule', {'type': schedule, 'to': dict.fromkeys(names, 1)})}, with a number for each class"
        yield Problem("dwl.schedule", "a schedule is a mapping with a `type`", schedule, hint=hint)
    for path in required_vectors(dwl.get("schedule"), "dwl.schedule"):
        example = to_write(path, dict.fromkeys(names, 1))
        yield Problem(path, "is required: the α that the schedule moves to", hint=f"{example}, with a number for each class")
    for path, numbers in [("dwl.alpha", dwl.get("alpha")), *vectors(dwl.get("schedule"), "dwl.schedule")]:
        also = numbers if "pack" in dwl and isinstance(numbers, Mapping) else ()
        yield from alpha_problems(path, numbers, list(dict.fromkeys([*names, *also])))
    if dwl.get("schedule") is not None and dwl.get("controller") is not None:
        hint = "delete `dwl.controller` or `dwl.schedule`"
        yield Problem("dwl.controller", "`dwl.schedule` moves α already; one of the two can", hint=hint)


def _useless_keys(loss: object, dwl: Mapping[str, Any], classes: Mapping[str, Any]) -> Iterator[Problem]:
    """Keys that this loss does not look at, and a `dwl` that changes nothing."""
    if loss == "dwl" and dwl.get("classes") == {} and not dwl.keys() & {"token_loss", "reduction", "data_weights", *_OPTIONS}:
        yield Problem("dwl.classes", "has no class in it, so this is plain cross-entropy", hint="name at least one class")
    if loss not in ("nll", "dft"):
        return
    hint = "write `loss: dwl`, or delete this line"
    why = f"has no effect under `loss: {loss}`, where classes are only measured"
    for key in ("alpha", "schedule", "controller", "reduction", "token_loss", *_OPTIONS):
        if dwl.get(key) is not None and dwl[key] != DWLConfig.model_fields[key].default:
            yield Problem(f"dwl.{key}", why, dwl[key], hint=hint)
    for name, spec in classes.items():
        for key in ("token_loss", *TOKEN_LOSSES):
            if isinstance(spec, Mapping) and spec.get(key) is not None:
                yield Problem(f"dwl.classes.{name}.{key}", why, spec[key], hint=hint)


def _useless_options(block: Block) -> Iterator[Problem]:
    """Options of a token loss that nothing pays: the user believes in a loss that is not there."""
    default = _name(block.dwl.token_loss if block.loss == "dwl" and block.dwl is not None else block.loss)
    used = {default}
    for name, spec in block.class_configs.items():
        kind = default if spec.token_loss is None else _name(spec.token_loss)
        used.add(kind)
        for option in TOKEN_LOSSES:
            if getattr(spec, option, None) is not None and kind != option:
                why = f"this class pays {kind}, so the options do nothing"
                hint = f"add `token_loss: {option}` to the class, or delete `{option}`"
                yield Problem(f"dwl.classes.{name}.{option}", why, hint=hint)
    if block.dft is not None and "dft" not in used:
        hint = "write `loss: dft`, or `dwl.token_loss: dft`, or delete `dft`"
        yield Problem("dft", "no token pays dft, so the options do nothing", hint=hint)
    for option in _OPTIONS:
        if getattr(block.dwl, option, None) is not None and option not in used:
            hint = f"write `token_loss: {option}`, or delete `{option}`"
            yield Problem(f"dwl.{option}", f"no token pays {option}, so the options do nothing", hint=hint)


def _name(token_loss: str | TokenLossOptions) -> str:
    return token_loss if isinstance(token_loss, str) else token_loss.type
