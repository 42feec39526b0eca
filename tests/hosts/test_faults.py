"""Runs that are killed, disks that are full, checkpoints that are cut off or made up, losses that are no numbers."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from dwl_plugin.errors import ConfigError, NotFiniteError, RunError
from dwl_plugin.hosts.checkpoints import choose_checkpoint, finished_checkpoints, unfinished
from dwl_plugin.hosts.needed_files import file_problems
from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.membership import Membership
from dwl_plugin.run.dataset_check import picked_rows
from dwl_plugin.run.nan_guard import FirstBadStep
from dwl_plugin.values import Overlap
from tests.hosts import harness, ranks
from tests.hosts.harness import CLASSES

Configure = Callable[..., dict[str, Any]]
STEPS = 10
DWL = {
    "classes": CLASSES,
    "alpha": {"reasoning": 1, "number": 5, "control": 2, "rest": 2},
    "reduction": "class_mean",
    "schedule": {"type": "linear", "to": {"reasoning": 4, "number": 1, "control": 1, "rest": 4}, "start": "10%"},
}


def settings(**changes: Any) -> dict[str, Any]:
    return {
        "loss": "dwl",
        "dwl": DWL,
        "max_steps": STEPS,
        "num_epochs": 3,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        **changes,
    }


# killed at any point


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def cut(file: Path) -> None:
    """What is on the disk when the writing stops half-way."""
    os.truncate(file, file.stat().st_size // 2)


def in_the_forward(trainer: Any, step: int) -> None:
    """In the second micro-batch of `step`."""
    seen = []

    def hook(*_: Any) -> None:
        seen.append(1)
        if len(seen) == 2 * step:
            die()

    trainer.model.register_forward_hook(hook)


class _At(harness.TrainerCallback):
    def __init__(self, event: str, step: int) -> None:
        def handler(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step - 1:
                die()

        setattr(self, event, handler)


def between_gradients_and_update(trainer: Any, step: int) -> None:
    trainer.add_callback(_At("on_pre_optimizer_step", step))


def between_update_and_log(trainer: Any, step: int) -> None:
    trainer.add_callback(_At("on_optimizer_step", step))


def while_saving(part: str) -> Callable[[Any, int], None]:
    """In the first save from `step` on, with `part` half written."""

    def arrange(trainer: Any, step: int) -> None:
        save = trainer._save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            folder = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}"
            if trainer.state.global_step >= step:
                after = {"model.safetensors": "save_model", "optimizer.pt": "_save_optimizer_and_scheduler"}.get(part)
                owner, name = (trainer, after) if after else (trainer.state, "save_to_json")
                write = getattr(owner, name)

                def half(*inner: Any, **named: Any) -> None:
                    write(*inner, **named)
                    cut(folder / part)
                    die()

                setattr(owner, name, half)
            save(*args, **kwargs)
            if trainer.state.global_step >= step:
                die()

        trainer._save_checkpoint = save_checkpoint

    return arrange


def after_a_save(trainer: Any, step: int) -> None:
    class Saved(harness.TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step >= step:
                die()

    trainer.add_callback(Saved())


POINTS: dict[str, Callable[[Any, int], None]] = {
    "in the forward": in_the_forward,
    "before the update": between_gradients_and_update,
    "after the update": between_update_and_log,
    "model half written": while_saving("model.safetensors"),
    "optimizer half written": while_saving("optimizer.pt"),
    "state half written": while_saving("trainer_state.json"),
    "after a save": after_a_save,
}
KILLS = [
    pytest.param(point, random.Random(f"{point} {seed}").randint(1, STEPS), marks=pytest.mark.weekly if seed else pytest.mark.slow)
    for point in POINTS
    for seed in range(3)
]


@pytest.fixture(scope="module")
def whole(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ranks.Report:
    out = tmp_path_factory.mktemp("whole")
    return ranks.train(harness.config(model_folder, data_file, out, **settings()))


def run_until_killed(config: dict[str, Any], point: str, step: int, log: Path) -> None:
    try:
        harness.train(config, lambda trainer: POINTS[point](trainer, step))
    except BaseException:
        log.write_text(traceback.format_exc())
        raise


@pytest.mark.parametrize(("point", "step"), KILLS)
def test_a_killed_run_resumes_to_the_parameters_of_the_whole_run(
    configure: Configure, whole: ranks.Report, tmp_path: Path, point: str, step: int
) -> None:
    config, log = configure(**settings(auto_resume_from_checkpoints=True)), tmp_path / "child.log"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.hosts.warm"])
    process = context.Process(target=run_until_killed, args=(config, point, step, log))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, log.read_text()
    resumed = ranks.train(config)
    assert resumed.parameters.keys() == whole.parameters.keys()
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name
    done = {entry["step"]: entry for entry in whole.history if "loss" in entry}
    again = {entry["step"]: entry for entry in resumed.history if "loss" in entry}
    assert set(again) == set(done)
    for at, entry in done.items():
        assert {key: again[at][key] for key in entry if "dwl/" in key or key == "nll"} == {
            key: value for key, value in entry.items() if "dwl/" in key or key == "nll"
        }


# a full disk


@pytest.mark.usefixtures("full_disk")
def test_settings_that_cannot_be_written_down_do_not_stop_a_run(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = harness.train(configure(**settings(max_steps=1, save_strategy="no", save_steps=None)))
    assert len(run.logged("loss")) == 1
    assert not [file.name for file in (tmp_path / "run").iterdir() if "dwl_config" in file.name]
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot be written" in line]
    assert len(said) == 2
    assert all("[dwl] " in line for line in said)
    assert "dwl_config.yaml cannot be written: No space left on device. Training goes on" in said[0]
    assert "the model card has no section on the loss: " in said[1]


FULL = os.strerror(errno.ENOSPC)
WRITERS: dict[str, tuple[str, Exception]] = {  # what is half written when the disk is full, and what its writer says then
    "model.safetensors": ("save_model", SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")),
    "tokenizer.json": ("save_model", Exception(f"{FULL} (os error 28)")),
    "optimizer.pt": (
        "_save_optimizer_and_scheduler",
        RuntimeError("PytorchStreamWriter failed writing file data/4: file write failed"),
    ),
    "trainer_state.json": ("save_to_json", OSError(errno.ENOSPC, FULL)),
}


@pytest.mark.parametrize("part", WRITERS)
def test_a_disk_that_is_full_in_the_middle_of_a_checkpoint_is_told_with_what_was_kept(
    configure: Configure, tmp_path: Path, part: str
) -> None:
    method, error = WRITERS[part]

    def fills_up(trainer: Any) -> None:
        owner = trainer.state if method == "save_to_json" else trainer
        write = getattr(owner, method)

        def half(*args: Any, **named: Any) -> None:
            write(*args, **named)
            if trainer.state.global_step == 4:
                cut(tmp_path / "run" / "checkpoint-4" / part)
                raise error

        setattr(owner, method, half)

    class AtTheStart(harness.TrainerCallback):  # the trainer's state is made when it starts
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            fills_up(self.trainer)

    def arrange(trainer: Any) -> None:
        callback = AtTheStart()
        callback.trainer = trainer
        trainer.add_callback(callback)

    with pytest.raises(RunError) as caught:
        harness.train(configure(**settings(max_steps=6)), before=arrange)
    said, folder = str(caught.value), tmp_path / "run"
    assert f"the checkpoint of step 4 could not be written ({error}; " in said
    assert " MB are free on the disk), so training stops" in said
    assert f"The newest checkpoint, {folder / 'checkpoint-2'}, is whole" in said
    assert "checkpoint-4 is not" in said
    config = cfg(folder, auto_resume_from_checkpoints=True)
    assert "resuming from checkpoint-2" in str(choose_checkpoint(config))


# checkpoints that are cut off


@pytest.fixture(scope="module")
def two_checkpoints(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    harness.train(harness.config(model_folder, data_file, out, **settings(max_steps=4)))
    return out / "run"


@pytest.fixture
def run_folder(two_checkpoints: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(two_checkpoints, tmp_path / "copy"))


def cfg(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"output_dir": str(folder), **changes}


def test_whole_checkpoints_are_whole(run_folder: Path) -> None:
    assert [folder.name for folder in finished_checkpoints(run_folder)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize(
    "file", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"]
)
def test_a_file_that_breaks_off_is_noticed(run_folder: Path, file: str) -> None:
    newest = run_folder / "checkpoint-4"
    assert unfinished(newest) is None
    cut(newest / file)
    assert unfinished(newest) == f"its {file} breaks off"


def test_a_part_of_deepspeeds_checkpoint_that_was_cut_off_is_found(tmp_path: Path) -> None:
    part = tmp_path / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    part.parent.mkdir()
    torch.save({"x": torch.zeros(1000)}, part)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    assert unfinished(tmp_path) is None
    cut(part)
    assert unfinished(tmp_path) == f"its global_step2/{part.name} breaks off"


def test_automatic_resuming_takes_the_newest_whole_checkpoint_and_says_so(run_folder: Path) -> None:
    (run_folder / "checkpoint-4" / "trainer_state.json").unlink()
    config = cfg(run_folder, auto_resume_from_checkpoints=True)
    line = choose_checkpoint(config)
    assert line is not None
    assert "checkpoint-4 is damaged" in line
    assert config["resume_from_checkpoint"] == str(run_folder / "checkpoint-2")


def test_automatic_resuming_starts_over_where_no_checkpoint_is_whole(run_folder: Path) -> None:
    for name in ("checkpoint-2", "checkpoint-4"):
        cut(run_folder / name / "trainer_state.json")
    config = cfg(run_folder, auto_resume_from_checkpoints=True)
    assert "starting from the beginning" in str(choose_checkpoint(config))
    assert config["auto_resume_from_checkpoints"] is False


def test_whole_checkpoints_are_left_to_the_host(run_folder: Path, tmp_path: Path) -> None:
    for config in (
        cfg(run_folder, auto_resume_from_checkpoints=True),
        cfg(run_folder, resume_from_checkpoint=str(run_folder / "checkpoint-2")),
        cfg(tmp_path / "nothing here", auto_resume_from_checkpoints=True),
        cfg(run_folder),
    ):
        before = dict(config)
        assert choose_checkpoint(config) is None
        assert config == before


@pytest.mark.usefixtures("no_model")
def test_a_truncated_trainer_state_is_an_error_that_names_the_checkpoint_before_it(configure: Configure, run_folder: Path) -> None:
    newest = run_folder / "checkpoint-4"
    cut(newest / "trainer_state.json")
    with pytest.raises(ConfigError) as caught:
        harness.train(configure(**settings(output_dir=str(run_folder), resume_from_checkpoint=str(newest))))
    (problem,) = caught.value.problems
    assert problem.path == "resume_from_checkpoint"
    assert "trainer_state.json breaks off" in str(problem)
    assert str(run_folder / "checkpoint-2") in problem.hint


@pytest.mark.usefixtures("no_model")
def test_a_resume_that_names_no_folder_is_told(configure: Configure) -> None:
    """The host would look for a checkpoint where it was started, once a model is loaded."""
    config = configure(**settings(resume_from_checkpoint=""))
    with pytest.raises(ConfigError, match=r"(?m)^  resume_from_checkpoint: names no folder"):
        harness.train(config)
    assert [problem.path for problem in file_problems(config)] == ["resume_from_checkpoint"]


# checkpoints that somebody else made


def long_header(file: Path) -> None:
    file.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def deep_header(file: Path) -> None:
    header = b"[" * 5_000_000
    file.write_bytes(len(header).to_bytes(8, "little") + header)


def absurdly_large(file: Path) -> None:
    os.truncate(file, 1 << 40)


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def leads_nowhere(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def holds(text: str) -> Callable[[Path], object]:
    return lambda file: file.write_text(text)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model.safetensors", long_header, "its model.safetensors breaks off"),
        ("model.safetensors", deep_header, "its model.safetensors breaks off"),
        ("model.safetensors", pipe, "its model.safetensors is no file"),
        ("model.safetensors", device, "its model.safetensors is no file"),
        ("optimizer.pt", pipe, "its optimizer.pt is no file"),
        ("optimizer.pt", leads_nowhere, "its optimizer.pt is no file"),
        ("trainer_state.json", pipe, "its trainer_state.json is not read: it is a pipe"),
        ("trainer_state.json", device, "its trainer_state.json is not read: it is a device"),
        ("trainer_state.json", absurdly_large, "its trainer_state.json is not read: it has more than 1,048,576 KiB"),
        ("trainer_state.json", holds("[" * 100_000 + "]" * 100_000), "its trainer_state.json is nested too deep"),
        ("trainer_state.json", holds("[]"), "its trainer_state.json is no JSON object"),
        ("trainer_state.json", holds("{}"), "`global_step`: field required"),
        ("trainer_state.json", holds('{"global_step": NaN}'), "`global_step`: input should be a valid integer (got nan)"),
        ("trainer_state.json", holds('{"global_step": -1}'), "`global_step`: input should be greater than or equal to 0 (got -1)"),
        (
            "trainer_state.json",
            holds('{"global_step": 2, "stateful_callbacks": [1]}'),
            "`stateful_callbacks`: input should be a valid",
        ),
    ],
)
def test_a_checkpoint_that_somebody_made_up_is_refused_at_once(
    run_folder: Path, file: str, change: Callable[[Path], object], words: str
) -> None:
    newest = run_folder / "checkpoint-4"
    change(newest / file)
    assert words in str(unfinished(newest))
    assert "resuming from checkpoint-2" in str(choose_checkpoint(cfg(run_folder, auto_resume_from_checkpoints=True)))
    with pytest.raises(ConfigError, match=r"the newest whole one is `.*checkpoint-2`"):
        choose_checkpoint(cfg(run_folder, resume_from_checkpoint=str(newest)))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("controller.alpha", [float("nan")] * 4, "controller.alpha[0]`: input should be a finite number (got nan)"),
        ("controller.alpha", [5.0, -3.0, 0.0, -1.0], "controller.alpha[1]`: input should be greater than or equal to 0 (got -3.0)"),
        ("controller.window", "x", "controller.window`: input should be a valid list (got 'x')"),
        ("run.total_steps", "6", "run.total_steps`: input should be a valid integer (got '6')"),
    ],
)
def test_a_state_that_somebody_made_up_trains_nothing(
    configure: Configure, controlled: Path, tmp_path: Path, field: str, value: Any, words: str
) -> None:
    import shutil

    checkpoint = Path(shutil.copytree(controlled / "checkpoint-2", tmp_path / "checkpoint-2"))
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    part, key = field.split(".")
    state["stateful_callbacks"]["dwl"][part][key] = value
    file.write_text(json.dumps(state))
    steps: list[int] = []

    class Steps(harness.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(state.global_step)

    again = configure(**CONTROLLED, out=tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    with pytest.raises(ConfigError) as caught:
        harness.train(again, before=lambda trainer: trainer.add_callback(Steps()))
    (problem,) = caught.value.problems
    assert problem.path == "resume_from_checkpoint"
    assert (
        f"the checkpoint `{checkpoint}` is damaged: in its trainer_state.json, `stateful_callbacks.dwl.{words}" in problem.message
    )
    assert not steps


CONTROLLED = settings(
    max_steps=4, dwl={key: DWL[key] for key in ("classes", "alpha")} | {"controller": {"type": "dwa", "every": 1}}
)


@pytest.fixture(scope="module")
def controlled(model_folder: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("controlled")
    harness.train(harness.config(model_folder, data_file, out, **CONTROLLED))
    return out / "run"


# a training set without a row


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("loss", ["nll", "dwl"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_set_without_a_row_stops_before_a_model_is_loaded(
    configure: Configure, tmp_path: Path, loss: str, packed: bool
) -> None:
    long = [{"messages": [{"role": "user", "content": "x " * 500}, {"role": "assistant", "content": "1"}]}] * 4
    block = {"dwl": DWL} if loss == "dwl" else {}
    for name, rows in (("empty", []), ("long", long), ("long", long)):  # again: rows prepared earlier
        data = harness.write_rows(tmp_path / f"{name}.jsonl", rows)
        with pytest.raises(ConfigError, match=r"(?m)^  datasets: there is no row to train on"):
            harness.train(configure(data=data, loss=loss, **block, sequence_len=64, sample_packing=packed))


# rows without a target

LOSSES: dict[str, dict[str, Any]] = {
    "nll": {"loss": "nll"},
    "dft": {"loss": "dft"},
    "dwl": {"loss": "dwl", "dwl": {"classes": {"number": {"regex": r"\d", "allow_empty": True}}}},
}


def with_labels(path: Path, *labels: list[int]) -> dict[str, Any]:
    """Tokenised rows with these labels."""
    ids = [5, 6, 7, 8]
    harness.write_rows(path, [{"input_ids": ids, "labels": row, "attention_mask": [1] * len(ids)} for row in labels])
    return {"path": str(path), "ds_type": "json", "type": None}


MASKED, FIRST_ALONE, TRAINED = [-100] * 4, [5, -100, -100, -100], [-100, -100, 7, 8]


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("labels", "packed"), [(MASKED, False), (MASKED, True), (FIRST_ALONE, False)])
def test_rows_without_a_target_stop_every_loss_before_a_model_is_loaded(
    configure: Configure, tmp_path: Path, loss: str, labels: list[int], packed: bool
) -> None:
    source = with_labels(tmp_path / "rows.jsonl", *[labels] * 6)
    with pytest.raises(ConfigError, match=r"(?m)^  datasets: there is nothing to train on: no target token in any row"):
        harness.train(configure(**LOSSES[loss], datasets=[source], sequence_len=64, sample_packing=packed))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("rare", ["datasets", "test_datasets"])
def test_targets_that_are_rare_stop_nothing(configure: Configure, tmp_path: Path, rare: str) -> None:
    """The look at some rows does not meet the one that has targets."""
    (left_out, *_) = set(range(600)) - set(picked_rows(600, seed=7))
    labels = [TRAINED if number == left_out else FIRST_ALONE for number in range(600)]
    usual = with_labels(tmp_path / "usual.jsonl", *[TRAINED] * 6) | {"split": "train"}
    sources = {
        "datasets": [usual],
        "test_datasets": [usual],
        rare: [with_labels(tmp_path / "rare.jsonl", *labels) | {"split": "train"}],
    }
    with pytest.raises(AssertionError, match="a model was loaded"):
        harness.train(configure(loss="dft", **sources, val_set_size=None, shuffle_merged_datasets=False, eval_steps=1))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("key", "outside"), [("input_ids", 400), ("input_ids", -1), ("labels", 400), ("labels", -5)])
def test_a_token_that_the_model_does_not_have_stops_every_loss_before_a_model_is_loaded(
    configure: Configure, tmp_path: Path, loss: str, key: str, outside: int
) -> None:
    """In the training rows, or in those held out."""
    good = {"input_ids": [5, 6, 7, 8], "labels": TRAINED, "attention_mask": [1] * 4}
    bad = good | {key: [*good[key][:2], outside, good[key][3]]}
    sources = []
    for name, rows in (("good", [good] * 6), ("bad", [good] * 5 + [bad])):
        path = harness.write_rows(tmp_path / f"{name}.jsonl", rows)
        sources.append({"path": str(path), "ds_type": "json", "type": None, "split": "train"})
    for train, test in (sources, sources[::-1]):
        settings = {"datasets": [train], "test_datasets": [test], "val_set_size": None}
        with pytest.raises(ConfigError) as caught:
            harness.train(configure(**LOSSES[loss], **settings, eval_steps=1))
        (problem,) = caught.value.problems
        assert (problem.path, problem.value) == ("datasets", outside)
        assert problem.message == f"`{key}` of 1 of the rows looked at name tokens that the model does not have"


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("loss", LOSSES)
def test_an_evaluation_set_without_a_target_stops_the_run(configure: Configure, tmp_path: Path, loss: str) -> None:
    train, test = with_labels(tmp_path / "train.jsonl", *[TRAINED] * 6), with_labels(tmp_path / "test.jsonl", *[MASKED] * 4)
    settings = {"datasets": [train], "test_datasets": [test | {"split": "train"}], "val_set_size": None}
    with pytest.raises(ConfigError, match=r"(?m)^  test_datasets: there is nothing to evaluate on, .* in any row"):
        harness.train(configure(**LOSSES[loss], **settings, eval_steps=1))


@pytest.mark.usefixtures("no_model")
def test_a_validation_set_that_takes_all_rows_is_told(configure: Configure, tmp_path: Path) -> None:
    source = with_labels(tmp_path / "rows.jsonl", TRAINED)
    with pytest.raises(ConfigError, match=r"(?m)^  datasets: there is no row to train on: `val_set_size` takes all of"):
        harness.train(configure(loss="dft", datasets=[source], val_set_size=0.5))


@pytest.mark.parametrize("loss", ["nll", "dft"])
def test_a_stream_without_a_target_saves_no_model(configure: Configure, tmp_path: Path, loss: str) -> None:
    """Nobody can look into a stream before it is trained on."""
    asked = [{"messages": [{"role": "user", "content": f"What is {i}?"}]} for i in range(8)]
    source = {"path": str(harness.write_rows(tmp_path / "rows.jsonl", asked)), "ds_type": "json", "type": "chat_template"}
    with pytest.raises(RunError, match="no batch of this run had a target token") as caught:
        harness.train(configure(loss=loss, datasets=[source], streaming=True, logging_steps=100))
    assert str(caught.value).count("which nothing predicts") == 1
    assert not list((tmp_path / "run").glob("*.safetensors"))


# a loss that is no number


class BreakParameters(harness.TrainerCallback):
    """Before the third step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            with torch.no_grad():
                next(kwargs["model"].parameters()).mul_(float("nan"))


