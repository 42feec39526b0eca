"""A run of `bench/experiments`, whole: `axolotl train` and its measures, with a tiny model and few rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.experiments import data, run
from bench.experiments.data import Row, Splits
from bench.experiments.measure import Bench

pytest.importorskip("axolotl")
pytestmark = pytest.mark.slow

MEASURED = {"seconds", "date"}


def rows(first: int) -> list[Row]:
    out = []
    for n in range(first, first + 20):
        out.append(Row("maths", f"What is {n} + 1?", f"{n} + 1 = {n + 1}\n#### {n + 1}", str(n)))
        call = f'<tool_call>\n{{"name": "add{n}", "arguments": {{"a": {n}, "b": 1}}}}\n</tool_call>'
        asked = f"Function add{n}(a: integer, b: integer): Add.\n\nAdd {n} and 1."
        out.append(Row("call", asked, call, f"add{n}", {"a": [n], "b": [1]}))
    return out


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Splits(rows(100), rows(200), rows(300), ["What is 7 + 8? The answer is 15. Café №3."])
    monkeypatch.setattr(data, "splits", lambda folder: cut)
    budget = run.Budget({"call": 8, "maths": 8}, {"call": 4, "maths": 4}, {"call": 5, "maths": 5}, decoded=2, decoded_tokens=8)
    monkeypatch.setitem(run.BUDGETS, "cpu", budget)


def executed(model_folder: Path, *job: Any) -> dict[str, Any]:
    found = run.execute(run.Job(*job), run.Place(None, "cpu", str(model_folder)))
    return {key: value for key, value in found.items() if key not in MEASURED}


def test_a_run_can_be_repeated_and_a_rate_of_zero_is_no_training(model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    first = executed(model_folder, "sft", "test", 0.01, 3)
    assert executed(model_folder, "sft", "test", 0.01, 3) == first
    assert executed(model_folder, "sft", "test", 0.01, 4)["nll"] != first["nll"]
    before = executed(model_folder, "sft", "test", 0.0, 0)
    assert first["nll"] < before["nll"] - 0.1

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, before["device"].split()[1]))
    model.get_base_model = lambda: model
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    alone = Bench(model, tokenizer, "<|im_end|>", model.dtype).replies(data.pick(rows(300), call=5, maths=5))
    assert {key: before[key] for key in alone} == pytest.approx(alone, abs=2e-3)  # in bf16


def test_arms_differ_and_are_measured_alike(model_folder: Path) -> None:
    found = {arm: executed(model_folder, arm, "tune", 0.01, 0) for arm in ("sft", "calls: row weights", "nll x mean p", "rlw")}
    assert len({row["targets"] for row in found.values()}) == len({row["steps"] for row in found.values()}) == 1
    assert found["calls: row weights"]["nll/call"] < found["sft"]["nll/call"]
    assert found["calls: row weights"]["nll/maths"] > found["sft"]["nll/maths"]
    assert found["nll x mean p"]["nll"] == pytest.approx(found["sft"]["nll"], abs=0.05)  # Adam does not see a factor
    assert len({row["nll"] for row in found.values()}) == 4
