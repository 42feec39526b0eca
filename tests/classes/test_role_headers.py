"""Roles by chat templates of different kinds, read from tokens; and templates that cannot tell."""

from __future__ import annotations

import copy
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
    "alpaca": (
        "{% for m in messages %}### {{ {'user': 'Instruction', 'assistant': 'Response', 'system': 'Setup', "
        "'tool': 'Tool'}[m['role']] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    ),
}
CONVERSATION = [
    ("system", "be 1 brief"),
    ("user", "hello 2"),
    ("assistant", "the 3 answer"),
    ("user", "so?"),
    ("assistant", "42 is"),
]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = template
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


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("chatml", {"assistant", "user", "system", "tool"}),
        ("tools speak as the user", {"assistant", "user", "system", "tool"}),
        ("channels", {"assistant", "user", "system", "tool"}),
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
        (TEMPLATES["mistral"], "tool", "no such role"),
        ("{{ messages[0]['content'] }}", "user", "does not render"),
    ],
)
def test_a_role_that_cannot_be_known_is_refused(template: str | None, role: str, why: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_labeller({"c": RoleClass(role=role)}, tokenizer_with(template))
    (problem,) = caught.value.problems
    assert problem.path == "dwl.classes.c.role"
    assert why in str(problem)
