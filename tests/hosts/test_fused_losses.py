"""Configs that ask for one of the host's own fused losses train with ours, and the run says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.hosts.harness import CLASSES, train
from tests.hosts.test_objective import assert_same_gradients

Configure = Callable[..., dict[str, Any]]
DWL = {"classes": CLASSES, "alpha": {"reasoning": 1, "number": 5, "control": 2, "rest": 2}, "reduction": "weighted_mean"}


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"chunked_cross_entropy": True}, "chunked_cross_entropy"),
        ({"plugin": "liger.LigerPlugin", "liger_fused_linear_cross_entropy": True}, "liger_fused_linear_cross_entropy"),
        ({"plugin": "liger.LigerPlugin", "liger_cross_entropy": True}, "liger_cross_entropy"),
        ({"plugin": "cut_cross_entropy.CutCrossEntropyPlugin"}, "cut_cross_entropy"),
    ],
)
def test_a_fused_loss_of_the_host_is_taken_over(
    configure: Configure, capsys: pytest.CaptureFixture[str], keys: dict[str, Any], named: str
) -> None:
    keys = dict(keys)
    plugin = keys.pop("plugin", None)
    plugins = ["dwl_plugin.DWLPlugin"] + ([f"axolotl.integrations.{plugin}"] if plugin else [])
    ours = train(configure(loss="dwl", dwl=DWL, max_steps=2))
    capsys.readouterr()
    beside = train(configure(loss="dwl", dwl=DWL, max_steps=2, plugins=plugins, **keys))
    assert capsys.readouterr().out.count(f"`{named}`") == 1
    assert beside.logged("loss") == ours.logged("loss")
    assert_same_gradients(ours, beside)


def test_the_other_patches_of_such_a_plugin_stay(configure: Configure) -> None:
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    plugins = ["dwl_plugin.DWLPlugin", "axolotl.integrations.liger.LigerPlugin"]
    keys = {"liger_rms_norm": True, "liger_rope": True, "liger_fused_linear_cross_entropy": True}
    cfg = load_cfg(DictDefault(configure(loss="dft", plugins=plugins, **keys)))
    assert (cfg.liger_rms_norm, cfg.liger_rope, cfg.liger_fused_linear_cross_entropy) == (True, True, False)
    untouched = load_cfg(DictDefault(configure(plugins=plugins, **keys)))
    assert untouched.liger_fused_linear_cross_entropy is True
