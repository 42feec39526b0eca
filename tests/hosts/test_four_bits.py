from __future__ import annotations

import pytest
import torch

from dwl_plugin.hosts.four_bits import keep_the_training_format


@pytest.fixture
def bf16_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU on which bitsandbytes has a format of its own for evaluations."""
    from bitsandbytes.nn import modules

    if not hasattr(modules, "has_avx512bf16"):
        pytest.skip("this bitsandbytes has one format")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("bf16_in_hardware")
def test_a_layer_passes_its_gradient_on_after_an_evaluation() -> None:
    from bitsandbytes.nn import Linear4bit, Params4bit

    assert "passes no gradient on" in (keep_the_training_format({"load_in_4bit": True}) or "")
    layer = Linear4bit(128, 64, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4")
    layer = layer.to("cpu")
    hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(1), requires_grad=True)
    before = layer.train()(hidden)
    with torch.no_grad():
        layer.eval()(hidden.detach())
    after = layer.train()(hidden)
    assert torch.equal(before, after)
    (gradient,) = torch.autograd.grad(after.sum(), hidden)
    assert gradient.abs().max() > 0


@pytest.mark.usefixtures("bf16_in_hardware")
def test_nothing_is_changed_for_whom_it_does_not_concern(monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.nn import modules

    asks = modules.has_avx512bf16
    assert keep_the_training_format({"load_in_8bit": True}) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert keep_the_training_format({"load_in_4bit": True}) is None
    assert modules.has_avx512bf16 is asks
