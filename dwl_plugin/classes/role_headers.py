"""The headers that a tokenizer's chat template puts before the messages of each role.

Short conversations of known words are rendered and tokenised. Between two words stands what ends the one message and what begins
the other; the conversation up to the first of them shows where the one turns into the other. Then each conversation is parsed by
the headers alone; a role that comes out wrong is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, get_args

import numpy as np

from dwl_plugin.classes.token_bytes import TokenTable, added_ids, special_ids

__all__ = ["Role", "RoleHeaders", "role_headers"]

Role = Literal["user", "assistant", "tool", "system"]
Messages = list[dict[str, Any]]

_PAIR: tuple[Role, ...] = ("user", "assistant", "user", "assistant")
"""Every template has these two; where they cannot be told apart, nothing can."""

_WITH: dict[Role, tuple[Role, ...]] = {"system": ("system", *_PAIR), "tool": ("user", "assistant", "tool", "assistant")}

_WORDS = (("quartz", "violin", "harbour", "meadow", "lantern"), ("glacier", "pepper", "ox", "drum", "cobalt"))
_TOOLS = ("lookup", "measure")
"""Two sets that share no beginning, so that what is the same in both is the template's."""

_TAG = rb"<+[^<>\n]{1,60}>+|\[+[^\[\]\n]{1,60}\]+"
"""A mark, also where the tokenizer has no token for it, or writes spaces into it."""


@dataclass(frozen=True)
class RoleHeaders:
    """What begins a message.

    Args:
        roles: the bytes of each header, and whose it is; None for a role that is none of the four.
        patterns: how each header is found.
        why_not: for the roles that have no header, why.
    """

    roles: Mapping[bytes, Role | None]
    patterns: Mapping[bytes, bytes]
    why_not: Mapping[Role, str]

    def of(self, role: Role) -> frozenset[bytes]:
        """The headers of a role; several, where its messages begin in another way after some role's."""
        return frozenset(header for header, owner in self.roles.items() if owner == role)

    @property
    def known(self) -> list[Role]:
        """The roles that have a header."""
        return [role for role in get_args(Role) if self.of(role)]

    def pattern(self) -> re.Pattern[bytes]:
        """Finds the headers in the bytes of one sample, the longest first."""
        return re.compile(b"|".join(self.patterns[header] for header in sorted(self.roles, key=len, reverse=True)))

    def with_one_more(self, header: bytes, role: Role | None, pattern: bytes) -> RoleHeaders:
        """These, and another header."""
        return replace(self, roles={**self.roles, header: role}, patterns={**self.patterns, header: pattern})


def role_headers(tokenizer: Any, table: TokenTable) -> RoleHeaders:
    """The bytes before a message of each role.

    A header is cut where it tells the roles apart: dates, channels and empty thoughts that a template writes after the name of
    the role are not part of it.
    """
    none = RoleHeaders({}, {}, {})
    if not getattr(tokenizer, "chat_template", None):
        return replace(none, why_not=dict.fromkeys(get_args(Role), "there is none"))
    reader = _Reader(tokenizer, table)
    try:
        headers = reader.add(none, _PAIR)
    except _UnknownError as error:
        return replace(none, why_not=dict.fromkeys(get_args(Role), str(error)))
    why_not: dict[Role, str] = {}
    for role, turns in _WITH.items():
        try:
            headers = reader.add(headers, turns)
        except _UnknownError as error:
            why_not[role] = f"{error}{reader.whose(role, headers)}"
    return replace(reader.with_others(headers), why_not=why_not)


class _UnknownError(Exception):
    """Why a role cannot be known."""


