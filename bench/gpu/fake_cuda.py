"""Waits and peak memory of the CUDA path on fake tensors: every operation is met with its shape and dtype, none is computed.

What waits: reading a value, the number of targets, a copy between devices. Memory is the sum of the storages that are alive, the
gradients that are handed out among them. The launchers of the kernels run, and what they would launch is checked and counted. This
needs no GPU; `tests/loss/test_cuda_on_fakes.py` asks the same functions.
"""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.tools.tensor_descriptor import TensorDescriptor

from bench.gpu.common import MIB, Table
from bench.gpu.device_waits import Waits
from dwl_plugin import LinearCrossEntropyOutput
from dwl_plugin.loss import gpu_walk, hopper, linear_cross_entropy as module, matmul, step_kernel
from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.step import Steps
from dwl_plugin.loss.token_losses import EntropyGate, Focal, Power, Term

SHAPES = [(8192, 4096, 151936, None), (2048, 2304, 256000, 30.0)]
if os.environ.get("TOY"):  # only then: real sizes cost nothing without a GPU but the time of this process
    SHAPES = [(1024, 512, 32003, None)]
OBJECTIVES = ("plain", "dft", "weights", "four token losses", "eaft")


@dataclass(frozen=True)
class Call:
    """N positions of which `targets` count (None: all), hidden size H, vocabulary V, and the options of the loss."""

    N: int
    H: int
    V: int
    hidden: torch.dtype = torch.bfloat16
    weight: torch.dtype = torch.bfloat16
    autocast: torch.dtype | None = None
    learns_hidden: bool = True
    learns_head: bool = False
    softcap: float | None = None
    has_bias: bool = False
    scale: float | None = None
    objective: str = "plain"
    anchor: str | None = None
    """None, or whose head its base model has: "ours" or "its own"."""
    unlikely: bool = False
    """Some of the tokens are to become unlikely."""
    targets: int | None = None


@dataclass
class Seen:
    """What a call did. Peaks are bytes above the inputs."""

    output: LinearCrossEntropyOutput
    gradients: tuple[torch.Tensor | None, ...]
    """Of hidden, weight, bias."""
    waits: Counter[str]
    forward_peak: int
    peak: int
    kernels: Counter[tuple[Any, ...]]
    """Launches of each kernel that Triton would have to compile."""


class Watch(Waits):
    """Waits, and the memory of what goes through torch, while it is entered."""

    def __init__(self, targets: int, inputs: list[torch.Tensor]) -> None:
        super().__init__(targets)
        self.alive = self.peak = 0
        self._inputs = inputs  # alive, so that no other storage is taken for one of theirs
        self._known = {tensor.untyped_storage()._cdata for tensor in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self._count(tensor)
        return result

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


@dataclass
class Kernel:
    """In the place of a Triton kernel: checks what it is launched with, and computes nothing."""

    kernel: Any
    launches: Counter[tuple[Any, ...]] = field(default_factory=Counter)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(type(size) is int and size > 0 for size in grid), grid
        return self._launch

    def _launch(self, *arguments: Any, **options: Any) -> None:
        signature = inspect.signature(self.kernel.fn)
        named = {name: value for name, value in options.items() if name in signature.parameters}
        given = signature.bind(*arguments, **named).arguments
        assert len(given) == len(signature.parameters), set(signature.parameters) - set(given)
        parts = [_variant(given[parameter.name], parameter) for parameter in self.kernel.params]
        self.launches[(self.kernel.__name__, *parts, *sorted(options.items()))] += 1


def _variant(value: Any, parameter: Any) -> Any:
    """What Triton compiles a kernel anew for: constants, types, and whether pointers and integers divide by 16, or are 1."""
    if parameter.is_constexpr or value is None:
        return str(value)
    if isinstance(value, TensorDescriptor):
        return value.base.dtype, *value.block_shape
    if isinstance(value, torch.Tensor):
        assert value.device.type == "cuda", (parameter.name, value.device)
        assert value.ndim == 0 or value.stride(-1) == 1 or value.shape[-1] == 1, (parameter.name, value.stride())
        return value.dtype, parameter.do_not_specialize_on_alignment or value.storage_offset() * value.itemsize % 16 == 0
    assert isinstance(value, int | float), (parameter.name, value)
    if parameter.do_not_specialize or not isinstance(value, int):
        return type(value)
    return value == 1 or (value % 16 == 0, value >= 2**31)


class _Context:
    """In the place of autograd's."""

    saved_tensors: tuple[Any, ...] = ()

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass


_ORIGINAL = module._LinearCrossEntropy


@contextmanager
def without_a_device(
    steps: Steps, capability: int, has_out_dtype: bool
) -> Iterator[tuple[list[_Context], Counter[tuple[Any, ...]]]]:
    """The autograd function of the loss as plain calls, its slopes not computed, its kernels not launched: they want a device.

    The contexts of the calls are left in the list, the launches in the counter.
    """
    contexts, launches = list[_Context](), Counter[tuple[Any, ...]]()

    def apply(*arguments: Any) -> Any:
        contexts.append(_Context(tuple(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)))
        with torch.no_grad():
            return _ORIGINAL.forward(contexts[-1], *arguments)

    plain = type("Plain", (), {"apply": staticmethod(apply)})
    replaced: list[tuple[Any, str, Any]] = [
        (module, "_LinearCrossEntropy", plain),
        (gpu_walk, "_kernels", lambda *arguments: steps),
        (gpu_walk, "_hopper", gpu_walk._hopper.__wrapped__),
        (gpu_walk, "_runs_on_hopper", lambda *arguments: isinstance(steps, step_kernel.TritonSteps)),
        (torch.cuda, "get_device_capability", lambda device: divmod(capability, 10)),
        (torch.autograd, "grad", lambda _, leaf: (torch.empty_like(leaf),)),
        (torch.cuda, "device", lambda device: nullcontext()),
        (matmul, "_has_out_dtype", lambda device, dtype: has_out_dtype),
    ]
    for owner in (step_kernel, hopper):
        kernels = {name: kernel for name, kernel in vars(owner).items() if name.endswith("_kernel")}
        replaced += [(owner, name, Kernel(kernel, launches)) for name, kernel in kernels.items()]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "User provided device_type of 'cuda'")
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        for target, name, value in replaced:
            stack.enter_context(patch.object(target, name, value))
        yield contexts, launches


