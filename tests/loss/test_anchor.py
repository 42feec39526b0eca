"""The anchor of a whole model: its own base, found by switching the adapter off, against full logits of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwl_plugin.classes.data_codes import encode
from dwl_plugin.errors import LossNotTakenError
from dwl_plugin.loss import seam as seam_module
from dwl_plugin.loss.attach import attach
from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.seam import Seam
from dwl_plugin.loss.shift import shift_left
from dwl_plugin.loss.spec import LossSpec, PendingLoss
from dwl_plugin.loss.token_losses import Power
from tests.loss.test_every_model import batch, build, difference, gradients
from tests.loss.test_seam import peft

SPEC = LossSpec(weight=(0.4, 1.3), objective=(Power(1.0), Power(0.0)), anchor=(3.0, 1.0))


def adapted(name: str = "LlamaForCausalLM", modules: tuple[str, ...] = ("v_proj", "o_proj"), saved: tuple[str, ...] = ()) -> Any:
    model = build(name)
    config = peft.LoraConfig(r=4, target_modules=list(modules), modules_to_save=list(saved), lora_dropout=0.5)
    model = peft.get_peft_model(model, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key or "modules_to_save" in key:  # away from the base model
            nn.init.normal_(parameter, std=4.0 if "lora_B" in key and "lm_head" not in key else 0.3)
    model.eval()  # its dropout would be drawn anew for the logits we compare with
    return model


def factors() -> torch.Tensor:
    """Of the tokens of `batch()`; one below 0 makes its token unlikely, and holds it to nothing."""
    _, labels, _ = batch()
    some = torch.tensor([0.25, 1.0, 3.0, -0.5, -2.0])
    return some[torch.arange(labels.numel()) % len(some)].reshape(labels.shape)


def truth(
    model: Any, spec: LossSpec, factors_BT: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and mean KL from the logits of the model and of its base."""
    ids, labels, class_ids = batch()
    targets, slot = shift_left(labels).flatten(), shift_left(class_ids).flatten().clamp(min=0)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ids).logits.flatten(0, 1).double().log_softmax(-1)
    log_p = model(input_ids=ids).logits.flatten(0, 1).double().log_softmax(-1)
    nll = F.nll_loss(log_p, targets, reduction="none")
    kl = (base.exp() * (base - log_p)).sum(-1)
    power = torch.tensor([1.0, 0.0])[slot]
    weight, anchor = torch.tensor(spec.weight)[slot], torch.tensor(spec.anchor)[slot]
    keep = targets != -100
    pays = (-nll).exp().pow(power).detach() * nll + anchor * kl
    if factors_BT is not None:
        own = shift_left(factors_BT, 0).flatten().double()
        pays = torch.where(own < 0, own.abs() * -torch.log1p(-(-nll).exp()), own * pays)
    loss = (weight * pays)[keep].sum() / keep.sum()
    return loss.detach().float(), gradients(model, loss), kl[keep].mean().detach()


