"""The kernels for Hopper, interpreted: beside torch in fp64, beside the definition, and with mistakes in them."""

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
from dwl_plugin.loss.step import Form, Products, Slopes, SoftmaxRows, TorchSteps
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power
from tests.loss.cases import anchored_case, decided, errors, full_case, masked, one_target, options_of, random_case, run, terms_case
from tests.loss.conftest import INTERPRETED
from tests.loss.interpreted import mutated, off
from tests.loss.mutants import naive
from tests.loss.oracle import Case, per_token, relative

pytest.importorskip("triton", minversion="3.4")
if not INTERPRETED:
    pytest.skip("runs under TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime.interpreter import InterpreterBuilder

from dwl_plugin.loss import hopper
from dwl_plugin.loss.step_kernel import TritonSteps

FP16, FP32 = torch.float16, torch.float32
SMALL = {"ROWS": 8, "TOKENS": 8, "DEPTH": 16, "GROUP": 2}
BY = 3.0


def small(module: Any) -> Any:
    """Its `HopperSteps`, of blocks so small that a few rows and tokens are several."""
    module.SIZES.update(SMALL)
    module.PARTS, module.BLOCK_H = 2, 16
    return module.HopperSteps()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> hopper.HopperSteps:
    monkeypatch.setattr(hopper, "SIZES", hopper.SIZES | SMALL)
    monkeypatch.setattr(hopper, "PARTS", 2)
    monkeypatch.setattr(hopper, "BLOCK_H", 16)
    return hopper.HopperSteps()


@pytest.fixture
def from_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in the order that the interpreter does not run them in."""
    original = InterpreterBuilder.set_grid_idx
    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", lambda self, x, *yz: original(self, self.grid_dim[0] - 1 - x, *yz))


@dataclass(frozen=True)
class Job:
    """Rows that go through a vocabulary, tile by tile, and then once more for the gradient in their logits."""

    tiles: tuple[int, ...] = (20, 13)
    rows: int = 11
    """A block and a part of one."""
    hidden: int = 24
    operand: torch.dtype = FP32
    scale: float = 1.0
    bias: bool = False
    rise: float = 0.0
    """Nats from tile to tile: for the rows none of it, 0.3, 1, 2 and −1 times as much, and so on."""
    within: tuple[float, ...] = (0.0,)
    """As much for the programs of a tile, in turn."""
    masked: bool = False
    """Some tokens are at −inf, among them all of the first tile but one, and all that the second program has of the second."""
    spread: bool = False
    """One target is far above all others, one far below."""
    by: bool = False
    gradients: bool = True

    @property
    def form(self) -> Form:
        half = self.operand == FP16
        return Form(self.scale, None, lag=4.0 if half else 8.0, lift=6.0 if half else 0.0)

    @property
    def tolerance(self) -> float:
        return torch.finfo(self.operand).eps if self.operand != FP32 else 2e-5  # products of 60 nats are off by 6e-6 in fp32


JOBS = {
    "plain": Job(),
    "rises by more than the lag": Job(tiles=(20, 13, 24), rise=10.0, hidden=40),
    "rises by less than the lag": Job(tiles=(20, 13, 24), rise=3.0),
    "falls": Job(tiles=(20, 13), rise=-20.0),
    "rises within a tile": Job(tiles=(31, 30), within=(0.0, 12.0, 5.0, 30.0)),
    "rises within a tile and beyond": Job(tiles=(32, 30, 17), within=(20.0, 0.0, 12.0, 9.0), rise=15.0, hidden=16),
    "negative scale": Job(scale=-0.7, bias=True, rise=6.0),
    "masked": Job(tiles=(20, 32), masked=True, bias=True),
    "target above and below": Job(spread=True),
    "fp16": Job(operand=FP16, rise=10.0, within=(0.0, 9.0), bias=True, by=True),
    "no gradients": Job(gradients=False, rise=10.0),
    "one row": Job(rows=1, rise=10.0),
    "three blocks of rows": Job(rows=19, tiles=(9,)),
    "a vocabulary of one": Job(tiles=(1,)),
    "a vocabulary of three": Job(tiles=(3,), bias=True),
}


@cache
def inputs(job: Job) -> dict[str, torch.Tensor]:
    """All in fp32, the operands' numbers too: what is compared is what is made of them."""
    g = torch.Generator().manual_seed(len(job.tiles) + job.hidden)
    normal = partial(torch.randn, generator=g)
    V, (R, H) = sum(job.tiles), (job.rows, job.hidden)
    first = job.tiles[0]
    token_V = torch.cat([torch.arange(width) for width in job.tiles])  # in its tile
    rise_V = torch.arange(len(job.tiles)).repeat_interleave(torch.tensor(job.tiles)) * job.rise
    rise_V = rise_V + torch.tensor(job.within)[token_V // SMALL["TOKENS"] % len(job.within)]
    targets_R = torch.tensor([0, 7, 8, V - 1, first, first - 1, 15, 16, first + 8, first // 2]).repeat(R // 10 + 1)[:R] % V
    hidden_RH, weight_VH, bias_V = normal(R, H) * 3 / H**0.5, normal(V, H), normal(V)
    hidden_RH[:, 0], weight_VH[:, 0] = torch.tensor([0, 0.3, 1, 2, -1]).repeat(R // 5 + 1)[:R], rise_V
    if job.spread:
        hidden_RH[:, 1:3] = 0.0
        hidden_RH[0, 1], hidden_RH[1, 2] = 1.0, -1.0
        weight_VH[targets_R[:2], [1, 2]] = 70.0
    if job.masked:
        bias_V[torch.rand(V, generator=g) < 0.2] = -math.inf
        bias_V[:first], bias_V[first + 8 : first + 16] = -math.inf, -math.inf
        bias_V[0] = 0.0
        targets_R = torch.where(bias_V[targets_R] == -math.inf, 0, targets_R)
    return {
        "hidden": hidden_RH.to(job.operand).float(),
        "weight": weight_VH.to(job.operand).float(),
        "bias": bias_V,
        "targets": targets_R,
        "coef": normal(R) + 2,
        "target coef": normal(R),
    }


def outcome(steps: hopper.HopperSteps | None, job: Job) -> dict[str, torch.Tensor]:
    """Everything that the steps write; of no kernels, it is what a matmul and torch find in fp64."""
    dtype, operand = (torch.float64, torch.float64) if steps is None else (FP32, job.operand)
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs(job).items()}
    hidden_RH, weight_VH, targets_R, form = given["hidden"].to(operand), given["weight"].to(operand), given["targets"], job.form
    widest, (R, H) = max(job.tiles), (job.rows, job.hidden)
    rooms = list[tuple[torch.Tensor, torch.Tensor]]()

    def new(*shape: int, fill: float = math.nan, beside: int = 3, dtype: torch.dtype = dtype) -> torch.Tensor:
        """Part of a room of sevens whose rest nobody may write: columns beside it, and more than a block of rows below."""
        whole = torch.full((shape[0] + 9, *(size + beside for size in shape[1:])), 7.0, dtype=dtype)
        rooms.append((whole, whole[tuple(slice(size) for size in shape)].fill_(fill)))
        return rooms[-1][1]

    exp_RW = new(R, widest, dtype=operand) if job.gradients else None
    summed_RH = new(R, H) if job.gradients else None
    rows = SoftmaxRows(new(R, fill=0.0), new(R, fill=torch.finfo(FP32).min), new(R, fill=0.0), summed_RH)
    sums_RP, references_RP = (new(R, -(-widest // SMALL["TOKENS"]), beside=0) for _ in range(2))
    starts = torch.tensor((0, *job.tiles)).cumsum(0).tolist()
    tiles = [slice(*pair) for pair in itertools.pairwise(starts)]

    def operands(tile: slice) -> tuple[Any, Any, torch.Tensor | None]:
        assert steps is not None
        return steps.rows(hidden_RH), steps.tokens(weight_VH[tile]), given["bias"][tile].clone() if job.bias else None

    def products(tile: slice, out_RW: torch.Tensor | None) -> Products:
        return Products(hidden_RH @ weight_VH[tile].T, given["bias"][tile] if job.bias else None, out_RW)

    for tile in tiles:
        out_RW, first = None if exp_RW is None else exp_RW[:, : tile.stop - tile.start], tile.start == 0
        if steps is None:
            TorchSteps().advance(products(tile, out_RW), rows, targets_R, tile.start, form, None, None, None, first=first)
        else:
            parts = sums_RP, references_RP
            steps.advance(*operands(tile), out_RW, parts, rows, targets_R, tile.start, form, first=first)
        if out_RW is not None and summed_RH is not None:
            product_RH = out_RW.to(dtype) @ weight_VH[tile].to(dtype)
            summed_RH.copy_(product_RH if first else summed_RH + product_RH)
    found = {"total": rows.total_R, "reference": rows.reference_R, "target": rows.target_R}
    if summed_RH is not None:
        slopes_RV, by = new(R, sum(job.tiles), dtype=operand), torch.tensor(BY, dtype=dtype) if job.by else None
        of = Slopes(targets_R, rows.reference_R, given["coef"] / rows.total_R.clamp(min=1), given["target coef"], by)
        for tile in tiles:
            if steps is None:
                TorchSteps().slopes(products(tile, slopes_RV[:, tile]), of, tile.start, form, None)
            else:
                steps.slopes(*operands(tile), slopes_RV[:, tile], of, tile.start, form)
        found |= {"slopes": slopes_RV, "summed": summed_RH}
    written = sum(int((whole != 7).sum() - (part != 7).sum()) for whole, part in rooms)
    return found | {"written beside": torch.tensor(float(written))}


@cache
def wanted(job: Job) -> dict[str, torch.Tensor]:
    return outcome(None, job)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_the_kernels_do_what_torch_does(job: Job, steps: hopper.HopperSteps) -> None:
    found = off(outcome(steps, job), wanted(job))
    assert max(found.values()) <= job.tolerance, found


@pytest.mark.parametrize("name", ["rises within a tile and beyond", "fp16"])
@pytest.mark.usefixtures("from_the_last")
def test_programs_may_run_in_any_order(name: str, steps: hopper.HopperSteps) -> None:
    found = off(outcome(steps, JOBS[name]), wanted(JOBS[name]))
    assert max(found.values()) <= JOBS[name].tolerance, found


ADVANCE, SETTLE, SLOPES = "multiply_advance_kernel", "settle_kernel", "multiply_slopes_kernel"
MUTANTS = {  # by the job that sees it: the function, what it says, and what it says by mistake
    "groups are all of one size": ("three blocks of rows", "_place", "min(tl.cdiv(R, ROWS) - first, GROUP)", "GROUP"),
    "a group of other blocks": ("three blocks of rows", "_place", "* GROUP\n", "\n"),
    "the last tokens have no program": ("plain", "_place", "GROUP * tl.cdiv(W, TOKENS)", "GROUP * (W // TOKENS)"),
    "the end of H dropped": ("plain", "_logits", "range(0, H, DEPTH)", "range(0, H // DEPTH * DEPTH, DEPTH)"),
    "rows of the first block": ("plain", "_logits", "block_r * ROWS", "0"),
    "tokens of the first program": ("plain", "_logits", "block_w * TOKENS", "0"),
    "bias dropped": ("negative scale", "_logits", "z += tl.load(bias + tokens, mask=tokens < W, other=0.0)[None, :]", "pass"),
    "bias of the first program": ("negative scale", "_logits", "bias + tokens", "bias + tl.arange(0, TOKENS)"),
    "bias after scale": ("negative scale", "_logits", "other=0.0)[None, :]", "other=0.0)[None, :] / scale"),
    "scale dropped": ("negative scale", "_logits", "return z * scale", "return z"),
    "target off by one": ("plain", ADVANCE, "- start)", "- start + 1)"),
    "target of the first tile": ("plain", ADVANCE, "- start)", ")"),
    "target of every program": ("plain", ADVANCE, "mask=is_row & here", "mask=is_row"),
    "target not at the first token of a program": ("plain", ADVANCE, ">= block_w", "> block_w"),
    "target of the next program": ("plain", ADVANCE, "(local < min(block_w", "(local <= min(block_w"),
    "target in the sum": ("plain", ADVANCE, "tl.where(is_target, -float(\"inf\"), z)", "z"),
    "past the tile in the sum": ("plain", ADVANCE, "tl.where(tokens < W, 0.0, -float(\"inf\"))", "tokens * 0.0"),
    "the reference stays": ("plain", ADVANCE, "wanted > old + lag", "wanted > 1e38"),
    "the reference lags too far": ("rises by more than the lag", ADVANCE, "old + lag", "old + 100.0"),
    "the reference follows at once": ("rises by less than the lag", ADVANCE, "old + lag", "old"),
    "lift dropped": ("fp16", ADVANCE, "tl.max(others, 1) - lift", "tl.max(others, 1)"),
    "sums of programs in one place": ("plain", ADVANCE, "* P + block_w", "* P"),
    "sums of no rows": ("plain", ADVANCE, "tl.sum(e, 1), mask=is_row", "tl.sum(e, 1), mask=rows >= 0"),
    "references of no rows": ("plain", ADVANCE, "reference, mask=is_row", "reference, mask=rows >= 0"),
    "exponentials of no rows": ("plain", ADVANCE, "is_row[:, None] &", "(rows >= 0)[:, None] &"),
    "exponentials past the tile": ("plain", ADVANCE, "(tokens[None, :] < W)", "(tokens[None, :] < W + 1)"),
    "reference of the first": ("rises within a tile", SETTLE, "tl.maximum(best, their)", "tl.where(begin == 0, their, best)"),
    "sum of the last programs": ("plain", SETTLE, "sums += ", "sums = "),
    "references of programs ignored": ("rises within a tile", SETTLE, "* tl.exp(their - new)", "* 1.0"),
    "reference not kept": ("plain", SETTLE, "tl.store(references + row, new)", "pass"),
    "sum before not rescaled": ("rises by more than the lag", SETTLE, "total * shrink", "total"),
    "sum before dropped": ("plain", SETTLE, "total * shrink + ", ""),
    "exponentials not rescaled": ("rises within a tile", SETTLE, "if by != 1.0:", "if by > 1.0:"),
    "the first program's rescaled": ("rises within a tile", SETTLE, "exps_stride + part * TOKENS", "exps_stride"),
    "rescaled past the tile": ("rises within a tile", SETTLE, "columns < W", "columns < W + 1"),
    "∂hidden not rescaled": ("rises by more than the lag", SETTLE, "summed_stride, shrink, H", "summed_stride, 1.0, H"),
    "∂hidden of no row rescaled": ("rises by more than the lag", SETTLE, "if new > old:", "if new > old + 1e9:"),
    "programs of a tile before": ("rises by more than the lag", "advance", "triton.cdiv(W, SIZES[\"TOKENS\"])", "P"),
    "slopes: target off by one": ("plain", SLOPES, "- start)", "- start + 1)"),
    "slopes: target of the first tile": ("plain", SLOPES, "- start)", ")"),
    "slopes: sign of the target": ("plain", SLOPES, "-tl.load(target_coefs", "tl.load(target_coefs"),
    "slopes: reference dropped": ("plain", SLOPES, "z - reference[:, None]", "z"),
    "slopes: coefficient dropped": ("plain", SLOPES, "* tl.load(coefs + rows, mask=is_row, other=0.0)[:, None]", ""),
    "slopes: by dropped": ("fp16", SLOPES, "slope *= tl.load(by)", "pass"),
    "slopes: of no rows": ("plain", SLOPES, "is_row[:, None] &", "(rows >= 0)[:, None] &"),
    "slopes: past the tile": ("a vocabulary of three", SLOPES, "(tokens[None, :] < W)", "(tokens[None, :] < W + 1)"),
}  # fmt: skip


@pytest.mark.parametrize(("job", "function", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
@pytest.mark.usefixtures("from_the_last")
def test_no_mutant_does(job: str, function: str, right: str, wrong: str, tmp_path: Path) -> None:
    mutant = mutated(hopper, function, right, wrong, tmp_path)
    assert max(off(outcome(small(mutant), JOBS[job]), wanted(JOBS[job])).values()) > 10 * JOBS[job].tolerance


@pytest.fixture
def launched(small_blocks: None, steps: hopper.HopperSteps, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The walk of Hopper for what it takes, fp32 too; tells the first tokens of the tiles that it went through."""
    starts = list[int]()
    original = hopper.HopperSteps.advance

    def advance(self: hopper.HopperSteps, *args: Any, **kwargs: Any) -> None:
        starts.append(args[7])
        original(self, *args, **kwargs)

    monkeypatch.setattr(hopper.HopperSteps, "advance", advance)
    monkeypatch.setattr(gpu_walk, "_hopper", lambda device: steps)
    monkeypatch.setattr(gpu_walk, "_runs_on_hopper", lambda device, operand: True)
    monkeypatch.setattr(gpu_walk, "_HOPPER_DTYPES", (FP16, FP32))  # the definition is compared with fp32
    monkeypatch.setattr(gpu_walk, "steps_for", lambda device, operand, summed: TritonSteps())
    monkeypatch.setattr(function_module, "_walk_of", lambda device: gpu_walk.forward_backward)
    return starts


def full(*shape: int, **options: Any) -> Case:
    return replace(full_case(*shape, **options), softcap=None)


def rising() -> Case:
    """Each tile exceeds the one before by more than fp32 can exponentiate."""
    case = random_case(8, vocab=101, width=8, ignored=0.0)
    return replace(case, hidden=case.hidden.abs() + 1, weight=torch.arange(101)[:, None] * torch.ones(1, 8) * 4)


CASES = {
    "everything": full(3, 13, vocab=60),
    "negative scale": replace(full(3, 7, vocab=101), logit_scale=-0.6),
    "two kinds of token losses": replace(terms_case(3, 7, vocab=101, objectives=(Focal(2.0), Power(1.0, 0.1))), softcap=None),
    "nothing ignored": random_case(29, vocab=60, ignored=0.0),
    "one token": random_case(1, vocab=60, ignored=0.0),
    "one target": one_target(full(3, 7, vocab=101)),
    "a row and a token more than a block": full(12, vocab=41, ignored=0.0),
    "wider": random_case(2, 9, vocab=50, width=40),
    "a vocabulary of one": random_case(5, vocab=1, ignored=0.0),
    "a vocabulary of two": full(5, vocab=2, ignored=0.0),
    "certain": decided(30.0, tokens=8),
    "impossible": decided(-80.0, tokens=8),
    "masked": masked(full(3, 7, vocab=101), 0, *range(34, 68), 100),
    "rising": rising(),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_what_hopper_is_asked_for_equals_the_definition(case: Case, trained: bool, launched: list[int]) -> None:
    found = errors(linear_cross_entropy, case, trained=trained)
    assert max(found.values()) <= 2e-6, found
    assert launched


def test_without_targets_nothing_is_launched(launched: list[int]) -> None:
    assert max(errors(linear_cross_entropy, full(2, 3, ignored=1.1)).values()) == 0.0
    assert not launched


@pytest.mark.parametrize("weight", [1.0, 1e-7], ids="weights of {}".format)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_half_precision_is_no_worse_than_naive(weight: float, trained: bool, launched: list[int]) -> None:
    """Nor where fp16 would hold little of a gradient."""
    case = random_case(3, 7, vocab=101, dtype=FP16, token_weight=torch.full((3, 7), weight))
    ours, theirs = (errors(of, case, trained=trained, upstream=1 / weight) for of in (linear_cross_entropy, naive))
    assert all(ours[part] <= theirs[part] * 1.05 + 2e-6 for part in ours), (ours, theirs)
    assert launched


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_what_is_no_number_stays_in_its_row_and_is_seen(value: float, launched: list[int]) -> None:
    case = random_case(12, vocab=50, ignored=0.0)
    case.hidden[5, 0] = value
    out, grads = run(linear_cross_entropy, case)
    others = [row != 5 for row in range(12)]
    assert launched
    assert out.loss.isnan()
    assert out.nll.isfinite().tolist() == others
    assert grads["hidden"] is not None
    assert grads["hidden"].isfinite().all(-1).tolist() == others


def unaligned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def apart(tensor: torch.Tensor, by: int) -> torch.Tensor:
    """With as many numbers between its rows."""
    return torch.nn.functional.pad(tensor, (0, by))[..., : tensor.shape[-1]]


PLAIN = random_case(3, 7, vocab=50)
LAID_OUT = {  # and whether the kernels for Hopper take it
    "as it comes": (PLAIN, True),
    "rows apart by whole 16 bytes": (replace(PLAIN, hidden=apart(PLAIN.hidden, 8), weight=apart(PLAIN.weight, 16)), True),
    "positions that lie apart": (replace(PLAIN, hidden=PLAIN.hidden.transpose(0, 1).contiguous().transpose(0, 1)), True),
    "hidden states at an odd address": (replace(PLAIN, hidden=unaligned(PLAIN.hidden)), False),
    "a head at an odd address": (replace(PLAIN, weight=unaligned(PLAIN.weight)), False),
    "hidden states apart": (replace(PLAIN, hidden=apart(PLAIN.hidden, 2)), False),
    "a head apart": (replace(PLAIN, weight=apart(PLAIN.weight, 2)), False),
    "a head that lies transposed": (replace(PLAIN, weight=PLAIN.weight.t().contiguous().t()), False),
    "an odd hidden size": (random_case(3, 7, vocab=50, width=20), False),
    "an odd hidden size in rows of whole 16 bytes": (
        replace(PLAIN, hidden=apart(PLAIN.hidden[..., :20], 4), weight=apart(PLAIN.weight[:, :20], 4)),
        False,
    ),
    "a head of every second number": (replace(PLAIN, weight=PLAIN.weight.repeat_interleave(2, 1)[:, ::2]), False),
    "one row for all positions": (
        replace(random_case(3, 7, vocab=50, ignored=0.0), hidden=PLAIN.hidden[1, 1].expand(3, 7, 24)),
        False,
    ),
    "softcap": (replace(PLAIN, softcap=4.0), False),
    "anchor": (replace(anchored_case(3, 7, vocab=50), softcap=None), False),
    "largest logits": (replace(terms_case(3, 7, vocab=50, objectives=(EntropyGate(1.0, 5),)), softcap=None), False),
}


@pytest.mark.parametrize(("case", "taken"), LAID_OUT.values(), ids=LAID_OUT)
def test_what_the_kernels_for_hopper_cannot_do_the_others_do(case: Case, taken: bool, launched: list[int]) -> None:
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_()
    assert (hidden.data_ptr(), hidden.stride()) == (case.hidden.data_ptr(), case.hidden.stride())
    out = linear_cross_entropy(hidden, weight, case.targets, bias=case.bias, **options_of(case))
    truth = per_token(case)
    assert relative(out.loss, truth.loss) <= 2e-6
    for got, want in zip(torch.autograd.grad(out.loss, [hidden, weight]), (truth.hidden, truth.weight), strict=True):
        assert relative(got, want) <= 2e-6
    assert bool(launched) == taken
