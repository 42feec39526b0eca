"""Classes: a name, one selector, and what its tokens pay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from pydantic import Field

from dwl_plugin.config.selectors import (
    AddedSelector,
    AllSelector,
    AnySelector,
    BetweenSelector,
    NotSelector,
    PackSelector,
    PositionSelector,
    RegexSelector,
    RoleSelector,
    Selector,
    SpecialSelector,
    TokenIdsSelector,
    TokenRegexSelector,
    TokensSelector,
    TurnSelector,
    WordsSelector,
    choose,
)
from dwl_plugin.errors import Problem
from dwl_plugin.loss.token_losses import DFTConfig, EAFTConfig, FocalConfig, TokenLossName
from dwl_plugin.values import REST

__all__ = [
    "AddedClass",
    "AllClass",
    "AnyClass",
    "BetweenClass",
    "ClassConfig",
    "NotClass",
    "OneOfTheClasses",
    "PackClass",
    "PositionClass",
    "RegexClass",
    "RoleClass",
    "SpecialClass",
    "TokenIdsClass",
    "TokenRegexClass",
    "TokensClass",
    "TurnClass",
    "WordsClass",
    "as_class",
    "class_of",
    "may_be_empty",
    "name_problems",
]

_CLASS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class ClassConfig(Selector):
    """What every class may say beside its selector."""

    token_loss: TokenLossName | None = Field(
        None, description="What a token of this class pays: nll, dft, focal or eaft. Default: dwl.token_loss."
    )
    dft: DFTConfig | None = Field(None, description="Options of this class's dft token loss. Default: the top-level `dft`.")
    focal: FocalConfig | None = Field(None, description="Options of this class's focal token loss. Default: `dwl.focal`.")
    eaft: EAFTConfig | None = Field(None, description="Options of this class's eaft token loss. Default: `dwl.eaft`.")
    allow_empty: bool = Field(False, description="Do not stop when the class matches nothing in a sample of the data.")


class TokenIdsClass(ClassConfig, TokenIdsSelector):
    __doc__ = TokenIdsSelector.__doc__


class TokensClass(ClassConfig, TokensSelector):
    __doc__ = TokensSelector.__doc__


class TokenRegexClass(ClassConfig, TokenRegexSelector):
    __doc__ = TokenRegexSelector.__doc__


class RegexClass(ClassConfig, RegexSelector):
    __doc__ = RegexSelector.__doc__


class WordsClass(ClassConfig, WordsSelector):
    __doc__ = WordsSelector.__doc__


class BetweenClass(ClassConfig, BetweenSelector):
    __doc__ = BetweenSelector.__doc__


class TurnClass(ClassConfig, TurnSelector):
    __doc__ = TurnSelector.__doc__


class PositionClass(ClassConfig, PositionSelector):
    __doc__ = PositionSelector.__doc__


class RoleClass(ClassConfig, RoleSelector):
    __doc__ = RoleSelector.__doc__


class SpecialClass(ClassConfig, SpecialSelector):
    __doc__ = SpecialSelector.__doc__


class AddedClass(ClassConfig, AddedSelector):
    __doc__ = AddedSelector.__doc__


class PackClass(ClassConfig, PackSelector):
    __doc__ = PackSelector.__doc__


class AnyClass(ClassConfig, AnySelector):
    __doc__ = AnySelector.__doc__


class AllClass(ClassConfig, AllSelector):
    __doc__ = AllSelector.__doc__


class NotClass(ClassConfig, NotSelector):
    __doc__ = NotSelector.__doc__


OneOfTheClasses = (
    TokenIdsClass
    | TokensClass
    | TokenRegexClass
    | RegexClass
    | WordsClass
    | BetweenClass
    | TurnClass
    | PositionClass
    | RoleClass
    | SpecialClass
    | AddedClass
    | PackClass
    | AnyClass
    | AllClass
    | NotClass
)

_CLASSES: dict[str, type[ClassConfig]] = {model.key: model for model in OneOfTheClasses.__args__}


def class_of(spec: object, path: str, problems: list[Problem]) -> ClassConfig | None:
    """The class that a YAML mapping describes; what is wrong with it goes to `problems`."""
    if isinstance(spec, ClassConfig):
        return spec
    return choose(_CLASSES, spec, path, "a class", problems)


def as_class(selector: Selector, options: Mapping[str, object]) -> ClassConfig:
    """The class of a selector and the options beside it."""
    fields = {name: getattr(selector, name) for name in type(selector).model_fields}
    return _CLASSES[selector.key].model_validate({**fields, **options})


def may_be_empty(classes: Mapping[str, ClassConfig]) -> frozenset[str]:
    """Names of the classes that say `allow_empty: true`."""
    return frozenset(name for name, config in classes.items() if config.allow_empty)


def name_problems(classes: Mapping[object, object], path: str = "dwl.classes") -> Iterator[Problem]:
    """Names that are taken or that no log could hold."""
    for name in classes:
        if name == REST:
            yield Problem(f"{path}.{name}", f"`{REST}` is always the class of unclaimed tokens; choose another name")
        elif isinstance(name, str) and not _CLASS_NAME.fullmatch(name):
            yield Problem(path, "a class name is made of letters, digits and _", name)
