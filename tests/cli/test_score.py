"""`dwl score`: nll against a softmax over full logits, folders that are gone on with, and rows that Axolotl takes back."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import Result

from dwl_plugin.cli import progress, score as command
from dwl_plugin.cli.nll import batches_of
from dwl_plugin.hosts import axolotl_preview
from tests.hosts import harness
from tests.pages import ROOT, blocks

Run = Callable[..., Result]
Write = Callable[..., Path]
Row = dict[str, Any]

CLASSES = {"classes": {"end": {"tokens": ["<|im_end|>"]}, "number": {"regex": r"\d+"}}}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PART_ROWS", 16)


def rows_of(out: Path) -> list[Row]:
    return [row for file in sorted((out / "rows").glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def bytes_of(out: Path) -> dict[str, bytes]:
    return {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def costs_of(row: Row) -> list[float]:
    """nll of its targets."""
    return [cost for cost in row["nll"] if cost is not None]


def nll_by_hand(model: Path, row: Row) -> list[float]:
    """From full logits of the row alone, in fp64."""
    import torch
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model).double()
    with torch.no_grad():
        log_p = network(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    labels = row["labels"]
    return [-float(log_p[at - 1, labels[at]]) for at in range(1, len(labels)) if labels[at] != -100]


def as_axolotl_makes_them(model: Path, count: int) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of the little sums: the reply is trained on, and the end of its turn; the line end behind that is not."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    made = []
    for row in harness.rows(count):
        ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False)
        before = tokenizer.apply_chat_template(row["messages"][:1], tokenize=True, return_dict=False, add_generation_prompt=True)
        last = len(ids) - len(tokenizer.encode("\n"))
        made.append((ids, [id if len(before) <= at < last else -100 for at, id in enumerate(ids)]))
    return made


def test_nll_is_that_of_the_full_softmax_in_the_order_of_the_data(
    dwl: Run, write_config: Write, little_model: Path, tmp_path: Path
) -> None:
    result = dwl("score", write_config(loss="nll", dwl=CLASSES, val_set_size=0.1), "--out", tmp_path / "out", "--batch-tokens", 300)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out")
    assert [row["row"] for row in rows] == list(range(1, 41))  # held out or not, and not shuffled
    assert [(row["input_ids"], row["labels"]) for row in rows] == as_axolotl_makes_them(little_model, 40)
    for row in rows[::6]:
        assert costs_of(row) == pytest.approx(nll_by_hand(little_model, row), rel=1e-4)
    for row in rows:
        targets = [at for at, label in enumerate(row["labels"]) if label != -100 and at]
        nll = np.array([row["nll"][at] for at in targets])
        assert [at for at, cost in enumerate(row["nll"]) if cost is not None] == targets
        assert [row["p"][at] for at in targets] == pytest.approx(np.exp(-nll), rel=1e-6)
        assert (row["targets"], row["attention_mask"]) == (len(targets), [1] * len(row["input_ids"]))
        assert (row["mean_nll"], row["mean_p"]) == pytest.approx((nll.mean(), np.exp(-nll).mean()))
        ends = [row["nll"][at] for at in targets if row["input_ids"][at] == 2]  # <|im_end|>
        assert (row["targets/end"], row["mean_nll/end"], row["mean_p/end"]) == pytest.approx((1, ends[0], np.exp(-ends[0])))
        assert row["targets/end"] + row["targets/number"] + row["targets/rest"] == len(targets)


def test_what_a_person_reads(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    """Hard rows first; two data sets, whose rows are numbered apart."""
    other = harness.write_rows(tmp_path / "other.jsonl", harness.rows(5))
    sums = {"path": str(tmp_path / "rows.jsonl"), "type": "chat_template", "name": "sums"}
    config = write_config(loss="nll", dwl=CLASSES, datasets=[sums, {"path": str(other), "type": "chat_template"}])
    result = dwl("score", config, "--out", tmp_path / "out", "--rows", 42)
    assert result.exit_code == 0, result.output
    with (tmp_path / "out" / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    costs = [float(line["mean_nll"]) for line in lines]
    assert costs == sorted(costs, reverse=True)
    assert len(lines) == 42
    assert {(line["data_set"], line["row"]) for line in lines if line["data_set"] != "sums"} == {
        (str(other), "1"),
        (str(other), "2"),
    }
    rows = rows_of(tmp_path / "out")
    ends = [row["mean_nll/end"] for row in rows]
    tables, hardest = result.output.split("The hardest rows")
    table = {line.split()[0]: line.split()[1:] for line in tables.splitlines() if line.split()}
    assert table["end"][:2] == ["42", f"{np.mean(ends):.3f}"]
    assert table["sums"][0] == "40"
    assert table["all"][0] == f"{sum(row['targets'] for row in rows):,}"
    assert lines[0]["row"] in hardest.splitlines()[4].split()


def test_rows_that_are_dropped_leave_their_numbers(dwl: Run, write_config: Write, tmp_path: Path, little_model: Path) -> None:
    lengths = [len(ids) for ids, _ in as_axolotl_makes_them(little_model, 40)]
    limit = sorted(lengths)[20]
    result = dwl("score", write_config(loss="nll", sequence_len=limit), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [row["row"] for row in rows_of(tmp_path / "out")] == [n + 1 for n, length in enumerate(lengths) if length <= limit]


def test_a_row_gets_the_same_beside_others(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(loss="nll")
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert dwl("score", config, "--out", alone, "--batch-tokens", 1).exit_code == 0
    assert dwl("score", config, "--out", together).exit_code == 0
    for one, other in zip(rows_of(alone), rows_of(together), strict=True):
        assert costs_of(one) == pytest.approx(costs_of(other), rel=1e-5)


def test_batches() -> None:
    rows = [{"input_ids": [0] * length, "labels": [5] * length} for length in (3, 8, 5, 8, 1)]
    assert batches_of(rows, 16) == [[1, 3], [2, 0]]  # the last has but a label that nothing predicts
    assert batches_of(rows, 1) == [[1], [3], [2], [0]]


class Killed(BaseException):
    pass


def test_a_run_that_was_killed_ends_with_the_same_files(
    dwl: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(loss="nll", dwl=CLASSES)
    assert dwl("score", config, "--out", tmp_path / "whole").exit_code == 0
    made, write = [], command.Folder.write

    def write_one(self: Any, part: int, *rest: Any) -> None:
        if len(made) == 1:
            (self.rows / ".00001.parquet.1").write_bytes(b"half")
            raise Killed
        made.append(part)
        write(self, part, *rest)

    monkeypatch.setattr(command.Folder, "write", write_one)
    with pytest.raises(Killed):
        dwl("score", config, "--out", tmp_path / "out")
    assert made == [0]
    made.clear()
    monkeypatch.setattr(command.Folder, "write", lambda self, part, *rest: (made.append(part), write(self, part, *rest)))
    result = dwl("score", config, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "16 of 40 rows were scored before" in result.output
    assert made == [1, 2]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_finished_folder_loads_no_model(dwl: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(loss="nll")
    first = dwl("score", config, "--out", tmp_path / "out")
    monkeypatch.setattr(axolotl_preview, "load_model", None)
    assert dwl("score", config, "--out", tmp_path / "out").stdout == first.stdout


def test_a_folder_belongs_to_one_scoring(dwl: Run, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(little_model, tmp_path / "model")
    config, out = write_config(loss="nll", model=model), tmp_path / "out"
    assert dwl("score", config, "--out", out, "--rows", 20).exit_code == 0
    before = bytes_of(out)

    def refused(*words: str, **changes: Any) -> None:
        options = changes.pop("options", ("--rows", 20))
        result = dwl("score", write_config(loss="nll", model=model, **changes), "--out", out, *options)
        assert result.exit_code == 1
        assert all(word in result.output for word in (*words, "--out")), result.output
        assert bytes_of(out) == before

    refused("`sequence_len`", "`learning_rate`", sequence_len=300, learning_rate=0.5)
    refused("--rows", options=())
    weights = model / "model.safetensors"
    kept = weights.rename(tmp_path / "kept")  # what is loaded of it is read from there
    weights.write_bytes(kept.read_bytes()[:-1] + b"!")
    refused("weights of the model")
    kept.replace(weights)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template.replace("|im_start|>", "|im_start|> "))
    refused("tokenizer")
    (model / "chat_template.jinja").write_text(template)
    data = harness.rows(40)
    data[17]["messages"][0]["content"] += " Now?"
    refused("00001.parquet", data=harness.write_rows(tmp_path / "rows.jsonl", data))
    refused("00001.parquet", data=harness.write_rows(tmp_path / "rows.jsonl", harness.rows(16)))


def test_a_folder_of_others_is_left_alone(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("all of it")
    result = dwl("score", write_config(loss="nll"), "--out", out)
    assert result.exit_code == 1
    assert "did not write" in result.output
    assert list(bytes_of(out)) == ["thesis.txt"]


def test_another_model(dwl: Run, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(little_model, tmp_path / "other")
    harness.make_model(other, initializer_range=0.1)
    result = dwl("score", write_config(loss="nll"), "--out", tmp_path / "out", "--rows", 3, "--model", other)
    assert result.exit_code == 0, result.output
    for row in rows_of(tmp_path / "out"):
        assert costs_of(row) == pytest.approx(nll_by_hand(other, row), rel=1e-4)


def test_an_adapter(dwl: Run, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    """Of a config without one, on the model that it was trained on."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    network = AutoModelForCausalLM.from_pretrained(little_model)
    tuned = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    result = dwl("score", write_config(loss="nll"), "--out", tmp_path / "out", "--rows", 3, "--model", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    for row in rows_of(tmp_path / "out"):
        assert costs_of(row) == pytest.approx(nll_by_hand(tmp_path / "merged", row), rel=1e-3)
        assert costs_of(row) != pytest.approx(nll_by_hand(little_model, row), rel=1e-2)


def test_a_model_with_other_tokens(dwl: Run, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(little_model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    arguments = ("score", write_config(loss="nll"), "--out", tmp_path / "out", "--model", other)
    result = dwl(*arguments)
    assert result.exit_code == 1
    assert "of 400 tokens 2 are not the same" in result.output
    assert "'A'" in result.output
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (other / name).unlink()
    result = dwl(*arguments)
    assert result.exit_code == 1
    assert "has no tokenizer" in result.output
    assert not (tmp_path / "out").exists()


def test_axolotl_takes_the_rows_as_they_are(dwl: Run, write_config: Write, tmp_path: Path, little_model: Path) -> None:
    """Not tokenised again, and a second scoring finds what the first one did."""
    assert dwl("score", write_config(loss="nll"), "--out", tmp_path / "one").exit_code == 0
    config = write_config(loss="nll", datasets=[{"path": str(tmp_path / "one" / "rows")}])
    result = dwl("score", config, "--out", tmp_path / "two")
    assert result.exit_code == 0, result.output
    kept = ("input_ids", "labels", "nll")
    first, second = ([{key: row[key] for key in kept} for row in rows_of(tmp_path / out)] for out in ("one", "two"))
    assert len(first) == 40
    assert first == second


def test_a_stream(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    data = harness.write_rows(tmp_path / "text.jsonl", [{"text": f"{n} and {n + 1} make {2 * n + 1}"} for n in range(60)])
    source = {"path": "json", "data_files": [str(data)], "type": "pretrain", "text_column": "text"}
    stream = {"datasets": None, "pretraining_dataset": [source], "streaming": True, "shuffle_merged_datasets": False}
    config = write_config(loss="nll", **stream, sample_packing=True, sequence_len=128, micro_batch_size=1)
    result = dwl("score", config, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "--rows 10000" in result.output
    result = dwl("score", config, "--out", tmp_path / "out", "--rows", 20)
    assert result.exit_code == 0, result.output
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 20
    assert all(row["input_ids"].count(2) == 1 and row["input_ids"][-1] == 2 for row in rows)  # one text each, with its end
    assert all(row["targets"] == len(row["input_ids"]) - 1 for row in rows)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rl": "dpo"}, "rl"),
        ({"skip_prepare_dataset": True, "remove_unused_columns": False}, "only when a batch is"),
        ({"datasets": None}, "datasets"),
    ],
)
def test_data_that_has_no_such_rows(dwl: Run, write_config: Write, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    result = dwl("score", write_config(loss="nll", **changes), "--out", tmp_path / "out")
    assert result.exit_code in (1, 2)
    assert words in result.output
    assert not (tmp_path / "out").exists()


def test_memory_that_is_full(dwl: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from transformers import LlamaForCausalLM

    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    config = write_config(loss="nll")
    monkeypatch.setattr(LlamaForCausalLM, "forward", full)
    result = dwl("score", config, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "--batch-tokens" in result.output
    assert "sequence_len" in dwl("score", config, "--out", tmp_path / "out", "--batch-tokens", 1).output


def test_a_disk_that_is_full(dwl: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And that has room again."""
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr("os.fsync", _full)
        result = dwl("score", write_config(loss="nll"), "--out", tmp_path / "out", "--rows", 3)
    assert result.exit_code == 1
    assert "No space left on device" in result.output
    assert dwl("score", write_config(loss="nll"), "--out", tmp_path / "out", "--rows", 3).exit_code == 0


def _full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_loss_that_is_no_number(dwl: Run, write_config: Write, little_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    broken = shutil.copytree(little_model, tmp_path / "broken")
    network = AutoModelForCausalLM.from_pretrained(little_model)
    torch.nn.init.constant_(network.model.norm.weight, float("nan"))
    network.save_pretrained(broken)
    result = dwl("score", write_config(loss="nll", model=broken), "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "no finite loss" in result.output
    assert not list((tmp_path / "out" / "rows").iterdir())


def test_lines_where_nobody_watches_a_bar(dwl: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SAY_EVERY", 0.0)
    result = dwl("score", write_config(loss="nll"), "--out", tmp_path / "out", "--rows", 20, "--batch-tokens", 1)
    lines = [line for line in result.stderr.splitlines() if "rows/s" in line]
    assert len(lines) == 20
    assert lines[4].startswith("5 of 20 rows, ")
    assert lines[4].endswith(" s left")


def weighed_rows(tmp_path: Path) -> Path:
    """Little sums with a factor for each row, and some for the reply."""
    rows = harness.rows(12)
    for n, row in enumerate(rows):
        row["weight"] = 0.5 + n
        if n % 3 == 0:
            row["messages"][1]["weight"] = 0.25
    return harness.write_rows(tmp_path / "weighed.jsonl", rows)


def test_factors_of_the_data_come_back_with_its_rows(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    data = weighed_rows(tmp_path)
    result = dwl("score", write_config(loss="nll", dwl={"data_weights": True}, data=data), "--out", tmp_path / "one")
    assert result.exit_code == 0, result.output
    assert "in no class" not in result.output
    rows = rows_of(tmp_path / "one")
    for n, row in enumerate(rows):
        own = {weight for weight, label in zip(row["token_weight"], row["labels"], strict=True) if label != -100}
        assert own == {(0.5 + n) * (1 if n % 3 else 0.25)}
    back = {"datasets": [{"path": str(tmp_path / "one" / "rows")}], "dwl": {"data_weights": {"token": "token_weight"}}}
    result = dwl("score", write_config(loss="nll", **back), "--out", tmp_path / "two")
    assert result.exit_code == 0, result.output
    assert [row["token_weight"] for row in rows_of(tmp_path / "two")] == [row["token_weight"] for row in rows]


def test_targets_of_no_class_are_told(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    rows = harness.rows(4)
    rows[1]["weight"] = 0
    config = write_config(loss="nll", dwl={"data_weights": True, **CLASSES}, data=harness.write_rows(tmp_path / "zero.jsonl", rows))
    result = dwl("score", config, "--out", tmp_path / "out")
    targets = next(row["targets"] for row in rows_of(tmp_path / "out") if row["row"] == 2)
    assert f"{targets} targets have a factor of 0 in the data: they are scored, and in no class" in result.output


def documented(language: str) -> str:
    """The first block of docs/scoring.md in a language."""
    return blocks(ROOT / "docs" / "scoring.md", language)[0].text


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_recipe_keeps_the_tokens_with_the_most_excess(
    dwl: Run, write_config: Write, little_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Of docs/scoring.md, both blocks of it, and Axolotl trains on what they make."""
    other = shutil.copytree(little_model, tmp_path / "other")
    harness.make_model(other, initializer_range=0.1)
    for name, options in {"base": (), "reference": ("--model", other)}.items():
        result = dwl("score", write_config(loss="nll"), "--out", tmp_path / "scored" / name, "--rows", 20, *options)
        assert result.exit_code == 0, result.output
    monkeypatch.chdir(tmp_path)
    exec(documented("python"), {})
    kept = pq.read_table("weighed.parquet").to_pylist()
    base, reference = (rows_of(tmp_path / "scored" / name) for name in ("base", "reference"))
    excess = [
        (one - other, weight)
        for row, model, rho in zip(base, reference, kept, strict=True)
        for one, other, weight in zip(row["nll"], model["nll"], rho["token_weight"], strict=True)
        if one is not None
    ]
    chosen, left = ([cost for cost, weight in excess if weight == own] for own in (1, 0))
    assert len(chosen) / len(excess) == pytest.approx(0.6, abs=0.01)
    assert min(chosen) > max(left)
    changes = yaml.safe_load(documented("yaml"))
    if packed:
        changes |= {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 1}
    run = harness.train(
        harness.config(little_model, tmp_path / "weighed.parquet", tmp_path, **changes, max_steps=1, batch_size=None)
    )
    assert 0 < run.logged("nll")[0] < 20
    assert run.logged("dwl/p")


def test_what_a_config_could_run_is_listed_first(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    result = dwl("score", write_config(loss="nll", trust_remote_code=True), "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "--trust" in result.output
    assert not (tmp_path / "out").exists()