@pytest.mark.parametrize(
    "how", [{"logging_steps": 1}, {"logging_steps": 100}, {"logging_steps": 100, "save_strategy": "no", "save_steps": None}]
)
def test_a_loss_that_turns_nan_stops_the_run_with_the_step_and_keeps_the_checkpoint(
    configure: Configure, tmp_path: Path, how: dict[str, Any]
) -> None:
    saves = how.get("save_strategy") != "no"
    with pytest.raises(NotFiniteError) as caught:
        harness.train(
            configure(**settings(**{"max_steps": 6, **how})), before=lambda trainer: trainer.add_callback(BreakParameters())
        )
    said = str(caught.value)
    assert "from step 3 on" in said
    assert "`reasoning` and `number` and `control` and `rest`" in said
    checkpoints = sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*"))
    assert checkpoints == (["checkpoint-2"] if saves else [])
    assert ("checkpoint-2, is from before" if saves else "No checkpoint was written before") in said
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_weight_that_turns_nan_stops_the_run_where_every_token_is_finite(configure: Configure, tmp_path: Path) -> None:
    def arrange(trainer: Any) -> None:
        pending_loss = trainer._dwl.pending_loss

        def pending(*args: Any) -> Any:
            found = pending_loss(*args)
            return replace(found, class_weight=found.class_weight * (float("nan") if trainer._dwl.tau == 2 else 1.0))

        trainer._dwl.pending_loss = pending

    with pytest.raises(NotFiniteError) as caught:
        harness.train(configure(**settings(max_steps=6, logging_steps=100)), before=arrange)
    assert "the trained loss, though not that of any token, is infinite or NaN from step 3 on" in str(caught.value)
    assert "checkpoint-2, is from before" in str(caught.value)


