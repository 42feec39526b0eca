"""What is reported of the tokens of a step, with factors and data sets, beside sums written out token by token."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch

from dwl_plugin.classes.data_codes import encode
from dwl_plugin.loss.class_sums import ClassSums, ForwardMetrics
from dwl_plugin.loss.membership import Membership
from dwl_plugin.values import IGNORE_INDEX, Overlap

NAMES, DATA_SETS = ("a", "b", "rest"), ("math", "org/chat", "not seen")
WEIGHT, TERM, ANCHOR = [0.5, 2.0, 1.0], [0, 1, 0], [0.0, 0.3, 0.1]
CPU = torch.device("cpu")


@dataclass
class Token:
    classes: tuple[int, ...]
    nll: float
    kl: float
    rates: tuple[float, float]
    factor: float
    data_set: int

    def pays(self, c: int) -> float:
        if self.factor < 0:
            return WEIGHT[c] * -self.factor * -math.log(1 - math.exp(-self.nll))
        return WEIGHT[c] * self.factor * (self.rates[TERM[c]] * self.nll + ANCHOR[c] * self.kl)


def tokens_of(draw: random.Random, count: int, overlap: Overlap) -> list[Token]:
    found = []
    for _ in range(count):
        own = [c for c in (0, 1) if draw.random() < 0.5]
        classes = tuple(own[:1] if overlap == "first" else own) or (2,)
        rates = (draw.random(), draw.random())
        factor = draw.choice([0.25, 1.0, 3.0, -0.5, -2.0])
        found.append(Token(classes, draw.expovariate(1) + 1e-3, draw.random(), rates, factor, draw.randint(0, 2)))
    return found


def metrics_of(tokens: list[Token], overlap: Overlap, *, weighs: bool = True, classes_pay: bool = True) -> ForwardMetrics:
    """With a position that is no target before each token."""
    ids = []
    for token in tokens:
        bits = sum(1 << c for c in token.classes if c < 2) if overlap == "sum" else token.classes[0]
        ids += [IGNORE_INDEX, int(encode(token.factor, bits, token.data_set)) if weighs else bits]
    members = Membership.read(torch.tensor(ids), 3, overlap, weighs)

    def spaced(values: list[float]) -> torch.Tensor:
        return torch.tensor([[0.0, value] for value in values], dtype=torch.float64).flatten()

    rates = torch.stack([spaced([token.rates[k] for token in tokens]) for k in (0, 1)])
    return ForwardMetrics(
        members,
        members if classes_pay else members.in_rest(),
        spaced([token.nll for token in tokens]),
        rates,
        torch.tensor(TERM),
        torch.tensor(WEIGHT),
        spaced([token.kl for token in tokens]),
        torch.tensor(ANCHOR),
    )


def reported(tokens: list[Token], classes_pay: bool = True) -> dict[str, float]:
    """As the names of the metrics say it."""
    out: dict[str, float] = {}

    def paid(token: Token, c: int | None = None) -> float:
        classes = token.classes if classes_pay else (2,)
        return sum(map(token.pays, classes)) if c is None else token.pays(c)

    whole = sum(map(paid, tokens))

    def put(before: str, after: str, own: list[Token], loss: float) -> None:
        up, down = [t for t in own if t.factor > 0], [t for t in own if t.factor < 0]
        for row, of in (("nll", lambda t: t.nll), ("p", lambda t: math.exp(-t.nll)), ("kl", lambda t: t.kl)):
            if up:
                out[f"{before}{row}{after}"] = sum(map(of, up)) / len(up)
        if own:
            out[f"{before}factor{after}"] = sum(t.factor for t in own) / len(own)
        if down:
            out[f"{before}p_negative{after}"] = sum(math.exp(-t.nll) for t in down) / len(down)
        if after and (own or "dataset" not in before):
            out[f"{before}token_share{after}"] = len(own) / len(tokens)
            out[f"{before}loss_share{after}"] = loss / whole

    put("dwl/", "", tokens, whole)
    out["nll"] = out.pop("dwl/nll")
    up = [t for t in tokens if t.factor > 0]
    weights = [WEIGHT[c] * t.factor * t.rates[TERM[c]] for t in up for c in (t.classes if classes_pay else (2,))]
    out["dwl/weight"] = sum(weights) / len(up)
    for c, name in enumerate(NAMES):
        own = [t for t in tokens if c in t.classes]
        put("dwl/", f"/{name}", own, sum(paid(t, c) for t in own))
    for d, name in enumerate(DATA_SETS, start=1):
        own = [t for t in tokens if t.data_set == d]
        put("dwl/dataset/", f"/{name}", own, sum(map(paid, own)))
    return out


@pytest.mark.parametrize("classes_pay", [True, False], ids=["paid by class", "measured by class"])
@pytest.mark.parametrize("overlap", get_args(Overlap))
def test_sums_of_micro_batches_and_ranks_are_what_their_names_say(overlap: Overlap, classes_pay: bool) -> None:
    draw = random.Random(0)
    ranks = [[tokens_of(draw, n, overlap) for n in counts] for counts in ((5, 9), (1, 20), ())]
    sums = []
    for batches in ranks:
        own = ClassSums(NAMES, DATA_SETS, factors=True)
        for batch in batches:
            own.add(metrics_of(batch, overlap, classes_pay=classes_pay))
        sums.append(own)
    shared: list[torch.Tensor] = []
    for one in sums[1:]:
        one.take(lambda rows: (shared.append(rows), rows)[1], CPU)
    got = sums[0].take(lambda rows: rows + shared[0] + shared[1], CPU)
    want = reported([t for batches in ranks for batch in batches for t in batch], classes_pay)
    assert got == pytest.approx(want, rel=1e-6)
    assert got.keys() == want.keys()
    assert "dwl/dataset/nll/not seen" not in got


def test_a_controller_sees_the_tokens_that_pay_nll() -> None:
    tokens = [Token((0,), 2.0, 0.0, (1.0, 1.0), 1.0, 1), Token((0,), 9.0, 0.0, (1.0, 1.0), -1.0, 1)]
    count_C, nll_C = ClassSums(NAMES, factors=True).add(metrics_of(tokens, "first"))
    assert (count_C.tolist(), nll_C.tolist()) == ([1.0, 0.0, 0.0], [2.0, 0.0, 0.0])


def test_a_step_of_negative_tokens_alone_has_no_nll_and_is_not_nothing() -> None:
    sums = ClassSums(NAMES, factors=True)
    sums.add(metrics_of([Token((1,), 0.1, 0.0, (1.0, 1.0), -2.0, 0)], "first"))
    got = sums.take(lambda rows: rows, CPU)
    assert got["dwl/p_negative/b"] == pytest.approx(math.exp(-0.1))
    assert got["dwl/loss_share/b"] == 1.0
    assert not {"nll", "dwl/p", "dwl/nll/b", "dwl/weight"} & got.keys()


def test_without_factors_nothing_is_said_of_them_and_all_else_is_the_same() -> None:
    tokens = [replace(token, factor=1.0) for token in tokens_of(random.Random(1), 30, "first")]
    plain, weighed = ClassSums(NAMES), ClassSums(NAMES, factors=True)
    plain.add(metrics_of(tokens, "first", weighs=False))
    weighed.add(metrics_of(tokens, "first"))
    said = weighed.take(lambda rows: rows, CPU)
    assert {key: value for key, value in said.items() if "factor" not in key} == plain.take(lambda rows: rows, CPU)
    assert {value for key, value in said.items() if "factor" in key} == {1.0}


def test_one_data_set_is_not_told_from_itself() -> None:
    sums = ClassSums(NAMES, ("only",))
    sums.add(metrics_of(tokens_of(random.Random(2), 9, "first"), "first"))
    assert not [key for key in sums.take(lambda rows: rows, CPU) if "dataset" in key]
