"""What a config can name: the built-in classes in a dict, and those that other installed packages offer as entry points:

    [project.entry-points."dwl_plugin.schedules"]          # or controllers, token_losses, packs
    bounce = "my_package.schedules:Bounce"

A class has its pydantic model as `Options`. `docs/extending.md` has an example of each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, ValidationError, core_schema

from dwl_plugin.errors import ConfigError, did_you_mean
from dwl_plugin.values import line_error

__all__ = ["ChosenByType", "Kind", "class_of", "installed", "load", "other_names", "owners", "schema_of_others"]

Kind = Literal["schedule", "controller", "token_loss", "pack"]


_GROUPS: dict[Kind, str] = {
    "schedule": "dwl_plugin.schedules",
    "controller": "dwl_plugin.controllers",
    "token_loss": "dwl_plugin.token_losses",
    "pack": "dwl_plugin.packs",
}


def installed(kind: Kind) -> dict[str, list[EntryPoint]]:
    """name -> who offers it, without importing anything."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=_GROUPS[kind]):
        if point not in found.setdefault(point.name, []):
            found[point.name].append(point)
    return found


def other_names(kind: Kind, built_in: Collection[str]) -> list[str]:
    """What installed packages offer beside the names that are `built_in`, which always mean what is built in."""
    return sorted(set(installed(kind)) - set(built_in))


def owners(kind: Kind, name: str) -> str:
    """The installed packages that offer `name`, with their versions."""
    return " and ".join(sorted(_owner(point) for point in installed(kind)[name]))


def schema_of_others(names: Sequence[str]) -> dict[str, Any]:
    """JSON Schema of `{type: name, **options}`: the options are known to the packages of these names alone."""
    return {"type": "object", "properties": {"type": {"enum": names}}, "required": ["type"]}


def load(kind: Kind, name: str, path: str, options: type[BaseModel] | None = None) -> Any:
    """What an installed package offers as `name`; where `options` is given, a class whose `Options` derive from it.

    Raises `ConfigError` at `path` when two packages offer the name, when it cannot be imported, and when it is not of the kind.
    """
    points, what = installed(kind)[name], kind.replace("_", " ")
    if len(points) > 1:
        raise ConfigError.at(path, f"{owners(kind, name)} both offer a {what} of this name", name, hint="uninstall one of them")
    point = points[0]
    try:
        found = point.load()
    except Exception as error:  # importing another package's module may raise anything
        why = f"{_owner(point)} offers it as `{point.value}`, which cannot be imported: {type(error).__name__}: {error}"
        raise ConfigError.at(path, why, name, hint=f"reinstall or upgrade {_owner(point)}") from error
    model = getattr(found, "Options", None)
    if options is not None and not (isinstance(model, type) and issubclass(model, options)):
        why = f"`{point.value}` of {_owner(point)} is no {what}: it needs `Options`, derived from {options.__name__}"
        raise ConfigError.at(path, why, name, hint=f"tell the authors of {_owner(point)}")
    return found


def class_of(kind: Kind, name: object, built_in: Mapping[str, Any], options: type[BaseModel], path: str) -> Any:
    """The class that `name` stands for: a built-in one, else an installed package's. Raises `ConfigError` at `path`."""
    if isinstance(name, str) and name in built_in:
        return built_in[name]
    others, what = other_names(kind, built_in), kind.replace("_", " ")
    if isinstance(name, str) and name in others:
        return load(kind, name, path, options)
    known = [*built_in, *others]
    hint = did_you_mean(name, known) if name is not None else f"a {what} is a mapping with a `type`"
    if isinstance(name, str) and not hint:
        hint = f"a {what} of another package is known once that package is installed here"
    raise ConfigError.at(path, f"not a known {what}", name, ", ".join(known), hint)


@dataclass(frozen=True, eq=False)  # annotations have to be hashable, and a dict is not
class ChosenByType:
    """Annotation of a field that holds `{type: ..., **options}`: `type` chooses the model before any option is looked at.

    A field of `Annotated[ScheduleOptions, ChosenByType("schedule", SCHEDULES, ScheduleOptions)]` validates to the `Options` of the
    chosen class. `allowed` and `hint` of an error are in its context.
    """

    kind: Kind
    built_in: Mapping[str, Any]
    options: type[BaseModel]

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        models = core_schema.union_schema([handler.generate_schema(one.Options) for one in self.built_in.values()])
        as_its_own_model = core_schema.wrap_serializer_function_ser_schema(lambda v, dump: dump(v), schema=core_schema.any_schema())
        return core_schema.with_info_wrap_validator_function(self._validated, models, serialization=as_its_own_model)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        choices = handler(schema)["anyOf"]
        if others := other_names(self.kind, self.built_in):
            choices.append(schema_of_others(others))
        return {"oneOf": choices}

    def _validated(self, value: object, _: object, info: core_schema.ValidationInfo) -> BaseModel:
        if isinstance(value, self.options):
            return value
        if not isinstance(value, Mapping):
            why, known = f"a {self.kind.replace('_', ' ')} is a mapping with a `type`", ", ".join(self.built_in)
            raise ValidationError.from_exception_data(self.kind, [line_error((), why, value, known)])
        name = value.get("type")
        try:
            model: type[BaseModel] = class_of(self.kind, name, self.built_in, self.options, "type").Options
        except ConfigError as error:
            (problem,) = error.problems
            line = line_error(("type",), problem.message, problem.value, problem.allowed, problem.hint)
            raise ValidationError.from_exception_data(self.kind, [line]) from None
        return model.model_validate(value, context=info.context)


def _owner(point: EntryPoint) -> str:
    return "an unnamed package" if point.dist is None else f"{point.dist.name} {point.dist.version}"
