"""Each reduction against its definition, summed token by token, with classes that overlap and classes that do not, and with factors
of the data."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch

from dwl_plugin.classes.data_codes import encode
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
    """What the token pays in each of its classes, times the size of its factor."""
    factor: float = 1.0
    """What the data says it counts."""


Step = list[Token]
Weigh = Callable[[Reduction, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Factor = Callable[[float, int], float]
"""From the factor of the data and the number of the sample's targets to what a class id carries."""


def naive(reduction: Reduction, alpha: list[float], step: Step) -> float:
    """As the formulas say it."""
    step = [token for token in step if token.factor]
    if not step:
        return 0.0
    targets = Counter(token.sample for token in step)
    if reduction in ("sample_mean", "sample_sqrt"):
        # Each sample counts 1, or √n, in the loss as in what it is divided by.
        counts = {s: {"sample_mean": 1.0, "sample_sqrt": n**0.5}[reduction] for s, n in targets.items()}
        losses, sizes = dict.fromkeys(targets, 0.0), dict.fromkeys(targets, 0.0)
        for token in step:
            mean_of = counts[token.sample] / targets[token.sample] * abs(token.factor)
            losses[token.sample] += mean_of * sum(alpha[c] * token.losses[c] for c in token.classes)
            sizes[token.sample] += mean_of
        return sum(losses.values()) / sum(sizes.values())
    paid = [(c, abs(token.factor), alpha[c] * abs(token.factor) * token.losses[c]) for token in step for c in token.classes]
    total = sum(loss for *_, loss in paid)
    if reduction == "token_mean":
        return total / len(step)
    if reduction == "weighted_mean":
        mass = sum(alpha[c] * size for c, size, _ in paid)
        return total / mass if mass else 0.0
    if reduction == "sequence_mean_token_sum":
        return total / len(targets)
    assert reduction == "class_mean"
    sizes_of = {c: sum(size for k, size, _ in paid if k == c) for c, *_ in paid}
    whole = sum(alpha[c] for c in sizes_of)
    return sum(loss / sizes_of[c] for c, _, loss in paid) / whole if whole else 0.0


def carried(factor: float, power: float, targets: int) -> float:
    return factor / targets**power


POWERS = {"sample_mean": 1.0, "sample_sqrt": 0.5}


def class_ids_of(step: Step, classes: int, overlap: Overlap, factor_of: Factor | None = None) -> torch.Tensor:
    """One id per token, each behind a position that is no target; without `factor_of` they carry none."""
    targets, seen = Counter(token.sample for token in step if token.factor), set[int]()
    ids = torch.full((2 * len(step),), -100)
    for at, token in enumerate(step):
        if factor_of is not None and token.factor == 0:
            continue
        own = [c for c in token.classes if c < classes - 1]
        value = sum(1 << c for c in own) if overlap == "sum" else token.classes[0]
        if factor_of is not None:
            value = int(encode(factor_of(token.factor, targets[token.sample]), value))
        ids[2 * at] = value + (FIRST_TARGET if token.sample not in seen else 0)
        seen.add(token.sample)
    return ids


def ours(
    reduction: Reduction,
    alpha: list[float],
    step: Step,
    overlap: Overlap,
    weigh: Weigh = class_weights,
    *,
    plain: bool = False,
    factor_of: Factor | None = None,
) -> float:
    """The weight per class, then (1/N) Σ_t v_t Σ_c w_c·ℓ_tc over the classes and factors that the ids hold; none of these if
    `plain`."""

    def usual(factor: float, targets: int) -> float:
        return carried(factor, POWERS.get(reduction, 0.0), targets)

    ids = class_ids_of(step, len(alpha), overlap, None if plain else factor_of or usual)
    counts = count_classes(ids, len(alpha), overlap, not plain)
    weights = weigh(reduction, torch.tensor(alpha, dtype=torch.float64), counts[0], counts[-1])
    return paid_by(ids, weights, step, overlap, not plain) / max(int(counts[0, -2]), 1)


def paid_by(ids: torch.Tensor, weights: torch.Tensor, step: Step, overlap: Overlap, weighs: bool) -> float:
    members, total = Membership.read(ids, len(weights), overlap, weighs), 0.0
    for c in range(len(weights)):
        only_c = torch.zeros(len(weights), dtype=torch.float64)
        only_c[c] = weights[c]
        weight_N = members.weigh(only_c) + members.weigh(only_c, -1) * weighs
        total += sum(float(w) * token.losses.get(c, 0.0) for w, token in zip(weight_N[::2], step, strict=True))
        assert not weight_N[1::2].any()
    return total


