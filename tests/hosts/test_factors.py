"""Factors of the data in a real trainer: gradients beside the definition in fp64, however a step's samples are laid out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from dwl_plugin.config import Reduction
from dwl_plugin.loss.reference import reference_loss
from dwl_plugin.loss.token_losses import Power
from dwl_plugin.values import SAMPLE_POWERS
from tests.hosts import ranks as on_ranks
from tests.hosts.harness import tokenized, train, write_rows
from tests.hosts.ranks import Ranks

Configure = Callable[..., dict[str, Any]]
REDUCTIONS = get_args(Reduction)
CLASSES = {"number": {"regex": r"\d+", "token_loss": "dft"}, "control": {"tokens": ["<|im_end|>"]}}
ALPHA = {"number": 5.0, "control": 2.0, "rest": 3.0}
TOKEN_LOSSES = [Power(1.0), Power(), Power()]
Parameters = dict[str, torch.Tensor]
ALL_LABELS = -1
"""As many targets as tokens."""


def samples(tokenizer: Any, *, first_labels: bool = True) -> list[dict[str, Any]]:
    """Eight: with factors at every level; a factor of 0 within a number, which goes on being one; none but 0; one target; a first
    label that is trained on; no target; factors below 0, the last of them where p is high or low; factors of 1."""
    texts: list[tuple[str, int | None]] = [
        ("17 and 25 make 42, as I see it.", None),
        ("The answer is 123456 in all", None),
        ("23 and 8 make 31", None),
        ("What is 3 + 4? 7", 1),
        ("the first word 9 counts as well 11", ALL_LABELS if first_labels else None),
        ("what is it", 0),
        ("12 and 12 make 25. No: The answer is 24.", None),
        ("5 and 5 make 10, " * 5, None),
    ]
    rows = []
    for at, (text, targets) in enumerate(texts):
        row = tokenized(tokenizer, text, None if targets == ALL_LABELS else targets)
        if targets == ALL_LABELS:
            row["labels"] = list(row["input_ids"])
        if targets == 0 and not first_labels:
            row["labels"][0] = -100
        factors = [1.0] * len(row["input_ids"])
        if at == 0:
            factors = [[0.25, 1.0, 3.0][t % 3] for t in range(len(factors))]
        if at == 1:
            digits = [t for t, own in enumerate(row["input_ids"]) if tokenizer.decode([own]).strip().isdigit()]
            factors[digits[len(digits) // 2]] = 0.0
        if at == 2:
            factors = [0.0] * len(factors)
        if at == 6:
            factors = [-0.5 if t % 4 == 1 else 1.0 for t in range(len(factors))]
        rows.append({**row, "token_weight": factors, "weight": [0.5, 1.0, 1.0, 2.0, 0.7, 1.0, 1.5, 0.3][at]})
    return rows


@cache
def _truth(folder: Path, reduction: Reduction, first_labels: bool) -> tuple[float, Parameters, Parameters]:
    """Loss, gradients and parameters of the definition: every sample alone in the model, in fp64."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    rows = samples(tokenizer, first_labels=first_labels)
    longest = max(len(row["input_ids"]) for row in rows)
    logits, labels = torch.zeros(8, longest, 400, dtype=torch.float64), torch.full((8, longest), -100)
    factors, members = torch.zeros(8, longest, dtype=torch.float64), torch.zeros(3, 8, longest, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids, T = row["input_ids"], len(row["input_ids"])
        logits[b, :T] = model(input_ids=torch.tensor([ids])).logits[0]
        labels[b, :T] = torch.tensor(row["labels"])
        factors[b, :T] = torch.tensor(row["token_weight"], dtype=torch.float64) * row["weight"]
        members[0, b, :T] = torch.tensor([any(c.isdigit() for c in tokenizer.decode([own])) for own in ids])
        members[1, b, :T] = torch.tensor([own == 2 for own in ids])
    members[2] = ~members[:2].any(0)
    assert int(members[0].sum()) > 10
    loss = reference_loss(logits, labels, members, [0.5, 0.2, 0.3], TOKEN_LOSSES, reduction, factors)
    loss.backward()
    parameters = dict(model.named_parameters())
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    return loss.item(), gradients, {name: p.detach().clone() for name, p in parameters.items()}


def in_fp64(trainer: Any) -> None:
    trainer.model.double()


def padded_left(trainer: Any) -> None:
    in_fp64(trainer)
    trainer.processing_class.padding_side = "left"
    assert trainer.data_collator.tokenizer is trainer.processing_class


LAYOUTS: dict[str, dict[str, Any]] = {
    "8x1": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
    "8x1, padded on the left": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
    "1x8": {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    "packed": {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "sample_packing": True, "sequence_len": 1024},
}


def settings_of(data: Path, reduction: str, **changes: Any) -> dict[str, Any]:
    weights = {"row": "weight", "token": "token_weight", "allow_negative": True}
    return {
        "loss": "dwl",
        "dwl": {"classes": CLASSES, "alpha": ALPHA, "reduction": reduction, "data_weights": weights},
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
        "max_steps": 1,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        **changes,
    }


def cases() -> list[Any]:
    """Every layout in the quick run; every pair in that of a week."""
    pairs = [(reduction, layout) for reduction in REDUCTIONS for layout in LAYOUTS]
    quick = {("weighted_mean", "1x8"), ("sample_mean", "packed")}
    quick |= {("class_mean", "8x1, padded on the left"), ("sequence_mean_token_sum", "8x1")}
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.weekly) for pair in pairs]


