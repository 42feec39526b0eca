"""The loss's kernels compile for cards that are not here, and keep what they hold in registers."""

from __future__ import annotations

import re

import pytest
import torch

from tests.loss.conftest import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

from bench.gpu.registers import OPERANDS, compiled, used
from dwl_plugin.loss import step_kernel

KERNELS = {"advance", "advance_base", "advance_top", "slopes", "saved_slopes", "finish", "scale"}
MULTIPLYING = {"multiply_advance", "multiply_slopes"}


@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("operand", OPERANDS.values(), ids=OPERANDS)
@pytest.mark.parametrize("capability", [86, 90], ids="sm_{}".format)
def test_no_kernel_spills(capability: int, operand: torch.dtype, full: bool) -> None:
    expected = KERNELS | MULTIPLYING | {"settle"} if capability == 90 and operand != torch.float32 else KERNELS
    found = used(capability, operand, full=full)
    assert {name: (one.stack, one.local) for name, one in found.items()} == dict.fromkeys(expected, (0, 0))


@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
@pytest.mark.parametrize("operand", [torch.bfloat16, torch.float16], ids=str)
def test_a_matmul_for_hopper_is_of_its_matrix_units_and_loads_by_descriptors(operand: torch.dtype, full: bool) -> None:
    for name, asm in compiled(90, operand, full=full).items():
        found = "wgmma.mma_async" in asm["ptx"], "cp.async.bulk.tensor" in asm["ptx"]
        assert found == (name in MULTIPLYING, name in MULTIPLYING), name


def test_a_kernel_that_spills_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_kernel, "WARPS", 1)
    assert used(90, torch.bfloat16, full=False)["advance_top"].stack > 0


SCALAR = re.compile(r"^(ld|st)\.global\S* (?:\{[^}]*\}, )?\[ (\S+) \+ \d+ \]")


def stored_before_all_have_read(ptx: str) -> list[str]:
    """Addresses that every thread reads and one thread writes, with no barrier between: a slow warp may read what was written."""
    found, read = [], set[str]()
    for line in map(str.strip, ptx.splitlines()):
        if line.startswith("bar"):
            read.clear()
        elif (access := SCALAR.match(line)) is not None:  # by all threads: without a predicate
            read.add(access[2])
        elif (access := SCALAR.match(line.partition(" ")[2])) is not None and access[1] == "st" and access[2] in read:
            found.append(access[2])
    return found


@pytest.mark.parametrize("full", [False, True], ids=["plain", "every option"])
def test_no_thread_stores_what_others_have_yet_to_read(full: bool) -> None:
    for name, asm in compiled(90, torch.bfloat16, full=full).items():
        assert not stored_before_all_have_read(asm["ptx"]), name


@pytest.mark.parametrize("name", ["advance", "advance_base", "settle"])
def test_a_store_without_a_barrier_before_it_is_seen(name: str) -> None:
    ptx = compiled(90, torch.bfloat16, full=True)[name]["ptx"]
    assert stored_before_all_have_read("\n".join(line for line in ptx.splitlines() if "bar.sync" not in line))
