"""The matrix products of a block of tokens, from the library that is fastest on this machine. No other file knows of processors.

PyTorch multiplies fp32 on x86 with MKL, which keeps its AVX-512 kernels for Intel's processors. On others with AVX-512 the oneDNN
inside PyTorch is about twice as fast, and with bf16 operands twice as fast again where the processor has instructions for them. But
oneDNN makes a kernel for each shape it meets, a millisecond and half a megabyte that stays. So `tiling_for` asks for few
shapes, and the rows that a batch has beyond them are multiplied by MKL or filled up with rows of zeros.

Shapes: R rows, one for each token; the other sizes are the same in every batch.
"""

from __future__ import annotations

import functools
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from dwl_plugin.errors import PREFIX, first_line
from dwl_plugin.loss.heads import LinearHead

__all__ = [
    "Multiply",
    "Operands",
    "Tiling",
    "add_product",
    "add_transposed_product",
    "multiplier",
    "operands_for",
    "product",
    "tiling_for",
]

_WIDTH = 1280
"""Of a tile where sizes matter: torch's topk finds the 20 largest of 1,280 twice as fast as those of 1,024."""


class Operands(NamedTuple):
    """What matmuls read: the logits' and ∂hidden's, and ∂W's with the exponentials that are saved for it."""

    first: torch.dtype
    saved: torch.dtype


def operands_for(head: LinearHead, device: torch.device, *, anchored: bool) -> Operands:
    """A CPU rounds a product of bf16 operands to bf16: too much for logits and for ∂hidden, where one token of the vocabulary may
    be all there is to a sum; for a ∂W that is handed out in bf16 it is less than is lost in the end."""
    narrow = head.multiplied == head.weight_VH.dtype == torch.bfloat16 and not anchored
    return Operands(head.summed, torch.bfloat16 if narrow and _onednn_is_faster(device, torch.bfloat16) else head.summed)


class Tiling(NamedTuple):
    """Sizes that multiply fast."""

    any_shape: bool
    """Whether no size is better than another. If not, all tiles have `width` tokens, and a product is best left a new tensor."""
    width: int
    saved_bytes: int
    """What may be saved for ∂W of a block of rows, or `stretch` times as much where that makes few blocks of many."""
    stretch: int

    def round_up(self, rows: int) -> int:
        return rows if self.any_shape else _round_up(rows)


def tiling_for(operands: Operands, device: torch.device) -> Tiling:
    if any(_onednn_is_faster(device, dtype) for dtype in operands):  # blocks of few rows multiply as fast as others
        return Tiling(False, _WIDTH, 32 * 2**20, 1)
    return Tiling(True, _WIDTH, 64 * 2**20, 4)


