"""`dwl check` of weights in the data: those that Axolotl drops or makes 1 of, on any config; what those that are read come to."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dwl_plugin.config import parse
from dwl_plugin.config.block import DataWeights
from dwl_plugin.hosts.axolotl_fields import dropped_weights, not_finite
from tests.hosts import harness

Check = Callable[..., Result]
Write = Callable[..., Path]


def findings(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def parts(*weights: float | None, **answer: Any) -> dict[str, Any]:
    """A row whose answer has a part for each weight."""
    content = [{"type": "text", "text": f"part {k}."} | ({} if w is None else {"weight": w}) for k, w in enumerate(weights)]
    return {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": content, **answer}]}


@pytest.fixture
def said(dwl: Check, write_config: Write, tmp_path: Path) -> Callable[..., dict[str, list[str]]]:
    """The hints and notes on weights, on a config with these rows."""

    def check(rows: list[dict[str, Any]], **changes: Any) -> dict[str, list[str]]:
        data = harness.write_rows(tmp_path / "weighed.jsonl", rows)
        found = findings(dwl("check", write_config(data=data, **changes), "--json"))
        return {
            key: [line for line in found[key] if any(word in line for word in ("Axolotl trains", "Axolotl drops", "makes Axolotl"))]
            for key in ("hints", "notes")
        }

    return check


Said = Callable[..., dict[str, list[str]]]


@pytest.mark.parametrize("changes", [{}, {"loss": "nll"}, {"loss": "dft", "dwl": {"classes": {"a": {"regex": "p"}}}}], ids=str)
def test_a_fraction_that_becomes_1_is_one_sentence_with_the_file_the_row_and_the_line_to_write(
    said: Said, changes: dict[str, Any], tmp_path: Path
) -> None:
    lines = said([parts(None, 1), parts(0, 1), parts(1, 0.3), parts(0.5)], **changes)
    (line,) = lines["hints"]
    assert line.startswith(f"{tmp_path}/weighed.jsonl, row 3, messages[1].content[1]: Axolotl trains `weight: 0.3` as 1; write ")
    assert "`dwl: {data_weights: true}` to make it count (so in 2 of the 4 rows looked at)" in line
    assert ("`loss: nll` and" in line) == (not changes)
    assert not lines["notes"]


def test_it_is_what_the_host_makes_of_it(said: Said, write_config: Write, tmp_path: Path) -> None:
    """The same labels whether a part weighs 0.3, 7 or 1; none where it weighs 0."""
    import yaml

    from dwl_plugin.hosts import axolotl_preview as preview

    data = harness.write_rows(tmp_path / "weighed.jsonl", [parts(1, w, shared=1) for w in (1, 0.3, 7, 0)])
    config = write_config(data=data, shuffle_merged_datasets=False)
    cfg, _ = preview.load_cfg(yaml.safe_load(config.read_text()), config)
    rows = preview.load_rows(cfg, preview.load_tokenizer(cfg), 4).samples
    one, fraction, seven, zero = (row["labels"] for row in rows)
    assert one == fraction == seven
    assert zero != one


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        pytest.param(parts(0, 1, None), {}, id="the host's own switch"),
        pytest.param(parts(0.0, 1.0), {}, id="and in floats"),
        pytest.param(parts(True, False), {}, id="and in booleans"),  # type: ignore[arg-type]
        pytest.param(parts(1, weight=1), {}, id="a message of weight 1"),
        pytest.param(parts(1, weight=0), {"message_field_training": "weight"}, id="a message's own switch"),
        pytest.param(parts(1, weight="0.3"), {}, id="a text"),
        pytest.param({**harness.rows(1)[0], "weight": 1, "token_weight": [1, 1.0]}, {}, id="ones"),
        pytest.param({**harness.rows(1)[0], "weight": "12 kg"}, {}, id="another column"),
    ],
)
def test_no_alarm_where_nothing_is_lost(row: dict[str, Any], changes: dict[str, Any]) -> None:
    source = {"path": "weighed.jsonl", "type": "chat_template", **changes}
    assert not dropped_weights([*enumerate([row] * 3)], source, None)
    assert dropped_weights([(0, parts(0.3))], source, None)


def asked(*content: dict[str, Any], **question: Any) -> dict[str, Any]:
    """A row whose question has these parts."""
    return {"messages": [{"role": "user", "content": list(content), **question}, {"role": "assistant", "content": "So."}]}


def test_where_the_role_is_not_trained_a_weight_of_a_message_does_nothing_and_one_of_a_part_makes_it_trained(said: Said) -> None:
    part, weighed = {"type": "text", "text": "What?"}, {"type": "text", "text": "Now?", "weight": 0.3}
    rows = [asked(part, weight=0.5), asked(part, weighed)]
    for row in rows:
        row["messages"][1]["content"] = [{"type": "text", "text": "So."}]
    for changes in ({}, {"loss": "nll", "dwl": {"data_weights": True}}):
        lines = [line.partition("jsonl, ")[2] for line in said(rows, **changes)["hints"]]
        assert any(
            line.startswith("row 2, messages[0].content[1]: `weight: 0.3` makes Axolotl train the message") for line in lines
        )
    source = {"path": "weighed.jsonl", "type": "chat_template"}
    found = {weight.level: weight.row for weight in dropped_weights([*enumerate(rows)], source, DataWeights(message="weight"))}
    assert found == {"masked": 0, "unmasked": 1, "part": 1}
    assert not dropped_weights([*enumerate(rows)], source, DataWeights(message="weight", part="weight"), trains_inputs=True)
    both = {**source, "roles_to_train": ["human", "gpt"]}
    assert not dropped_weights([*enumerate(rows)], both, DataWeights(message="weight", part="weight"))


def test_that_weight_does_make_the_host_train_the_message(write_config: Write, tmp_path: Path) -> None:
    import yaml

    from dwl_plugin.hosts import axolotl_preview as preview

    part = {"type": "text", "text": "What?"}
    data = harness.write_rows(tmp_path / "weighed.jsonl", [asked(part | w) for w in ({}, {"weight": 0}, {"weight": 0.3})])
    config = write_config(data=data, shuffle_merged_datasets=False)
    cfg, _ = preview.load_cfg(yaml.safe_load(config.read_text()), config)
    rows = preview.load_rows(cfg, preview.load_tokenizer(cfg), 3).samples
    masked, zero, weighed = (sum(label != -100 for label in row["labels"]) for row in rows)
    assert masked < zero < weighed  # the end of the turn, and then its text


def test_a_segment_has_no_switch_and_loses_its_weight() -> None:
    source = {"path": "s.jsonl", "type": "input_output"}
    row = {"segments": [{"label": False, "text": "a", "weight": 0.5}, {"label": True, "text": "b", "weight": 0}]}
    (weight,) = dropped_weights([(0, row)], source, None)
    assert (weight.level, weight.at, weight.value) == ("part", "segments[1]", 0)
    assert not dropped_weights([(0, row)], source, DataWeights(part="weight"))


def test_a_config_without_a_loss_is_not_said_to_stop(dwl: Check, write_config: Write, tmp_path: Path) -> None:
    result = dwl("check", write_config())
    assert result.exit_code == 1
    assert result.output.endswith("This config would train, and without this package.\n")


def test_the_mean_of_factors_is_that_of_the_histogram(dwl: Check, write_config: Write, tmp_path: Path) -> None:
    data = harness.write_rows(tmp_path / "weighed.jsonl", [{**parts(1), "weight": -0.5}] * 2)
    config = write_config(data=data, loss="nll", dwl={"data_weights": {"row": "weight", "allow_negative": True}})
    assert "Factors of the data: -0.5 on average" in dwl("check", config).output


@pytest.mark.parametrize(
    ("row", "field", "section", "words"),
    [
        (
            parts(1, weight=0.3),
            "message",
            "hints",
            "row 2, messages[1]: Axolotl drops `weight: 0.3`, and the message counts 1; write",
        ),
        (parts(1, weight=0), "message", "hints", "row 2, messages[1]: Axolotl drops `weight: 0`, and the message counts 1; write"),
        ({**parts(1), "weight": 80}, "row", "notes", "row 2: Axolotl drops `weight: 80`; if it says what the row counts, write"),
        ({**parts(1), "token_weight": [1, 0.5]}, "token", "notes", "row 2: Axolotl drops `token_weight` with 0.5 in it; if it"),
    ],
)
def test_a_weight_that_is_dropped_is_said_once_until_it_is_read(row: dict[str, Any], field: str, section: str, words: str) -> None:
    rows, source = [*enumerate([parts(1), row, row])], {"path": "weighed.jsonl", "type": "chat_template"}
    (weight,) = dropped_weights(rows, source, None)
    assert weight.is_certain == (section == "hints")
    assert words in weight.sentence(None, has_loss=True)
    other = DataWeights(row="factor") if field != "row" else DataWeights(message="factor")
    (weight,) = dropped_weights(rows, source, other)
    assert f"`{field}: {'token_' * (field == 'token')}weight` under `dwl.data_weights`" in weight.sentence(other, has_loss=True)
    assert not dropped_weights(rows, source, DataWeights(**{field: "any"}))


def test_certain_ones_are_hints_and_columns_are_notes_and_false_declines_both(said: Said) -> None:
    rows = [{**parts(1, weight=0.3), "weight": 80}] * 2
    lines = said(rows, loss="nll")
    assert [len(lines[key]) for key in ("hints", "notes")] == [1, 1]
    assert "message" in lines["hints"][0]
    assert not any(said(rows, loss="nll", dwl={"data_weights": False}).values())
    assert not any(said(rows, loss="nll", dwl={"data_weights": True}).values())


def test_every_value_that_is_no_factor_is_named_with_its_row_and_field(dwl: Check, write_config: Write, tmp_path: Path) -> None:
    odd = [parts(-0.5), parts(1, weight="high"), parts(1, 1, mark=2.5), {**parts(1), "weight": math.inf}, parts(1, math.nan)]
    data = harness.write_rows(tmp_path / "weighed.jsonl", [parts(1), *odd])
    classes = {"critical": {"marked": "critical", "allow_empty": True}}
    config = write_config(data=data, loss="dwl", dwl={"data_weights": True, "classes": classes})
    result = dwl("check", config, "--json")
    assert result.exit_code == 1
    told = [(problem["message"], problem["value"]) for problem in findings(result)["problems"]]
    assert {problem["path"] for problem in findings(result)["problems"]} == {"datasets"}
    expected = {
        "row 5 of {}: `weight`: has to be finite": "inf",
        "row 6 of {}: `messages[1].content[1].weight`: has to be finite": "nan",
        "row 2 of {}: `messages[1].content[0].weight`: is below 0": -0.5,
        "row 3 of {}: `messages[1].weight`: has to be a number": "high",
        "row 4 of {}: `messages[1].mark`: has to be a name or a number": 2.5,
    }
    assert told == [(message.format(data), value) for message, value in expected.items()]


def test_of_very_many_wrong_values_the_first_twenty_are_named(dwl: Check, write_config: Write, tmp_path: Path) -> None:
    data = harness.write_rows(tmp_path / "weighed.jsonl", [parts(-1)] * 40)
    found = findings(dwl("check", write_config(data=data, loss="nll", dwl={"data_weights": True}), "--json"))["problems"]
    assert len(found) == 21
    assert found[19]["message"].startswith("row 20 of ")
    assert found[20]["message"] == f"20 more such values in the 40 rows of {data} looked at"


def targets_of(tokenizer: Any, row: dict[str, Any]) -> int:
    """The assistant's own text and the token that ends the turn, counted without the host."""
    return len(tokenizer.encode(row["messages"][1]["content"])) + 1