@contextmanager
def autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """torch.autocast, which does nothing where there is no device."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", dtype is not None)
    torch.set_autocast_dtype("cuda", dtype or before[1])
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


def _options(call: Call, bias: torch.Tensor | None) -> dict[str, Any]:
    def numbers() -> torch.Tensor:
        return torch.empty(call.N, device="cuda")

    found: dict[str, Any] = {"bias": bias, "softcap": call.softcap, "logit_scale": call.scale}
    if call.objective == "dft":
        found["exponent"] = 1.0
    elif call.objective == "weights":
        found |= {"token_weight": numbers(), "exponent": numbers(), "min_weight": 0.01}
    elif call.objective == "four token losses":
        losses = (Power(), Power(1.0, 0.0, 0.7), Focal(2.0), EntropyGate(1.0, 20))
        found["terms"] = [Term(loss, numbers()) for loss in losses]
    elif call.objective == "eaft":
        found["terms"] = [Term(EntropyGate(1.0, 20), numbers())]
    if call.unlikely:
        found["unlikelihood"] = numbers()
    if call.anchor:
        own = torch.empty(call.V, call.H, device="cuda", dtype=call.weight)
        base = torch.empty(call.N, call.H, device="cuda", dtype=call.hidden)
        found["anchor"] = Anchor(numbers(), base, (own, None) if call.anchor == "its own" else None)
    return found


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if not isinstance(value, dict | list | tuple):
        value = getattr(value, "__dict__", {})
    return [tensor for part in (value.values() if isinstance(value, dict) else value) for tensor in _tensors_in(part)]


def on_fakes(call: Call, steps: Steps | None = None, *, capability: int = 86, has_out_dtype: bool = True) -> Seen:
    """Forward and backward of a call on fake CUDA tensors; by the kernels, if no other `steps` are given. Older torch and older
    cards cannot sum products of half-precision operands in fp32 (`has_out_dtype`)."""
    fakes, outside = FakeTensorMode(), without_a_device(steps or step_kernel.TritonSteps(), capability, has_out_dtype)
    with fakes, outside as (contexts, launches), autocast(call.autocast):
        hidden = torch.empty(call.N, call.H, device="cuda", dtype=call.hidden, requires_grad=call.learns_hidden)
        weight = torch.empty(call.V, call.H, device="cuda", dtype=call.weight, requires_grad=call.learns_head)
        bias = torch.empty(call.V, device="cuda", dtype=call.weight, requires_grad=call.learns_head) if call.has_bias else None
        targets, options = torch.empty(call.N, device="cuda", dtype=torch.int64), _options(call, bias)
        watch = Watch(call.N if call.targets is None else call.targets, _tensors_in([hidden, weight, targets, options]))
        with watch:
            output = module.linear_cross_entropy(hidden, weight, targets, **options)
            forward_peak, gradients = watch.peak, tuple[torch.Tensor | None, ...]()
            if contexts:
                with torch.no_grad():
                    gradients = _ORIGINAL.backward(contexts[-1], torch.ones_like(output.loss))
    return Seen(output, gradients[:3], watch.where, forward_peak, watch.peak, launches)


def measured(call: Call) -> tuple[int, str, float, float, int]:
    seen = on_fakes(call)
    places = ", ".join(f"{place} x{count}" for place, count in seen.waits.items())
    return sum(seen.waits.values()), places, seen.forward_peak / MIB, seen.peak / MIB, sum(seen.kernels.values())


def main() -> None:
    for N, H, V, softcap in SHAPES:
        title = f"fake CUDA tensors, {N}x{H}x{V}{', softcap' if softcap else ''}, bf16"
        table = Table(title, "options", "waits", "where", "MiB, forward", "MiB, with backward", "launches")
        for trained in (False, True):
            for objective, anchor in (("plain", None), ("weights", None), ("four token losses", None), ("plain", "ours")):
                call = Call(N, H, V, learns_head=trained, softcap=softcap, objective=objective, anchor=anchor)
                name = f"{'anchor' if anchor else objective}, {'trained' if trained else 'frozen'}"
                table.measure(name, partial(measured, call))


if __name__ == "__main__":
    main()
