"""Which tokens of a conversation are those of a message, or of a part of its content.

Places are characters of the rendered text. Where a message's words are is found by rendering once more with a word in their
place that is nowhere else; the message keeps its index, so what a template makes of a position stays as it is.

Suffixes: T tokens.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cache, cached_property, lru_cache
from itertools import accumulate, count, groupby, pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from dwl_plugin.classes.token_bytes import Ints, TokenTable
from dwl_plugin.errors import ConfigError, DWLError, first_line

__all__ = ["FIELDS", "Span", "message_spans"]

Message = Mapping[str, Any]
Render = Callable[[list[Any]], "str | None"]

FIELDS = ("content", "reasoning_content")
"""The fields of a message with its words; the first one is always there."""

SpanLevel = Literal["message", "part"]


class Span(NamedTuple):
    """Tokens `begin` up to and without `end`, and what the data says of them, at `messages[2]` or `messages[2].content[1]`."""

    begin: int
    end: int
    at: str
    level: SpanLevel
    said: Message


def message_spans(
    messages: Sequence[Message],
    render: Render,
    ids: Any,
    tokenizer: Any,
    *,
    message_keys: Collection[str],
    part_keys: Collection[str],
    fields: tuple[str, ...] = FIELDS,
    at: Callable[[int], str] = "messages[{}]".format,
) -> list[Span]:
    """The tokens of each message that has one of `message_keys`, and of each content part that has one of `part_keys`.

    A message owns its header, its words and its end of turn: what the template writes up to the next message's, and of the first
    message all that stands before it. It begins at its first word where the template does not end the message before it as it
    would if no other came. A message whose words stand elsewhere, as those of a system message may, owns its words.
    A token belongs where its last character is. A span may be empty: what a template leaves out, or the host cut off.

    Args:
        messages: as the data has them.
        render: the host's template, over messages such as these; no generation prompt.
        ids: (T,) the row's tokens; fewer than the whole where the host cut the row off at its end.
        tokenizer: fast, or one of which the bytes of its tokens are known.
        fields: as `FIELDS`, by the names of the data: strings, or lists of parts, whose texts are joined.
        at: where the data has a message.

    Raises:
        ConfigError: the tokens are not those of the rendered text, or the template does not let a place be known.
    """
    asked = [
        (index, _says(message, message_keys), [field for field in fields if _parts_say(message, field, part_keys)])
        for index, message in enumerate(messages)
    ]
    if not any(said or in_parts for _, said, in_parts in asked):
        return []
    conversation = _Conversation(messages, render, fields, at)
    last_T = _last_characters(conversation.text, ids, tokenizer, conversation.name)

    def span(begin: int, end: int, place: str, level: SpanLevel, said: Message) -> Span:
        first, stop = np.searchsorted(last_T, (begin, max(begin, end))).tolist()
        return Span(first, stop, place, level, said)

    found = []
    for index, said, in_parts in asked:
        if said:
            found.append(span(*conversation.extent(index), at(index), "message", messages[index]))
        for field in in_parts:
            for number, (begin, end, part) in enumerate(conversation.parts(index, field)):
                if _says(part, part_keys):
                    found.append(span(begin, end, f"{at(index)}.{field}[{number}]", "part", part))
    return found


def _says(said: object, keys: Collection[str]) -> bool:
    return isinstance(said, Mapping) and any(said.get(key) is not None for key in keys)


def _parts_say(message: object, field: str, keys: Collection[str]) -> bool:
    parts = message.get(field) if isinstance(message, Mapping) else None
    return isinstance(parts, (list, tuple)) and any(_says(part, keys) for part in parts)


class _Words(NamedTuple):
    """The characters `begin` up to and without `end`, and the text that stands behind them where they are other words."""

    begin: int
    end: int
    after: str


class _Conversation:
    """Messages and their text."""

    def __init__(self, messages: Sequence[Message], render: Render, fields: tuple[str, ...], at: Callable[[int], str]) -> None:
        self.messages, self.render, self.fields, self.at = list(messages), render, fields, at
        self.words, self.begin, self.end = cache(self._words), cache(self._begin), cache(self._end)

    @property
    def name(self) -> str:
        """What the data calls the first of them."""
        return self.at(0).partition("[")[0]

    @cached_property
    def text(self) -> str:
        """All of it."""
        text = self.render(self.messages)
        if not isinstance(text, str):
            raise _nowhere(self.name, "the chat template gives no text (a processor puts the tokens of images in)")
        return text

    @cached_property
    def mark(self) -> str:
        """A word that the text does not have; of digits, which no template writes otherwise."""
        return next(word for number in count(271828182) if (word := str(number)) not in self.text)

    def extent(self, index: int) -> tuple[int, int]:
        """The characters of a message."""
        begin, end, words = self.begin(index), self.begin(index + 1), self.words(index)
        if words is None:
            return begin, begin
        return (begin, max(end, words.end)) if begin <= words.begin <= end else words[:2]

    def _begin(self, index: int) -> int:
        """Where a message begins: where the one before it ends, if that can be known."""
        if index in (0, len(self.messages)):
            return len(self.text) if index else 0
        earlier = ((number, words) for number in reversed(range(index)) if (words := self.words(number)) is not None)
        last, before = next(earlier, (None, None))
        if last is None or before is None:
            return 0
        if (end := self.end(last)) is not None:
            return end
        floor = next((end for number, _ in earlier if (end := self.end(number)) is not None), 0)
        words = self.words(index)
        return max(floor, before.end if words is None else words.begin)

    def _end(self, index: int) -> int | None:
        """Where a message ends: behind what follows its words where no message does. None where other things follow them here."""
        words = self.words(index)
        try:
            text = self.render([*self.messages[:index], self._elsewise(index, self.fields)])
        except Exception:  # a template may want a user's message, and raise what it likes
            return None
        if words is None or not text or self.mark not in text:
            return None
        close = text[text.rindex(self.mark) + len(self.mark) :]
        rest = words.after[len(close) :]
        end = len(self.text) - len(rest)
        return end if words.after.startswith(close) and self.text.endswith(rest) and end >= words.end else None

    def _words(self, index: int, field: str = "") -> _Words | None:
        """Those of a message, or of one field; None where the template writes none of them."""
        message = self._elsewise(index, (field,) if field else self.fields)
        try:
            text = self.render([*self.messages[:index], message, *self.messages[index + 1 :]])
        except Exception as error:
            why = f"the chat template does not render other words in the place of these: {first_line(error)}"
            raise _nowhere(self.at(index), why) from error
        if text == self.text:
            return None
        if not text or self.mark not in text:
            raise _nowhere(self.at(index), "the chat template does not write its words as they are")
        before, after = text[: text.index(self.mark)], text[text.rindex(self.mark) + len(self.mark) :]
        begin = _alike(self.text, before)
        same = len(after) if self.text.endswith(after) else _alike(self.text[::-1], after[::-1])
        return _Words(begin, max(begin, len(self.text) - same), after)

    def _elsewise(self, index: int, fields: tuple[str, ...]) -> Message:
        """A message with other words."""
        message = dict(self.messages[index])
        changed: dict[str, Any] = {name: _other_words(message[name], self.mark) for name in fields if message.get(name)}
        if fields == self.fields and message.get("tool_calls"):
            changed["tool_calls"] = [_other_call(call, self.mark) for call in message["tool_calls"]]
        return message | (changed or {fields[0]: self.mark})

    def parts(self, index: int, field: str) -> Iterator[tuple[int, int, Any]]:
        """The characters of each part of a field, and the part."""
        parts = self.messages[index][field]
        texts = [_text(part) for part in parts]
        begin, end, _ = self.words(index, field) or (0, 0, "")
        words, whole = self.text[begin:end].strip(), "".join(texts)
        if words not in whole:
            why = "the chat template writes it otherwise than its parts are, so what is a part's cannot be told; a message's can be"
            raise _nowhere(f"{self.at(index)}.{field}", why)
        # A template leaves out what comes first, such as thoughts: of two places the later one.
        origin = begin + self.text[begin:end].index(words) - (whole.rindex(words) if words else 0)
        if words and origin >= 0 and self.text.startswith(whole, origin):  # its first words may be the template's as well
            begin, end = origin, origin + len(whole)
        edges = [min(max(origin + offset, begin), end) for offset in accumulate(map(len, texts), initial=0)]
        for part, (first, stop) in zip(parts, pairwise(edges), strict=True):
            yield first, stop, part


def _nowhere(at: str, why: str) -> ConfigError:
    return ConfigError.at(at, f"weights and marks cannot be placed: {why}")


def _other_words(words: object, mark: str) -> object:
    return [{"type": "text", "text": mark}] if isinstance(words, (list, tuple)) else mark


def _other_call(call: Any, mark: str) -> Any:
    """A call with other arguments; its name stays, which a template may write into the tool's answer."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _other_call(call["function"], mark)}
    arguments = {mark: mark}
    return {**call, "arguments": json.dumps(arguments) if isinstance(call.get("arguments"), str) else arguments}