@pytest.mark.parametrize(("reduction", "layout"), cases())
def test_gradients_are_the_definitions_however_samples_are_laid_out(
    configure: Configure, model_folder: Path, tokenizer: Any, tmp_path: Path, reduction: Reduction, layout: str
) -> None:
    # A first label is predicted by what is before it in its row, padding or another sample: the host has it so.
    first_labels = layout in ("8x1", "1x8") or reduction in SAMPLE_POWERS
    data = write_rows(tmp_path / "eight.jsonl", samples(tokenizer, first_labels=first_labels))
    before = padded_left if "left" in layout else in_fp64
    run = train(configure(**settings_of(data, reduction, **LAYOUTS[layout])), before)
    loss, gradients, _ = _truth(model_folder, reduction, first_labels)
    assert run.logged("loss") == [pytest.approx(loss, rel=1e-6)]
    assert_same(run.gradients[0], gradients)


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys()
    ours, theirs = (torch.cat([gradients[name].flatten() for name in want]) for gradients in (got, want))
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize(
    "reduction", [pytest.param(r, marks=() if r in ("weighted_mean", "sample_mean") else pytest.mark.weekly) for r in REDUCTIONS]
)
def test_gradients_of_two_ranks_are_the_definitions(
    configure: Configure, model_folder: Path, tokenizer: Any, ranks: Ranks, tmp_path: Path, reduction: Reduction
) -> None:
    data = write_rows(tmp_path / "eight.jsonl", samples(tokenizer))
    layout = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}
    first, second = ranks(on_ranks.train, configure(**settings_of(data, reduction, **layout)), in_fp64)
    loss, gradients, parameters = _truth(model_folder, reduction, True)
    assert first.logged("loss") == [pytest.approx(loss, rel=1e-6)]
    assert first.logged("dwl/factor") == second.logged("dwl/factor")
    for report in (first, second):
        assert_same({name: parameters[name] - p for name, p in report.parameters.items()}, gradients)


def plain_rows(tokenizer: Any, **columns: Any) -> list[dict[str, Any]]:
    """The eight without what they say, but for `columns`."""
    kept = ("input_ids", "labels", "attention_mask")
    return [{**{key: row[key] for key in kept}, **{k: of(row) for k, of in columns.items()}} for row in samples(tokenizer)]


