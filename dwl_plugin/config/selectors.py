"""Selectors: the ways to say which target tokens are meant. Each is a mapping with exactly one selector key.

A selector is a class when options stand beside it (see `classes`), and stands without them inside `any`, `all`, `not`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import regex
from pydantic import BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import PydanticCustomError

from dwl_plugin.config.pack_files import PackReference
from dwl_plugin.config.validate import validate
from dwl_plugin.errors import Problem, did_you_mean
from dwl_plugin.values import Pattern, Strict, Text, TokenId, Word

__all__ = [
    "AddedSelector",
    "AllSelector",
    "AnySelector",
    "BetweenSelector",
    "NestedSelector",
    "NotSelector",
    "PackSelector",
    "PositionSelector",
    "RegexSelector",
    "Role",
    "RoleSelector",
    "Selector",
    "SpecialSelector",
    "TokenIdsSelector",
    "TokenRegexSelector",
    "TokensSelector",
    "TurnEnds",
    "TurnSelector",
    "WordsSelector",
    "as_selector",
    "choose",
    "group_problems",
    "walk",
]

Role = Literal["user", "assistant", "tool", "system"]

MAX_DEPTH = 16
"""How deep selectors may stand in each other; people need two or three."""


class Selector(Strict):
    """What every selector has: the key that chooses it."""

    key: ClassVar[str]


class TokenIdsSelector(Selector):
    """Tokens by id."""

    key = "token_ids"
    token_ids: tuple[TokenId, ...] = Field(min_length=1, description='Ids and ranges with both ends in, e.g. [11, "100-199"].')


class TokensSelector(Selector):
    """Tokens by their string; each must be exactly one token of the tokenizer."""

    key = "tokens"
    tokens: tuple[Text, ...] = Field(min_length=1, description='Token strings, e.g. ["<|im_end|>"].')


class TokenRegexSelector(Selector):
    """Tokens whose own text matches a pattern in full."""

    key = "token_regex"
    token_regex: Pattern = Field(description="Python `regex` pattern; must match the whole of one token's text.")


class RegexSelector(Selector):
    """Tokens that overlap a match in the decoded text of a turn."""

    key = "regex"
    regex: Pattern = Field(description="Python `regex` pattern over the decoded text, searched per turn.")
    group: int | str = Field(0, description="The group of the match that counts; 0 is the whole match.")


class WordsSelector(Selector):
    """Tokens that overlap one of many keywords, as whole words, in the decoded text of a turn."""

    key = "words"
    words: tuple[Word, ...] = Field(min_length=1, description="Keywords, thousands if need be; found as whole words.")
    ignore_case: bool = Field(False, description="Compare letters without regard to case.")


class BetweenSelector(Selector):
    """Tokens in the span from an opening to a closing delimiter; an unclosed span ends with the sample."""

    key = "between"
    between: tuple[Text, Text] = Field(description='Opening and closing delimiter, e.g. ["<think>", "</think>"].')
    include_delimiters: bool = Field(True, description="Count the delimiters themselves as members.")


def _turn(value: object) -> object:
    if value in ("first", "last") or (isinstance(value, int) and not isinstance(value, bool) and value != 0):
        return value
    raise PydanticCustomError("dwl", "not a turn: write `first`, `last`, or its number, 1 for the first, -1 for the last")


class TurnSelector(Selector):
    """Tokens of the n-th turn: a turn is a contiguous run of targets in a sample."""

    key = "turn"
    turn: Annotated[Literal["first", "last"] | int, BeforeValidator(_turn)] = Field(
        description="first, last, or a number: 1 is the first turn, 2 the second, -1 the last."
    )


class TurnEnds(Strict):
    """How many tokens at each end of a turn."""

    first: int | None = Field(None, ge=1, description="So many tokens at the beginning of each turn.")
    last: int | None = Field(None, ge=1, description="So many tokens at the end of each turn.")

    @model_validator(mode="after")
    def _some(self) -> TurnEnds:
        if self.first is None and self.last is None:
            raise PydanticCustomError("dwl", "says nothing: give `first`, `last`, or both, a number of tokens")
        return self


class PositionSelector(Selector):
    """The first and last tokens of each turn: a turn is a contiguous run of targets in a sample."""

    key = "position"
    position: TurnEnds = Field(description="E.g. {last: 32}, or {first: 8, last: 8}.")


class RoleSelector(Selector):
    """Tokens of the messages of one role, by the headers of the tokenizer's chat template."""

    key = "role"
    role: Role = Field(description="user, assistant, tool or system.")


def _yes(value: object) -> object:
    if value is not True:
        raise PydanticCustomError("dwl", "is written with `true`; for the other tokens use `not`")
    return value


class SpecialSelector(Selector):
    """Tokens that the tokenizer calls special."""

    key = "special"
    special: Annotated[Literal[True], BeforeValidator(_yes)] = Field(description="true.")


class AddedSelector(Selector):
    """Tokens that were added to the tokenizer's vocabulary, special or not."""

    key = "added"
    added: Annotated[Literal[True], BeforeValidator(_yes)] = Field(description="true.")


