"""`dwl preflight`: p against a softmax over full logits, and what the literature says of its mean."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from dwl_plugin.cli.preflight import advice, summarise
from tests.hosts import harness

Run = Callable[..., Result]
Write = Callable[..., Path]


def p_by_hand(model: Path, count: int) -> tuple[list[float], list[float]]:
    """p of each target of the first rows, and of those that are the end of the turn, from full logits in fp64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, network = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).double()
    everything, ends = [], []
    for row in harness.rows(count):
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        answer = len(tokenizer.encode(row["messages"][1]["content"])) + 1
        last = (
            len(ids) - 1 if tokenizer.decode(ids[-1:]) == "\n" else len(ids)
        )  # the template's line end is not trained on
        with torch.no_grad():
            probabilities = network(torch.tensor([ids])).logits[0].softmax(-1)
        p = [float(probabilities[t - 1, ids[t]]) for t in range(last - answer, last)]
        everything += p
        ends.append(p[-1])
    return everything, ends


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


@pytest.mark.parametrize(("mean_p", "words"), [
    (0.95, "expect `loss: dft` to beat"),
    (0.75, "expect `loss: dft` to beat"),
    (0.5, "about even"),
    (0.2, "do as well as `loss: dft`, or better"),
    (0.1, "expect `loss: nll` to win"),
    (0.003, "expect `loss: nll` to win"),
    (math.nan, "no target"),
])  # fmt: skip
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
