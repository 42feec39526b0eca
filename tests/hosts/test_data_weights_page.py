"""Every YAML of the page on weights in the data trains on the rows that the page shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.hosts import harness
from tests.pages import ROOT, blocks

PAGE = ROOT / "docs" / "data-weights.md"
ROWS = [json.loads(row) for block in blocks(PAGE, "json") for row in re.split(r"\n(?={)", block.text)]
CONFIGS = [yaml.safe_load(block.text) for block in blocks(PAGE, "yaml")]

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_axolotl")]


def test_the_page_has_rows_and_configs() -> None:
    assert len(ROWS) == 4
    assert len(CONFIGS) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_it_trains_as_the_page_says(config: dict[str, Any], configure: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    names = [entry["path"] for entry in config.get("datasets", [])] or ["rows.jsonl"]
    datasets = config.get("datasets") or [{"path": "rows.jsonl", "type": "chat_template"}]
    for name in names:
        (tmp_path / name).write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    local = [{**entry, "path": str(tmp_path / entry["path"])} for entry in datasets]
    run = harness.train(configure(**{**config, "datasets": local, "dataset_prepared_path": str(tmp_path / "prepared")}))
    assert len(run.logged("nll")) == 2
    assert run.logged("dwl/factor") or not config["dwl"].get("data_weights")
