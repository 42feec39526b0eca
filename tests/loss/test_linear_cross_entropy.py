from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings, strategies as st

from dwl_plugin.loss import chunked, fused_walk, matmul
from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.chunked import module_cross_entropy
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Objective, Power, Term
from dwl_plugin.loss.tokens import Targets, terms_of
from tests.loss.mutants import ANCHOR_MISTAKES, MISTAKES, TERM_MISTAKES, mutant, naive
from tests.loss.oracle import Case, per_token, relative

FP32 = 1e-6


def random_case(
    *shape: int,
    vocab: int = 211,
    width: int = 24,
    ignored: float = 0.4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Logits several nats apart, so that neither softmax nor target is uniform."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * 0.7
    targets = torch.randint(0, vocab, shape, generator=g)
    likely = (hidden @ weight.T).argmax(-1)
    targets = torch.where(torch.rand(shape, generator=g) < 0.5, likely, targets)
    targets[torch.rand(shape, generator=g) < ignored] = -100
    return Case(hidden.to(dtype), weight.to(dtype), targets, **options)


def full_case(*shape: int, seed: int = 0, **options: Any) -> Case:
    """Every argument used, different from token to token."""
    case = random_case(*shape, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 1)
    return replace(
        case,
        token_weight=torch.randn(*shape, generator=g) + 0.5,
        exponent=torch.randint(0, 3, shape, generator=g) * 0.6,
        min_weight=torch.rand(*shape, generator=g) * 0.2,
        bias=torch.randn(case.weight.shape[0], generator=g).to(case.weight.dtype),
        softcap=4.0,
        logit_scale=0.6,
    )


OBJECTIVES: dict[str, Objective] = {
    "nll": Power(),
    "exponent": Power(0.4),
    "exponent and floor": Power(1.0, 0.1),
    "threshold": Power(1.0, 0.02, 0.4),
    "threshold of nothing": Power(1.0, 0.0, 1e-9),
    "focal": Focal(2.0),
    "focal below one": Focal(0.5),
    "focal of nothing": Focal(0.0),
    "entropy": EntropyGate(1.0, 20),
    "entropy of three": EntropyGate(0.333, 3),
    "entropy of nothing": EntropyGate(0.0, 20),
}


def terms_case(*shape: int, seed: int = 0, objectives: tuple[Objective, ...] = (), **options: Any) -> Case:
    """Several terms with weights of their own: a token may pay in one of them, in several, or in none."""
    case = full_case(*shape, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 2)
    weights = [torch.rand(*shape, generator=g) * (torch.rand(*shape, generator=g) < 0.6) for _ in objectives]
    terms = [Term(objective, weight) for objective, weight in zip(objectives, weights, strict=True)]
    # A wider cap than in `full_case`: some tokens have to be likely.
    return replace(case, token_weight=None, exponent=0.0, min_weight=0.0, terms=terms, softcap=12.0, logit_scale=0.9)


def anchored_case(*shape: int, seed: int = 0, own_head: bool = True, **options: Any) -> Case:
    """Some way from a base model that may have a head of its own."""
    case = terms_case(*shape, seed=seed, objectives=(Power(1.0), Focal(1.0)), **options)
    g = torch.Generator().manual_seed(seed + 3)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.3 * torch.randn(tensor.shape, generator=g).to(tensor.dtype)

    assert case.bias is not None
    head = (near(case.weight), near(case.bias)) if own_head else None
    weight = torch.rand(*shape, generator=g) * (torch.rand(*shape, generator=g) < 0.8)
    return replace(case, anchor=Anchor(weight, near(case.hidden), head))


def options_of(case: Case) -> dict[str, Any]:
    return {f.name: getattr(case, f.name) for f in fields(case) if f.name not in ("hidden", "weight", "targets", "bias")}


def run(
    loss_function: Callable[..., LinearCrossEntropyOutput], case: Case, *, upstream: float = 0.37, trained: bool = True
) -> tuple[LinearCrossEntropyOutput, dict[str, torch.Tensor | None]]:
    hidden = case.hidden.clone().requires_grad_()
    weight = case.weight.clone().requires_grad_(trained)
    bias = None if case.bias is None else case.bias.clone().requires_grad_(trained)
    out = loss_function(hidden, weight, case.targets, bias=bias, **options_of(case))
    (out.loss * upstream).backward()
    return out, {"hidden": hidden.grad, "weight": weight.grad, "bias": None if bias is None else bias.grad}


def errors(
    loss_function: Callable[..., LinearCrossEntropyOutput], case: Case, *, upstream: float = 0.37, trained: bool = True
) -> dict[str, float]:
    """Relative error of loss, nll and each gradient against the per-token loop; a missing gradient is all wrong."""
    truth = per_token(case)
    out, grads = run(loss_function, case, upstream=upstream, trained=trained)
    found = {"loss": relative(out.loss, truth.loss), "nll": relative(out.nll, truth.nll)}
    for name in ("hidden", "weight", "bias") if trained else ("hidden",):
        want, got = getattr(truth, name), grads[name]
        if want is not None:
            found[name] = float("inf") if got is None else relative(got, want * upstream)
    return found


FLAT = {"terms": None, "token_weight": None, "exponent": 0.0, "min_weight": 0.0}


def as_module(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int | None = 5, **options: Any
) -> LinearCrossEntropyOutput:
    """`module_cross_entropy` behind the signature of `linear_cross_entropy`."""
    bias, softcap, scale = (options.pop(name, None) for name in ("bias", "softcap", "logit_scale"))
    anchor = options.pop("anchor", None)

    def under(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        def head(chunk: torch.Tensor) -> torch.Tensor:
            logits = F.linear(chunk, weight, bias)
            logits = logits if scale is None else logits * scale
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        return head

    if anchor is not None:
        anchor = replace(anchor, head=under(*(anchor.head or (weight.detach(), bias))))
    paid = {name: options.pop(name, default) for name, default in FLAT.items()}
    given = Targets(targets, terms_of(**paid), anchor, options.pop("ignore_index", -100))
    return module_cross_entropy(hidden, under(weight, bias), given, chunk_tokens=chunk_tokens)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several row blocks and several tiles, with shapes that divide nothing evenly."""
    monkeypatch.setitem(fused_walk._ROWS, "cpu", 11)
    monkeypatch.setitem(fused_walk._TILE_BYTES, "cpu", 11 * 4 * 17)
    monkeypatch.setattr(fused_walk, "_LEAST_WIDTH", 16)
    monkeypatch.setattr(matmul, "_WIDTH", 16)


def multiply_with_onednn(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """As on a CPU where oneDNN is the faster one, or as on any other."""
    if on and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "_mkl_is_slow", lambda: on)


@pytest.fixture(params=["cpu", "cpu, oneDNN", "fused"])
def body(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The step of a CPU with either library's products, and the one a GPU compiles, here uncompiled."""
    multiply_with_onednn(monkeypatch, request.param == "cpu, oneDNN")
    if request.param == "fused":
        monkeypatch.setattr(fused_walk, "_fuses", lambda device: True)
        monkeypatch.setattr(fused_walk, "_fused_step", lambda: fused_walk._step_fused)
    return str(request.param)


CASES = {
    "plain": random_case(3, 13),
    "everything": full_case(3, 13),
    "nothing ignored": random_case(29, ignored=0.0),
    "dft": random_case(2, 17, exponent=1.0),
    "dft with a floor": random_case(2, 17, exponent=1.0, min_weight=0.1),
    "bias": full_case(19, vocab=97),
    "one token": random_case(1, ignored=0.0),
    "no leading shape": random_case(ignored=0.0),
    "seven tokens": full_case(7, ignored=0.0),
    "vocabulary of one": random_case(5, vocab=1, ignored=0.0),
    "vocabulary of two": full_case(5, vocab=2, ignored=0.0),
    "hidden size of one": full_case(5, width=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks")
def test_matches_the_loop_over_tokens_in_fp32(case: Case, trained: bool, body: str) -> None:
    assert max(errors(linear_cross_entropy, case, trained=trained).values()) <= FP32


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_default_blocks_match_the_loop_over_tokens(case: Case) -> None:
    assert max(errors(linear_cross_entropy, case).values()) <= FP32


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_module_path_matches_the_loop_over_tokens(case: Case) -> None:
    assert max(errors(as_module, case).values()) <= FP32


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
def test_fp64_is_computed_in_fp64(function: Callable[..., LinearCrossEntropyOutput]) -> None:
    assert max(errors(function, full_case(3, 13, dtype=torch.float64)).values()) <= 1e-13


def mutant_case() -> Case:
    return full_case(3, 13, vocab=53)


def test_the_naive_loss_passes_where_mutants_must_fail() -> None:
    assert max(errors(naive, mutant_case()).values()) <= FP32


@pytest.mark.parametrize("mistake", MISTAKES)
def test_no_mutant_passes(mistake: str) -> None:
    assert max(errors(mutant(mistake), mutant_case()).values()) > 10 * FP32


# other objectives


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
def test_a_certain_token_keeps_its_digits_under_other_objectives(objective: Objective, nats: float) -> None:
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


# the anchor to a base model


@pytest.mark.parametrize("own_head", [False, True])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks")
def test_an_anchor_matches_its_formula_in_fp64(own_head: bool, trained: bool, body: str) -> None:
    case = anchored_case(3, 13, vocab=67, own_head=own_head, dtype=torch.float64)
    for function in (linear_cross_entropy, as_module):
        assert max(errors(function, case, trained=trained).values()) <= 1e-12
        out, _ = run(function, case, trained=trained)
        assert out.kl is not None
        torch.testing.assert_close(out.kl, per_token(case).kl, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("small_blocks")
def test_an_anchor_matches_its_formula_in_fp32(body: str) -> None:
    for case in (anchored_case(3, 13), replace(anchored_case(3, 13), softcap=None, logit_scale=None)):
        for function in (linear_cross_entropy, as_module):
            assert max(errors(function, case).values()) <= 2 * FP32


def test_a_model_that_is_still_its_base_has_no_kl_and_no_pull(body: str) -> None:
    case = random_case(3, 13, terms=[Term(Power(), torch.zeros(3, 13))])
    case = replace(case, anchor=Anchor(torch.ones(3, 13), case.hidden))
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case, trained=False)
        assert out.loss.item() == pytest.approx(0.0, abs=1e-6 * int((case.targets != -100).sum()))
        assert grads["hidden"] is not None
        assert grads["hidden"].abs().max() <= 1e-5


def test_an_anchor_without_targets_is_zero_with_a_graph() -> None:
    case = anchored_case(2, 3, ignored=1.1)
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case)
        assert out.loss.item() == 0.0
        assert out.kl is not None
        assert out.kl.eq(0).all()
        assert all(g is not None and g.eq(0).all() for g in grads.values())


def test_tokens_masked_out_of_both_vocabularies_add_nothing_to_the_kl(body: str) -> None:
    case = anchored_case(9, vocab=23, ignored=0.0, own_head=False)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[3] = -torch.inf
    case = replace(case, bias=bias, softcap=None, targets=torch.where(case.targets == 3, 4, case.targets))
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case)
        assert out.loss.isfinite()
        assert grads["hidden"] is not None
        assert grads["hidden"].isfinite().all()


def test_the_naive_anchor_passes_where_mutants_must_fail() -> None:
    assert max(errors(naive, anchored_case(3, 13, vocab=53)).values()) <= 2 * FP32


@pytest.mark.parametrize("mistake", ANCHOR_MISTAKES)
def test_no_mutant_of_the_anchor_passes(mistake: str) -> None:
    assert max(errors(mutant(mistake), anchored_case(3, 13, vocab=53)).values()) > 20 * FP32


@pytest.mark.parametrize(
    ("function", "head", "message"),
    [
        (linear_cross_entropy, F.relu, "anchor.head must be None or"),
        (linear_cross_entropy, (torch.zeros(5, 24), None), r"\(V, H\) weight with V = 211"),
    ],
)
def test_an_anchor_that_does_not_fit_is_named(function: Callable[..., LinearCrossEntropyOutput], head: Any, message: str) -> None:
    case = random_case(3, 7)
    with pytest.raises(ValueError, match=message):
        run(function, replace(case, anchor=Anchor(torch.ones(3, 7), case.hidden, head)))
    with pytest.raises(ValueError, match=r"anchor\.hidden must have the leading shape"):
        run(function, replace(case, anchor=Anchor(torch.ones(3, 7), case.hidden[:2])))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tokens=st.integers(0, 23),
    vocab=st.sampled_from([1, 2, 3, 17, 101]),
    width=st.sampled_from([1, 5, 8]),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    everything=st.booleans(),
    objectives=st.lists(st.sampled_from(sorted(OBJECTIVES)), max_size=3),
    trained=st.booleans(),
    seed=st.integers(0, 999),
)
def test_matches_the_loop_for_any_shape(
    tokens: int, vocab: int, width: int, ignored: float, everything: bool, objectives: list[str], trained: bool, seed: int
) -> None:
    options: dict[str, Any] = {"vocab": vocab, "width": width, "ignored": ignored, "seed": seed, "dtype": torch.float64}
    make = full_case if everything else random_case
    if objectives:
        make, options["objectives"] = terms_case, tuple(OBJECTIVES[name] for name in objectives)
    case = make(tokens, **options)
    truth = per_token(case)
    for function in (linear_cross_entropy, as_module):
        out, grads = run(function, case, upstream=1.0, trained=trained)
        torch.testing.assert_close(out.loss, truth.loss, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(out.nll, truth.nll, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(grads["hidden"], truth.hidden, rtol=1e-10, atol=1e-12)
        if trained:
            torch.testing.assert_close(grads["weight"], truth.weight, rtol=1e-10, atol=1e-12)


# half precision


@pytest.fixture(params=[False, True], ids=["bf16 emulated", "bf16 in hardware"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without instructions for bf16, and one with them."""
    if request.param and not matmul._multiplies_bf16():
        pytest.skip("this CPU has no instructions for bf16")
    monkeypatch.setattr(matmul, "_multiplies_bf16", lambda: request.param)


def naive_in(dtype: torch.dtype) -> Callable[..., LinearCrossEntropyOutput]:
    def loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, **options: Any) -> LinearCrossEntropyOutput:
        return naive(hidden.to(dtype), weight.to(dtype), targets, **options)

    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
# Autograd adds the weight gradients of several chunks in the weight's dtype, so the module path gets one.
@pytest.mark.parametrize("function", [linear_cross_entropy, partial(as_module, chunk_tokens=None)])
@pytest.mark.usefixtures("processor")
def test_half_precision_is_no_worse_than_naive(dtype: torch.dtype, function: Callable[..., LinearCrossEntropyOutput]) -> None:
    case = full_case(3, 13, dtype=dtype)
    ours, theirs = errors(function, case), errors(naive, case)
    assert all(ours[name] <= theirs[name] * 1.05 + FP32 for name in ours), (ours, theirs)


@pytest.mark.usefixtures("small_blocks", "processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_only_rounds_the_result_on_a_cpu(dtype: torch.dtype) -> None:
    found = errors(linear_cross_entropy, full_case(3, 13, dtype=dtype))
    assert found["loss"] <= FP32
    assert found["nll"] <= FP32
    assert found["hidden"] <= 2e-3
    assert found["weight"] <= 2e-3


def test_gradients_and_results_have_their_dtypes() -> None:
    case = full_case(3, 5, dtype=torch.bfloat16)
    out, grads = run(linear_cross_entropy, case)
    assert (out.loss.dtype, out.nll.dtype) == (torch.float32, torch.float32)
    assert {g.dtype for g in grads.values() if g is not None} == {torch.bfloat16}
    assert not out.nll.requires_grad


def test_bf16_hidden_with_an_fp32_head_multiplies_in_fp32() -> None:
    case = full_case(3, 13)
    case = replace(case, hidden=case.hidden.bfloat16())
    found = errors(linear_cross_entropy, case)
    assert found["weight"] <= FP32
    assert found["hidden"] <= 2e-3  # returned in bf16


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("spread", [0.05, 0.2, 0.7])
def test_bf16_gradients_are_as_good_as_bf16_can_hold(spread: float) -> None:
    """Logits of one to twenty nats, half of the targets likely: the loss in bf16 is off by up to 2 % here."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(300, 576, generator=g), torch.randn(2048, 576, generator=g) * spread
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    likely = (hidden.float() @ weight.float().T).argmax(1)
    targets = torch.where(torch.rand(300, generator=g) < 0.5, likely, torch.randint(0, 2048, (300,), generator=g))
    case = Case(hidden, weight, targets)
    _, grads = run(linear_cross_entropy, case, upstream=1.0)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum").backward()
    for got, want in zip((grads["hidden"], grads["weight"]), exact, strict=True):
        assert got is not None
        assert want.grad is not None
        assert relative(got, want.grad) <= 2e-3


def test_autocast_multiplies_in_its_dtype() -> None:
    case = full_case(3, 13)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, grads = run(linear_cross_entropy, case)
    rounded = replace(case, hidden=case.hidden.bfloat16(), weight=case.weight.bfloat16(), bias=case.bias.bfloat16())  # type: ignore[union-attr]
    truth = per_token(rounded)
    assert relative(found.loss, truth.loss) <= FP32
    assert grads["weight"] is not None
    assert grads["weight"].dtype == torch.float32
    assert relative(grads["weight"], truth.weight * 0.37) <= FP32


def test_small_fp16_weights_do_not_underflow_before_they_are_scaled() -> None:
    case = random_case(2, 9, dtype=torch.float16, token_weight=torch.full((2, 9), 1e-7))
    assert errors(linear_cross_entropy, case, upstream=2.0**20)["hidden"] <= 2e-3


# the ends of the range


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
@pytest.mark.parametrize("nats", [9.0, 16.0, 40.0])
def test_a_certain_token_keeps_its_digits(function: Callable[..., LinearCrossEntropyOutput], nats: float) -> None:
    case = random_case(6, vocab=5, width=5, ignored=0.0)
    hidden, weight = torch.zeros(6, 5), torch.eye(5)
    hidden[torch.arange(6), case.targets] = nats + torch.arange(6) / 4
    case = replace(case, hidden=hidden, weight=weight, exponent=1.0)
    found = errors(function, case)
    assert 0 < per_token(case).nll.max() < 1e-3
    assert max(found.values()) <= FP32


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
@pytest.mark.parametrize("size", [1e4, 1e20, 1e37])
@pytest.mark.usefixtures("small_blocks")
def test_huge_logits_are_finite_and_right(function: Callable[..., LinearCrossEntropyOutput], size: float) -> None:
    case = random_case(9, vocab=61, width=7)
    case = replace(case, hidden=torch.sign(case.hidden) * size, weight=torch.sign(case.weight).round(), exponent=1.0)
    out, grads = run(function, case)
    truth = per_token(case)
    assert out.loss.isfinite()
    assert relative(out.nll, truth.nll) <= FP32
    for name in ("hidden", "weight"):
        assert grads[name] is not None
        torch.testing.assert_close(grads[name], getattr(truth, name).float() * 0.37, rtol=1e-5, atol=1e-30)


def test_exponent_zero_is_weight_one_where_p_underflows() -> None:
    hidden, weight = torch.tensor([[200.0]]), torch.tensor([[0.0], [1.0]])
    for exponent in (0.0, torch.zeros(1)):
        assert linear_cross_entropy(hidden, weight, torch.tensor([0]), exponent=exponent).loss.item() == 200.0


def test_a_reference_that_keeps_rising_is_followed(small_blocks: None, body: str) -> None:
    """Each tile of the vocabulary exceeds the one before by more than fp32 can exponentiate."""
    case = random_case(8, vocab=101, width=3, ignored=0.0)
    ramp = torch.arange(101)[:, None] * torch.ones(1, 3) * 9
    case = replace(case, hidden=case.hidden.abs() + 1, weight=ramp)
    assert max(errors(linear_cross_entropy, case).values()) <= FP32


def test_a_token_masked_out_of_the_vocabulary_costs_nothing(body: str) -> None:
    case = full_case(2, 9)
    assert case.bias is not None
    bias = case.bias.clone()
    bias[3] = -torch.inf
    case = replace(case, bias=bias, softcap=None, targets=torch.where(case.targets == 3, -100, case.targets))
    out, grads = run(linear_cross_entropy, case)
    assert out.loss.isfinite()
    assert grads["weight"] is not None
    assert grads["weight"].isfinite().all()
    assert grads["weight"][3].eq(0).all()


@pytest.mark.usefixtures("small_blocks")
def test_nan_in_hidden_is_not_hidden(body: str) -> None:
    case = random_case(12, ignored=0.0)
    case.hidden[5, 0] = torch.nan
    out, _ = run(linear_cross_entropy, case)
    assert out.loss.isnan()
    assert out.nll.isnan().nonzero().tolist() == [[5]]


# nothing to learn from


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
@pytest.mark.parametrize("shape", [(0,), (2, 0), (7,), (2, 3)])
def test_without_targets_the_loss_is_zero_with_a_graph(
    function: Callable[..., LinearCrossEntropyOutput], shape: tuple[int, ...]
) -> None:
    case = full_case(*shape, ignored=1.1)
    out, grads = run(function, case)
    assert out.loss.item() == 0.0
    assert out.nll.shape == torch.Size(shape)
    assert all(g is not None and g.eq(0).all() for g in grads.values())
    assert grads["hidden"] is not None
    assert grads["hidden"].shape == case.hidden.shape


def test_ignored_positions_get_zero_gradient_and_zero_nll() -> None:
    case = random_case(4, 9)
    out, grads = run(linear_cross_entropy, case)
    ignored = case.targets == -100
    assert grads["hidden"] is not None
    assert out.nll[ignored].eq(0).all()
    assert grads["hidden"][ignored].eq(0).all()


def test_ignored_positions_may_hold_nan() -> None:
    case = random_case(4, 9)
    case.hidden[case.targets == -100] = torch.nan
    out, grads = run(linear_cross_entropy, case)
    assert out.loss.isfinite()
    assert grads["weight"] is not None
    assert grads["weight"].isfinite().all()


def test_another_ignore_index() -> None:
    case = random_case(4, 9)
    other = replace(case, targets=torch.where(case.targets == -100, 7, case.targets), ignore_index=7)
    same = replace(case, targets=torch.where(other.targets == 7, -100, other.targets))
    assert run(linear_cross_entropy, other)[0].loss == run(linear_cross_entropy, same)[0].loss


# a guest of autograd


def test_inputs_are_left_as_they_are() -> None:
    case = full_case(3, 7)
    before = {f.name: getattr(case, f.name) for f in fields(case)}
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in before.items()}
    with torch.no_grad():
        linear_cross_entropy(case.hidden, case.weight, case.targets, bias=case.bias, **options_of(case))
    run(linear_cross_entropy, case)
    for name, value in before.items():
        assert torch.equal(value, copies[name]) if isinstance(value, torch.Tensor) else value == copies[name]


@pytest.fixture(params=[False, True], ids=["mm", "oneDNN"])
def matmuls_taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """[how many so far]"""
    multiply_with_onednn(monkeypatch, request.param)
    count = [0]
    for owner, name in ((torch, "mm"), (torch, "addmm"), (matmul, "_onednn")):
        original = getattr(owner, name)

        def counted(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            count[0] += 1
            return _original(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)
    return count


@pytest.mark.parametrize(
    ("hidden_learns", "weight_learns", "matmuls"), [(False, False, 1), (True, False, 2), (False, True, 2), (True, True, 3)]
)
def test_takes_no_more_matmuls_than_gradients_asked_for(
    matmuls_taken: list[int], hidden_learns: bool, weight_learns: bool, matmuls: int
) -> None:
    case, count = random_case(3, 7), matmuls_taken
    hidden, weight = case.hidden.requires_grad_(hidden_learns), case.weight.requires_grad_(weight_learns)
    out = linear_cross_entropy(hidden, weight, case.targets)
    assert count[0] == matmuls
    assert out.loss.requires_grad == (hidden_learns or weight_learns)
    if out.loss.requires_grad:
        out.loss.backward()
        assert (hidden.grad is not None, weight.grad is not None) == (hidden_learns, weight_learns)
        assert count[0] == matmuls


def test_no_grad_takes_one_matmul(matmuls_taken: list[int]) -> None:
    case, count = random_case(3, 7), matmuls_taken
    with torch.no_grad():
        out = linear_cross_entropy(case.hidden.requires_grad_(), case.weight.requires_grad_(), case.targets)
    assert count[0] == 1
    assert not out.loss.requires_grad


def test_bias_alone_can_learn() -> None:
    case = full_case(3, 7)
    assert case.bias is not None
    bias = case.bias.clone().requires_grad_()
    linear_cross_entropy(case.hidden, case.weight, case.targets, bias=bias, **options_of(case)).loss.backward()
    truth = per_token(case).bias
    assert truth is not None
    assert bias.grad is not None
    assert relative(bias.grad, truth) <= FP32


@pytest.mark.parametrize("function", [linear_cross_entropy, as_module])
def test_backward_twice_gives_the_same_gradient_twice(function: Callable[..., LinearCrossEntropyOutput]) -> None:
    case = full_case(3, 7)
    hidden, weight = case.hidden.requires_grad_(), case.weight.requires_grad_()
    loss = function(hidden, weight, case.targets, bias=case.bias, **options_of(case)).loss
    first = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(0.5))
    for a, b, c in zip(first, second, kept, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_differentiating_twice_is_an_error() -> None:
    case = random_case(3, 7)
    hidden = case.hidden.requires_grad_()
    for function in (linear_cross_entropy, as_module):
        loss = function(hidden, case.weight, case.targets).loss
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, hidden, create_graph=True)


def test_weights_get_no_gradient() -> None:
    case = full_case(3, 7)
    assert isinstance(case.token_weight, torch.Tensor)
    weight = case.token_weight.requires_grad_()
    run(linear_cross_entropy, case)
    assert weight.grad is None


def test_one_leaf_as_hidden_and_weight_adds_its_gradients() -> None:
    tied = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([1, 0, 5, -100, 2, 3])
    linear_cross_entropy(tied, tied, targets).loss.backward()
    truth = per_token(Case(tied, tied, targets))
    assert tied.grad is not None
    assert relative(tied.grad, truth.hidden + truth.weight) <= FP32


def test_a_transposed_or_sliced_input_is_fine() -> None:
    case = full_case(3, 7)
    strided = replace(case, hidden=case.hidden.transpose(0, 1).contiguous().transpose(0, 1))
    strided.weight = torch.stack([case.weight, case.weight], 2)[:, :, 0]
    assert max(errors(linear_cross_entropy, strided).values()) <= FP32


def test_module_path_reaches_parameters_with_one_chunk_of_logits_at_a_time() -> None:
    case, seen = random_case(4, 9), []
    down, up = torch.nn.Linear(24, 2, bias=False), torch.nn.Linear(2, 211, bias=False)

    def head(chunk: torch.Tensor) -> torch.Tensor:
        seen.append(chunk.shape[0])
        return F.linear(chunk, case.weight) + up(down(chunk))

    out = module_cross_entropy(case.hidden, head, Targets(case.targets, [Term(Power(1.0))]), chunk_tokens=4, vocab_size=211)
    out.loss.backward()
    merged = (case.weight + up.weight @ down.weight).detach()
    truth = per_token(replace(case, weight=merged, exponent=1.0))
    assert max(seen) <= 4
    assert up.weight.grad is not None
    assert relative(up.weight.grad, truth.weight @ down.weight.T.double()) <= FP32


def test_module_path_repeats_dropout_in_its_backward() -> None:
    case = random_case(4, 9)
    weight = case.weight.clone().requires_grad_()
    masks: list[torch.Tensor] = []

    def head(chunk: torch.Tensor) -> torch.Tensor:
        dropped = F.dropout(chunk, 0.5)
        masks.append(dropped.detach().clone())
        return F.linear(dropped, weight)

    module_cross_entropy(case.hidden, head, Targets(case.targets), chunk_tokens=100, vocab_size=211).loss.backward()
    masks.clear()
    module_cross_entropy(case.hidden, head, Targets(case.targets), chunk_tokens=12, vocab_size=211).loss.backward()
    half = len(masks) // 2
    for forward in masks[:half]:
        assert any(torch.equal(forward, again) for again in masks[half:])


def test_module_path_without_grad_keeps_no_graph() -> None:
    case = random_case(4, 9)
    with torch.no_grad():
        out = module_cross_entropy(case.hidden, lambda h: h @ case.weight.T, Targets(case.targets))
    assert not out.loss.requires_grad
    assert relative(out.nll, per_token(case).nll) <= FP32


def plan_of(tokens: int, vocab: int, width: int, trained: bool) -> fused_walk._Plan:
    operands = matmul.Operands(torch.float32, torch.float32)
    return fused_walk._plan(tokens, vocab, width, trained, 1, operands, torch.device("cpu"))


@pytest.mark.parametrize("tokens", [1, 330, 1000, 8192, 100_000])
@pytest.mark.parametrize("vocab", [1, 257, 151_936, 1_000_003])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("onednn", [False, True])
def test_workspace_is_bounded_whatever_the_shape(
    tokens: int, vocab: int, trained: bool, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply_with_onednn(monkeypatch, onednn)
    plan = plan_of(tokens, vocab, 64, trained)
    tile = 4 * plan.rows * plan.width
    least = matmul._WIDTH if onednn else fused_walk._LEAST_WIDTH
    assert tile <= max(fused_walk._TILE_BYTES["cpu"] * 1.01, 4 * plan.rows * least)
    assert plan.rows <= 1024
    if trained:
        assert plan.rows <= (16 if onednn else 4) or 4 * plan.rows * vocab <= 4 * max(64 * 2**20, vocab * 64)
    covered = [i for block in plan.blocks() for i in (block.start, block.stop)]
    assert covered == sorted(covered)
    assert (covered[0], covered[-1]) == (0, tokens)
    assert sum(b.stop - b.start for b in plan.blocks()) == tokens
    assert sum(t.stop - t.start for t in plan.tiles()) == vocab


@pytest.mark.parametrize("vocab", [49_152, 151_936])
@pytest.mark.parametrize("trained", [False, True])
def test_products_that_remember_shapes_are_asked_for_few(vocab: int, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of any size up to 8,192 tokens: what oneDNN would keep for each new shape stays bounded."""
    multiply_with_onednn(monkeypatch, True)
    shapes = set()
    for tokens in range(1, 8193):
        plan = plan_of(tokens, vocab, 576, trained)
        rows = {matmul._rows_of_onednn(torch.empty(block.stop - block.start, 1)) for block in plan.blocks()}
        shapes |= {(R, tile.stop - tile.start) for R in rows if R for tile in plan.tiles()}
    assert len(shapes) <= 72


def test_rows_that_onednn_leaves_over_are_multiplied_too(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_with_onednn(monkeypatch, True)
    for case in (full_case(5, 7), anchored_case(5, 7), random_case(21, ignored=0.0, exponent=1.0)):
        case = replace(case, hidden=case.hidden.clone())
        case.hidden.view(-1, 24)[-1] = torch.inf  # ignored, so it is nowhere
        case.targets.view(-1)[-1] = -100
        out, grads = run(linear_cross_entropy, case)
        truth = per_token(case)
        assert relative(out.loss, truth.loss) <= 2 * FP32
        assert out.nll.shape == case.targets.shape
        assert grads["weight"] is not None
        assert relative(grads["weight"], truth.weight * 0.37) <= 2 * FP32


def test_the_users_word_against_onednn_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_with_onednn(monkeypatch, True)
    monkeypatch.setattr(matmul, "_multiplies_bf16", lambda: True)
    monkeypatch.delattr(matmul, "_onednn")
    with torch.backends.mkldnn.flags(enabled=False):
        run(linear_cross_entropy, random_case(3, 7))
        run(linear_cross_entropy, random_case(3, 7, dtype=torch.bfloat16))


# what is not allowed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3, 6, dtype=torch.long)}, r"targets must have the leading shape of hidden, \(3, 7\)"),
        ({"targets": torch.zeros(3, 7)}, "targets must be integer token ids, got torch.float32"),
        ({"targets": torch.full((3, 7), 211)}, r"targets must be -100 \(ignored\) or in \[0, 211\), got 211"),
        ({"targets": torch.full((3, 7), -1)}, "got -1"),
        ({"hidden": torch.zeros(3, 7, 5)}, r"weight must be floating \(V, H\) with the H of hidden"),
        ({"hidden": torch.zeros(3, 7, 24, dtype=torch.long)}, "hidden must be floating"),
        ({"weight": torch.zeros(24)}, "weight must be floating"),
        ({"weight": torch.zeros(0, 24)}, "weight must have at least one row"),
        ({"bias": torch.zeros(210)}, r"bias must be floating \(211,\)"),
        ({"min_weight": -0.1}, "min_weight must be a finite number of at least 0.*got -0.1"),
        ({"min_weight": torch.full((3, 7), -0.5)}, "min_weight must be finite and at least 0, got -0.5"),
        ({"exponent": -1.0}, "exponent must be a finite number of at least 0.*got -1.0"),
        ({"exponent": float("nan")}, "exponent must be a finite number.*got nan"),
        ({"exponent": "1"}, "exponent must be a finite number.*got '1'"),
        ({"exponent": torch.zeros(7)}, r"exponent must have the shape of targets, \(3, 7\), got \(7,\)"),
        ({"token_weight": torch.ones(3)}, r"token_weight must have the shape of targets, \(3, 7\), got \(3,\)"),
        ({"token_weight": 2.0}, "token_weight must be None or a tensor"),
        ({"softcap": 0.0}, "softcap must be a finite number above 0, got 0.0"),
        ({"logit_scale": float("inf")}, "logit_scale must be a finite number, got inf"),
    ],
)
def test_errors_name_the_argument_and_what_is_allowed(change: dict[str, Any], message: str) -> None:
    case = random_case(3, 7, ignored=0.0)
    arguments: dict[str, Any] = {"hidden": case.hidden, "weight": case.weight, "targets": case.targets, **change}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**arguments)


def test_module_path_refuses_an_empty_chunk() -> None:
    case = random_case(3, 7)
    with pytest.raises(ValueError, match="chunk_tokens must be a positive integer or None, got 0"):
        module_cross_entropy(case.hidden, lambda h: h @ case.weight.T, Targets(case.targets), chunk_tokens=0)


def test_a_compiler_that_fails_is_reported_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Any) -> Any:
        def raises(*args: Any) -> Any:
            raise RuntimeError("no compiler here")

        return raises

    monkeypatch.setattr(fused_walk.torch, "compile", broken)
    monkeypatch.setattr(fused_walk, "_fuses", lambda device: True)
    fused_walk._fused_step.cache_clear()
    case = full_case(3, 7)
    try:
        with pytest.warns(UserWarning, match="no compiler here"):
            assert max(errors(linear_cross_entropy, case).values()) <= FP32
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(linear_cross_entropy, case)  # said once
    finally:
        fused_walk._fused_step.cache_clear()


def test_the_module_path_has_a_budget() -> None:
    assert set(chunked._CHUNK_BYTES) == {"cpu", "cuda"}