@pytest.mark.parametrize("reduction", [pytest.param(r, marks=() if r == "class_mean" else pytest.mark.weekly) for r in REDUCTIONS])
def test_factors_of_one_are_no_key_bit_for_bit(configure: Configure, tokenizer: Any, tmp_path: Path, reduction: Reduction) -> None:
    ones = plain_rows(tokenizer, token_weight=lambda row: [1.0] * len(row["labels"]), weight=lambda row: 1)
    layout = {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "optimizer": "adamw_torch", "max_steps": 2, "num_epochs": 2}
    settings = settings_of(write_rows(tmp_path / "ones.jsonl", ones), reduction, **layout)
    with_factors = train(configure(out=tmp_path / "with", **settings))
    settings["dwl"].pop("data_weights")
    settings["datasets"][0]["path"] = str(write_rows(tmp_path / "plain.jsonl", plain_rows(tokenizer)))
    without = train(configure(out=tmp_path / "without", **settings))
    assert len(without.gradients) == 2
    for got, want in zip(with_factors.gradients, without.gradients, strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    for key in ("loss", "nll", "dwl/weight", "dwl/loss_share/number", "dwl/token_share/control"):
        assert with_factors.logged(key) == without.logged(key), key
    assert set(with_factors.logged("dwl/factor")) == {1.0} or reduction in SAMPLE_POWERS
    assert not without.logged("dwl/factor")


# what is reported


def two_data_sets(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Three rows to train on from one data set, five from another, and five to evaluate on, of the second one and of a third, which
    goes by its path."""
    rows = samples(tokenizer)

    def entry(file: str, own: list[dict[str, Any]], **name: str) -> dict[str, Any]:
        path = write_rows(folder / f"{file}.jsonl", own)
        return {"path": str(path), "ds_type": "json", "type": None, "split": "train", **name}

    return {
        "datasets": [entry("sums", rows[:3], name="sums"), entry("words", rows[3:], name="words")],
        "test_datasets": [entry("words-held-out", rows[:2], name="words"), entry("held-out", rows[4:7])],
    }


def reported(folder: Path, of_sets: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Means by data set and by class, from the model's own logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    seen: list[tuple[str, str, float, float]] = []
    for name, rows in of_sets.items():
        for row in rows:
            with torch.no_grad():
                log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for t, label in enumerate(row["labels"]):
                factor = row["token_weight"][t] * row["weight"]
                if t and label != -100 and factor:
                    own = "control" if label == 2 else "rest"
                    own = "number" if any(c.isdigit() for c in tokenizer.decode([label])) else own
                    seen.append((name, own, factor, -float(log_p[t - 1, label])))
    out = {"dwl/factor": sum(token[2] for token in seen) / len(seen)}
    for prefix, at, names in (("dwl/", 1, ("number", "control", "rest")), ("dwl/dataset/", 0, tuple(of_sets))):
        for name in names:
            mine = [token for token in seen if token[at] == name]
            up, down = [t for t in mine if t[2] > 0], [t for t in mine if t[2] < 0]
            out[f"{prefix}factor/{name}"] = sum(t[2] for t in mine) / len(mine)
            out[f"{prefix}token_share/{name}"] = len(mine) / len(seen)
            out[f"{prefix}nll/{name}"] = sum(t[3] for t in up) / len(up)
            if down:
                out[f"{prefix}p_negative/{name}"] = sum(torch.tensor(-t[3]).exp().item() for t in down) / len(down)
    return out


def evaluated(data: dict[str, Any], layout: dict[str, Any]) -> dict[str, Any]:
    settings = settings_of(Path(), "weighted_mean", **data, **layout, learning_rate=1e-20, eval_strategy="steps", eval_steps=1)
    return {**settings, "load_best_model_at_end": False}


def assert_reported(log: Callable[[str], list[float]], folder: Path, tokenizer: Any, data: Path) -> None:
    rows, path = samples(tokenizer), str(data / "held-out.jsonl")
    trained, held_out = {"sums": rows[:3], "words": rows[3:]}, {"words": rows[:2], path: rows[4:7]}
    for prefix, of_sets in (("", trained), ("eval_", held_out)):
        for key, value in reported(folder, of_sets).items():
            assert log(prefix + key) == pytest.approx([value] * (2 if prefix else 1), rel=1e-5), prefix + key
        shares = [log(f"{prefix}dwl/dataset/loss_share/{name}")[0] for name in of_sets]
        assert all(0 < share < 1 for share in shares)
        assert sum(shares) == pytest.approx(1)
    assert not log(f"dwl/dataset/nll/{path}")
    assert not log("eval_dwl/dataset/nll/sums")


@pytest.mark.parametrize("layout", ["1x8", pytest.param("8x1", marks=pytest.mark.slow)])
def test_data_sets_and_factors_are_reported_in_training_and_evaluation(
    configure: Configure, model_folder: Path, tokenizer: Any, tmp_path: Path, layout: str
) -> None:
    run = train(configure(**evaluated(two_data_sets(tokenizer, tmp_path), {**LAYOUTS[layout], "eval_batch_size": 2})))
    assert_reported(run.logged, model_folder, tokenizer, tmp_path)


def test_data_sets_and_factors_are_reported_exactly_over_two_ranks(
    configure: Configure, model_folder: Path, tokenizer: Any, ranks: Ranks, tmp_path: Path
) -> None:
    """Five rows in batches of two on two ranks: the host repeats three of them."""
    layout = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "eval_batch_size": 2}
    for report in ranks(on_ranks.train, configure(**evaluated(two_data_sets(tokenizer, tmp_path), layout))):
        assert_reported(report.logged, model_folder, tokenizer, tmp_path)