def random_step(draw: random.Random, classes: int, overlap: Overlap, factors: tuple[float, ...] = (1.0,)) -> Step:
    """Some steps lack some classes, and where a factor is 0 some samples have no target."""
    rest, present = classes - 1, draw.sample(range(classes), draw.randint(1, classes))
    step = []
    for sample in range(draw.randint(1, 5)):
        own_factors = draw.choice([factors, factors, (draw.choice(factors),)])
        for _ in range(draw.randint(1, 9)):
            own = sorted(c for c in present if c != rest and draw.random() < 0.6)
            if overlap == "first":
                own = own[:1]
            mine = tuple(own) or (rest,)
            step.append(Token(sample, mine, {c: draw.expovariate(1) for c in mine}, draw.choice(own_factors)))
    return step


FACTORS = (0.0, 0.25, 0.5, 1.0, 1.0, 3.0)  # exact in fp32
SIGNED = (*FACTORS, -0.5, -2.0)


def random_alpha(draw: random.Random, classes: int) -> list[float]:
    alpha = [draw.random() for _ in range(classes)]
    return [a / sum(alpha) for a in alpha]


@pytest.mark.parametrize("overlap", get_args(Overlap))
@pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r not in POWERS])
def test_weights_give_the_definition(reduction: Reduction, overlap: Overlap) -> None:
    draw = random.Random(0)
    for _ in range(50):
        alpha, step = random_alpha(draw, 4), random_step(draw, 4, overlap)
        assert ours(reduction, alpha, step, overlap, plain=True) == pytest.approx(naive(reduction, alpha, step), rel=1e-12)


@pytest.mark.parametrize("factors", [(1.0,), FACTORS, SIGNED], ids=["ones", "factors", "negative ones"])
@pytest.mark.parametrize("overlap", get_args(Overlap))
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_weights_and_factors_give_the_definition(reduction: Reduction, overlap: Overlap, factors: tuple[float, ...]) -> None:
    """n^-1 and n^-½ are rounded to fp32."""
    draw, near = random.Random(0), 2e-7 if reduction in POWERS else 1e-12
    for _ in range(50):
        alpha, step = random_alpha(draw, 4), random_step(draw, 4, overlap, factors)
        assert ours(reduction, alpha, step, overlap) == pytest.approx(naive(reduction, alpha, step), rel=near)


@pytest.mark.parametrize("overlap", get_args(Overlap))
@pytest.mark.parametrize("reduction", [r for r in REDUCTIONS if r not in POWERS])
def test_factors_of_one_are_no_factors_bit_for_bit(reduction: Reduction, overlap: Overlap) -> None:
    draw = random.Random(3)
    for _ in range(20):
        alpha, step = random_alpha(draw, 4), random_step(draw, 4, overlap)
        assert ours(reduction, alpha, step, overlap) == ours(reduction, alpha, step, overlap, plain=True)


# Wrong counts and wrong denominators, each of which some reduction must notice.
WRONG: dict[str, tuple[Reduction, Overlap, Weigh]] = {
    "N counts a token once per class": (
        "class_mean",
        "sum",
        lambda r, a, n, m: class_weights(r, a, torch.cat([n[:-2], n[:-2].sum()[None], n[-1:]]), m),
    ),
    "samples taken for tokens": ("sequence_mean_token_sum", "first", lambda r, a, n, m: class_weights(r, a, n.flip(-1).roll(2))),
    "sequence mean is token mean": ("sequence_mean_token_sum", "first", lambda r, a, n, m: a),
    "mean of means": ("sequence_mean_token_sum", "sum", lambda r, a, n, m: class_weights("class_mean", a, n, m)),
    "absent classes keep their α": ("class_mean", "sum", lambda r, a, n, m: a * n[-2] / n[:-2].clamp(min=1)),
    "weighted by one over α": ("weighted_mean", "sum", lambda r, a, n, m: class_weights(r, 1 - a, n, m)),
    "overlap ignored": ("weighted_mean", "sum", lambda r, a, n, m: a * n[-2] / (a * n[:-2] / n[:-2].sum() * n[-2]).sum()),
}


