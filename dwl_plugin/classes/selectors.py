"""Selectors: the ways to say which target tokens are meant. Each is a mapping with exactly one selector key.

A selector is a class when options stand beside it (`dwl_plugin/config/classes.py`), and stands without them inside `any`, `all`,
`not`. A new one is a model here and an entry in `SELECTORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
import regex
from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_serializer, model_validator
from pydantic_core import ValidationError

from dwl_plugin.classes import masks
from dwl_plugin.classes.masks import Mask, MaskContext
from dwl_plugin.classes.role_headers import Role, role_headers
from dwl_plugin.classes.token_bytes import added_ids, as_bytes, as_text, special_ids
from dwl_plugin.errors import Problem, closest, did_you_mean
from dwl_plugin.values import Mark, Pattern, Strict, Text, TokenId, Word, invalid, line_error
from dwl_plugin.yaml_text import as_flow

__all__ = [
    "SELECTORS",
    "AllSelector",
    "AnySelector",
    "Context",
    "DatasetSelector",
    "MarkedSelector",
    "PackSelector",
    "SelectorConfig",
    "as_selector",
    "marks_in",
    "one_of",
    "walk",
]

MAX_DEPTH = 16
"""How deep selectors may stand in each other; people need two or three."""


class SelectorConfig(Strict):
    """What every selector has beside its options."""

    key: ClassVar[str]
    """The key of a mapping that chooses this selector."""

    text: ClassVar[Literal["none", "token", "sample"]] = "none"
    """The text it looks at: none, that of one token, or that of a sample."""

    if_empty: ClassVar[str] = "only targets are classified; are these tokens masked in the labels, or dropped by the template?"
    """Where to look when no token of the data is selected."""

    def mask(self, context: MaskContext, path: str) -> Mask:
        """The callable that selects the tokens.

        Args:
            context: the tokenizer; its `problems` take what this tokenizer cannot serve.
            path: where the selector stands in the YAML.
        """
        raise AssertionError(self)  # `pack` is replaced while the config is parsed

    def inside(self) -> Sequence[tuple[str, SelectorConfig]]:
        """The selectors in this one, each with the end of its YAML path."""
        return ()


_Model = TypeVar("_Model", bound=SelectorConfig)


class PackSource(Protocol):
    """Where `pack:` is looked up."""

    def checked(self, pack: object) -> object:
        """`pack` if it names a pack; else raises what a validator raises."""

    def expanded(self, config: PackSelector) -> SelectorConfig:
        """What stands for `pack:`; a class for a class."""


@dataclass(frozen=True)
class Context:
    """What validation carries from a selector to those inside it. Without a source of packs, `pack:` stays as it is."""

    packs: PackSource | None = None
    depth: int = 0
    cross_checks: bool = True
    """False where only single fields are checked, see `Strict.cross_errors`."""


def _choose(models: Mapping[str, type[_Model]], noun: str, value: object, info: ValidationInfo) -> _Model:
    """The model of a mapping, by its one selector key, before its options are looked at: a typo gives one error."""
    if isinstance(value, SelectorConfig):
        return value  # type: ignore[return-value]
    selectors = ", ".join(models)
    if value is None or value == {}:
        raise invalid(f"is empty, and {noun} has one selector", selectors, hint="its selector stands further in", write=_EXAMPLE)
    if not isinstance(value, Mapping):
        raise invalid(f"{noun} is a mapping with one selector", selectors, write=_meant_by(value, models))
    found = [key for key in models if key in value]
    if len(found) > 1:
        one_each = [{key: value[key]} for key in value if key in found]
        both = {"any": one_each} | {key: value[key] for key in value if key not in found}
        hint = "which takes tokens of either (`all`: of both); or make them two classes"
        raise invalid(f"{noun} has one selector, this one has {' and '.join(found)}", hint=hint, write=both)
    if not found:
        options = {name for model in models.values() for name in model.model_fields}
        typos = {key: near for key in value if key not in options and (near := _OTHER_WORDS.get(key) or closest(key, list(models)))}
        meant = {typos.get(key, key): item for key, item in value.items()}
        if typos:
            raise invalid("there is no selector", selectors, write=meant)
        raise invalid("there is no selector", selectors, hint=f"such as `{as_flow(_EXAMPLE)}`")
    context = info.context or Context()
    if context.depth >= MAX_DEPTH:
        raise invalid(f"selectors are nested more than {MAX_DEPTH} deep")
    (key,) = found
    if key in ("any", "all") and not isinstance(value[key], (list, tuple)):
        raise ValidationError.from_exception_data(key, [line_error([key], "is a list of selectors", value[key])])
    config = models[key].model_validate(value, context=replace(context, depth=context.depth + 1))
    if context.packs is not None and isinstance(config, PackSelector):
        return context.packs.expanded(config)  # type: ignore[return-value]
    return config


_EXAMPLE = {"regex": r"\d+"}
_OTHER_WORDS = {"mark": "marked", "pattern": "regex", "re": "regex", "token": "tokens", "word": "words", "keywords": "words"}
"""What people write for a selector."""


def _meant_by(value: object, models: Mapping[str, Any]) -> dict[str, Any]:
    """The selector that a text stands for: `regex:'x'` has no blank after its colon; else it is taken for a pattern."""
    if not isinstance(value, str):
        return _EXAMPLE
    key, colon, rest = value.partition(":")
    if colon and key in models and rest:
        return {key: rest.strip("'\"")}
    return {"regex": value}


def _exclusive(schema: dict[str, Any]) -> None:
    """Each model has a key of its own, and none allows another's."""
    schema["oneOf"] = schema.pop("anyOf")


