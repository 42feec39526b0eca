"""Thousands of blocks nobody would write: each is a config, or our own error that says where."""

from __future__ import annotations

import datetime
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from dwl_plugin.config import Block, parse
from dwl_plugin.errors import ConfigError

NAMES = ["number", "reasoning", "final", "rest", "a-b", "yes"]
PATTERNS = [r"\d+", r"####\s*(.+)$", "(", "(?P<x>a)(b)", "", "[", r"\p{Lu}+", "a" * 200]


def sometimes(values: st.SearchStrategy[Any], *others: Any) -> st.SearchStrategy[Any]:
    """Mostly one of `values`."""
    return st.one_of(values, values, values, st.sampled_from(others))


WEIGHT = sometimes(
    st.floats(0, 10) | st.integers(0, 5), -1, True, "1e-4", None, 10**400, float("nan"), float("inf"), [1]
)
POSITION = sometimes(
    st.sampled_from([0, 10, 200, "10%", "90%", "100%", "2ep", "0.5ep", "50 %"]), 0.1, "soon", -3, "120%", True
)
DFT = st.fixed_dictionaries({}, optional={"exponent": WEIGHT, "min_weight": WEIGHT, "exponnent": WEIGHT})
SELECTORS: dict[str, st.SearchStrategy[Any]] = {
    "token_ids": st.lists(sometimes(st.integers(0, 399), "3-9", "9-3", -1, 1.5, None, 10**30), max_size=4),
    "tokens": st.lists(sometimes(st.sampled_from(["<|im_end|>", "a"]), "", None, False, 7), max_size=3),
    "token_regex": st.sampled_from(PATTERNS),
    "regex": sometimes(st.sampled_from(PATTERNS), None, 12, True, ["a"]),
    "between": sometimes(st.sampled_from([["<think>", "</think>"], ["<b>", "</b>"]]), ["<b>"], "<b>", [1, 2], None),
    "turn": st.sampled_from(["last", "first", 0, -1, 1.5]),
    "position": st.dictionaries(st.sampled_from(["first", "last", "mid"]), st.integers(-1, 40), max_size=2),
    "pack": st.sampled_from(["reasoning", "tool_call.arguments", "no such pack", 3]),
}


@st.composite
def a_class(draw: Callable[..., Any]) -> Any:
    kinds = draw(
        st.lists(st.sampled_from(sorted(SELECTORS)), min_size=1, max_size=1)
        | st.just([])
        | st.just(["regex", "tokens"])
    )
    spec = {kind: draw(SELECTORS[kind]) for kind in kinds}
    options = st.fixed_dictionaries({}, optional={
        "token_loss": st.sampled_from(["nll", "dft", "mse"]), "dft": DFT, "allow_empty": sometimes(st.booleans(), "no"),
        "group": sometimes(st.integers(0, 2), "x", None), "include_delimiters": st.booleans(), "weight": WEIGHT,
    })  # fmt: skip
    return {**spec, **draw(st.one_of(st.just({}), st.just({}), options))}


ALPHA = st.dictionaries(sometimes(st.sampled_from(NAMES), 1, True, "x"), WEIGHT, max_size=5)


@st.composite
def a_block(draw: Callable[..., Any]) -> dict[str, Any]:
    """A block that hangs together, then up to three mistakes anywhere in it."""
    names = draw(st.lists(st.sampled_from(NAMES[:3]), unique=True, max_size=3))
    whole = {name: draw(st.floats(0.01, 10)) for name in [*names, "rest"]}
    moved = {name: draw(st.floats(0.01, 10)) for name in whole}
    regexes = {name: {"regex": rf"{index}\d+"} for index, name in enumerate(names)}
    schedules = [
        None, {"type": "linear", "to": moved}, {"type": "cosine", "to": moved, "start": "10%", "end": "90%"},
        {"type": "keyframes", "at": {"50%": moved, "2ep": whole}}, {"to": moved}, "linear",
    ]  # fmt: skip
    dwl: dict[str, Any] = {
        "classes": draw(
            st.just(regexes) | st.dictionaries(sometimes(st.sampled_from(NAMES), 1, False), a_class(), max_size=3)
        ),
        "reduction": draw(st.sampled_from(["token_mean", "weighted_mean", "class_mean", "class_maen"])),
        "alpha": draw(st.just(whole) | st.just(whole) | ALPHA | st.none()),
        "schedule": draw(st.sampled_from(schedules)),
    }
    dwl |= draw(st.fixed_dictionaries({}, optional={
        "token_loss": st.sampled_from(["nll", "dft"]), "overlap": st.sampled_from(["first", "sum", "last"]),
        "controller": st.sampled_from([None, {"type": "group_dro"}, {"type": "?"}, "group_dro"]), "clases": st.just({}),
    }))  # fmt: skip
    block: dict[str, Any] = {"loss": draw(sometimes(st.just("dwl"), "nll", "dft", "dlw", None, 3, ["dwl"])), "dwl": dwl}
    block |= draw(st.fixed_dictionaries({}, optional={"dft": DFT | st.sampled_from([None, 1, []])}))
    for seed in draw(st.lists(st.integers(0, 10**6), max_size=3)):
        key = random.Random(seed).choice(list(block))
        block[key] = mistaken(block[key], random.Random(seed))
    return block


