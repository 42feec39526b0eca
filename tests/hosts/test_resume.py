"""A run that stopped goes on as if it had not."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hosts.harness import AXOLOTL, CLASSES
from tests.hosts.ranks import Report, train

Configure = Callable[..., dict[str, Any]]
ALPHA = {"reasoning": 1, "number": 5, "control": 2, "rest": 2}
MOVED = {"reasoning": 4, "number": 1, "control": 1, "rest": 4}
STEPS = 8

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "linear": {"to": MOVED, "start": "10%", "end": "90%"},
    "cosine": {"to": MOVED, "end": "0.5ep"},
    "exponential": {"to": MOVED},
    "sigmoid": {"to": MOVED},
    "step": {"to": MOVED, "at": 5},
    "keyframes": {"at": {3: MOVED, "80%": ALPHA}},
    "warmup": {"to": MOVED, "hold": "40%", "decay": "60%"},
    "cyclic": {"to": MOVED, "period": 3},
}
OFTEN = {"every": 2, "min_alpha": 0.02}
CONTROLLERS: dict[str, dict[str, Any]] = {
    "softmax_loss": {**OFTEN, "signal": "ratio_to_init"},
    "dwa": {"every": 2, "temperature": 0.1},
    "softadapt": {**OFTEN, "beta": 5},
    "group_dro": {**OFTEN, "eta": 0.5, "max_change": 0.1},
    "doremi": {**OFTEN, "reference": "base", "reference_rows": 8},
    "rlw": {"every": 2},
}
DFT = {"linear": {"to": {"exponent": 1, "min_weight": 0.3}, "end": "75%"}}
OPTIONS = {"schedule": SCHEDULES, "controller": CONTROLLERS, "dft": DFT}
KINDS = [
    pytest.param(kind, name, marks=pytest.mark.weekly if kind == "schedule" and name != "warmup" else pytest.mark.slow)
    for kind, named in OPTIONS.items()
    for name in named
]
"""All that a schedule takes from a checkpoint is the step, so one of them stands for the others from day to day."""
AFTER_THE_FIRST_UPDATE, WITHIN_A_WINDOW = 2, 5


def test_every_kind_is_stopped_and_resumed_here() -> None:
    from dwl_plugin.alpha import controllers, schedules

    assert set(SCHEDULES) == set(schedules.SCHEDULES)
    assert set(CONTROLLERS) == set(controllers.CONTROLLERS)


@pytest.fixture(scope="module")
def new_process() -> Iterator[ProcessPoolExecutor]:
    """It has not seen the runs that it goes on with; it imports the host once for all of them."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield pool


def settings_of(kind: str, name: str, stop: int) -> dict[str, Any]:
    moving = {"type": name, **OPTIONS[kind][name]}
    block = {"classes": CLASSES, "alpha": ALPHA, "reduction": "class_mean"}
    block |= {"token_loss": "dft"} if kind == "dft" else {kind: moving}
    dft = {"dft": {"exponent": 0.0, "schedule": moving}} if kind == "dft" else {}
    return {
        "loss": "dwl",
        "dwl": block,
        **dft,
        "max_steps": STEPS,
        "num_epochs": 3,
        "save_strategy": "steps",
        "save_steps": stop,
        "save_total_limit": STEPS,
        "gradient_accumulation_steps": 2,
    }


def assert_goes_on(resumed: Report, whole: Report, stop: int) -> None:
    """Every step after the stop, and the parameters at the end, bit for bit."""
    first, second = ({e["step"]: e for e in run.history if "loss" in e} for run in (whole, resumed))
    assert set(range(stop + 1, STEPS + 1)) <= set(second)
    for step in range(stop + 1, STEPS + 1):
        for key, value in first[step].items():
            if key.startswith("dwl/") or key in ("loss", "nll", "grad_norm"):
                assert second[step][key] == value, (step, key)
    assert whole.parameters.keys() == resumed.parameters.keys()
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name]), name


@pytest.mark.parametrize(("kind", "name"), KINDS, ids=lambda value: value)
def test_a_new_process_goes_on_bit_for_bit(
    configure: Configure, tmp_path: Path, new_process: ProcessPoolExecutor, kind: str, name: str
) -> None:
    """At a random step; with a controller, where it has just spoken and while it listens."""
    stops = (AFTER_THE_FIRST_UPDATE, WITHIN_A_WINDOW)
    if kind != "controller":
        stops = (random.Random(name).randint(1, STEPS - 1),)
    settings = settings_of(kind, name, 1)
    whole = train(configure(**settings))
    moved = [entry for entry in whole.history if "loss" in entry]
    key = "dwl/exponent/rest" if kind == "dft" else "dwl/alpha/number"
    assert (len({entry[key] for entry in moved}) > 1) == (name != "constant"), "nothing moved, so nothing is compared"
    for stop in stops:
        checkpoint = str(tmp_path / "run" / f"checkpoint-{stop}")
        again = configure(**settings, out=tmp_path / f"again-{stop}", resume_from_checkpoint=checkpoint)
        assert_goes_on(new_process.submit(train, again).result(), whole, stop)


@pytest.mark.parametrize(("kind", "name", "packed"), [("schedule", "linear", True), ("controller", "group_dro", False)])
def test_resumed_run_has_the_alpha_and_losses_of_the_whole_run(
    configure: Configure, tmp_path: Path, kind: str, name: str, packed: bool
) -> None:
    if packed and AXOLOTL < (0, 20):
        pytest.skip("Axolotl 0.19 goes on with other batches when a packed run is resumed, also without us")
    settings = settings_of(kind, name, 5)
    if packed:
        settings |= {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
    whole = train(configure(**settings))
    checkpoint = str(tmp_path / "run" / "checkpoint-5")
    resumed = train(configure(**settings, out=tmp_path / "again", resume_from_checkpoint=checkpoint))
    assert_goes_on(resumed, whole, 5)
