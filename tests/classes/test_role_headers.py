"""Roles by chat templates of different kinds, read from tokens; and templates that cannot tell."""

from __future__ import annotations

import copy
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pytest

from dwl_plugin.classes import build_labeller
from dwl_plugin.classes.role_headers import role_headers
from dwl_plugin.classes.token_bytes import TokenTable
from dwl_plugin.config.classes import RoleClass
from dwl_plugin.errors import ConfigError
from tests.classes.little_tokenizers import byte_level, encode

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "a thought of its own": CHATML.replace(
        "{{ m['content'] }}", "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    ),
    "a system message of its own": "<|im_start|>system\nYou are helpful.<|im_end|>\n" + CHATML,
    "llama 3": (
        "<s>{% for m in messages %}<|header|>{{ m['role'] }}<|/header|>\n\n"
        "{% if m['role'] == 'system' %}Today: 23 Nov\n\n{% endif %}{{ m['content'] | trim }}<|eot|>{% endfor %}"
    ),
    "tools speak as the user": (
        "{% for m in messages %}{% if m['role'] == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m['content'] }}\n"
        "</tool_response><|im_end|>\n{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}"
        "{% endfor %}"
    ),
    "channels": (
        "{% for m in messages %}<|start|>{% if m['role'] == 'tool' %}functions.{{ m['name'] }} to=assistant"
        "{% else %}{{ m['role'] }}{% endif %}<|im_start|>{{ 'final' if m['role'] == 'assistant' else 'x' }}"
        "<|message|>{{ m['content'] }}<|im_end|>{% endfor %}"
    ),
    "mistral": (
        "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% else %}{{ raise_exception('no such role') }}{% endif %}"
        "{% endfor %}"
    ),
    "the beginning of a text begins messages": (
        "{% for m in messages %}{{ bos_token + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    ),
    "llama 2": (
        "{% for m in messages %}{% if m['role'] == 'system' %}{% elif m['role'] == 'user' %}<s>[INST] "
        "{% if loop.index0 == 1 and messages[0]['role'] == 'system' %}<<SYS>>\n{{ messages[0]['content'] }}\n<</SYS>>\n\n"
        "{% endif %}{{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
    ),
    "the user's turn ends with the assistant's header": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>\n{% else %}"
        "<|{{ m['role'] }}|>\n{{ m['content'] }}<|im_end|>\n{% if m['role'] == 'user' %}<|assistant|>\n{% endif %}{% endif %}"
        "{% endfor %}"
    ),
    "an answer is asked for always": (
        "{{ bos_token }}<|im_start|>{% if messages[0]['role'] != 'system' %}<|SYS|>As told.<|im_end|><|im_start|>{% endif %}"
        "{% for m in messages %}{{ {'system': '<|SYS|>', 'user': '<|USR|>', 'assistant': '<|BOT|><|say|>'}[m['role']] }}"
        "{{ m['content'] }}<|im_end|><|im_start|>{% endfor %}<|BOT|>"
    ),
    "alpaca": (
        "{% for m in messages %}### {{ {'user': 'Instruction', 'assistant': 'Response', 'system': 'Setup', "
        "'tool': 'Tool'}[m['role']] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    ),
}
FOLDED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set told = messages[0]['content'] + ' ' if loop.index0 == 1 else '' %}"
    "[INST] {{ told }}{{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
CONVERSATION = [
    ("system", "be 1 brief"),
    ("user", "hello 2"),
    ("assistant", "the 3 answer"),
    ("user", "so?"),
    ("assistant", "42 is"),
]


def tokenizer_with(template: str | None, bos: str | None = "<|im_start|>") -> Any:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = template
    tokenizer.bos_token = bos
    return tokenizer


