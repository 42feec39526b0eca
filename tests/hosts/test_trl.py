"""TRL's `SFTTrainer` under `apply`: the losses by their formula, whatever this TRL does in its own; classes derived from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import dwl_plugin
from dwl_plugin.errors import LossNotTakenError
from tests.hosts.harness import Batches, Build, logged, stock

SGD = {"optim": "sgd", "learning_rate": 0.2, "max_steps": 10}
NUMBERS = {"classes": {"number": {"regex": r"\d+"}}, "alpha": {"number": 5, "rest": 1}, "token_loss": "dft"}

# name: the config, what a target pays from its p, the weight of a target with a digit and of another
LOSSES: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor], float, float]] = {
    "nll": ({"loss": "nll"}, lambda p: -p.log(), 1, 1),
    "dft": ({"loss": "dft"}, lambda p: -p.detach() * p.log(), 1, 1),
    "dwl": ({"loss": "dwl", "dft": {"exponent": 0.5}, "dwl": NUMBERS}, lambda p: -p.detach().sqrt() * p.log(), 5 / 6, 1 / 6),
}


def by_formula(model: Any, tokenizer: Any, fed: list[dict[str, torch.Tensor]], name: str) -> dict[str, list[float]]:
    """What optimizer steps of two micro-batches each log, from all logits, a target at a time."""
    _, pays, number, rest = LOSSES[name]
    optimizer = torch.optim.SGD(model.parameters(), lr=SGD["learning_rate"])
    logs: dict[str, list[float]] = {"loss": [], "entropy": [], "mean_token_accuracy": []}
    for step in zip(fed[::2], fed[1::2], strict=True):
        paid, targets, entropy, right = torch.zeros(()), 0, 0.0, 0.0
        for batch in step:
            p_BTV = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.softmax(-1)
            places = (batch["labels"][:, 1:] != -100).nonzero().tolist()
            for row, position in places:
                target, p_V = int(batch["labels"][row, position + 1]), p_BTV[row, position]
                has_digit = any(character.isdigit() for character in tokenizer.decode([target]))
                paid = paid + (number if has_digit else rest) * pays(p_V[target])
                entropy += -float((p_V * p_V.log()).sum().detach()) / len(places) / 2
                right += (int(p_V.argmax()) == target) / len(places) / 2
            targets += len(places)
        loss = paid / targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for key, value in (("loss", loss.item()), ("entropy", entropy), ("mean_token_accuracy", right)):
            logs[key].append(value)
    return logs


@pytest.mark.parametrize("name", LOSSES)
def test_ten_steps_are_the_formulas(sft_of: Build, model: Any, tokenizer: Any, name: str) -> None:
    apart, start = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    trainer = sft_of(SGD)
    dwl_plugin.apply(trainer, LOSSES[name][0])
    batches = Batches(trainer)
    trainer.train()
    for key, expected in by_formula(apart, tokenizer, batches.fed, name).items():
        assert len(expected) == 10
        assert logged(trainer, key) == pytest.approx(expected, abs=1e-5), key
    for key, weight in apart.state_dict().items():
        assert (model.state_dict()[key] - weight).abs().max() <= 1e-5, key
    assert max((weight - start[key]).abs().max() for key, weight in apart.state_dict().items()) > 1e-3


class Largest(TorchDispatchMode):
    """The most numbers in any tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("host", ["the loss of the model", *LOSSES])
