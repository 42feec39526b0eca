"""Every causal LM of transformers' auto-mapping that a tiny config can build: loss and all gradients as without us.

`weighted` asks for two classes, one of them DFT, against full logits; `nll` against the model's own forward, router loss included.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwl_plugin.loss.seam import Seam
from dwl_plugin.loss.shift import shift_left
from dwl_plugin.loss.spec import LossSpec, PendingLoss
from dwl_plugin.loss.token_losses import Power

with warnings.catch_warnings(action="ignore"):  # torchao's docstrings, where nothing compiled is kept
    import transformers
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 97
ROWS, LENGTH = 2, 16

# What a field of a config shrinks to, whichever config has it.
SIZES = {
    VOCAB: "vocab_size vocab_size_per_layer_input decoder_vocab_size",
    128: """max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length""",
    48: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff dim_ff d_ff ffn_hidden_size
        feed_forward_size intermediate_size_mlp expert_ffn_hidden_size dense_intermediate_size""",
    32: """hidden_size d_model n_embd emb_dim word_embed_proj_dim embedding_size input_embedding_size output_embedding_size
        embed_dim lru_width attention_hidden_size backbone_hidden_size embedding_dim""",
    24: """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size""",
    16: """kv_lora_rank q_lora_rank o_lora_rank sliding_window window_size chunk_size mamba_chunk_size
        attention_window_size keep_window_size""",
    8: """head_dim kv_channels attention_head_size d_head dim_head swa_head_dim global_head_dim d_kv rotary_dim
        qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim mamba_d_state state_size ssm_state_size""",
    4: """num_attention_heads num_heads n_head n_heads decoder_attention_heads encoder_attention_heads
        num_encoder_attention_heads num_decoder_attention_heads attention_heads swa_num_attention_heads
        num_experts num_local_experts n_routed_experts moe_num_experts""",
    2: """num_hidden_layers num_layers n_layer n_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_blocks depth num_layers_per_stack num_key_value_heads num_kv_heads swa_num_key_value_heads
        num_global_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts""",
    1: """n_group topk_group num_expert_group pad_token_id bos_token_id eos_token_id sep_token_id cls_token_id
        mask_token_id""",
}
SMALL: dict[str, Any] = {name: size for size, names in SIZES.items() for name in names.split()}
SMALL["use_cache"] = False  # as in training; some caches cannot hold two layers

# What a config needs besides; `...` leaves a field at its default. Keys are model types, of nested configs too.
NO_FLA = {"layer_types": ["full_attention"] * 2}  # where fla is installed, linear attention asks for a GPU
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8},
    "bailing_hybrid": NO_FLA,
    "blt": {"encoder_hash_byte_group_size": [3], "encoder_hash_byte_group_vocab": 97},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe"]},
    "dots1": {"n_shared_experts": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
    "gemma4_text": {"hidden_size_per_layer_input": 8},
    "git_vision_model": {"image_size": 8, "patch_size": 4},
    "got_ocr2_vision": {"output_channels": 8, "image_size": 64, "mlp_dim": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8},
    "hrm_text": {"num_layers_per_stack": 1},
    "kimi_linear": NO_FLA,
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2},
    "qwen3_5_moe_text": NO_FLA,
    "qwen3_5_text": NO_FLA,
    "qwen3_next": NO_FLA,
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * 2, "local_attn_chunk_length": 8},
    "roc_bert": {"pronunciation_embed_dim": 8, "shape_embed_dim": 8, "shape_vocab_size": 9, "pronunciation_vocab_size": 9},
    "t5": {"decoder_start_token_id": 0},
    "xlstm": {"mode": "train", "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": ..., "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "use_mamba_kernels": False},
    "zaya": {"num_experts_per_tok": 1},
}


