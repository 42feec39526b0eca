"""Runs that are killed, files that are cut off, losses that are no numbers."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dwl_plugin.errors import ConfigError, NotFiniteError
from dwl_plugin.hosts.checkpoints import choose_checkpoint, finished_checkpoints, unfinished
from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.membership import Membership
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
KILLS = [(point, random.Random(f"{point} {seed}").randint(1, STEPS)) for point in POINTS for seed in range(3)]


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


@pytest.mark.slow
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
    assert len(said) == 1
    assert "[dwl] " in said[0]
    assert "dwl_config.yaml cannot be written: No space left on device. Training goes on" in said[0]


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


def test_a_truncated_trainer_state_is_an_error_that_names_the_checkpoint_before_it(
    configure: Configure, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from axolotl.loaders import ModelLoader

    def load(self: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelLoader, "load", load)
    newest = run_folder / "checkpoint-4"
    cut(newest / "trainer_state.json")
    with pytest.raises(ConfigError) as caught:
        harness.train(configure(**settings(output_dir=str(run_folder), resume_from_checkpoint=str(newest))))
    (problem,) = caught.value.problems
    assert problem.path == "resume_from_checkpoint"
    assert "trainer_state.json breaks off" in str(problem)
    assert str(run_folder / "checkpoint-2") in problem.hint


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
    assert watch.found(lambda first: torch.minimum(first, torch.tensor([4, 9, 9])), cpu) == {"a": 4, "b": 6, "rest": 8}


def test_a_token_of_two_classes_is_bad_for_both() -> None:
    watch = FirstBadStep(("a", "b", "rest"))
    watch.add(1, paid([float("nan"), 1.0], [0b11, 0], overlap="sum"))
    assert watch.found(lambda first: first, torch.device("cpu")) == {"a": 1, "b": 1}
