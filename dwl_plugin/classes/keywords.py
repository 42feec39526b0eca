"""Thousands of keywords in one pass: every word of the text is looked up in a dictionary of their first words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import regex

from dwl_plugin.classes.samples import Samples
from dwl_plugin.classes.token_bytes import Bools

__all__ = ["Words"]

_WORD = regex.compile(r"\w+")
_INSIDE_WORD = regex.compile(r"(?<=\w)\w")


@dataclass(frozen=True)
class Words:
    """`words`: tokens that overlap a keyword. A keyword begins where a word begins, and ends inside no word.

    A word is a run of `\\w`. Letters are compared as they are, or by Unicode's case folding, where that of a letter is
    one letter.
    """

    words: frozenset[str]
    ignore_case: bool = False

    def __call__(self, samples: Samples) -> Bools:
        return samples.in_text([list(self._spans(text)) for text in samples.pieces.texts])

    def contains(self, words: Iterable[str]) -> bool:
        """True if each of `words` is one of these, case folded where this folds it."""
        return set(map(self._fold, words)) <= set(map(self._fold, self.words))

    def _spans(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of every keyword in a text, in characters."""
        folded, by_first_word = self._fold(text), self._by_first_word
        # By position, as in masks.py: pos, endpos, overlapped, partial, concurrent.
        for match in _WORD.finditer(text, None, None, False, False, False):
            begin, end = match.span()
            for keyword in by_first_word.get(folded[begin:end], ()):
                stop = begin + len(keyword)
                if stop == end or (stop > end and folded.startswith(keyword, begin) and not _INSIDE_WORD.match(text, stop)):
                    yield begin, stop

    @cached_property
    def _by_first_word(self) -> dict[str, list[str]]:
        grouped: dict[str, list[str]] = {}
        for word in self.words:
            first = _WORD.match(word)
            assert first is not None, word
            keyword = self._fold(word)
            grouped.setdefault(keyword[: first.end()], []).append(keyword)
        return grouped

    def _fold(self, text: str) -> str:
        if not self.ignore_case:
            return text
        folded = text.casefold()
        if len(folded) == len(text):
            return folded
        return "".join(char if len(char.casefold()) > 1 else char.casefold() for char in text)
