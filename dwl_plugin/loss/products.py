"""The matrix products of a walk, from the library that is fastest on this machine.

PyTorch multiplies fp32 on x86 with MKL, which keeps its AVX-512 kernels for Intel's processors. On others with AVX-512 the
oneDNN inside PyTorch is about twice as fast. It makes a kernel for each shape and keeps it: `few_shapes` says when to mind that.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

__all__ = ["add_product", "few_shapes", "product"]


def product(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b with sums in `dtype`: in `out`, if there is one and the library can write there."""
    if few_shapes(a.device, dtype):
        return _onednn(a.to(dtype), b.to(dtype))
    if out is None:
        out = torch.empty(a.shape[0], b.shape[1], dtype=dtype, device=a.device)
    add_product(out, a, b, first=True)
    return out


def add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, first: bool) -> None:
    """out = a @ b, or out += a @ b, with the sums in the dtype of `out` even where a and b are narrower."""
    if a.dtype != out.dtype and not (out.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")):
        a, b = a.to(out.dtype), b.to(out.dtype)
    if few_shapes(a.device, out.dtype):
        out.copy_(_onednn(a, b)) if first else out.add_(_onednn(a, b))
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out) if first else torch.addmm(out, a, b, out=out)
    elif first:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def few_shapes(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether each new shape of a product costs a millisecond and half a megabyte that stays."""
    return device.type == "cpu" and dtype == torch.float32 and bool(torch.backends.mkldnn.enabled) and _mkl_is_slow()


def _onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return result


@functools.cache
def _mkl_is_slow() -> bool:
    return (
        torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "GenuineIntel" not in _processor()
    )


def _processor() -> str:
    """Its maker's name among other words."""
    try:
        return Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return platform.processor()
