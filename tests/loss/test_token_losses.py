"""Token losses against the formulas of their papers, and those of other packages."""

from __future__ import annotations

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dwl_plugin.errors import ConfigError
from dwl_plugin.loss.linear_cross_entropy import linear_cross_entropy
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term, TokenLoss, TokenLossOptions, objective_of
from tests.loss.cases import FP32, OBJECTIVES, as_module, errors, random_case, run, terms_case
from tests.loss.mutants import TERM_MISTAKES, mutant, naive
from tests.loss.oracle import per_token


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks")
def test_an_objective_matches_its_formula_in_fp64(name: str, trained: bool, body: str) -> None:
    case = random_case(3, 13, vocab=67, dtype=torch.float64, terms=[Term(OBJECTIVES[name])], softcap=5.0)
    assert max(errors(linear_cross_entropy, case, trained=trained).values()) <= 1e-12
    assert max(errors(as_module, case, trained=trained).values()) <= 1e-12


@pytest.mark.usefixtures("small_blocks")
def test_objectives_side_by_side_match_their_formulas(body: str) -> None:
    case = terms_case(3, 13, objectives=tuple(OBJECTIVES.values()))
    for function in (linear_cross_entropy, as_module):
        assert max(errors(function, case).values()) <= FP32
    wide = terms_case(3, 13, objectives=tuple(OBJECTIVES.values()), dtype=torch.float64)
    for function in (linear_cross_entropy, as_module):
        assert max(errors(function, wide).values()) <= 1e-12


@pytest.mark.parametrize("vocab", [1, 2, 5, 20, 21])
def test_an_entropy_over_more_tokens_than_there_are(vocab: int, body: str) -> None:
    case = terms_case(9, vocab=vocab, ignored=0.0, objectives=(EntropyGate(1.0, 20), EntropyGate(0.5, 4)), dtype=torch.float64)
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case, upstream=1.0)
        torch.testing.assert_close(out.loss, per_token(case).loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads["hidden"], per_token(case).hidden, rtol=1e-10, atol=1e-12)


def test_an_entropy_beside_tokens_masked_out_of_the_vocabulary_is_finite(body: str) -> None:
    case = random_case(7, vocab=22, ignored=0.0, terms=[Term(EntropyGate(1.0, 20))])
    bias = torch.zeros(22)
    bias[3:19] = -torch.inf
    case = replace(case, bias=bias, targets=case.targets % 3)
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case)
        assert out.loss.isfinite()
        assert grads["hidden"] is not None
        assert grads["hidden"].isfinite().all()
        assert 0 < out.factors[0].min() <= out.factors[0].max() <= 1


@pytest.mark.parametrize("objective", [Focal(0.5), Focal(2.0), EntropyGate(1.0, 20)])
@pytest.mark.parametrize("nats", [9.0, 16.0])
def test_a_certain_token_keeps_its_digits_under_other_objectives(objective: TokenLoss, nats: float) -> None:
    case = random_case(6, vocab=5, width=5, ignored=0.0)
    hidden = torch.zeros(6, 5)
    hidden[torch.arange(6), case.targets] = nats + torch.arange(6) / 4
    case = replace(case, hidden=hidden, weight=torch.eye(5), terms=[Term(objective)])
    for function in (linear_cross_entropy, as_module):
        found = errors(function, case)
        assert max(found.values()) <= 2 * FP32


def test_a_token_without_any_probability_pays_a_finite_slope() -> None:
    hidden, weight = torch.tensor([[300.0]]), torch.tensor([[0.0], [1.0]])
    for objective in (Focal(2.0), EntropyGate(1.0, 20), Power(1.0, 0.1, 0.7)):
        terms = [Term(objective)]
        out = linear_cross_entropy(hidden.requires_grad_(), weight, torch.tensor([0]), terms=terms)
        (grad,) = torch.autograd.grad(out.loss, hidden)
        assert grad.isfinite().all()


