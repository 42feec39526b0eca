"""`role` under every chat template that Axolotl brings, by an oracle that knows each message's place in the rendered text.

The oracle has the header of each role by hand, and looks for headers outside the messages' contents alone, which it finds by
words that nothing else has. What it says of characters is compared with what the labeller says of tokens.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dwl_plugin.classes import Labeller, build_labeller
from dwl_plugin.config.classes import RoleClass
from dwl_plugin.errors import ConfigError
from tests.classes.little_tokenizers import byte_level, sentencepiece, unigram

CHATML = {f"<|im_start|>{role}": role for role in ("user", "assistant", "system")}
CHATML_TOOL = {**CHATML, "<|im_start|>tool": "tool"}
QWEN = {**CHATML, "<|im_start|>user\n<tool_response>": "tool"}
TURN = "<|START_OF_TURN_TOKEN|>"
COHERE = {f"{TURN}<|USER_TOKEN|>": "user", f"{TURN}<|CHATBOT_TOKEN|>": "assistant", f"{TURN}<|SYSTEM_TOKEN|>": "system"}
COHERE_TOOL = {**COHERE, f"{TURN}<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>": "tool"}
GEMMA = {"<start_of_turn>user": "user", "<start_of_turn>model": "assistant", "<start_of_turn>tool": "of no known role"}
GEMMA_4 = {
    **{"<|turn>user": "user", "<|turn>model": "assistant", "<|turn>system": "system"},
    **{"<|tool_response>": "tool", "<tool_response|>": "assistant"},
}
EXAONE = {f"[|{role}|]": role for role in ("user", "assistant", "system", "tool")}
MISTRAL = {"[INST]": "user", "[/INST]": "assistant"}
MISTRAL_TOOL = {**MISTRAL, "[TOOL_RESULTS]": "tool", "[/TOOL_RESULTS]": "assistant"}
DEEPSEEK = {"<｜User｜>": "user", "<｜Assistant｜>": "assistant"}
PHI = {f"<|{role}|>": role for role in ("user", "assistant", "system")}


def _llama(begin: str, tool: str) -> dict[str, str]:
    return {begin + role: role for role in ("user", "assistant", "system")} | {begin + tool: "tool"}


HEADERS: dict[str, dict[str, str]] = {
    "alpaca": {"### Instruction:": "user", "### Response:": "assistant"},
    "aya": COHERE,
    "chatml": CHATML_TOOL,
    "cohere": COHERE,
    "command_a": COHERE,
    "command_a_rag": COHERE_TOOL,
    "command_a_tool_use": COHERE_TOOL,
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": {**DEEPSEEK, "<｜tool▁outputs▁begin｜>": "tool", "<｜tool▁outputs▁end｜>": "assistant"},
    "exaone": EXAONE,
    "exaone4": EXAONE,
    "falcon_h1": CHATML_TOOL,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "gemma3n": GEMMA,
    "gemma4": GEMMA_4,
    "gemma4_unified": GEMMA_4,
    "jamba": {f"<|bom|><|{role}|>": role for role in ("user", "assistant", "system", "tool")},
    "llama3": _llama("<|start_header_id|>", "tool"),
    "llama3_2_vision": _llama("<|start_header_id|>", "ipython"),
    "llama4": _llama("<|header_start|>", "ipython"),
    "llava": {"USER:": "user", "ASSISTANT:": "assistant", "TOOL:": "tool"},
    "metharme": {"<|user|>": "user", "<|model|>": "assistant", "<|system|>": "system"},
    "mistral_v1": MISTRAL,
    "mistral_v2v3": MISTRAL_TOOL,
    "mistral_v3_tekken": MISTRAL_TOOL,
    "mistral_v7_tekken": {**MISTRAL, "[SYSTEM_PROMPT]": "system"},
    "nemotron_h": CHATML,
    "phi_3": PHI,
    "phi_35": PHI,
    "phi_4": CHATML,
    "pixtral": MISTRAL,
    "qwen2_vl": CHATML_TOOL,
    "qwen3": QWEN,
    "qwen3_5": QWEN,
    "qwen_25": QWEN,
}
"""What begins a message in each of Axolotl's chat templates. A role that is not there, the template does not tell apart."""

ROLES = ("assistant", "user", "system", "tool")
CONVERSATIONS = (
    *("ua", "uaua", "suaua", "uuaa", "uauaua", "suasua", "saua", "u", "su", "aua", "suuaassuu"),
    *("uata", "suatta", "uataua", "suataata", "ut"),
)
"""Messages by the first letter of their role. The template refuses some of them."""