@pytest.fixture
def counted(dwl: Check, write_config: Write, little_model: Path, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[int]]]:
    """What check finds of rows with these weights, and the targets of each row."""
    from transformers import AutoTokenizer

    def check(weights: list[float], rows: list[dict[str, Any]] | None = None, **changes: Any) -> tuple[dict[str, Any], list[int]]:
        given = [{**row, "weight": weight} for row, weight in zip(rows or harness.rows(len(weights)), weights, strict=True)]
        data = harness.write_rows(tmp_path / "weighed.jsonl", given)
        found = findings(dwl("check", write_config(data=data, **changes), "--json"))
        tokenizer = AutoTokenizer.from_pretrained(little_model)
        return found, [targets_of(tokenizer, row) for row in given]

    return check


Counted = Callable[..., tuple[dict[str, Any], list[int]]]


@pytest.mark.parametrize("loss", ["dwl", "nll"])
def test_tokens_by_factor_and_what_they_come_to(counted: Counted, loss: str) -> None:
    weights = [0.5, 2, 0, 1, -1.5, 0.5]
    found, targets = counted(weights, loss=loss, dwl={"data_weights": {"allow_negative": True}})
    by_weight = dict.fromkeys(sorted(weights), 0)
    for weight, count in zip(weights, targets, strict=True):
        by_weight[weight] += count
    data = found["data"]
    assert data["factors"] == [{"from": w, "to": w, "tokens": count} for w, count in by_weight.items()]
    assert (data["targets"], data["taken_out"], data["negative"]) == (sum(targets), targets[2], targets[4])
    assert found["targets"] == sum(targets) - targets[2]
    (rest,) = found["classes"]
    assert rest["mass"] == pytest.approx(sum(abs(w) * count for w, count in zip(weights, targets, strict=True)))
    assert found["status"] == 0


