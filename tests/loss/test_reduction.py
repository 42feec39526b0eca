"""Each reduction against its definition, summed token by token."""

from __future__ import annotations

import random

import pytest
import torch

from dwl_plugin.config import Reduction
from dwl_plugin.loss.reduction import class_weights


def naive(reduction: Reduction, alpha: list[float], tokens: list[tuple[int, float]]) -> float:
    """(class, loss) pairs to one number, as the formulas say it."""
    total = len(tokens)
    if reduction == "token_mean":
        return sum(alpha[c] * loss for c, loss in tokens) / total
    if reduction == "weighted_mean":
        return sum(alpha[c] * loss for c, loss in tokens) / sum(alpha[c] for c, _ in tokens)
    by_class = {c: [loss for k, loss in tokens if k == c] for c in {c for c, _ in tokens}}
    mass = sum(alpha[c] for c in by_class)
    return sum(alpha[c] / mass * sum(losses) / len(losses) for c, losses in by_class.items())


def ours(reduction: Reduction, alpha: list[float], tokens: list[tuple[int, float]]) -> float:
    counts = torch.tensor([sum(k == c for k, _ in tokens) for c in range(len(alpha))])
    weights = class_weights(reduction, torch.tensor(alpha, dtype=torch.float64), counts)
    return float(sum(weights[c] * loss for c, loss in tokens) / len(tokens))


@pytest.mark.parametrize("reduction", ["token_mean", "weighted_mean", "class_mean"])
def test_weights_give_the_definition(reduction: Reduction) -> None:
    draw = random.Random(0)
    for _ in range(50):
        alpha = [draw.random() for _ in range(4)]
        alpha = [a / sum(alpha) for a in alpha]
        present = draw.sample(range(4), draw.randint(1, 4))  # some steps lack some classes
        tokens = [(draw.choice(present), draw.expovariate(1)) for _ in range(draw.randint(1, 30))]
        assert ours(reduction, alpha, tokens) == pytest.approx(naive(reduction, alpha, tokens), rel=1e-12)


def test_uniform_alpha_is_sft_for_weighted_mean_and_sft_over_c_for_token_mean() -> None:
    tokens = [(0, 1.0), (1, 2.0), (1, 4.0), (2, 8.0)]
    alpha = [1 / 3] * 3
    assert ours("weighted_mean", alpha, tokens) == pytest.approx(15 / 4)
    assert ours("token_mean", alpha, tokens) == pytest.approx(15 / 4 / 3)


def test_class_mean_with_alpha_of_the_shares_is_sft() -> None:
    tokens = [(0, 1.0), (1, 2.0), (1, 4.0), (2, 8.0)]
    assert ours("class_mean", [0.25, 0.5, 0.25], tokens) == pytest.approx(15 / 4)


@pytest.mark.parametrize("reduction", ["token_mean", "weighted_mean", "class_mean"])
@pytest.mark.parametrize(("alpha", "counts"), [([1.0, 0.0], [0, 5]), ([0.5, 0.5], [0, 0])])
def test_a_step_without_weighted_tokens_is_zero_not_nan(
    reduction: Reduction, alpha: list[float], counts: list[int]
) -> None:
    weights = class_weights(reduction, torch.tensor(alpha, dtype=torch.float64), torch.tensor(counts))
    assert torch.isfinite(weights).all()
    assert float((weights * torch.tensor(counts)).sum()) == 0.0