def one_of(models: Mapping[str, type[_Model]], noun: str) -> Any:
    """The annotation of a field that holds one of `models`."""
    choice = BeforeValidator(partial(_choose, models, noun))
    return Annotated[reduce(or_, models.values()), choice, Field(json_schema_extra=_exclusive)]


if TYPE_CHECKING:
    NestedSelector = SelectorConfig


class TokenIdsSelector(SelectorConfig):
    """Tokens by id."""

    key = "token_ids"
    token_ids: tuple[TokenId, ...] = Field(min_length=1, description='Ids and ranges with both ends in, e.g. `[11, "100-199"]`.')

    def mask(self, context: MaskContext, path: str) -> Mask:
        size = context.table.size
        ids: list[int] = []
        for index, item in enumerate(self.token_ids):
            first, _, last = str(item).partition("-")
            if int(last or first) < size:
                ids += range(int(first), int(last or first) + 1)
            else:
                allowed = f"0 to {size - 1:,}; the vocabulary has {size:,} ids"
                message = "outside the tokenizer's vocabulary"
                context.problems.append(Problem(f"{path}.token_ids[{index}]", message, item, allowed))
        return context.look_up(ids)


class TokensSelector(SelectorConfig):
    """Tokens by their string; each must be exactly one token of the tokenizer."""

    key = "tokens"
    text = "token"
    tokens: tuple[Text, ...] = Field(min_length=1, description='Token strings, e.g. `["<|im_end|>"]`.')

    def mask(self, context: MaskContext, path: str) -> Mask:
        table, tokenizer = context.table, context.tokenizer
        vocabulary = tokenizer.get_vocab()
        members: list[int] = []
        for index, text in enumerate(self.tokens):
            named = [vocabulary[name] for name in (text, as_bytes(text)) if name in vocabulary]
            ids = table.ids_of(as_bytes(text)) or named
            members += ids
            if ids:
                continue
            parts = [as_text(table.spelling(token_id)) for token_id in tokenizer.encode(text, add_special_tokens=False)]
            message = f"not one token of this tokenizer; it becomes {', '.join(map(repr, parts))}"
            pattern = as_flow({"regex": regex.escape(text)})
            hint = f"for a text of several tokens write `{pattern[1:-1]}` in place of `tokens`; for a span `between`"
            if table.ids_of(as_bytes(f" {text}")):
                hint = f"did you mean {' ' + text!r}, with its space?"
            context.problems.append(Problem(f"{path}.tokens[{index}]", message, text, hint=hint))
        return context.look_up(members)