def product(a_RK: torch.Tensor, b_KX: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b with sums in `dtype`: in `out`, if there is one and the library can write there."""
    if a_RK.dtype == dtype and _rows_of_onednn(a_RK) == len(a_RK):
        return _onednn(a_RK, b_KX)
    if out is None:
        out = torch.empty(a_RK.shape[0], b_KX.shape[1], dtype=dtype, device=a_RK.device)
    add_product(out, a_RK, b_KX, first=True)
    return out


def add_product(out_RX: torch.Tensor, a_RK: torch.Tensor, b_KX: torch.Tensor, *, first: bool) -> None:
    """out = a @ b, or out += a @ b, with sums in the dtype of `out`."""
    even = _rows_of_onednn(a_RK)
    if even:
        _add(out_RX[:even], _onednn(a_RK[:even], b_KX), first)
    if even < len(a_RK):
        _add_mm(out_RX[even:], a_RK[even:], b_KX, first)


def add_transposed_product(out_XY: torch.Tensor, a_RX: torch.Tensor, b_RY: torch.Tensor, *, first: bool) -> None:
    """out = aᵀ @ b, or out += aᵀ @ b, with sums in the dtype of `out`; but a CPU rounds a product of bf16 before it is added."""
    if _onednn_is_faster(a_RX.device, a_RX.dtype):
        _add(out_XY, _onednn(_filled_up(a_RX).t(), _filled_up(b_RY)), first)
    else:
        _add_mm(out_XY, a_RX.t(), b_RY, first)


def _add(out: torch.Tensor, result: torch.Tensor, first: bool) -> None:
    out.copy_(result) if first else out.add_(result)


def _add_mm(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    multiply = multiplier(out.device, a.dtype, out.dtype)
    multiply.into(out, a, b) if first else multiply.onto(out, a, b)


class Multiply(NamedTuple):
    into: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
    """out = a @ b"""
    onto: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
    """out += a @ b"""
    copies: bool = False
    """Whether operands or the product go through other tensors on the way."""


def multiplier(device: torch.device, operands: torch.dtype, out: torch.dtype) -> Multiply:
    """torch.mm with sums in the wider of the dtypes. Chosen once for many products: on a GPU the host has little time for each."""
    if operands == out:
        return Multiply(lambda out, a, b: torch.mm(a, b, out=out), lambda out, a, b: torch.addmm(out, a, b, out=out))
    if out.itemsize < 4:  # fp32 sums of half-precision operands are fp32, or rounded to the operands' dtype
        wide = torch.promote_types(operands, torch.float32)
        summing = multiplier(device, operands, wide)

        def product_of(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            summing.into(product := torch.empty_like(out, dtype=wide), a, b)
            return product

        return Multiply(lambda out, a, b: out.copy_(product_of(out, a, b)), lambda out, a, b: out.add_(product_of(out, a, b)), True)
    if _sums_wider(device, operands):
        wider: dict[str, Any] = {"out_dtype": out}
        return Multiply(
            lambda out, a, b: torch.mm(a, b, out=out, **wider), lambda out, a, b: torch.addmm(out, a, b, out=out, **wider)
        )
    return Multiply(
        lambda out, a, b: torch.mm(a.to(out.dtype), b.to(out.dtype), out=out),
        lambda out, a, b: torch.addmm(out, a.to(out.dtype), b.to(out.dtype), out=out),
        copies=True,
    )


def _sums_wider(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of such operands can be had in fp32."""
    if device.type == "cpu" or (dtype == torch.float16 and getattr(torch.backends.cuda.matmul, "allow_fp16_accumulation", False)):
        return False
    return _has_out_dtype(device, dtype)


@functools.cache
def _has_out_dtype(device: torch.device, dtype: torch.dtype) -> bool:
    """Tried, because it depends on the version, the maker and the age of the GPU."""
    one = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(torch.mm(one, one, out_dtype=torch.float32), one, one, out_dtype=torch.float32)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, TypeError) as error:
        kind, reason = str(dtype).removeprefix("torch."), f"{type(error).__name__}: {first_line(error)[:100]}"
        warnings.warn(
            f"{PREFIX} the loss multiplies {kind} as fp32, slower: this torch and GPU have no sums in fp32 for it ({reason})",
            stacklevel=2,
        )
        return False
    return True


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")  # type: ignore[no-any-return]


def _filled_up(a_RX: torch.Tensor) -> torch.Tensor:
    """With rows of zeros: a product over rows would read and write all of `out` once more for the few that are left over."""
    missing = _round_up(len(a_RX)) - len(a_RX)
    return F.pad(a_RX, (0, 0, 0, missing)) if missing else a_RX


def _rows_of_onednn(a_RK: torch.Tensor) -> int:
    """How many of the rows oneDNN multiplies: a number that comes up often. MKL gets the rest, if need be all."""
    return len(a_RK) - len(a_RK) % _step(len(a_RK)) if _onednn_is_faster(a_RK.device, a_RK.dtype) else 0


def _round_up(rows: int) -> int:
    return rows + -rows % _step(rows)


def _step(rows: int) -> int:
    """What numbers of rows are a multiple of: at most an eighth of them, from 128 on."""
    return int(max(16, 2 ** max(0, (rows - 1).bit_length() - 4)))


def _onednn_is_faster(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    return (dtype == torch.float32 and _mkl_is_slow()) or (dtype == torch.bfloat16 and _multiplies_bf16())


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it that oneDNN may use: without, bf16 takes longer than fp32."""
    supported = _has_onednn() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(supported) and any(name in _processor() for name in ("avx512_bf16", "amx_bf16"))


@functools.cache
def _mkl_is_slow() -> bool:
    return (
        _has_onednn()
        and torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _processor()
    )


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available()) and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


@functools.cache
def _processor() -> str:
    """Its maker's name and its features, among other words."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
