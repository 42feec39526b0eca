"""Weights at every level of a conversation, from the file of rows to the gradients, beside an oracle of its own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwl_plugin.classes import labeller, masks
from dwl_plugin.hosts import axolotl_rows
from dwl_plugin.loss.membership import Membership
from dwl_plugin.run import message_spans, row_codes, session
from tests.hosts import harness, weights_oracle as oracle
from tests.hosts.harness import AXOLOTL
from tests.hosts.ranks import Ranks
from tests.hosts.weighed_rows import KINDS, REDUCTIONS, Conversations, objective_of
from tests.hosts.weights_oracle import Objective, Oracle

pytestmark = pytest.mark.skipif(AXOLOTL is not None and AXOLOTL < (0, 21), reason="its templates and its content parts are 0.21's")


@pytest.fixture(scope="module")
def twenty(words_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    return Conversations(words_folder, tmp_path_factory.mktemp("twenty"), 20)


@pytest.fixture(scope="module")
def two_hundred(words_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    return Conversations(words_folder, tmp_path_factory.mktemp("two_hundred"), 200, seed=1)


def test_the_oracle_imports_nothing_of_ours() -> None:
    source = Path(oracle.__file__).read_text()
    assert "dwl_plugin" not in source
    assert "from tests" not in source


@pytest.mark.parametrize(
    ("kind", "reduction"),
    [
        pytest.param(*case, marks=pytest.mark.slow if case == ("marked", "class_mean") else pytest.mark.weekly)
        for case in product(KINDS, REDUCTIONS)
    ],
)
def test_so_do_those_of_two_hundred(two_hundred: Conversations, kind: str, reduction: str) -> None:
    watch = two_hundred.agree(kind, reduction, 1, micro_batch_size=8, gradient_accumulation_steps=25)
    assert len(watch.oracle.met) == len(two_hundred.samples) > 190


QUICK = list(zip((*KINDS, "marked", "data sets"), REDUCTIONS, strict=True))


@pytest.mark.parametrize(("kind", "reduction"), QUICK)
def test_weights_at_every_level_reach_the_loss_and_the_gradients(twenty: Conversations, kind: str, reduction: str) -> None:
    watch = twenty.agree(kind, reduction, 2, gradient_accumulation_steps=2)
    met = [said.factor for sample in watch.oracle.met for said in sample.said]
    assert {0, 0.3, 1, 2.5} <= set(met)


@pytest.mark.parametrize(("loss", "exponent"), [("dft", 1.0), pytest.param("nll", 0.0, marks=pytest.mark.slow)])
def test_weights_multiply_what_every_loss_pays(twenty: Conversations, loss: str, exponent: float) -> None:
    """Losses without α: classes measure and change nothing."""
    class_of, classes = KINDS["marked"]
    block = {"loss": loss, "dwl": {"data_weights": True, "classes": classes}}
    objective = Objective("token_mean", dict.fromkeys((*classes, "rest"), 1.0), class_of, exponent)
    twenty.agree_on(objective, block, 1, gradient_accumulation_steps=2)


def test_negative_weights_pay_unlikelihood(words_folder: Path, tmp_path: Path) -> None:
    rows = Conversations(words_folder, tmp_path, 12, seed=3, negative=True)
    names = {"row": "weight", "message": "weight", "part": "weight"}
    watch = rows.agree("token ids", "weighted_mean", 2, weights={**names, "allow_negative": True})
    factors = {said.factor for sample in watch.oracle.met for said in sample.said}
    assert min(factors) < 0 < max(factors)


LAYOUTS: dict[str, dict[str, Any]] = {
    "1 x 8": {"micro_batch_size": 1, "gradient_accumulation_steps": 8},
    "8 x 1": {"micro_batch_size": 8, "gradient_accumulation_steps": 1},
    "packed": {"micro_batch_size": 1, "sample_packing": True, "sequence_len": 1024},
    "packed in rows": {"micro_batch_size": 2, "sample_packing": True, "sequence_len": 480, "pad_to_sequence_len": True},
}


@pytest.fixture(scope="module")
def eight(words_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Conversations:
    return Conversations(words_folder, tmp_path_factory.mktemp("eight"), 8, seed=2)


def some_of(*chosen: str, mark: Any = ()) -> list[Any]:
    """Every reduction: the chosen ones with a mark of their own, the others every week."""
    return [pytest.param(reduction, marks=mark if reduction in chosen else pytest.mark.weekly) for reduction in REDUCTIONS]


@pytest.mark.parametrize("reduction", some_of("class_mean", "sample_sqrt", mark=pytest.mark.slow))
def test_the_layout_of_eight_samples_changes_nothing(eight: Conversations, reduction: str) -> None:
    losses = [eight.agree("marked", reduction, 1, **layout).steps[0] for layout in LAYOUTS.values()]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-12)


def step_of_a_rank(settings: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    run = harness.train(settings, before=lambda trainer: trainer.model.double())
    return run.logged("loss")[0], {name.removeprefix("module."): gradient for name, gradient in run.gradients[0].items()}


@pytest.mark.parametrize("reduction", some_of("class_mean"))
def test_two_ranks_have_the_step_of_one(eight: Conversations, ranks: Ranks, reduction: str) -> None:
    """Four of the eight samples each, in two micro-batches."""
    from transformers import AutoModelForCausalLM

    objective, block = objective_of("marked", reduction)
    layout = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
    model = AutoModelForCausalLM.from_pretrained(eight.model).double()
    every = [{"input_ids": torch.tensor([sample.ids]), "labels": torch.tensor([sample.ids])} for sample in eight.samples]
    loss, expected = oracle.loss_and_gradients(model, Oracle(eight.samples, objective), every)
    for ours, gradients in ranks(step_of_a_rank, eight.config(**block, **layout)):
        assert ours == pytest.approx(loss, rel=1e-6)
        assert oracle.worst_gradient(gradients, expected) <= 1e-6


# wrong implementations

Mutant = Callable[[pytest.MonkeyPatch], None]


def of_level(level: str) -> Mutant:
    """The factors of rows, messages or parts are not read."""

    def mutate(patch: pytest.MonkeyPatch) -> None:
        factor = row_codes.RowCodes.factor
        skipped = lambda self, said, own, at="": 1.0 if own == level else factor(self, said, own, at)  # noqa: E731
        patch.setattr(row_codes.RowCodes, "factor", skipped)

    return mutate


def as_axolotl_does(patch: pytest.MonkeyPatch) -> None:
    number = row_codes.RowCodes._number
    patch.setattr(row_codes.RowCodes, "_number", lambda self, *given: float(number(self, *given) != 0))


def where_a_token_begins(patch: pytest.MonkeyPatch) -> None:
    last = message_spans._last_characters

    def first(*given: Any) -> Any:
        last_T = last(*given)
        return np.concatenate([[0], last_T[:-1] + 1])

    patch.setattr(message_spans, "_last_characters", first)


def without_its_end_of_turn(patch: pytest.MonkeyPatch) -> None:
    conversation = message_spans._Conversation
    patch.setattr(conversation, "extent", lambda self, index: (self.words(index) or (0, 0))[:2])


def parts_a_character_late(patch: pytest.MonkeyPatch) -> None:
    parts = message_spans._Conversation.parts
    late = lambda self, *given: ((begin + 1, end + 1, part) for begin, end, part in parts(self, *given))  # noqa: E731
    patch.setattr(message_spans._Conversation, "parts", late)


def the_first_part_alone(patch: pytest.MonkeyPatch) -> None:
    parts = message_spans._Conversation.parts
    patch.setattr(message_spans._Conversation, "parts", lambda self, *given: list(parts(self, *given))[:1])


def a_token_late(patch: pytest.MonkeyPatch) -> None:
    of = axolotl_rows.DataSet.of
    patch.setattr(axolotl_rows.DataSet, "of", lambda self, *given: np.roll(of(self, *given), 1))


def no_factors_in_the_loss(patch: pytest.MonkeyPatch) -> None:
    weigh = lambda self, values_C, sign=1: self.add_up(values_C) * (sign > 0)  # noqa: E731
    patch.setattr(Membership, "weigh", weigh)


def divided_by_counts(patch: pytest.MonkeyPatch) -> None:
    weights = session.class_weights
    patch.setattr(session, "class_weights", lambda reduction, alpha, counts, masses: weights(reduction, alpha, counts, counts))


def a_zero_counts(patch: pytest.MonkeyPatch) -> None:
    factors_of = labeller.factors_of
    nearly = lambda codes_T: np.where(factors_of(codes_T) == 0, np.float32(1e-30), factors_of(codes_T))  # noqa: E731
    patch.setattr(labeller, "factors_of", nearly)


def the_data_set_before(patch: pytest.MonkeyPatch) -> None:
    from_data_set = masks.FromDataSet
    patch.setattr(masks, "FromDataSet", lambda number: from_data_set(number - 1))


def marks_of_parts_alone(patch: pytest.MonkeyPatch) -> None:
    bits = row_codes.RowCodes.bits
    patch.setattr(row_codes.RowCodes, "bits", lambda self, said, at="": bits(self, said, at) if ".content[" in at else 0)


def n_of_all_tokens(patch: pytest.MonkeyPatch) -> None:
    weighed = labeller.Labeller._weighed

    def of_all_tokens(self: Any, classes_T: Any, target_T: Any, *given: Any) -> Any:
        codes_T, _ = weighed(self, classes_T, np.ones_like(target_T), *given)
        _, kept_T = weighed(self, classes_T, target_T, *given)
        return codes_T, kept_T

    patch.setattr(labeller.Labeller, "_weighed", of_all_tokens)


MUTANTS: dict[str, tuple[Mutant, str, str]] = {
    "a row's factor is not read": (of_level("row"), "no classes", "token_mean"),
    "a message's factor is not read": (of_level("message"), "no classes", "weighted_mean"),
    "a part's factor is not read": (of_level("part"), "no classes", "sample_mean"),
    "0.3 is 1": (as_axolotl_does, "no classes", "weighted_mean"),
    "a token is where it begins": (where_a_token_begins, "no classes", "token_mean"),
    "a message is its words": (without_its_end_of_turn, "no classes", "class_mean"),
    "parts are a character late": (parts_a_character_late, "no classes", "token_mean"),
    "the first part says it for all": (the_first_part_alone, "marked", "token_mean"),
    "codes are a token late": (a_token_late, "no classes", "token_mean"),
    "the loss knows no factors": (no_factors_in_the_loss, "token ids", "token_mean"),
    "N_c is a count": (divided_by_counts, "token ids", "class_mean"),
    "the sum of α is of counts": (divided_by_counts, "token ids", "weighted_mean"),
    "Σ n^-½ is of counts": (divided_by_counts, "no classes", "sample_sqrt"),
    "a token of factor 0 counts": (a_zero_counts, "no classes", "token_mean"),
    "a sample of factor 0 counts": (a_zero_counts, "no classes", "sequence_mean_token_sum"),
    "n is of tokens, not targets": (n_of_all_tokens, "no classes", "sample_mean"),
    "a data set is the one before": (the_data_set_before, "data sets", "class_mean"),
    "marks are those of parts": (marks_of_parts_alone, "marked", "token_mean"),
}
QUICK_MUTANTS = ("a token is where it begins", "N_c is a count")
SLOW_MUTANTS = ("n is of tokens, not targets", "a data set is the one before")


def mark_of(name: str) -> Any:
    return () if name in QUICK_MUTANTS else pytest.mark.slow if name in SLOW_MUTANTS else pytest.mark.weekly


@pytest.mark.parametrize("name", [pytest.param(name, marks=mark_of(name)) for name in MUTANTS])
def test_a_wrong_implementation_does_not_agree(
    words_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mutate, kind, reduction = MUTANTS[name]
    rows = Conversations(words_folder, tmp_path, 14, seed=4)
    mutate(monkeypatch)
    with pytest.raises(AssertionError) as caught:
        rows.agree(kind, reduction, 1, micro_batch_size=14)
    ours, expected, _ = caught.value.args[0]
    assert ours > 0 < expected
