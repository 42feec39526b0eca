"""Patterns that backtrack are stopped, in the main process and in a loader worker started with spawn."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
import torch
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from dwl_plugin.classes import Labeller, PatternTooSlowError, build_labeller, masks
from dwl_plugin.config.classes import AnyClass, RegexClass, TokenRegexClass
from dwl_plugin.errors import ConfigError

BACKTRACKS = [r"(a+)+$", r"(a|aa)+$", r"(.*)*b\1$"]


@pytest.fixture
def tokenizer() -> Any:
    from tests.classes.little_tokenizers import byte_level  # not above: a spawned worker imports this module

    return byte_level()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masks, "TIME_LIMIT_S", 0.2)


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("pattern", BACKTRACKS)
def test_a_pattern_that_backtracks_is_named(tokenizer: Any, pattern: str) -> None:
    labeller = build_labeller({"fine": RegexClass(regex=r"b"), "evil": RegexClass(regex=pattern)}, tokenizer)
    ids = ids_of(tokenizer, "a" * 50_000) * 2 + ids_of(tokenizer, "!" if pattern.endswith("+$") else "b!")
    began = time.process_time()
    with pytest.raises(PatternTooSlowError) as caught:
        labeller(ids, ids)
    assert time.process_time() - began < 3
    assert "dwl.classes.evil.regex" in str(caught.value)
    assert pattern in str(caught.value).replace("\\\\", "\\")
    assert caught.value.problems[0].path == "dwl.classes.evil.regex"


@pytest.mark.usefixtures("short_limit")
def test_a_pattern_inside_other_selectors_is_named_with_its_path(tokenizer: Any) -> None:
    evil = AnyClass(any=({"turn": 5}, {"not": {"all": [{"regex": "b"}, {"regex": BACKTRACKS[0]}]}}))
    labeller = build_labeller({"evil": evil}, tokenizer)
    ids = ids_of(tokenizer, "a" * 100_000 + "!")
    with pytest.raises(PatternTooSlowError) as caught:
        labeller(ids, ids)
    assert caught.value.problems[0].path == "dwl.classes.evil.any[1].not.all[1].regex"


@pytest.mark.usefixtures("short_limit")
def test_the_limit_is_one_for_all_turns_of_a_sample(tokenizer: Any) -> None:
    labeller = build_labeller({"evil": RegexClass(regex=r"(a|aa)+$")}, tokenizer)
    turn = ids_of(tokenizer, "a" * 20 + "!")  # some hundredths of a second each, not stopped alone
    ids, labels = (turn + turn[-1:]) * 400, ([*turn, -100]) * 400
    began = time.process_time()
    with pytest.raises(PatternTooSlowError, match=r"dwl\.classes\.evil\.regex: too slow"):
        labeller(ids, labels)
    assert time.process_time() - began < 1
    positions = [*range(len(turn) + 1)] * 2
    labeller.label_batch([ids[: len(positions)]], [labels[: len(positions)]], [positions], packed=True)


@pytest.mark.slow
def test_a_pattern_that_runs_out_of_memory_is_named(tokenizer: Any) -> None:
    ids = ids_of(tokenizer, "a" * 1_000 + "!")
    with pytest.raises(PatternTooSlowError, match=r"dwl\.classes\.evil\.regex: too slow.*memory"):
        build_labeller({"evil": RegexClass(regex=r"(?R)?a+$")}, tokenizer)(ids, ids)
    with pytest.raises(ConfigError, match=r"dwl\.classes\.evil\.token_regex: too slow"):
        build_labeller({"evil": TokenRegexClass(token_regex=r"(?R)?a+$")}, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 40])
def test_at_the_real_limit_a_long_sample_is_stopped_within_seconds(tokenizer: Any, turns: int) -> None:
    labeller = build_labeller({"evil": RegexClass(regex=r"(a+)+$")}, tokenizer)
    turn = ids_of(tokenizer, "a" * (100_000 // turns) + "!")
    ids, labels = (turn + turn[-1:]) * turns, ([*turn, -100]) * turns
    began = time.process_time()
    with pytest.raises(PatternTooSlowError, match=r"dwl\.classes\.evil\.regex: too slow"):
        labeller(ids, labels)
    assert time.process_time() - began < masks.TIME_LIMIT_S + 2


@pytest.mark.slow
def test_at_the_real_limit_a_worker_names_the_pattern(tokenizer: Any) -> None:
    labeller = build_labeller({"evil": RegexClass(regex=r"(a+)+$")}, tokenizer)
    rows: Any = [ids_of(tokenizer, "a" * 100_000 + "!")]
    loader = DataLoader(rows, num_workers=1, collate_fn=Collate(labeller), multiprocessing_context="fork")
    with pytest.raises(PatternTooSlowError, match=r"dwl\.classes\.evil\.regex.*too slow"):
        next(iter(loader))


@pytest.mark.usefixtures("short_limit")
def test_the_error_survives_the_way_from_a_worker(tokenizer: Any) -> None:
    labeller = build_labeller({"evil": RegexClass(regex=BACKTRACKS[0])}, tokenizer)
    ids = ids_of(tokenizer, "a" * 1_000 + "!")
    with pytest.raises(PatternTooSlowError) as caught:
        labeller(ids, ids)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    wrapped = pickle.loads(pickle.dumps(ExceptionWrapper((caught.type, caught.value, caught.tb))))  # as a worker does
    with pytest.raises(PatternTooSlowError, match=r"dwl\.classes\.evil\.regex: too slow"):
        wrapped.reraise()


class Collate:
    def __init__(self, labeller: Labeller) -> None:
        self.labeller = labeller

    def __call__(self, rows: list[list[int]]) -> torch.Tensor:
        return torch.from_numpy(self.labeller(rows[0], rows[0]))


def shorten_limit(_: int) -> None:
    masks.TIME_LIMIT_S = 0.2


@pytest.mark.slow
def test_a_spawned_worker_labels_alike_and_names_the_pattern(tokenizer: Any) -> None:
    evil = {"regex": r"(a|aa)+$"}
    labeller = build_labeller({"evil": AnyClass(any=(evil, {"words": ["bb"]}))}, tokenizer)
    fine, slow = ids_of(tokenizer, "bb aaa"), ids_of(tokenizer, "a" * 100 + "!")
    loader = DataLoader(
        [fine, slow],  # type: ignore[arg-type]
        num_workers=1,
        collate_fn=Collate(labeller),
        multiprocessing_context="spawn",
        worker_init_fn=shorten_limit,
    )
    batches = iter(loader)
    assert next(batches).tolist() == labeller(fine, fine).tolist()
    with pytest.raises(PatternTooSlowError, match=r"dwl\.classes\.evil\.any\[0\]\.regex.*too slow"):
        next(batches)
