"""The formula for the memory of a card: its weights are those of the models, the measured run comes out, more takes more."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MixtralConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from bench.gpu.cards import by_formula
from dwl_plugin.cli.memory import GIB, MEASURED, MODELS, Shape, full_bytes, needed_gib, qlora_bytes, shape_of
from dwl_plugin.errors import DWLError
from dwl_plugin.loss.workspace import loss_bytes

BILLIONS = {
    "Qwen/Qwen3-0.6B": "0.6",
    "Qwen/Qwen3-1.7B": "1.7",
    "Qwen/Qwen3-4B": "4.0",
    "Qwen/Qwen3-8B": "8.2",
    "Qwen/Qwen3-14B": "14.8",
    "meta-llama/Llama-3.2-1B": "1.2",
    "meta-llama/Llama-3.2-3B": "3.2",
    "meta-llama/Llama-3.1-8B": "8.0",
    "google/gemma-3-1b-it": "1.0",
    "HuggingFaceTB/SmolLM3-3B": "3.1",
}
"""As their model cards say."""


@pytest.mark.parametrize("name", MODELS)
def test_a_shape_has_the_weights_of_its_model(name: str) -> None:
    """Built by transformers, on no device."""
    kinds = {"Qwen": Qwen3Config, "meta-llama": LlamaConfig, "google": Gemma3TextConfig, "HuggingFaceTB": SmolLM3Config}
    config = kinds[name.partition("/")[0]](**MODELS[name].model_dump())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linear = sum(module.weight.numel() for part, module in model.named_modules() if part.endswith("_proj"))
    assert MODELS[name].num_hidden_layers * MODELS[name].layer_weights == linear
    assert MODELS[name].weights == pytest.approx(model.num_parameters(), rel=1e-3)
    assert f"{model.num_parameters() / 1e9:.1f}" == BILLIONS[name]


def test_the_adapter_has_the_weights_of_peft_s() -> None:
    from peft import LoraConfig, get_peft_model

    shape = MODELS["Qwen/Qwen3-0.6B"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**shape.model_dump()))
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained, _ = adapted.get_nb_trainable_parameters()
    assert qlora_bytes(shape, 1, rank=8)["adapter"] == 10 * trained


def test_the_measured_run_comes_out() -> None:
    parts = qlora_bytes(MEASURED.shape, MEASURED.tokens, MEASURED.rank, MEASURED.optimizer_bytes)
    assert sum(parts.values()) / 2**20 == pytest.approx(3606, rel=0.02)
    assert needed_gib(parts) == pytest.approx(1.0 + 3606 / 1024, rel=0.02)


def test_four_bits_and_shared_weights() -> None:
    """Numbers that can be worked out by hand: 2 layers of 4 matrices of 64 × 64 and three of 64 × 256, 1,000 tokens, a head."""
    shape = Shape(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=1000,
        tie_word_embeddings=False,
    )
    layers, embedding = 2 * (4 * 64 * 64 + 3 * 64 * 256), 2 * 64 * 1000
    assert qlora_bytes(shape, 10)["weights"] == pytest.approx(layers * 0.5158691 + embedding * 2, rel=1e-6)
    assert full_bytes(shape, 10, 4)["weights"] == 4 * (layers + embedding)
    assert full_bytes(shape, 10, 4)["whole"] == 4 * (layers + embedding)
    assert full_bytes(shape, 10, 8)["whole"] == full_bytes(shape, 10, 2)["whole"]


def test_more_tokens_take_more_and_nothing_is_negligible_that_is_not() -> None:
    for shape in MODELS.values():
        at = [needed_gib(qlora_bytes(shape, tokens)) for tokens in (1024, 2048, 4096, 8192)]
        assert at == sorted(at)
        assert sum(qlora_bytes(shape, 8192).values()) < 20 * GIB


@pytest.mark.parametrize(("H", "V"), [(1024, 151_936), (5120, 151_936), (2304, 262_144), (2048, 1009)])
def test_no_call_of_the_loss_takes_more_than_its_formula_without_its_plan(H: int, V: int) -> None:
    for T in (100, 2048, 2049, 4096, 8192, 100_000):
        for N in (T, T - 1, T // 2):
            exact, bound = by_formula(T, N, H, V), loss_bytes(T, N, H)
            assert exact <= bound + 16 * 6 * H  # blocks are filled up to 16 rows
            assert bound - exact < 64 * 2**20


def test_shapes_of_folders(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, vocab_size=49_152).save_pretrained(tmp_path)
    shape = shape_of(str(tmp_path))
    assert (shape.hidden_size, shape.vocab_size, shape.linear[1]) == (576, 49_152, (576, 192))
    Qwen2Config(num_key_value_heads=8, num_attention_heads=16, hidden_size=1024).save_pretrained(tmp_path)
    assert shape_of(str(tmp_path)).linear[1] == (1024, 512)


def test_of_what_it_does_not_know_it_says_why(tmp_path: Path) -> None:
    for broken in ("[]", "{", "7", "null", json.dumps({"hidden_size": -1}), "[" * 100_000):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(DWLError, match="has not the sizes of a dense decoder"):
            shape_of(str(tmp_path))
    MixtralConfig().save_pretrained(tmp_path)
    with pytest.raises(DWLError, match="is a mixture of experts"):
        shape_of(str(tmp_path))
    for nowhere in ("nobody/knows-it", "../no name", str(tmp_path / "none")):
        with pytest.raises(DWLError, match="is not on this disk"):
            shape_of(nowhere)
