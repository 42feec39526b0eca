"""What the quickstart prints in the end, from runs and replies written by hand; and the whole command, on a tiny model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from dwl_plugin.cli import quickstart
from dwl_plugin.cli.main import main
from dwl_plugin.cli.output import Console
from dwl_plugin.cli.quickstart.outcome import Judged, Row, compared, judge, print_comparison, print_replies
from dwl_plugin.cli.report.run import read_runs
from tests.cli.little_runs import write_run

SHARES = {"mistake": 0.1, "number": 0.3, "rest": 0.6}
CLASSES = {"mistake": {"regex": "wrong"}, "number": {"regex": r"\d+"}}


def entries(alpha: list[dict[str, float]], before: dict[str, float], after: dict[str, float]) -> list[dict[str, Any]]:
    """Two steps, with an evaluation before the first and after the last."""

    def evaluation(at: int, nll: dict[str, float]) -> dict[str, Any]:
        by_class = {f"eval_dwl/nll/{name}": value for name, value in nll.items()}
        shares = {f"eval_dwl/token_share/{name}": share for name, share in SHARES.items()}
        return {"step": at, "eval_nll": sum(SHARES[name] * value for name, value in nll.items()), **by_class, **shares}

    alphas = [{f"dwl/alpha/{name}": value for name, value in by_class.items()} for by_class in alpha]
    steps = [{"step": at, "nll": 1.0, **logged} for at, logged in enumerate(alphas, 1)]
    return [evaluation(0, before), *steps, evaluation(2, after)]


BEFORE = {"mistake": 4.0, "number": 1.0, "rest": 3.0}
AFTER_SFT = {"mistake": 1.0, "number": 0.5, "rest": 0.2}


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """α of numbers moves from 0.5 to 0.75; with that their nll falls further, that of the rest less far, that of mistakes rises."""
    alpha = [{"mistake": 0.0, "number": 0.5, "rest": 0.5}, {"mistake": 0.0, "number": 0.75, "rest": 0.25}]
    block = {"loss": "dwl", "dwl": {"classes": CLASSES, "alpha": alpha[0], "reduction": "weighted_mean"}}
    dwl = write_run(tmp_path / "out", entries(alpha, BEFORE, {"mistake": 4.5, "number": 0.25, "rest": 0.3}), block)
    nll = {"loss": "nll", "dwl": {"classes": CLASSES}}
    return dwl, write_run(tmp_path / "baseline", entries([dict.fromkeys(SHARES, 1.0)] * 2, BEFORE, AFTER_SFT), nll)


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines, with one blank between words."""
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_two_runs_class_by_class(runs: tuple[Path, Path]) -> None:
    rows = {row.name: row for row in compared(*read_runs(runs))}
    assert list(rows) == ["mistake", "number", "rest", "all but mistake", "all"]
    assert rows["mistake"] == Row("mistake", 0.1, (0.0, 0.0), 4.0, 1.0, 4.5, unwanted=True)
    assert rows["number"] == Row("number", 0.3, (0.5, 0.75), 1.0, 0.5, 0.25)
    together = rows["all but mistake"]
    assert (together.before, together.sft, together.dwl) == pytest.approx((7 / 3, 0.3, 17 / 60))
    assert (rows["all"].before, rows["all"].sft, rows["all"].dwl) == pytest.approx((2.5, 0.37, 0.705))


def test_their_table_fits_a_narrow_terminal_and_says_which_sign_is_good(
    runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    print_comparison(Console(), *read_runs(runs))
    lines = printed(capsys)
    assert "mistake 10.0 % 0 4.000 1.000 4.500 +3.500 wished" in lines
    assert "number 30.0 % 0.5 → 0.75 1.000 0.500 0.250 −0.250 better" in lines
    assert "rest 60.0 % 0.5 → 0.25 3.000 0.200 0.300 +0.100 worse" in lines
    assert "all but mistake 90.0 % – 2.333 0.300 0.283 −0.017 better" in lines
    assert "The price: rest." in lines


@pytest.mark.parametrize(
    ("sft", "dwl", "unwanted", "said"),
    [
        (0.5, 0.4, False, "better"),
        (0.4, 0.5, False, "worse"),
        (0.5, 0.495, False, ""),
        (0.5, 0.505, False, ""),
        (1.0, 4.0, True, "wished"),
        (4.0, 1.0, True, "learned"),
        (math.nan, 1.0, False, ""),
    ],
)
def test_a_difference_in_a_word(sft: float, dwl: float, unwanted: bool, said: str) -> None:
    assert Row("it", 0.5, (0.2, 0.2), 3.0, sft, dwl, unwanted).verdict == said


REPLIES = [
    "<think>The bags hold 2 * 5 = 9. Wait, that is wrong. The bags hold 2 * 5 = 10. Left: 10 - 4 = 6.</think>\n#### 6",
    "<think>The bags hold 2 * 5 = 12. Left: 12 - 4 = 7.</think>\n#### 7",
    "I do not know.",
]


def test_replies_are_counted() -> None:
    judged = judge(REPLIES, ["6", "6", "6"])
    assert judged == Judged(replies=3, taken_back=1, sums=5, wrong_sums=3, right_answers=1, words=16.0)


def test_the_first_question_and_the_counts_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"question": f"How many {at}?", "answer": "6", "base": REPLIES[2], "out": reply} for at, reply in enumerate(REPLIES)]
    (tmp_path / "replies.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print_replies(Console(), tmp_path / "replies.jsonl", {"base": "before", "out": "dwl"})
    lines = printed(capsys)
    assert "How many 0? (6)" in lines
    assert "before I do not know." in lines
    assert "that say “Wait, that is wrong.” 0 1" in lines
    assert "sums in them that are wrong 0 of 0 3 of 5" in lines
    assert "right answers 0 1" in lines


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the little model's own libraries
def test_the_whole_command_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.hosts import harness

    harness.make_tokenizer(tmp_path / "model")
    harness.make_model(tmp_path / "model")
    monkeypatch.setattr(quickstart, "prepared_model", lambda console: tmp_path / "model")
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "here"
    result = CliRunner().invoke(main, ["quickstart", "--compare", "--steps", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = {"quickstart.yml", "baseline.yml", "problems.jsonl", "replies.jsonl", "out", "baseline", "prepared"}
    assert {path.name for path in out.iterdir()} == written
    ours, plain = read_runs([out / "out", out / "baseline"])
    assert (ours.step, plain.step) == (2, 2)
    assert ours.train[0]["nll"] == pytest.approx(plain.train[0]["nll"])
    assert [row.name for row in compared(ours, plain)][-2:] == ["all but mistake", "all"]
    replies = [json.loads(line) for line in (out / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(replies) == 24
    assert all(row.keys() == {"question", "answer", "before training", "out", "baseline"} for row in replies)
    assert yaml.safe_load((out / "out/dwl_config.yaml").read_text(encoding="utf-8"))["loss"] == "dwl"
    assert yaml.safe_load((out / "baseline/dwl_config.yaml").read_text(encoding="utf-8"))["loss"] == "nll"
    assert "nll of each class" in result.output
    assert f"dwl report {out}/baseline --compare {out}/out --html report.html" in result.output
