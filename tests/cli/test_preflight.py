"""`dwl preflight`: p against a softmax over full logits, and what the literature says of its mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from dwl_plugin.cli.preflight import advice, summarise
from dwl_plugin.hosts import axolotl_preview
from tests.hosts import harness

Run = Callable[..., Result]
Write = Callable[..., Path]


def p_by_hand(model: Path, count: int, network: Any = None) -> tuple[list[float], list[float]]:
    """p of each target of the first rows, and of those that are the end of the turn, from full logits; of `network`, or of the
    model's own weights in fp64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model).double() if network is None else network
    everything, ends = [], []
    for row in harness.rows(count):
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        answer = len(tokenizer.encode(row["messages"][1]["content"])) + 1
        last = len(ids) - 1 if tokenizer.decode(ids[-1:]) == "\n" else len(ids)  # the template's line end is not trained on
        with torch.no_grad():
            probabilities = network(torch.tensor([ids])).logits[0].softmax(-1)
        p = [float(probabilities[t - 1, ids[t]]) for t in range(last - answer, last)]
        everything += p
        ends.append(p[-1])
    return everything, ends


QLORA = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True}


@pytest.mark.slow
def test_p_of_a_model_in_four_bits(dwl: Run, write_config: Write, little_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU as well: what is measured is the quantised model, not the one that was saved."""
    from bitsandbytes.nn import Linear4bit

    loaded, load_model = [], axolotl_preview.load_model

    def keep(cfg: Any, tokenizer: Any) -> Any:
        loaded.append(load_model(cfg, tokenizer))
        return loaded[-1]

    monkeypatch.setattr(axolotl_preview, "load_model", keep)
    block = {"classes": {"end": {"tokens": ["<|im_end|>"]}}}
    config = write_config(loss="dwl", dwl=block, shuffle_merged_datasets=False, **QLORA)
    result = dwl("preflight", config, "--samples", 5, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (model,) = loaded
    assert sum(isinstance(module, Linear4bit) for module in model.modules()) == 2 * 7  # layers, and what each is made of
    everything, ends = p_by_hand(little_model, 5, model)
    assert found["all"]["mean_p"] == pytest.approx(np.mean(everything), rel=1e-4)
    assert found["classes"][0]["mean_p"] == pytest.approx(np.mean(ends), rel=1e-4)
    saved, _ = p_by_hand(little_model, 5)
    assert found["all"]["mean_p"] != pytest.approx(np.mean(saved), rel=1e-3)


def test_p_is_that_of_the_full_softmax(dwl: Run, write_config: Write, little_model: Path) -> None:
    dwl_block = {"classes": {"end": {"tokens": ["<|im_end|>"]}}}
    config = write_config(loss="dwl", dwl=dwl_block, shuffle_merged_datasets=False)
    result = dwl("preflight", config, "--samples", 5, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    everything, ends = p_by_hand(little_model, 5)
    assert found["all"]["tokens"] == len(everything)
    assert found["all"]["mean_p"] == pytest.approx(np.mean(everything), rel=1e-4)
    assert found["all"]["median_p"] == pytest.approx(np.median(everything), rel=1e-4)
    assert found["all"]["nll"] == pytest.approx(np.mean(-np.log(everything)), rel=1e-4)
    assert sum(found["all"]["histogram"]) == len(everything)
    end, rest = found["classes"]
    assert (end["tokens"], rest["tokens"]) == (5, len(everything) - 5)
    assert end["mean_p"] == pytest.approx(np.mean(ends), rel=1e-4)


@pytest.mark.slow
def test_what_a_person_reads(dwl: Run, write_config: Write) -> None:
    result = dwl("preflight", write_config(loss="dft"), "--samples", 3)
    assert result.exit_code == 0, result.output
    assert "2510.00526" in result.output
    assert "mean p" in result.output


@pytest.mark.parametrize(
    ("mean_p", "words"),
    [
        (0.95, "expect `loss: dft` to beat"),
        (0.75, "expect `loss: dft` to beat"),
        (0.5, "about even"),
        (0.2, "do as well as `loss: dft`, or better"),
        (0.1, "expect `loss: nll` to win"),
        (0.003, "expect `loss: nll` to win"),
        (math.nan, "no target"),
    ],
)
def test_what_the_literature_says(mean_p: float, words: str) -> None:
    assert words in advice(mean_p)


def test_the_mean_is_of_p_and_a_class_without_tokens_has_none() -> None:
    p = np.array([0.9, 0.1, 0.5])
    members = np.array([[True, True, True], [False, False, False]])
    one, none, everything = summarise(("one", "none"), -np.log(p), members)
    assert one.mean == pytest.approx(0.5)
    assert one.median == pytest.approx(0.5)
    assert one.histogram[0] + one.histogram[1] == 1
    assert (none.tokens, math.isnan(none.mean)) == (0, True)
    assert everything.tokens == 3


def test_what_the_data_takes_out_is_not_measured(dwl: Run, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    rows = harness.rows(5)
    weighed = [{**row, "weight": weight, "mark": "m"} for row, weight in zip(rows, (1, 0.5, 2, 0, 0), strict=True)]
    data = harness.write_rows(tmp_path / "weighed.jsonl", weighed)
    block = {"classes": {"end": {"all": [{"tokens": ["<|im_end|>"]}, {"marked": "m"}]}}, "data_weights": True}
    result = dwl("preflight", write_config(data=data, loss="nll", dwl=block, shuffle_merged_datasets=False), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    everything, ends = p_by_hand(little_model, 3)
    assert found["all"]["tokens"] == len(everything)
    assert found["all"]["mean_p"] == pytest.approx(np.mean(everything), rel=1e-4)
    end, rest = found["classes"]
    assert (end["tokens"], rest["tokens"]) == (3, len(everything) - 3)
    assert end["mean_p"] == pytest.approx(np.mean(ends), rel=1e-4)


def test_the_first_token_of_a_row_is_measured_in_no_pack(dwl: Run, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    """In the run the row before it in the pack predicts it; here every row stands alone."""
    from transformers import AutoTokenizer

    texts = ["The answer is 42.", "It is 7.", "So it is."]
    data = harness.write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    source = {"path": str(data), "ds_type": "json", "type": "completion"}
    config = write_config(loss="dwl", dwl={"classes": {"number": {"regex": r"\d+"}}}, datasets=[source], sample_packing=True)
    result = dwl("preflight", config, "--json")
    assert result.exit_code == 0, result.output
    tokenizer = AutoTokenizer.from_pretrained(little_model)
    assert json.loads(result.stdout)["all"]["tokens"] == sum(len(tokenizer.encode(text)) for text in texts)  # and an end of text
