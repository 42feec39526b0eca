"""Five little tokenizers of different kinds, trained in process in a second."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import tiktoken
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

START, END = "<|im_start|>", "<|im_end|>"
THINK, UNTHINK = "<think>", "</think>"

CORPUS = [
    "The answer is 42. The question was what the answer is, and 1,234.5 apples were eaten by 17 people.",
    "<b>thinking about it</b> and then answering: #### 72\n\nhello hello the the 100 200 300, über naïve café.",
    "\\boxed{12} def function(x): return x + 1 # comment\n世界 世界 こんにちは 🤖🤖 🎉 straße Привет мир",
] * 4


def _specials() -> list[AddedToken]:
    return [
        *(AddedToken(text, special=True, normalized=False) for text in (START, END)),
        *(AddedToken(text, special=False, normalized=False) for text in (THINK, UNTHINK)),
    ]


def _host(backend: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    backend.add_tokens([token for token in _specials() if not token.special])
    backend.add_special_tokens([token for token in _specials() if token.special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **kwargs)


@cache
def _byte_level_backend() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    return backend


@cache
def byte_level() -> Any:
    """GPT-2's kind: characters are cut into bytes, and merges may join parts of two characters."""
    return _host(Tokenizer.from_str(_byte_level_backend().to_str()))


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def sentencepiece() -> Any:
    """Llama 2's kind: ▁ for a space, one put before the text, bytes for what the vocabulary lacks."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    ascii_only = ["".join(char for char in text if char.isascii()) for text in CORPUS]
    specials = ["<unk>", *BYTES]
    backend.train_from_iterator(ascii_only, trainers.BpeTrainer(vocab_size=500, special_tokens=specials, show_progress=False))
    trained = Tokenizer(backend.model)  # without the byte tokens as special ones
    trained.model.byte_fallback = True
    trained.normalizer = backend.normalizer
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _host(trained, unk_token="<unk>")


@cache
def unigram() -> Any:
    """T5's kind with byte fallback: every word begins with ▁, and a sample's first one is dropped."""
    words = sorted({word for text in CORPUS for word in text.split() if word.isascii()})
    letters = sorted({char for text in CORPUS for char in text if char.isascii() and char != " "})
    vocabulary = [("<unk>", 0.0), *((byte, -12.0) for byte in BYTES), ("▁", -3.0)]
    vocabulary += [("▁" + word, -5.0) for word in words] + [(letter, -9.0) for letter in letters]
    backend = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return _host(backend, unk_token="<unk>")


@cache
def wordpiece() -> Any:
    """BERT's kind: ## continues a word, every other token begins with a space."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False))
    return _host(backend, unk_token="[UNK]")


class TiktokenLike:
    """What remote code puts around tiktoken (Qwen 1, Kimi): the vocabulary's keys are bytes."""

    name_or_path = "tiktoken-like"

    def __init__(self) -> None:
        alphabet = {char: byte for byte, char in enumerate(_byte_order())}
        ids = sorted(_byte_level_backend().get_vocab().items(), key=lambda item: item[1])
        self.ranks = {bytes(alphabet[char] for char in name): rank for rank, (name, _) in enumerate(ids)}
        self.special = {text: len(ids) + n for n, text in enumerate((START, END))}
        self.encoding = tiktoken.Encoding(
            "little", pat_str=r"\s?\w+|\s?[^\w\s]+|\s+", mergeable_ranks=self.ranks, special_tokens=self.special
        )
        self.all_special_ids = list(self.special.values())

    def get_vocab(self) -> dict[Any, int]:
        return {**self.ranks, **self.special}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return self.encoding.encode(text, allowed_special="all")

    def decode(self, ids: list[int], **_: Any) -> str:
        return self.encoding.decode(ids)


def _byte_order() -> list[str]:
    """The byte alphabet, by its definition: what prints stands for itself, the others are counted from U+0100."""
    shown, count = [], 0
    for byte in range(256):
        prints = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        shown.append(chr(byte) if prints else chr(256 + count))
        count += not prints
    return shown


@cache
def tiktoken_like() -> Any:
    return TiktokenLike()


KINDS: dict[str, Callable[[], Any]] = {
    "byte_level": byte_level,
    "sentencepiece": sentencepiece,
    "unigram": unigram,
    "tiktoken": tiktoken_like,
    "wordpiece": wordpiece,
}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, nothing put around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def decode(tokenizer: Any, ids: list[int]) -> str:
    """The host's own decoding, special tokens included."""
    return str(tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""
