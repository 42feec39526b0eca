"""A checkpoint's state as anybody may have written it: it is refused with its field, or it is what the run goes on from."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError, RunError
from dwl_plugin.hosts.checkpoints import named_in
from dwl_plugin.run.closed_loop import ClosedLoop
from dwl_plugin.run.moving import controller_of
from dwl_plugin.run.session import RunState

NAMES = ("a", "b", "rest")
REFERENCE = {"a": 1.0, "b": 0.5, "rest": 2.0}
FOLDER = Path("run/checkpoint-7")
WINDOWS = [[[2.5, 3.0, 9.0], [2.0, 6.0, 5.0]], [[1.5, 1.0, 7.0], [2.0, 4.0, 5.0]], [[1.0, 0.0, 6.0], [2.0, 0.0, 5.0]]]
"""(windows, Σ nll and tokens, classes)"""

CONTROLLERS: dict[str, dict[str, Any]] = {
    "softmax_loss": {"type": "softmax_loss"},
    "ratio": {"type": "softmax_loss", "signal": "ratio_to_init", "min_alpha": 0.05},
    "excess": {"type": "softmax_loss", "signal": "excess_over_ref", "reference": REFERENCE},
    "dwa": {"type": "dwa"},
    "softadapt": {"type": "softadapt", "beta": -2, "loss_weighted": True},
    "group_dro": {"type": "group_dro", "eta": 0.5, "max_change": 0.1},
    "doremi": {"type": "doremi", "reference": REFERENCE},
    "base": {"type": "doremi", "reference": "base", "smoothing": 0, "min_alpha": 0},
    "rlw": {"type": "rlw"},
    "warm-up": {"type": "group_dro", "warmup": 100},
}


def loop(kind: str) -> ClosedLoop:
    """One of two ranks, of which the other never sees a token."""
    dwl = {"classes": {name: {"regex": name} for name in NAMES[:-1]}, "controller": {"every": 2, **CONTROLLERS[kind]}}
    block = parse({"loss": "dwl", "dwl": {**dwl, "alpha": {"a": 2, "b": 3, "rest": 5}}})
    assert block is not None
    controller = controller_of(block, RunLength(200, 50.0))
    assert controller is not None
    return ClosedLoop(controller, lambda sums: torch.cat([sums, torch.zeros_like(sums)]), torch.device("cpu"))


def saved(kind: str) -> dict[str, Any]:
    """After two windows, of which `b` was not in the first, in the middle of the third."""
    held = loop(kind)
    if held.controller.rows_to_measure:
        held.controller.compare_with(REFERENCE)
    first = [[nll if name != "b" else 0.0 for nll, name in zip(row, NAMES, strict=True)] for row in WINDOWS[0]]
    for step, (nll, tokens) in enumerate((first, WINDOWS[1]), start=1):
        held.add(torch.tensor(tokens), torch.tensor(nll))
        held.end_step(2 * step)
    held.add(torch.tensor(WINDOWS[0][1]), torch.tensor(WINDOWS[0][0]))
    written = {"run": {"total_steps": 200, "steps_per_epoch": 50}, "controller": held.state()}
    read: dict[str, Any] = json.loads(json.dumps(written))
    return read


def load(kind: str, written: Any) -> ClosedLoop:
    """As a trainer's callback does."""
    with named_in(FOLDER, "stateful_callbacks.dwl"):
        state = RunState.model_validate(written)
    held = loop(kind)
    if state.controller is None:
        raise ConfigError.at("dwl.controller", "no state")
    with named_in(FOLDER, "stateful_callbacks.dwl.controller"):
        held.load(state.controller, 0)
    assert not held.controller.rows_to_measure, "measured in the middle of a run"
    return held


def alphas(held: ClosedLoop) -> list[tuple[float, ...]]:
    """From the moment of loading on."""
    found = [held.controller.alpha]
    for step, (nll, tokens) in enumerate(WINDOWS * 2, start=3):
        held.add(torch.tensor(tokens), torch.tensor(nll))
        held.end_step(2 * step)
        found.append(held.controller.alpha)
    return found


# a state with something done to it


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


DELETED = object()
ANYTHING = (
    *(None, True, "", "x", "\x1b[31mred", "0.5", [], {}, [[]], {"a": 1}, deep(900), "y" * 100_000, list(range(10_000))),
    *(math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.0, 1, 1.0, 0.25, 1e-320, 1e308, -1e308, 10**400, 2**53, 2**64),
    DELETED,
)


