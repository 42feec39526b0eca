"""Every controller against a transcription of its paper's update, over 200 windows of random losses; and what holds for all."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dwl_plugin.alpha.controllers import CONTROLLERS, Controller
from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError
from dwl_plugin.run.moving import controller_of

LENGTH = RunLength(total_steps=200, steps_per_epoch=50.0)
K = 4
NAMES = ("a", "b", "c", "rest")
PLAIN = {"every": 1, "min_alpha": 0.0}
REFERENCE = np.array([1.0, 0.5, 2.0, 1.5])


def controller(alpha: list[float] | None = None, length: RunLength = LENGTH, **options: Any) -> Controller:
    dwl: dict[str, Any] = {"classes": {name: {"regex": name} for name in NAMES[:-1]}, "controller": options}
    if alpha is not None:
        dwl["alpha"] = dict(zip(NAMES, alpha, strict=True))
    block = parse({"loss": "dwl", "dwl": dwl})
    assert block is not None
    held = controller_of(block, length)
    assert held is not None
    return held


def random_windows(seed: int = 0, count: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Mean nll (count, K) and tokens (count, K) of each window: falling, noisy, of very different sizes."""
    generator = np.random.default_rng(seed)
    fall = np.exp(-np.arange(count)[:, None] / np.array([40, 90, 300, 60])[None])
    means = np.array([4.0, 1.5, 3.0, 2.0]) * fall + generator.uniform(0.05, 0.6, (count, K))
    return means, generator.integers(1, 500, (count, K)).astype(float)


def follow(controlled: Controller, means: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """α after each window (count, K)."""
    out = []
    for step, (mean, count) in enumerate(zip(means, tokens, strict=True), start=1):
        controlled.update(step, (mean * count).tolist(), count.tolist())
        out.append(controlled.alpha)
    return np.array(out)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z)
    return e / e.sum()


# The papers' updates, one window at a time. `L` are the losses so far, oldest first; `alpha` is what the last update gave.


def rft(L: list[np.ndarray], alpha: np.ndarray) -> np.ndarray:
    """2412.14780: the weights are the softmax of the mean losses over a temperature."""
    return softmax(L[-1] / 3.0)


def dwa(L: list[np.ndarray], alpha: np.ndarray) -> np.ndarray:
    """1803.10704, eq. 7 and 8: lambda_k(t) = K exp(w_k(t-1)/T) / sum_i exp(w_i(t-1)/T), w_k(t-1) = L_k(t-1)/L_k(t-2), and w = 1 for
    t = 1, 2. Our weights sum to 1, theirs to K."""
    t = len(L) + 1
    w = np.ones(K) if t <= 2 else L[t - 2] / L[t - 3]
    return K * np.exp(w / 2.0) / np.exp(w / 2.0).sum() / K


def softadapt(L: list[np.ndarray], alpha: np.ndarray, beta: float = 0.1) -> np.ndarray:
    """1912.12355, eq. 5: exp(beta (s - max s)) over its sum."""
    s = L[-1] - L[-2] if len(L) > 1 else np.zeros(K)
    e = np.exp(beta * (s - s.max()))
    return e / e.sum()


def softadapt_both(L: list[np.ndarray], alpha: np.ndarray) -> np.ndarray:
    """The same paper's normalised and loss-weighted variants together, beta = 2."""
    if len(L) == 1:
        return np.full(K, 1 / K)
    s = L[-1] - L[-2]
    s = s / (np.abs(s).sum() + 1e-8)
    e = L[-1] * np.exp(2.0 * (s - s.max()))
    return e / e.sum()


def group_dro(L: list[np.ndarray], alpha: np.ndarray) -> np.ndarray:
    """1911.08731, algorithm 1: q' = q exp(eta l), then renormalise."""
    q = alpha * np.exp(0.01 * L[-1])
    return q / q.sum()


def doremi(L: list[np.ndarray], alpha: np.ndarray) -> np.ndarray:
    """2305.10429, algorithm 1: alpha' = alpha exp(eta lambda), renormalised, then (1-c) alpha' + c u."""
    excess = np.where(L[-1] > REFERENCE, L[-1] - REFERENCE, 0.0)
    a = alpha * np.exp(1.0 * excess)
    return (1 - 1e-4) * a / a.sum() + 1e-4 / K


def rlw(L: list[np.ndarray], alpha: np.ndarray) -> np.ndarray:
    """2111.10603: softmax of standard normal noise, drawn anew each time."""
    return softmax(np.random.default_rng([3, len(L) - 1]).normal(size=K))