def _text(part: Any) -> str:
    return str(next(filter(None, map(part.get, ("text", "content", "value"))), "")) if isinstance(part, Mapping) else str(part)


def _alike(text: str, other: str) -> int:
    """How many characters both begin with."""
    if text.startswith(other):
        return len(other)
    return bisect_left(range(len(other)), True, key=lambda length: not text.startswith(other[: length + 1]))


def _last_characters(text: str, ids: Any, tokenizer: Any, name: str) -> Ints:
    """(T,) the place in `text` of each token's last character."""
    ids_T = np.asarray(ids, np.int64)
    by_bytes = _by_bytes(text, ids_T, tokenizer)
    if by_bytes is not None:
        return by_bytes
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        places = encoded["offset_mapping"]
    except (NotImplementedError, KeyError, TypeError, ValueError) as error:
        why = "the bytes of the row's tokens are not the rendered text, and this tokenizer does not tell the places of its tokens"
        raise _nowhere(name, f"{why} (`{type(tokenizer).__name__}`, a slow one)") from error
    if encoded["input_ids"][: len(ids_T)] != ids_T.tolist():
        raise _nowhere(name, "the row's tokens are not those of the text that the chat template gives of its messages")
    last: list[int] = []
    for (begin, end), run in groupby(places[: len(ids_T)]):
        tokens = len(list(run))
        characters = [begin + number for number, character in enumerate(text[begin:end]) for _ in character.encode()]
        # Characters that are in no vocabulary have a token for each byte, and all of them one place.
        last += characters if tokens > 1 and tokens == len(characters) else [max(begin, end - 1)] * tokens
    return np.maximum.accumulate(np.array(last, np.int64))


def _by_bytes(text: str, ids_T: Ints, tokenizer: Any) -> Ints | None:
    """The same, from the tokens' bytes alone; None where these are not what `text` begins with."""
    if not len(ids_T):
        return ids_T
    table = _table(tokenizer)
    if table is None:
        return None
    data = text.encode("utf-8", "surrogatepass")
    spelled, offsets = table.decode(np.minimum(ids_T.view(np.uint64), table.size).view(np.int64), np.zeros(1, np.int64))
    if not data.startswith(spelled):
        return None
    character_of_byte = np.cumsum(np.frombuffer(data + b" ", np.uint8) & 0xC0 != 0x80) - 1
    last: Ints = character_of_byte[np.maximum(offsets[1:] - 1, offsets[:-1])]
    return last


@lru_cache(maxsize=4)
def _table(tokenizer: Any) -> TokenTable | None:
    try:
        return TokenTable.of(tokenizer)
    except DWLError:
        return None