def test_no_tensor_of_targets_times_vocabulary_is_made(sft_of: Build, trainer_of: Build, host: str) -> None:
    """In training and in evaluation."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab, length, rows = 20_000, 512, 3
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, num_hidden_layers=1, **sizes))
    ids = torch.randint(3, 400, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * length} for row in ids])
    settings = {"max_steps": 1, "per_device_train_batch_size": rows, "per_device_eval_batch_size": rows}
    settings |= {"gradient_accumulation_steps": 1, "prediction_loss_only": True}
    parts = {"model": model, "train_dataset": data, "eval_dataset": data}
    if host == "the loss of the model":
        trainer = trainer_of(settings, **parts)
    else:
        trainer = sft_of(settings, **parts)
        config = copy.deepcopy(LOSSES[host][0])
        if host == "dwl":
            config["dwl"]["classes"] = {"number": {"token_ids": [9, 10, 11]}}
        dwl_plugin.apply(trainer, config)
    with Largest() as largest:
        trainer.train()
        trainer.evaluate()
    targets = rows * (length - 1)
    if host == "the loss of the model":
        assert largest.numbers >= targets * vocab
    else:
        assert len(logged(trainer, "entropy")) == len(logged(trainer, "eval_entropy")) == 1
        assert largest.numbers < targets * vocab / 4


@stock
def test_tokens_are_counted_on_from_and_by_training_without_us(sft_of: Build) -> None:
    counts = []
    for applies in (False, True):
        trainer = sft_of({**SGD, "max_steps": 2, "gradient_accumulation_steps": 1})
        for between in (False, applies, False):
            handle = dwl_plugin.apply(trainer, {"loss": "nll"}) if between else None
            trainer.train()
            counts.append(logged(trainer, "num_tokens"))
            if handle is not None:
                handle.detach()
    assert counts[3:] == counts[:3]
    assert counts[2][0] > counts[1][-1] > counts[0][-1]


@stock
def test_an_auxiliary_loss_is_trained_and_logged(sft_of: Build) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = MixtralConfig(vocab_size=400, num_hidden_layers=1, num_local_experts=4, router_aux_loss_coef=0.1, **sizes)
    model = MixtralForCausalLM(config)
    runs = []
    for block in (None, {"loss": "nll"}):
        settings = {**SGD, "max_steps": 3, "gradient_accumulation_steps": 1, "router_aux_loss_coef": 0.5}
        trainer = sft_of(settings, model=copy.deepcopy(model))
        if block is not None:
            dwl_plugin.apply(trainer, block)
        trainer.train()
        runs.append({key: logged(trainer, key) for key in ("loss", "aux_loss", "entropy", "mean_token_accuracy")})
    assert len(runs[0]["aux_loss"]) == 3
    for key, values in runs[0].items():
        assert runs[1][key] == pytest.approx(values, abs=1e-5), key


# classes derived from SFTTrainer


@pytest.fixture
def derived() -> Callable[..., type]:
    """SFTTrainer with this `compute_loss`, which gets the inherited one as its last argument."""
    from trl import SFTTrainer

    def make(body: Callable[..., Any]) -> type:
        class Derived(SFTTrainer):  # type: ignore[misc]
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
                loss, outputs = body(self, model, inputs, num_items_in_batch, super().compute_loss)
                return (loss, outputs) if return_outputs else loss

        return Derived

    return make


@pytest.mark.parametrize("loss_type", ["nll", "chunked_nll"])
def test_a_derived_class_that_returns_the_inherited_loss_trains(
    sft_of: Build, derived: Callable[..., type], model: Any, loss_type: str
) -> None:
    seen: list[Any] = []

    def body(self: Any, model: Any, inputs: Any, items: Any, inherited: Any) -> Any:
        loss, outputs = inherited(model, inputs, return_outputs=True, num_items_in_batch=items)
        seen.append(outputs)
        return loss, outputs

    start, losses = copy.deepcopy(model.state_dict()), []
    for kind in (None, derived(body)):
        model.load_state_dict(start)
        trainer = sft_of({**SGD, "max_steps": 2, "loss_type": loss_type}, kind=kind)
        dwl_plugin.apply(trainer, LOSSES["dwl"][0])
        trainer.train()
        assert len(logged(trainer, "entropy")) == 2
        losses.append(logged(trainer, "loss"))
    assert losses[1] == losses[0]
    assert len(seen) == 4


OTHERS = {
    "twice the loss": lambda self, model, inputs, items, inherited: (2 * inherited(model, inputs, num_items_in_batch=items), None),
    "its own forward": lambda self, model, inputs, items, inherited: (model(**inputs).loss, None),
    "no loss of ours": lambda self, model, inputs, items, inherited: (
        model(**{key: value for key, value in inputs.items() if key != "labels"}).logits.float().logsumexp(-1).mean(),
        None,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_derived_class_with_another_loss_is_named(sft_of: Build, derived: Callable[..., type], name: str) -> None:
    trainer = sft_of({"max_steps": 1}, kind=derived(OTHERS[name]))
    dwl_plugin.apply(trainer, {"loss": "dft"})
    with pytest.raises(LossNotTakenError, match=r"Derived\.compute_loss returned a loss that is not the model's"):
        trainer.train()


FAST_FORWARD = """
from torch.nn.functional import cross_entropy
from transformers.modeling_outputs import CausalLMOutputWithPast

class EmptyLogits:
    def __getattr__(self, name):
        raise NotImplementedError("logits are empty")
    __getitem__ = __getattr__

def forward(self, input_ids=None, labels=None, attention_mask=None, **kwargs):
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
    logits = (hidden[:, :-1] @ self.lm_head.weight.T).flatten(0, 1)
    return CausalLMOutputWithPast(loss=cross_entropy(logits, labels[:, 1:].flatten()), logits=EmptyLogits())
"""


def test_a_forward_of_another_package_that_computes_the_loss_is_named(
    sft_of: Build, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsloth puts one like this onto the class, and its logits answer every question with an error of its own."""
    elsewhere = ModuleType("fastpackage.models.llama")
    exec(FAST_FORWARD, elsewhere.__dict__)
    monkeypatch.setattr(type(model), "forward", elsewhere.forward)
    trainer = sft_of({"max_steps": 1, "loss_type": "nll"})
    dwl_plugin.apply(trainer, {"loss": "dft"})
    with pytest.raises(LossNotTakenError, match=r"Its forward is that of `fastpackage\.models\.llama`.* without `fastpackage`"):
        trainer.train()
