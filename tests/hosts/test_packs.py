"""A pack in an Axolotl config: through the host's own `load_cfg`, and trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dwl_plugin.hosts.axolotl_args import block_of
from tests.hosts.harness import train

Configure = Callable[..., dict[str, Any]]


def test_the_two_line_form_trains_and_logs_the_pack_s_classes(configure: Configure) -> None:
    run = train(configure(loss="dwl", dwl={"pack": "reasoning"}, max_steps=2))
    assert len(run.logged("loss")) == 2
    for name, alpha in {"thinking": 1 / 6, "tags": 2 / 6, "rest": 3 / 6}.items():
        assert run.logged(f"dwl/alpha/{name}") == pytest.approx([alpha] * 2, abs=1e-4)
        assert len(run.logged(f"dwl/nll/{name}")) == 2
    written = yaml.safe_load((Path(run.trainer.args.output_dir) / "dwl_config.yaml").read_text())
    assert "pack" not in written["dwl"]


def test_two_packs_with_a_number_of_one_s_own_train_as_one_block(configure: Configure) -> None:
    run = train(configure(loss="dwl", dwl={"pack": ["numbers", "reasoning"], "alpha": {"number": 5}}, max_steps=2))
    whole = {"result": 4, "number": 5, "thinking": 1 / 3, "tags": 2 / 3, "rest": 1}
    for name, alpha in whole.items():
        assert run.logged(f"dwl/alpha/{name}") == pytest.approx([alpha / 11] * 2, abs=1e-4)
    written = yaml.safe_load((Path(run.trainer.args.output_dir) / "dwl_config.yaml").read_text())
    assert list(written["dwl"]["classes"]) == ["result", "number", "thinking", "tags"]


def test_a_pack_beside_the_config_is_found_and_stays_resolved(configure: Configure, tmp_path: Path) -> None:
    from axolotl.cli.config import load_cfg

    pack = {"description": "Sums.", "classes": {"sum": {"regex": r"\d+"}}, "alpha": {"sum": 3, "rest": 1}}
    (tmp_path / "sums.yml").write_text(yaml.safe_dump(pack), encoding="utf-8")
    file = tmp_path / "train.yml"
    file.write_text(yaml.safe_dump(configure(loss="dwl", dwl={"pack": "./sums.yml"})), encoding="utf-8")
    cfg = load_cfg(str(file))
    (tmp_path / "sums.yml").unlink()
    block = block_of(cfg)
    assert block is not None
    assert block.class_names == ("sum", "rest")
    assert block.alpha == (0.75, 0.25)
