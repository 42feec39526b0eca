"""Data that no run could train on: tokens of another model, and none at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.hosts import harness

Run = Callable[..., Result]
Write = Callable[..., Path]

SIZE = 400
"""Of the little model's vocabulary."""

GOOD = [1, 5, 6, 7, 8, 2]


def tokenised(folder: Path, *rows: tuple[list[int], list[int]], **settings: Any) -> dict[str, Any]:
    samples = [{"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in rows]
    path = harness.write_rows(folder / "tokenised.jsonl", samples)
    return {"datasets": [{"path": str(path), "ds_type": "json", "type": None}], "loss": "dft", **settings}


def problems(result: Result) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(result.stdout)["problems"]
    return found


@pytest.mark.parametrize("outside", [SIZE, 10**12, -1, -100])
def test_an_id_that_the_model_does_not_have_is_a_problem(dwl: Run, write_config: Write, tmp_path: Path, outside: int) -> None:
    ids = [*GOOD[:3], outside, *GOOD[3:]]
    config = write_config(**tokenised(tmp_path, (GOOD, GOOD), (ids, [-100] * len(ids)), (ids, [-100] * 4 + GOOD[3:])))
    result = dwl("check", config, "--json")
    (found,) = problems(result)
    assert (result.exit_code, found["path"], found["value"]) == (1, "datasets", outside)
    assert found["message"].startswith("`input_ids` of")
    assert found["allowed"] == f"0 to {SIZE - 1}"


def test_other_commands_say_so_too(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(**tokenised(tmp_path, ([1, SIZE, 2], [1, SIZE, 2])))
    for command in ("inspect", "preflight"):
        result = dwl(command, config)
        assert result.exit_code == 1
        assert "name tokens that the model does not have" in result.output
    assert f"‹token {SIZE}›" in dwl("inspect", config).output


@pytest.mark.parametrize("outside", [SIZE, -1, -101])
def test_a_label_that_is_no_token_is_a_problem(dwl: Run, write_config: Write, tmp_path: Path, outside: int) -> None:
    config = write_config(**tokenised(tmp_path, (GOOD, GOOD), (GOOD, [-100, *GOOD[1:5], outside])))
    (found,) = problems(dwl("check", config, "--json"))
    assert (found["path"], found["value"]) == ("datasets", outside)
    assert found["message"].startswith("`labels` of 1 of")
    assert "-100" in found["allowed"]


def test_every_token_of_the_model_is_allowed(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    """Also those that the tokenizer does not have: models pad their vocabularies."""
    harness.make_tokenizer(tmp_path / "wide")
    harness.make_model(tmp_path / "wide", vocab_size=SIZE + 48)
    ids = [0, SIZE + 47, SIZE - 1, 2]
    settings = tokenised(tmp_path, (ids, [-100, *ids[1:]]))
    for command in ("check", "preflight"):
        result = dwl(command, write_config(model=tmp_path / "wide", **settings), "--json")
        assert result.exit_code == 0, result.output
    for settings_of_size, allowed in (({"shrink_embeddings": True}, SIZE - 1), ({}, SIZE + 47)):
        config = write_config(model=tmp_path / "wide", **tokenised(tmp_path, ([10**6, *ids], [-100] * 4 + [2])), **settings_of_size)
        assert problems(dwl("check", config, "--json"))[-1]["allowed"] == f"0 to {allowed}"


def test_a_token_id_outside_the_vocabulary_is_a_problem_of_its_class(dwl: Run, write_config: Write) -> None:
    classes = {"a": {"token_ids": [3, SIZE]}, "b": {"any": [{"token_ids": [f"7-{SIZE}"]}, {"regex": "x"}]}}
    found = problems(dwl("check", write_config(loss="dwl", dwl={"classes": classes}), "--json"))
    assert [problem["path"] for problem in found] == ["dwl.classes.a.token_ids[1]", "dwl.classes.b.any[0].token_ids[0]"]


@pytest.mark.parametrize(
    ("command", "kind"),
    [("check", "tokenised"), ("check", "stream"), ("check", "one of two"), ("inspect", "chat"), ("preflight", "chat")],
)
def test_data_without_a_row_is_a_problem(dwl: Run, write_config: Write, tmp_path: Path, command: str, kind: str) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("")
    named = {"path": str(path), "ds_type": "json", "type": None if kind == "tokenised" else "chat_template"}
    settings: dict[str, Any] = {"datasets": [named]}
    if kind == "stream":
        source = {"path": "json", "data_files": [str(path)], "type": "pretrain", "text_column": "text"}
        settings = {"datasets": None, "pretraining_dataset": [source], "streaming": True, "max_steps": 2}
    if kind == "one of two":
        rows = harness.write_rows(tmp_path / "some.jsonl", harness.rows(4))
        settings = {"datasets": [named | {"path": str(rows)}, named]}
    result = dwl(command, write_config(loss="dft", **settings))
    assert result.exit_code == 1
    assert f"{'pretraining_dataset' if kind == 'stream' else 'datasets'}: there is no row to train on" in result.output


@pytest.mark.parametrize("loss", ["nll", "dft", "dwl"])
@pytest.mark.parametrize("packed", [False, True])
def test_data_without_a_target_is_a_problem_under_every_loss(
    dwl: Run, write_config: Write, tmp_path: Path, loss: str, packed: bool
) -> None:
    masked = [-100] * len(GOOD)
    settings = tokenised(tmp_path, (GOOD, masked), (GOOD, masked), loss=loss, sample_packing=packed, sequence_len=64)
    if loss == "dwl":
        settings["dwl"] = {"classes": {"a": {"token_ids": [5], "allow_empty": True}}}
    for command in ("check", "inspect", "preflight"):
        result = dwl(command, write_config(**settings))
        assert result.exit_code == 1
        assert "1 problem" in result.output
        assert "datasets: there is nothing to train on: no target token in" in result.output


def test_a_first_label_that_nothing_predicts_is_no_target(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    """Packed, all but the first sample of a row have one that is trained."""
    classes = {"start": {"token_ids": [1]}, "five": {"token_ids": [5]}}
    settings = tokenised(tmp_path, *[(GOOD, GOOD)] * 6) | {"loss": "dwl", "dwl": {"classes": classes}}
    result = dwl("check", write_config(**settings), "--json")
    told = json.loads(result.stdout)
    (problem,) = told["problems"]
    assert (problem["path"], told["targets"]) == ("dwl.classes.start", 6 * 5)
    assert "The 6 it does match are first in their rows" in problem["hint"]
    assert [(row["name"], row["tokens"], row["rows_without"]) for row in told["classes"]] == [
        ("start", 0, 6),
        ("five", 6, 0),
        ("rest", 24, 0),
    ]
    packed = json.loads(
        dwl("check", write_config(**settings, sample_packing=True, sequence_len=24, micro_batch_size=1), "--json").stdout
    )
    assert packed["problems"] == []
    assert [row["tokens"] for row in packed["classes"]] == [4, 6, 24]
    assert packed["targets"] == 34


@pytest.mark.parametrize("reduction", [None, "token_mean", "weighted_mean"])
def test_a_loss_much_smaller_than_sft_is_a_hint(dwl: Run, write_config: Write, tmp_path: Path, reduction: str | None) -> None:
    settings = {"classes": {"five": {"token_ids": [5]}}, "alpha": {"five": 3, "rest": 1}}
    chosen = {} if reduction is None else {"reduction": reduction}
    path = write_config(**tokenised(tmp_path, (GOOD, GOOD)) | {"loss": "dwl", "dwl": settings | chosen})
    hints = json.loads(dwl("check", path, "--json").stdout)["hints"]
    assert [hint for hint in hints if "are 0.35× those of SFT" in hint] == (hints if reduction is None else [])
    assert len(hints) == (reduction is None)


def test_a_validation_set_that_takes_all_rows_is_a_problem(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    result = dwl("check", write_config(**tokenised(tmp_path, (GOOD, GOOD)), val_set_size=0.5))
    assert result.exit_code == 1
    assert "there is no row to train on: `val_set_size` takes all 1 of the data" in result.output
    assert "1 rows to train on" not in result.output


BAD: dict[str, tuple[Any, str]] = {
    "empty": ({"messages": []}, "its `messages` is empty"),
    "null": ({"messages": None}, "it has no list under `messages`"),
    "no message": ({"messages": [None]}, "`messages[0]` is no message"),
}


@pytest.mark.parametrize("command", ["check", "inspect"])
@pytest.mark.parametrize("case", BAD)
def test_a_row_that_cannot_be_tokenised_is_named(dwl: Run, write_config: Write, tmp_path: Path, command: str, case: str) -> None:
    row, words = BAD[case]
    rows = [*harness.rows(5), row, *harness.rows(5)]
    data = harness.write_rows(tmp_path / "bad.jsonl", rows)
    result = dwl(command, write_config(data=data, loss="dft"))
    assert result.exit_code == 1
    assert f"datasets: row 6 of {data}: {words}" in result.output


def test_a_row_that_a_template_refuses_is_named_with_what_it_says(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    rows = harness.rows(8)
    rows[3]["messages"][0]["role"] = "narrator"
    data = harness.write_rows(tmp_path / "bad.jsonl", rows)
    refuses = "{% if m.role == 'narrator' %}{{ raise_exception('no narrators') }}{% endif %}"
    template = f"{{% for m in messages %}}{refuses}{{{{ m.content }}}}{{% endfor %}}"
    result = dwl("check", write_config(data=data, loss="dft", chat_template="jinja", chat_template_jinja=template))
    assert result.exit_code == 1
    assert f"row 4 of {data}: Axolotl stops at it: TemplateError: no narrators" in result.output


def test_what_every_row_fails_at_is_not_laid_to_one_row(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    data = harness.write_rows(tmp_path / "rows.jsonl", harness.rows(8))
    result = dwl("check", write_config(datasets=[{"path": str(data), "type": "alpaca"}], loss="dft"))
    assert result.exit_code == 1
    told = "Axolotl stops at both, and perhaps at all: KeyError: 'instruction'"
    assert re.search(rf"datasets: rows \d+ and \d+ of {re.escape(str(data))}: {told}", " ".join(result.output.split()))
