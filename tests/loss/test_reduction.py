"""Each reduction against its definition, summed token by token, with classes that overlap and classes that do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import pytest
import torch

from dwl_plugin.config import Reduction
from dwl_plugin.loss.membership import Membership, count_classes
from dwl_plugin.loss.reduction import class_weights
from dwl_plugin.values import FIRST_TARGET, Overlap

REDUCTIONS = get_args(Reduction)


@dataclass
class Token:
    sample: int
    classes: tuple[int, ...]
    losses: dict[int, float]
    """What the token pays in each of its classes."""


Step = list[Token]
Weigh = Callable[[Reduction, torch.Tensor, torch.Tensor], torch.Tensor]


def naive(reduction: Reduction, alpha: list[float], step: Step) -> float:
    """As the formulas say it."""
    paid = [(c, alpha[c] * token.losses[c]) for token in step for c in token.classes]
    if reduction == "token_mean":
        return sum(loss for _, loss in paid) / len(step)
    if reduction == "weighted_mean":
        mass = sum(alpha[c] for c, _ in paid)
        return sum(loss for _, loss in paid) / mass if mass else 0.0
    if reduction == "sequence_mean_token_sum":
        samples = {token.sample for token in step}
        sums = [sum(alpha[c] * token.losses[c] for token in step if token.sample == s for c in token.classes) for s in samples]
        return sum(sums) / len(samples)
    by_class = {c: [token.losses[c] for token in step if c in token.classes] for c, _ in paid}
    mass = sum(alpha[c] for c in by_class)
    return sum(alpha[c] / mass * sum(losses) / len(losses) for c, losses in by_class.items()) if mass else 0.0


def class_ids_of(step: Step, classes: int, overlap: Overlap) -> torch.Tensor:
    ids, seen = [], set[int]()
    for token in step:
        own = [c for c in token.classes if c < classes - 1]
        value = sum(1 << c for c in own) if overlap == "sum" else token.classes[0]
        ids.append(value + (FIRST_TARGET if token.sample not in seen else 0))
        seen.add(token.sample)
        ids.append(-100)
    return torch.tensor(ids, dtype=torch.int64)


def ours(reduction: Reduction, alpha: list[float], step: Step, overlap: Overlap, weigh: Weigh = class_weights) -> float:
    """The weight per class, then (1/N) Σ_t Σ_c w_c·ℓ_tc over the classes that the ids name."""
    ids = class_ids_of(step, len(alpha), overlap)
    weights = weigh(reduction, torch.tensor(alpha, dtype=torch.float64), count_classes(ids, len(alpha), overlap))
    members = Membership.read(ids, len(alpha), overlap)
    total = 0.0
    for c in range(len(alpha)):
        only_c = torch.zeros(len(alpha), dtype=torch.float64)
        only_c[c] = weights[c]
        weight_N = members.weigh(only_c)[::2]  # every other position is no target
        total += sum(float(w) * token.losses.get(c, 0.0) for w, token in zip(weight_N, step, strict=True))
    return total / len(step)


def random_step(draw: random.Random, classes: int, overlap: Overlap) -> Step:
    """Some steps lack some classes."""
    rest, present = classes - 1, draw.sample(range(classes), draw.randint(1, classes))
    step = []
    for sample in range(draw.randint(1, 5)):
        for _ in range(draw.randint(1, 9)):
            own = sorted(c for c in present if c != rest and draw.random() < 0.6)
            if overlap == "first":
                own = own[:1]
            mine = tuple(own) or (rest,)
            step.append(Token(sample, mine, {c: draw.expovariate(1) for c in mine}))
    return step


def random_alpha(draw: random.Random, classes: int) -> list[float]:
    alpha = [draw.random() for _ in range(classes)]
    return [a / sum(alpha) for a in alpha]


@pytest.mark.parametrize("overlap", get_args(Overlap))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_give_the_definition(reduction: Reduction, overlap: Overlap) -> None:
    draw = random.Random(0)
    for _ in range(50):
        alpha, step = random_alpha(draw, 4), random_step(draw, 4, overlap)
        assert ours(reduction, alpha, step, overlap) == pytest.approx(naive(reduction, alpha, step), rel=1e-12)


# Wrong counts and wrong denominators, each of which some reduction must notice.
WRONG: dict[str, tuple[Reduction, Overlap, Weigh]] = {
    "N counts a token once per class": (
        "class_mean",
        "sum",
        lambda r, a, n: class_weights(r, a, torch.cat([n[:-2], n[:-2].sum()[None], n[-1:]])),
    ),
    "samples taken for tokens": ("sequence_mean_token_sum", "first", lambda r, a, n: class_weights(r, a, n.flip(-1).roll(2))),
    "sequence mean is token mean": ("sequence_mean_token_sum", "first", lambda r, a, n: a),
    "mean of means": ("sequence_mean_token_sum", "sum", lambda r, a, n: class_weights("class_mean", a, n)),
    "absent classes keep their α": ("class_mean", "sum", lambda r, a, n: a * n[-2] / n[:-2].clamp(min=1)),
    "weighted by one over α": ("weighted_mean", "sum", lambda r, a, n: class_weights(r, 1 - a, n)),
    "overlap ignored": ("weighted_mean", "sum", lambda r, a, n: a * n[-2] / (a * n[:-2] / n[:-2].sum() * n[-2]).sum()),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_wrong_denominator_passes(name: str) -> None:
    reduction, overlap, wrong = WRONG[name]
    draw, missed = random.Random(1), []
    for _ in range(30):
        alpha, step = random_alpha(draw, 4), random_step(draw, 4, overlap)
        missed.append(ours(reduction, alpha, step, overlap, wrong) == pytest.approx(naive(reduction, alpha, step), rel=1e-6))
    assert not all(missed)


def step_of(*classes: int) -> Step:
    return [Token(0, (c,), {c: float(2**t)}) for t, c in enumerate(classes)]


def test_uniform_alpha_is_sft_for_weighted_mean_and_sft_over_c_for_token_mean() -> None:
    alpha, step = [1 / 3] * 3, step_of(0, 1, 1, 2)
    assert ours("weighted_mean", alpha, step, "first") == pytest.approx(15 / 4)
    assert ours("token_mean", alpha, step, "first") == pytest.approx(15 / 4 / 3)


def test_class_mean_with_alpha_of_the_shares_is_sft() -> None:
    assert ours("class_mean", [0.25, 0.5, 0.25], step_of(0, 1, 1, 2), "first") == pytest.approx(15 / 4)


def test_a_sequence_mean_sums_within_a_sample() -> None:
    step = [Token(s, (0,), {0: 1.0}) for s in (0, 0, 0, 1)]
    assert ours("sequence_mean_token_sum", [1.0], step, "first") == pytest.approx((3 + 1) / 2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_disjoint_classes_give_the_same_under_both_overlaps_bit_for_bit(reduction: Reduction) -> None:
    draw = random.Random(2)
    for _ in range(20):
        alpha, step = random_alpha(draw, 5), random_step(draw, 5, "first")
        assert ours(reduction, alpha, step, "sum") == ours(reduction, alpha, step, "first")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("alpha", "counts"), [([1.0, 0.0], [0, 5, 5, 2]), ([0.5, 0.5], [0, 0, 0, 0])])
def test_a_step_without_weighted_tokens_is_zero_not_nan(reduction: Reduction, alpha: list[float], counts: list[int]) -> None:
    weights = class_weights(reduction, torch.tensor(alpha, dtype=torch.float64), torch.tensor(counts))
    assert torch.isfinite(weights).all()
    assert float((weights * torch.tensor(counts[:2])).sum()) == 0.0


# class ids


def test_counts_of_literal_ids() -> None:
    first = torch.tensor([[0, 2, -100, 1], [-100, 1, 1 + FIRST_TARGET, 2 + FIRST_TARGET]])
    assert count_classes(first, 3, "first").tolist() == [1, 3, 2, 6, 2]
    bits = torch.tensor([[0b01, 0b11, -100, 0b00], [-100, 0b10, FIRST_TARGET, 0b11 + FIRST_TARGET]])
    assert count_classes(bits, 3, "sum").tolist() == [3, 3, 2, 6, 2]


def test_the_last_bit_is_a_class_and_not_the_mark_of_a_sample() -> None:
    ids = torch.tensor([1 << 61, (1 << 61) + FIRST_TARGET, 0])
    counts = count_classes(ids, 63, "sum").tolist()
    assert (counts[61], counts[62], counts[63], counts[64]) == (2, 1, 3, 1)


def test_counts_beyond_what_a_float_holds_are_exact() -> None:
    ids = torch.zeros(1, dtype=torch.int64).expand(2**24 + 3)
    assert count_classes(ids, 1, "first").tolist() == [2**24 + 3, 2**24 + 3, 0]


def test_sums_over_overlapping_classes_and_over_all() -> None:
    members = Membership.read(torch.tensor([0b01, 0b11, -100, 0]), 3, "sum")
    rows = torch.tensor([[1.0, 10.0, torch.nan, 1000.0]])
    assert members.sums(rows).tolist() == [[11.0, 10.0, 1000.0, 1011.0]]


def test_weights_add_up_over_the_classes_of_a_token() -> None:
    members = Membership.read(torch.tensor([0b01, 0b11, -100, 0]), 3, "sum")
    assert members.weigh(torch.tensor([1.0, 10.0, 100.0])).tolist() == [1.0, 11.0, 0.0, 100.0]
