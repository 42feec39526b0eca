"""What a run logs, and that it is what the tokens say."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml
from tqdm.auto import tqdm

from dwl_plugin.config import parse
from dwl_plugin.run.startup import log_line
from dwl_plugin.values import Reduction
from tests.hosts.harness import CLASSES, Run, train

Configure = Callable[..., dict[str, Any]]
ALPHA = {"reasoning": 1, "number": 5, "control": 2, "rest": 2}
MOVED = {"reasoning": 4, "number": 1, "control": 1, "rest": 4}
DWL = {
    "classes": CLASSES,
    "alpha": ALPHA,
    "token_loss": "dft",
    "schedule": {"type": "cosine", "to": MOVED, "start": 1, "end": "100%"},
}
NAMES = ("reasoning", "number", "control", "rest")


@pytest.fixture(scope="module")
def run(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    from tests.hosts.harness import config

    folder = tmp_path_factory.mktemp("run")
    settings = config(
        model_folder,
        data_file,
        folder,
        loss="dwl",
        dwl=DWL,
        max_steps=6,
        gradient_accumulation_steps=2,
        val_set_size=8,
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        metric_for_best_model="eval_nll",
    )
    return train(settings)


def test_alpha_follows_its_closed_formula_at_every_step(run: Run) -> None:
    start = [ALPHA[name] / 10 for name in NAMES]
    end = [MOVED[name] / 10 for name in NAMES]
    for tau, entry in enumerate(entry for entry in run.history if "loss" in entry):
        s = (1 - math.cos(math.pi * min(max((tau - 1) / 5, 0), 1))) / 2
        expected = [(1 - s) * a + s * b for a, b in zip(start, end, strict=True)]
        assert [entry[f"dwl/alpha/{name}"] for name in NAMES] == pytest.approx(expected, abs=1e-12)


def test_shares_add_up_and_the_whole_is_the_sum_of_its_classes(run: Run) -> None:
    entries = [entry for entry in run.history if "loss" in entry]
    assert len(entries) == 6
    for entry in entries:
        shares = {name: entry[f"dwl/token_share/{name}"] for name in NAMES}
        assert sum(shares.values()) == pytest.approx(1)
        assert sum(entry[f"dwl/loss_share/{name}"] for name in NAMES) == pytest.approx(1)
        for quantity, total in (("nll", "nll"), ("p", "dwl/p")):
            mean = sum(shares[name] * entry[f"dwl/{quantity}/{name}"] for name in NAMES if shares[name])
            assert mean == pytest.approx(entry[total], rel=1e-9)
        # token_mean: the loss is the mean weight's share of nll, so it lies far below nll here
        assert 0 < entry["loss"] < entry["nll"]


def test_eval_nll_is_the_plain_cross_entropy_of_the_eval_set(run: Run) -> None:
    trainer = run.trainer
    model = trainer.model
    nll, count = 0.0, 0
    with torch.no_grad():
        for row in trainer.eval_dataset:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            logits = model(input_ids=ids).logits[0, :-1].double()
            targets = labels[0, 1:]
            nll += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += int((targets != -100).sum())
    assert run.logged("eval_nll")[-1] == pytest.approx(nll / count, rel=1e-5)
    assert run.logged("eval_dwl/token_share/number")[-1] > 0


OBJECTIVES = {
    "nll": {"loss": "nll"},
    "dft": {"loss": "dft"},
    **{
        reduction: {"loss": "dwl", "dwl": {"classes": CLASSES, "alpha": ALPHA, "reduction": reduction}}
        for reduction in get_args(Reduction)
    },
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ppl_is_exp_of_nll_wherever_it_is_written(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """In the log of training and evaluation, on the console, in the state on the disk and in the model card."""
    run = train(configure(**OBJECTIVES[name], max_steps=2, val_set_size=8, eval_steps=1, save_strategy="steps", save_steps=2))
    told = capsys.readouterr().out
    for prefix, times in (("", 2), ("eval_", 3)):
        nll, ppl = run.logged(f"{prefix}nll"), run.logged(f"{prefix}ppl")
        assert ppl == pytest.approx([math.exp(value) for value in nll], rel=1e-9)
        assert len(ppl) == times
        assert [float(value) for value in re.findall(rf"'{prefix}ppl': '(\S+)'", told)] == pytest.approx(ppl, rel=1e-3)
    model, sets = run.trainer.model, run.trainer.eval_dataset
    with torch.no_grad():
        rows = [(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])) for row in sets]
        nlls = [(model(input_ids=ids, labels=labels).loss.item(), int((labels[:, 1:] != -100).sum())) for ids, labels in rows]
    measured = math.exp(sum(nll * count for nll, count in nlls) / sum(count for _, count in nlls))
    assert run.logged("eval_ppl")[-1] == pytest.approx(measured, rel=1e-4)
    card = (tmp_path / "run" / "README.md").read_text()
    assert float(re.findall(r"^- Ppl: (\S+)$", card, re.M)[0]) == pytest.approx(measured, rel=1e-3)
    state = yaml.safe_load((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert [entry["eval_ppl"] for entry in state["log_history"] if "eval_ppl" in entry] == run.logged("eval_ppl")


def test_several_evaluation_sets_have_no_perplexity_that_is_not_of_their_nll(configure: Configure) -> None:
    def split(trainer: Any) -> None:
        halves = trainer.eval_dataset.train_test_split(0.5, shuffle=False)
        trainer.eval_dataset = {"a": halves["train"], "b": halves["test"]}

    run = train(configure(loss="dft", max_steps=1, val_set_size=8, eval_steps=1), before=split)
    for name in ("eval_a", "eval_b"):
        assert run.logged(f"{name}_loss")[0] < 0.5 * run.logged(f"{name}_nll")[0]
    found = [(key, entry) for entry in run.history for key in entry if key.endswith("ppl")]
    assert [entry[key] for key, entry in found] == [math.exp(entry[f"{key.removesuffix('ppl')}nll"]) for key, entry in found]


def test_an_evaluation_set_without_a_target_has_no_perplexity(configure: Configure) -> None:
    def mask(trainer: Any) -> None:
        trainer.eval_dataset = trainer.eval_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})

    run = train(configure(loss="dft", max_steps=1, val_set_size=8, eval_steps=1), before=mask)
    assert run.logged("eval_runtime")
    assert not run.logged("eval_ppl")


def test_the_best_checkpoint_by_perplexity_is_the_lowest(configure: Configure) -> None:
    settings = {"val_set_size": 8, "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "metric_for_best_model": "eval_ppl"}
    run = train(configure(loss="dft", max_steps=3, **settings))
    assert run.trainer.state.best_metric == min(run.logged("eval_ppl")[-3:])


def test_checkpoint_state_and_resolved_block_are_on_disk(run: Run) -> None:
    out = Path(run.trainer.args.output_dir)
    state = yaml.safe_load((out / "checkpoint-6" / "trainer_state.json").read_text())
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert logged[-1]["dwl/nll/number"] == run.logged("dwl/nll/number")[-1]
    assert state["best_metric"] == min(run.logged("eval_nll"))
    saved = yaml.safe_load((out / "dwl_config.yaml").read_text())
    assert parse(saved) == parse({"loss": "dwl", "dwl": DWL})


def test_console_keeps_the_few_and_the_state_gets_all(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    train(configure(loss="dwl", dwl={"classes": CLASSES, "alpha": ALPHA}, max_steps=1))
    text = capsys.readouterr().out
    assert "dwl/alpha/number" in text
    assert "'nll'" in text
    assert "dwl/loss_share" not in text


def test_a_line_of_ours_does_not_stand_behind_a_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with tqdm(total=2, file=sys.stdout):
        log_line("hello")
    (line,) = (line for line in capsys.readouterr().out.split("\n") if "hello" in line)
    assert line.rpartition("\r")[2] == "[dwl] hello"


def test_opening_lines_say_what_alpha_does(configure: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    train(configure(loss="dwl", dwl=DWL, max_steps=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[dwl]")]
    assert "`loss: dwl` replaces ForCausalLMLoss" in lines[0]
    number = next(line.split() for line in lines if line.split()[1] == "number")
    assert number[4:6] == ["0.500", "0.50×"]
    assert [line.split()[1] for line in lines[2:6]] == list(NAMES)


@pytest.mark.parametrize("written", [False, True])
def test_a_loss_much_smaller_than_sft_is_said_at_the_start(
    configure: Configure, capsys: pytest.CaptureFixture[str], written: bool
) -> None:
    """By as much as one step of it is smaller than one of SFT, and not where `token_mean` is written out."""
    classes = {"number": {"regex": r"\d+"}, "control": {"tokens": ["<|im_end|>"]}}
    dwl = {"classes": classes, "alpha": {"number": 2, "control": 3, "rest": 1}, **({"reduction": "token_mean"} if written else {})}
    run = train(configure(loss="dwl", dwl=dwl, max_steps=20, learning_rate=1e-12))
    told = re.findall(r"the whole loss and its gradients are (\S+)× those of SFT", capsys.readouterr().out)
    assert bool(told) != written
    if told:
        assert float(told[0]) == pytest.approx(sum(run.logged("dwl/weight")) / 20, abs=0.01)


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_classes_are_measured_under_the_other_losses(configure: Configure, loss: str) -> None:
    plain = train(configure(loss=loss, max_steps=2))
    classes = {name: {key: value for key, value in spec.items() if key != "token_loss"} for name, spec in CLASSES.items()}
    measured = train(configure(loss=loss, dwl={"classes": classes}, max_steps=2))
    assert measured.logged("loss") == plain.logged("loss")
    assert len(measured.logged("dwl/nll/number")) == 2


def test_dft_moves_from_nll_and_its_exponent_is_logged(configure: Configure, tmp_path: Path) -> None:
    """The same steps as NLL while the exponent is 0, and a smaller loss than nll from where it is not."""
    dft = {"exponent": 0, "schedule": {"type": "step", "to": {"exponent": 1}, "at": 2}}
    moved = train(configure(loss="dft", dft=dft, max_steps=4))
    plain = train(configure(loss="nll", max_steps=4, out=tmp_path / "nll"))
    assert moved.logged("dwl/exponent/rest") == [0.0, 0.0, 1.0, 1.0]
    assert moved.logged("loss")[:2] == plain.logged("loss")[:2]
    assert moved.logged("nll")[2] == plain.logged("nll")[2]
    assert moved.logged("loss")[2] < 0.9 * plain.logged("loss")[2]