JUNK = [
    None, True, False, 0, -1, 10**400, -(10**400), 0.1, float("nan"), float("-inf"), "", "x", "\x00", "\ud800", "1e999", "é" * 300,
    [], {}, [[]], {"": None}, {None: 1}, {1: {2: 3}}, datetime.date(2026, 1, 1), b"bytes", (1, 2), {"type": {}},
]  # fmt: skip


def mistaken(node: Any, random: random.Random) -> Any:
    """A copy with one place changed: a value that is something else, a key that is missing, another that is new."""
    if isinstance(node, dict) and node and random.random() < 0.8:
        key = random.choice(list(node))
        kind = random.random()
        if kind < 0.15:
            return {other: value for other, value in node.items() if other != key}
        if kind < 0.3:
            return {**node, random.choice([1, True, "rest", "x", None, 1.5, ("a",)]): random.choice(JUNK)}
        return {**node, key: mistaken(node[key], random)}
    if isinstance(node, list) and node and random.random() < 0.7:
        at = random.randrange(len(node))
        return [mistaken(value, random) if index == at else value for index, value in enumerate(node)]
    return random.choice(JUNK)


outcomes: list[bool] = []


def error_of(work: Callable[[], Any]) -> ConfigError | None:
    """Anything but a `ConfigError` goes through, and fails the test."""
    try:
        work()
    except ConfigError as error:
        return error
    return None


def check(raw: dict[str, Any]) -> None:
    error = error_of(lambda: parse(raw))
    outcomes.append(error is None)
    if error is None:
        block = parse(raw)
        assert block is None or parse(block.dump()) == block
        return
    assert error.problems
    for problem in error.problems:
        assert str(problem)
        assert problem.path.split(".")[0].split("[")[0] in Block.model_fields, str(error)


QUIET = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink]
)


@settings(QUIET, max_examples=60)
@given(a_block())
def test_a_block_is_a_config_or_our_error_with_a_path(raw: dict[str, Any]) -> None:
    check(raw)


@pytest.mark.slow
def test_two_thousand_blocks_are_configs_or_our_errors_with_paths() -> None:
    outcomes.clear()
    settings(QUIET, max_examples=2000)(given(a_block())(check))()
    print(f"{len(outcomes)} blocks: {sum(outcomes)} configs, {len(outcomes) - sum(outcomes)} errors")
    assert len(outcomes) >= 2000
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.8  # both kinds are tried


HOST_OPTIONS: list[dict[str, Any]] = [
    {}, {"sample_packing": True, "pad_to_sequence_len": True},
    {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
    {"val_set_size": 0.1, "eval_steps": 5}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 4},
    {"loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 3}, {"neftune_noise_alpha": 5},
]  # fmt: skip


def loads(configs: int, tmp_path: Path) -> tuple[int, int]:
    """(valid, refused) of so many whole configs through the host's own loader."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    from dwl_plugin.hosts.axolotl_args import block_of
    from tests.hosts import harness

    harness.make_tokenizer(tmp_path)
    harness.make_model(tmp_path)
    data = harness.write_rows(tmp_path / "rows.jsonl", harness.rows(4))
    blocks: list[dict[str, Any]] = []

    @settings(QUIET, max_examples=configs, phases=[Phase.generate])
    @given(a_block())
    def collect(block: dict[str, Any]) -> None:
        blocks.append(block)

    collect()
    valid = refused = 0
    for index, block in enumerate(blocks[:configs]):
        options = HOST_OPTIONS[index % len(HOST_OPTIONS)]
        whole = DictDefault(harness.config(tmp_path, data, tmp_path / "out", **{**options, **block}))
        loaded: list[Any] = []
        error = error_of(lambda whole=whole, loaded=loaded: loaded.append(load_cfg(whole)))  # type: ignore[misc]
        if error is None:
            valid += 1
            assert block_of(loaded[0]) == parse(block)
        else:
            refused += 1
            assert error.problems
            assert all(problem.path for problem in error.problems)
    return valid, refused


@pytest.mark.filterwarnings("ignore")
def test_a_whole_config_loads_or_is_refused_by_us(tmp_path: Path) -> None:
    assert sum(loads(15, tmp_path)) >= 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_whole_configs_load_or_are_refused_by_us(tmp_path: Path) -> None:
    valid, refused = loads(120, tmp_path)
    print(f"{valid} configs, {refused} errors")
    assert valid + refused >= 100
    assert valid >= 10
    assert refused >= 10