def rendered(tokenizer: Any, messages: list[tuple[str, str]]) -> list[int]:
    chat = [{"role": role, "content": content} for role, content in messages]
    return encode(tokenizer, tokenizer.apply_chat_template(chat, tokenize=False))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_every_word_of_a_role_and_none_of_another(name: str, role: str) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    messages = CONVERSATION[1:] if name == "mistral" else CONVERSATION
    ids = rendered(tokenizer, messages)
    labeller = build_labeller({role: RoleClass(role=role)}, tokenizer)
    found = labeller(ids, ids)
    inside = "".join(tokenizer.decode([token_id]) for token_id in np.array(ids)[found == 0])
    outside = "".join(tokenizer.decode([token_id]) for token_id in np.array(ids)[found == 1])
    for speaker, words in messages:
        assert (words in inside, words in outside) == (speaker == role, speaker != role)


def test_only_targets_have_a_role_and_a_sample_without_headers_has_none() -> None:
    tokenizer = tokenizer_with(CHATML)
    labeller = build_labeller({"a": RoleClass(role="assistant")}, tokenizer)
    ids = rendered(tokenizer, [("user", "hello"), ("assistant", "42")])
    labels = [-100] * (len(ids) - 3) + ids[-3:]
    assert labeller(ids, labels).tolist() == [-100] * (len(ids) - 3) + [0] * 3
    plain = encode(tokenizer, "no headers here")
    assert labeller(plain, plain).tolist() == [1] * len(plain)


def test_a_role_ends_with_its_sample() -> None:
    tokenizer = tokenizer_with(CHATML)
    labeller = build_labeller({"a": RoleClass(role="assistant")}, tokenizer)
    ids, plain = rendered(tokenizer, [("user", "hello"), ("assistant", "42")]), encode(tokenizer, "more")
    row, positions = ids + plain, [*range(len(ids)), *range(len(plain))]
    packed = labeller.label_batch([row], [row], [positions], packed=True)[0]
    assert packed.tolist() == labeller(ids, ids).tolist() + [1] * len(plain)


def roles_of(tokenizer: Any, text: str) -> list[tuple[str, str]]:
    """Who says what, by the tokens of a text."""
    headers = role_headers(tokenizer, TokenTable.of(tokenizer))
    labeller = build_labeller({role: RoleClass(role=role) for role in headers.known}, tokenizer)
    ids = encode(tokenizer, text)
    spoken = groupby(zip(labeller(ids, ids).tolist(), ids, strict=True), key=itemgetter(0))
    return [(labeller.names[index], tokenizer.decode([token_id for _, token_id in tokens])) for index, tokens in spoken]


@pytest.mark.parametrize("bos", ["<|im_start|>", "<s>", None])
def test_a_bos_that_begins_headers_is_no_reason_to_cut_them(bos: str | None) -> None:
    said = "<|im_start|>user\nthe solar\nsystem<|im_end|>\n", "<|im_start|>assistant\nYour operating system has it.<|im_end|>\n"
    assert roles_of(tokenizer_with(CHATML, bos), "".join(said)) == [("user", said[0]), ("assistant", said[1])]


def test_the_beginning_of_a_text_belongs_to_no_role() -> None:
    said = roles_of(tokenizer_with(CHATML), "<|im_start|><|im_start|>user\nhello<|im_end|>\n")
    assert said == [("rest", "<|im_start|>"), ("user", "<|im_start|>user\nhello<|im_end|>\n")]


def test_a_header_that_the_message_before_brings_is_of_the_role_that_it_names() -> None:
    template = TEMPLATES["the user's turn ends with the assistant's header"]
    said = "<|user|>\nhello<|im_end|>\n", "<|assistant|>\n42<|im_end|>\n"
    assert roles_of(tokenizer_with(template, None), "".join(said)) == [("user", said[0]), ("assistant", said[1])]


def test_a_tools_answer_is_the_tools_and_what_follows_it_the_assistants() -> None:
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% elif m['role'] == 'tool' %}"
        "[RESULT] {{ m['content'] }} [/RESULT]{% else %}{% if m['tool_calls'] %}[CALL] "
        "{{ m['tool_calls'][0]['function'] | tojson }}{% else %} {{ m['content'] }}{% endif %}</s>{% endif %}{% endfor %}"
    )
    said = "[INST] hello ", '[/INST][CALL] {"name": "f"}</s>', "[RESULT] 9 ", "[/RESULT] the answer</s>"
    assert roles_of(tokenizer_with(template, None), "".join(said)) == [
        ("user", said[0]),
        ("assistant", said[1]),
        ("tool", said[2]),
        ("assistant", said[3]),
    ]