def test_many_factors_are_ranges_beside_0_and_1(counted: Counted) -> None:
    weights = [0, 1, 1, *(0.2 + 0.1 * k for k in range(20))]
    found, targets = counted(weights, loss="nll", dwl={"data_weights": True})
    bins = found["data"]["factors"]
    assert [one for one in bins if one["from"] == one["to"]] == [
        {"from": 0, "to": 0, "tokens": targets[0]},
        {"from": 1, "to": 1, "tokens": sum(t for w, t in zip(weights, targets, strict=True) if w == 1)},
    ]
    assert len(bins) == 12
    assert sum(one["tokens"] for one in bins) == sum(targets)


def test_tokens_by_data_set_and_by_mark(dwl: Check, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    rows = harness.rows(9)
    marked = [{**row, "mark": "critical", "weight": 0.5} if k < 3 else {**row, "mark": "dull"} for k, row in enumerate(rows)]
    files = [harness.write_rows(tmp_path / f"{k}.jsonl", part) for k, part in enumerate((marked[:5], marked[5:]))]
    sources = [{"path": str(file), "type": "chat_template", "name": name} for file, name in zip(files, "ab", strict=True)]
    classes = {"critical": {"marked": "critical"}, "b": {"dataset": "b"}}
    config = write_config(loss="dwl", dwl={"classes": classes, "data_weights": True}, datasets=sources)
    found = findings(dwl("check", config, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(little_model)
    targets = [targets_of(tokenizer, row) for row in rows]
    critical, of_a, of_b = sum(targets[:3]), sum(targets[:5]), sum(targets[5:])
    assert found["data"]["data_sets"] == [
        {"name": "a", "tokens": of_a, "mass": of_a - critical / 2},
        {"name": "b", "tokens": of_b, "mass": of_b},
    ]
    assert found["data"]["marks"] == [{"name": "critical", "tokens": critical, "mass": critical / 2}]
    assert [row["tokens"] for row in found["classes"]] == [critical, of_b, sum(targets) - critical - of_b]
    assert f"{files[0]}, row 4: no class is `marked: dull`" in found["notes"]
    said = dwl("check", config).output
    for words in ("Factors of the data", "Data sets", "Marks", "Σ|w|", "█"):
        assert words in said


def test_weights_that_change_nothing_are_told(counted: Counted) -> None:
    found, _ = counted([1, 1, 1], loss="nll", dwl={"data_weights": {"row": "weight", "part": "weight"}})
    (hint,) = (hint for hint in found["hints"] if "data_weights" in hint)
    assert hint == (
        "`dwl.data_weights` changes nothing in the 3 rows looked at, where every factor is 1 "
        "(`weight` of a row, `weight` of a part)"
    )
    found, _ = counted([1, 0.5, 1], loss="nll", dwl={"data_weights": True})
    assert not any("data_weights" in hint for hint in found["hints"])


@pytest.mark.parametrize("reduction", ["sample_mean", "sample_sqrt"])
def test_a_reduction_by_sample_shows_what_a_token_of_each_class_counts(counted: Counted, reduction: str) -> None:
    """Without classes and weights a sample of n targets counts 1, or √n, and all of them together as much as their tokens do."""
    found, targets = counted([1, 1, 1], loss="dwl", dwl={"reduction": reduction})
    (rest,) = found["classes"]
    assert rest["one_token_vs_sft"] == pytest.approx(1)
    assert rest["mass"] == pytest.approx(3 if reduction == "sample_mean" else sum(n**0.5 for n in targets))
    assert "data" not in found


def test_data_that_takes_out_every_target_is_told_so(counted: Counted) -> None:
    found, targets = counted([0, 0], loss="nll", dwl={"data_weights": True})
    (problem,) = found["problems"]
    assert problem["hint"] == f"the data gives all {sum(targets)} a factor of 0"


def test_a_stream_is_looked_at_as_far_as_it_is_read(said: Said, tmp_path: Path) -> None:
    rows = [parts(1), parts(0.3)] * 4
    for row in rows:  # a stream cannot have texts in one place and lists in another
        row["messages"][0]["content"] = [{"type": "text", "text": "What?"}]
    source = {"path": str(tmp_path / "weighed.jsonl"), "ds_type": "json", "type": "chat_template"}
    (line,) = said(rows, loss="nll", streaming=True, datasets=[source])["hints"]
    assert "weighed.jsonl, row 2, messages[1].content[0]: Axolotl trains `weight: 0.3` as 1" in line


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("rows.jsonl", {}),
        ("rows.jsonl.gz", {}),
        ("zip::rows.jsonl", {}),
        ("rows.json", {}),
        ("rows.txt", {"ds_type": "json"}),
        ("rows.jsonl", {"path": "json", "data_files": ["rows.jsonl"]}),
    ],
    ids=["lines", "packed", "no address", "a list", "by another name", "a format and files"],
)
def test_a_number_that_is_none_is_found_in_whatever_file_the_host_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, entry: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [parts(1), parts(1, math.nan)]
    text = "\n" + json.dumps(rows, indent=1) if name == "rows.json" else "\n".join(map(json.dumps, rows))
    Path(name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    (problem,) = not_finite({"datasets": [{"path": name, **entry}]}, parse({"loss": "nll", "dwl": {"data_weights": True}}))
    assert problem.message == f"row 2 of {name}: `messages[1].content[1].weight`: has to be finite"
