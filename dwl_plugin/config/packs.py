"""Packs: classes in a file, with sources, a suggested α and cases of their own, for others to use by name.

A pack is expanded while a config is parsed: what comes after `parse` sees plain classes. A pack is data. It cannot name
code, and of other packs it can use only those of this package, so nothing is fetched that the config does not name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from dwl_plugin.classes.selectors import (
    AllSelector,
    AnySelector,
    Context,
    DatasetSelector,
    PackSelector,
    SelectorConfig,
    as_selector,
    walk,
)
from dwl_plugin.config.classes import CLASSES, ClassConfig, Classes, name_problems
from dwl_plugin.config.pack_files import PackReference, PackText, read_pack
from dwl_plugin.config.problems import alpha_problems, collected, nodes, shown_key, unfit, unique, validate
from dwl_plugin.errors import ConfigError, Problem, did_you_mean
from dwl_plugin.values import REST, Mark, Reduction, Strict, Weight, invalid
from dwl_plugin.yaml_io import load_plain_yaml

__all__ = ["TO_WRITE", "Pack", "PackCase", "PackLibrary", "PackTurn", "packs_used", "parse_pack"]

MAX_CLASSES = 32
MAX_CASES = 256
MAX_PACKS = 16
MAX_SELECTORS = 512
"""Selectors of one pack, those inside others and those of the packs it uses included."""

MAX_PATTERN = 4096
"""Characters of one pattern, delimiter or keyword."""

TO_WRITE = "TODO"
"""What the description begins with of a pack whose author has not written it yet."""


class PackTurn(Strict):
    """A masked text, then a text that is trained."""

    prompt: str = Field("", description="What stands before the text, masked.")
    text: str = Field(description="What is trained.")
    mark: Mark | None = Field(None, description="The `mark` that the data gives to the text.")


class PackCase(Strict):
    """A sample, and which of its text belongs to which class."""

    prompt: str | None = Field(None, description="What stands before the text, masked.")
    text: str | None = Field(None, description="What is trained. A sample of several turns has `turns` instead.")
    mark: Mark | None = Field(None, description="The `mark` that the data gives to the text.")
    turns: tuple[PackTurn, ...] | None = Field(None, min_length=1, description="A masked and a trained text each.")
    special: tuple[str, ...] = Field((), description="Pieces of the text that are special tokens of the tokenizer.")
    added: tuple[str, ...] = Field((), description="Pieces of the text that are single tokens, but not special ones.")
    spans: dict[str, tuple[str, ...]] = Field(
        description="class -> its runs of trained text, in order. A class that is left out must have none; `rest` may be left out."
    )

    @model_validator(mode="after")
    def _one_form(self) -> PackCase:
        if (self.text is None) == (self.turns is None):
            raise invalid("a case has either `text` or `turns`")
        for key in ("prompt", "mark"):
            if self.turns is not None and getattr(self, key) is not None:
                raise invalid(f"with `turns`, each turn has its own `{key}`")
        return self

    @property
    def sample(self) -> tuple[PackTurn, ...]:
        """The turns, also of a case that has one."""
        return self.turns or (PackTurn(prompt=self.prompt or "", text=self.text or "", mark=self.mark),)


class Pack(Strict):
    """A pack file."""

    description: str = Field(description="What the classes are, in a sentence or two.")
    sources: tuple[str, ...] = Field(
        (), description="Where the formats are described: addresses of papers, model cards, documentation."
    )
    classes: Classes = Field(
        min_length=1, max_length=MAX_CLASSES, description="As `dwl.classes`: name -> selector, the order is the priority."
    )
    alpha: dict[str, Weight] | None = Field(None, description="The suggested α, `rest` included.")
    reduction: Reduction | None = Field(None, description="The reduction that the suggested α is meant for.")
    tests: tuple[PackCase, ...] = Field((), max_length=MAX_CASES, description="Samples and the spans that each class has in them.")

    @field_validator("classes")
    @classmethod
    def _few(cls, classes: dict[str, ClassConfig]) -> dict[str, ClassConfig]:
        selectors = [selector for config in classes.values() for _, selector in walk(config, "")]
        if len(selectors) > MAX_SELECTORS:
            raise invalid(f"a pack has at most {MAX_SELECTORS} selectors")
        if named := [selector.dataset for selector in selectors if isinstance(selector, DatasetSelector)]:
            message = f"`dataset: {named[0]}` is a name in one config, and a pack is for many"
            raise invalid(message, hint="let rows say it: `marked: <name>` here, and `mark: <name>` in the data")
        return classes

    @field_validator("sources")
    @classmethod
    def _addresses(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        for source in sources:
            if not source.startswith("https://"):
                raise invalid("a source is an address, https://…")
        return sources

    @property
    def is_described(self) -> bool:
        """Whether somebody wrote the description."""
        return not self.description.lstrip().startswith(TO_WRITE)

    def member(self, name: str) -> SelectorConfig:
        """One class as a selector: what it takes after the classes above it."""
        above = [as_selector(config) for config in islice(self.classes.values(), list(self.classes).index(name))]
        own = as_selector(self.classes[name])
        return own if not above else AllSelector.model_validate({"all": [own, {"not": _any(above)}]})

    def whole(self) -> SelectorConfig:
        """All classes as one selector."""
        return _any([as_selector(config) for config in self.classes.values()])


def _any(selectors: Sequence[SelectorConfig]) -> SelectorConfig:
    return selectors[0] if len(selectors) == 1 else AnySelector.model_validate({"any": selectors})


@lru_cache(maxsize=64)
def parse_pack(source: PackText) -> Pack:
    """The pack in a text; raises `ConfigError` with every problem found, each with its path into the text."""
    raw = load_plain_yaml(source.text, source.name)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("classes"), Mapping):
        hint = next(filter(None, (did_you_mean(key, ["classes"]) for key in raw)), "") if isinstance(raw, Mapping) else ""
        message = "not a pack, which is a mapping with `classes`"  # it may be anything a config can name: nothing of it is told
        raise ConfigError.at(source.name, message, allowed=", ".join(Pack.model_fields), hint=hint)
    too_long = f"a pack's patterns and texts have at most {MAX_PATTERN:,} characters"
    texts = [(path, node) for path, node, _ in nodes(raw["classes"], "classes", shown_key) if isinstance(node, str)]
    problems = [Problem(path, too_long, text) for path, text in texts if len(text) > MAX_PATTERN]  # before one is compiled
    problems += [problem for path, node, _ in nodes(raw, "", shown_key) for problem in unfit(path.lstrip("."), node)]
    problems += [Problem(str(name), "a key has to be a string", name) for name in raw if not isinstance(name, str)]
    pack = None
    if not problems:
        pack = validate(Pack, raw, problems, Context(PackLibrary(None)))
        names = [*map(str, raw["classes"]), REST]
        problems += name_problems(raw["classes"], "classes")
        problems += alpha_problems("alpha", raw.get("alpha"), names)
        problems += _unknown_in_cases(raw.get("tests"), names)
    if problems or pack is None:
        raise ConfigError(replace(problem, path=f"{source.name}: {problem.path}") for problem in unique(problems))
    return pack


def packs_used(dwl: object, folders: Sequence[Path]) -> dict[str, str]:
    """The packs that a `dwl` block of a config names, each with the sha256 of its file; raises `ConfigError` as parsing it does."""
    named = [node["pack"] for _, node, _ in nodes(dwl, "dwl") if isinstance(node, Mapping) and node.get("pack") is not None]
    texts = [text for pack in named for text in (pack if isinstance(pack, (list, tuple)) else [pack])]
    packs = (PackReference.of(text, "dwl") for text in texts)
    return {pack.pack: sha256(read_pack(pack, folders, "dwl").text.encode()).hexdigest() for pack in packs}


class PackLibrary:
    """The packs that one config uses, each read once.

    Args:
        folders: where relative paths are looked up; None where only the packs of this package may be used.
        with_losses: False where classes are only measured: what a pack says its tokens pay is left out.

    `problems` is what is wrong inside the files, with paths into them.
    """

    def __init__(self, folders: Sequence[Path] | None, *, with_losses: bool = True) -> None:
        self.folders, self.with_losses = folders, with_losses
        self.problems: list[Problem] = []
        self._read: dict[str, Pack] = {}

    def pack(self, reference: PackReference, path: str) -> Pack:
        """The pack that a config names at `path`; raises `ConfigError`, with paths into the pack for what is wrong in it."""
        if reference.pack not in self._read:
            self._read[reference.pack] = parse_pack(read_pack(reference, self.folders, path))
        return self._read[reference.pack]

    def checked(self, pack: object) -> object:
        """`pack` if it names a pack, or a member of one; else raises what a validator raises."""
        try:
            reference = PackReference.of(pack, "")
            members = list(self.pack(reference, "").classes)
        except ConfigError as error:
            (first, *_) = error.problems
            if not first.path:
                raise invalid(first.message, first.allowed, first.hint) from None
            self.problems += error.problems
            return pack
        if reference.member is not None and reference.member not in members:
            hint = did_you_mean(reference.member, members)
            raise invalid(f"the pack {reference.pack} has no member {reference.member}", ", ".join(members), hint)
        return pack

    def expanded(self, config: PackSelector) -> SelectorConfig:
        """The selectors of the pack in place of `pack:`; for a class, with the options of the member and those beside it."""
        name, member = PackReference.of(config.pack, "")
        pack = self._read.get(name)
        if pack is None:
            return config  # the pack's own problems are told
        selector = pack.whole() if member is None else pack.member(member)
        if not isinstance(config, ClassConfig):
            return selector
        options = {} if member is None else _options(self._measured(pack.classes[member]))
        fields = {key: getattr(selector, key) for key in type(selector).model_fields}
        return CLASSES[selector.key].model_validate({**fields, **options, **_options(config)})

    def with_packs(self, dwl: Mapping[str, Any]) -> dict[str, Any]:
        """The `dwl` block with its `pack` replaced by classes, α and reduction; what stands beside wins, of α class by class.

        A class of the config that has the name of a pack's class takes its place; the others come before the packs'.
        """
        beside = {key: value for key, value in dwl.items() if key != "pack" and value is not None}
        if dwl.get("pack") is None:
            return beside
        packs = self._named(dwl["pack"])
        own = beside.get("classes", {})
        if not isinstance(own, Mapping):
            return beside
        ConfigError.raise_any(_clashes(packs, own))
        members = {name: config for pack in packs.values() for name, config in pack.classes.items()}
        added = {name: spec for name, spec in own.items() if name not in members}
        classes = {**added, **{name: own.get(name, self._measured(config)) for name, config in members.items()}}
        if not self.with_losses:
            return {**beside, "classes": classes}
        return {**_suggested_reduction(packs, beside), **beside, "classes": classes, **_completed_alpha(packs, beside, classes)}

    def _named(self, pack: object) -> dict[str, Pack]:
        """The packs by their names, in the order of the list; raises `ConfigError` with the place of each that is none."""
        named = [("dwl.pack", pack)]
        if isinstance(pack, (list, tuple)):
            named = [(f"dwl.pack[{index}]", name) for index, name in enumerate(pack)]
        if not 0 < len(named) <= MAX_PACKS:
            raise ConfigError.at("dwl.pack", f"names one pack, or a list of up to {MAX_PACKS}", pack)
        found: dict[str, Pack] = {}
        problems: list[Problem] = []
        for path, name in named:
            with collected(problems):
                reference = PackReference.of(name, path)
                if reference.member is not None:
                    hint = f"for one class write it under `classes`: {{pack: {name}}}"
                    raise ConfigError.at(path, "takes a whole pack", name, hint=hint)
                if reference.pack in found:
                    raise ConfigError.at(path, "stands twice", name)
                found[reference.pack] = self.pack(reference, path)
        ConfigError.raise_any(problems)
        return found

    def _measured(self, config: ClassConfig) -> ClassConfig:
        if self.with_losses:
            return config
        return config.model_copy(update={name: None for name in ClassConfig.model_fields if name != "allow_empty"})


def _clashes(packs: Mapping[str, Pack], own: Mapping[str, Any]) -> Iterator[Problem]:
    """Names of classes that two packs have, where the config does not say what they are."""
    first: dict[str, str] = {}
    for index, (name, pack) in enumerate(packs.items()):
        for member in pack.classes:
            if member in first and member not in own:
                both = f"{member}: {{any: [{{pack: {first[member]}.{member}}}, {{pack: {name}.{member}}}]}}"
                hint = (
                    f"say under `classes` what it is, `{both}`; or leave {name} out here and write its classes there, "
                    f"under names of your own: `{{pack: {name}.{member}}}`"
                )
                yield Problem(f"dwl.pack[{index}]", f"has a class `{member}`, and so has {first[member]}", name, hint=hint)
            first.setdefault(member, name)


def _suggested_reduction(packs: Mapping[str, Pack], beside: Mapping[str, Any]) -> dict[str, Any]:
    named = {name: pack.reduction for name, pack in packs.items() if pack.reduction is not None}
    if len({*named.values()}) > 1 and "reduction" not in beside:
        said = ", ".join(f"{reduction} ({name})" for name, reduction in named.items())
        raise ConfigError.at("dwl.reduction", f"is needed: the packs suggest different ones, {said}")
    return {"reduction": next(iter(named.values()))} if named else {}


def _completed_alpha(packs: Mapping[str, Pack], beside: Mapping[str, Any], classes: Iterable[str]) -> dict[str, Any]:
    """The suggested α, with the config's own numbers. Raises `ConfigError` where it has none, and no pack knows some class's."""
    suggested, written = _joined_alpha(packs.values()), beside.get("alpha")
    names = [*classes, REST]
    well_formed = isinstance(written, (Mapping, type(None))) and all(isinstance(name, str) for name in names)
    if suggested is None or not well_formed:  # the schema says what is wrong with it
        return {}
    left = [name for name in names if name not in suggested]
    if written is None and left:
        zero = [name for name, pack in packs.items() if pack.alpha and not pack.alpha[REST]]
        why = f"the pack suggests α for its own classes, not for {', '.join(left)}"
        if len(packs) > 1:
            why = f"the packs suggest none, or not the same, for {', '.join(left)}"
        if len(packs) > 1 and zero:
            why = f"under {zero[0]} `rest` has α 0, so what the packs suggest has no scale in common"
        raise ConfigError.at("dwl.alpha", f"is needed: {why}", allowed=", ".join(names))
    return {"alpha": {**suggested, **(written or {})}}


def _joined_alpha(packs: Iterable[Pack]) -> dict[str, float] | None:
    """What the packs suggest together: the numbers of the first as they stand, and those of every other one times the factor that
    makes its `rest` the same. Without what they do not agree on; None where none suggests anything."""
    suggested = [pack.alpha for pack in packs if pack.alpha is not None]
    if len(suggested) < 2:
        return suggested[0] if suggested else None
    if not all(numbers[REST] for numbers in suggested):
        return {}
    first = suggested[0]
    offered = {name: {number} for name, number in first.items()}
    for numbers in suggested[1:]:
        for name in (name for name in numbers if name != REST):
            offered.setdefault(name, set()).add(numbers[name] * first[REST] / numbers[REST])
    return {name: number for name, (number, *more) in offered.items() if not more}


def _options(config: ClassConfig) -> dict[str, Any]:
    """The options that stand beside the selector of a class."""
    return {name: getattr(config, name) for name in ClassConfig.model_fields if name in config.model_fields_set}


def _unknown_in_cases(cases: object, names: Sequence[str]) -> Iterator[Problem]:
    """Spans of classes that the pack does not have."""
    for index, case in enumerate(cases if isinstance(cases, list) else []):
        spans = case.get("spans") if isinstance(case, Mapping) else None
        for name in spans if isinstance(spans, Mapping) else ():
            if name not in names:
                path = f"tests[{index}].spans.{name}"
                yield Problem(path, "no such class", allowed=", ".join(names), hint=did_you_mean(name, names))
