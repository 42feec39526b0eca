"""Overrides on their way through the host: into the config, the run's folder and its figures. What Axolotl would drop stops it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dwl_plugin.errors import ConfigError
from dwl_plugin.hosts.dropped_options import dropped_options
from tests.hosts.harness import CLASSES, train
from tests.hosts.test_start import load

Configure = Callable[..., dict[str, Any]]
DWL = {"classes": CLASSES, "alpha": {"reasoning": 1, "number": 5, "control": 2, "rest": 2}}
NAMES = ("reasoning", "number", "control", "rest")


def test_a_run_trains_with_them_says_them_and_writes_them_down(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DWL_OVERRIDES", "dwl.alpha.number=15 dwl.reduction=weighted_mean")
    run = train(configure(loss="dwl", dwl=DWL, max_steps=1))
    assert [run.logged(f"dwl/alpha/{name}") for name in NAMES] == [[0.05], [0.75], [0.1], [0.1]]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[dwl] DWL_OVERRIDES")]
    assert lines == ["[dwl] DWL_OVERRIDES: dwl.alpha.number = 15", "[dwl] DWL_OVERRIDES: dwl.reduction = weighted_mean"]
    written = yaml.safe_load((Path(run.trainer.args.output_dir) / "dwl_config.yaml").read_text())
    assert written["dwl"]["alpha"]["number"] == 15
    assert written["dwl"]["reduction"] == "weighted_mean"


def published(folder: Path) -> dict[str, Any]:
    """The config in the model card of a run."""
    (text,) = re.findall(r"```yaml\n(.*?)\n```", (folder / "run" / "README.md").read_text(), re.DOTALL)
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def test_the_model_card_has_the_config_as_it_ran(configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After options of the command line, as a sweep gives them, and our overrides; each run of a process has its own alone."""
    settings = configure(loss="dwl", dwl=DWL, max_steps=1, learning_rate=0.01)
    monkeypatch.setenv("DWL_OVERRIDES", "dwl.alpha.number=15")
    secrets = {
        "comet_api_key": "hush 1",
        "swanlab_lark_secret": "hush 2",
        "swanlab_lark_webhook_url": "https://hush 3",
        "mlflow_tracking_uri": "https://me:hush4@host",
        "service": {"api_key": "hush 5"},
    }
    options = {"learning_rate": 0.002, "gradient_accumulation_steps": 2, **secrets}
    run = train(settings, options=options)
    assert run.trainer.args.learning_rate == 0.002
    shown = published(tmp_path)
    assert (shown["learning_rate"], shown["gradient_accumulation_steps"]) == (0.002, 2)
    assert shown["dwl"]["alpha"]["number"] == 15
    assert shown["dwl"]["classes"] == CLASSES
    assert "hush" not in (tmp_path / "run" / "README.md").read_text()
    changed = {"service", "learning_rate", "gradient_accumulation_steps", "dwl"}
    assert {key: value for key, value in shown.items() if key not in changed} == {
        key: value for key, value in settings.items() if key not in changed
    }

    monkeypatch.delenv("DWL_OVERRIDES")
    train(configure(loss="dwl", dwl=DWL, max_steps=1, out=tmp_path / "second"))
    assert published(tmp_path / "second")["dwl"] == DWL


def test_a_file_that_says_what_ran_is_published_as_it_is(configure: Configure, tmp_path: Path) -> None:
    """The host's command adds its own options with their defaults."""
    from axolotl.cli.args import TrainerCliArgs

    train(configure(loss="dft", max_steps=1), options=vars(TrainerCliArgs()))
    assert "as it ran" not in (tmp_path / "run" / "README.md").read_text()


def test_a_config_made_in_python_may_have_enums(configure: Configure, tmp_path: Path) -> None:
    from transformers.trainer_utils import SchedulerType

    train(configure(loss="dft", max_steps=1, lr_scheduler=SchedulerType.CONSTANT), options={"learning_rate": 0.003})
    assert "learning_rate: 0.003" in (tmp_path / "run" / "README.md").read_text()


def test_a_run_writes_down_what_it_was_made_of(configure: Configure, data_file: Path, tmp_path: Path) -> None:
    settings = configure(loss="dft", max_steps=1, gradient_accumulation_steps=3, learning_rate=0.01)
    train(settings, options={"learning_rate": 0.002})
    written = yaml.safe_load((tmp_path / "run" / "dwl_config.yaml").read_text())
    record = written["run"]
    assert (record["model"], record["data"], record["rows"]) == (settings["base_model"], [str(data_file)], 40)
    assert (record["learning_rate"], record["batch"]) == (0.002, {"micro": 2, "accumulation": 3, "ranks": 1})
    assert {"dwl_plugin", "axolotl", "transformers", "torch"} <= set(record["versions"])
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(record["began"])).total_seconds()) < 600