@pytest.mark.parametrize("name", WRONG)
def test_no_wrong_denominator_passes(name: str) -> None:
    reduction, overlap, wrong = WRONG[name]
    draw, missed = random.Random(1), []
    for _ in range(30):
        alpha, step = random_alpha(draw, 4), random_step(draw, 4, overlap)
        missed.append(ours(reduction, alpha, step, overlap, wrong) == pytest.approx(naive(reduction, alpha, step), rel=1e-6))
    assert not all(missed)


Loss = Callable[[Reduction, list[float], Step], float]


def _by_halves(reduction: Reduction, alpha: list[float], step: Step) -> float:
    """Each sample is a micro-batch that divides by its own Σ w, and the host weighs it by its targets."""
    total = 0.0
    for sample in {token.sample for token in step}:
        own = [token for token in step if token.sample == sample]
        total += ours(reduction, alpha, own, "first") * sum(token.factor != 0 for token in own)
    return total / max(sum(token.factor != 0 for token in step), 1)


def _with(**options: object) -> Loss:
    return lambda r, a, step: ours(r, a, step, "first", **options)  # type: ignore[arg-type]


def _zeros_counted(reduction: Reduction, alpha: list[float], step: Step) -> float:
    """As if a factor of 0 were the smallest of numbers."""
    return ours(reduction, alpha, [replace(token, factor=token.factor or 1e-30) for token in step], "first")


def _signed_sums(reduction: Reduction, alpha: list[float], step: Step) -> float:
    by_class = [sum(token.factor for token in step if c in token.classes) for c in range(len(alpha))]
    signed = torch.tensor([*by_class, sum(by_class), 0.0], dtype=torch.float64)
    return ours(reduction, alpha, step, "first", lambda r, a, n, m: class_weights(r, a, n, signed))


# Mistakes with factors, and the reductions that must notice each.
WITH_FACTORS: dict[str, tuple[tuple[Reduction, ...], Loss]] = {
    "Σ w over the micro-batch": (("weighted_mean", "class_mean", "sample_mean", "sample_sqrt"), _by_halves),
    "N in the place of Σ w": (
        ("weighted_mean", "class_mean", "sample_mean", "sample_sqrt"),
        _with(weigh=lambda r, a, n, m: class_weights(r, a, n, n)),
    ),
    "Σ w in the place of N": (("token_mean",), _with(weigh=lambda r, a, n, m: a * n[-2] / m[-2])),
    "Σ w in the place of the samples": (("sequence_mean_token_sum",), _with(weigh=lambda r, a, n, m: a * n[-2] / m[-2])),
    "signed factors in the denominator": (("weighted_mean", "class_mean"), _signed_sums),
    "factor squared": (REDUCTIONS, _with(factor_of=lambda f, n: f * abs(f))),
    "factor dropped": (REDUCTIONS, _with(factor_of=lambda f, n: 1.0)),
    "a factor of 0 counts": (("token_mean", "sequence_mean_token_sum", "class_mean", "sample_mean", "sample_sqrt"), _zeros_counted),
    "n with the sample's first token": (
        ("sample_mean", "sample_sqrt"),
        lambda r, a, step: ours(r, a, step, "first", factor_of=lambda f, n: carried(f, POWERS[r], n + 1)),
    ),
    "√n for n": (("sample_mean",), _with(factor_of=lambda f, n: carried(f, 0.5, n))),
    "n for √n": (("sample_sqrt",), _with(factor_of=lambda f, n: carried(f, 1.0, n))),
    "samples count as tokens do": (("sample_mean", "sample_sqrt"), _with(factor_of=lambda f, n: f)),
    "a factor within n": (
        ("sample_mean", "sample_sqrt"),
        lambda r, a, step: ours(r, a, step, "first", factor_of=lambda f, n: carried(f, POWERS[r], n) * abs(f) ** -POWERS[r]),
    ),
}


@pytest.mark.parametrize(("name", "reduction"), [(name, r) for name, (reductions, _) in WITH_FACTORS.items() for r in reductions])
def test_no_mistake_with_factors_passes(name: str, reduction: Reduction) -> None:
    wrong, draw, noticed = WITH_FACTORS[name][1], random.Random(1), 0
    for _ in range(30):
        alpha, step = random_alpha(draw, 4), random_step(draw, 4, "first", SIGNED)
        noticed += wrong(reduction, alpha, step) != pytest.approx(naive(reduction, alpha, step), rel=1e-6)
    assert noticed >= 2


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


