"""From the classes of a config to a class index for every target token.

Classes are numbered in their order, which is their priority, and `rest` comes last: a token's class is the smallest
number among the selectors that match it. Token selectors are folded into one look-up table when the labeller is built.

Suffixes: V token ids, T tokens, B rows of a batch, S samples, K classes without `rest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import regex

from dwl_plugin.classes.selectors import TIME_LIMIT_S, Between, InText, InVocabulary, Samples, Selector
from dwl_plugin.classes.token_table import Bools, Ints, TokenTable, as_bytes, as_text, vocabulary_size
from dwl_plugin.config import (
    IGNORE_INDEX,
    REST,
    BetweenClass,
    ClassConfig,
    RegexClass,
    TokenIdsClass,
    TokenRegexClass,
    TokensClass,
)
from dwl_plugin.errors import ConfigError, DWLError, Problem

__all__ = ["IGNORE_INDEX", "ClassSurvey", "Labeller", "build_labeller", "empty_class_problems", "survey"]


@dataclass(frozen=True, eq=False)
class Labeller:
    """Class indices of samples. Picklable; made by `build_labeller`.

    Args:
        names: classes in priority order, then `rest`.
        selectors: one per class without `rest`.
        lookup: (V + 1,) the first class among the token selectors; `rest` where there is none.
        table: the tokenizer's bytes; blank where no class looks at text.
    """

    names: tuple[str, ...]
    selectors: tuple[Selector, ...]
    lookup: Ints
    table: TokenTable

    @cached_property
    def needs_text(self) -> bool:
        """True where a class depends on more than the token itself."""
        return not all(isinstance(selector, InVocabulary) for selector in self.selectors)

    def __call__(self, input_ids: Any, labels: Any) -> Ints:
        """Class index of each target of one sample, -100 elsewhere.

        Args:
            input_ids: (T,) token ids; a list, an array or a tensor.
            labels: (T,) -100 where the token is no target; not shifted.

        Returns:
            (T,) int64, an index into `names` or -100.

        Raises:
            PatternTooSlowError: a pattern backtracks on this sample.
        """
        ids_T, target_T = _pair(input_ids, labels)
        return self._classify(ids_T, target_T, np.zeros(1, np.int64))

    def label_batch(
        self, input_ids: Any, labels: Any, position_ids: Any = None, attention_mask: Any = None, *, packed: bool = False
    ) -> Ints:
        """Class indices of a batch that is already collated; padding and neighbours in a row change nothing.

        Args:
            input_ids: (B, T) token ids.
            labels: (B, T) -100 where the token is no target; not shifted.
            position_ids: (B, T); a sample begins where they do not increase.
            attention_mask: (B, T); 0 is padding, and a row may number its samples 1, 2, 3, ...
            packed: rows may hold several samples.

        Returns:
            (B, T) int64, an index into `names` or -100.

        Raises:
            DWLError: `packed`, a class looks at text, and nothing tells where samples begin.
            PatternTooSlowError: a pattern backtracks on a sample.
        """
        ids_BT, target_BT = _pair(input_ids, labels)
        mask_BT, position_BT = _aligned(attention_mask, ids_BT), _aligned(position_ids, ids_BT)
        kept_BT = np.ones(ids_BT.shape, np.bool_) if mask_BT is None else mask_BT != 0
        numbered = mask_BT is not None and mask_BT.max(initial=0) > 1
        if packed and self.needs_text and position_BT is None and not numbered:
            raise DWLError(
                "[dwl] classes by `regex` and `between` end where a sample ends, and this batch does not say where "
                "that is: its rows are packed, and it has neither (batch, tokens) `position_ids` nor an "
                "`attention_mask` that numbers the samples. Turn packing off, or select by `token_ids`, `tokens` or "
                "`token_regex`."
            )
        first_BT = _sample_starts(ids_BT, position_BT)
        if mask_BT is not None:
            first_BT[:, 1:] |= mask_BT[:, 1:] != mask_BT[:, :-1]
        classes_BT = np.full(ids_BT.shape, IGNORE_INDEX, np.int64)
        classes_BT[kept_BT] = self._classify(ids_BT[kept_BT], target_BT[kept_BT], np.flatnonzero(first_BT[kept_BT]))
        return classes_BT

    def members(self, input_ids: Any, labels: Any, position_ids: Any = None) -> Bools:
        """(K, T) True where a target matches a class, whatever the priority; samples begin as in `label_batch`."""
        ids_T, target_T = _pair(input_ids, labels)
        matches_KT = np.zeros((len(self.selectors), len(ids_T)), np.bool_)
        if target_T.any():
            starts_S = np.flatnonzero(_sample_starts(ids_T, position_ids))
            samples = Samples(self.table, self._known(ids_T), target_T, starts_S)
            for matches_T, selector in zip(matches_KT, self.selectors, strict=True):
                np.logical_and(selector(samples), target_T, out=matches_T)
        return matches_KT

    def _known(self, ids: Ints) -> Ints:
        """Ids outside the vocabulary become V; as unsigned numbers the negative ones are large, too."""
        return np.minimum(ids.view(np.uint64), len(self.lookup) - 1).view(np.int64)

    def _classify(self, ids_T: Ints, target_T: Bools, starts_S: Ints) -> Ints:
        ids_T = self._known(ids_T)
        classes_T = self.lookup[ids_T]
        if self.needs_text and target_T.any():
            samples = Samples(self.table, ids_T, target_T, starts_S)
            for index, selector in enumerate(self.selectors):
                if not isinstance(selector, InVocabulary):
                    np.minimum(classes_T, index, out=classes_T, where=selector(samples))
        return np.where(target_T, classes_T, IGNORE_INDEX)


def _pair(input_ids: Any, labels: Any) -> tuple[Ints, Bools]:
    ids, target = _ints(input_ids), _ints(labels) != IGNORE_INDEX
    if ids.shape != target.shape:
        raise DWLError(f"[dwl] input_ids {ids.shape} and labels {target.shape} have to be of one shape")
    return ids, target


def _ints(values: Any) -> Ints:
    return np.asarray(values.cpu() if hasattr(values, "cpu") else values, np.int64)


def _aligned(values: Any, ids: Ints) -> Ints | None:
    """`values` if they have one number per token; 3-D position ids and 4-D masks tell nothing that is used here."""
    array = None if values is None else _ints(values)
    return array if array is not None and array.shape == ids.shape else None


def _sample_starts(ids: Ints, position_ids: Any) -> Bools:
    """True at the first token of each row, and where positions stop increasing."""
    starts = np.zeros(ids.shape, np.bool_)
    starts[..., :1] = True
    positions = _aligned(position_ids, ids)
    if positions is not None:
        starts[..., 1:] |= positions[..., 1:] <= positions[..., :-1]
    return starts


def build_labeller(classes: Mapping[str, ClassConfig], tokenizer: Any) -> Labeller:
    """The labeller of a config's classes for one tokenizer.

    Raises:
        ConfigError: every class that this tokenizer cannot serve, all at once.
        DWLError: a class needs text, and the tokenizer does not tell the bytes of its tokens.
    """
    by_id = all(isinstance(config, TokenIdsClass) for config in classes.values())
    table = TokenTable.blank(vocabulary_size(tokenizer)) if by_id else TokenTable.of(tokenizer)
    selectors: dict[str, Selector] = {}
    problems: list[Problem] = []
    for name, config in classes.items():
        found: list[Problem] = []
        selector = _SELECT[type(config)](config, f"dwl.classes.{name}", table, tokenizer, found)
        found = found or _shadowed(name, selector, selectors)
        selectors[name] = selector
        problems += found
    if problems:
        raise ConfigError(problems)
    lookup = np.full(table.size + 1, len(classes))
    for index, selector in reversed(list(enumerate(selectors.values()))):
        if isinstance(selector, InVocabulary):
            lookup[selector.member] = index
    labeller = Labeller((*classes, REST), tuple(selectors.values()), lookup, table)
    return labeller if labeller.needs_text else replace(labeller, table=TokenTable.blank(table.size))


def _token_ids(config: TokenIdsClass, path: str, table: TokenTable, _: Any, problems: list[Problem]) -> Selector:
    member_V = np.zeros(table.size + 1, np.bool_)
    for index, item in enumerate(config.token_ids):
        first, _, last = str(item).partition("-")
        if int(last or first) >= table.size:
            allowed = f"0 to {table.size - 1:,}; the vocabulary has {table.size:,} ids"
            problems.append(Problem(f"{path}.token_ids[{index}]", "outside the tokenizer's vocabulary", item, allowed))
        else:
            member_V[int(first) : int(last or first) + 1] = True
    return InVocabulary(member_V)


def _tokens(config: TokensClass, path: str, table: TokenTable, tokenizer: Any, problems: list[Problem]) -> Selector:
    member_V = np.zeros(table.size + 1, np.bool_)
    vocabulary = tokenizer.get_vocab()
    for index, text in enumerate(config.tokens):
        names = [name for name in (text, as_bytes(text)) if name in vocabulary]
        ids = table.ids_of(as_bytes(text)) or [vocabulary[name] for name in names]
        if ids:
            member_V[ids] = True
            continue
        becomes = [table.spelling(token_id) for token_id in tokenizer.encode(text, add_special_tokens=False)]
        message = f"not one token of this tokenizer; it becomes {', '.join(repr(as_text(part)) for part in becomes)}"
        hint = "for a text of several tokens use `regex`, or `between`"
        if table.ids_of(as_bytes(f" {text}")):
            hint = f"did you mean {' ' + text!r}, with its space?"
        problems.append(Problem(f"{path}.tokens[{index}]", message, text, hint=hint))
    return InVocabulary(member_V)


def _token_regex(config: TokenRegexClass, path: str, table: TokenTable, _: Any, problems: list[Problem]) -> Selector:
    member_V = np.zeros(table.size + 1, np.bool_)
    match = regex.compile(config.token_regex).fullmatch
    path = f"{path}.token_regex"
    try:
        member_V[:-1] = [match(text, timeout=TIME_LIMIT_S, concurrent=False) is not None for text in table.texts()]
    except TimeoutError:
        problems.append(Problem(path, f"took more than {TIME_LIMIT_S:g} s on one token", config.token_regex))
        return InVocabulary(member_V)
    if not member_V.any() and not config.allow_empty:
        hint = "the pattern must match all of a token's text, and a word's token often begins with a space"
        problems.append(Problem(path, f"matches none of the {table.size:,} tokens", config.token_regex, hint=hint))
    return InVocabulary(member_V)


def _regex(config: RegexClass, path: str, *_: Any) -> Selector:
    return InText(f"{path}.regex", regex.compile(config.regex), config.group)


def _between(config: BetweenClass, *_: Any) -> Selector:
    opening, closing = config.between
    return Between(as_bytes(opening), as_bytes(closing), config.include_delimiters)


_SELECT: dict[type[ClassConfig], Callable[..., Selector]] = {
    TokenIdsClass: _token_ids,
    TokensClass: _tokens,
    TokenRegexClass: _token_regex,
    RegexClass: _regex,
    BetweenClass: _between,
}


def _shadowed(name: str, selector: Selector, earlier: Mapping[str, Selector]) -> list[Problem]:
    """A problem if earlier classes are known to claim every token of this one."""
    if isinstance(selector, InVocabulary):
        left_V = selector.member.copy()
        by = []
        for other, claimed in earlier.items():
            if isinstance(claimed, InVocabulary) and (left_V & claimed.member).any():
                left_V &= ~claimed.member
                by.append(other)
        hidden = bool(by) and not left_V.any()
    else:
        by = [other for other, claimed in earlier.items() if _covers(claimed, selector)]
        hidden = bool(by)
    if not hidden:
        return []
    names = " and ".join(f"`{other}`" for other in by)
    return [Problem(f"dwl.classes.{name}", f"can never have a token: {names} above it takes them all",
                    hint="the first class that matches wins; put the narrower class first")]  # fmt: skip


def _covers(wider: Selector, selector: Selector) -> bool:
    """True where two text selectors are so alike that the first takes all of the second."""
    if isinstance(wider, InText) and isinstance(selector, InText):
        return wider.pattern == selector.pattern and wider.group in (0, selector.group)
    if isinstance(wider, Between) and isinstance(selector, Between):
        return wider in (selector, replace(selector, include_delimiters=True))
    return False


@dataclass(frozen=True)
class ClassSurvey:
    """What the classes found in some samples.

    Args:
        names: classes in priority order, then `rest`.
        tokens: targets of each class.
        matches: targets that each selector matches before priority; for `rest`, its tokens.
        rows_without: rows without a token of the class.
        rows: rows looked at.
        targets: targets looked at.
    """

    names: tuple[str, ...]
    tokens: tuple[int, ...]
    matches: tuple[int, ...]
    rows_without: tuple[int, ...]
    rows: int
    targets: int


def survey(labeller: Labeller, samples: Iterable[Mapping[str, Any]]) -> ClassSurvey:
    """Count the classes in samples, each a mapping with `input_ids`, `labels` and perhaps `position_ids` of (T,)."""
    count = len(labeller.names)
    tokens_C, matches_C, without_C = np.zeros((3, count), np.int64)
    rows = 0
    for sample in samples:
        members_KT = labeller.members(sample["input_ids"], sample["labels"], sample.get("position_ids"))
        claimed_KT = members_KT & (np.cumsum(members_KT, axis=0) == 1)
        targets = np.count_nonzero(_ints(sample["labels"]) != IGNORE_INDEX)
        in_class_C = np.append(claimed_KT.sum(1), targets - claimed_KT.sum())
        tokens_C += in_class_C
        matches_C += np.append(members_KT.sum(1), in_class_C[-1])
        without_C += in_class_C == 0
        rows += 1
    return ClassSurvey(
        names=labeller.names,
        tokens=tuple(tokens_C.tolist()),
        matches=tuple(matches_C.tolist()),
        rows_without=tuple(without_C.tolist()),
        rows=rows,
        targets=int(tokens_C.sum()),
    )


def empty_class_problems(found: ClassSurvey, classes: Mapping[str, ClassConfig]) -> list[Problem]:
    """One problem for each class without a token that does not say `allow_empty: true`."""
    if found.rows and not found.targets:
        message = f"there is nothing to classify: no target token in the {found.rows:,} rows looked at"
        hint = "every label is -100; look at the dataset's type and at `train_on_inputs`"
        return [Problem("dwl.classes", message, hint=hint)]
    return [
        Problem(f"dwl.classes.{name}", _emptiness(found, matches), hint=_where_to_look(config, matches))
        for (name, config), tokens, matches in zip(classes.items(), found.tokens, found.matches, strict=False)
        if tokens == 0 and not config.allow_empty
    ]


def _emptiness(found: ClassSurvey, matches: int) -> str:
    looked = f"looked at {found.targets:,} target tokens in {found.rows:,} rows"
    if matches:
        return f"has no token: classes above it take all {matches:,} that it matches ({looked})"
    return f"matches nothing ({looked})"


def _where_to_look(config: ClassConfig, matches: int) -> str:
    if matches:
        return "the first class that matches wins; move this class up, or write `allow_empty: true`"
    if isinstance(config, BetweenClass):
        where = "only targets between the delimiters count, and a chat template may drop what is between them."
    elif isinstance(config, RegexClass):
        where = "a pattern sees the targets of one turn, without special tokens; `^` and `$` are its ends."
    elif isinstance(config, TokenRegexClass):
        where = "the pattern must match all of one token's text; for text over several tokens use `regex`."
    else:
        where = "only targets are classified; are these tokens masked in the labels?"
    return f"{where} If the class may be empty, write `allow_empty: true`"
