"""One real step against an oracle that shares no code with us, and wrong versions of us that the same check must reject."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dwl_plugin.classes import labeller
from dwl_plugin.loss import seam
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput
from dwl_plugin.loss.tokens import Targets
from dwl_plugin.run.session import Session
from tests.hosts.harness import Run, rows, train, write_rows

Configure = Callable[..., dict[str, Any]]
NAMES = ("control", "number", "rest")
ALPHA = {"control": 0.1, "number": 0.6, "rest": 0.3}
EXPONENT = {"control": 0.0, "number": 1.0, "rest": 0.5}
DWL = {
    "classes": {"control": {"tokens": ["<|im_end|>"], "token_loss": "nll"}, "number": {"regex": r"\d+", "dft": {"exponent": 1.0}}},
    "token_loss": "dft",
    "reduction": "class_mean",
    "alpha": ALPHA,
}


def one_step(configure: Configure, tmp_path: Any) -> Run:
    data = write_rows(tmp_path / "eight.jsonl", rows(8))
    return train(
        configure(
            data=data,
            loss="dwl",
            dft={"exponent": 0.5},
            dwl=DWL,
            max_steps=1,
            micro_batch_size=2,
            gradient_accumulation_steps=4,
            learning_rate=1e-20,
        )
    )


def oracle(run: Run) -> tuple[float, dict[str, float], dict[str, torch.Tensor]]:
    """Loss, nll by class and gradients, token by token in fp64; classes by looking at one decoded token at a time."""
    trainer = run.trainer
    model, tokenizer = trainer.model.double(), trainer.processing_class
    terms: dict[str, list[torch.Tensor]] = {name: [] for name in NAMES}
    nlls: dict[str, list[float]] = {name: [] for name in NAMES}
    for row in trainer.train_dataset:
        ids, labels = row["input_ids"], row["labels"]
        log_p = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if labels[t] == -100:
                continue
            text = tokenizer.decode([ids[t]])
            name = "control" if text == "<|im_end|>" else "number" if any(c.isdigit() for c in text) else "rest"
            nll = -log_p[t - 1, labels[t]]
            p = float(torch.exp(-nll.detach()))
            terms[name].append(p ** EXPONENT[name] * nll)
            nlls[name].append(float(nll.detach()))
    loss = sum(ALPHA[name] * torch.stack(terms[name]).mean() for name in NAMES)
    assert isinstance(loss, torch.Tensor)
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.float()
    return float(loss.detach()), {name: float(np.mean(values)) for name, values in nlls.items()}, gradients


def check(run: Run) -> None:
    loss, nll, gradients = oracle(run)
    assert run.logged("loss")[0] == pytest.approx(loss, rel=1e-5)
    for name in NAMES:
        assert run.logged(f"dwl/nll/{name}")[0] == pytest.approx(nll[name], rel=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (run.gradients[0][name] - gradient).abs().max() <= 1e-5 * scale, name


def test_a_step_is_what_the_formula_says(configure: Configure, tmp_path: Any) -> None:
    check(one_step(configure, tmp_path))


def naive(wrong: str) -> Callable[..., LinearCrossEntropyOutput]:
    """A loss core with full logits and one thing wrong."""

    def core(hidden: torch.Tensor, weight: torch.Tensor, given: Targets, **head: Any) -> LinearCrossEntropyOutput:
        targets = given.targets
        if wrong == "wrong target":
            targets = torch.where(targets >= 0, (targets + 1) % weight.shape[0], targets)
        nll = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
        p = torch.exp(-nll)
        p = p if wrong == "undetached" else p.detach()
        factors = [p**term.objective.exponent for term in given.terms]
        weights = [1.0 if wrong == "weight dropped" else term.weight for term in given.terms]
        loss = sum((weight * factor * nll).sum() for weight, factor in zip(weights, factors, strict=True))
        return LinearCrossEntropyOutput(loss, nll.detach(), tuple(factor.detach() for factor in factors))

    return core


def break_core(patch: pytest.MonkeyPatch, wrong: str) -> None:
    patch.setattr(seam, "fused_cross_entropy", naive(wrong))


def unshift(patch: pytest.MonkeyPatch, _: str) -> None:
    patch.setattr(seam, "shift_left", lambda labels, *_: labels)


def count_one_micro_batch(patch: pytest.MonkeyPatch, _: str) -> None:
    right = Session.counts
    patch.setattr(Session, "counts", lambda self, batches, device: right(self, batches[:1], device))


def shift_classes(patch: pytest.MonkeyPatch, _: str) -> None:
    right = labeller.Labeller.label_samples

    def off_by_one(classes: Any, labels: Any, rest: int) -> Any:
        moved = np.roll(classes, 1)
        return np.where(np.asarray(labels) != -100, np.where(moved < 0, rest, moved), -100)

    def wrong(self: Any, samples: Any, codes: Any = ()) -> Any:
        found = zip(right(self, samples, codes), samples, strict=True)
        return [off_by_one(classes, labels, len(self.names) - 1) for classes, (_, labels, _) in found]

    patch.setattr(labeller.Labeller, "label_samples", wrong)


MUTANTS = {
    "none": break_core,  # the naive core itself is right: what rejects the others is their mistake
    "wrong target": break_core,
    "undetached": break_core,
    "weight dropped": break_core,
    "unshifted": unshift,
    "wrong denominator": count_one_micro_batch,
    "class off by one": shift_classes,
}


@pytest.mark.parametrize("wrong", MUTANTS)
def test_the_check_rejects_every_mutant(configure: Configure, tmp_path: Any, wrong: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        MUTANTS[wrong](patch, wrong)
        run = one_step(configure, tmp_path)
    if wrong == "none":
        check(run)
    else:
        with pytest.raises(AssertionError):
            check(run)
