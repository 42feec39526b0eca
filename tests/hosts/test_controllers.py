"""Controllers in Axolotl's loop: what they see, what they do to α, and what ranks, checkpoints and restarts must not change."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from dwl_plugin.errors import ConfigError
from tests.hosts.harness import CLASSES, train

Configure = Callable[..., dict[str, Any]]
ALPHA = {"reasoning": 1, "number": 5, "control": 2, "rest": 2}
NAMES = tuple(ALPHA)
GROUP_DRO = {"type": "group_dro", "eta": 0.5, "every": 2, "ema": 0.25, "min_alpha": 0.02}
LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True, "lora_dropout": 0.0}


def dwl(controller: dict[str, Any]) -> dict[str, Any]:
    return {"classes": CLASSES, "alpha": ALPHA, "reduction": "class_mean", "controller": controller}


def column(history: list[dict[str, float]], what: str) -> np.ndarray:
    """A number of each class at every step (steps, classes); nan where there is none."""
    entries = [entry for entry in history if "loss" in entry]
    return np.array([[entry.get(f"dwl/{what}/{name}", math.nan) for name in NAMES] for entry in entries])


class Tokens(TrainerCallback):
    """The target tokens of each step by class, as the trainer counts them."""

    def __init__(self) -> None:
        self.of_steps: list[list[int]] = []

    def __call__(self, trainer: Any) -> None:
        self._trainer = trainer
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.of_steps.append(self._trainer._dwl.step_counts[0].tolist()[: len(NAMES)])


def test_alpha_is_the_papers_update_of_the_plain_nll_over_whole_windows(configure: Configure) -> None:
    """Micro-batches are added up before anything is divided, and no α is in what the controller sees."""
    counted = Tokens()
    run = train(configure(loss="dwl", dwl=dwl(GROUP_DRO), max_steps=7, gradient_accumulation_steps=2), before=counted)
    nll, tokens = column(run.history, "nll"), np.array(counted.of_steps)
    q, average, alphas, signals = np.array([0.1, 0.5, 0.2, 0.2]), None, [], []
    for step in range(7):
        if step in (2, 4, 6):
            window = slice(step - 2, step)
            mean = np.nansum(nll[window] * tokens[window], axis=0) / tokens[window].sum(axis=0)
            average = mean if average is None else 0.25 * average + 0.75 * mean
            q = q * np.exp(0.5 * average)
            q = q / q.sum()
        alphas.append(np.array([0.1, 0.5, 0.2, 0.2]) if average is None else 0.92 * q + 0.02)
        signals.append(np.full(4, math.nan) if average is None else average)
    assert np.abs(column(run.history, "alpha") - np.array(alphas)).max() < 1e-12
    # The log of a step is written when its window is over already.
    logged = column(run.history, "signal")[:6:2]
    assert np.isnan(logged[0]).all()
    assert np.abs(logged[1:] - np.array(signals)[2:6:2]).max() < 1e-12


def too_big(done: list[int], trainer: Any) -> None:
    """The fourth micro-batch does not fit; `done` gets the size of each."""
    step = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        done.append(trainer._train_batch_size)
        if trainer._train_batch_size > 2 and len(done) == 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate everything.")
        return step(*args, **kwargs)

    trainer.training_step = training_step


def test_a_run_that_begins_again_with_smaller_batches_begins_from_nothing(configure: Configure, tmp_path: Path) -> None:
    """The steps before are still in the weights, so they are of size 0 here."""
    settings = {"loss": "dwl", "dwl": dwl(GROUP_DRO), "max_steps": 5, "learning_rate": 0.0}
    done: list[int] = []
    again = train(configure(**settings, micro_batch_size=4, auto_find_batch_size=True), before=partial(too_big, done))
    size = again.trainer._train_batch_size
    assert done == [4] * 4 + [size] * 5
    fresh = train(configure(**settings, micro_batch_size=size, out=tmp_path / "fresh"))
    assert np.array_equal(column(again.history, "alpha"), column(fresh.history, "alpha"))


def reference_of(settings: dict[str, Any], before: Callable[[Any], None] = lambda trainer: None) -> list[float]:
    sessions: list[Any] = []

    def keep(trainer: Any) -> None:
        sessions.append(trainer._dwl)
        before(trainer)

    train(settings, before=keep)
    found: list[float] = sessions[0].loop.controller.state()["reference"]
    return found


def test_steps_that_were_taken_before_a_run_begins_again_are_not_in_its_reference(configure: Configure, tmp_path: Path) -> None:
    controller = {"type": "doremi", "reference": "base", "reference_rows": 1000}
    settings = {"loss": "dwl", "dwl": dwl(controller), "max_steps": 4, "learning_rate": 0.05, "micro_batch_size": 4}
    done: list[int] = []
    again = reference_of(configure(**settings, auto_find_batch_size=True), partial(too_big, done))
    assert len(done) > 4
    assert again == pytest.approx(reference_of(configure(**settings, out=tmp_path / "fresh")), rel=1e-5)


@pytest.mark.slow  # worker processes that import the host
def test_measuring_the_reference_leaves_the_evaluation_its_own_rows(configure: Configure) -> None:
    """With persistent workers the host keeps the loader of the first evaluation for all that follow."""
    evaluated: list[int] = []

    class Evaluated(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            evaluated.append(len(kwargs["eval_dataloader"].dataset))

    controller = {"type": "doremi", "reference": "base", "reference_rows": 30}
    workers = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1}
    settings = configure(loss="dwl", dwl=dwl(controller), val_set_size=8, eval_steps=1, max_steps=2, **workers)

    def before(trainer: Any) -> None:
        trainer.args.dataloader_persistent_workers = True  # Axolotl has no key for it
        trainer.add_callback(Evaluated())

    train(settings, before=before)
    assert set(evaluated) == {8}


def test_the_reference_is_the_base_model_and_the_adapter_comes_back(configure: Configure) -> None:
    from transformers import AutoModelForCausalLM

    sessions: list[Any] = []

    def already_trained(trainer: Any) -> None:
        """An adapter that is not the identity."""
        sessions.append(trainer._dwl)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)

    controller = {"type": "doremi", "reference": "base", "reference_rows": 1000, "every": 1}
    settings = configure(loss="dwl", dwl=dwl(controller), max_steps=2, **LORA)
    run = train(settings, before=already_trained)
    (session,) = sessions
    state = session.loop.controller.state()
    base = AutoModelForCausalLM.from_pretrained(settings["base_model"], dtype=torch.float64)
    nll, tokens = np.zeros(4), np.zeros(4)
    for row in run.trainer.train_dataset:
        classes = session.labeller(row["input_ids"], row["labels"])[1:]
        with torch.no_grad():
            logits = base(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        paid = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="none").numpy()
        for c in range(4):
            nll[c] += paid[classes == c].sum()
            tokens[c] += (classes == c).sum()
    assert state["reference"] == pytest.approx((nll / tokens).tolist(), rel=1e-5)
    first = column(run.history, "nll")[0]
    assert np.abs(first - nll / tokens).max() > 0.1, "the steps were taken with the adapter"


def test_a_controller_without_its_state_stops_and_says_what_to_do(configure: Configure, tmp_path: Path) -> None:
    settings = {"loss": "dwl", "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    train(configure(**settings, dwl={"classes": CLASSES}))
    checkpoint = str(tmp_path / "run" / "checkpoint-1")
    with pytest.raises(ConfigError) as caught:
        train(configure(**settings, dwl=dwl(GROUP_DRO), out=tmp_path / "resumed", resume_from_checkpoint=checkpoint))
    (problem,) = caught.value.problems
    assert problem.path == "dwl.controller"
    assert "resume_from_checkpoint" in problem.hint


def test_another_length_than_the_checkpoint_was_trained_for_is_said(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = {"reasoning": 4, "number": 1, "control": 1, "rest": 4}
    block = {"classes": CLASSES, "alpha": ALPHA, "schedule": {"type": "linear", "to": moved}}
    settings = {"loss": "dwl", "dwl": block, "num_epochs": 3, "save_strategy": "steps", "save_steps": 2}
    train(configure(**settings, max_steps=4))
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    saved = json.loads((Path(checkpoint) / "trainer_state.json").read_text())["stateful_callbacks"]["dwl"]
    assert saved["run"]["total_steps"] == 4
    capsys.readouterr()
    train(configure(**settings, max_steps=4, out=tmp_path / "same", resume_from_checkpoint=checkpoint))
    assert "trained for" not in capsys.readouterr().out
    run = train(configure(**settings, max_steps=8, out=tmp_path / "longer", resume_from_checkpoint=checkpoint))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[dwl] ")]
    assert "[dwl] resumed at step 2: the checkpoint was trained for 4 steps, this run has 8" in said
    assert any("number 0.300 → 0.400" in line for line in said)
    assert column(run.history, "alpha")[2][1] == pytest.approx(0.4)


def test_other_options_than_the_checkpoints_are_said_and_hold_at_once(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"loss": "dwl", "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    first = train(configure(**settings, dwl=dwl({**GROUP_DRO, "every": 1, "eta": 2})))
    assert column(first.history, "alpha")[2].min() < 0.1
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    other = dwl({**GROUP_DRO, "every": 1, "eta": 0.25, "min_alpha": 0.1})
    capsys.readouterr()
    run = train(configure(**settings, dwl=other, out=tmp_path / "other", resume_from_checkpoint=checkpoint))
    said = [line for line in capsys.readouterr().out.splitlines() if "other options" in line]
    assert len(said) == 1
    assert "`eta` 2.0 → 0.25, `min_alpha` 0.02 → 0.1" in said[0]
    assert column(run.history, "alpha")[-1].min() >= 0.1
