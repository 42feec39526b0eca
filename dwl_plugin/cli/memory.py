"""How much memory of a card a training takes, by a formula that counts what is there at the peak of a backward pass.

QLoRA, bytes:

    linear layers     0.5 + 1/64 + 4/(64·256) a weight: nf4, and the scales of its blocks, which are quantised as well
    all other weights 2 each: embedding, head
    LoRA              4 a weight, 4 its gradient, 2 its optimizer in 8 bits (8 in 32)
    activations       L·T·H·2, the inputs of the layers, from which each is computed again as its turn comes
    one layer         T·(6·I + 7·H)·2, what autograd keeps of the one whose turn it is, with gradients; its largest weight in bf16
    the loss          `loss.workspace`

Full fine-tuning on R cards, of all weights 16 each, divided by R: in fp32 the weight, its gradient and two of Adam (FSDP2), or in
bf16 the weight and its gradient, in fp32 a copy and two of Adam (ZeRO-3). Whole on each card are two layers in bf16 with their
gradients, and what the whole run needs together, the embedding and the head.

6 and 7 are not derived: they are the whole numbers that come closest to the one run that was measured (`MEASURED`). To what torch
allocates comes what it does not: the context of CUDA, and what an allocator leaves between two tensors.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from dwl_plugin.errors import DWLError
from dwl_plugin.files import read_regular
from dwl_plugin.loss.workspace import loss_bytes

__all__ = ["GIB", "MEASURED", "MODELS", "Shape", "full_bytes", "needed_gib", "qlora_bytes", "shape_of"]

GIB = 2**30
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_LAYER_I, _LAYER_H = 6, 7
_SLOPES = 64 * 2**20
"""Of the gradient in the logits that a trained head makes again, a tile of it."""
_OUTSIDE_TORCH = 1.0
"""GiB."""
_CONFIG_BYTES = 1 << 20


class Shape(BaseModel):
    """The sizes of a dense decoder, under the names of its config.json."""

    hidden_size: int = Field(ge=1, le=10**6)
    intermediate_size: int = Field(ge=1, le=10**7)
    num_hidden_layers: int = Field(ge=1, le=10**4)
    num_attention_heads: int = Field(ge=1, le=10**4)
    num_key_value_heads: int = Field(ge=1, le=10**4)
    head_dim: int | None = Field(None, ge=1, le=10**5)
    vocab_size: int = Field(ge=1, le=10**8)
    tie_word_embeddings: bool = False

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices: queries, keys, values, what joins the heads, gate, up, down."""
        H, I, width = self.hidden_size, self.intermediate_size, self.head_dim or self.hidden_size // self.num_attention_heads  # noqa: E741
        queries, keys = width * self.num_attention_heads, width * self.num_key_value_heads
        return [(H, queries), (H, keys), (H, keys), (queries, H), (H, I), (H, I), (I, H)]

    @property
    def layer_weights(self) -> int:
        return sum(inputs * outputs for inputs, outputs in self.linear)

    @property
    def embedding_weights(self) -> int:
        """Of the embedding, and of the head where that is another matrix."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    @property
    def weights(self) -> int:
        """All but norms and biases."""
        return self.num_hidden_layers * self.layer_weights + self.embedding_weights


def _shape(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int, *, tied: bool, head: int = 128) -> Shape:
    return Shape(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


MODELS = {
    "Qwen/Qwen3-0.6B": _shape(1024, 3072, 28, 16, 8, 151_936, tied=True),
    "Qwen/Qwen3-1.7B": _shape(2048, 6144, 28, 16, 8, 151_936, tied=True),
    "Qwen/Qwen3-4B": _shape(2560, 9728, 36, 32, 8, 151_936, tied=True),
    "Qwen/Qwen3-8B": _shape(4096, 12288, 36, 32, 8, 151_936, tied=False),
    "Qwen/Qwen3-14B": _shape(5120, 17408, 40, 40, 8, 151_936, tied=False),
    "meta-llama/Llama-3.2-1B": _shape(2048, 8192, 16, 32, 8, 128_256, tied=True, head=64),
    "meta-llama/Llama-3.2-3B": _shape(3072, 8192, 28, 24, 8, 128_256, tied=True),
    "meta-llama/Llama-3.1-8B": _shape(4096, 14336, 32, 32, 8, 128_256, tied=False),
    "google/gemma-3-1b-it": _shape(1152, 6912, 26, 4, 1, 262_144, tied=True, head=256),
    "HuggingFaceTB/SmolLM3-3B": _shape(2048, 11008, 36, 16, 4, 128_256, tied=True),
}
"""By the config.json of each on the Hub. `dwl init` takes one of Qwen3 where no model is named, which are from small to large."""


@dataclass(frozen=True)
class _Measured:
    """A run of `bench/gpu/run --stages train`, whose peak is what torch allocates."""

    what: str
    shape: Shape
    tokens: int
    rank: int
    optimizer_bytes: int
    peak_mib: int


MEASURED = _Measured(
    "QLoRA of a random Qwen2 in the shape of 1.5B with a head of its own, rank 16, Adam in 32 bits, 8,192 tokens, on an H200",
    _shape(1536, 8960, 28, 12, 2, 151_936, tied=False),
    8192,
    16,
    8,
    3606,
)


def qlora_bytes(shape: Shape, tokens: int, rank: int = 32, optimizer_bytes: int = 2) -> dict[str, float]:
    """By what they are for; `tokens` of a micro-batch, padding among them."""
    adapter = rank * shape.num_hidden_layers * sum(map(sum, shape.linear))
    return {
        "weights": _NF4 * shape.num_hidden_layers * shape.layer_weights + 2 * shape.embedding_weights,
        "adapter": adapter * (8 + optimizer_bytes),
        "activations": _activations(shape, tokens) + 2 * max(inputs * outputs for inputs, outputs in shape.linear),
        "loss": loss_bytes(tokens, tokens, shape.hidden_size),
    }


def full_bytes(shape: Shape, tokens: int, ranks: int) -> dict[str, float]:
    """The same of one of `ranks` cards that share every weight."""
    return {
        "weights": 16 * shape.weights / ranks,
        "whole": 4 * (2 * shape.layer_weights + shape.embedding_weights),
        "activations": _activations(shape, tokens),
        "loss": loss_bytes(tokens, tokens, shape.hidden_size) + _SLOPES,
    }


def needed_gib(parts: dict[str, float]) -> float:
    """What a card has to have."""
    return sum(parts.values()) / GIB + _OUTSIDE_TORCH


def _activations(shape: Shape, tokens: int) -> int:
    of_all = shape.num_hidden_layers * shape.hidden_size
    return 2 * tokens * (of_all + _LAYER_I * shape.intermediate_size + _LAYER_H * shape.hidden_size)


def shape_of(model: str) -> Shape:
    """Of a model that is known here, lies in a folder, or is in the cache of the Hub. Raises `DWLError` with why there is none."""
    if model in MODELS:
        return MODELS[model]
    config: Any = Path(model, "config.json")
    if not config.is_file():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with suppress(HFValidationError):
            config = try_to_load_from_cache(model, "config.json")
    if not isinstance(config, (str, Path)) or not os.path.isfile(config):
        raise DWLError(f"config.json of {model} is not on this disk")
    try:
        found = json.loads(read_regular(Path(config), _CONFIG_BYTES))
        if any("expert" in key for key in found):
            raise DWLError(f"{model} is a mixture of experts, and the formula is of dense models")
        return Shape.model_validate({"num_key_value_heads": found.get("num_attention_heads"), **found})
    except (ValueError, AttributeError, TypeError, RecursionError):  # a ValidationError is a ValueError
        raise DWLError(f"config.json of {model} has not the sizes of a dense decoder under their usual names") from None
