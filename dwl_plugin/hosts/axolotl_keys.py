"""The keys of a config: which Axolotl knows, under what other names, and whose the others are."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from dwl_plugin.errors import did_you_mean
from dwl_plugin.hosts.incompatible import refused

__all__ = ["dropped_keys", "integration_keys", "other_names"]

_UNCHECKED = ("fsdp_config",)
"""A block whose keys a validator renames."""


def dropped_keys(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each key with a value that Axolotl drops without a word, as a YAML path, and what to do about it, or "".

    In blocks too, in which no key of the host takes another's place.
    """
    from axolotl.integrations.config import merge_input_args

    fields = merge_input_args()[0].model_fields
    known = {name: info.annotation for key, info in fields.items() for name in (key, *_aliases(info))}
    others = integration_keys()
    plugins = [str(name) for name in raw.get("plugins") or ()]
    for key, value in raw.items():
        if key in known:
            yield from _dropped_below(value, known[key], key) if key not in _UNCHECKED else ()
        elif value in (None, [], {}):
            continue
        elif plugin := others.get(key):
            if not any(plugin.rpartition(".")[0] in name for name in plugins):  # one that is listed could not be loaded
                yield key, f"it belongs to {_missing(plugin)}"
        elif close := did_you_mean(key, list(fields)):
            yield key, close
        else:
            close = did_you_mean(key, list(others))
            yield key, close and f"{close} That belongs to {_missing(others[close.split('`')[1]])}"


def _missing(plugin: str) -> str:
    usable = not any(refused({"plugins": [plugin]}, "dwl"))
    return f"the plugin `{plugin}`, which is not under `plugins:`" + (f"; add `- {plugin}` there" if usable else "")


def _dropped_below(value: Any, annotation: Any, path: str) -> Iterator[tuple[str, str]]:
    """Keys of blocks inside, where a model of pydantic says which there are."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _dropped_below(item, annotation, f"{path}[{index}]")
    models = list(_models(annotation))
    if not isinstance(value, Mapping) or not models or any(model.model_config.get("extra") for model in models):
        return
    fields = [pair for model in models for pair in model.model_fields.items()]
    known = {name: info.annotation for key, info in reversed(fields) for name in (key, *_aliases(info))}
    for key, inner in value.items():
        if key not in known:
            if inner not in (None, [], {}):
                yield f"{path}.{key}", did_you_mean(key, list(known))
            continue
        yield from _dropped_below(inner, known[key], f"{path}.{key}")


def _models(annotation: Any) -> Iterator[Any]:
    if hasattr(annotation, "model_fields"):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


@functools.cache
def integration_keys() -> Mapping[str, str]:
    """Each key that an integration of Axolotl's adds to its schema, and the plugin to list. Read and not imported: an
    integration may need a package that is not here."""
    spec, keys = find_spec("axolotl.integrations"), dict[str, str]()
    for folder in sorted(map(Path, (spec and spec.submodule_search_locations) or ())):
        for package in sorted(folder.iterdir()):
            classes = list(_classes(package)) if package.is_dir() else []
            asked = {_args_class(plugin): plugin.name for plugin in classes} if classes else {}
            for found in classes:
                if plugin := asked.get(found.name):
                    keys |= dict.fromkeys(_fields(found), f"axolotl.integrations.{package.name}.{plugin}")
    return keys


def _classes(package: Path) -> Iterator[ast.ClassDef]:
    for file in sorted(package.glob("*.py")):
        yield from (node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef))


def _args_class(plugin: ast.ClassDef) -> str:
    """The bare name of the class that `get_input_args` names; "" for what is no plugin."""
    for node in plugin.body:
        if isinstance(node, ast.FunctionDef) and node.name == "get_input_args":
            names = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            return next((name.rpartition(".")[2] for name in names if name.startswith("axolotl.")), "")
    return ""


def _fields(model: ast.ClassDef) -> Iterator[str]:
    for node in model.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


@functools.cache
def other_names() -> frozenset[tuple[str, str]]:
    """Each alias in Axolotl's schema, blocks inside it included, with the key that it stands for."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    names, seen = set[tuple[str, str]](), set[Any]()
    left: list[Any] = [AxolotlInputConfig]
    while left:
        kind = left.pop()
        left.extend(get_args(kind))
        if kind not in seen and hasattr(kind, "model_fields"):
            seen.add(kind)
            left.extend(info.annotation for info in kind.model_fields.values())
            names |= {(alias, key) for key, info in kind.model_fields.items() for alias in _aliases(info) if alias != key}
    return frozenset(names)


def _aliases(info: Any) -> Iterator[str]:
    for alias in (info.alias, info.validation_alias):
        for choice in getattr(alias, "choices", [alias]):
            if choice is not None:
                yield str(getattr(choice, "path", [choice])[0])