def changed(draw: random.Random, value: Any) -> Any:
    """`value` bent a little, or anything else in its place."""
    own: list[Any] = []
    if isinstance(value, list):
        own = [value[1:], value * 2, value[::-1], [*value, None], [value], [None] * len(value), [0.0] * len(value), "list"]
        own += [[math.nan] * len(value), dict(enumerate(value)), [str(one) for one in value], [1 / max(len(value), 1)] * len(value)]
    elif isinstance(value, dict):
        own = [{**value, "more": 1}, list(value.items()), {key.upper(): one for key, one in value.items()}, {}]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        own = [
            -value,
            value * 2,
            value + 1e-6,
            value + 1e-14,
            float(value),
            round(value) if math.isfinite(value) else 0,
            str(value),
            [value],
            value * 1e300,
        ]
    elif isinstance(value, str):
        own = [value + " ", value.upper(), value.encode().hex(), [value]]
    return draw.choice([*own, *ANYTHING] if draw.random() < 0.5 or not own else own)


def mutated(draw: random.Random, state: dict[str, Any]) -> dict[str, Any]:
    state = copy.deepcopy(state)
    for _ in range(draw.choice((1, 1, 1, 2))):
        *path, last = draw.choice(list(places(state)))
        parent = state
        for key in path:
            parent = parent[key]
        new = changed(draw, parent[last])
        if new is not DELETED:
            parent[last] = json.loads(json.dumps(new))  # not the same list twice
        else:
            del parent[last]
    read: dict[str, Any] = json.loads(json.dumps(state))
    return read


def meaning(state: dict[str, Any]) -> dict[str, Any]:
    """What α depends on. 1 and 1.0 are the same, True is not."""
    return {key: value for key, value in state["controller"].items() if key not in ("options", "signal")}


def is_possible(state: dict[str, Any]) -> bool:
    """Whether a run can have been in the state, by what its numbers are."""
    kept = state["controller"]

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e101

    def vector(values: Any) -> bool:
        return isinstance(values, list) and len(values) == len(NAMES) and all(map(number, values))

    def seen(values: Any) -> bool:
        return vector([0.0 if value is None else value for value in values]) and all(v is None or v >= -1 for v in values)

    simplex = vector(kept["alpha"]) and min(kept["alpha"]) >= 0 and abs(sum(kept["alpha"]) - 1) < 1e-8
    losses = all(seen(kept[key]) for key in ("average", "first", "previous"))
    counted = type(kept["updates"]) is int and kept["updates"] >= 0
    weights = kept["memory"].get("log_weights")
    remembered = weights is None or abs(np.logaddexp.reduce(weights)) < 1e-8
    sums = all(len(of_rank) == 2 and all(map(vector, of_rank)) and min(of_rank[1]) >= 0 for of_rank in kept["window"])
    return simplex and losses and counted and remembered and sums and kept["classes"] == list(NAMES)


def try_many(kind: str, count: int) -> dict[str, int]:
    """How many were refused, stopped later, the run itself, and another possible run."""
    whole = saved(kind)
    expected, outcomes = alphas(load(kind, whole)), dict.fromkeys(("refused", "stopped", "same", "other"), 0)
    for seed in range(count):
        state = mutated(random.Random(f"{kind} {seed}"), whole)
        try:
            held = load(kind, state)
        except ConfigError as error:
            said = str(error)
            assert "`stateful_callbacks.dwl" in said or "dwl.controller" in said, said
            assert (str(FOLDER) in said) == ("resume_from_checkpoint: " in said), said
            assert len(said) < 2000, said
            assert "\x1b" not in said
            outcomes["refused"] += 1
            continue
        assert is_possible(state), state
        try:
            path = alphas(held)
        except RunError:
            outcomes["stopped"] += 1
            continue
        floor = held.controller.options.min_alpha
        assert all(abs(math.fsum(alpha) - 1) < 1e-9 and min(alpha) >= floor for alpha in path), (state, path)
        if meaning(state) == meaning(whole):
            assert path == expected, state
        outcomes["same" if path == expected else "other"] += 1
    return outcomes


