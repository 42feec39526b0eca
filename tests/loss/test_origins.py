"""Whose loss it was, where it was not ours."""

from __future__ import annotations

import functools
import sys
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from dwl_plugin.errors import LossNotTakenError
from dwl_plugin.loss.attach import attach
from dwl_plugin.loss.origins import foreign_home

FUSED = """
import torch.nn.functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

def fast_forward(self, input_ids=None, attention_mask=None, labels=None, **kwargs):
    hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
    if labels is None:
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
    logits = F.linear(hidden[:, :-1], self.lm_head.weight).flatten(0, 1)
    return CausalLMOutputWithPast(loss=F.cross_entropy(logits, labels[:, 1:].flatten()), logits=None)

class LossOfItsOwn:
    def __call__(self, logits, labels, **kwargs):
        return logits.detach().float().logsumexp(-1).mean()

class Head:
    def forward(self, hidden):
        return hidden @ self.weight.T
"""


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of another package, which computes the loss from the hidden states as Unsloth's `models/llama.py` does."""
    module = ModuleType("fastpackage.models.llama")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(FUSED, module.__dict__)
    return module


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=1, **sizes))


def on_the_class(model: Any, forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "forward", forward)


def on_the_instance(model: Any, forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.forward = MethodType(forward, model)


def under_the_name_of_the_old_one(model: Any, forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(model), "forward", functools.wraps(type(model).forward)(forward))


def inside_a_wrapper_of_a_host(model: Any, forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.utils import convert_outputs_to_fp32

    model.forward = MethodType(convert_outputs_to_fp32(forward), model)


def on_a_partial(model: Any, forward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.forward = functools.partial(forward, model)


WAYS = [on_the_class, on_the_instance, under_the_name_of_the_old_one, inside_a_wrapper_of_a_host, on_a_partial]


@pytest.mark.parametrize("patch", WAYS)
def test_the_package_that_computed_the_loss_in_its_forward_is_named(
    model: Any, elsewhere: Any, patch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(model, elsewhere.fast_forward, monkeypatch)
    ids = torch.arange(12)[None]
    handle = attach(model, loss="dft")
    with pytest.raises(LossNotTakenError) as caught:
        model(input_ids=ids, labels=ids)
    assert "Its forward is that of `fastpackage.models.llama`" in str(caught.value)
    assert "Load the model without `fastpackage`, in a process that does not import it" in str(caught.value)
    handle.detach()
    assert foreign_home(model, "forward") == "fastpackage.models.llama"


def test_code_that_was_written_into_the_class_at_run_time_is_named_by_its_file(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {}
    exec(compile(FUSED, "<fastpackage-fused:LlamaForCausalLM>", "exec"), names)
    names.pop("__name__", None)
    on_the_class(model, names["fast_forward"], monkeypatch)
    assert foreign_home(model, "forward") == "fastpackage-fused:LlamaForCausalLM"


def test_the_package_of_a_loss_function_put_there_later_is_named(model: Any, elsewhere: Any) -> None:
    handle = attach(model, loss="dft")
    model.loss_function = elsewhere.LossOfItsOwn()
    ids = torch.arange(12)[None]
    with pytest.raises(LossNotTakenError, match="Its loss function is that of `fastpackage"):
        model(input_ids=ids, labels=ids)
    handle.detach()


def test_the_package_of_an_output_head_put_there_later_is_named(model: Any, elsewhere: Any) -> None:
    handle = attach(model, loss="dft")
    model.lm_head.forward = MethodType(elsewhere.Head.forward, model.lm_head)
    assert foreign_home(model.lm_head, "forward") == "fastpackage.models.llama"
    handle.detach()


def test_a_model_of_transformers_has_nothing_foreign(model: Any) -> None:
    assert foreign_home(model, "forward") is None
    assert foreign_home(model.lm_head, "forward") is None
    handle = attach(model, loss="dft")
    assert foreign_home(model, "_loss_function") is None
    assert foreign_home(model.lm_head, "forward") is None
    handle.detach()


def test_a_model_class_of_somebodys_own_is_said_to_be_theirs() -> None:
    class Own(nn.Module):
        def forward(self, hidden: Any) -> Any:
            return hidden

    assert foreign_home(Own(), "forward") is None