# What a forward needs besides token ids and labels.
def extra_inputs(model: PreTrainedModel) -> dict[str, Any]:
    if model.config.model_type == "git":
        return {"pixel_values": torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    return {}


def tiny_config(config_class: type[PreTrainedConfig], **special: Any) -> PreTrainedConfig:
    """The config with each size it has made small, whatever is nested included, and every dropout off."""
    names = _fields(config_class)
    values = {name: size for name, size in SMALL.items() if name in names}
    if "qk_rope_head_dim" in names:
        values |= {"num_key_value_heads": 4, "head_dim": ...}  # latent attention: one key for all heads
    for name in names:
        if "drop" in name or "jitter" in name:
            rate = getattr(config_class, name, None)  # a dataclass keeps its defaults on the class
            values |= {name: type(rate)(0)} if isinstance(rate, (int, float)) else {}
    if nested_names := getattr(config_class, "sub_configs", {}):
        default = config_class()
        nested = {name: getattr(default, name, None) for name in nested_names}
        values |= {name: tiny_config(type(config)) for name, config in nested.items() if isinstance(config, PreTrainedConfig)}
    values |= SPECIAL.get(config_class.model_type, {})
    values = {name: value for name, value in values.items() if value is not ...}
    return config_class(**values | special)


def _fields(config_class: type[PreTrainedConfig]) -> set[str]:
    names = set(inspect.signature(config_class.__init__).parameters)
    if dataclasses.is_dataclass(config_class):
        names |= {field.name for field in dataclasses.fields(config_class)}
    return names


@dataclasses.dataclass
class Result:
    loss: torch.Tensor
    logits: torch.Tensor | None
    gradients: dict[str, torch.Tensor]


SPECS = {"nll": LossSpec(), "weighted": LossSpec(weight=(0.3, 1.7), objective=(Power(1.0, 0.05), Power()))}


def build(name: str) -> PreTrainedModel:
    model_class = getattr(transformers, name)
    config = tiny_config(model_class.config_class)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = True
    with torch.device("meta"):
        assert sum(p.numel() for p in model_class(copy.deepcopy(config)).parameters()) < 5_000_000, "not tiny"
    torch.manual_seed(0)
    model = model_class(config).train()
    with torch.no_grad():  # initial logits are all alike, and biases and scales are 0 and 1: nothing would show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, labels and class ids, with ignored stretches."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB - 8, (ROWS, LENGTH), generator=g)
    labels = ids.clone()
    labels[0, :5] = labels[1, 8:10] = labels[1, 14:] = -100
    return ids, labels, torch.randint(0, 2, ids.shape, generator=g)


def weighted_nll(logits: torch.Tensor, targets: torch.Tensor, class_ids: torch.Tensor, spec: LossSpec) -> torch.Tensor:
    """The mean over targets of w·sg(max(p^a, m))·nll by its definition, from full logits."""
    nll = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    slot = class_ids.flatten().clamp(min=0)
    powers = [objective for objective in spec.objective if isinstance(objective, Power)]
    columns = (spec.weight, [power.exponent for power in powers], [power.min_weight for power in powers])
    weight, exponent, floor = (torch.tensor(column)[slot] for column in columns)
    paid = weight * (-nll).exp().pow(exponent).maximum(floor).detach()
    return (paid * nll).sum() / (targets != -100).sum()


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def eager(model: PreTrainedModel, spec: LossSpec) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, labels, class_ids = batch()
    torch.manual_seed(2)
    out = model(input_ids=ids, labels=labels, **extra_inputs(model))
    loss = out.loss
    if spec != SPECS["nll"]:
        # Take the model's cross-entropy out of its loss, so that only the rest (router losses) stays, and put ours in.
        logits = [out.logits[:, -LENGTH:]]  # behind what stands for an image
        logits += getattr(out, "logits_ngram", torch.empty(0, 0)).unbind(1)  # ProphetNet: one stream for each token ahead
        layouts = (shift_left(labels), shift_left(class_ids)), (labels, class_ids)
        length = logits[0].shape[1]
        layouts = [tuple(tensor[:, :length] for tensor in layout) for layout in layouts]

        def mean(layout: tuple[torch.Tensor, ...], spec: LossSpec) -> torch.Tensor:
            return torch.stack([weighted_nll(stream, *layout, spec) for stream in logits]).mean()

        plain = [mean((targets, torch.zeros_like(classes)), SPECS["nll"]) for targets, classes in layouts]
        has_router = getattr(out, "aux_loss", None) is not None
        its = 0 if has_router else min((0, 1), key=lambda i: (plain[i] - loss).abs().item())
        loss = loss - plain[its] + mean(layouts[its], spec)
    return loss.detach(), gradients(model, loss)


def ours(model: PreTrainedModel, spec: LossSpec) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[str]]:
    ids, labels, class_ids = batch()
    said: list[str] = []
    seam = Seam(model, said.append)
    step = PendingLoss(spec, labels, class_ids if len(spec.weight) > 1 else None)
    torch.manual_seed(2)
    try:
        with seam.armed(step):
            loss = model(input_ids=ids, labels=labels, **extra_inputs(model)).loss
    finally:
        seam.detach()
    return loss.detach(), gradients(model, loss), said