@pytest.mark.parametrize("kind", CONTROLLERS)
def test_a_state_with_something_done_to_it_is_refused_or_is_what_the_run_goes_on_from(kind: str) -> None:
    outcomes = try_many(kind, 50)
    assert outcomes["refused"] > 10
    assert outcomes["same"] + outcomes["other"] > 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONTROLLERS)
def test_many_more(kind: str) -> None:
    try_many(kind, 2000)


# the fields by name


def refused(kind: str, field: str, value: Any) -> str:
    state = saved(kind)
    state["controller"][field] = value
    with pytest.raises(ConfigError) as caught:
        load(kind, state)
    (problem,) = caught.value.problems
    return str(problem)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("alpha", [math.nan] * 3, "alpha[0]`: input should be a finite number (got nan)"),
        ("alpha", [5.0, -3.0, -1.0], "alpha[1]`: input should be greater than or equal to 0 (got -3.0)"),
        ("alpha", [0.5, 0.3, 0.1], "alpha`: does not sum to 1 (got [0.5, 0.3, 0.1])"),
        ("alpha", [0.5, 0.3, 0.1, 0.1], "alpha`: has 4 numbers for 3 classes"),
        ("alpha", [1.0, 0.0, 0.0], "alpha`: a class is below the `min_alpha` of its run, 0.01"),
        ("alpha", "x", "alpha`: input should be a valid list (got 'x')"),
        ("updates", -1, "updates`: input should be greater than or equal to 0"),
        ("updates", 0, "memory.log_weights`: unknown key"),
        ("memory", {}, "memory.log_weights`: field required"),
        ("memory", {"log_weights": [0.0, 0.0, 0.0]}, "memory.log_weights`: the weights do not sum to 1"),
        ("average", [1.0, None, 2.0], "first[1]`: a class has its first loss from the moment it has an average"),
        ("signal", None, "signal`: is there from the moment any class has an average"),
        ("reference", [1.0, 1.0, 1.0], "reference`: is there if the options have one"),
        ("window", [[[1.0, 2.0], [3.0, 4.0]]], "window[0]`: has 2 losses and 2 numbers of tokens for 3 classes"),
        ("window", [[[9.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], "window[0]`: a loss that its number of tokens cannot have"),
        ("options", {"type": "group_dro", "eta": -1}, "options.eta`: input should be greater than 0 (got -1)"),
        ("mystery", 1, "mystery`: unknown key"),
    ],
)
def test_the_error_names_checkpoint_and_field(field: str, value: Any, words: str) -> None:
    said = refused("group_dro", field, value)
    assert f"in its trainer_state.json, `stateful_callbacks.dwl.controller.{words}" in said
    assert said.startswith(f"resume_from_checkpoint: the checkpoint `{FOLDER}` is damaged")


def test_a_reference_that_was_measured_is_not_measured_again() -> None:
    assert "reference`: is there if the options have one" in refused("base", "reference", None)


def test_options_of_another_version_do_not_stop_a_run() -> None:
    state = saved("group_dro")
    expected = alphas(load("group_dro", state))
    state["controller"]["options"]["of_tomorrow"] = {"a": [1]}
    del state["controller"]["options"]["max_change"]
    assert alphas(load("group_dro", state)) == expected


def test_the_state_of_version_0_1_0_goes_on() -> None:
    """As that version wrote it."""
    options = {"type": "group_dro", "every": 2, "warmup": 0, "min_alpha": 0.01, "max_change": None, "ema": 0.9}
    options |= {"signal": "raw", "reference": None, "reference_rows": 256, "eta": 0.01}
    controller = {"type": "group_dro", "options": options, "classes": ["a", "b", "rest"], "alpha": [0.25, 0.25, 0.5]}
    controller |= {"signal": [2.0, 1.5, 1.0], "updates": 3, "memory": {"log_weights": [math.log(0.25)] * 2 + [math.log(0.5)]}}
    controller |= {"average": [2.0, None, 1.0], "first": [2.5, None, 1.0], "previous": [2.25, None, None], "reference": None}
    held = load(
        "group_dro", {"run": {"total_steps": 8, "steps_per_epoch": 10}, "controller": {**controller, "window": [[[0.0] * 3] * 2]}}
    )
    assert held.controller.alpha == (0.25, 0.25, 0.5)
    assert held.state() == {
        **controller,
        "options": held.controller.options.model_dump(mode="json"),
        "window": [[[0.0] * 3] * 2] * 2,
    }
