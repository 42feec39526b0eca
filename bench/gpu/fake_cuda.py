"""Waits and peak memory of the CUDA path on fake tensors: every operation is met with its shape and dtype, none is computed.

What waits: reading a value, the number of targets, a copy between devices. Memory is the sum of the storages that are alive. This
needs no GPU. It follows the code's own CUDA branches, but not the kernels that torch.compile would fuse.
"""

from __future__ import annotations

import os
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu.common import MIB, Table
from dwl_plugin.loss import fused_walk, linear_cross_entropy as module
from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term

SHAPES = [(8192, 4096, 151936, None), (2048, 2304, 256000, 30.0)]
if os.environ.get("TOY"):  # only then: real sizes cost nothing without a GPU but the time of this process
    SHAPES = [(1024, 512, 32003, None)]


class Watch(TorchDispatchMode):
    """What goes through torch while it is entered."""

    def __init__(self, targets: int) -> None:
        super().__init__()
        self.targets, self.waits = targets, Counter[str]()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def know(self, tensor: torch.Tensor) -> None:
        """An input: it is there before the call and is not counted."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs, name = kwargs or {}, str(func)
        if "nonzero" in name:
            self._waits("nonzero")
            found = torch.empty(self.targets, 1, dtype=torch.int64, device=args[0].device)
            self._count(found)
            return found
        if "_local_scalar_dense" in name or "is_nonzero" in name:
            self._waits("a value")
            return 0
        if "_to_copy" in name and torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type:
            self._waits("a copy")
        result = func(*args, **kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self._count(tensor)
        return result

    def _waits(self, what: str) -> None:
        ours = [frame for frame in traceback.extract_stack() if "dwl_plugin" in frame.filename]
        self.waits[f"{what} at {ours[-1].filename.split('/')[-1]}:{ours[-1].lineno}" if ours else what] += 1

    def _count(self, tensor: object) -> None:
        if not isinstance(tensor, torch.Tensor) or tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self.alive -= size
        self._known.discard(key)


class _Context:
    """In the place of autograd's."""

    needs_input_grad = (True, True, True, True)
    saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass


@contextmanager
def without_autograd() -> Iterator[list[_Context]]:
    """The autograd function of the loss as plain calls, and its slopes not computed: autograd's engine wants a device.

    The context of the last call is left in the list.
    """
    original, contexts = module._LinearCrossEntropy, list[_Context]()

    def apply(*arguments: Any) -> Any:
        contexts.append(_Context())
        with torch.no_grad():
            return original.forward(contexts[-1], *arguments)

    with ExitStack() as stack:
        stack.enter_context(patch.object(module, "_LinearCrossEntropy", type("Plain", (), {"apply": staticmethod(apply)})))
        stack.enter_context(patch.object(fused_walk, "_fused_step", lambda: fused_walk._step_fused))
        stack.enter_context(patch.object(torch.autograd, "grad", lambda _, leaf: (torch.empty_like(leaf),)))
        yield contexts


def options(name: str, N: int, H: int) -> dict[str, Any]:
    def numbers() -> torch.Tensor:
        return torch.empty(N, device="cuda")

    if name == "four token losses":
        losses = (Power(), Power(1.0, 0.0, 0.7), Focal(2.0), EntropyGate(1.0, 20))
        return {"terms": [Term(loss, numbers()) for loss in losses]}
    if name == "weights":
        return {"token_weight": numbers(), "exponent": numbers(), "min_weight": 0.01}
    if name == "anchor":
        return {"anchor": Anchor(numbers(), torch.empty(N, H, device="cuda", dtype=torch.bfloat16))}
    return {}


def measured(name: str, N: int, H: int, V: int, softcap: float | None, trained: bool) -> tuple[int, str, float, float]:
    """Waits and where, and MiB at the peak of forward and of forward and backward, above the inputs."""
    with FakeTensorMode(), without_autograd() as contexts:
        hidden = torch.empty(N, H, device="cuda", dtype=torch.bfloat16).requires_grad_()
        weight = torch.empty(V, H, device="cuda", dtype=torch.bfloat16).requires_grad_(trained)
        targets = torch.empty(N, device="cuda", dtype=torch.int64)
        more = options(name, N, H)
        watch = Watch(targets=N)
        for tensor in (hidden, weight, targets):
            watch.know(tensor)
        with watch:
            result = module.linear_cross_entropy(hidden, weight, targets, softcap=softcap, **more)
            forward = watch.peak
            with torch.no_grad():
                _ORIGINAL.backward(contexts[-1], torch.ones_like(result.loss))
        places = ", ".join(f"{place} x{count}" for place, count in watch.waits.items())
        return sum(watch.waits.values()), places, forward / MIB, watch.peak / MIB


_ORIGINAL = module._LinearCrossEntropy


def main() -> None:
    for N, H, V, softcap in SHAPES:
        title = f"fake CUDA tensors, {N}x{H}x{V}{', softcap' if softcap else ''}, bf16"
        table = Table(title, "options", "waits", "where", "MiB, forward", "MiB, with backward")
        for trained in (False, True):
            for name in ("plain", "weights", "four token losses", "anchor"):
                row = partial(measured, name, N, H, V, softcap, trained)
                table.measure(f"{name}, {'trained' if trained else 'frozen'}", row)


if __name__ == "__main__":
    main()