@dataclass
class _Reader:
    tokenizer: Any
    table: TokenTable

    def add(self, headers: RoleHeaders, turns: Sequence[Role]) -> RoleHeaders:
        """`headers`, and those that a conversation has beside them. Raises `_UnknownError`."""
        try:
            beginnings = [*self._beginnings(turns), *self._beginnings(_PAIR)]
        except Exception as error:  # a template is a program, and any error may be how it refuses a role
            raise _UnknownError(f"it does not render such a message ({error})") from None
        for role, before, beginning in beginnings:
            if any(header in before for header in headers.of(role)):
                continue
            rivals = [other for owner, _, other in beginnings if owner != role]
            for header, pattern in self._cuts(beginning):
                if len(header) >= 3 and header not in headers.roles and not any(header in rival for rival in rivals):
                    headers = headers.with_one_more(header, role, pattern)
                    break
            else:
                if not headers.of(role):
                    raise _UnknownError("nothing that only such a message has marks its beginning")
        if not self._reads_back(turns, headers):
            raise _UnknownError("its messages cannot be told apart by what stands before them")
        return headers

    def with_others(self, headers: RoleHeaders) -> RoleHeaders:
        """`headers`, and the mark that begins them all: it begins the messages of any other role, too."""
        mark = self._shared_mark
        return headers.with_one_more(mark, None, re.escape(mark)) if mark else headers

    def whose(self, role: Role, headers: RoleHeaders) -> str:
        """What the headers of the other roles make of a role that has none."""
        turns = _WITH[role]
        try:
            text = self._conversation(turns, _WORDS[0], _TOOLS[0])[1]
        except Exception:  # that is why
            return ""
        before = headers.pattern().findall(text[: text.index(_WORDS[0][turns.index(role)].encode())])
        owner = headers.roles[before[-1]] if before else None
        return f"; it stands in a message of `{owner}`" if owner else "; no header stands before it"

    def _beginnings(self, turns: Sequence[Role]) -> list[tuple[Role, bytes, bytes]]:
        """What stands before the messages of each role, and what of it begins them; once for each role before them."""
        bos = b"" if self._shared_mark == self._bos else self._bos
        found = self._of_pair if turns == _PAIR else self._common_beginnings(turns)
        return [(role, before, begin.removeprefix(bos).lstrip()) for (_, role), (before, begin) in found.items()]

    def _common_beginnings(self, turns: Sequence[Role]) -> dict[tuple[Role | None, Role], tuple[bytes, bytes]]:
        examples: dict[tuple[Role | None, Role], list[tuple[bytes, bytes]]] = {}
        for words, tool in zip(_WORDS, _TOOLS, strict=True):
            messages, text = self._conversation(turns, words, tool)
            for index, role in enumerate(turns):
                before = text[: text.index(words[index].encode())]
                if index:
                    before = _after(before, words[index - 1])
                    begin = self._after_ending(before, messages[:index], words[index - 1])
                elif role == "user":
                    continue  # more than its header may stand before the first message of a user
                else:
                    begin = self._after_first_words(before)
                examples.setdefault((turns[index - 1] if index else None, role), []).append((before, begin))
        return {key: (pairs[0][0], _common_prefix([begin for _, begin in pairs])) for key, pairs in examples.items()}

    def _after_ending(self, before: bytes, messages: Messages, word: str) -> bytes:
        """`before` without what ends the last of the messages, which is `word`."""
        try:
            ending = _after(self._render(messages), word)
        except Exception:  # to this template these messages are no conversation
            ending = before
        units = self._units(before)
        pairs = zip(units, self._units(ending), strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        solid = [index for index, unit in enumerate(units) if unit.strip()]
        last = next((index for index in solid if index >= shared), len(units))
        starts = [index for index in solid if index <= last]
        if not starts:
            return b""
        # A template may write the next header itself, or a part of it, whatever follows: then the ending is too long.
        marked = [index for index in starts if units[index] in self._first_units]
        start = (marked or starts)[-1]
        mark = next((index for index in reversed(starts) if index < start), 0)
        if not self._mark.match(units[start]) and self._mark.match(units[mark]) and units[mark] not in self._pair:
            start = mark  # the beginning of an answer, which a template may write with the call
        return b"".join(units[start:])

    def _after_first_words(self, before: bytes) -> bytes:
        """`before` without what begins any conversation."""
        units, mark = self._units(before), self._shared_mark
        if mark in units:
            return b"".join(units[len(units) - 1 - units[::-1].index(mark) :])
        return before

    @cached_property
    def _bos(self) -> bytes:
        return (getattr(self.tokenizer, "bos_token", None) or "").encode()

    @cached_property
    def _of_pair(self) -> dict[tuple[Role | None, Role], tuple[bytes, bytes]]:
        return self._common_beginnings(_PAIR)

    @cached_property
    def _pair(self) -> bytes:
        return self._conversation(_PAIR, _WORDS[0], _TOOLS[0])[1]

    @cached_property
    def _first_units(self) -> list[bytes]:
        """What a conversation begins with; where that may be the beginning of any text, what comes after it, too."""
        units = [unit for unit in self._units(self._pair) if unit.strip()]
        return units[: 1 + (units[0] == self._bos)]

    @cached_property
    def _shared_mark(self) -> bytes | None:
        """The mark that the headers of user and assistant begin with."""
        first = {unit for _, begin in self._of_pair.values() for unit in self._units(begin)[:1]}
        (unit,) = first if len(first) == 1 else {b""}
        return unit if self._mark.fullmatch(unit) else None

    @cached_property
    def _mark(self) -> re.Pattern[bytes]:
        marks = {self.table.spelling(token_id) for token_id in added_ids(self.tokenizer) | special_ids(self.tokenizer)}
        longest_first = sorted((mark.strip() for mark in marks), key=len, reverse=True)
        return re.compile(b"|".join([*(re.escape(mark) for mark in longest_first if len(mark) >= 3), _TAG]))

    def _units(self, text: bytes) -> list[bytes]:
        """The marks of a text, its whitespace, and what is between them."""
        return [unit for unit in re.split(rb"(%b|\s+)" % self._mark.pattern, text) if unit]

    def _cuts(self, beginning: bytes) -> Iterator[tuple[bytes, bytes]]:
        """What `beginning` begins with, the shortest first, and the pattern that finds it in a text."""
        units = self._units(beginning)
        plain = not self._mark.match(beginning)
        for index, unit in enumerate(units):
            if not unit.strip():
                continue
            header, after = b"".join(units[: index + 1]), b"".join(units[index + 1 :])
            pattern = re.escape(header)
            if plain:
                pattern = rb"(?<![^\s>\]])" + pattern
            if plain and after[:1].isspace():
                pattern += rb"(?=\s|\Z)"
            elif after and re.match(rb"[\w\x80-\xff]", header[-1:]):
                pattern += rb"(?![\w\x80-\xff])"
            yield header, pattern

    def _reads_back(self, turns: Sequence[Role], headers: RoleHeaders) -> bool:
        """True if before each word of a conversation stands one header, that of its role."""
        pattern = headers.pattern()
        for words, tool in zip(_WORDS, _TOOLS, strict=True):
            others = words[len(turns) - 1 :: -1]
            text, at = self._conversation(turns, others, tool)[1], 0
            for index, (role, word) in enumerate(zip(turns, others, strict=True)):
                begin = text.index(word.encode(), at)
                found = [headers.roles[match.group()] for match in pattern.finditer(text[:begin]) if match.start() >= at]
                if (found if index else found[-1:]) != [role]:  # some templates bring a system message of their own
                    return False
                at = text.rindex(word.encode()) + len(word)
        return True

    def _conversation(self, turns: Sequence[Role], words: Sequence[str], tool: str) -> tuple[Messages, bytes]:
        """Messages of one word each, and their text; the word of a tool call is an argument of it."""
        errors: list[Exception] = []
        for messages in _messages(turns, words, tool):
            try:
                text = self._render(messages)
            except Exception as error:
                errors.append(error)
                continue
            at = [text.find(word.encode()) for word, _ in zip(words, turns, strict=False)]
            if at[0] >= 0 and at == sorted(at):
                return messages, text
            errors.append(_UnknownError("it leaves it out"))
        raise errors[0]

    def _render(self, messages: Messages) -> bytes:
        """The text of the tokens of a conversation."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False)
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int64)
        return self.table.decode(ids, np.zeros(1, np.int64))[0]


def _messages(turns: Sequence[Role], words: Sequence[str], tool: str) -> Iterator[Messages]:
    """The messages of a conversation; with a tool, as templates want its call: with text beside it or none, as a dict or JSON."""
    plain: Messages = [{"role": turn, "content": word} for turn, word in zip(turns, words, strict=False)]
    if "tool" not in turns:
        yield plain
        return
    user, call, answer, *rest = plain
    answer |= {"name": tool, "tool_call_id": "abcdefgh1"}
    for arguments in ({"place": call["content"]}, json.dumps({"place": call["content"]})):
        calls = [{"type": "function", "id": "abcdefgh1", "function": {"name": tool, "arguments": arguments}}]
        for content in ("", call["content"]):
            yield [user, {**call, "content": content, "tool_calls": calls}, answer, *rest]


def _after(text: bytes, word: str) -> bytes:
    return text[text.rindex(word.encode()) + len(word) :]


def _common_prefix(texts: Sequence[bytes]) -> bytes:
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*texts, strict=False))
    return bytes(column[0] for column in columns)
