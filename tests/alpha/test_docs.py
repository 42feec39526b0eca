"""The package that docs/extending.md describes, installed as it says, is usable from a YAML."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import yaml

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import Block, parse
from dwl_plugin.loss.token_losses import objective_of
from dwl_plugin.run.moving import alpha_of, controller_of
from tests.pages import ROOT, blocks

DOC = ROOT / "docs" / "extending.md"
LENGTH = RunLength(100, None)


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package.py").write_text("\n".join(block.text for block in blocks(DOC, "python")), encoding="utf-8")
    (tmp_path / "recipes.yml").write_text("{description: d, classes: {shout: {regex: '[A-Z]+'}}}", encoding="utf-8")
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n", encoding="utf-8")
    (project,) = (block.text for block in blocks(DOC, "toml"))
    points = re.sub(r'\[project\.entry-points\."(.*)"\]', r"[\1]", project).replace('"', "")
    (info / "entry_points.txt").write_text(points, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_package", raising=False)


def parsed(dwl: str) -> Block:
    block = parse(yaml.safe_load(f"{{loss: dwl, dwl: {{{dwl}}}}}"))
    assert block is not None
    return block


def test_the_schedule() -> None:
    alpha = alpha_of(parsed("classes: {a: {regex: a}}, schedule: {type: bounce, to: {a: 3, rest: 1}, every: 5%}"), LENGTH)
    assert [alpha(tau) for tau in (4, 5)] == [(0.5, 0.5), (0.75, 0.25)]


def test_the_controller() -> None:
    controller = controller_of(parsed("classes: {a: {regex: a}}, controller: {type: leader, lead: 1.5, every: 1}"), LENGTH)
    assert controller is not None
    controller.update(1, [3.0, 1.0], [1, 1])
    assert controller.alpha[0] > 0.8


def test_the_token_loss() -> None:
    losses = parsed("classes: {a: {regex: a, token_loss: {type: clipped, ceiling: 0.25}}}, token_loss: clipped").token_losses
    assert [getattr(objective_of(options), "ceiling", None) for options in losses] == [0.25, 0.5]


def test_the_pack() -> None:
    assert parsed("pack: recipes").class_names == ("shout", "rest")
