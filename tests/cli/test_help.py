"""What the command says of itself and of what it is doing."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dwl_plugin.cli.main import main
from dwl_plugin.cli.progress import progress


def test_the_versions_are_those_installed() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    assert result.output.splitlines()[0] == f"axolotl-dwl {version('axolotl-dwl')}"
    assert [line.split()[0] for line in result.output.splitlines()] == ["axolotl-dwl", "axolotl", "transformers", "torch"]


def groups(command: click.Command, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    below = command.commands.items() if isinstance(command, click.Group) else ()
    return [words, *(found for name, inner in below for found in groups(inner, (*words, name)))]


@pytest.mark.parametrize("words", groups(main), ids=" ".join)
def test_no_line_of_the_help_is_cut_off(words: tuple[str, ...]) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, [*words, "--help"])
    assert result.exit_code == 0
    assert not [line for line in result.output.splitlines() if line.endswith("...") and "Usage" not in line]


def test_a_command_that_trains_nothing_does_not_say_that_nothing_was_trained(tmp_path: Path) -> None:
    (tmp_path / "train.yml").write_text("loss: dwl\ndwl: {classes: {a: {regex: x}}, alpha: {b: 1}}\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["schedule", str(tmp_path / "train.yml")])
    assert result.exit_code == 1
    assert result.output.startswith("Error: 2 problems\n  dwl.alpha.b: ")


def test_progress_is_plain_lines_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("The one") as step:
        step("The other")
    assert sys.stderr.getvalue() == "The one …\nThe other …\n"  # type: ignore[attr-defined]


def test_progress_moves_while_the_output_of_a_host_is_kept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("The one") as step, contextlib.redirect_stderr(io.StringIO()) as kept:
        before = len(terminal.getvalue())
        step("The other")
        time.sleep(0.5)
    assert "The other" in terminal.getvalue()[before:]
    assert kept.getvalue() == ""
