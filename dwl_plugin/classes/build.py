"""From the classes of a config and a tokenizer to a labeller.

Suffixes: V token ids.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import regex

from dwl_plugin.classes.keywords import Words
from dwl_plugin.classes.labeller import Labeller
from dwl_plugin.classes.masks import (
    TIME_LIMIT_S,
    AtTurnEnds,
    Between,
    Clock,
    InText,
    InVocabulary,
    Mask,
    NthTurn,
    OfRole,
    all_of,
    any_of,
    covers,
    negation,
)
from dwl_plugin.classes.role_headers import role_headers
from dwl_plugin.classes.selectors import (
    AddedSelector,
    AllSelector,
    AnySelector,
    BetweenSelector,
    NotSelector,
    PositionSelector,
    RegexSelector,
    RoleSelector,
    SelectorConfig,
    SpecialSelector,
    TokenIdsSelector,
    TokenRegexSelector,
    TokensSelector,
    TurnSelector,
    WordsSelector,
    walk,
)
from dwl_plugin.classes.token_bytes import TokenTable, added_ids, as_bytes, as_text, special_ids, vocabulary_size
from dwl_plugin.errors import ConfigError, DWLError, Problem
from dwl_plugin.values import REST, Overlap

__all__ = ["build_labeller"]

_WITHOUT_TEXT = (
    TokenIdsSelector,
    SpecialSelector,
    AddedSelector,
    TurnSelector,
    PositionSelector,
    AnySelector,
    AllSelector,
    NotSelector,
)
_TEXT_OF_ONE_TOKEN = (TokensSelector, TokenRegexSelector)


def build_labeller(
    classes: Mapping[str, SelectorConfig],
    tokenizer: Any,
    overlap: Overlap = "first",
    may_be_empty: Container[str] = (),
    *,
    marks_samples: bool = False,
) -> Labeller:
    """The labeller of some classes for one tokenizer.

    Args:
        classes: name -> selector, in priority order.
        tokenizer: fast or slow.
        overlap: first: a token is in the first class that matches it; sum: in every class that does.
        may_be_empty: names of the classes that need not have a token in the vocabulary.
        marks_samples: as for `Labeller`.

    Raises:
        ConfigError: every class that this tokenizer cannot serve, all at once.
    """
    kinds = [selector for config in classes.values() for _, selector in walk(config, "")]
    blank = TokenTable.blank(vocabulary_size(tokenizer))
    table = blank if all(isinstance(kind, _WITHOUT_TEXT) for kind in kinds) else _table(classes, tokenizer)
    selectors: dict[str, Mask] = {}
    problems: list[Problem] = []
    for name, config in classes.items():
        path = f"dwl.classes.{name}"
        making = _Making(table, tokenizer, name in may_be_empty)
        selector = making.selector(config, path)
        found = making.problems or ([] if making.allow_empty else _empty(path, selector))
        if overlap == "first":
            found = found or _shadowed(path, selector, selectors)
        selectors[name] = selector
        problems += found
    if problems:
        raise ConfigError(problems)
    lookup = np.full(table.size + 1, len(classes) if overlap == "first" else 0)
    for index, selector in reversed(list(enumerate(selectors.values()))):
        if isinstance(selector, InVocabulary):
            lookup[selector.member_V] = index if overlap == "first" else lookup[selector.member_V] | 1 << index
    if all(isinstance(kind, (*_WITHOUT_TEXT, *_TEXT_OF_ONE_TOKEN)) for kind in kinds):
        table = blank  # what one token says is in the look-up now
    return Labeller((*classes, REST), tuple(selectors.values()), lookup, table, overlap, marks_samples)


def _table(classes: Mapping[str, SelectorConfig], tokenizer: Any) -> TokenTable:
    """The tokenizer's bytes. Raises `ConfigError` with every class that needs them where they are not known."""
    try:
        return TokenTable.of(tokenizer)
    except DWLError as error:
        raise ConfigError(
            Problem(
                f"dwl.classes.{name}",
                f"needs the text of tokens, and {error}",
                hint="use the fast version of this tokenizer, or select by `token_ids`, `special`, `added`, `turn` or `position`",
            )
            for name, config in classes.items()
            if not all(isinstance(kind, _WITHOUT_TEXT) for _, kind in walk(config, ""))
        ) from None


