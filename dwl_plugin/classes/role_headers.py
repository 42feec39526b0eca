"""The headers that a tokenizer's chat template puts before the messages of each role.

Short conversations of known words are rendered and tokenised; a header is what stands before each word in the text of the
tokens. Then each conversation is parsed by the headers alone; a role that comes out wrong is not known.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, get_args

import numpy as np

from dwl_plugin.classes.token_bytes import TokenTable, added_ids, special_ids

__all__ = ["Role", "role_headers"]

Role = Literal["user", "assistant", "tool", "system"]

_BOTH: tuple[Role, Role] = ("assistant", "user")
"""Every template has them; where these two cannot be told apart, nothing can."""

_ORDER: tuple[Role, ...] = (*_BOTH, "system", "tool")
"""Of two roles with one header the first keeps it: a template without tool messages may write them as the user's."""

_WORDS = (("quartz", "violin", "harbour", "meadow", "lantern"), ("glacier", "pepper", "ox", "drum", "cobalt"))
"""Two sets that share no beginning, so that what is the same in both is the template's."""


def role_headers(tokenizer: Any, table: TokenTable) -> tuple[dict[Role, bytes], dict[Role, str]]:
    """The bytes before a message of each role, and for the other roles why they cannot be known.

    A header is cut at the first whitespace or special token that tells the roles apart: dates, channels and empty thoughts
    that a template writes after the name of the role are not part of it.
    """
    if not getattr(tokenizer, "chat_template", None):
        return {}, dict.fromkeys(get_args(Role), "there is none")
    reader = _Reader(tokenizer, table)
    whole_headers: dict[Role, bytes] = {}
    why_not: dict[Role, str] = {}
    for role in _ORDER:
        try:
            whole_headers[role] = reader.whole_header(role)
        except Exception as error:  # a template is a program, and any error may be how it refuses a role
            why_not[role] = f"it does not render such a message ({error})"
    headers: dict[Role, bytes] = {}
    for role, whole in whole_headers.items():
        others = [whole_headers[other] for other in _BOTH if other != role and other in whole_headers]
        cuts = [cut for cut in reader.cuts(whole) if len(cut) >= 3 and not any(cut in other for other in others)]
        if not cuts or cuts[0] in headers.values():
            why_not[role] = "nothing that only such a message has marks its beginning"
            continue
        headers[role] = cuts[0]
        if headers.keys() >= set(_BOTH) and not all(reader.reads_back(other, headers) for other in {role, "user"}):
            del headers[role]
            why_not[role] = "its messages cannot be told apart by what stands before them"
    missing = [role for role in _BOTH if role not in headers]
    if missing:
        why = f"`{missing[0]}`: {why_not[missing[0]]}"
        headers, why_not = {}, {role: why_not.get(role, why) for role in get_args(Role)}
    return headers, why_not


def _after(text: bytes, word: bytes) -> bytes:
    return text[text.rindex(word) + len(word) :]


@dataclass(frozen=True)
class _Reader:
    tokenizer: Any
    table: TokenTable

    def render(self, messages: Sequence[dict[str, Any]]) -> bytes:
        """The text of the tokens of a conversation."""
        text = self.tokenizer.apply_chat_template(list(messages), tokenize=False)
        ids = np.asarray(self.tokenizer.encode(text, add_special_tokens=False), np.int64)
        return self.table.decode(ids, np.zeros(1, np.int64))[0]

    def whole_header(self, role: Role) -> bytes:
        """What stands before every message of a role, without what ends the message before."""
        columns = zip(*self._before_messages(role), strict=False)
        return bytes(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)).strip()

    def _before_messages(self, role: Role) -> Iterator[bytes]:
        for words in _WORDS:
            messages = _conversation(role, words)
            text = self.render(messages)
            for index, message in enumerate(messages):
                if message["role"] != role or (role == "user" and index == 0):
                    continue  # a text may begin with more than the header: its first user message is no example
                at = text.index(words[index].encode())
                if index == 0:
                    yield text[:at].removeprefix((getattr(self.tokenizer, "bos_token", None) or "").encode())
                    continue
                before = words[index - 1].encode()
                ending = _after(self.render(messages[:index]), before).rstrip()
                gap = _after(text[:at], before)
                without_ending = gap.removeprefix(ending)
                yield without_ending if without_ending.strip() else gap

    def cuts(self, header: bytes) -> list[bytes]:
        """The beginnings of `header` that end before whitespace or a special token, the shortest first."""
        marks = (self.table.spelling(token_id) for token_id in added_ids(self.tokenizer) | special_ids(self.tokenizer))
        mark = re.compile(b"|".join([rb"\s+", *(re.escape(text) for text in marks if text.strip())]))
        return [header[: match.start()] for match in mark.finditer(header) if match.start()] + [header]

    def reads_back(self, role: Role, headers: dict[Role, bytes]) -> bool:
        """True if the headers find each message of a conversation with that role, and nothing else."""
        header = re.compile(b"|".join(re.escape(text) for text in sorted(headers.values(), key=len, reverse=True)))
        owner = {text: name for name, text in headers.items()}
        for words in _WORDS:
            messages = _conversation(role, words[::-1])
            found = [owner[text] for text in header.findall(self.render(messages))]
            turns = [message["role"] for message in messages]
            if found not in (turns, ["system", *turns]):  # some templates bring a system message of their own
                return False
        return True


def _conversation(role: Role, words: Sequence[str]) -> list[dict[str, Any]]:
    """Messages of one word each, some of them of the role; the word of a tool call is the name of the tool."""
    turns: list[Role] = ["user", "assistant", "user", "assistant"]
    if role == "system":
        turns.insert(0, "system")
    if role == "tool":
        turns = ["user", "assistant", "tool", "assistant"]
    messages: list[dict[str, Any]] = [{"role": turn, "content": word} for turn, word in zip(turns, words, strict=False)]
    if role == "tool":
        function = {"name": messages[1]["content"], "arguments": {}}
        calls = [{"type": "function", "id": "abcdefgh1", "function": function}]
        messages[1] |= {"tool_calls": calls}
        messages[2] |= {"name": function["name"], "tool_call_id": "abcdefgh1"}
    return messages
