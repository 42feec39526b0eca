"""Axolotl's strategies, one row at a time, with the codes of what the row says beside the tokens that it becomes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.classes.token_bytes import Ints
from dwl_plugin.run.message_spans import Span, message_spans
from dwl_plugin.run.row_codes import DataSet

__all__ = ["with_codes"]

Row = Mapping[str, Any]


def with_codes(strategy: Any, data_set: DataSet) -> WithCodes:
    """A strategy of the host that makes `DATA_CODES` too."""
    from axolotl.prompt_strategies.chat_template import ChatTemplateStrategy
    from axolotl.prompt_strategies.input_output import RawInputOutputStrategy

    kinds = {ChatTemplateStrategy: OfMessages, RawInputOutputStrategy: OfSegments}
    kind = next((ours for theirs, ours in kinds.items() if isinstance(strategy, theirs)), WithCodes)
    return kind(strategy, data_set)


class WithCodes:
    """A strategy of the host, the rows of which say something only as a whole."""

    def __init__(self, strategy: Any, data_set: DataSet) -> None:
        self.strategy, self.data_set = strategy, data_set

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "strategy" not in self.__dict__:  # a pickle asks before it has filled it
            raise AttributeError(name)
        return getattr(self.strategy, name)

    def tokenize_prompt(self, prompt: Row) -> Any:
        """As the host's: a row, or columns of several where that takes several. One of them may become several, or none."""
        if not self.strategy.supports_batched:
            made = self.strategy.tokenize_prompt(prompt)
            return {**made, DATA_CODES: self._codes(prompt, made["input_ids"])} if made else made
        pieces: dict[str, list[Any]] = defaultdict(list)
        for values in zip(*prompt.values(), strict=True):
            row = dict(zip(prompt, values, strict=True))
            made = self.strategy.tokenize_prompt({name: [value] for name, value in row.items()})
            for name, own in made.items():
                pieces[name] += own
            pieces[DATA_CODES] += [self._codes(row, ids) for ids in made.get("input_ids", ())]
        return dict(pieces)

    def _codes(self, row: Row, ids: Sequence[int]) -> Ints:
        return self.data_set.of(row, len(ids), lambda: self._spans(row, ids))

    def _spans(self, row: Row, ids: Sequence[int]) -> Iterable[Span]:
        self.data_set.codes.require_none_beside(row)
        return ()


class OfSegments(WithCodes):
    """`input_output`: each segment has tokens of its own, and may say something of them as a part does."""

    def _spans(self, row: Row, ids: Sequence[int]) -> Iterable[Span]:
        codes, segments = self.data_set.codes, row["segments"]
        codes.require_none_beside(row, ["segments"])
        if codes.message != codes.part:
            codes.require_none_in(segments, "segments", [codes.message])
        if any(codes.says(segment, "part") for segment in segments):
            texts = [text for _, text in self.strategy.prompter.build_prompt(segments)]
            lengths = [len(self.strategy.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
            for at, (begin, end) in enumerate(pairwise(accumulate(lengths, initial=0))):
                yield Span(begin, end, f"segments[{at}]", "part", segments[at])


class OfMessages(WithCodes):
    """`chat_template`: messages and their parts, placed in what the host renders of them."""

    def __init__(self, strategy: Any, data_set: DataSet) -> None:
        super().__init__(strategy, data_set)
        names = strategy.prompter.message_property_mappings
        keys = ("role", "content", strategy.prompter.template_thinking_key)
        self.role, self.content, self.thinking = (names.get(key, key) for key in keys)

    def _spans(self, row: Row, ids: Sequence[int]) -> Iterable[Span]:
        from axolotl.utils.dict import remove_none_values

        codes, strategy, prompter = self.data_set.codes, self.strategy, self.strategy.prompter
        name = prompter.field_messages
        codes.require_none_beside(row, (name, prompter.field_tools))
        messages = strategy._get_messages(row)
        for at, message in enumerate(messages):
            codes.require_none_beside(message, (self.content, self.thinking, "tool_calls"), f"{name}[{at}].")
        if not any(map(self._says, messages)):
            return ()
        row = {column: remove_none_values([value])[0] for column, value in row.items()}  # as the host does
        messages, tools, own = strategy._get_messages(row), strategy._get_tools(row), 0
        if row.get(prompter.field_system) is not None and strategy.transform_message(messages[0])["role"] != "system":
            own, messages = 1, [{self.role: "system", self.content: row.pop(prompter.field_system)}, *messages]

        def render(messages: list[Any]) -> str | None:
            turns = strategy.get_conversation_thread({**row, name: messages})
            text: str | None = prompter.build_prompt_text(turns, tools=tools) if turns else ""  # one that the host drops
            return text

        return message_spans(
            messages,
            render,
            ids,
            strategy.tokenizer,
            message_keys=codes.fields("message"),
            part_keys=codes.fields("part"),
            fields=(self.content, self.thinking),
            at=lambda number: f"{name}[{number - own}]",
        )

    def _says(self, message: Row) -> bool:
        parts = (part for field in (self.content, self.thinking) if isinstance(own := message.get(field), list) for part in own)
        return self.data_set.codes.says(message, "message") or any(self.data_set.codes.says(part, "part") for part in parts)
