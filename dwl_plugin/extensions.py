"""Schedules and controllers of other installed packages. A YAML can only name them; a package offers them as entry points:

    [project.entry-points."dwl_plugin.schedules"]          # or "dwl_plugin.controllers"
    bounce = "my_package.schedules:Bounce"

`docs/alpha.md` has the two protocols and an example of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from pydantic import BaseModel

from dwl_plugin.errors import ConfigError, Problem, did_you_mean

__all__ = ["Kind", "installed", "load", "model_of"]

Kind = Literal["schedule", "controller"]


def installed(kind: Kind) -> dict[str, list[EntryPoint]]:
    """name -> who offers it, without importing anything."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"dwl_plugin.{kind}s"):
        if point not in found.setdefault(point.name, []):
            found[point.name].append(point)
    return found


def load(kind: Kind, name: str, options: type[BaseModel], path: str) -> Any:
    """The class that an installed package offers as `name`; its `Options` derive from `options`.

    Raises `ConfigError` at `path` when two packages offer the name, when the class cannot be imported, and when it is not what it
    has to be.
    """
    points = installed(kind)[name]
    if len(points) > 1:
        owners = " and ".join(sorted(_owner(point) for point in points))
        raise ConfigError([Problem(path, f"{owners} both offer a {kind} of this name", name, hint="uninstall one of them")])
    point = points[0]
    try:
        found = point.load()
    except Exception as error:  # whatever a stranger's module does when it is imported
        why = f"{_owner(point)} offers it as `{point.value}`, which cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError([Problem(path, why, name, hint=f"reinstall or upgrade {_owner(point)}")]) from error
    model = getattr(found, "Options", None)
    if not (isinstance(model, type) and issubclass(model, options)):
        why = f"`{point.value}` of {_owner(point)} is no {kind}: it needs `Options`, derived from {options.__name__}"
        raise ConfigError([Problem(path, why, name, hint=f"tell the authors of {_owner(point)}")])
    return found


def model_of(
    kind: Kind, spec: object, built_in: Mapping[str, type[BaseModel]], options: type[BaseModel], path: str
) -> type[BaseModel]:
    """The model of `spec`'s options, chosen by its `type`, before any of them is looked at. Raises `ConfigError`."""
    name = spec.get("type") if isinstance(spec, Mapping) else None
    if isinstance(name, str) and name in built_in:
        return built_in[name]
    others = installed(kind)
    if isinstance(name, str) and name in others:
        model: type[BaseModel] = load(kind, name, options, f"{path}.type").Options
        return model
    known = [*built_in, *sorted(set(others) - set(built_in))]
    hint = did_you_mean(name, known) if name is not None else f"a {kind} is a mapping with a `type`"
    if isinstance(name, str) and not hint:
        hint = f"a {kind} of another package is known once that package is installed here"
    raise ConfigError([Problem(f"{path}.type", f"not a known {kind}", name, allowed=", ".join(known), hint=hint)])


def _owner(point: EntryPoint) -> str:
    return "an unnamed package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