class TokenRegexSelector(SelectorConfig):
    """Tokens whose own text matches a pattern in full."""

    key = "token_regex"
    text = "token"
    if_empty = "the pattern must match all of one token's text; for text over several tokens use `regex`."
    token_regex: Pattern = Field(description="A pattern that must match the whole of one token's text, e.g. `'\\s?\\d+'`.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        table, match, clock = context.table, regex.compile(self.token_regex).fullmatch, masks.Clock()
        try:
            found = [match(text, timeout=clock.left(), concurrent=False) is not None for text in table.texts()]
            message = "" if context.may_be_empty or any(found) else f"matches none of the {table.size:,} tokens"
            hint = "the pattern must match all of a token's text, and a word's token often begins with a space"
        except (TimeoutError, MemoryError):
            found, hint = [], "the pattern backtracks: simplify it"
            message = f"too slow: the vocabulary takes more than {masks.TIME_LIMIT_S:g} s, or more memory than there is"
        if message:
            context.problems.append(Problem(f"{path}.token_regex", message, self.token_regex, hint=hint))
        return context.look_up(np.flatnonzero(found).tolist())


class RegexSelector(SelectorConfig):
    """Tokens that overlap a match in the decoded text of a turn."""

    key = "regex"
    text = "sample"
    if_empty = "a pattern sees the targets of one turn, without special tokens; `^` and `$` are its ends."
    regex: Pattern = Field(description="A pattern that is searched in the decoded text of each turn, e.g. `'####\\s*(.+)$'`.")
    group: int | str = Field(0, description="The group of the match that counts; 0 is the whole match.")

    @field_validator("group")
    @classmethod
    def _of_the_pattern(cls, group: int | str, info: ValidationInfo) -> int | str:
        compiled = regex.compile(info.data.get("regex", ""))
        known = {*range(compiled.groups + 1), *compiled.groupindex}
        if "regex" in info.data and group not in known:
            raise invalid(f"the pattern has {compiled.groups} group(s)", ", ".join(str(name) for name in sorted(known, key=str)))
        return group

    def mask(self, context: MaskContext, path: str) -> Mask:
        return masks.InText(f"{path}.regex", regex.compile(self.regex), self.group)


class WordsSelector(SelectorConfig):
    """Tokens that overlap one of many keywords, as whole words, in the decoded text of a turn."""

    key = "words"
    text = "sample"
    words: tuple[Word, ...] = Field(min_length=1, description="Keywords, thousands if need be, e.g. `[therefore, New York]`.")
    ignore_case: bool = Field(False, description="Compare letters without regard to case.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        return masks.Words(frozenset(self.words), self.ignore_case)


def _pair(value: object) -> object:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, (list, tuple)) or len(given) == 2:
        return value
    first = given[0] if given and isinstance(given[0], str) else "<think>"
    close = f"</{first[1:]}" if first.startswith("<") and not first.startswith("<|") else "…"
    raise invalid("is a list of two texts, the opening and the closing one", write=[first, close])


class BetweenSelector(SelectorConfig):
    """Tokens in the span from an opening to a closing delimiter; an unclosed span ends with the sample."""

    key = "between"
    text = "sample"
    if_empty = "only targets between the delimiters count, and a chat template may drop what is between them."
    between: Annotated[tuple[Text, Text], BeforeValidator(_pair)] = Field(
        description='Opening and closing delimiter, e.g. `["<think>", "</think>"]`.'
    )
    include_delimiters: bool = Field(True, description="Count the delimiters themselves as members.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        open_tag, close_tag = map(as_bytes, self.between)
        return masks.Between(open_tag, close_tag, self.include_delimiters)


def _turn(value: object) -> object:
    if value in ("first", "last") or (isinstance(value, int) and not isinstance(value, bool) and value != 0):
        return value
    raise invalid("not a turn: write `first`, `last`, or its number, 1 for the first, -1 for the last")


class TurnSelector(SelectorConfig):
    """Tokens of the n-th turn: a turn is a contiguous run of targets in a sample."""

    key = "turn"
    turn: Annotated[Literal["first", "last"] | int, BeforeValidator(_turn)] = Field(
        description="`first`, `last`, or a number: 1 is the first turn, 2 the second, −1 the last."
    )

    def mask(self, context: MaskContext, path: str) -> Mask:
        return masks.NthTurn(1 if self.turn == "first" else -1 if self.turn == "last" else self.turn)


class TurnEnds(Strict):
    """How many tokens at each end of a turn."""

    first: int | None = Field(None, ge=1, description="So many tokens at the beginning of each turn.")
    last: int | None = Field(None, ge=1, description="So many tokens at the end of each turn.")

    @model_validator(mode="after")
    def _some(self) -> TurnEnds:
        if self.first is None and self.last is None:
            raise invalid("says nothing: give `first`, `last`, or both, a number of tokens")
        return self


class PositionSelector(SelectorConfig):
    """The first and last tokens of each turn: a turn is a contiguous run of targets in a sample."""

    key = "position"
    position: TurnEnds = Field(description="E.g. `{last: 32}`, or `{first: 8, last: 8}`.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        return masks.AtTurnEnds(self.position.first or 0, self.position.last or 0)


class RoleSelector(SelectorConfig):
    """Tokens of the messages of one role, by the headers of the tokenizer's chat template."""

    key = "role"
    text = "sample"
    if_empty = "roles are known by the headers of the tokenizer's chat template; was the data made with another one?"
    role: Role = Field(description="Whose messages, their headers and the ends of their turns included.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        headers = role_headers(context.tokenizer, context.table)
        if self.role in headers.known:
            return masks.OfRole(headers.pattern(), headers.of(self.role))
        message = f"cannot be known from this tokenizer's chat template: {headers.why_not[self.role]}"
        hint = "use `regex` or `between` with what stands around such messages"
        context.problems.append(Problem(f"{path}.role", message, self.role, ", ".join(headers.known), hint))
        return context.look_up([])


def _yes(value: object) -> object:
    if value is not True:
        raise invalid("is written with `true`; for the other tokens use `not`")
    return value


class SpecialSelector(SelectorConfig):
    """Tokens that the tokenizer calls special."""

    key = "special"
    special: Annotated[Literal[True], BeforeValidator(_yes)] = Field(description="For all others: `not: {special: true}`.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        return context.look_up(special_ids(context.tokenizer))


class AddedSelector(SelectorConfig):
    """Tokens that were added to the tokenizer's vocabulary, special or not."""

    key = "added"
    added: Annotated[Literal[True], BeforeValidator(_yes)] = Field(description="For all others: `not: {added: true}`.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        return context.look_up(added_ids(context.tokenizer))


class PackSelector(SelectorConfig):
    """Tokens of a pack's classes, or of one of them; replaced by the pack's selectors while the config is parsed."""

    key = "pack"
    pack: str = Field(description="A pack by its name, file or address on the Hub; `.member` after it for one class.")

    @field_validator("pack", mode="before")
    @classmethod
    def _exists(cls, pack: object, info: ValidationInfo) -> object:
        packs = (info.context or Context()).packs
        return pack if packs is None else packs.checked(pack)


class MarkedSelector(SelectorConfig):
    """Tokens that the data marks: those of a row, a message or a content part with `mark: <name>`."""

    key = "marked"
    if_empty = "no row, message, part or token of the data has this `mark`."
    marked: Mark = Field(description="The name, or the number, that stands under `mark` in the data.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        return masks.Marked(context.marks.index(self.marked))


class DatasetSelector(SelectorConfig):
    """Tokens of the rows of one data set."""

    key = "dataset"
    if_empty = "no row that was looked at came from this data set."
    dataset: Text = Field(description="The `name` of an entry of `datasets`, or its path where no other has it.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        if self.dataset in context.data_sets:
            return masks.FromDataSet(context.data_sets.index(self.dataset) + 1)
        known = context.data_sets
        message = "no such data set" if known else "nothing here tells which data set a row is from"
        hint = did_you_mean(self.dataset, known) if known else "mark its rows: `mark: <name>` in each, and `marked: <name>` here"
        context.problems.append(Problem(f"{path}.dataset", message, self.dataset, ", ".join(known), hint))
        return masks.FromDataSet(0)


class _SeveralSelectors(SelectorConfig):
    joined: ClassVar[type[masks.AnyOf | masks.AllOf]]

    def mask(self, context: MaskContext, path: str) -> Mask:
        return self.joined.of([selector.mask(context, path + at) for at, selector in self.inside()])

    def inside(self) -> Sequence[tuple[str, SelectorConfig]]:
        return [(f".{self.key}[{index}]", selector) for index, selector in enumerate(getattr(self, self.key))]


class AnySelector(_SeveralSelectors):
    """Tokens that at least one of the selectors selects."""

    key = "any"
    joined = masks.AnyOf
    any: tuple[NestedSelector, ...] = Field(min_length=1, description="E.g. `[{turn: last}, {regex: '####.*'}]`.")


class AllSelector(_SeveralSelectors):
    """Tokens that every one of the selectors selects."""

    key = "all"
    joined = masks.AllOf
    all: tuple[NestedSelector, ...] = Field(min_length=1, description="E.g. `[{turn: last}, {pack: numbers.number}]`.")


class NotSelector(SelectorConfig):
    """Target tokens that the selector does not select."""

    key = "not"
    model_config = ConfigDict(populate_by_name=True)
    not_: NestedSelector = Field(alias="not", description="E.g. `{between: ['<think>', '</think>']}`.")

    def mask(self, context: MaskContext, path: str) -> Mask:
        mask = self.not_.mask(context, f"{path}.not")
        return masks.InVocabulary(~mask.member_V) if isinstance(mask, masks.InVocabulary) else masks.Not(mask)

    def inside(self) -> Sequence[tuple[str, SelectorConfig]]:
        return [(".not", self.not_)]

    @model_serializer(mode="wrap")
    def _as_written(self, handler: Callable[[NotSelector], dict[str, Any]]) -> dict[str, Any]:
        """`not`, also where a host dumps by field name."""
        return {"not" if name == "not_" else name: value for name, value in handler(self).items()}


SELECTORS: dict[str, type[SelectorConfig]] = {
    model.key: model
    for model in (
        TokenIdsSelector,
        TokensSelector,
        TokenRegexSelector,
        RegexSelector,
        WordsSelector,
        BetweenSelector,
        TurnSelector,
        PositionSelector,
        RoleSelector,
        SpecialSelector,
        AddedSelector,
        MarkedSelector,
        DatasetSelector,
        PackSelector,
        AnySelector,
        AllSelector,
        NotSelector,
    )
}
"""By the key that a YAML has for it."""

if not TYPE_CHECKING:
    NestedSelector = one_of(SELECTORS, "a selector")
    for _model in (AnySelector, AllSelector, NotSelector):
        _model.model_rebuild()


def walk(selector: SelectorConfig, path: str) -> Iterator[tuple[str, SelectorConfig]]:
    """Yield `selector` and every one inside it, each with its YAML path."""
    yield path, selector
    for at, item in selector.inside():
        yield from walk(item, path + at)


def marks_in(classes: Mapping[str, SelectorConfig]) -> tuple[str, ...]:
    """Names of the marks that classes ask for, in the order of their bits."""
    asked = (selector for config in classes.values() for _, selector in walk(config, ""))
    return tuple(sorted({selector.marked for selector in asked if isinstance(selector, MarkedSelector)}))


def as_selector(config: SelectorConfig) -> SelectorConfig:
    """What a class selects, without the options that stand beside it."""
    model = SELECTORS[config.key]
    return model(**{name: getattr(config, name) for name in model.model_fields})
