"""The loss that Axolotl trains with, compared with the loss it would have had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.hosts.harness import AXOLOTL, CLASSES, Run, rows, train, write_rows

Configure = Callable[..., dict[str, Any]]
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}
ALPHA = {"reasoning": 1.0, "number": 5.0, "control": 2.0, "rest": 3.0}


def assert_same_gradients(a: Run, b: Run, tolerance: float = 1e-5) -> None:
    assert a.gradients[0].keys() == b.gradients[0].keys()
    scale = max(float(g.abs().max()) for g in a.gradients[0].values())
    assert scale > 0
    for name, gradient in a.gradients[0].items():
        assert (gradient - b.gradients[0][name]).abs().max() <= tolerance * scale, name


def test_one_class_at_weight_one_is_the_hosts_own_loss(configure: Configure) -> None:
    accumulation = 2 if AXOLOTL >= (0, 20) else 1  # 0.19's own loss is a mean of the micro-batches' means
    settings = {
        **LORA,
        "sample_packing": True,
        "sequence_len": 256,
        "max_steps": 10,
        "gradient_accumulation_steps": accumulation,
        "micro_batch_size": 1,
        "num_epochs": 4,
    }
    ours = train(configure(**settings, loss="dwl", dwl={"alpha": {"rest": 1}}))
    stock = train(configure(**settings))  # the same process: nothing of ours may be left
    again = train(configure(**settings, plugins=None))
    assert len(stock.logged("loss")) == 10
    assert stock.logged("loss") == again.logged("loss")
    assert ours.logged("loss") == pytest.approx(stock.logged("loss"), abs=1e-5)
    assert ours.logged("nll") == pytest.approx(stock.logged("loss"), abs=1e-5)
    assert not stock.logged("nll")
    assert_same_gradients(ours, stock)


def test_gradients_of_the_fused_loss_are_scaled_by_nothing_afterwards(configure: Configure, coming_back: list[float]) -> None:
    train(configure(**LORA, loss="dft", max_steps=2, gradient_accumulation_steps=4))
    allowed = {1.0} if AXOLOTL >= (0, 20) else {1.0, 0.25}  # 0.19 itself divides by the micro-batches
    assert len(coming_back) == 8
    assert set(coming_back) <= allowed


def test_dft_gradient_is_that_of_minus_p_and_of_trls_loss(configure: Configure) -> None:
    from trl.trainer.sft_trainer import dft_loss

    batches: list[dict[str, torch.Tensor]] = []
    models: list[Any] = []

    def keep_first_batch(trainer: Any) -> None:
        models.append(trainer)
        original = trainer.get_batch_samples

        def get_batch_samples(*args: Any) -> Any:
            out = original(*args)
            batches.extend(out[0])
            return out

        trainer.get_batch_samples = get_batch_samples

    run = train(configure(**LORA, loss="dft", max_steps=1, micro_batch_size=4, learning_rate=1e-12), before=keep_first_batch)
    model, batch = models[0].model, {key: value for key, value in batches[0].items() if key != "dwl_class_ids"}
    labels = batch.pop("labels")
    targets = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    count = (targets != -100).sum()

    def gradients(loss_of: Callable[[Any], torch.Tensor]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss_of(model(**batch)).backward()
        return {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}

    def minus_p(outputs: Any) -> torch.Tensor:
        p = outputs.logits.float().softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        return -(p * (targets != -100)).sum() / count

    for expected in (gradients(minus_p), gradients(lambda outputs: dft_loss(outputs, labels, count))):
        scale = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in run.gradients[0].items():
            assert (gradient - expected[name]).abs().max() <= 1e-5 * scale, name


LAYOUTS = {
    "1x8": {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    "8x1": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
    "2x4": {"micro_batch_size": 2, "gradient_accumulation_steps": 4},
    "packed in one": {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "sample_packing": True, "sequence_len": 1024},
    "packed in two rows": {
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "sample_packing": True,
        "sequence_len": 256,
        "pad_to_sequence_len": True,
    },
}


@pytest.mark.parametrize(
    ("reduction", "overlap"),
    [
        ("sequence_mean_token_sum", "sum"),
        pytest.param("class_mean", "first", marks=pytest.mark.slow),
        pytest.param("token_mean", "first", marks=pytest.mark.slow),
        pytest.param("weighted_mean", "first", marks=pytest.mark.slow),
    ],
)
def test_layout_of_a_step_changes_neither_loss_nor_gradient(
    configure: Configure, tmp_path: Any, reduction: str, overlap: str
) -> None:
    data = write_rows(tmp_path / "eight.jsonl", rows(8))
    runs = {
        name: train(
            configure(
                data=data,
                out=tmp_path / name.replace(" ", "_"),
                max_steps=1,
                loss="dwl",
                **layout,
                dwl={"classes": CLASSES, "alpha": ALPHA, "reduction": reduction, "overlap": overlap, "token_loss": "dft"},
            )
        )
        for name, layout in LAYOUTS.items()
    }
    reference = runs.pop("8x1")
    for name, run in runs.items():
        assert run.logged("loss") == pytest.approx(reference.logged("loss"), rel=1e-5), name
        assert run.logged("nll") == pytest.approx(reference.logged("nll"), rel=1e-5), name
        for key in ("dwl/nll/number", "dwl/token_share/reasoning", "dwl/loss_share/control"):
            assert run.logged(key) == pytest.approx(reference.logged(key), rel=1e-5), (name, key)
        assert_same_gradients(reference, run)


OVERLAPPING = {
    "control": {"tokens": ["<|im_end|>"]},
    "number": {"regex": r"\d+", "token_loss": "focal", "focal": {"gamma": 1.5}},
    "word": {"token_regex": r"\s?\w+", "token_loss": "dft", "dft": {"exponent": 0.5}},
}
"""A number is a word, too."""


def pays(text: str, nll: torch.Tensor, alpha: dict[str, float]) -> torch.Tensor:
    """α-weighted token losses of one token in each of its classes, from its text."""
    p = torch.exp(-nll)
    number, word = (any(c.isdigit() for c in text), bool(text.strip()) and text.removeprefix(" ").replace("_", "a").isalnum())
    terms = [alpha["control"] * nll] if text == "<|im_end|>" else []
    terms += [alpha["number"] * (1 - p) ** 1.5 * nll] if number else []
    terms += [alpha["word"] * p.detach() ** 0.5 * nll] if word else []
    return torch.stack(terms).sum() if terms else alpha["rest"] * nll


def test_overlapping_classes_pay_what_the_formula_says(configure: Configure, tmp_path: Any) -> None:
    data = write_rows(tmp_path / "eight.jsonl", rows(8))
    alpha = {"control": 0.1, "number": 0.5, "word": 0.3, "rest": 0.1}
    dwl = {"classes": OVERLAPPING, "alpha": alpha, "overlap": "sum", "reduction": "sequence_mean_token_sum"}
    run = train(configure(data=data, loss="dwl", dwl=dwl, max_steps=1, gradient_accumulation_steps=4, learning_rate=1e-20))
    model, tokenizer = run.trainer.model.double(), run.trainer.processing_class
    terms = []
    for row in run.trainer.train_dataset:
        log_p = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, label in enumerate(row["labels"]):
            if label != -100:
                terms.append(pays(tokenizer.decode([label]), -log_p[t - 1, label], alpha))
    loss = torch.stack(terms).sum() / 8
    model.zero_grad()
    loss.backward()
    assert run.logged("loss")[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (run.gradients[0][name] - gradient).abs().max() <= 1e-5 * scale, name
    model.float()
    assert run.logged("dwl/token_share/word")[0] > run.logged("dwl/token_share/number")[0] > 0
    assert sum(run.logged(f"dwl/loss_share/{name}")[0] for name in alpha) == pytest.approx(1)


def test_a_sequence_mean_without_classes_is_the_sum_over_each_sample(configure: Configure, tmp_path: Any) -> None:
    data = write_rows(tmp_path / "eight.jsonl", rows(8))
    settings = {"data": data, "max_steps": 1, "micro_batch_size": 8}
    run = train(configure(**settings, loss="dwl", dwl={"reduction": "sequence_mean_token_sum"}))
    targets = sum(label != -100 for row in run.trainer.train_dataset for label in row["labels"])
    assert run.logged("loss")[0] == pytest.approx(run.logged("nll")[0] * targets / 8, rel=1e-5)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_classes_that_overlap_only_measure_the_other_losses(configure: Configure, loss: str) -> None:
    plain = train(configure(loss=loss, max_steps=1))
    classes = {name: {key: spec[key] for key in spec if "regex" in key} for name, spec in OVERLAPPING.items()} | {
        "control": OVERLAPPING["control"]
    }
    measured = train(configure(loss=loss, dwl={"classes": classes, "overlap": "sum"}, max_steps=1))
    assert measured.logged("loss") == plain.logged("loss")
    assert measured.logged("nll") == plain.logged("nll")
    assert measured.logged("dwl/weight") == pytest.approx(plain.logged("dwl/weight"))
    assert measured.logged("dwl/token_share/word")[0] > measured.logged("dwl/token_share/number")[0]


def test_an_anchor_holds_to_the_model_without_its_adapter(configure: Configure, tmp_path: Any) -> None:
    """ASFT: DFT plus λ times the KL from the base model, both summed token by token."""
    data = write_rows(tmp_path / "eight.jsonl", rows(8))

    def away_from_the_base(trainer: Any) -> None:
        torch.manual_seed(3)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)

    settings = {"data": data, "loss": "dft", "dft": {"anchor": 0.3}, "max_steps": 1, "learning_rate": 1e-20}
    packed = {"sample_packing": True, "sequence_len": 1024, "micro_batch_size": 1}
    run = train(configure(**settings, **LORA, **packed), before=away_from_the_base)
    model, terms, kls = run.trainer.model.double().eval(), [], []
    for row in run.trainer.train_dataset:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad(), model.disable_adapter():
            base = model(input_ids=ids).logits[0].log_softmax(-1)
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        for t, label in enumerate(row["labels"]):
            if label != -100:
                log_q, mine = base[t - 1], log_p[t - 1]
                kls.append((log_q.exp() * (log_q - mine)).sum())
                terms.append(-torch.exp(mine[label].detach()) * mine[label] + 0.3 * kls[-1])
    loss = torch.stack(terms).mean()
    model.zero_grad()
    loss.backward()
    assert run.logged("loss")[0] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert run.logged("dwl/kl")[0] == pytest.approx(float(torch.stack(kls).mean().detach()), rel=1e-4)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (run.gradients[0][name] - gradient).abs().max() <= 1e-5 * scale, name
    model.float()


def test_an_anchor_without_an_adapter_is_refused_before_anything_is_loaded(configure: Configure) -> None:
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    from dwl_plugin.errors import ConfigError

    classes = {"number": {"regex": r"\d+", "token_loss": "dft", "dft": {"anchor": 0.1}}}
    with pytest.raises(ConfigError, match=r"dwl\.classes\.number\.dft\.anchor: is held to the base model"):
        load_cfg(DictDefault(configure(loss="dwl", dwl={"classes": classes})))