def test_a_message_of_another_role_ends_the_one_before_and_has_none() -> None:
    said = "<|im_start|>user\nhello<|im_end|>\n", "<|im_start|>critic\nso so<|im_end|>\n", "<|im_start|>assistant\n42<|im_end|>\n"
    assert roles_of(tokenizer_with(CHATML), "".join(said)) == [("user", said[0]), ("rest", said[1]), ("assistant", said[2])]


def test_a_row_that_begins_inside_a_message_has_a_role_from_its_first_header_on() -> None:
    cut, whole = "user\nthe end of it<|im_end|>\n", "<|im_start|>assistant\n42<|im_end|>\n"
    assert roles_of(tokenizer_with(CHATML), cut + whole) == [("rest", cut), ("assistant", whole)]


def test_a_neighbour_in_a_packed_row_changes_no_header() -> None:
    tokenizer = tokenizer_with(TEMPLATES["alpaca"])
    labeller = build_labeller({role: RoleClass(role=role) for role in ("user", "assistant")}, tokenizer)
    rows = [encode(tokenizer, text) for text in ("### Instruction:\nhello\n#", "### Response:\nthe end ###", " Instruction:\nno")]
    together, positions = [token for row in rows for token in row], [place for row in rows for place in range(len(row))]
    packed = labeller.label_batch([together], [together], [positions], packed=True)[0]
    assert packed.tolist() == [0] * len(rows[0]) + [1] * len(rows[1]) + [2] * len(rows[2])


@pytest.mark.parametrize("text", ["#### Response:\nno", "### Responses:\nno", "### Response:no", "x### Response:\nno"])
def test_what_only_looks_like_a_header_is_none(text: str) -> None:
    said = f"### Instruction:\nhello\n{text}\n\n"
    assert roles_of(tokenizer_with(TEMPLATES["alpaca"]), said) == [("user", said)]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("chatml", {"assistant", "user", "system", "tool"}),
        ("tools speak as the user", {"assistant", "user", "system", "tool"}),
        ("channels", {"assistant", "user", "system", "tool"}),
        ("the beginning of a text begins messages", {"assistant", "user", "system", "tool"}),
        ("llama 2", {"assistant", "user", "system"}),
        ("the user's turn ends with the assistant's header", {"assistant", "user", "system"}),
        ("an answer is asked for always", {"assistant", "user", "system"}),
        ("mistral", {"assistant", "user"}),
    ],
)
def test_the_roles_a_template_can_tell(name: str, known: set[str]) -> None:
    tokenizer = tokenizer_with(TEMPLATES[name])
    headers = role_headers(tokenizer, TokenTable.of(tokenizer))
    assert set(headers.known) == known
    assert set(headers.why_not) == {"assistant", "user", "system", "tool"} - known


@pytest.mark.parametrize(
    ("template", "role", "why"),
    [
        (None, "user", "there is none"),
        ("{% for m in messages %}- {{ m['content'] }}\n{% endfor %}", "assistant", "marks its beginning"),
        ("{% for m in messages %}\n\n{{ m['content'] }}{% endfor %}", "user", "marks its beginning"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "user", "marks its beginning"),
        (TEMPLATES["mistral"], "tool", "no such role"),
        (FOLDED, "system", "it stands in a message of `user`"),
        (FOLDED.replace("[INST] {{ told }}", "{{ told }}[INST] "), "system", "no header stands before it"),
        ("{{ messages[0]['content'] }}", "user", "does not render"),
    ],
)
def test_a_role_that_cannot_be_known_is_refused(template: str | None, role: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_labeller({"c": RoleClass(role=role)}, tokenizer_with(template))
    (problem,) = caught.value.problems
    assert problem.path == "dwl.classes.c.role"
    assert why in str(problem)