def difference(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error of any parameter's gradient. Gradients that are 0 but for rounding (a bias before a softmax)
    are measured against the whole."""
    assert got.keys() == want.keys(), got.keys() ^ want.keys()
    whole = torch.stack([g.norm() for g in want.values()]).norm()
    errors = [((got[n] - want[n]).norm() / want[n].norm().clamp(min=1e-3 * whole)).item() for n in want]
    return max(zip(errors, want, strict=True))


CANNOT_BUILD = {
    "CohereCompassForCausalLM": "its text model reads rotary settings that its text config cannot hold",
    "Gemma3nForConditionalGeneration": "needs timm",
    "Gemma4AssistantForCausalLM": "reads the states of another model",
    "Gemma4UnifiedAssistantForCausalLM": "reads the states of another model",
    "MusicgenForCausalLM": "predicts several audio codebooks: it has no one output head",
    "MusicgenMelodyForCausalLM": "predicts several audio codebooks: it has no one output head",
    "OlmoHybridForCausalLM": "linear attention; fla, where installed, wants a GPU",
    "Qwen4ExpForCausalLM": "linear attention; fla, where installed, wants a GPU",
}
CAUSAL = [name for name in dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) if name not in CANNOT_BUILD]
OTHERS = [
    "BartForConditionalGeneration",
    "LlavaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "T5ForConditionalGeneration",
]
MATERIALISE: set[str] = set()

REPRESENTATIVES = {
    "BartForConditionalGeneration",  # encoder-decoder, a bias beside the head
    "CohereForCausalLM",  # logits times a scale
    "GPT2LMHeadModel",
    "Gemma2ForCausalLM",  # softcap
    "GraniteForCausalLM",  # logits over a scale
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MixtralForCausalLM",  # router loss
    "Phi3ForCausalLM",
    "ProphetNetForCausalLM",  # log_softmax and nll_loss over several streams
    "Qwen3MoeForCausalLM",  # router loss
    "T5ForConditionalGeneration",  # encoder-decoder, a scale before the head
    "TrOCRForCausalLM",  # calls a loss class itself, without a shift
    "XLNetLMHeadModel",  # calls a loss class itself
}


SWEEP = [pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow) for name in sorted([*CAUSAL, *OTHERS])]


@pytest.mark.parametrize("name", SWEEP)
@pytest.mark.filterwarnings("default")  # theirs
def test_loss_and_all_gradients_are_those_of_full_logits(name: str) -> None:
    model = build(name)
    for spec in SPECS.values():
        want_loss, want = eager(model, spec)
        got_loss, got, said = ours(model, spec)
        torch.testing.assert_close(got_loss, want_loss, rtol=1e-5, atol=0.0)
        error, parameter = difference(got, want)
        assert error <= 1e-5, parameter
        assert bool(said) == (name in MATERIALISE), said


def test_the_sweep_is_of_every_causal_model() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) >= CANNOT_BUILD.keys()
    assert len(CAUSAL) >= 169
