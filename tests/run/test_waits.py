"""A micro-batch waits for the device once, to learn how many targets there are: on fake CUDA tensors, so without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, get_args

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from bench.gpu.device_waits import Waits
from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import parse
from dwl_plugin.loss import seam as seam_module
from dwl_plugin.loss.attach import attach
from dwl_plugin.loss.class_sums import ClassSums
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput
from dwl_plugin.loss.tokens import Targets, select_tokens
from dwl_plugin.run.closed_loop import ClosedLoop
from dwl_plugin.run.collate import CLASS_IDS
from dwl_plugin.run.moving import controller_of
from dwl_plugin.run.session import Session
from dwl_plugin.values import Reduction

ROWS, LENGTH, TARGETS = 2, 16, 9
CUDA = torch.device("cuda", 0)
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
CLASSES = {"a": {"token_ids": [5]}, "b": {"token_ids": [6], "token_loss": "focal"}, "c": {"token_ids": [7], "token_loss": "eaft"}}
FOUND_N = "nonzero in loss/tokens.py: found_N = (flat_T != given.ignore_index).nonzero()[:, 0]"
MOVING = {"type": "linear", "start": 0, "end": 8}
FACTORS = {"row": "weight", "allow_negative": True}
ANCHOR = {"anchor": 0.05}
BY_ID = {name: {"token_ids": spec["token_ids"]} for name, spec in CLASSES.items()}
DWL = {"classes": CLASSES, "alpha": {"a": 5, "b": 1, "c": 2, "rest": 3}}
WEIGHED = {**DWL, "token_loss": "dft", "data_weights": FACTORS}

# A reduction for each, then what moves, and what is beside the loss of the tokens.
CONFIGS: dict[str, dict[str, Any]] = {
    "nll": {"loss": "nll"},
    "dft": {"loss": "dft", "dft": {"schedule": {**MOVING, "to": {"exponent": 0.5}}}},
    "anchor": {"loss": "dft", "dft": {"anchor": 0.05}},
    **{
        f"{reduction}, {overlap}": {"loss": "dwl", "dwl": {**DWL, "reduction": reduction, "overlap": overlap}}
        for reduction in get_args(Reduction)
        for overlap in ("first", "sum")
    },
    **{
        f"factors of the data, {overlap}": {"loss": "dwl", "dft": ANCHOR, "dwl": {**WEIGHED, "overlap": overlap}}
        for overlap in ("first", "sum")
    },
    "factors beside a reduction by sample": {"loss": "dwl", "dwl": {**DWL, "data_weights": FACTORS, "reduction": "sample_sqrt"}},
    "factors of what is only measured by class": {"loss": "nll", "dwl": {"classes": BY_ID, "data_weights": FACTORS}},
    "data sets": {"loss": "dwl", "dwl": {"classes": {**CLASSES, "d": {"dataset": "one"}}}},
    "schedule": {"loss": "dwl", "dwl": {**DWL, "schedule": {**MOVING, "to": {"a": 1, "b": 1, "c": 1, "rest": 1}}}},
    "controller": {"loss": "dwl", "dwl": {**DWL, "controller": {"type": "group_dro", "eta": 1.0, "every": 100}}},
}


def without_walk(hidden: torch.Tensor, weight: torch.Tensor, given: Targets, **options: Any) -> LinearCrossEntropyOutput:
    """All of the fused loss but its pass over the vocabulary, whose own waits other tests count."""
    tokens = select_tokens(hidden, given, vocab_size=len(weight), dtype=torch.float32)
    values = [torch.zeros(given.targets.shape, device=hidden.device) for _ in range(2 + len(tokens.terms))]
    return LinearCrossEntropyOutput(values[0].sum(), values[0], tuple(values[2:]), values[1] if given.anchor else None)


def fake_model() -> Any:
    return LlamaForCausalLM(LlamaConfig(vocab_size=101, use_cache=False, **TINY))


def fake_batch() -> dict[str, torch.Tensor]:
    return {key: torch.ones(ROWS, LENGTH, dtype=torch.int64) for key in ("input_ids", "labels", CLASS_IDS)}


@contextmanager
def fake_run(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """An optimizer step of two micro-batches, by its number."""
    monkeypatch.setattr(seam_module, "fused_cross_entropy", without_walk)
    with FakeTensorMode():
        with CUDA:
            model, batches = fake_model(), [fake_batch(), fake_batch()]
        model.disable_adapter = nullcontext
        block = parse(config)
        assert block is not None
        session = Session(model, block, None, None, ())
        session.begin(RunLength(10, None))
        if block.reads_data:
            session.train_sums = ClassSums(session.names, ("one", "other"), factors=block.data_weights is not None)
        if (controller := controller_of(block, session.length)) is not None:
            session.loop = ClosedLoop(controller, lambda sums: sums, CUDA)

        def step(tau: int) -> None:
            session.move(tau)
            counts = session.counts(batches, CUDA)
            for batch in batches:
                inputs = dict(batch)
                if not block.labels_tokens:
                    del inputs[CLASS_IDS]
                pending = session.pending_loss(inputs, counts, counts[0, -2].clamp(min=1) / 2, session.trained_on)
                with session.seam.armed(pending):
                    loss = model(**inputs).loss
                session.first_bad.add_loss(tau + 1, loss)
            if session.loop is not None:
                session.loop.end_step(tau + 1)

        yield step


@pytest.mark.parametrize("name", CONFIGS)
def test_a_micro_batch_waits_once_for_its_number_of_targets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_run(CONFIGS[name], monkeypatch) as step:
        with Waits(TARGETS):
            step(0)  # constants are copied once
        with Waits(TARGETS) as waits:
            step(1)
            step(2)
    assert waits.where == {FOUND_N: 4}


@pytest.mark.parametrize("num_items", [None, 9])
def test_so_does_a_forward_of_a_model_that_the_loss_is_attached_to(num_items: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam_module, "fused_cross_entropy", without_walk)
    with FakeTensorMode(), CUDA:
        model, batch = fake_model(), fake_batch()
        del batch[CLASS_IDS]
        attach(model, "dft")
        with Waits(TARGETS):
            model(**batch)
        with Waits(TARGETS) as waits:
            model(**batch, num_items_in_batch=num_items)
    assert waits.where == {FOUND_N: 1}


def test_a_copy_of_alpha_and_a_read_value_are_seen() -> None:
    with FakeTensorMode(), Waits(TARGETS) as waits:
        torch.tensor([0.5, 0.5]).to(CUDA, non_blocking=True)
        numbers = torch.ones(3, device=CUDA)
        with pytest.raises(DynamicOutputShapeException):
            numbers[numbers > 0]
        bool(numbers.sum() > 0)
        numbers.cpu()
        numbers[numbers.nonzero()[:, 0]] = 2.0
    assert waits.where == {"elsewhere": 5}
