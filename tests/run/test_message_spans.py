"""Which tokens belong to a message or a part, beside what the rendered text itself shows.

The oracle knows where each message's words are, by words that nothing else has, and the headers of each template by hand.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count, pairwise
from typing import Any

import pytest

from dwl_plugin.errors import ConfigError
from dwl_plugin.run.message_spans import Span, message_spans
from tests.classes.little_tokenizers import tiktoken_like
from tests.classes.test_every_template import ALIKE, CONVERSATIONS, HEADERS, NASTY, messages_of, owners, places_of, tokenizer_with

KINDS = ("byte_level", "sentencepiece", "unigram", "wordpiece")

BY_THE_ONE_BEFORE = {
    **{f"mistral_{version}": {"[/INST]", "[/TOOL_RESULTS]"} for version in ("v1", "v2v3", "v3_tekken", "v7_tekken")},
    "pixtral": {"[/INST]"},
    **{f"gemma4{kind}": {"<|tool_response>", "<tool_response|>"} for kind in ("", "_unified")},
    "deepseek_v3": {"<｜tool▁outputs▁end｜>"},
    "phi_3": {"<|assistant|>"},
}
"""Headers that a template writes behind the words of the message before, whatever comes next."""

WORDS_ALONE = ("alpaca", "command_a", "command_a_rag", "command_a_tool_use", "metharme")
"""Where turns have no end of their own, or another one where they are the last, a message may begin at its first word."""

Message = dict[str, Any]


def spans_of(tokenizer: Any, messages: list[Message], **options: Any) -> tuple[list[Span], str]:
    """The spans, and the text."""
    render: Callable[[list[Message]], str] = lambda of: tokenizer.apply_chat_template(of, tokenize=False)  # noqa: E731
    text = render(messages)
    ids = options.pop("ids", None) or tokenizer(text, add_special_tokens=False)["input_ids"]
    return message_spans(messages, render, ids, tokenizer, message_keys={"weight"}, part_keys={"weight"}, **options), text


def last_characters(tokenizer: Any, text: str) -> list[int]:
    return [max(begin, end - 1) for begin, end in places_of(tokenizer, text)[1]]


def contents_of(kind: str) -> Iterator[str]:
    nasty = NASTY if kind == "wordpiece" else NASTY + ALIKE
    for number in count(1):
        yield f"{('', ' ')[number % 2]}alfa{number}q {nasty[number % len(nasty)]} omega{number}q" + ("", "\n", " ")[number % 3]


def sweep_messages(name: str, kind: str) -> Counter[str]:
    """How many tokens have the owner that the headers tell, have another, or stand in a turn of several messages."""
    tokenizer = tokenizer_with(name, kind, "<s>", single=True)
    headers = {header: role for header, role in HEADERS[name].items() if header not in BY_THE_ONE_BEFORE.get(name, ())}
    counts: Counter[str] = Counter()
    for roles in CONVERSATIONS:
        messages = messages_of(roles, contents_of(kind), as_json=name == "deepseek_v3")
        for message in messages:
            message["weight"] = 0.5
        try:
            spans, text = spans_of(tokenizer, messages)
        except ConfigError:
            raise
        except Exception:  # the template has no such conversation
            continue
        last = last_characters(tokenizer, text)
        owner, _ = owners(text, headers)
        of_header: dict[int, set[int]] = {}
        for number, message in enumerate(messages):
            words = re.search(r"alfa\d+q.*omega\d+q", str(message["content"] or message["tool_calls"]), re.DOTALL)
            assert words is not None
            begin = text.find(words[0].partition("q")[0] + "q")
            if begin >= 0:
                of_header.setdefault(owner[begin], set()).add(number)
                end = text.index(re.search(r"omega\d+q", words[0])[0], begin)  # type: ignore[index]
                own = {token for token, at in enumerate(last) if begin <= at < end}
                assert own <= set(range(*spans[number][:2])), (roles, number)
                counts["words"] += len(own)
        for token, at in enumerate(last):
            here = {number for number, span in enumerate(spans) if span.begin <= token < span.end}
            expected = of_header.get(owner[at], set())
            if owner[at] < 0 or len(expected) != 1 or name in WORDS_ALONE:
                counts["of several, or of none"] += 1
            else:
                counts["same" if here == expected else "differs"] += 1
    return counts


SWEPT = [pytest.param(at, name, marks=() if at % 3 == 0 else pytest.mark.slow) for at, name in enumerate(HEADERS)]


@pytest.mark.parametrize(("number", "name"), SWEPT)
def test_a_message_owns_its_header_its_words_and_its_end_of_turn(number: int, name: str) -> None:
    counts = sweep_messages(name, KINDS[number % len(KINDS)])
    assert not counts["differs"]
    assert counts["words"] > 200
    assert counts["same"] > 30 or name in WORDS_ALONE


@pytest.mark.weekly
@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_message_owns_its_turn_whatever_the_tokenizer(kind: str, name: str) -> None:
    assert not sweep_messages(name, kind)["differs"]


def in_parts(rng: random.Random, whole: str) -> list[str]:
    edges = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.randrange(4)))
    return [whole[begin:end] for begin, end in pairwise([0, *edges, len(whole)])]


def joined(messages: list[Message]) -> list[Message]:
    """As Axolotl hands them to a template."""
    contents = [message["content"] for message in messages]
    texts = [own if isinstance(own, str) else "".join(part["text"] for part in own) for own in contents]
    return [{**message, "content": text} for message, text in zip(messages, texts, strict=True)]


def sweep_parts(name: str, kind: str, conversations: int) -> int:
    """How many tokens of parts there are; each is where its last character says."""
    tokenizer = tokenizer_with(name, kind, "<s>", single=True)
    rng, seen = random.Random(name + kind), 0
    alphabet = "ab .\n0" if kind == "wordpiece" else "ab .\n0é世界🤖"
    for _ in range(conversations):
        messages: list[Message] = []
        for number, role in enumerate(("user", "assistant") * 2):
            whole = f"alfa{number}q" + "".join(rng.choices(alphabet, k=rng.randrange(30))) + f"omega{number}q"
            messages.append({"role": role, "content": [{"text": text, "weight": 0.5} for text in in_parts(rng, whole)]})
        render: Callable[[list[Message]], str] = lambda of: tokenizer.apply_chat_template(joined(of), tokenize=False)  # noqa: E731
        text = render(messages)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        spans = iter(message_spans(messages, render, ids, tokenizer, message_keys=(), part_keys=["weight"]))
        last = last_characters(tokenizer, text)
        for number, message in enumerate(messages):
            begin = text.index(f"alfa{number}q")
            for at, part in enumerate(message["content"]):
                span, end = next(spans), begin + len(part["text"])
                assert (span.at, span.level, span.said) == (f"messages[{number}].content[{at}]", "part", part)
                assert list(range(*span[:2])) == [token for token, char in enumerate(last) if begin <= char < end]
                begin, seen = end, seen + span.end - span.begin
        assert next(spans, None) is None
    return seen


@pytest.mark.parametrize(("number", "name"), SWEPT)
def test_a_token_is_the_part_s_in_which_it_ends(number: int, name: str) -> None:
    assert sweep_parts(name, KINDS[(number + 1) % len(KINDS)], 3) > 100


@pytest.mark.weekly
@pytest.mark.parametrize("name", HEADERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_is_the_part_s_in_which_it_ends_whatever_the_tokenizer(kind: str, name: str) -> None:
    assert sweep_parts(name, kind, 20) > 1000


def owned(name: str, messages: list[Message], kind: str = "byte_level", **options: Any) -> dict[str, str]:
    """The text of each span."""
    tokenizer = tokenizer_with(name, kind, "<s>", single=True)
    spans, text = spans_of(tokenizer, messages, **options)
    places = places_of(tokenizer, text)[1]
    return {span.at: text[places[span.begin][0] : places[span.end - 1][1]] if span.begin < span.end else "" for span in spans}


def test_an_earlier_turn_whose_thoughts_are_left_out() -> None:
    answers = ["<think>\nhm\n</think>\n\nfour", "<think>\nwell\n</think>\n\nfive"]
    messages = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": answers[0], "weight": 0.5},
        {"role": "user", "content": "3+2", "weight": 0.5},
        {"role": "assistant", "content": answers[1], "weight": 0.5},
    ]
    assert owned("qwen3", messages) == {
        "messages[1]": "<|im_start|>assistant\nfour<|im_end|>\n",
        "messages[2]": "<|im_start|>user\n3+2<|im_end|>\n",
        "messages[3]": "<|im_start|>assistant\n<think>\nwell\n</think>\n\nfive<|im_end|>\n",
    }


def test_parts_of_thoughts_and_of_an_answer() -> None:
    def parts(*texts: str) -> list[Message]:
        return [{"type": "text", "text": text, "weight": 0.5} for text in texts]

    tokenizer = tokenizer_with("qwen3", "byte_level", "<s>", single=True)
    messages: list[Message] = [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": parts("<think>\nfour\n</think>\n\n", "fo", "ur")},
        {"role": "user", "content": "3+2"},
        {"role": "assistant", "reasoning_content": parts("we", "ll"), "content": parts(" fi", "ve ", "")},
    ]

    def render(of: list[Message]) -> str:
        texts = [
            {key: "".join(part["text"] for part in value) if isinstance(value, list) else value for key, value in message.items()}
            for message in of
        ]
        return str(tokenizer.apply_chat_template(texts, tokenize=False))

    text = render(messages)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = message_spans(messages, render, ids, tokenizer, message_keys=(), part_keys={"weight"})
    places = places_of(tokenizer, text)[1]
    assert {
        span.at.removeprefix("messages"): "".join(text[slice(*place)] for place in places[slice(*span[:2])]) for span in spans
    } == {
        "[1].content[0]": "",
        "[1].content[1]": "fo",
        "[1].content[2]": "ur",
        "[3].content[0]": " fi",
        "[3].content[1]": "ve ",
        "[3].content[2]": "",
        "[3].reasoning_content[0]": "we",
        "[3].reasoning_content[1]": "ll",
    }


def test_a_part_owns_what_the_template_would_write_in_its_place_anyway() -> None:
    texts = ["<think>\nwell\n</think>\n\n", "fi", "ve"]
    messages = [
        {"role": "user", "content": "3+2"},
        {"role": "assistant", "content": [{"type": "text", "text": text, "weight": 0.5} for text in texts]},
    ]
    tokenizer = tokenizer_with("qwen3", "byte_level", "<s>", single=True)

    def render(of: list[Message]) -> str:
        return str(tokenizer.apply_chat_template(joined(of), tokenize=False))

    text = render(messages)
    ids, places = places_of(tokenizer, text)
    spans = message_spans(messages, render, ids, tokenizer, message_keys=(), part_keys={"weight"})
    assert [text[places[span.begin][0] : places[span.end - 1][1]] for span in spans] == texts


def test_a_system_message_that_goes_into_the_turn_of_the_user() -> None:
    messages = [
        {"role": "system", "content": "Be kind.", "weight": 0.5},
        {"role": "user", "content": "hi", "weight": 0.5},
        {"role": "assistant", "content": "ho", "weight": 0.5},
    ]
    assert owned("gemma3", messages) == {
        "messages[0]": "<s><start_of_turn>user\nBe kind.\n\n",
        "messages[1]": "hi<end_of_turn>\n",
        "messages[2]": "<start_of_turn>model\nho<end_of_turn>\n",
    }


AT_LAST = (
    "{%- set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index > messages[1:]|length - 2 %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
AT_FIRST = "deepseek_v3"


def test_a_message_whose_words_stand_elsewhere_owns_its_words() -> None:
    conversation = [("system", "Be kind."), ("user", "hi"), ("assistant", "ho"), ("user", "hei"), ("assistant", "ha")]
    messages = [{"role": role, "content": content, "weight": 0.5} for role, content in conversation]
    tokenizer = tokenizer_with("chatml", "byte_level", "<s>", single=True)
    tokenizer.chat_template = AT_LAST
    spans, text = spans_of(tokenizer, messages)
    places = places_of(tokenizer, text)[1]
    assert [text[places[span.begin][0] : places[span.end - 1][1]] for span in spans][::2] == ["Be kind.", " ho</s>", " ha</s>"]
    late = [messages[1], messages[2], messages[0], messages[0] | {"content": "Be brief."}, messages[3], messages[4]]
    assert owned(AT_FIRST, late) == {
        "messages[0]": "<s>Be kind.\n\nBe brief.<｜User｜>hi",
        "messages[1]": "<｜Assistant｜>ho<｜end▁of▁sentence｜>",
        "messages[2]": "Be kind.",
        "messages[3]": "Be brief.",
        "messages[4]": "<｜User｜>hei",
        "messages[5]": "<｜Assistant｜>ha<｜end▁of▁sentence｜>",
    }


@pytest.mark.parametrize("content", ["", None])
def test_a_message_of_a_tool_call_alone(content: str | None) -> None:
    call = {"type": "function", "id": "abcdefgh1", "function": {"name": "find", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": content, "tool_calls": [call, call], "weight": 0.5},
        {"role": "tool", "content": "found", "name": "find", "tool_call_id": "abcdefgh1", "weight": 0.5},
        {"role": "assistant", "content": content, "weight": 0.5},
        {"role": "user", "content": "thanks"},
    ]
    once = '<tool_call>\n{"name": "find", "arguments": {"x": 1}}\n</tool_call>'
    assert owned("qwen3", messages) == {
        "messages[1]": f"<|im_start|>assistant\n{once}\n{once}<|im_end|>\n",
        "messages[2]": "<|im_start|>user\n<tool_response>\nfound\n</tool_response><|im_end|>\n",
        "messages[3]": f"<|im_start|>assistant\n{content if content is None else ''}<|im_end|>\n".replace("None", ""),
    }


def test_a_row_that_was_cut_off_at_its_end() -> None:
    tokenizer = tokenizer_with("chatml", "byte_level", "<s>", single=True)
    messages = [{"role": role, "content": "hello there", "weight": 0.5} for role in ("user", "assistant", "user")]
    (first, second, third), text = spans_of(tokenizer, messages)
    cut = tokenizer(text, add_special_tokens=False)["input_ids"][: second.end - 2]
    assert spans_of(tokenizer, messages, ids=cut)[0] == [
        first,
        second._replace(end=second.end - 2),
        third._replace(begin=len(cut), end=len(cut)),
    ]


def test_nothing_is_rendered_where_nothing_is_said() -> None:
    def render(of: list[Message]) -> str:
        raise AssertionError("rendered")

    messages = [{"role": "user", "content": [{"text": "hi", "weight": None}], "weight": None, "other": 1}]
    assert message_spans(messages, render, [1], None, message_keys={"weight"}, part_keys={"weight"}) == []


def test_a_message_that_says_something_costs_a_few_renders_however_many_others_there_are() -> None:
    tokenizer = tokenizer_with("chatml", "byte_level", "<s>", single=True)
    rendered = 0

    def render(of: list[Message]) -> str:
        nonlocal rendered
        rendered += 1
        return str(tokenizer.apply_chat_template(of, tokenize=False))

    messages = [{"role": "user", "content": f"hello {number}"} for number in range(40)]
    messages[20]["weight"] = 0.5  # type: ignore[assignment]
    ids = tokenizer(render(messages), add_special_tokens=False)["input_ids"]
    rendered = 0
    assert len(message_spans(messages, render, ids, tokenizer, message_keys={"weight"}, part_keys=())) == 1
    assert rendered <= 5


def problem(tokenizer: Any, messages: list[Message], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        spans_of(tokenizer, messages, **options)
    (one,) = caught.value.problems
    return str(one)


def test_a_template_that_rewrites_content_places_messages_and_no_parts() -> None:
    tokenizer = tokenizer_with("chatml", "byte_level", "<s>", single=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ (m.content if m.content is string else m.content[0].text) | upper }}</s>{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "weight": 0.5}]
    (span,), text = spans_of(tokenizer, messages)
    places = places_of(tokenizer, text)[1]
    assert text[places[span.begin][0] :] == "<assistant>HO</s>"
    messages[1]["content"] = [{"type": "text", "text": "ho", "weight": 0.5}]  # type: ignore[assignment]
    assert "messages[1].content: weights and marks cannot be placed: the chat template writes it otherwise" in problem(
        tokenizer, messages
    )


def test_tokens_of_another_text() -> None:
    tokenizer = tokenizer_with("chatml", "byte_level", "<s>", single=True)
    messages = [{"role": "user", "content": "hi", "weight": 0.5}]
    assert "messages: weights and marks cannot be placed: the row's tokens are not those" in problem(
        tokenizer, messages, ids=[5, 6, 7]
    )


def test_a_template_that_takes_no_other_words_or_does_not_write_them() -> None:
    tokenizer = tokenizer_with("chatml", "byte_level", "<s>", single=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content != 'hi' %}{{ raise_exception('Say hi.') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi", "weight": 0.5}]
    assert "messages[0]: weights and marks cannot be placed" in problem(tokenizer, messages)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | length }}{% endfor %}"
    assert "messages[0]: weights and marks cannot be placed: the chat template does not write" in problem(tokenizer, messages)


def test_a_tokenizer_without_offsets() -> None:
    """Its bytes tell the places; where they do not spell the text, nothing does."""
    tokenizer: Any = tiktoken_like()
    messages = [{"role": "user", "content": "hi 世界"}, {"role": "assistant", "content": "ho", "weight": 0.5}]

    def render(of: list[Message]) -> str:
        return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in of)

    ids = tokenizer.encode(render(messages))
    (span,) = message_spans(messages, render, ids, tokenizer, message_keys={"weight"}, part_keys=())
    assert tokenizer.decode(ids[span.begin : span.end]) == "<|im_start|>assistant\nho<|im_end|>\n"
    with pytest.raises(ConfigError, match="does not tell the places of its tokens"):
        message_spans(messages, render, ids[1:], tokenizer, message_keys={"weight"}, part_keys=())
