"""Cases of the loss, and what it gives on them beside the loop over tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dwl_plugin.loss import matmul
from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.chunked import module_cross_entropy
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term, TokenLoss
from dwl_plugin.loss.tokens import Targets, terms_of
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


def one_target(case: Case) -> Case:
    """The last token of the vocabulary, at one position; (3, 7) positions or more."""
    targets = torch.full_like(case.targets, -100)
    targets[1, 4] = len(case.weight) - 1
    return replace(case, targets=targets)


def decided(nats: float, *, tokens: int) -> Case:
    """The target is `nats` above every other token, or as far below one of them."""
    case = random_case(6, vocab=tokens, width=tokens, ignored=0.0)
    hidden = torch.zeros(6, tokens)
    hidden[torch.arange(6), case.targets] = nats
    return replace(case, hidden=hidden, weight=torch.eye(tokens), exponent=0.5)


def masked(case: Case, *tokens: int) -> Case:
    """These are out of the vocabulary, by their biases, and none of them is a target."""
    assert case.bias is not None
    bias = case.bias.clone()
    bias[list(tokens)] = -torch.inf
    return replace(case, bias=bias, targets=torch.where(torch.isin(case.targets, torch.tensor(tokens)), -100, case.targets))


OBJECTIVES: dict[str, TokenLoss] = {
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


def terms_case(*shape: int, seed: int = 0, objectives: tuple[TokenLoss, ...] = (), **options: Any) -> Case:
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


def unlikely_case(*shape: int, seed: int = 0, **options: Any) -> Case:
    """Beside several terms and an anchor some tokens, the likeliest among them, that are to become unlikely and pay in no term."""
    case = anchored_case(*shape, seed=seed, **options)
    g = torch.Generator().manual_seed(seed + 4)
    unlikely = torch.rand(*shape, generator=g) < 0.5
    assert case.terms is not None
    assert case.anchor is not None
    terms = [Term(term.objective, torch.where(unlikely, 0.0, term.weight)) for term in case.terms]  # type: ignore[arg-type]
    anchor = replace(case.anchor, weight=torch.where(unlikely, 0.0, case.anchor.weight))
    weight = torch.where(unlikely & (case.targets != case.ignore_index), torch.rand(*shape, generator=g) * 3, 0.0)
    return replace(case, terms=terms, anchor=anchor, unlikelihood=weight)


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
    anchor, unlikely = options.pop("anchor", None), options.pop("unlikelihood", None)

    def under(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        def head(chunk: torch.Tensor) -> torch.Tensor:
            logits = F.linear(chunk, weight, bias)
            logits = logits if scale is None else logits * scale
            return logits if softcap is None else softcap * torch.tanh(logits / softcap)

        return head

    if anchor is not None:
        anchor = replace(anchor, head=under(*(anchor.head or (weight.detach(), bias))))
    paid = {name: options.pop(name, default) for name, default in FLAT.items()}
    given = Targets(targets, terms_of(**paid), anchor, options.pop("ignore_index", -100), unlikely)
    return module_cross_entropy(hidden, under(weight, bias), given, chunk_tokens=chunk_tokens)


def multiply_with_onednn(monkeypatch: pytest.MonkeyPatch, on: bool) -> None:
    """As on a CPU where oneDNN is the faster one, or as on any other."""
    if on and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(matmul, "_mkl_is_slow", lambda: on)