EXCESS = {"signal": "excess_over_ref", "reference": dict(zip(NAMES, REFERENCE.tolist(), strict=True))}
PAPERS: dict[str, tuple[dict[str, Any], Callable[..., np.ndarray]]] = {
    "softmax_loss": ({"type": "softmax_loss", "ema": 0.0}, rft),
    "dwa": ({"type": "dwa"}, dwa),
    "softadapt": ({"type": "softadapt"}, softadapt),
    "softadapt, both": ({"type": "softadapt", "normalized": True, "loss_weighted": True, "beta": 2.0}, softadapt_both),
    "group_dro": ({"type": "group_dro", "ema": 0.0}, group_dro),
    "doremi": ({"type": "doremi", "ema": 0.0, "reference": EXCESS["reference"]}, doremi),
    "rlw": ({"type": "rlw", "seed": 3}, rlw),
}


@pytest.mark.parametrize("name", PAPERS)
def test_two_hundred_updates_are_the_papers(name: str) -> None:
    options, paper = PAPERS[name]
    means, tokens = random_windows()
    ours = follow(controller(**PLAIN, **options), means, tokens)
    theirs, alpha = [], np.full(K, 1 / K)
    for step in range(len(means)):
        alpha = paper([*means[: step + 1]], alpha)
        theirs.append(alpha)
    assert np.abs(ours - np.array(theirs)).max() < 1e-12
    assert ours.std(axis=0).max() > 1e-4, "nothing moved, so nothing was compared"


def test_every_type_has_a_paper_here() -> None:
    assert {options["type"] for options, _ in PAPERS.values()} == set(CONTROLLERS)


CASES = [
    {**options, **PLAIN, **more}
    for options, _ in PAPERS.values()
    for more in ({}, {"min_alpha": 0.05, "max_change": 0.02}, {"min_alpha": 0.25}, {"every": 3, "warmup": "10%"})
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(f"{k}={v}" for k, v in options.items() if k != "reference"))
def test_alpha_is_on_the_simplex_above_its_floor_and_changes_as_little_as_it_may(options: dict[str, Any]) -> None:
    means, tokens = random_windows(seed=1)
    tokens[::7, 1] = 0
    tokens[:30, 2] = 0
    held = controller([1, 2, 3, 4] if options["min_alpha"] < 0.25 else None, **options)
    path = np.vstack([held.alpha, follow(held, means * 5, tokens)])
    assert np.abs(path.sum(axis=1) - 1).max() < 1e-12
    assert path.min() >= options["min_alpha"]
    assert np.abs(np.diff(path, axis=0)).max() <= options.get("max_change", 1.0) + 1e-12


def test_losses_that_never_differ_leave_alpha_as_the_yaml_has_it() -> None:
    """`alpha` is where a controller starts from, not a number that it ignores."""
    same = np.full((20, K), 1.7)
    for options, _ in PAPERS.values():
        if options["type"] not in ("rlw", "doremi"):
            path = follow(controller([1, 2, 3, 4], **PLAIN, **options), same, np.ones((20, K)))
            assert np.abs(path - np.array([0.1, 0.2, 0.3, 0.4])).max() < 1e-12, options


def test_the_average_is_exponential_and_a_class_that_is_absent_keeps_its_own() -> None:
    means, tokens = random_windows(count=6)
    tokens[3, 1] = 0
    held = controller(type="softmax_loss", ema=0.6, **PLAIN)
    path = follow(held, np.where(tokens > 0, means, 0.0), tokens)
    average = means[0].copy()
    for step in range(6):
        for c in range(K):
            if step and tokens[step, c]:
                average[c] = 0.6 * average[c] + 0.4 * means[step, c]
        assert np.abs(path[step] - softmax(average / 3.0)).max() < 1e-12


def test_a_class_that_was_never_seen_is_taken_for_an_average_one() -> None:
    held = controller(type="softmax_loss", **PLAIN)
    held.update(1, [2.0, 0.0, 3.0, 4.0], [1, 0, 1, 1])
    assert held.alpha == pytest.approx(softmax(np.array([2.0, 3.0, 3.0, 4.0]) / 3.0), abs=1e-15)


def test_a_window_without_any_token_changes_nothing() -> None:
    held = controller([1, 2, 3, 4], type="group_dro", **PLAIN)
    held.update(1, [0.0] * K, [0.0] * K)
    assert held.alpha == (0.1, 0.2, 0.3, 0.4)
    assert held.signal is None


def test_nan_is_not_learned_from() -> None:
    held, clean = (controller(type="group_dro", **PLAIN) for _ in range(2))
    held.update(1, [math.nan, 1.0, 2.0, 3.0], [1, 1, 1, 1])
    clean.update(1, [0.0, 1.0, 2.0, 3.0], [0, 1, 1, 1])
    assert held.alpha == clean.alpha


