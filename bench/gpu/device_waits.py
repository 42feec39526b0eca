"""Where the host waits for a device, seen on fake CUDA tensors or, but for the copies, on a CPU."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dwl_plugin

_HOME, _TORCH = (str(Path(package.__file__).parent) for package in (dwl_plugin, torch))
_HERE = str(Path(__file__).parent)
_READ = {"_local_scalar_dense", "equal", "is_nonzero"}
_COUNTED = {"nonzero", "masked_select", "repeat_interleave", "_unique2", "bincount"}


class Waits(TorchDispatchMode):
    """`where` counts them by the line that asked torch, of those in this package; `elsewhere` are all others.

    With `targets` values need not be known: a fake tensor has that many elements that are not zero, and no true ones.
    """

    def __init__(self, targets: int | None = None) -> None:
        super().__init__()
        self.targets, self.where = targets, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        waits = name in _READ | _COUNTED or _crosses(name, args, kwargs)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
        if waits:
            self.where[_place(name)] += 1
            if self.targets is not None and name == "nonzero":
                return torch.empty(self.targets, args[0].ndim, dtype=torch.int64, device=args[0].device)
            if self.targets is not None and name in _READ:
                return False
        return func(*args, **kwargs)


def _crosses(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it copies between the host and a device."""
    if name == "_to_copy":
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type != args[0].device.type
    return name == "copy_" and args[0].device.type != args[1].device.type


def _place(what: str) -> str:
    frames = (f for f in reversed(traceback.extract_stack()) if not f.filename.startswith((_TORCH, _HERE, "<")))
    innermost = next(frames)
    if not innermost.filename.startswith(_HOME):
        return "elsewhere"
    return f"{what} in {Path(innermost.filename).relative_to(_HOME)}: {innermost.line}"
