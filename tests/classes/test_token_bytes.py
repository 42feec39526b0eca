"""The bytes of tokens: the decoded text is the host's own, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dwl_plugin.classes import TokenTable
from dwl_plugin.classes.token_bytes import as_bytes, as_text
from dwl_plugin.errors import DWLError
from tests.classes.little_tokenizers import END, KINDS, START, THINK, decode, encode

TEXTS = [
    "Hello the answer, 1,234.5 don't.",
    f"{START}über 世界 🤖🎉 {THINK}x</think>  two  spaces{END}\n",
    " leading",
    "  two",
    "\ttab\r\n\x00\x7f",
    "",
]


def text_of(table: TokenTable, ids: list[int]) -> str:
    return as_text(table.decode(np.array(ids, np.int64), np.zeros(int(bool(ids)), np.int64))[0])


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", KINDS)
def test_decodes_as_the_host_does(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]()
    ids = encode(tokenizer, text)
    assert text_of(TokenTable.of(tokenizer), ids) == decode(tokenizer, ids)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_opens_anew(kind: str) -> None:
    tokenizer = KINDS[kind]()
    table = TokenTable.of(tokenizer)
    first, second = encode(tokenizer, "Hello"), encode(tokenizer, " the answer")
    data, offsets = table.decode(np.array(first + second), np.array([0, len(first)]))
    assert as_text(data) == decode(tokenizer, first) + decode(tokenizer, second)
    assert len(offsets) == len(first + second) + 1
    assert offsets[len(first)] == len(decode(tokenizer, first))


def test_a_byte_belongs_to_one_token_though_its_character_is_split() -> None:
    tokenizer = KINDS["sentencepiece"]()
    ids = encode(tokenizer, "a🤖")
    data, offsets = TokenTable.of(tokenizer).decode(np.array(ids), np.zeros(1, np.int64))
    robot = "🤖".encode()
    assert data.endswith(robot)
    assert np.diff(offsets)[-4:].tolist() == [1, 1, 1, 1]
    assert data[: offsets[-2]].endswith(robot[:3])


@pytest.mark.parametrize("data", [b"abc", "é世🤖".encode(), b"\xf0\x9f\xa4", b"a\x80\xffb", "🤖".encode()[1:]])
def test_text_keeps_bytes_that_are_no_character(data: bytes) -> None:
    assert as_bytes(as_text(data)) == data


def test_special_tokens_are_known_and_added_ones_are_text() -> None:
    tokenizer = KINDS["byte_level"]()
    table = TokenTable.of(tokenizer)
    assert table.special[encode(tokenizer, START)].tolist() == [True]
    assert table.special[encode(tokenizer, THINK)].tolist() == [False]


def test_an_added_token_is_not_in_the_byte_alphabet() -> None:
    backend = Tokenizer.from_str(KINDS["byte_level"]().backend_tokenizer.to_str())
    backend.add_tokens(["é", "two words"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert text_of(TokenTable.of(tokenizer), encode(tokenizer, "étwo words")) == "étwo words"


def test_an_id_outside_the_vocabulary_has_no_text() -> None:
    table = TokenTable.of(KINDS["byte_level"]())
    assert table.decode(np.array([table.size]), np.zeros(1, np.int64))[0] == b""


def test_ids_of_a_text_may_be_several() -> None:
    table = TokenTable.of(KINDS["sentencepiece"]())
    assert [table.spelling(token_id) for token_id in table.ids_of(b"a")] == [b"a", b"a"]


def gpt2_slow(byte_alphabet_attribute: str) -> Any:
    fast = KINDS["byte_level"]()
    return SimpleNamespace(get_vocab=fast.get_vocab, all_special_ids=[], **{byte_alphabet_attribute: {}})


def test_a_slow_tokenizer_with_a_byte_decoder_is_byte_level() -> None:
    fast = KINDS["byte_level"]()
    ids = encode(fast, "über 🤖")
    assert text_of(TokenTable.of(gpt2_slow("byte_decoder")), ids) == "über 🤖"


def test_a_slow_sentencepiece_tokenizer_is_read_by_its_pieces() -> None:
    fast = KINDS["sentencepiece"]()
    slow: Any = SimpleNamespace(get_vocab=fast.get_vocab, all_special_ids=[], sp_model=object())
    assert text_of(TokenTable.of(slow), encode(fast, "über the 🤖")) == "über the 🤖"


def test_a_tokenizer_without_bytes_is_named() -> None:
    with pytest.raises(DWLError, match=r"SimpleNamespace.*bytes of its tokens"):
        TokenTable.of(gpt2_slow("encoder"))


def test_a_decoder_that_is_not_known_is_named() -> None:
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.decoder = decoders.CTC()
    with pytest.raises(DWLError, match="CTC"):
        TokenTable.of(PreTrainedTokenizerFast(tokenizer_object=backend))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "text"),
    [("tekken_240911.json", "<s>héllo 🤖 世界"), ("mistral_instruct_tokenizer_240323.model.v3", "<s> héllo 🤖 世界")],
)
def test_mistral_common_is_read_by_its_bytes(file: str, text: str) -> None:
    import mistral_common
    from transformers.tokenization_mistral_common import MistralCommonBackend

    tokenizer: Any = MistralCommonBackend(str(Path(mistral_common.__file__).parent / "data" / file))
    table = TokenTable.of(tokenizer)
    assert text_of(table, tokenizer.encode("héllo 🤖 世界", add_special_tokens=True)) == text
    assert table.special[1]