def _pack(value: object) -> object:
    if isinstance(value, str) and PackReference.of(value) is not None:
        return value
    raise PydanticCustomError(
        "dwl", "not a pack: write `name`, `./file.yml` or `hf://user/repo@<commit>/file.yml`, and for a member a dot and its name"
    )


class PackSelector(Selector):
    """Tokens of a pack's classes, or of one of them; replaced by the pack's selectors while the config is parsed."""

    key = "pack"
    pack: Annotated[str, BeforeValidator(_pack)] = Field(
        description="A pack by its name, file or address on the Hub; `.member` after it for one class."
    )


class AnySelector(Selector):
    """Tokens that at least one of the selectors selects."""

    key = "any"
    any: tuple[NestedSelector, ...] = Field(min_length=1, description="Selectors.")


class AllSelector(Selector):
    """Tokens that every one of the selectors selects."""

    key = "all"
    all: tuple[NestedSelector, ...] = Field(min_length=1, description="Selectors.")


class NotSelector(Selector):
    """Target tokens that the selector does not select."""

    key = "not"
    model_config = ConfigDict(populate_by_name=True)
    not_: NestedSelector = Field(alias="not", description="A selector.")

    @model_serializer(mode="wrap")
    def _as_written(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`not`, also where a host dumps by field name."""
        return {"not" if name == "not_" else name: value for name, value in handler(self).items()}


NestedSelector = (
    TokenIdsSelector
    | TokensSelector
    | TokenRegexSelector
    | RegexSelector
    | WordsSelector
    | BetweenSelector
    | TurnSelector
    | PositionSelector
    | RoleSelector
    | SpecialSelector
    | AddedSelector
    | PackSelector
    | AnySelector
    | AllSelector
    | NotSelector
)

for _model in (AnySelector, AllSelector, NotSelector):
    _model.model_rebuild()

_NESTED: dict[str, type[Selector]] = {model.key: model for model in NestedSelector.__args__}

_Model = TypeVar("_Model", bound=Selector)


def choose(
    models: Mapping[str, type[_Model]], spec: object, path: str, noun: str, problems: list[Problem], depth: int = 0
) -> _Model | None:
    """The model of `spec`, chosen by its selector key before anything is validated: one typo gives one error."""
    selectors = ", ".join(models)
    if not isinstance(spec, Mapping):
        problems.append(Problem(path, f"{noun} is a mapping with one selector", spec, allowed=selectors))
        return None
    found = [key for key in models if key in spec]
    if len(found) > 1:
        hint = "make them two classes, or put them into `any` or `all`"
        problems.append(Problem(path, f"{noun} has one selector, this one has {' and '.join(found)}", hint=hint))
        return None
    if not found:
        options = {name for model in models.values() for name in model.model_fields}
        hints = [hint for key in spec if key not in options and (hint := did_you_mean(key, list(models)))]
        problems.append(Problem(path, "there is no selector", dict(spec), allowed=selectors, hint=" ".join(hints)))
        return None
    (key,) = found
    if depth >= MAX_DEPTH:
        problems.append(Problem(path, f"selectors are nested more than {MAX_DEPTH} deep"))
        return None

    def inner(value: object, at: str) -> Selector:
        chosen = choose(_NESTED, value, at, "a selector", problems, depth + 1)
        return SpecialSelector(special=True) if chosen is None else chosen  # a stand-in: its problem is told already

    value, at = spec[key], f"{path}.{key}"
    if key in ("any", "all"):
        if not isinstance(value, (list, tuple)):
            problems.append(Problem(at, "is a list of selectors", value))
            return None
        value = [inner(item, f"{at}[{index}]") for index, item in enumerate(value)]
    elif key == "not":
        value = inner(value, at)
    return validate(models[key], {**spec, key: value}, path, problems)


def walk(selector: Selector, path: str) -> Iterator[tuple[str, Selector]]:
    """`selector` and every one inside it, each with its YAML path."""
    yield path, selector
    if isinstance(selector, NotSelector):
        yield from walk(selector.not_, f"{path}.not")
    elif isinstance(selector, (AnySelector, AllSelector)):
        inside = selector.any if isinstance(selector, AnySelector) else selector.all
        for index, item in enumerate(inside):
            yield from walk(item, f"{path}.{selector.key}[{index}]")


def as_selector(config: Selector) -> Selector:
    """What a class selects, without the options that stand beside it."""
    model = _NESTED[config.key]
    return model(**{name: getattr(config, name) for name in model.model_fields})


def group_problems(classes: Mapping[str, Selector], path: str = "dwl.classes") -> Iterator[Problem]:
    """Groups that their pattern does not have."""
    for name, config in classes.items():
        for at, selector in walk(config, f"{path}.{name}"):
            if isinstance(selector, RegexSelector):
                compiled = regex.compile(selector.regex)
                known = set(range(compiled.groups + 1)) | set(compiled.groupindex)
                if selector.group not in known:
                    yield Problem(
                        f"{at}.group",
                        f"the pattern has {compiled.groups} group(s)",
                        selector.group,
                        allowed=", ".join(str(group) for group in sorted(known, key=str)),
                    )
