"""The loss that Axolotl trains with, compared with the loss it would have had."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.hosts.harness import CLASSES, Run, rows, train, write_rows

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
    settings = {**LORA, "sample_packing": True, "sequence_len": 256, "max_steps": 10, "gradient_accumulation_steps": 2,
                "micro_batch_size": 1, "num_epochs": 4}  # fmt: skip
    ours = train(configure(**settings, loss="dwl", dwl={"alpha": {"rest": 1}}))
    stock = train(configure(**settings))  # the same process: nothing of ours may be left
    again = train(configure(**settings, plugins=None))
    assert len(stock.logged("loss")) == 10
    assert stock.logged("loss") == again.logged("loss")
    assert ours.logged("loss") == pytest.approx(stock.logged("loss"), abs=1e-5)
    assert ours.logged("nll") == pytest.approx(stock.logged("loss"), abs=1e-5)
    assert not stock.logged("nll")
    assert_same_gradients(ours, stock)


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

    run = train(
        configure(**LORA, loss="dft", max_steps=1, micro_batch_size=4, learning_rate=1e-12), before=keep_first_batch
    )
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
        "micro_batch_size": 2, "gradient_accumulation_steps": 1, "sample_packing": True, "sequence_len": 256,
        "pad_to_sequence_len": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("reduction", ["token_mean", "weighted_mean", "class_mean"])
def test_layout_of_a_step_changes_neither_loss_nor_gradient(
    configure: Configure, tmp_path: Any, reduction: str
) -> None:
    data = write_rows(tmp_path / "eight.jsonl", rows(8))
    runs = {
        name: train(
            configure(
                data=data, out=tmp_path / name.replace(" ", "_"), max_steps=1, loss="dwl", **layout,
                dwl={"classes": CLASSES, "alpha": ALPHA, "reduction": reduction, "token_loss": "dft"},
            )
        )
        for name, layout in LAYOUTS.items()
    }  # fmt: skip
    reference = runs.pop("8x1")
    for name, run in runs.items():
        assert run.logged("loss") == pytest.approx(reference.logged("loss"), rel=1e-5), name
        assert run.logged("nll") == pytest.approx(reference.logged("nll"), rel=1e-5), name
        for key in ("dwl/nll/number", "dwl/token_share/reasoning", "dwl/loss_share/control"):
            assert run.logged(key) == pytest.approx(reference.logged(key), rel=1e-5), (name, key)
        assert_same_gradients(reference, run)
