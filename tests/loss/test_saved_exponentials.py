"""A trained head on a GPU: the exponentials of most tiles wait in the memory of ∂W for what they become there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dwl_plugin.loss import gpu_walk, linear_cross_entropy as function_module, matmul
from dwl_plugin.loss.linear_cross_entropy import linear_cross_entropy
from dwl_plugin.loss.step import TorchSteps
from tests.loss.cases import FP32, errors, full_case, random_case, run
from tests.loss.conftest import INTERPRETED
from tests.loss.interpreted import mutated
from tests.loss.mutants import naive
from tests.loss.oracle import Case, relative

if INTERPRETED:
    pytest.skip("its tiles are wider; the kernels are in test_step_kernel and test_hopper_kernel", allow_module_level=True)


@pytest.mark.parametrize("tile_bytes", [1, 30, 96, 97, 256])
@pytest.mark.parametrize("tiles", [1, 2, 3, 17, 40])
def test_no_tile_is_written_over_what_is_yet_to_be_read(tiles: int, tile_bytes: int) -> None:
    """And as many are saved as can be: of one more, one would be."""

    def overwrites(count: int, exp_bytes: int) -> bool:
        first = tiles - count
        return any((index - first + 1) * exp_bytes > index * tile_bytes for index in range(first, tiles))

    for exp_bytes in range(1, 300):
        count = gpu_walk._tiles_to_save(tiles, exp_bytes, tile_bytes)
        assert 0 <= count < tiles
        assert not overwrites(count, exp_bytes)
        assert overwrites(count + 1, exp_bytes)


def rising(tokens: int, **options: object) -> Case:
    """Logits that climb along the vocabulary by 40 nats: references move while exponentials are saved."""
    case = random_case(tokens, vocab=211, ignored=0.2, **options)  # type: ignore[arg-type]
    hidden, weight = case.hidden.clone(), case.weight.clone()
    hidden[:, 0], weight[:, 0] = 4.0, torch.linspace(-5, 5, 211).to(weight.dtype)
    return replace(case, hidden=hidden, weight=weight)


CASES = {
    "fewer tokens than H": rising(9),
    "as many": rising(24),
    "twice as many": rising(60),
    "many times as many": rising(150),
    "everything": full_case(4, 13, vocab=211),
    "a weight of nothing": replace(rising(40), token_weight=torch.arange(40) % 2 * 1.0),
}


@pytest.fixture
def saved(small_blocks: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType], list[int]]:
    """Take the walk of a GPU from a module; the first tokens of the tiles that save their exponentials in it are listed."""

    def install(walk: ModuleType) -> list[int]:
        for name, value in vars(gpu_walk).items():
            if name.isupper():
                monkeypatch.setattr(walk, name, value)
        starts = list[int]()

        class Steps(TorchSteps):
            def saved_slopes(self, exp_RW, reference_R, of, start, form) -> None:  # type: ignore[no-untyped-def]
                starts.append(start)
                super().saved_slopes(exp_RW, reference_R, of, start, form)

        # A CPU has no products of half-precision operands in fp32 but by copies; a GPU has.
        monkeypatch.setattr(walk, "multiplier", lambda *of: matmul.multiplier(*of)._replace(copies=False))
        monkeypatch.setattr(walk, "steps_for", lambda *of: Steps())
        monkeypatch.setattr(function_module, "_walk_of", lambda device: walk.forward_backward)
        return starts

    return install


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_equals_the_definition(case: Case, saved: Callable[[ModuleType], list[int]]) -> None:
    starts = saved(gpu_walk)
    assert max(errors(linear_cross_entropy, case).values()) <= FP32
    assert starts == sorted(starts, reverse=True)
    assert len(starts) > 1


def test_few_tokens_save_all_tiles_and_compute_no_logits_again(
    saved: Callable[[ModuleType], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last tile that is left over waits in memory of its own."""
    starts = saved(gpu_walk)
    monkeypatch.setattr(gpu_walk, "_SLOPE_BYTES", 1000)
    monkeypatch.delattr(TorchSteps, "slopes")
    assert max(errors(linear_cross_entropy, rising(7)).values()) <= FP32
    assert starts[-1] == 0


MUTANTS = {  # by the case that sees it
    "references not saved": ("twice as many", "save", "copy_(reference_R)", "copy_(reference_R * 0)"),
    "all blocks in one place": ("twice as many", "at", "self.exp_NW[rows]", "self.exp_NW[: rows.stop - rows.start]"),
    "the first tile first": ("twice as many", "_slopes_of_saved", "reverse=True", "reverse=False"),
    "one token fewer again": ("twice as many", "_head_gradient", "min(saved, default=self.V)", "min(saved, default=self.V) - 1"),
}  # fmt: skip


@pytest.mark.parametrize(("case", "function", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
def test_no_mutant_does(
    case: str, function: str, right: str, wrong: str, saved: Callable[[ModuleType], list[int]], tmp_path: Path
) -> None:
    starts = saved(mutated(gpu_walk, function, right, wrong, tmp_path))
    assert not errors(linear_cross_entropy, CASES[case])["weight"] <= 10 * FP32  # nor is it a number, perhaps
    assert starts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [9, 60])
def test_half_precision_is_no_worse_than_naive(dtype: torch.dtype, tokens: int, saved: Callable[[ModuleType], list[int]]) -> None:
    starts = saved(gpu_walk)
    case = random_case(tokens, vocab=211, ignored=0.2, dtype=dtype)
    ours, theirs = errors(linear_cross_entropy, case), errors(naive, case)
    assert all(ours[part] <= theirs[part] * 1.05 + 2e-6 for part in ours), (ours, theirs)
    assert starts


def test_under_autocast_twice_as_many_fit(saved: Callable[[ModuleType], list[int]]) -> None:
    """∂W is in fp32 like its head, exponentials are in bf16 like the products."""
    starts, case = saved(gpu_walk), random_case(110, vocab=211, ignored=0.0)
    _, whole = run(linear_cross_entropy, case)
    in_fp32 = len(starts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, grads = run(linear_cross_entropy, case)
    assert len(starts) - in_fp32 >= 2 * in_fp32 > 0
    assert grads["weight"] is not None
    assert whole["weight"] is not None
    assert grads["weight"].dtype == torch.float32
    assert relative(grads["weight"], whole["weight"]) <= 1e-2


@pytest.mark.parametrize("learns", ["hidden", "head"])
def test_nothing_is_saved_for_a_head_or_hidden_states_that_do_not_learn(
    learns: str, saved: Callable[[ModuleType], list[int]]
) -> None:
    starts, case = saved(gpu_walk), rising(40)
    hidden, weight = case.hidden.requires_grad_(learns == "hidden"), case.weight.requires_grad_(learns == "head")
    linear_cross_entropy(hidden, weight, case.targets).loss.backward()
    assert not starts