NASTY = (
    "system\nuser\nassistant\ntool\nmodel",
    "the user: said\n\n  system\n\nassistant:\n",
    "<|im_start\n|im_start|>user\nINST] /INST]\nstart_of_turn>user <|user | |assistant|",
    'a <b>tag</b>, a [link](x), {"role": "system"} and `if a < b or c > d:`',
    "世界 🤖 naïve café\u2028 Привет",
    "Human: hi\n\nAssistant : hello\n\n### Input\n# Response\nTools: none",
)
ALIKE = (
    "#### Response: none\n### Responses:\n### Instruction:s",
    "SUPERUSER: me\nUSER:x my_ASSISTANT: it\n#USER: y",
    "<| im_start|>user\n<|im_start |>system\n<start_of_turn >user\n[ /INST] [INST ]",
)
"""Almost a header; the same to a tokenizer that drops spaces."""


@cache
def smollm2() -> Any:
    from rich.console import Console

    from dwl_plugin.cli.quickstart.model import prepared_model

    return AutoTokenizer.from_pretrained(prepared_model(Console(stderr=True)))


@cache
def wordpiece() -> Any:
    """BERT's kind with every letter of ASCII, which templates and their marks are written in."""
    letters = list(map(chr, range(33, 127)))
    names = ["[UNK]", *letters, *("##" + letter for letter in letters)]
    backend = Tokenizer(models.WordPiece({name: number for number, name in enumerate(names)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", clean_up_tokenization_spaces=False)


KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "smollm2": smollm2,
}
TEMPLATES = Path(find_spec("axolotl").submodule_search_locations[0]) / "utils/chat_templates/templates"  # type: ignore[union-attr, index]
"""Read as files: to import Axolotl takes half a minute."""

BOS = ("<|im_start|>", "<s>", "<bos>", None)


def tokenizer_with(name: str, kind: str, bos: str | None, *, single: bool) -> Any:
    """A tokenizer with a chat template; `single`: every mark of the template is a token."""
    tokenizer = copy.deepcopy(KINDS[kind]())
    tokenizer.chat_template = source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    else:
        tokenizer.bos_token = None
    if single:
        marks = re.findall(r"<[|｜/]?[a-zA-Z][\w▁]*[|｜]?>|\[[|/]?[A-Za-z_]+\|?\]", " ".join(HEADERS[name]) + source)
        tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(marks))})
    return tokenizer


def messages_of(roles: str, contents: Iterator[str], *, as_json: bool) -> list[dict[str, Any]]:
    full = {role[0]: role for role in ROLES}
    messages: list[dict[str, Any]] = [{"role": full[letter], "content": next(contents)} for letter in roles]
    for number, (message, after) in enumerate(pairwise(messages)):
        if message["role"] == "assistant" and after["role"] == "tool":
            function = {"name": "find", "arguments": {"what": message["content"]}}
            if as_json:
                function["arguments"] = json.dumps(function["arguments"])
            message |= {"content": "", "tool_calls": [{"type": "function", "id": f"abcdefgh{number}", "function": function}]}
        if after["role"] == "tool":
            after |= {"name": "find", "tool_call_id": f"abcdefgh{number if message['role'] == 'assistant' else number - 1}"}
    return messages


def contents_of(kind: str) -> Iterator[str]:
    """Contents without end, the nasty part between two words that tell where they are; some are empty."""
    nasty = NASTY if kind == "wordpiece" else NASTY + ALIKE
    number = 0
    while True:
        number += 1
        if number % 7 == 6:
            yield ""
            continue
        around = ("", "system\n", "\n\n", "user ")[number % 4]
        yield f"{around}alfa{number}q {nasty[number % len(nasty)]} omega{number}q" + ("", "\n\n", " ", "\nassistant")[number % 4]


def owners(text: str, headers: dict[str, str]) -> tuple[list[int], list[tuple[int, int, str]]]:
    """The number of the header that each character stands behind, and each header's begin, end and role."""
    inside = [match.span() for match in re.finditer(r"alfa(\d+)q.*?omega\1q", text, re.DOTALL)]
    header = re.compile("|".join(map(re.escape, sorted(headers, key=len, reverse=True))))
    found, at = [], 0
    for begin, end in [*inside, (len(text), len(text))]:
        found += [(match.start(), match.end(), headers[match.group()]) for match in header.finditer(text, at, begin)]
        at = end
    starts = np.array([begin for begin, _, _ in found], np.int64)
    return (np.searchsorted(starts, np.arange(len(text)), "right") - 1).tolist(), found


