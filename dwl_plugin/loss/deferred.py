"""Logits that are not computed yet.

Almost every causal LM does `logits = self.lm_head(hidden)`, perhaps some pointwise maths, then hands the logits to a loss.
While a loss of ours is waiting, the head returns a `DeferredLogits` instead: the hidden states, the head, and a record of the
pointwise maths that the model went on to do. Whatever is done to the rows (slicing off the last position, flattening) is done
to the hidden states at once. Anything that is not recorded computes the true logits, so the result is right for every model
and only the memory differs; `on_materialise` is told what asked for them.

It is a plain object and not a tensor subclass: it passes untouched through the output traversals of DDP and Accelerate.

Shapes: H hidden size, V vocabulary, … any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

__all__ = ["DeferredLogits", "Pointwise"]

Head = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pointwise:
    """One recorded operation: `scale` and `shift` by a number or a broadcast tensor, `tanh`, `cast`, or a `slice` of the
    vocabulary."""

    kind: str
    operand: Any = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.kind == "scale":
            return logits * self.operand
        if self.kind == "divide":
            return logits / self.operand
        if self.kind == "shift":
            return logits + self.operand
        if self.kind == "tanh":
            return torch.tanh(logits)
        if self.kind == "cast":
            return logits.to(self.operand)
        assert self.kind == "slice", self.kind
        return logits[..., self.operand]


@dataclass(frozen=True, eq=False)
class DeferredLogits:
    """`operations` of `head(hidden)`, not computed yet. Shape (…, V) for hidden (…, H)."""

    hidden: torch.Tensor
    head: Head
    vocab_size: int
    dtype: torch.dtype
    operations: tuple[Pointwise, ...] = ()
    on_materialise: Callable[[str], None] | None = None
    on_cross_entropy: Callable[..., Any] | None = None

    # what a loss needs

    def rows(self) -> torch.Tensor:
        """The hidden states as (N, H)."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of other hidden states (…, H): a chunk of `rows()`."""
        logits = self.head(hidden)
        for operation in self.operations:
            logits = operation(logits)
        return logits

    def materialise(self, asked_by: str) -> torch.Tensor:
        """The true logits (…, V), with their gradient."""
        if self.on_materialise is not None:
            self.on_materialise(asked_by)
        logits = self.compute(self.hidden)
        return logits if logits.dtype == self.dtype else logits.to(self.dtype)

    # what a model asks of its logits: shape and place

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.vocab_size))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def ndim(self) -> int:
        return self.hidden.ndim

    @property
    def requires_grad(self) -> bool:
        return torch.is_grad_enabled()

    def dim(self) -> int:
        return self.hidden.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return True

    def __len__(self) -> int:
        return self.hidden.shape[0]

    # recorded: pointwise

    def _then(self, kind: str, operand: Any = None) -> DeferredLogits:
        return replace(self, operations=(*self.operations, Pointwise(kind, operand)))

    def _broadcasts(self, other: Any) -> bool:
        """A number, or a tensor that is the same for every row."""
        if isinstance(other, torch.Tensor):
            return other.numel() == 1 or (other.ndim == 1 and other.shape[0] == self.vocab_size)
        return isinstance(other, (int, float)) and not isinstance(other, bool)

    def _arithmetic(self, kind: str, other: Any, name: str) -> Any:
        if self._broadcasts(other):
            return self._then(kind, other)
        function: Callable[..., Any] = {"scale": torch.mul, "divide": torch.div, "shift": torch.add}[kind]
        return function(self.materialise(name), other)

    def __mul__(self, other: Any) -> Any:
        return self._arithmetic("scale", other, "*")

    __rmul__ = __imul__ = __mul__

    def mul(self, other: Any) -> Any:
        return self * other

    mul_ = mul

    def __truediv__(self, other: Any) -> Any:
        return self._arithmetic("divide", other, "/")

    __itruediv__ = __truediv__

    def div(self, other: Any) -> Any:
        return self / other

    div_ = div

    def __add__(self, other: Any) -> Any:
        return self._arithmetic("shift", other, "+")

    __radd__ = __iadd__ = __add__

    def __neg__(self) -> DeferredLogits:
        return self._then("scale", -1.0)

    def __sub__(self, other: Any) -> Any:
        return self + -other

    def tanh(self) -> DeferredLogits:
        return self._then("tanh")

    def float(self) -> DeferredLogits:
        return self.to(torch.float32)

    def type(self, dtype: torch.dtype) -> Any:
        return self.to(dtype)

    def type_as(self, other: torch.Tensor) -> Any:
        return self.to(other.dtype)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        targets = [*args, *kwargs.values()]
        dtypes = [target for target in targets if isinstance(target, torch.dtype)]
        devices = [torch.device(target) for target in targets if isinstance(target, (torch.device, str))]
        if len(dtypes) + len(devices) != len(targets) or any(device != self.device for device in devices):
            return self.materialise("to").to(*args, **kwargs)
        return replace(self._then("cast", dtypes[0]), dtype=dtypes[0]) if dtypes and dtypes[0] != self.dtype else self

    # recorded: rows

    def _rows_become(self, hidden: torch.Tensor) -> DeferredLogits:
        return replace(self, hidden=hidden)

    def contiguous(self, **_: Any) -> DeferredLogits:
        return self

    def reshape(self, *shape: Any) -> Any:
        wanted = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else tuple(shape)
        vocab = wanted[-1]
        if vocab == -1 and self.numel():
            rest = torch.Size(wanted[:-1]).numel()
            vocab = self.numel() // rest if rest and self.numel() % rest == 0 else None
        if vocab != self.vocab_size:
            return self.materialise("view").reshape(wanted)
        return self._rows_become(self.hidden.reshape(*wanted[:-1], self.hidden.shape[-1]))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim % self.ndim == self.ndim - 1:
            return self.materialise("flatten").flatten(start_dim, end_dim)
        return self._rows_become(self.hidden.flatten(start_dim, end_dim))

    def squeeze(self, dim: int | None = None) -> Any:
        if dim is None or dim % self.ndim == self.ndim - 1:
            return self.materialise("squeeze").squeeze() if dim is None else self.materialise("squeeze").squeeze(dim)
        return self._rows_become(self.hidden.squeeze(dim))

    def unsqueeze(self, dim: int) -> Any:
        if dim in (-1, self.ndim):
            return self.materialise("unsqueeze").unsqueeze(dim)
        return self._rows_become(self.hidden.unsqueeze(dim))

    def __getitem__(self, index: Any) -> Any:
        items = list(index) if isinstance(index, tuple) else [index]
        if any(item is Ellipsis for item in items):
            at = next(i for i, item in enumerate(items) if item is Ellipsis)
            used = sum(item is not None for item in items) - 1
            items[at : at + 1] = [slice(None)] * (self.ndim - used)
        plain = all(isinstance(item, (slice, int, type(None))) for item in items)
        if plain and sum(item is not None for item in items) == self.ndim and isinstance(items[-1], slice):
            *leading, vocab = items
            kept = range(*vocab.indices(self.vocab_size))
            rows = self._rows_become(self.hidden[tuple(leading)] if leading else self.hidden)
            if len(kept) == self.vocab_size and kept.step == 1:
                return rows
            if vocab.step in (None, 1):
                return replace(rows._then("slice", vocab), vocab_size=len(kept))
        elif plain and items and sum(item is not None for item in items) < self.ndim:
            return self._rows_become(self.hidden[tuple(items)])
        elif len(items) < self.ndim and all(isinstance(item, (slice, int, torch.Tensor)) for item in items):
            masked = sum(item.ndim if isinstance(item, torch.Tensor) and item.dtype == torch.bool else 1 for item in items)
            if masked < self.ndim:  # rows picked by a mask or by indices
                return self._rows_become(self.hidden[index])
        return self.materialise("indexing")[index]

    # everything else

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        if args and isinstance(args[0], DeferredLogits):
            logits = args[0]
            if function is torch.nn.functional.cross_entropy and logits.on_cross_entropy is not None:
                return logits.on_cross_entropy(logits, *args[1:], **kwargs)
            recorded = _RECORDED.get(name)
            if recorded is not None and not kwargs:
                return recorded(*args)
        elif len(args) == 2 and isinstance(args[1], DeferredLogits) and name in ("mul", "add"):
            return _RECORDED[name](args[1], args[0])

        def true(value: Any) -> Any:
            if isinstance(value, DeferredLogits):
                return value.materialise(name)
            if isinstance(value, (list, tuple)):
                return type(value)(true(item) for item in value)
            return value

        return function(*(true(value) for value in args), **{key: true(value) for key, value in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(torch.Tensor, name):
            raise AttributeError(f"logits have no attribute {name!r}")
        return getattr(self.materialise(name), name)


_RECORDED: dict[str, Callable[..., Any]] = {
    "tanh": DeferredLogits.tanh,
    "mul": DeferredLogits.mul,
    "multiply": DeferredLogits.mul,
    "div": DeferredLogits.div,
    "true_divide": DeferredLogits.div,
    "divide": DeferredLogits.div,
    "add": DeferredLogits.__add__,
    "flatten": DeferredLogits.flatten,
    "reshape": DeferredLogits.reshape,
    "squeeze": DeferredLogits.squeeze,
    "unsqueeze": DeferredLogits.unsqueeze,
}
