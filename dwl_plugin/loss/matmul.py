"""The matrix products of a walk, from the library that is fastest on this machine.

PyTorch multiplies fp32 on x86 with MKL, which keeps its AVX-512 kernels for Intel's processors. On others with AVX-512 the
oneDNN inside PyTorch is about twice as fast, and with bf16 operands twice as fast again where the processor has instructions for
them. It makes a kernel for each shape and keeps it: `few_shapes` says when to mind that.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

__all__ = ["add_product", "few_shapes", "product"]


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b with sums in `dtype`: in `out`, if there is one and the library can write there."""
    if a.dtype == b.dtype == dtype and few_shapes(a.device, dtype):
        return _onednn(a, b)
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    add_product(out, a, b, first=True)
    return out


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """out = a @ b, or out += a @ b. The sums are in the dtype of `out` even where a and b are narrower; on a CPU that multiplies
    bf16, a product of bf16 operands is rounded to bf16 before it is added."""
    if a.dtype == b.dtype != out.dtype and out.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        if first:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return
    if not (a.dtype == b.dtype and few_shapes(a.device, a.dtype)):
        a, b = a.to(out.dtype), b.to(out.dtype)
    if few_shapes(a.device, a.dtype):
        result = _onednn(a, b)
        out.copy_(result) if first else out.add_(result)
    elif first:
        torch.mm(a, b, out=out)
    else:
        torch.addmm(out, a, b, out=out)


def few_shapes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are oneDNN's, to which each new shape costs a millisecond and half a megabyte that stays."""
    if device.type != "cpu" or not torch.backends.mkldnn.enabled:
        return False
    return (dtype == torch.float32 and _mkl_is_slow()) or (dtype == torch.bfloat16 and _multiplies_bf16())


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return result


@functools.cache
def _multiplies_bf16() -> bool:
    """Whether this CPU has instructions for it; others take longer than for fp32."""
    return _has_onednn() and any(name in _processor() for name in ("avx512_bf16", "amx_bf16"))


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