def ours(
    model: Any, spec: LossSpec, seen: list[ForwardMetrics] | None = None, factors_BT: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, labels, class_ids = batch()
    if factors_BT is not None:
        coded = torch.from_numpy(encode(factors_BT.numpy(), class_ids.numpy()))
        class_ids = torch.where(labels == -100, -100, coded)
    seam = Seam(model, lambda line: None, model.disable_adapter)
    try:
        step = PendingLoss(spec, labels, class_ids, on_tokens=None if seen is None else seen.append)
        with seam.armed(step):
            loss = model(input_ids=ids, labels=labels).loss
    finally:
        seam.detach()
    return loss.detach(), gradients(model, loss)


MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "adapter in the body": (adapted, "fused_cross_entropy"),
    "a trained copy of the head": (lambda: adapted(saved=("lm_head",)), "fused_cross_entropy"),
    "LoRA on the head": (lambda: adapted(modules=("v_proj", "lm_head")), "module_cross_entropy"),
    "softcap": (lambda: adapted("Gemma2ForCausalLM"), "fused_cross_entropy"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_anchor_is_the_model_without_its_adapter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, path = MODELS[name]
    model, taken = make(), []
    for function in ("fused_cross_entropy", "module_cross_entropy"):
        real = getattr(seam_module, function)
        monkeypatch.setattr(seam_module, function, lambda *a, _n=function, _r=real, **k: (taken.append(_n), _r(*a, **k))[1])
    want_loss, want_gradients, want_kl = truth(model, SPEC)
    assert want_kl > 1e-3
    seen: list[ForwardMetrics] = []
    got_loss, got_gradients = ours(model, SPEC, seen)
    torch.testing.assert_close(got_loss, want_loss, rtol=1e-5, atol=0.0)
    error, where = difference(got_gradients, want_gradients)
    assert error <= 1e-5, where
    assert taken == [path]
    kl = seen[0].kl_N
    assert kl is not None
    torch.testing.assert_close(kl[seen[0].members.is_target].mean().double(), want_kl, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("name", MODELS)
def test_a_token_with_a_factor_pays_and_is_held_by_it_and_one_below_0_pays_minus_log_of_1_minus_p(name: str) -> None:
    model, spec = MODELS[name][0](), replace(SPEC, weighs=True, allow_negative=True)
    want_loss, want_gradients, _ = truth(model, spec, factors())
    plain_loss, _, _ = truth(model, spec)
    assert abs(plain_loss - want_loss) > 0.1 * abs(want_loss)
    got_loss, got_gradients = ours(model, spec, factors_BT=factors())
    torch.testing.assert_close(got_loss, want_loss, rtol=1e-5, atol=0.0)
    error, where = difference(got_gradients, want_gradients)
    assert error <= 1e-5, where


def test_the_base_model_runs_without_dropout_and_leaves_the_model_as_it_was() -> None:
    model = adapted()
    want_loss, _, _ = truth(model, LossSpec((0.0, 0.0), SPEC.objective, anchor=SPEC.anchor))
    assert want_loss == 0.0
    model.train()
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    ids, labels, class_ids = batch()
    seam = Seam(model, print, model.disable_adapter)
    modes: list[bool] = []
    handle = model.get_base_model().model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    with seam.armed(PendingLoss(SPEC, labels, class_ids)):
        model(input_ids=ids, labels=labels)
    handle.remove()
    assert modes == [False, True]
    assert model.training
    assert all(module.training for module in model.modules())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == learns
    seam.detach()
    assert not model.get_base_model()._forward_pre_hooks


def test_labels_given_by_position_do_not_reach_the_base_model() -> None:
    model = adapted()
    ids, labels, class_ids = batch()
    want, _ = ours(model, SPEC)
    seam = Seam(model, print, model.disable_adapter)
    with seam.armed(PendingLoss(SPEC, labels, class_ids)):
        loss = model.get_base_model()(ids, None, None, None, None, labels).loss
    torch.testing.assert_close(loss.detach(), want)


def test_without_an_anchor_the_base_model_does_not_run() -> None:
    model, calls = adapted(), []
    ids, labels, class_ids = batch()
    seam = Seam(model, print, model.disable_adapter)
    model.get_base_model().model.register_forward_pre_hook(lambda module, args: calls.append(1))
    with seam.armed(PendingLoss(LossSpec(SPEC.weight, SPEC.objective), labels, class_ids)):
        model(input_ids=ids, labels=labels)
    assert len(calls) == 1


def test_attach_has_no_base_model() -> None:
    with pytest.raises(ValueError, match="knows no base model"):
        attach(build("LlamaForCausalLM"), LossSpec(anchor=(0.1,)))


def test_rows_that_cannot_be_matched_to_the_base_models_stop_the_run() -> None:
    model = adapted()
    ids, labels, class_ids = batch()
    seam = Seam(model, print, model.disable_adapter)
    step = PendingLoss(SPEC, labels, class_ids)
    with pytest.raises(LossNotTakenError, match="base model of an `anchor`"), seam.armed(step):
        model.get_base_model().loss_function(model(input_ids=ids).logits[:, :3], labels[:, :3], vocab_size=97)