def test_an_alpha_that_is_no_number_stops_the_run_before_the_step(configure: Configure) -> None:
    class BreakAlpha(harness.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.trainer._dwl.loop.controller.alpha = (float("nan"), 0.5, 0.5, 0.0)

    def arrange(trainer: Any) -> None:
        callback = BreakAlpha()
        callback.trainer = trainer
        trainer.add_callback(callback)

    with pytest.raises(NotFiniteError, match=r"α is infinite or NaN at step 2 \(reasoning nan, number 0\.5"):
        harness.train(configure(**CONTROLLED), before=arrange)


def paid(nll: list[float], classes: list[int], overlap: Overlap = "first", factor: float = 1.0) -> ForwardMetrics:
    members = Membership(torch.tensor(classes), 3, overlap)
    factors = torch.full((1, len(nll)), factor)
    return ForwardMetrics(members, members, torch.tensor(nll), factors, torch.zeros(3, dtype=torch.int64), torch.ones(3))


def test_the_class_and_the_first_step_are_named() -> None:
    watch, cpu, inf, nan = FirstBadStep(("a", "b", "rest")), torch.device("cpu"), float("inf"), float("nan")
    assert watch.found(lambda first: first, cpu) == {}
    watch.add(5, paid([1.0, 2.0, 3.0, 4.0], [0, 1, -100, 2]))
    watch.add(6, paid([1.0, inf, nan, 4.0], [0, 1, -100, 2]))  # the third is no target
    watch.add(7, paid([1.0, nan, 3.0, 4.0], [0, 1, -100, 2]))
    watch.add(8, paid([1.0, 2.0, 3.0, 4.0], [2, 2, -100, 2], factor=nan))
    assert watch.found(lambda first: first, cpu) == {"b": 6, "rest": 8}
    assert watch.found(lambda first: torch.minimum(first, torch.tensor([4, 9, 9, 2**62])), cpu) == {"a": 4, "b": 6, "rest": 8}


def test_the_first_step_of_a_bad_loss_is_kept_beside_the_classes() -> None:
    watch, cpu = FirstBadStep(("a", "b", "rest")), torch.device("cpu")
    for step, loss in ((4, 1.0), (5, float("nan")), (6, 2.0), (7, float("inf"))):
        watch.add_loss(step, torch.tensor(loss))
    assert watch.found(lambda first: first, cpu) == {None: 5}


def test_a_token_of_two_classes_is_bad_for_both() -> None:
    watch = FirstBadStep(("a", "b", "rest"))
    watch.add(1, paid([float("nan"), 1.0], [0b11, 0], overlap="sum"))
    assert watch.found(lambda first: first, torch.device("cpu")) == {"a": 1, "b": 1}
