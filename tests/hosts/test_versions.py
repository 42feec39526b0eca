"""The versions of the hosts: which are supported, and what is said of the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dwl_plugin
from dwl_plugin.errors import ConfigError
from dwl_plugin.hosts import versions
from dwl_plugin.hosts.versions import divided_later, release

Installed = Any


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Sets the version of a package, as far as this is asked for."""

    def install(package: str, number: str) -> None:
        real = versions.version
        monkeypatch.setattr(versions, "version", lambda name: number if name == package else real(name))

    return install


def start(cfg: dict[str, Any]) -> None:
    from axolotl.utils.dict import DictDefault

    dwl_plugin.DWLPlugin().register(DictDefault(cfg))


@pytest.mark.parametrize("number", ["0.18.3", "0.9.1.post1"])
def test_an_axolotl_that_is_too_old_is_refused_in_one_sentence(installed: Installed, number: str) -> None:
    installed("axolotl", number)
    with pytest.raises(ConfigError) as caught:
        start({"loss": "dft"})
    (problem,) = caught.value.problems
    assert problem.message == f"Axolotl {number} is older than dwl_plugin supports, 0.19 to 0.21"
    start({})  # without a loss it is none of our business


@pytest.mark.parametrize("number", ["0.22.0", "0.22.0.dev0", "1.0"])
def test_an_axolotl_that_is_newer_than_the_tests_gets_one_sentence(
    installed: Installed, capsys: pytest.CaptureFixture[str], number: str
) -> None:
    installed("axolotl", number)
    start({"loss": "dft"})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"[dwl] Axolotl {number} is newer than what this dwl_plugin was tested with, 0.19 to 0.21")


@pytest.mark.parametrize("number", ["0.19.0", "0.20.1", "0.21.0.dev0"])
def test_a_supported_axolotl_gets_no_sentence(installed: Installed, capsys: pytest.CaptureFixture[str], number: str) -> None:
    installed("axolotl", number)
    start({"loss": "dft"})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("package", ["axolotl", "transformers", "trl"])
def test_the_hosts_of_this_environment_are_supported(package: str) -> None:
    oldest, newest = getattr(versions, package.upper())
    assert oldest <= release(package) <= newest


class OldTrainer:
    """Divides by the micro-batches unless it counted the targets itself."""


class NewTrainer(OldTrainer):
    loss_is_scaled_for_ga: bool | None = None


@pytest.mark.parametrize(
    ("host", "counts", "items", "expected"),
    [
        (OldTrainer, True, 7, 1),
        (OldTrainer, True, None, 4),
        (OldTrainer, False, 7, 4),
        (NewTrainer, True, None, 1),
        (NewTrainer, False, 7, 1),
    ],
)
def test_a_trainer_that_divides_the_loss_once_more_is_made_up_for(
    host: type, counts: bool, items: int | None, expected: int
) -> None:
    trainer = SimpleNamespace(
        _dwl_host=host, model_accepts_loss_kwargs=counts, compute_loss_func=None, current_gradient_accumulation_steps=4
    )
    assert divided_later(trainer, items) == expected


def test_attach_reaches_a_model_inside_an_adapter(model_folder: Path) -> None:
    """PEFT 0.20 calls the model inside past its hooks."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), LoraConfig(target_modules=["q_proj"]))
    ids = torch.arange(3, 23)[None]
    log_p = model(input_ids=ids).logits[0, :-1].detach().double().log_softmax(-1)[torch.arange(19), ids[0, 1:]]
    handle = dwl_plugin.attach(model, loss="dft")
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(float(-(log_p.exp() * log_p).mean()), rel=1e-5)
    handle.detach()
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(float(-log_p.mean()), rel=1e-5)
