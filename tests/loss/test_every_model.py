"""Every causal LM of transformers' auto-mapping that a tiny config can build: loss and all gradients as without us.

`weighted` asks for two classes, one of them DFT, against full logits; `nll` against the model's own forward, router loss included.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dwl_plugin.errors import LossNotTakenError
from dwl_plugin.loss.seam import LossSpec, LossStep, Seam
from dwl_plugin.loss.shift import shift_left

VOCAB = 97

# What a field of a config shrinks to, whichever config has it.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(
        (
            "hidden_size", "d_model", "n_embd", "emb_dim", "word_embed_proj_dim", "embedding_size", "input_embedding_size",
            "output_embedding_size", "lru_width", "attention_hidden_size", "backbone_hidden_size", "embedding_dim",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_inner", "dff", "dim_ff",
            "ffn_hidden_size", "feed_forward_size", "intermediate_size_mlp", "expert_ffn_hidden_size", "dense_intermediate_size",
        ),
        48,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size", "moe_shared_expert_intermediate_size"),
        24,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers", "num_encoder_layers",
            "num_decoder_layers", "num_blocks", "num_layers_per_stack",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "num_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads",
            "num_encoder_attention_heads", "num_decoder_attention_heads", "attention_heads", "swa_num_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_key_value_groups", "num_global_key_value_heads"), 2
    ),
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_size", "d_head", "dim_head", "swa_head_dim", "global_head_dim"), 8),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_layer"), 4
    ),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "index_head_dim"), 8),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions", "context_length"), 128),
    **dict.fromkeys(("sliding_window", "window_size", "chunk_size", "mamba_chunk_size", "attention_window_size", "keep_window_size"), 16),
    "rotary_dim": 8,
    "use_cache": False,  # as in training; some caches cannot hold two layers
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id"), 1),
}  # fmt: skip

# What a config needs besides.
SPECIAL: dict[str, dict[str, Any]] = {
    "mpt": {"attn_pdrop": 0},
    "bamba": {"mamba_n_heads": 8},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "zamba": {"num_hidden_layers": 5},
    "zaya": {"num_experts_per_tok": 1},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 9, "pronunciation_vocab_size": 9},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8},
    "hrm_text": {"num_layers_per_stack": 1},
}


def tiny_config(config_class: type[PreTrainedConfig], **special: Any) -> PreTrainedConfig:
    """The config with each size it has made small, whatever is nested included, and every dropout off."""
    names = _fields(config_class)
    values = {name: size for name, size in SMALL.items() if name in names}
    if "qk_rope_head_dim" in names:
        values |= {"num_key_value_heads": 4, "head_dim": ...}  # latent attention: one key for all heads
    values |= {name: 0.0 for name in names if ("drop" in name or "jitter" in name) and "no_drop" not in name}
    values |= {name: tiny_config(nested) for name, nested in getattr(config_class, "sub_configs", {}).items() if nested.__name__ != "AutoConfig"}
    values |= SPECIAL.get(config_class.model_type, {})
    values = {name: value for name, value in values.items() if value is not ...}
    return config_class(**values | special)


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return names