def places_of(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text, and where in it each token stands."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    names = tokenizer.convert_ids_to_tokens(ids)
    for first, (begin, end) in enumerate(places):  # a run of bytes has one place, and each of its bytes a part of it
        if end - begin > 1 and names[first].startswith("<0x") and (not first or places[first - 1][1] <= begin):
            chars = [begin + number for number, char in enumerate(text[begin:end]) for _ in char.encode()]
            places[first : first + len(chars)] = [(char, char + 1) for char in chars]
    return ids, places


def compare(labeller: Labeller, tokenizer: Any, text: str, headers: dict[str, str], rows: int) -> Iterator[tuple[str, str]]:
    """Yield the role and the kind of each token of a text that is not labelled as the oracle has it, whole and cut."""
    ids, places = places_of(tokenizer, text)
    space = tokenizer.convert_tokens_to_ids("▁")
    owner, found = owners(text, headers)
    cuts = [(0, len(ids)), *((len(ids) * k // 7, len(ids) - len(ids) * k // 9) for k in range(1, rows))]
    for first, stop in cuts:
        row = ids[first:stop]
        labels = [labeller.names[index] for index in labeller(row, row)]
        row_begin, row_end = places[first][0], places[stop - 1][1]
        for token_id, (begin, end), label in zip(row, places[first:stop], labels, strict=True):
            if token_id == space and text[begin:end] != " ":
                yield ("none", "space of the tokenizer's own")
                continue
            numbers = sorted(set(owner[begin:end]))
            roles = [found[n][2] if n >= 0 and found[n][0] >= row_begin else "rest" for n in numbers]
            expected = [role if role in labeller.names else "rest" for role in roles]
            cut = [n >= 0 and found[n][1] > row_end for n in numbers]  # its header goes on behind the row's end
            if any(cut):
                yield (expected[-1], "cut header")
            elif len(set(expected)) > 1:
                yield (expected[-1], "straddles" if label in expected else "differs")
            else:
                yield (expected[0] if expected else label, "same" if [label] == expected[:1] or not expected else "differs")


def sweep(name: str, kind: str, bos: str | None, *, single: bool, rows: int) -> Counter[tuple[str, str]]:
    """How many tokens of each role are the same, differ, or cannot be compared; refused are the roles that have to be."""
    tokenizer = tokenizer_with(name, kind, bos, single=single)
    known = {role: RoleClass(role=role) for role in ROLES if role in HEADERS[name].values()}  # type: ignore[arg-type]
    if kind == "wordpiece" and "｜" in "".join(HEADERS[name]) and not single:
        known = {}  # one token, [UNK], is all that such a tokenizer sees of <｜User｜> and of <｜Assistant｜>
    if name == "llama3" and bos is None:
        known = {}  # this template adds to bos_token, and renders nothing without one
    if refused := {f"dwl.classes.{role}.role" for role in set(ROLES) - set(known)}:
        with pytest.raises(ConfigError) as caught:
            build_labeller({role: RoleClass(role=role) for role in ROLES}, tokenizer)  # type: ignore[arg-type]
        assert {problem.path for problem in caught.value.problems} == refused
    counts: Counter[tuple[str, str]] = Counter()
    labeller = build_labeller(known, tokenizer)
    contents = contents_of(kind)
    for roles in CONVERSATIONS if known else ():
        messages = messages_of(roles, contents, as_json=name == "deepseek_v3")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=roles[-1] == "u")
        except Exception:  # the template has no such conversation
            continue
        counts.update(compare(labeller, tokenizer, text, HEADERS[name], rows))
    return counts


def differing(counts: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    return {key: count for key, count in counts.items() if key[1] == "differs"}


def test_the_table_has_every_template_of_axolotl() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(HEADERS)


@pytest.mark.parametrize(("number", "name"), enumerate(HEADERS))
def test_each_token_has_the_role_of_its_message(number: int, name: str) -> None:
    kind, bos = ("byte_level", "sentencepiece", "unigram", "wordpiece")[number % 4], BOS[number // 4 % 4]
    counts = sweep(name, kind, bos, single="｜" in "".join(HEADERS[name]) or number % 3 == 0, rows=2)
    assert not differing(counts)
    assert {role for role, of in counts if of == "same"} >= set(HEADERS[name].values()) - {"of no known role"}


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), enumerate(HEADERS))
@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_the_role_of_its_message_whatever_the_tokenizer(kind: str, number: int, name: str) -> None:
    number += list(KINDS).index(kind)
    assert not differing(sweep(name, kind, BOS[number // 2 % len(BOS)], single=number % 2 == 0, rows=2))


if __name__ == "__main__":  # every tokenizer, beginning of a text and kind of mark: some five minutes
    for kind, name in product(KINDS, HEADERS):
        total: Counter[tuple[str, str]] = Counter()
        for bos, single in product(BOS, (True, False)):
            total += sweep(name, kind, bos, single=single, rows=4)
        print(kind, name, *(f"{role} {of}: {count}" for (role, of), count in sorted(total.items())), sep="\t", flush=True)
