"""The kernels of the loss, interpreted: beside their torch twin in fp64, beside the definition, and with mistakes in them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dwl_plugin.loss import gpu_walk, linear_cross_entropy as function_module
from dwl_plugin.loss.linear_cross_entropy import linear_cross_entropy
from dwl_plugin.loss.step import BaseRows, Form, Products, Slopes, SoftmaxRows, Steps, TopRows, TorchSteps
from dwl_plugin.loss.token_losses import EntropyGate, Focal
from tests.loss.cases import anchored_case, decided, errors, full_case, masked, one_target, random_case, run, terms_case
from tests.loss.conftest import INTERPRETED
from tests.loss.interpreted import mutated, off
from tests.loss.mutants import naive
from tests.loss.oracle import Case, per_token, relative

pytest.importorskip("triton")
if not INTERPRETED:
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl
from triton.runtime import interpreter

from dwl_plugin.loss import step_kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROWS = 5
BY = 3.0


@pytest.fixture(autouse=True)
def rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts off what bf16 cannot hold, where a GPU rounds."""
    original = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(data.copy()).bfloat16().view(torch.uint16).numpy()
        return original(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


@dataclass(frozen=True)
class Job:
    """Five rows that go through a vocabulary, tile by tile, and then once more for the gradient in their logits."""

    tiles: tuple[int, ...] = (5000,)
    hidden: int = 7
    operand: torch.dtype = FP32
    multiplied: torch.dtype = FP32
    """What the head is rounded to before anything else."""
    softcap: float | None = None
    scale: float = 1.0
    bias: bool = False
    anchor: bool = False
    rise: float = 0.0
    """Nats from tile to tile: for the five rows none of it, 0.3, 1, 2 and −1 times as much."""
    masked: bool = False
    """Some tokens are at −inf, more of them under the base; one row has nothing else in its first tile."""
    spread: bool = False
    """One target is far above all others, one far below."""
    top: int = 0
    asks_all: bool = True
    ties: bool = False
    compacted: bool = False
    transposed: bool = False
    """How the head lies in memory."""
    by: bool = False
    gradients: bool = True

    @property
    def form(self) -> Form:
        half = self.operand == FP16
        return Form(self.scale / (self.softcap or 1.0), self.softcap, lag=4.0 if half else 8.0, lift=6.0 if half else 0.0)

    @property
    def tolerance(self) -> float:
        if self.operand != FP32:
            return torch.finfo(self.operand).eps
        return 4e-6 if self.softcap is None else 1e-5  # what torch is off by in fp32, which has 2e-6 between two numbers at 30 nats


JOBS = {
    "plain": Job(),
    "softcap": Job(tiles=(3000, 2049), softcap=30.0, scale=4.0, bias=True),
    "fp16 alone": Job(tiles=(2500, 2500), operand=FP16, rise=10.0, bias=True, by=True),
    "bf16 alone": Job(tiles=(2500, 2500), operand=BF16, rise=20.0, softcap=60.0, scale=3.0),
    "fp16": Job(tiles=(2500, 2500), operand=FP16, rise=10.0, anchor=True, bias=True, by=True, compacted=True),
    "anchor under a softcap": Job(tiles=(2049, 2, 900), anchor=True, softcap=30.0, rise=10.0),
    "top with ties": Job(tiles=(4097, 3), top=5, ties=True),
    "several tiles": Job(tiles=(5000, 4999, 1, 2049), rise=10.0, hidden=1030),
    "negative scale": Job(tiles=(2500, 2500), scale=-0.7, bias=True, rise=6.0),
    "anchor": Job(tiles=(2500, 2500, 3), anchor=True, bias=True, scale=0.8, rise=9.0, hidden=1030),
    "masked": Job(tiles=(3, 2500, 2500), masked=True, anchor=True),
    "target above and below": Job(tiles=(2500, 2500), spread=True),
    "top": Job(tiles=(5000, 4999), top=20, asks_all=False),
    "top under a softcap": Job(tiles=(700, 900), top=3, softcap=10.0, scale=3.0, bias=True),
    "top of as many as there are": Job(tiles=(2, 1), top=3),
    "compacted": Job(tiles=(2100,), compacted=True, transposed=True, anchor=True, hidden=1030),
    "bf16": Job(tiles=(2500, 2500), operand=BF16, rise=10.0, anchor=True, softcap=30.0, scale=3.0),
    "a rounded head": Job(tiles=(40,), multiplied=FP16),
    "no gradients": Job(tiles=(2500, 2500), gradients=False, anchor=True, rise=10.0),
    "a vocabulary of one": Job(tiles=(1,)),
    "a vocabulary of three": Job(tiles=(3,), anchor=True, bias=True),
}


@cache
def inputs(job: Job) -> dict[str, torch.Tensor]:
    """All in fp32, the operands' numbers too: what is compared is what is made of them."""
    g = torch.Generator().manual_seed(len(job.tiles) + job.hidden)
    V, (R, H) = sum(job.tiles), (ROWS, job.hidden)
    normal = partial(torch.randn, generator=g)
    rise_V = torch.arange(len(job.tiles)).repeat_interleave(torch.tensor(job.tiles)) * job.rise
    rise_RV = torch.tensor([0, 0.3, 1, 2, -1])[:, None] * rise_V
    targets_R = torch.tensor([0, 2048, V - 1, job.tiles[0], job.tiles[0] - 1]) % V
    logits_RV = 3 * normal(R, V) + rise_RV
    if job.ties:
        logits_RV.round_()
    base_RV = logits_RV + normal(R, V)
    if job.masked:
        masked_RV = torch.rand(R, V, generator=g) < 0.2
        masked_RV[1, : job.tiles[0]] = True
        masked_RV.scatter_(1, targets_R[:, None], False)
        logits_RV.masked_fill_(masked_RV, -math.inf)
        base_RV.masked_fill_(masked_RV | (torch.rand(R, V, generator=g) < 0.2), -math.inf)
    if job.spread:
        logits_RV[torch.arange(2), targets_R[:2]] = torch.tensor([70.0, -70.0])
    return {
        "logits": logits_RV,
        "base": base_RV,
        "bias": normal(V),
        "base bias": normal(V),
        "weight": normal(V, H),
        "targets": targets_R,
        "coef": normal(R) + 2,
        "target coef": normal(R),
        "base coef": normal(R) + 2,
        "positions": torch.tensor([7, 0, 4, 3, 5]),
        "asked": torch.arange(R) % 2 == 0,
    }


def outcome(steps: Steps, job: Job, dtype: torch.dtype = FP32) -> dict[str, torch.Tensor]:
    """Everything that the steps write, in `dtype` but for the operands of the next matmul, which are as wide in fp64."""
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs(job).items()}
    operand, form = job.operand if dtype == FP32 else dtype, job.form
    widest, (R, H) = max(job.tiles), (ROWS, job.hidden)

    def new(*shape: int, fill: float = math.nan, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.full(shape, fill, dtype=dtype)

    least, targets_R = torch.finfo(FP32).min, given["targets"]
    exp_RW, base_exp_RW = new(R, widest + 3, dtype=operand), new(R, widest + 3, dtype=operand)
    rows = SoftmaxRows(new(R, fill=0), new(R, fill=least), new(R, fill=0), new(R, H) if job.gradients else None)
    base_rows = BaseRows(new(R, fill=0), new(R, fill=least), new(R, fill=0), new(R, H) if job.gradients else None)
    top = None
    if job.top:
        top = TopRows(new(R, 2 ** (job.top - 1).bit_length(), fill=math.inf), job.top, None if job.asks_all else given["asked"])
        top.top_RK[:, : job.top] = -math.inf

    def products(name: str, tile: slice, exp_RW: torch.Tensor) -> Products:
        logits_RW = new(R, widest + 5)[:, : tile.stop - tile.start]
        bias_V = given["base bias" if name == "base" else "bias"]
        out_RW = exp_RW[:, : tile.stop - tile.start] if job.gradients else None
        return Products(logits_RW.copy_(given[name][:, tile]), bias_V[tile].clone() if job.bias else None, out_RW)

    starts = torch.tensor((0, *job.tiles)).cumsum(0).tolist()
    tiles, saved = [slice(*pair) for pair in itertools.pairwise(starts)], list[tuple[torch.Tensor, torch.Tensor]]()
    for tile in tiles:
        ours, first = products("logits", tile, exp_RW), tile.start == 0
        base = products("base", tile, base_exp_RW) if job.anchor else None
        steps.advance(ours, rows, targets_R, tile.start, form, base, base_rows if job.anchor else None, top, first=first)
        for side, summed_RH in ((ours, rows.summed_RH), (base, base_rows.summed_RH)):
            if side is not None and side.exp_RW is not None and summed_RH is not None:
                product_RH = side.exp_RW.to(dtype) @ given["weight"][tile]
                summed_RH.copy_(product_RH if first else summed_RH + product_RH)
        saved.append((exp_RW.clone(), rows.reference_R.clone()))
    found = {"total": rows.total_R, "reference": rows.reference_R, "target": rows.target_R}
    if job.anchor:
        found |= {"base total": base_rows.total_R, "base reference": base_rows.reference_R, "cross": base_rows.cross_R}
    if top is not None:
        asked_R = torch.ones(R, dtype=torch.bool) if top.asked_R is None else top.asked_R
        found["top"] = top.top_RK[asked_R].sort(1).values
    if not job.gradients:
        return found
    of = Slopes(targets_R, rows.reference_R, given["coef"] / rows.total_R.clamp(min=1), given["target coef"])
    if job.anchor:
        of = of._replace(base_reference_R=base_rows.reference_R, base_coef_R=given["base coef"] / base_rows.total_R)
    of = of._replace(by=new(fill=BY) if job.by else None)
    slopes_RV = new(R, sum(job.tiles))
    for tile in tiles:
        ours = products("logits", tile, exp_RW)
        steps.slopes(ours, of, tile.start, form, products("base", tile, base_exp_RW) if job.anchor else None)
        assert ours.exp_RW is not None
        slopes_RV[:, tile] = ours.exp_RW
    assert exp_RW[:, widest:].isnan().all(), "wrote beside the tile"
    found |= {"slopes": slopes_RV, "summed": rows.summed_RH.clone()}
    if not job.anchor:
        again_RV = new(R, sum(job.tiles))
        for tile, (saved_RW, reference_R) in zip(tiles, saved, strict=True):
            part_RW = saved_RW[:, : tile.stop - tile.start]
            steps.saved_slopes(part_RW, reference_R, of, tile.start, form)
            again_RV[:, tile] = part_RW
        beside = sum((~saved_RW[:, widest:].isnan()).sum() for saved_RW, _ in saved)
        found |= {"slopes of what was saved": again_RV, "saved beside a tile": torch.as_tensor(beside)}
    if job.anchor:
        found["base summed"] = base_rows.summed_RH.clone()
    out_TH, positions = new(9, H, fill=5.0, dtype=operand), given["positions"] if job.compacted else None
    base_RH = base_rows.summed_RH if job.anchor else None
    weight_VH = given["weight"].t().contiguous().t() if job.transposed else given["weight"]
    steps.finish(out_TH, positions, rows.summed_RH, weight_VH, job.multiplied, of, base_RH)
    return found | {"out": out_TH}


@cache
def wanted(job: Job) -> dict[str, torch.Tensor]:
    found = outcome(TorchSteps(), job, torch.float64)
    if "slopes of what was saved" in found:  # which are the slopes
        assert off(found, {"slopes of what was saved": found["slopes"]})["slopes of what was saved"] <= 1e-12
    return found


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_the_kernels_do_what_torch_does(job: Job) -> None:
    found = off(outcome(step_kernel.TritonSteps(), job), wanted(job))
    assert max(found.values()) <= job.tolerance, found


MUTANTS = {  # by the job that sees it: the function, what it says, and what it says by mistake
    "bias after scale": ("negative scale", "_logits", "other=0.0)\n    z *=", "other=0.0) / scale\n    z *="),
    "bias dropped": ("negative scale", "_logits", "z += tl.load(bias + at, mask=inside, other=0.0)", "pass"),
    "scale dropped": ("negative scale", "_logits", "z *= scale", "pass"),
    "softcap dropped": ("softcap", "_logits", "z = _tanh(z)", "pass"),
    "softcap is even": ("softcap", "_tanh", "tl.where(x < 0, -tanh, tanh)", "tanh"),
    "the reference stays": ("a rounded head", "_follow", "wanted > old + lag", "wanted > 1e38"),
    "the reference lags too far": ("several tiles", "_follow", "old + lag", "old + 100.0"),
    "the reference follows at once": ("negative scale", "_follow", "old + lag", "old"),
    "lift dropped": ("fp16", "_follow", "largest - lift", "largest"),
    "nothing shrinks": ("no gradients", "_follow", "tl.exp((old - new) * unit)", "1.0"),
    "shrinks in units of the cap": ("anchor under a softcap", "_follow", "(old - new) * unit", "old - new"),
    "the end of a row does not shrink": ("several tiles", "_shrink", "range(0, H, BLOCK_H)", "range(0, BLOCK_H, BLOCK_H)"),
    "sum not rescaled": ("several tiles", "advance_kernel", "tl.load(totals + row) * shrink", "tl.load(totals + row)"),
    "∂hidden not rescaled": ("several tiles", "advance_kernel", "summed_stride, shrink,", "summed_stride, 1.0,"),
    "target off by one": ("a rounded head", "advance_kernel", "- start", "- start + 1"),
    "target of the first tile": ("softcap", "advance_kernel", "- start", ""),
    "target in the sum": ("a rounded head", "advance_kernel", "(at == local) | (at >= W), 0.0", "at >= W, 0.0"),
    "target in the maximum": ("target above and below", "advance_kernel", "(at == local) | (at >= W), -float", "at >= W, -float"),
    "past the tile in the sum": ("a rounded head", "advance_kernel", "(at == local) | (at >= W), 0.0", "at == local, 0.0"),
    "past the tile in the maximum": ("a vocabulary of three", "advance_kernel", " | (at >= W), -float", ", -float"),
    "maximum before the cap": ("softcap", "advance_kernel", "largest = _tanh(largest)", "pass"),
    "slope dropped": ("softcap", "advance_kernel", "e *= 1.0 - z * z", "pass"),
    "base: sum not rescaled": ("no gradients", "advance_base_kernel", "tl.load(totals + row) * shrink", "tl.load(totals + row)"),
    "base: KL not rescaled": ("no gradients", "advance_base_kernel", "tl.load(crosses + row) * shrink", "tl.load(crosses + row)"),
    "base: ∂hidden not rescaled": ("masked", "advance_base_kernel", "summed_stride, shrink,", "summed_stride, 1.0,"),
    "base: 0 · log 0": ("masked", "advance_base_kernel", "tl.where(e == 0.0, 0.0, e * (b - z))", "e * (b - z)"),
    "base: KL in units of the cap": ("anchor under a softcap", "advance_base_kernel", "crosses_sum, 0) * unit", "crosses_sum, 0)"),
    "base: slope dropped": ("anchor under a softcap", "advance_base_kernel", "e *= 1.0 - z * z", "pass"),
    "base: slope of its own": ("anchor under a softcap", "advance_base_kernel", "e *= 1.0 - z * z", "e *= 1.0 - b * b"),
    "base: our bias": ("anchor", "advance_base_kernel", "base_bias, at, at < W, scale, HAS", "bias, at, at < W, scale, HAS"),
    "base: past the tile in the sum": ("a vocabulary of three", "advance_base_kernel", "at < W, tl.exp(", "at >= 0, tl.exp("),
    "top: one less": ("top under a softcap", "advance_top_kernel", "slots)\n", "slots, slots > 0, float('inf'))\n"),
    "top: one of a tile": ("top under a softcap", "advance_top_kernel", "while largest > least:", "if largest > least:"),
    "top: of the last tile": ("top under a softcap", "advance_top_kernel", "slots)\n", "slots) - 1e38\n"),
    "top: equals count once": ("top with ties", "advance_top_kernel", "columns == tl.argmax(z, 0)", "z == largest"),
    "top: of other rows": ("top", "advance_top_kernel", "tl.load(asked + row)", "tl.load(asked + row) == 0"),
    "top: past the tile": ("top of as many as there are", "advance_top_kernel", "tl.where(at < W, z, -float(\"inf\"))", "z"),
    "slopes: target off by one": ("a rounded head", "slopes_kernel", "- start", "- start + 1"),
    "slopes: target of the first tile": ("softcap", "slopes_kernel", "- start", ""),
    "slopes: sign of the target": ("a rounded head", "slopes_kernel", "-target_coef, slope", "target_coef, slope"),
    "slopes: coefficient dropped": ("a rounded head", "slopes_kernel", "* coef\n", "\n"),
    "slopes: slope dropped": ("softcap", "slopes_kernel", "    slope *= 1.0 - z * z", "    pass"),
    "slopes: slope of the base dropped": ("anchor under a softcap", "slopes_kernel", "theirs *= 1.0 - z * z", "pass"),
    "slopes: away from the base": ("compacted", "slopes_kernel", "slope -= theirs", "slope += theirs"),
    "slopes: by dropped": ("fp16", "slopes_kernel", "slope *= tl.load(by)", "pass"),
    "saved: target off by one": ("a rounded head", "saved_slopes_kernel", "- start", "- start + 1"),
    "saved: target of the first tile": ("softcap", "saved_slopes_kernel", "- start", ""),
    "saved: sign of the target": ("a rounded head", "saved_slopes_kernel", "-tl.load(target_coefs", "tl.load(target_coefs"),
    "saved: coefficient dropped": ("a rounded head", "saved_slopes_kernel", " * tl.load(coefs + row)", ""),
    "saved: reference dropped": ("several tiles", "saved_slopes_kernel", "* shrink", ""),
    "saved: shrinks in units of the cap": ("bf16 alone", "saved_slopes_kernel", "* unit)", "* 1.0)"),
    "saved: by dropped": ("fp16 alone", "saved_slopes_kernel", "slope *= tl.load(by)", "pass"),
    "saved: past the tile": ("a rounded head", "saved_slopes_kernel", "_ty), mask=at < W", "_ty), mask=at < W + 1"),
    "finish: positions ignored": ("compacted", "finish_kernel", "place = tl.load(positions + row)", "place = row"),
    "finish: target off by one": ("a rounded head", "finish_kernel", "tl.load(targets + row) *", "(tl.load(targets + row) ^ 1) *"),
    "finish: sign of the target": ("a rounded head", "finish_kernel", "- target * target_coef", "+ target * target_coef"),
    "finish: coefficient dropped": ("a rounded head", "finish_kernel", "other=0.0) * coef", "other=0.0)"),
    "finish: base dropped": ("compacted", "finish_kernel", "* tl.load(base_coefs + row)", "* 0.0"),
    "finish: columns of the head": ("compacted", "finish_kernel", "at.to(tl.int64) * weight_column_stride", "at"),
    "finish: head not rounded": ("a rounded head", "finish_kernel", ".to(MULTIPLIED)", ""),
}  # fmt: skip


@pytest.mark.parametrize(("job", "function", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_no_mutant_does(job: str, function: str, right: str, wrong: str, tmp_path: Path) -> None:
    steps = mutated(step_kernel, function, right, wrong, tmp_path).TritonSteps()
    assert max(off(outcome(steps, JOBS[job]), wanted(JOBS[job])).values()) > 10 * JOBS[job].tolerance


SCALED = (7, 3, 2051)
"""More than one block, and not whole blocks."""


def scaled_by(steps: Steps, by: float, dtype: torch.dtype) -> torch.Tensor:
    """A gradient and the number behind it in memory, after it was multiplied."""
    count = math.prod(SCALED)
    memory = torch.linspace(-3, 5, count + 1).to(dtype)
    steps.scale(memory[:count].view(SCALED), torch.tensor(by))
    return memory


@pytest.mark.parametrize("by", [1.0, -0.3, 0.0, 2.0**20])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_a_gradient_is_multiplied_where_it_lies(dtype: torch.dtype, by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_kernel, "PROGRAMS", 3)
    whole = scaled_by(TorchSteps(), by, dtype)
    assert torch.equal(scaled_by(step_kernel.TritonSteps(), by, dtype), whole)
    assert whole[-1] == 5.0


def test_by_one_nothing_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    store = interpreter.InterpreterBuilder.create_masked_store

    def counted(*arguments: Any) -> Any:
        stores.append(arguments)
        return store(*arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", counted)
    scaled_by(step_kernel.TritonSteps(), 1.0, BF16)
    assert not stores
    scaled_by(step_kernel.TritonSteps(), 1.5, BF16)
    assert stores


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("size, programs * BLOCK", "size, size"),  # what is beyond the first blocks
        ("* factor\n", "\n"),
        ("mask=at < size)", "mask=at < size + 1)"),
        ("if factor != 1.0:", "if factor == 1.0:"),
    ],
)
def test_no_mutant_scales(right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutated(step_kernel, "scale_kernel", right, wrong, tmp_path)
    monkeypatch.setattr(mutant, "PROGRAMS", 3)
    assert not torch.equal(scaled_by(mutant.TritonSteps(), 1.5, FP32), scaled_by(TorchSteps(), 1.5, FP32))


def half_cases(dtype: torch.dtype) -> dict[str, Case]:
    objectives = (Focal(2.0), EntropyGate(1.0, 5))
    return {
        "plain": random_case(3, 7, vocab=101, dtype=dtype),
        "everything": full_case(3, 7, vocab=101, dtype=dtype),
        "terms": terms_case(3, 7, vocab=101, dtype=dtype, objectives=objectives),
        "anchor": anchored_case(3, 7, vocab=101, dtype=dtype),
    }


@pytest.mark.parametrize("name", half_cases(BF16))
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks", "body")
def test_half_precision_is_no_worse_than_naive(name: str, dtype: torch.dtype, trained: bool) -> None:
    case = half_cases(dtype)[name]
    ours, theirs = errors(linear_cross_entropy, case, trained=trained), errors(naive, case, trained=trained)
    assert all(ours[part] <= theirs[part] * 1.05 + 2e-6 for part in ours), (ours, theirs)


GATED = {"objectives": (EntropyGate(1.0, 20), EntropyGate(0.5, 4)), "ignored": 0.0}
CASES = {
    "negative scale": replace(full_case(3, 7, vocab=101), logit_scale=-0.6),
    "one target": one_target(full_case(3, 7, vocab=101)),
    "all ignored": full_case(2, 3, vocab=101, ignored=1.1),
    "a row and a token more than a block": full_case(12, vocab=81, ignored=0.0),
    "anchor under the head that is trained": anchored_case(3, 7, vocab=101, own_head=False),
    "certain": decided(30.0, tokens=5),
    "impossible": decided(-80.0, tokens=5),
    "masked": masked(replace(full_case(3, 7, vocab=101), softcap=None), 0, 50, 51, 99, 100),
    "fewer tokens than are asked for": terms_case(9, vocab=5, **GATED),  # type: ignore[arg-type]
    "as many tokens as are asked for": terms_case(9, vocab=20, **GATED),  # type: ignore[arg-type]
    "all logits alike": replace(terms_case(9, vocab=29, **GATED), weight=torch.zeros(29, 24), bias=None),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("small_blocks", "body")
def test_what_is_at_the_edges_equals_the_definition(case: Case, trained: bool) -> None:
    found = errors(linear_cross_entropy, case, trained=trained)
    assert max(found.values()) <= 2e-6, found


@pytest.mark.usefixtures("small_blocks", "body")
def test_autocast_rounds_a_head_in_fp32_as_it_rounds_the_operands() -> None:
    case = full_case(3, 7, vocab=101)
    case = replace(case, hidden=case.hidden.bfloat16())
    with torch.autocast("cpu", dtype=BF16):
        found, grads = run(linear_cross_entropy, case, upstream=1.0)
    assert case.bias is not None
    truth = per_token(replace(case, weight=case.weight.bfloat16(), bias=case.bias.bfloat16()))
    assert relative(found.loss, truth.loss) <= 2e-6
    for name, dtype in {"hidden": BF16, "weight": FP32, "bias": FP32}.items():
        got = grads[name]
        assert got is not None
        assert got.dtype == dtype
        assert relative(got, getattr(truth, name)) <= 8e-3


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.usefixtures("small_blocks", "body")
def test_what_is_no_number_stays_in_its_row_and_is_seen(value: float) -> None:
    """A NaN among the logits of a token, its own or the base's; an infinite one among them, which is no better."""
    for case in (terms_case(5, vocab=101, **GATED), anchored_case(5, vocab=101, ignored=0.0)):  # type: ignore[arg-type]
        case = replace(case, hidden=case.hidden.clone(), softcap=None)
        (case.hidden if case.anchor is None else case.anchor.hidden)[2] = value
        out, grads = run(linear_cross_entropy, case)
        seen = out.nll if out.kl is None else out.kl
        assert out.loss.isnan()
        assert seen.isfinite().tolist() == [True, True, False, True, True]
        assert grads["hidden"] is not None
        assert grads["hidden"].isfinite().all(-1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("wrong", [None, "pass", "gradient.mul_(slopes.by)"])
def test_a_gradient_in_fp16_is_multiplied_by_a_power_of_two_and_divided_by_it(
    wrong: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights so small that fp16 would hold little of it. Also with a mistake, which has to be seen."""
    walk = gpu_walk
    if wrong is not None:
        walk = mutated(gpu_walk, "_head_gradient", "gradient.div_(slopes.by)", wrong, tmp_path)
    monkeypatch.setattr(walk, "steps_for", lambda device, operand, summed: step_kernel.TritonSteps())
    monkeypatch.setattr(function_module, "_walk_of", lambda device: walk.forward_backward)
    case = random_case(2, 9, vocab=40, dtype=FP16, token_weight=torch.full((2, 9), 1e-7))
    assert (errors(linear_cross_entropy, case, upstream=2.0**20)["weight"] <= 2e-3) == (wrong is None)