class _Making:
    """The selector of one class; what the tokenizer cannot serve goes to `problems`."""

    def __init__(self, table: TokenTable, tokenizer: Any, allow_empty: bool) -> None:
        self.table, self.tokenizer, self.allow_empty = table, tokenizer, allow_empty
        self.problems: list[Problem] = []

    def selector(self, config: SelectorConfig, path: str) -> Mask:
        """The selector of `config`, which stands at `path` of the YAML."""
        match config:
            case TokenIdsSelector():
                return self._token_ids(config, path)
            case TokensSelector():
                return self._tokens(config, path)
            case TokenRegexSelector():
                return self._token_regex(config, path)
            case RegexSelector():
                return InText(f"{path}.regex", regex.compile(config.regex), config.group)
            case WordsSelector():
                return Words(frozenset(config.words), config.ignore_case)
            case BetweenSelector():
                open_tag, close_tag = map(as_bytes, config.between)
                return Between(open_tag, close_tag, config.include_delimiters)
            case TurnSelector():
                return NthTurn(1 if config.turn == "first" else -1 if config.turn == "last" else config.turn)
            case PositionSelector():
                return AtTurnEnds(config.position.first or 0, config.position.last or 0)
            case RoleSelector():
                return self._role(config, path)
            case SpecialSelector():
                return self._members(special_ids(self.tokenizer))
            case AddedSelector():
                return self._members(added_ids(self.tokenizer))
            case AnySelector():
                return any_of([self.selector(item, f"{path}.any[{n}]") for n, item in enumerate(config.any)])
            case AllSelector():
                return all_of([self.selector(item, f"{path}.all[{n}]") for n, item in enumerate(config.all)])
            case NotSelector():
                return negation(self.selector(config.not_, f"{path}.not"))
        raise AssertionError(config)

    def _members(self, ids: Iterable[int]) -> Mask:
        member_V = np.zeros(self.table.size + 1, np.bool_)
        member_V[list(ids)] = True
        return InVocabulary(member_V)

    def _token_ids(self, config: TokenIdsSelector, path: str) -> Mask:
        size = self.table.size
        member_V = np.zeros(size + 1, np.bool_)
        for index, item in enumerate(config.token_ids):
            first, _, last = str(item).partition("-")
            if int(last or first) >= size:
                self.problems.append(
                    Problem(
                        f"{path}.token_ids[{index}]",
                        "outside the tokenizer's vocabulary",
                        item,
                        allowed=f"0 to {size - 1:,}; the vocabulary has {size:,} ids",
                    )
                )
            else:
                member_V[int(first) : int(last or first) + 1] = True
        return InVocabulary(member_V)

    def _tokens(self, config: TokensSelector, path: str) -> Mask:
        table, tokenizer = self.table, self.tokenizer
        vocabulary = tokenizer.get_vocab()
        members: list[int] = []
        for index, text in enumerate(config.tokens):
            names = [name for name in (text, as_bytes(text)) if name in vocabulary]
            ids = table.ids_of(as_bytes(text)) or [vocabulary[name] for name in names]
            members += ids
            if ids:
                continue
            becomes = [table.spelling(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
            message = f"not one token of this tokenizer; it becomes {', '.join(repr(as_text(part)) for part in becomes)}"
            hint = "for a text of several tokens use `regex`, or `between`"
            if table.ids_of(as_bytes(f" {text}")):
                hint = f"did you mean {' ' + text!r}, with its space?"
            self.problems.append(Problem(f"{path}.tokens[{index}]", message, text, hint=hint))
        return self._members(members)

    def _token_regex(self, config: TokenRegexSelector, path: str) -> Mask:
        table, match = self.table, regex.compile(config.token_regex).fullmatch
        path = f"{path}.token_regex"
        clock = Clock()
        try:
            found = [match(text, timeout=clock.left(), concurrent=False) is not None for text in table.texts()]
        except (TimeoutError, MemoryError):
            message = f"too slow: the vocabulary takes more than {TIME_LIMIT_S:g} s, or more memory than there is"
            self.problems.append(Problem(path, message, config.token_regex, hint="the pattern backtracks: simplify it"))
            return self._members([])
        if not any(found) and not self.allow_empty:
            hint = "the pattern must match all of a token's text, and a word's token often begins with a space"
            message = f"matches none of the {table.size:,} tokens"
            self.problems.append(Problem(path, message, config.token_regex, hint=hint))
        return self._members(np.flatnonzero(found).tolist())

    def _role(self, config: RoleSelector, path: str) -> Mask:
        headers, why_not = role_headers(self.tokenizer, self.table)
        if config.role not in headers:
            self.problems.append(
                Problem(
                    f"{path}.role",
                    f"cannot be known from this tokenizer's chat template: {why_not[config.role]}",
                    config.role,
                    allowed=", ".join(headers),
                    hint="use `regex` or `between` with what stands around such messages",
                )
            )
            return self._members([])
        own = frozenset([headers[config.role]])
        return OfRole(frozenset(headers.values()), own)


def _empty(path: str, selector: Mask) -> list[Problem]:
    """A problem if no token of the vocabulary can be a member."""
    if not isinstance(selector, InVocabulary) or selector.member_V.any():
        return []
    return [Problem(path, f"selects none of the {len(selector.member_V) - 1:,} tokens of the vocabulary")]


def _shadowed(path: str, selector: Mask, earlier: Mapping[str, Mask]) -> list[Problem]:
    """A problem if earlier classes are known to claim every token of this one."""
    by: list[str] = []
    if isinstance(selector, InVocabulary):
        left_V = selector.member_V.copy()
        for other, claimed in earlier.items():
            if isinstance(claimed, InVocabulary) and (left_V & claimed.member_V).any():
                left_V &= ~claimed.member_V
                by.append(other)
        if left_V.any():
            by = []
    by = by or [other for other, claimed in earlier.items() if covers(claimed, selector)]
    if not by:
        return []
    names = " and ".join(f"`{other}`" for other in by)
    return [
        Problem(
            path,
            f"can never have a token: {names} above it takes them all",
            hint="the first class that matches wins; put the narrower class first",
        )
    ]