@pytest.mark.parametrize(
    ("signal", "expected"),
    [
        ("raw", lambda means: means),
        ("ratio_to_init", lambda means: means / means[0]),
        ("excess_over_ref", lambda means: means - REFERENCE),
    ],
)
def test_the_signal_is_what_the_option_says(signal: str, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    means, tokens = random_windows(count=30)
    more = EXCESS if signal == "excess_over_ref" else {"signal": signal}
    held = controller(type="softmax_loss", ema=0.0, temperature=1.0, **PLAIN, **more)
    path = follow(held, means, tokens)
    assert np.abs(path - np.array([softmax(row) for row in expected(means)])).max() < 1e-12
    assert held.signal == pytest.approx(expected(means)[-1], abs=1e-12)


@pytest.mark.parametrize(("warmup", "first"), [(0, 1), (5, 5), ("10%", 20), ("0.5ep", 25)])
def test_alpha_stays_until_the_warm_up_is_over(warmup: Any, first: int) -> None:
    means, tokens = random_windows()
    path = follow(controller(type="group_dro", every=1, min_alpha=0, warmup=warmup), means, tokens)
    moved = np.abs(path - 1 / K).max(axis=1) > 0
    assert moved.tolist() == [step >= first for step in range(1, 201)]


def test_a_window_ends_every_so_many_steps() -> None:
    held = controller(type="group_dro", every=4)
    assert [step for step in range(1, 13) if held.is_due(step)] == [4, 8, 12]


@pytest.mark.parametrize("name", PAPERS)
def test_a_state_written_as_json_goes_on_bit_for_bit(name: str) -> None:
    options = {**PAPERS[name][0], **PLAIN, "min_alpha": 0.01, "max_change": 0.1}
    means, tokens = random_windows(seed=5)
    tokens[:20, 0] = 0
    whole = controller([1, 2, 3, 4], **options)
    expected = follow(whole, means, tokens)
    for stop in (1, 7, 40, 133):
        first = controller([1, 2, 3, 4], **options)
        follow(first, means[:stop], tokens[:stop])
        saved = json.loads(json.dumps(first.state(), allow_nan=False))
        kept = copy.deepcopy(saved)
        second = controller([1, 2, 3, 4], **options)
        second.load(saved)
        rest = []
        for step in range(stop, len(means)):
            second.update(step + 1, (means[step] * tokens[step]).tolist(), tokens[step].tolist())
            rest.append(second.alpha)
        assert np.array_equal(np.array(rest), expected[stop:])
        assert saved == kept, "the state that was handed in was changed"


def test_a_raised_floor_holds_from_the_moment_of_loading() -> None:
    means, tokens = random_windows(count=9)
    low = controller(type="group_dro", every=1, eta=2.0, min_alpha=0.0)
    follow(low, means * 5, tokens)
    assert min(low.alpha) < 0.1
    raised = controller(type="group_dro", every=1, eta=2.0, min_alpha=0.1, max_change=0.01)
    raised.load(low.state())
    path = np.vstack([raised.alpha, follow(raised, means * 5, tokens)])
    assert path.min() >= 0.1
    assert np.abs(path.sum(axis=1) - 1).max() < 1e-12
    assert path[0] == pytest.approx(0.6 * np.array(low.alpha) + 0.1, abs=1e-12)


def test_a_lowered_floor_leaves_alpha_as_it_was() -> None:
    means, tokens = random_windows(count=9)
    high = controller(type="group_dro", every=1, min_alpha=0.1)
    follow(high, means, tokens)
    lowered = controller(type="group_dro", every=1, min_alpha=0.01)
    lowered.load(high.state())
    assert lowered.alpha == high.alpha


@pytest.mark.parametrize(
    ("before", "after", "path"),
    [
        ({"signal": "raw"}, {"signal": "ratio_to_init"}, "signal"),
        ({"signal": "ratio_to_init"}, EXCESS, "signal"),
        (EXCESS, {**EXCESS, "reference": "base"}, "reference"),
    ],
)
def test_a_state_whose_numbers_would_mean_something_else_is_refused(
    before: dict[str, Any], after: dict[str, Any], path: str
) -> None:
    state = controller(type="softmax_loss", **PLAIN, **before).state()
    with pytest.raises(ConfigError) as caught:
        controller(type="softmax_loss", **PLAIN, **after).load(state)
    assert [problem.path for problem in caught.value.problems] == [f"dwl.controller.{path}"]


def test_a_measured_reference_is_used_and_kept() -> None:
    held = controller(type="doremi", reference="base", reference_rows=9, **PLAIN)
    assert held.rows_to_measure == 9
    held.compare_with(dict(zip(NAMES, REFERENCE.tolist(), strict=True)))
    again = controller(type="doremi", reference="base", **PLAIN)
    again.load(held.state())
    given = controller(type="doremi", reference=EXCESS["reference"], **PLAIN)
    assert held.rows_to_measure == given.rows_to_measure == again.rows_to_measure == 0
    means, tokens = random_windows(count=20)
    expected = follow(given, means, tokens)
    assert np.array_equal(follow(held, means, tokens), expected)
    assert np.array_equal(follow(again, means, tokens), expected)