def test_factors_are_reported_where_the_targets_are() -> None:
    case = random_case(3, 7, terms=[Term(Focal(1.0)), Term(Power(1.0))])
    for function in (linear_cross_entropy, as_module):
        out, _ = run(function, case)
        ignored, p = case.targets == -100, torch.exp(-out.nll)
        focal, dft = out.factors
        torch.testing.assert_close(focal[~ignored], (1 - p)[~ignored])
        torch.testing.assert_close(dft[~ignored], p[~ignored])
        assert focal[ignored].eq(0).all()
        assert dft[ignored].eq(0).all()


def test_axolotls_eaft_is_the_same_without_the_published_normalisation() -> None:
    import math

    eaft = pytest.importorskip("axolotl.monkeypatch.loss.eaft")
    case = random_case(1, 23, vocab=67)
    outputs = type("Outputs", (), {"logits": case.hidden @ case.weight.T})
    labels = F.pad(case.targets, (1, 0), value=-100)[:, :-1]
    theirs = eaft.eaft_loss(outputs, labels)  # shifts by itself
    targets = case.targets.clone()
    targets[:, -1] = -100
    out = linear_cross_entropy(case.hidden, case.weight, targets, terms=[Term(EntropyGate(1.0, 20))])
    torch.testing.assert_close(out.loss / (targets != -100).sum() * math.log(20), theirs, rtol=1e-5, atol=0.0)


TERMS = (Focal(2.0), EntropyGate(0.7, 6), Power(0.5, 0.02, 0.3))


def test_the_naive_terms_pass_where_mutants_must_fail() -> None:
    assert max(errors(naive, terms_case(3, 13, vocab=53, objectives=TERMS)).values()) <= 2 * FP32


@pytest.mark.parametrize("mistake", TERM_MISTAKES)
def test_no_mutant_of_the_objectives_passes(mistake: str) -> None:
    assert max(errors(mutant(mistake), terms_case(3, 13, vocab=53, objectives=TERMS)).values()) > 20 * FP32


# from other packages

MODULE = """
from dataclasses import dataclass

from dwl_plugin.loss.token_losses import TokenLoss, TokenLossOptions
from dwl_plugin.values import Weight


class ClippedOptions(TokenLossOptions):
    exponent: Weight = 1.0
    ceiling: Weight = 0.5


@dataclass(frozen=True)
class Clipped(TokenLoss):
    Options = ClippedOptions
    exponent: float
    ceiling: float

    def __call__(self, token):
        return (token.p**self.exponent).clamp(max=self.ceiling).detach() * token.nll


class NoTokenLoss:
    Options = ClippedOptions
"""
POINTS = """
[dwl_plugin.token_losses]
clipped = dwl_clipped:Clipped
none = dwl_clipped:NoTokenLoss
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dwl_clipped.py").write_text(textwrap.dedent(MODULE))
    info = tmp_path / "clipped-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: clipped\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_a_token_loss_of_another_package_is_paid_with_its_slope() -> None:
    from dwl_clipped import ClippedOptions  # type: ignore[import-not-found]

    clipped = objective_of(ClippedOptions(type="clipped", exponent=0.5, ceiling=0.4))
    case = random_case(3, 7, ignored=0.0, dtype=torch.float64)
    hidden = case.hidden.requires_grad_()
    out = linear_cross_entropy(hidden, case.weight, case.targets, terms=[Term(clipped)])
    nll = torch.nn.functional.cross_entropy((hidden @ case.weight.T).flatten(0, 1), case.targets.flatten(), reduction="none")
    want = ((-nll.detach()).exp().sqrt().clamp(max=0.4) * nll).sum()
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0.0)
    for got, exact in zip(torch.autograd.grad(out.loss, hidden), torch.autograd.grad(want, hidden), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-10, atol=1e-14)


@pytest.mark.usefixtures("installed")
def test_what_is_no_token_loss_is_named() -> None:
    from dwl_clipped import ClippedOptions

    with pytest.raises(ConfigError, match=r"dwl\.token_loss\.type.*derive from `TokenLoss`"):
        objective_of(ClippedOptions(type="none"))
    with pytest.raises(ConfigError, match=r"dwl\.token_loss\.type.*not a known token loss"):
        objective_of(TokenLossOptions(type="clippd"))
