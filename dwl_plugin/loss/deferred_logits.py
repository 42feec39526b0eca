"""Logits that are not computed yet.

Almost every causal LM does `logits = self.lm_head(hidden)`, perhaps some pointwise maths, then hands the logits to a loss.
While a `PendingLoss` is armed, the head returns a `DeferredLogits` instead: the hidden states, the head, and a record of the
pointwise maths that the model went on to do. Whatever is done to the rows (slicing off the last position, flattening) is done
to the hidden states at once. Anything that is not recorded computes the true logits, so the result is right for every model
and only the memory differs; `on_materialise` is told what asked for them. A cross-entropy goes to `on_cross_entropy`, whether
it is asked for on deferred logits or on anything computed from true ones.

It is a plain object and not a tensor subclass: it passes untouched through the output traversals of DDP and Accelerate.

Shapes: H hidden size, V vocabulary, … any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["DeferredLogits", "Folded", "HeadFn", "Pointwise"]

HeadFn = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Pointwise:
    """One recorded operation, the same for every row: `scale`, `divide` and `shift` by a number or a broadcast tensor, `tanh`,
    `cast`, `clamp`, a `slice` of the vocabulary, `fill` of some of it, `log_softmax` over it."""

    kind: str
    operand: Any = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        match self.kind:
            case "scale":
                return torch.mul(logits, self.operand)
            case "divide":
                return torch.div(logits, self.operand)
            case "shift":
                return torch.add(logits, self.operand)
            case "tanh":
                return torch.tanh(logits)
            case "cast":
                return logits.to(self.operand)
            case "clamp":
                return logits.clamp(*self.operand)
            case "log_softmax":
                return logits.log_softmax(-1)
            case "slice":
                return logits[..., self.operand]
        assert self.kind == "fill", self.kind
        ids, value = self.operand
        logits = logits.clone()
        logits[..., ids] = value
        return logits


@dataclass(frozen=True)
class Folded:
    """softcap · tanh(logit_scale · z / softcap) over a slice of the vocabulary; without a softcap, logit_scale · z."""

    logit_scale: float | None
    softcap: float | None
    vocab: slice


def _arithmetic(kind: str, symbol: str) -> Callable[[DeferredLogits, Any], Any]:
    """The method that records `kind` with a number, or with a tensor that is the same for every row."""

    def method(self: DeferredLogits, other: Any) -> Any:
        if not isinstance(other, torch.Tensor):
            recorded = isinstance(other, (int, float)) and not isinstance(other, bool)
            return self._then(kind, other) if recorded else Pointwise(kind, other)(self.materialise(symbol))
        if 1 < other.ndim <= self.ndim and other.numel() == other.shape[-1]:
            other = other.reshape(-1)
        if other.ndim > 1 or other.numel() not in (1, self.vocab_size):
            return Pointwise(kind, other)(self.materialise(symbol))
        return replace(self._then(kind, other), dtype=torch.promote_types(self.dtype, other.dtype) if other.ndim else self.dtype)

    return method


@dataclass(eq=False)
class DeferredLogits:
    """`operations` of `head(hidden)`, not computed yet. Shape (…, V) for hidden (…, H).

    Replaced, never changed, but by the operations that change a tensor in place."""

    hidden: torch.Tensor
    head: HeadFn
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
        return logits if self.on_cross_entropy is None else _watched(logits, self.on_cross_entropy)

    @property
    def is_log_probability(self) -> bool:
        return bool(self.operations) and self.operations[-1].kind == "log_softmax"

    def folded(self) -> Folded | None:
        """The operations as numbers; None where they are anything else. Of log-probabilities too: a cross-entropy takes either."""
        before, after, capped, vocab = 1.0, 1.0, False, slice(None)
        for operation in self.operations[:-1] if self.is_log_probability else self.operations:
            if operation.kind == "cast":
                continue
            if operation.kind in ("scale", "divide") and isinstance(operation.operand, (int, float)):
                factor = operation.operand if operation.kind == "scale" else 1.0 / operation.operand
                before, after = (before, after * factor) if capped else (before * factor, after)
            elif operation.kind == "tanh" and not capped:
                capped = True
            elif operation.kind == "slice" and vocab == slice(None):
                vocab = operation.operand
            else:
                return None
        if capped:
            return Folded(before * after, after, vocab) if after > 0 else None
        return Folded(None if before == 1.0 else before, None, vocab)

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

    def __len__(self) -> int:
        return self.hidden.shape[0]

    # recorded: pointwise

    def _then(self, kind: str, operand: Any = None) -> DeferredLogits:
        return replace(self, operations=(*self.operations, Pointwise(kind, operand)))

    mul = __mul__ = __rmul__ = _arithmetic("scale", "*")
    div = __truediv__ = _arithmetic("divide", "/")
    add = __add__ = __radd__ = _arithmetic("shift", "+")

    def __sub__(self, other: Any) -> Any:
        return self + -other

    sub = __sub__

    def __neg__(self) -> DeferredLogits:
        return self._then("scale", -1.0)

    def tanh(self) -> DeferredLogits:
        return self._then("tanh")

    def clamp(self, min: Any = None, max: Any = None) -> Any:
        if all(bound is None or isinstance(bound, (int, float)) for bound in (min, max)):
            return self._then("clamp", (min, max))
        return self.materialise("clamp").clamp(min, max)

    def log_softmax(self, dim: int | None = None, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> Any:
        if dim is None or dim % self.ndim != self.ndim - 1:
            return F.log_softmax(self.materialise("log_softmax"), dim, dtype=dtype)
        return (self if dtype is None else self.to(dtype))._then("log_softmax")

    def float(self) -> Any:
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

    # recorded: in place

    def _become(self, result: Any) -> DeferredLogits:
        """The result of an operation in place, which the model may not look at again."""
        if not isinstance(result, DeferredLogits):  # true logits, under a head that does nothing
            result = replace(
                self, hidden=result, head=nn.Identity(), operations=(), vocab_size=result.shape[-1], dtype=result.dtype
            )
        self.__dict__.update(vars(result))
        return self

    def __imul__(self, other: Any) -> DeferredLogits:
        return self._become(self * other)

    def __itruediv__(self, other: Any) -> DeferredLogits:
        return self._become(self / other)

    def __iadd__(self, other: Any) -> DeferredLogits:
        return self._become(self + other)

    def __isub__(self, other: Any) -> DeferredLogits:
        return self._become(self - other)

    def __setitem__(self, index: Any, value: Any) -> None:
        *rows, vocab = index if isinstance(index, tuple) else (index, None)
        whole = (len(rows) == self.ndim - 1 and all(isinstance(row, slice) and row == slice(None) for row in rows)) or (
            len(rows) == 1 and rows[0] is Ellipsis
        )
        one_for_all = not isinstance(value, torch.Tensor) or value.ndim == 0
        if whole and one_for_all and not (isinstance(vocab, torch.Tensor) and vocab.ndim != 1):
            self._become(self._then("fill", (vocab, value)))
        else:
            logits = self.materialise("index assignment").clone()
            logits[index] = value
            self._become(logits)

    # recorded: rows

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
        return replace(self, hidden=self.hidden.reshape(*wanted[:-1], self.hidden.shape[-1]))

    view = reshape

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Any:
        if end_dim % self.ndim == self.ndim - 1:
            return self.materialise("flatten").flatten(start_dim, end_dim)
        return replace(self, hidden=self.hidden.flatten(start_dim, end_dim))

    def transpose(self, dim0: int, dim1: int) -> Any:
        if self.ndim - 1 in (dim0 % self.ndim, dim1 % self.ndim):
            return self.materialise("transpose").transpose(dim0, dim1)
        return replace(self, hidden=self.hidden.transpose(dim0 % self.ndim, dim1 % self.ndim))

    def squeeze(self, dim: int | None = None) -> Any:
        if dim is None or dim % self.ndim == self.ndim - 1:
            return self.materialise("squeeze").squeeze() if dim is None else self.materialise("squeeze").squeeze(dim)
        return replace(self, hidden=self.hidden.squeeze(dim))

    def unsqueeze(self, dim: int) -> Any:
        if dim in (-1, self.ndim):
            return self.materialise("unsqueeze").unsqueeze(dim)
        return replace(self, hidden=self.hidden.unsqueeze(dim))

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
            rows = replace(self, hidden=self.hidden[tuple(leading)] if leading else self.hidden)
            if len(kept) == self.vocab_size and kept.step == 1:
                return rows
            if vocab.step in (None, 1):
                return replace(rows._then("slice", vocab), vocab_size=len(kept))
        elif plain and items and sum(item is not None for item in items) < self.ndim:
            return replace(self, hidden=self.hidden[tuple(items)])
        elif len(items) < self.ndim and all(isinstance(item, (slice, int, torch.Tensor)) for item in items):
            masked = sum(item.ndim if isinstance(item, torch.Tensor) and item.dtype == torch.bool else 1 for item in items)
            if masked < self.ndim:  # rows picked by a mask or by indices
                return replace(self, hidden=self.hidden[index])
        return self.materialise("indexing")[index]

    # everything else

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        if not args and isinstance(kwargs.get("input"), DeferredLogits):
            args = (kwargs.pop("input"),)
        if args and isinstance(args[0], DeferredLogits):
            logits = args[0]
            is_loss = function is F.cross_entropy or (function is F.nll_loss and logits.is_log_probability)
            if is_loss and logits.on_cross_entropy is not None:
                return logits.on_cross_entropy(logits, *args[1:], **kwargs)
            if function is F.nll_loss:  # of what is no log-probability: whatever it is, it is no cross-entropy
                args = (replace(logits, on_cross_entropy=None), *args[1:])
            if name in _RECORDED or _in_place(name):
                return getattr(logits, _RECORDED.get(name, name))(*args[1:], **kwargs)
        elif len(args) == 2 and isinstance(args[1], DeferredLogits) and name in ("mul", "add"):
            return getattr(args[1], name)(args[0])

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
        if name in _WITHOUT_VALUES:
            return getattr(self.hidden.new_empty((), dtype=self.dtype), name)
        if not _in_place(name):
            return getattr(self.materialise(name), name)

        def in_place(*args: Any, **kwargs: Any) -> DeferredLogits:
            if hasattr(type(self), name[:-1]):
                return self._become(getattr(self, name[:-1])(*args, **kwargs))
            return self._become(getattr(self.materialise(name).clone(), name)(*args, **kwargs))

        return in_place


# Functions of torch, by name, and the method that records them.
_RECORDED = {
    **{name: name for name in ("add", "clamp", "div", "flatten", "log_softmax", "mul", "reshape")},
    **{name: name for name in ("squeeze", "sub", "tanh", "transpose", "unsqueeze")},
    **{"clip": "clamp", "divide": "div", "multiply": "mul", "true_divide": "div"},
}

# Attributes of a tensor that tell nothing of its values.
_WITHOUT_VALUES = {"element_size", "get_device", "is_cuda", "is_floating_point", "itemsize", "layout"}
_WITHOUT_VALUES |= {"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"}


def _in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and hasattr(torch.Tensor, name)


def _watched(logits: torch.Tensor, on_cross_entropy: Callable[..., Any]) -> torch.Tensor:
    """`logits` as a tensor that hands a cross-entropy of itself, or of whatever was computed from it, to `on_cross_entropy`."""

    class TrueLogits(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
            kwargs = dict(kwargs or {})
            if function not in (F.cross_entropy, F.nll_loss):
                return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]
            args = args or (kwargs.pop("input"),)
            with torch._C.DisableTorchFunctionSubclass():
                return on_cross_entropy(args[0].as_subclass(torch.Tensor), *args[1:], **kwargs)

    return logits.as_subclass(TrueLogits)