def test_a_sample_counts_one_or_the_root_of_its_targets() -> None:
    step = [Token(0, (0,), {0: 2.0})] * 4 + [Token(1, (0,), {0: 8.0})]
    assert ours("sample_mean", [1.0], step, "first") == pytest.approx((2 + 8) / 2)
    assert ours("sample_sqrt", [1.0], step, "first") == pytest.approx((2 * 2 + 1 * 8) / (2 + 1))


def test_a_factor_weighs_a_token_within_its_sample_and_a_sample_among_the_others() -> None:
    step = [Token(0, (0,), {0: 2.0}, 3.0), Token(0, (0,), {0: 6.0}, 1.0), Token(1, (0,), {0: 10.0}, 2.0)]
    assert ours("sample_mean", [1.0], step, "first") == pytest.approx((2 * 3 / 2 + 6 * 1 / 2 + 10 * 2) / (2 + 2))
    assert ours("weighted_mean", [1.0], step, "first") == pytest.approx((2 * 3 + 6 + 10 * 2) / 6)
    assert ours("token_mean", [1.0], step, "first") == pytest.approx((2 * 3 + 6 + 10 * 2) / 3)
    assert ours("sequence_mean_token_sum", [1.0], step, "first") == pytest.approx((2 * 3 + 6 + 10 * 2) / 2)


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


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_factor_for_a_whole_class_is_another_alpha_where_it_must_be(reduction: Reduction) -> None:
    """α'_c = α_c·w_c. `weighted_mean` is the same; `token_mean` and `sequence_mean_token_sum` too, but for their scale, since α'
    adds up to 1; a mean of a class has no factor left; and a reduction by sample divides by the factors, as by no α."""
    draw, by_class = random.Random(4), (0.5, 3.0, 1.0, 2.0)
    for _ in range(20):
        alpha, plain = random_alpha(draw, 4), random_step(draw, 4, "first")
        weighed = [replace(token, factor=by_class[token.classes[0]]) for token in plain]
        products = [a * w for a, w in zip(alpha, by_class, strict=True)]
        other = [product / sum(products) for product in products]
        got, scale = ours(reduction, alpha, weighed, "first"), 1.0
        if reduction in ("token_mean", "sequence_mean_token_sum"):
            scale = sum(products)
        elif reduction in POWERS:
            n, power = Counter(token.sample for token in plain), POWERS[reduction]
            with_w, without = (sum(token.factor / n[token.sample] ** power for token in step) for step in (weighed, plain))
            scale = sum(products) * without / with_w
        want = ours(reduction, alpha if reduction == "class_mean" else other, plain, "first")
        assert got == pytest.approx(scale * want, rel=1e-6)


# class ids


def test_counts_of_literal_ids() -> None:
    first = torch.tensor([[0, 2, -100, 1], [-100, 1, 1 + FIRST_TARGET, 2 + FIRST_TARGET]])
    assert count_classes(first, 3, "first")[0].tolist() == [1, 3, 2, 6, 2]
    bits = torch.tensor([[0b01, 0b11, -100, 0b00], [-100, 0b10, FIRST_TARGET, 0b11 + FIRST_TARGET]])
    assert count_classes(bits, 3, "sum")[0].tolist() == [3, 3, 2, 6, 2]


def test_the_last_bit_is_a_class_and_not_the_mark_of_a_sample() -> None:
    ids = torch.tensor([1 << 61, (1 << 61) + FIRST_TARGET, 0])
    counts = count_classes(ids, 63, "sum")[0].tolist()
    assert (counts[61], counts[62], counts[63], counts[64]) == (2, 1, 3, 1)


def test_counts_beyond_what_a_float_holds_are_exact() -> None:
    ids = torch.zeros(1, dtype=torch.int64).expand(2**24 + 3)
    assert count_classes(ids, 1, "first")[0].tolist() == [2**24 + 3, 2**24 + 3, 0]


def test_sums_over_overlapping_classes_and_over_all() -> None:
    members = Membership.read(torch.tensor([0b01, 0b11, -100, 0]), 3, "sum")
    rows = torch.tensor([[1.0, 10.0, torch.nan, 1000.0]])
    assert members.sums(rows).tolist() == [[11.0, 10.0, 1000.0, 1011.0]]


def test_weights_add_up_over_the_classes_of_a_token() -> None:
    members = Membership.read(torch.tensor([0b01, 0b11, -100, 0]), 3, "sum")
    assert members.weigh(torch.tensor([1.0, 10.0, 100.0])).tolist() == [1.0, 11.0, 0.0, 100.0]
