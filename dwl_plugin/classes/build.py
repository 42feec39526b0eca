"""From the selectors of some classes and a tokenizer to a labeller.

Suffixes: V token ids.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from dwl_plugin.classes.labeller import Labeller
from dwl_plugin.classes.masks import InVocabulary, Mask, MaskContext, covers
from dwl_plugin.classes.selectors import SelectorConfig, marks_in, walk
from dwl_plugin.classes.token_bytes import TokenTable, vocabulary_size
from dwl_plugin.errors import ConfigError, DWLError, Problem
from dwl_plugin.values import REST, Overlap

__all__ = ["build_labeller"]


def build_labeller(
    classes: Mapping[str, SelectorConfig],
    tokenizer: Any,
    overlap: Overlap = "first",
    may_be_empty: Container[str] = (),
    *,
    marks_samples: bool = False,
    reads_data: bool = False,
    power: float = 0.0,
    data_sets: tuple[str, ...] = (),
) -> Labeller:
    """The labeller of some classes for one tokenizer.

    Args:
        classes: name -> selector, in priority order.
        tokenizer: fast or slow.
        overlap: first: a token is in the first class that matches it; sum: in every class that does.
        may_be_empty: names of the classes that need not have a token in the vocabulary.
        marks_samples, reads_data, power: as for `Labeller`.
        data_sets: names of the data sets, as the host numbers them from 1.

    Raises:
        ConfigError: every class that this tokenizer cannot serve, all at once.
    """
    blank = TokenTable.blank(vocabulary_size(tokenizer))
    texts = {text for config in classes.values() for text in _texts(config)}
    table = blank if texts <= {"none"} else _table(classes, tokenizer)
    marks = marks_in(classes)
    masks: dict[str, Mask] = {}
    problems: list[Problem] = []
    for name, config in classes.items():
        path = f"dwl.classes.{name}"
        context = MaskContext(tokenizer, table, name in may_be_empty, marks, data_sets)
        mask = config.mask(context, path)
        found = context.problems
        if not found and not context.may_be_empty and isinstance(mask, InVocabulary) and not mask.member_V.any():
            found = [Problem(path, f"selects none of the {table.size:,} tokens of the vocabulary")]
        if not found and overlap == "first":
            found = _shadowed(path, mask, masks)
        problems += found
        masks[name] = mask
    ConfigError.raise_any(problems)
    lookup = np.full(table.size + 1, len(classes) if overlap == "first" else 0)
    for index, mask in reversed(list(enumerate(masks.values()))):
        if isinstance(mask, InVocabulary):
            lookup[mask.member_V] = index if overlap == "first" else lookup[mask.member_V] | 1 << index
    if "sample" not in texts:
        table = blank  # the texts of single tokens are in the look-up now
    return Labeller((*classes, REST), tuple(masks.values()), lookup, table, overlap, marks_samples, reads_data, power, data_sets)


def _texts(config: SelectorConfig) -> set[str]:
    """The texts that a selector and those inside it look at."""
    return {selector.text for _, selector in walk(config, "")}


def _table(classes: Mapping[str, SelectorConfig], tokenizer: Any) -> TokenTable:
    """The tokenizer's bytes. Raises `ConfigError` with every class that needs them where they are not known."""
    try:
        return TokenTable.of(tokenizer)
    except DWLError as error:
        message = f"needs the text of tokens, and {error}"
        hint = "use the fast version of this tokenizer, or select by `token_ids`, `special`, `added`, `turn` or `position`"
        blind = [name for name, config in classes.items() if _texts(config) != {"none"}]
        raise ConfigError(Problem(f"dwl.classes.{name}", message, hint=hint) for name in blind) from None


def _shadowed(path: str, mask: Mask, earlier: Mapping[str, Mask]) -> list[Problem]:
    """A problem if earlier classes are known to claim every token of this one."""
    by: list[str] = []
    if isinstance(mask, InVocabulary):
        left_V = mask.member_V.copy()
        for other, claimed in earlier.items():
            if isinstance(claimed, InVocabulary) and (left_V & claimed.member_V).any():
                left_V &= ~claimed.member_V
                by.append(other)
        if left_V.any():
            by = []
    by = by or [other for other, claimed in earlier.items() if covers(claimed, mask)]
    if not by:
        return []
    message = f"can never have a token: {' and '.join(f'`{name}`' for name in by)} above it takes them all"
    return [Problem(path, message, hint="the first class that matches wins; put the narrower class first")]
