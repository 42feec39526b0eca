"""The exact bytes of each token id.

The text of a sample is the concatenation of its tokens' bytes, so every byte belongs to one token, also where a
character is spread over several. The first token of a sample may have other bytes (SentencePiece drops its space,
WordPiece adds none): such a token owns a second row.

Suffixes: V token ids, R rows (V, one for ids outside the vocabulary, second spellings), T tokens, S samples, B bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dwl_plugin.errors import DWLError

__all__ = ["TokenTable", "added_ids", "as_bytes", "as_text", "special_ids", "vocabulary_size"]

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Spelling = tuple[bytes, bytes]
"""A token's bytes, and its bytes where it is the first token of a sample."""

_DECODERS = {"Sequence", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece", "ByteLevel"}


def as_text(data: bytes) -> str:
    """`data` as str; a byte that is part of no whole character becomes one lone surrogate, so nothing is lost."""
    return data.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    """The inverse of `as_text`."""
    return text.encode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class TokenTable:
    """Bytes of every token id of one tokenizer.

    Args:
        size: V, one more than the largest token id.
        flat: all spellings, end to end, uint8.
        row_offsets: (R + 1,) where each row begins in `flat`.
        first_in_sample_row: (V + 1,) the row of an id that is the first of a sample.
        special: (V + 1,) True where the tokenizer calls the token special.
    """

    size: int
    flat: NDArray[np.uint8]
    row_offsets: Ints
    first_in_sample_row: Ints
    special: Bools

    @classmethod
    def of(cls, tokenizer: Any) -> TokenTable:
        """Read a tokenizer, fast or slow. Raises `DWLError` where the bytes of its tokens cannot be known."""
        spelled = dict(_spellings(tokenizer))
        size = vocabulary_size(tokenizer)
        rows = [spelled.get(token_id, (b"", b""))[0] for token_id in range(size)] + [b""]
        first_in_sample_row = np.arange(size + 1)
        for token_id, (inside, first) in spelled.items():
            if first != inside:
                first_in_sample_row[token_id] = len(rows)
                rows.append(first)
        special = np.zeros(size + 1, np.bool_)
        special[list(special_ids(tokenizer))] = True
        flat, row_offsets = np.frombuffer(b"".join(rows), np.uint8), np.cumsum([0, *map(len, rows)])
        return cls(size, flat, row_offsets, first_in_sample_row, special)

    @classmethod
    def blank(cls, size: int) -> TokenTable:
        """A table of ids without text."""
        zeros = np.zeros(size + 2, np.int64)
        return cls(size, np.zeros(0, np.uint8), zeros, np.arange(size + 1), np.zeros(size + 1, np.bool_))

    def spelling(self, token_id: int) -> bytes:
        """The bytes of a token that is not the first of a sample."""
        return self.flat[self.row_offsets[token_id] : self.row_offsets[token_id + 1]].tobytes()

    def texts(self) -> list[str]:
        """The text of each token that is not the first of a sample."""
        return [as_text(self.spelling(token_id)) for token_id in range(self.size)]

    def ids_of(self, text: bytes) -> list[int]:
        """The ids of the tokens with this text; several where a tokenizer has, say, `A` and `<0x41>`."""
        length_V = np.diff(self.row_offsets[: self.size + 1])
        as_long = np.flatnonzero(length_V == len(text)).tolist()
        return [token_id for token_id in as_long if self.spelling(token_id) == text]

    def decode(self, ids_T: Ints, starts_S: Ints) -> tuple[bytes, Ints]:
        """The bytes of samples laid end to end, and the (T + 1,) offsets of their tokens.

        Args:
            ids_T: token ids from 0 to V; V stands for every id outside the vocabulary and has no text.
            starts_S: where each sample begins in `ids_T`.
        """
        rows_T = ids_T.copy()
        rows_T[starts_S] = self.first_in_sample_row[ids_T[starts_S]]
        begin_T = self.row_offsets[rows_T]
        length_T = self.row_offsets[rows_T + 1] - begin_T
        offsets = np.concatenate([[0], np.cumsum(length_T)])
        source_B = np.repeat(begin_T - offsets[:-1], length_T)
        source_B += np.arange(offsets[-1])
        return self.flat.take(source_B).tobytes(), offsets


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest token id; ids may have gaps."""
    named = 1 + max((*tokenizer.get_vocab().values(), *_added(tokenizer)), default=-1)
    return int(max(named, getattr(tokenizer, "vocab_size", 0)))


def _added(tokenizer: Any) -> dict[int, Any]:
    added = getattr(tokenizer, "added_tokens_decoder", None)
    return dict(added) if isinstance(added, Mapping) else {}  # mistral-common's is a method that is not implemented


def added_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that were added to the vocabulary."""
    return set(_added(tokenizer))


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that the tokenizer calls special."""
    marked = {token_id for token_id, token in _added(tokenizer).items() if getattr(token, "special", False)}
    return marked | set(tokenizer.all_special_ids) - {None}  # as one has that is named, and not in the vocabulary


def _spellings(tokenizer: Any) -> Iterator[tuple[int, Spelling]]:
    """Yield each id and its bytes, by the first description of them that the tokenizer offers."""
    names: dict[int, str | bytes] = {token_id: name for name, token_id in tokenizer.get_vocab().items()}
    added = {token_id: getattr(token, "content", str(token)) for token_id, token in _added(tokenizer).items()}
    names |= added
    decoders = _decoder_types(tokenizer)
    mistral: Any = tokenizer
    for attribute in ("tokenizer", "instruct_tokenizer", "tokenizer"):
        mistral = getattr(mistral, attribute, None)
    spell: Callable[[int, str], Spelling]
    if hasattr(mistral, "id_to_byte_piece"):  # mistral-common's Tekken; get_vocab() lacks pieces that are not UTF-8
        from mistral_common.tokens.tokenizers.base import SpecialTokenPolicy

        names = {token_id: mistral.id_to_byte_piece(token_id, SpecialTokenPolicy.KEEP) for token_id in range(mistral.n_words)}
        spell = _literal
    elif any(isinstance(name, bytes) for name in names.values()):  # tiktoken's own vocabulary
        spell = _literal
    elif "ByteLevel" in decoders or hasattr(tokenizer, "byte_decoder"):
        # The byte alphabet is for tokens of the model; an added token stands in the text as it is written.
        spell = lambda token_id, name: _literal(token_id, name) if token_id in added else _byte_level(name)  # noqa: E731
    elif mistral is not None or hasattr(tokenizer, "sp_model"):
        spell = lambda token_id, name: _literal(token_id, name) if token_id in added else _sentencepiece(name)  # noqa: E731
    elif decoders <= _DECODERS and hasattr(tokenizer, "convert_tokens_to_string"):
        spell = _ask_decoder(tokenizer, byte_fallback="ByteFallback" in decoders)
    else:
        raise _no_bytes(tokenizer, f"its decoder has {', '.join(sorted(decoders - _DECODERS))}")
    for token_id, name in names.items():
        yield token_id, (name, name) if isinstance(name, bytes) else spell(token_id, name)


def _decoder_types(tokenizer: Any) -> set[str]:
    """The kinds of step in a fast tokenizer's decoder; empty without one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    if backend.decoder is None:
        # Without its decoder, a vocabulary in the byte alphabet is still in the byte alphabet.
        step = backend.pre_tokenizer and json.loads(backend.pre_tokenizer.__getstate__())
        return {"ByteLevel"} & set(_types(step))
    return set(_types(json.loads(backend.decoder.__getstate__())))


def _types(step: Any) -> Iterator[str]:
    if step:
        yield step["type"]
        for inner in (*step.get("decoders", ()), *step.get("pretokenizers", ())):
            yield from _types(inner)


def _literal(token_id: int, name: str) -> Spelling:
    return (as_bytes(name),) * 2


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte: itself where printable, else the next free character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level(name: str) -> Spelling:
    try:
        return (bytes([_BYTE_OF[char] for char in name]),) * 2
    except KeyError:  # outside the byte alphabet: a token that was added to the vocabulary file
        return (as_bytes(name),) * 2


def _byte_fallback(name: str) -> bytes | None:
    """The byte of a token `<0xNN>`."""
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes.fromhex(name[3:5])
    return None


def _sentencepiece(name: str) -> Spelling:
    inside = _byte_fallback(name) or as_bytes(name.replace("\u2581", " "))
    return inside, inside.removeprefix(b" ")


def _ask_decoder(tokenizer: Any, *, byte_fallback: bool) -> Callable[[int, str], Spelling]:
    """Spell by the tokenizer's own decoder, except bytes that are no character by themselves."""
    before = "x"
    skip = len(tokenizer.convert_tokens_to_string([before]))

    def spell(token_id: int, name: str) -> Spelling:
        byte = _byte_fallback(name) if byte_fallback else None
        if byte is not None and byte[0] >= 0x80:
            return byte, byte
        inside = tokenizer.convert_tokens_to_string([before, name])[skip:]
        if "\ufffd" in inside and "\ufffd" not in name:
            raise _no_bytes(tokenizer, f"token {token_id}, {name!r}, decodes to {inside!r}")
        return as_bytes(inside), as_bytes(tokenizer.convert_tokens_to_string([name]))

    return spell


def _no_bytes(tokenizer: Any, why: str) -> DWLError:
    name = getattr(tokenizer, "name_or_path", "") or "without a name"
    return DWLError(f"the tokenizer {type(tokenizer).__name__} ({name}) does not tell the bytes of its tokens: {why}")
