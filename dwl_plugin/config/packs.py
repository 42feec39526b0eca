"""Packs: classes in a file, with sources, a suggested α and cases of their own, for others to use by name.

A pack is expanded while a config is parsed: what comes after `parse` sees plain classes. A pack is data. It cannot name
code, and of other packs it can use only those of this package, so nothing is fetched that the config does not name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from dwl_plugin.config.alpha import alpha_problems
from dwl_plugin.config.block import Reduction
from dwl_plugin.config.classes import ClassConfig, OneOfTheClasses, PackClass, as_class, class_of, name_problems
from dwl_plugin.config.pack_files import PackReference, PackText, read_pack, read_yaml, shipped_packs
from dwl_plugin.config.selectors import (
    AllSelector,
    AnySelector,
    NotSelector,
    PackSelector,
    Selector,
    as_selector,
    group_problems,
    walk,
)
from dwl_plugin.config.validate import unique, validate
from dwl_plugin.errors import ConfigError, Problem, did_you_mean
from dwl_plugin.values import REST, Strict, Weight

__all__ = ["Pack", "PackCase", "PackTurn", "Shelf", "parse_pack"]

_Kind = TypeVar("_Kind", bound=Selector)

MAX_CLASSES = 32
MAX_CASES = 256
MAX_SELECTORS = 512
"""Selectors of one pack, those inside others and those of the packs it uses included."""

MAX_PATTERN = 4096
"""Characters of one pattern, delimiter or keyword."""


class PackTurn(Strict):
    """A masked text, then a text that is trained."""

    prompt: str = Field("", description="What stands before the text, masked.")
    text: str = Field(description="What is trained.")


class PackCase(Strict):
    """A sample, and which of its text belongs to which class."""

    prompt: str | None = Field(None, description="What stands before the text, masked.")
    text: str | None = Field(None, description="What is trained. A sample of several turns has `turns` instead.")
    turns: tuple[PackTurn, ...] | None = Field(None, min_length=1, description="A masked and a trained text each.")
    special: tuple[str, ...] = Field((), description="Pieces of the text that are special tokens of the tokenizer.")
    added: tuple[str, ...] = Field((), description="Pieces of the text that are single tokens, but not special ones.")
    spans: dict[str, tuple[str, ...]] = Field(
        description="class -> its runs of trained text, in order. A class that is left out must have none; `rest` may be left out."
    )

    @model_validator(mode="after")
    def _one_form(self) -> PackCase:
        if (self.text is None) == (self.turns is None):
            raise PydanticCustomError("dwl", "a case has either `text` or `turns`")
        if self.turns is not None and self.prompt is not None:
            raise PydanticCustomError("dwl", "with `turns`, each turn has its own `prompt`")
        return self

    @property
    def sample(self) -> tuple[PackTurn, ...]:
        """The turns, also of a case that has one."""
        return self.turns or (PackTurn(prompt=self.prompt or "", text=self.text or ""),)


class Pack(Strict):
    """A pack file."""

    description: str = Field(description="What the classes are, in a sentence or two.")
    sources: tuple[str, ...] = Field(
        (), description="Where the formats are described: addresses of papers, model cards, documentation."
    )
    classes: dict[str, OneOfTheClasses] = Field(
        min_length=1, max_length=MAX_CLASSES, description="As `dwl.classes`: name -> selector, the order is the priority."
    )
    alpha: dict[str, Weight] | None = Field(None, description="The suggested α, `rest` included.")
    reduction: Reduction | None = Field(None, description="The reduction that the suggested α is meant for.")
    tests: tuple[PackCase, ...] = Field((), max_length=MAX_CASES, description="Samples and the spans that each class has in them.")

    @field_validator("sources")
    @classmethod
    def _addresses(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            if not source.startswith("https://"):
                raise PydanticCustomError("dwl", "a source is an address, https://…")
        return sources

    def member(self, name: str) -> Selector:
        """One class as a selector: what it takes after the classes above it."""
        above = [as_selector(config) for config in islice(self.classes.values(), list(self.classes).index(name))]
        own = as_selector(self.classes[name])
        return own if not above else AllSelector.model_validate({"all": [own, {"not": _any(above)}]})

    def whole(self) -> Selector:
        """All classes as one selector."""
        return _any([as_selector(config) for config in self.classes.values()])


def _any(selectors: Sequence[Selector]) -> Selector:
    return selectors[0] if len(selectors) == 1 else AnySelector.model_validate({"any": selectors})


@lru_cache(maxsize=64)
def parse_pack(source: PackText) -> Pack:
    """The pack in a text; raises `ConfigError` with every problem found, each with its path into the text."""
    raw = read_yaml(source)
    top = f"{source.name}: "
    if not isinstance(raw, Mapping):
        raise ConfigError([Problem(source.name, "a pack is a mapping", raw, allowed=", ".join(Pack.model_fields))])
    problems = list(_too_long(raw.get("classes"), f"{top}classes"))
    problems += [Problem(f"{top}{name}", "a key has to be a string", name) for name in raw if not isinstance(name, str)]
    if problems:
        raise ConfigError(problems)
    specs = raw.get("classes")
    chosen = dict(raw)
    if isinstance(specs, Mapping):
        problems += name_problems(specs, f"{top}classes")
        specs = dict(islice(specs.items(), MAX_CLASSES + 1))  # with one more, the model will say so
        built = {str(name): class_of(spec, f"{top}classes.{name}", problems) for name, spec in specs.items()}
        chosen["classes"] = {
            name: _inside_a_pack(config, f"{top}classes.{name}", problems) for name, config in built.items() if config is not None
        }
        problems += group_problems(chosen["classes"], f"{top}classes")
        names = [*(str(name) for name in specs), REST]
        problems += alpha_problems(f"{top}alpha", raw.get("alpha"), names)
        problems += _unknown_in_cases(raw.get("tests"), f"{top}tests", names)
        count = sum(1 for config in chosen["classes"].values() for _ in walk(config, ""))
        if count > MAX_SELECTORS:
            problems.append(Problem(f"{top}classes", f"a pack has at most {MAX_SELECTORS} selectors", count))
    found: list[Problem] = []
    pack = validate(Pack, chosen, "", found)
    problems += [replace(item, path=f"{top}{item.path}") for item in found]
    if problems or pack is None:
        raise ConfigError(unique(problems))
    return pack


class Shelf:
    """The packs that one config uses, each read once.

    Args:
        folders: where relative paths are looked up.
        with_losses: False where classes are only measured: what a pack says its tokens pay is left out.
    """

    def __init__(self, folders: Sequence[Path], *, with_losses: bool = True) -> None:
        self.folders, self.with_losses = folders, with_losses
        self._read: dict[str, Pack] = {}

    def pack(self, reference: PackReference, path: str) -> Pack:
        """The pack that a config names at `path`; raises `ConfigError`, with paths into the pack for what is wrong in it."""
        if reference.pack not in self._read:
            self._read[reference.pack] = parse_pack(read_pack(reference, self.folders, path))
        return self._read[reference.pack]

    def with_pack(self, dwl: Mapping[str, Any]) -> dict[str, Any]:
        """The `dwl` block with its `pack` replaced by classes, α and reduction; keys beside `pack` win.

        A class of the config that has the name of a pack's class takes its place; the others come before the pack's.
        """
        beside = {key: value for key, value in dwl.items() if key != "pack" and value is not None}
        if dwl.get("pack") is None:
            return beside
        reference = PackReference.of(dwl["pack"]) if isinstance(dwl["pack"], str) else None
        if reference is None:
            raise ConfigError(
                [
                    Problem(
                        "dwl.pack",
                        "not a pack",
                        dwl["pack"],
                        f"{', '.join(shipped_packs())}, ./file.yml, hf://user/repo@<commit>/file.yml",
                    )
                ]
            )
        if reference.member is not None:
            raise ConfigError(
                [
                    Problem(
                        "dwl.pack",
                        "takes a whole pack",
                        dwl["pack"],
                        hint=f"for one class write it under `classes`: {{pack: {dwl['pack']}}}",
                    )
                ]
            )
        pack = self.pack(reference, "dwl.pack")
        own = beside.get("classes", {})
        if not isinstance(own, Mapping):
            return beside
        added = {name: spec for name, spec in own.items() if name not in pack.classes}
        classes = {**added, **{name: own.get(name, self._measured(config)) for name, config in pack.classes.items()}}
        suggested: dict[str, Any] = {}
        if self.with_losses:
            if added and "alpha" not in beside and pack.alpha is not None:
                message = f"is needed: the pack suggests α for its own classes, not for {', '.join(map(str, added))}"
                raise ConfigError([Problem("dwl.alpha", message, allowed=", ".join([*map(str, classes), REST]))])
            suggested = {"alpha": pack.alpha, "reduction": pack.reduction}
        return {**{key: value for key, value in suggested.items() if value is not None}, **beside, "classes": classes}

    def without_packs(self, config: _Kind, path: str, problems: list[Problem]) -> _Kind:
        """`config` with the selectors of packs in place of `pack`."""

        def inside(selectors: tuple[Selector, ...], key: str) -> tuple[Selector, ...]:
            return tuple(self.without_packs(item, f"{path}.{key}[{n}]", problems) for n, item in enumerate(selectors))

        if isinstance(config, AnySelector):
            return config.model_copy(update={"any": inside(config.any, "any")})
        if isinstance(config, AllSelector):
            return config.model_copy(update={"all": inside(config.all, "all")})
        if isinstance(config, NotSelector):
            return config.model_copy(update={"not_": self.without_packs(config.not_, f"{path}.not", problems)})
        if not isinstance(config, PackSelector):
            return config
        try:
            taken: _Kind = self._taken_from_pack(config, f"{path}.pack")
            return taken
        except ConfigError as error:
            problems += error.problems
            return config

    def _taken_from_pack(self, config: Any, path: str) -> Any:
        reference = PackReference.of(config.pack)
        assert reference is not None, "PackSelector has looked"
        pack = self.pack(reference, path)
        if reference.member is not None and reference.member not in pack.classes:
            raise ConfigError(
                [
                    Problem(
                        path,
                        f"the pack {reference.pack} has no such member",
                        reference.member,
                        ", ".join(pack.classes),
                        did_you_mean(reference.member, list(pack.classes)),
                    )
                ]
            )
        selector = pack.whole() if reference.member is None else pack.member(reference.member)
        if not isinstance(config, PackClass):
            return selector
        options = {} if reference.member is None else _options(self._measured(pack.classes[reference.member]))
        return as_class(selector, {**options, **_options(config)})

    def _measured(self, config: ClassConfig) -> ClassConfig:
        if self.with_losses:
            return config
        return config.model_copy(update={name: None for name in ClassConfig.model_fields if name != "allow_empty"})


def _options(config: ClassConfig) -> dict[str, Any]:
    """The options that stand beside the selector of a class."""
    return {name: getattr(config, name) for name in ClassConfig.model_fields if name in config.model_fields_set}


def _inside_a_pack(config: ClassConfig, path: str, problems: list[Problem]) -> ClassConfig:
    """A pack's class with the shipped packs it uses in place."""
    foreign = [
        Problem(f"{at}.pack", "a pack can use only the packs of this package", selector.pack, ", ".join(shipped_packs()))
        for at, selector in walk(config, path)
        if isinstance(selector, PackSelector) and not PackReference.of(selector.pack).is_shipped  # type: ignore[union-attr]
    ]
    problems += foreign
    return config if foreign else Shelf(()).without_packs(config, path, problems)


def _too_long(node: object, path: str) -> Iterator[Problem]:
    """Strings that are longer than any pattern has to be, before one of them is compiled."""
    if isinstance(node, str) and len(node) > MAX_PATTERN:
        yield Problem(path, f"a pack's patterns and texts have at most {MAX_PATTERN:,} characters", node)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _too_long(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _too_long(value, f"{path}[{index}]")


def _unknown_in_cases(cases: object, path: str, names: Sequence[str]) -> Iterator[Problem]:
    """Spans of classes that the pack does not have."""
    for index, case in enumerate(cases if isinstance(cases, list) else []):
        spans = case.get("spans") if isinstance(case, Mapping) else None
        for name in spans if isinstance(spans, Mapping) else ():
            if name not in names:
                yield Problem(
                    f"{path}[{index}].spans.{name}", "no such class", allowed=", ".join(names), hint=did_you_mean(name, names)
                )