def test_a_config_that_was_loaded_may_be_loaded_again(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWL_OVERRIDES", "dwl.alpha.number=15 loss=dwl")
    settings = configure(dwl=DWL)  # without `loss`, which the environment adds
    once = load(settings)
    written = json.loads(json.dumps(once.to_dict(), sort_keys=True, default=str))
    again = load({**settings, **{key: written[key] for key in ("loss", "dwl")}})
    assert once.dwl.to_dict() == again.dwl.to_dict()
    assert again.dwl.alpha.number == 15


def test_only_the_first_rank_says_them(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DWL_OVERRIDES", "loss=dft")
    monkeypatch.setenv("RANK", "1")
    assert load(configure()).loss == "dft"
    assert "DWL_OVERRIDES" not in capsys.readouterr().out


def test_names_that_do_not_exist_stop_the_run(configure: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DWL_OVERRIDES", "dwl.alpha.nubmer=1")
    with pytest.raises(ConfigError, match="did you mean `number`"):
        load(configure(loss="dwl", dwl=DWL))


@pytest.mark.parametrize("words", [["--dwl.alpha.number=15"], ["--dwl.alpha.number", "15"], ["--loss", "dft"]])
def test_options_that_axolotl_drops_stop_the_run(configure: Configure, monkeypatch: pytest.MonkeyPatch, words: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["axolotl", "train", "train.yml", *words])
    with pytest.raises(ConfigError, match="DWL_OVERRIDES='"):
        load(configure(loss="dwl", dwl=DWL))


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (["--dwl.alpha.number=0.5"], []),
        (["--dwl.alpha.number=0.50"], []),
        (["--dwl.alpha.number=1e-05"], ["--dwl.alpha.number"]),
        (["--loss=dwl", "--dft.exponent", "1.0"], []),
        (["--loss=nll", "--dft.exponent"], ["--loss", "--dft.exponent"]),
        (["--dwl.alpha={"], ["--dwl.alpha"]),
        (["--dwl__reduction=class_mean"], ["--dwl__reduction"]),
        (["--loss-watchdog-threshold=3", "--loss_watchdog_threshold=3", "--use-dft", "--learning-rate=1", "loss=3"], []),
    ],
)
def test_an_option_may_say_again_what_the_config_has(words: list[str], refused: list[str]) -> None:
    raw = {"loss": "dwl", "dft": {"exponent": 1.0}, "dwl": {"alpha": {"number": 0.5}}}
    assert [problem.path for problem in dropped_options(words, raw)] == refused


def readme_sweeps() -> list[dict[str, Any]]:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    blocks = map(yaml.safe_load, re.findall(r"```yaml\n(.*?)```", readme, flags=re.DOTALL))
    return [block for block in blocks if "command" in block]


@pytest.mark.slow
def test_a_wandb_agent_drives_three_runs_which_a_report_lays_over_one_another(
    configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's sweep through W&B's own agent: its command, its files, its environment; only the server is missing."""
    from wandb.wandb_agent import Agent

    (sweep,) = readme_sweeps()
    settings = configure(loss="dwl", dwl=DWL, max_steps=3, save_strategy="steps", save_steps=3, eval_steps=3, val_set_size=8)
    (tmp_path / "train.yml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    for key, value in {
        "WANDB_DIR": str(tmp_path),
        "WANDB_SWEEP_ID": "s1",
        "WANDB_RUN_ID": "",
        "WANDB_SWEEP_PARAM_PATH": "",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }.items():
        monkeypatch.setenv(key, value)
    agent = Agent(api=None, queue=None, sweep_id="s1")
    agent._sweep_command = sweep["command"]
    (parameter,) = (name for name in sweep["parameters"] if name.startswith("dwl."))
    chosen = {f"run{at}": float(value) for at, value in enumerate(sweep["parameters"][parameter]["values"])}
    assert len(chosen) == 3
    for name, value in chosen.items():
        parameters = {parameter: {"value": value}, "learning-rate": {"value": 0.02}}
        agent._command_run({"type": "run", "run_id": name, "program": sweep["program"], "args": parameters})
        assert agent._run_processes[name].wait(timeout=400) == 0, name

    folders = [tmp_path / "out" / name for name in chosen]
    for folder, value in zip(folders, chosen.values(), strict=True):
        state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
        logged = [entry for entry in state["log_history"] if "loss" in entry]
        assert [entry["dwl/alpha/number"] for entry in logged] == [pytest.approx(value / (value + 5), abs=1e-12)] * 3
        assert {entry["learning_rate"] for entry in logged} == {0.02}
        assert yaml.safe_load((folder / "dwl_config.yaml").read_text())["dwl"]["alpha"]["number"] == value

    command = [
        sys.executable,
        "-c",
        "from dwl_plugin.cli.main import main; main()",
        "report",
        str(folders[0]),
        "--compare",
        *map(str, folders[1:]),
        "--html",
        "report.html",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    print(shown)
    assert re.search(r"class +run0 +run1 +run2", shown)
    assert {line.split()[0] for line in shown.splitlines() if line.split()} >= {*NAMES, "all"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert all(f"{what} by class" in page for what in ("α", "nll"))
