"""`dwl suggest` as a user calls it: what it counts, proposes and writes is what `dwl check` and `dwl preflight` then say."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from tests.hosts import harness

Run = Callable[..., Result]
Write = Callable[..., Path]


def test_a_plain_config_gets_a_block_and_keeps_the_rest(dwl: Run, write_config: Write) -> None:
    config = write_config(plugins=None)
    before = config.read_text()
    result = dwl("suggest", config, "--write")
    assert result.exit_code == 0, result.output
    assert "Nothing here speaks for weighting" in result.stdout
    assert "Every pack is looked for in 40 rows" in result.stderr
    assert "Marks that are no tokens of their own: <think> (" in result.stdout, "the opening one first, in every process"
    after = config.read_text()
    assert after.startswith(before)
    written = yaml.safe_load(after)
    assert written["plugins"] == ["dwl_plugin.DWLPlugin"]
    assert written["loss"] == "nll"
    assert list(written["dwl"]["classes"]) == ["end_of_turn", "thinking", "tags", "answer", "marker"]
    counted = json.loads(dwl("check", config, "--json").stdout)
    assert counted["status"] == 0
    lines = [line for line in after.splitlines() if "{pack: " in line]
    for row, line in zip(counted["classes"], lines, strict=False):
        rows = counted["rows"] - row["rows_without"]
        assert f"# {row['tokens']:,} tokens ({row['token_share']:.1%}) in {rows} of 40 rows" in line
    again = dwl("suggest", config, "--write")
    assert "There is nothing to write" in again.stdout
    assert config.read_text() == after
    weighed = dwl("suggest", config, "--weigh", "reasoning", "--json")
    alpha = json.loads(weighed.stdout)["proposal"]["dwl"]["alpha"]
    assert alpha == {"end_of_turn": 2, "thinking": 1, "tags": 2, "answer": 2, "marker": 2, "rest": 2}


def test_p_of_the_classes_is_that_of_preflight(dwl: Run, write_config: Write) -> None:
    config = write_config()
    told = json.loads(dwl("suggest", config, "--model", "--json").stdout)
    assert told["proposal"]["loss"] == "nll"
    dwl("suggest", config, "--write")
    measured = json.loads(dwl("preflight", config, "--json").stdout)
    for row in [*measured["classes"], measured["all"]]:
        assert told["p"][row["name"]]["mean_p"] == pytest.approx(row["mean_p"], rel=1e-5)
    assert f"mean p {measured['all']['mean_p']:.2f}" in told["reasons"]["loss"]


def test_what_is_wrong_or_could_run_code_is_said_instead(dwl: Run, write_config: Write) -> None:
    config = write_config(loss="dwl", dwl={"classes": {"x": {"regx": "a"}}})
    result = dwl("suggest", config, "--write")
    assert result.exit_code == 1
    assert "write `x: {regex: a}`" in result.output
    stranger = write_config(plugins=["strange.Plugin"], trust_remote_code=True)
    before = stranger.read_bytes()
    result = dwl("suggest", stranger, "--write")
    assert result.exit_code == 2
    assert "could do this on your machine" in result.output
    assert stranger.read_bytes() == before
    assert dwl("suggest", stranger, "--weigh", "nothing").exit_code == 2


def test_turns_whose_end_is_masked_are_counted(dwl: Run, write_config: Write) -> None:
    data = [{"path": str(write_config().with_name("rows.jsonl")), "type": "chat_template", "train_on_eos": "none"}]
    result = dwl("suggest", write_config(datasets=data))
    assert result.exit_code == 0, result.output
    assert "40 of 40 turns have no trained end" in result.stdout
    assert "end_of_turn: matches nothing" in result.stdout


def test_what_the_environment_sets_is_proposed_against(dwl: Run, write_config: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what stands in the file is what is written over."""
    config = write_config(data=harness.write_rows(write_config().with_name("more.jsonl"), harness.rows(8)))
    monkeypatch.setitem(os.environ, "DWL_OVERRIDES", "loss=dft")
    dwl("suggest", config, "--write")
    assert yaml.safe_load(config.read_text())["dft"] == {"min_weight": 0.1}
