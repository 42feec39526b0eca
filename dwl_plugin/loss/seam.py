"""Where a model's loss becomes ours: its output head hands out deferred logits and its `loss_function` reduces them.

`attach` patches two things of one model instance, the forward of its outermost output head and its `loss_function`. Both stay
asleep, so generation and every other use get plain logits, until a `LossStep` is armed around a forward.

Shapes: B rows, T positions, N = B·T, H hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dwl_plugin.errors import LossNotTakenError
from dwl_plugin.loss.deferred import DeferredLogits
from dwl_plugin.loss.linear_cross_entropy import TokenLoss, linear_cross_entropy
from dwl_plugin.loss.module_path import module_cross_entropy
from dwl_plugin.loss.shift import IGNORE_INDEX, shift_left

__all__ = ["LossSpec", "LossStep", "Seam", "attach"]

OnTokens = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True)
class LossSpec:
    """What each class pays and how much it counts, over C classes (last: every token no class claims).

    Token t of class c pays w_c · sg(max(p_t^a_c, m_c)) · (−log p_t); `weight` is w, `exponent` a, `min_weight` m.
    """

    weight: tuple[float, ...] = (1.0,)
    exponent: tuple[float, ...] = (0.0,)
    min_weight: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not len(self.weight) == len(self.exponent) == len(self.min_weight) >= 1:
            raise ValueError("weight, exponent and min_weight need one number per class, of at least one class")

    @classmethod
    def named(cls, loss: str) -> LossSpec:
        """`nll` or `dft`, for every token."""
        if loss not in ("nll", "dft"):
            raise ValueError(f"loss is 'nll', 'dft' or a LossSpec, not {loss!r}")
        return cls(exponent=(1.0 if loss == "dft" else 0.0,))


@dataclass
class LossStep:
    """What one forward has to know. `denominator` divides the summed loss; None: the number of targets of this forward.

    `class_ids` (B, T) has the layout of `labels` and is read at the positions that are targets; None: everything is the last
    class. `on_tokens(nll_N, class_N, weight_N)` gets detached fp32 values with class −100 where a position is no target.
    """

    spec: LossSpec
    labels: torch.Tensor | None = None
    class_ids: torch.Tensor | None = None
    class_weight: torch.Tensor | None = None
    denominator: torch.Tensor | float | None = None
    on_tokens: OnTokens | None = None
    taken: int = field(default=0, init=False)


class Seam:
    """The two patches of one model. `standing` is the spec used when no step is armed; None leaves the model alone."""

    def __init__(self, model: nn.Module, say: Callable[[str], None], standing: LossSpec | None = None) -> None:
        self.model = _base_model(model)
        self.head = _output_head(self.model)
        self._say, self._said = say, set[str]()
        self._standing, self._step = standing, None  # type: tuple[LossSpec | None, LossStep | None]
        self._head_was: Any = self.head.__dict__.get("forward")
        self._head_forward: Callable[..., torch.Tensor] = self.head.forward
        self._loss_was: Any = self.model.__dict__.get("_loss_function")
        self._model_loss: Callable[..., Any] = self.model.loss_function  # type: ignore[assignment]
        seam = self

        def forward(head: nn.Module, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if seam._listening is None or args or kwargs:
                return seam._head_forward(hidden, *args, **kwargs)
            return seam._defer(hidden)

        # Spelled out, because trainers read the signature to learn whether the loss divides by num_items_in_batch itself.
        def loss_function(
            logits: Any,
            labels: torch.Tensor | None = None,
            vocab_size: int | None = None,
            num_items_in_batch: torch.Tensor | int | None = None,
            ignore_index: int = IGNORE_INDEX,
            shift_labels: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            if seam._listening is None or not (isinstance(logits, DeferredLogits) or seam._step is not None):
                passed = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
                return seam._model_loss(
                    logits,
                    labels,
                    vocab_size=vocab_size,
                    ignore_index=ignore_index,
                    **{k: v for k, v in passed.items() if v is not None},
                )
            return seam._causal_loss(logits, labels, num_items_in_batch, ignore_index, shift_labels)

        self.head.forward = types.MethodType(forward, self.head)
        self.model.loss_function = loss_function  # type: ignore[assignment]

    @property
    def replaced(self) -> str:
        """The loss the model came with."""
        return getattr(self._model_loss, "__name__", type(self._model_loss).__name__)

    def detach(self) -> None:
        """Take the patches off; the model is as it was."""
        if self._head_was is None:
            self.head.__dict__.pop("forward", None)
        else:
            self.head.forward = self._head_was
        if self._loss_was is None:
            self.model.__dict__.pop("_loss_function", None)
        else:
            self.model.loss_function = self._loss_was

    @contextmanager
    def armed(self, step: LossStep) -> Iterator[LossStep]:
        """One forward inside; raises `LossNotTakenError` if its loss was computed by somebody else."""
        self._step = step
        try:
            yield step
        finally:
            self._step = None
        if step.taken == 0:
            raise LossNotTakenError(
                f"[dwl] {type(self.model).__name__} returned a loss that dwl_plugin did not compute. Another patch replaced the "
                f"model's loss or its output head ({type(self.head).__name__}); remove it, or delete the `loss:` line."
            )

    # the patches, awake

    @property
    def _listening(self) -> LossSpec | None:
        return self._step.spec if self._step is not None else self._standing

    def _defer(self, hidden: torch.Tensor) -> DeferredLogits:
        dtype = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else hidden.dtype
        )
        return DeferredLogits(
            hidden,
            self._head_forward,
            vocab_size=_vocab_size(self.head),
            dtype=dtype,
            on_materialise=self._materialised,
            on_cross_entropy=self._cross_entropy,
        )

    def _materialised(self, asked_by: str) -> None:
        self._say_once(
            f"{type(self.model).__name__} uses `{asked_by}` on its logits, so they are computed in full (more memory)."
        )

    def _causal_loss(
        self,
        logits: DeferredLogits | torch.Tensor,
        labels_BT: torch.Tensor | None,
        num_items_in_batch: torch.Tensor | int | None,
        ignore_index: int,
        targets_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        """The model called its `loss_function`: shift, unless the labels came shifted."""
        shifts = targets_BT is None and self.replaced != "ForMaskedLMLoss"
        if targets_BT is None:
            assert labels_BT is not None
            targets_BT = shift_left(labels_BT, ignore_index) if shifts else labels_BT
        step = self._current_step(num_items_in_batch)
        class_BT = step.class_ids
        if class_BT is not None and shifts:
            class_BT = shift_left(class_BT)
        return self._reduce(logits, targets_BT, class_BT, ignore_index, step)

    def _cross_entropy(
        self,
        logits: DeferredLogits,
        targets: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = IGNORE_INDEX,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """The model called `F.cross_entropy` or `nn.CrossEntropyLoss` on its logits: that is its loss."""
        plain = weight is None and label_smoothing == 0.0 and reduction in ("mean", "sum") and size_average is None
        if not plain or targets.is_floating_point():
            asked_by = "cross_entropy"
            return nn.functional.cross_entropy(
                logits.materialise(asked_by),
                targets,
                weight,
                size_average,
                ignore_index,
                reduce,
                reduction,
                label_smoothing,
            )
        step = self._current_step(None)
        class_N = None if step.class_ids is None else self._class_ids_like(targets, step)
        return self._reduce(logits, targets, class_N, ignore_index, step)

    def _current_step(self, num_items_in_batch: torch.Tensor | int | None) -> LossStep:
        if self._step is not None:
            return self._step
        assert self._standing is not None
        return LossStep(self._standing, denominator=num_items_in_batch)

    def _class_ids_like(self, targets: torch.Tensor, step: LossStep) -> torch.Tensor:
        """Class ids in the layout of `targets`, which the model shifted and flattened in its own way."""
        assert step.class_ids is not None and step.labels is not None
        labels_BT, class_BT = step.labels.to(targets.device), step.class_ids.to(targets.device)
        layouts = (
            (labels_BT[..., 1:], class_BT[..., 1:]),
            (shift_left(labels_BT), shift_left(class_BT)),
            (labels_BT, class_BT),
        )
        for labels, class_ids in layouts:
            if labels.numel() == targets.numel() and torch.equal(labels.reshape(-1), targets.reshape(-1)):
                return class_ids.reshape(targets.shape)
        raise LossNotTakenError(
            f"[dwl] {type(self.model).__name__} rearranges its labels in a way dwl_plugin does not know, so token classes "
            "cannot be matched to targets. `loss: nll` and `loss: dft` without classes work with it."
        )

    def _reduce(
        self,
        logits: DeferredLogits | torch.Tensor,
        targets: torch.Tensor,
        class_ids: torch.Tensor | None,
        ignore_index: int,
        step: LossStep,
    ) -> torch.Tensor:
        """Σ_t w_c(t)·sg(max(p_t^a, m))·nll_t / denominator, and the tokens handed to the metrics."""
        step.taken += 1
        targets_N = targets.reshape(-1).to(logits.device)
        class_N = None if class_ids is None else class_ids.reshape(-1).to(logits.device)
        spec, last = step.spec, len(step.spec.weight) - 1
        is_target_N = targets_N != ignore_index
        if class_N is None:
            class_N = torch.where(is_target_N, last, IGNORE_INDEX)
        slot_N = class_N.clamp(min=0)
        weight_C = step.class_weight
        if weight_C is None:
            weight_C = torch.tensor(spec.weight, dtype=torch.float32, device=logits.device)
        weight_N = weight_C.to(device=logits.device, dtype=torch.float32)[slot_N]
        exponent = _per_token(spec.exponent, slot_N)
        min_weight = _per_token(spec.min_weight, slot_N)
        out = self._token_loss(logits, targets_N, ignore_index, weight_N, exponent, min_weight)
        if step.on_tokens is not None:
            p_N = torch.exp(-out.nll)
            paid_N = weight_N * (p_N**exponent).clamp(min=min_weight)
            step.on_tokens(out.nll, torch.where(is_target_N, class_N, IGNORE_INDEX), paid_N)
        denominator = step.denominator
        if denominator is None:
            denominator = is_target_N.sum().clamp(min=1)
        if isinstance(denominator, torch.Tensor):
            denominator = denominator.to(out.loss.device)
        return out.loss / denominator

    def _token_loss(
        self,
        logits: DeferredLogits | torch.Tensor,
        targets_N: torch.Tensor,
        ignore_index: int,
        weight_N: torch.Tensor,
        exponent: torch.Tensor | float,
        min_weight: torch.Tensor | float,
    ) -> TokenLoss:
        options: dict[str, Any] = {
            "token_weight": weight_N,
            "exponent": exponent,
            "min_weight": min_weight,
            "ignore_index": ignore_index,
        }
        if isinstance(logits, torch.Tensor):
            self._say_once(f"{type(self.model).__name__} computes its logits in full before its loss (more memory).")
            return module_cross_entropy(
                logits.reshape(targets_N.numel(), -1), lambda chunk: chunk, targets_N, **options
            )
        rows_NH = logits.rows()
        linear = _as_linear(self.head, self._head_was)
        fused = _fold(logits) if linear is not None else None
        if linear is not None and fused is not None:
            weight_VH, bias_V = linear.weight, linear.bias
            if fused.vocab != slice(None):
                weight_VH, bias_V = weight_VH[fused.vocab], None if bias_V is None else bias_V[fused.vocab]
            return linear_cross_entropy(
                rows_NH,
                weight_VH,
                targets_N,
                bias=bias_V,
                softcap=fused.softcap,
                logit_scale=fused.logit_scale,
                **options,
            )
        return module_cross_entropy(rows_NH, logits.compute, targets_N, vocab_size=logits.vocab_size, **options)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


def attach(model: nn.Module, loss: str | LossSpec = "nll", say: Callable[[str], None] = print) -> Seam:
    """Make a transformers model compute its training loss from deferred logits, without a trainer.

        loss = model(input_ids=ids, labels=ids).loss        # Σ_t w·sg(max(p^a, m))·nll / number of targets

    `loss` is "nll", "dft" or a `LossSpec` of one class. A forward without labels, and generation, are left alone. `say` gets
    the few lines worth knowing. Returns a handle; `.detach()` gives the model back.
    """
    spec = LossSpec.named(loss) if isinstance(loss, str) else loss
    return Seam(model, say, standing=spec)


@dataclass(frozen=True)
class _Folded:
    logit_scale: float | None
    softcap: float | None
    vocab: slice


def _fold(logits: DeferredLogits) -> _Folded | None:
    """The recorded operations as softcap·tanh(logit_scale·z / softcap) over a slice of the vocabulary; None if they are not."""
    before, after, capped, vocab = 1.0, 1.0, False, slice(None)
    for operation in logits.operations:
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
        return _Folded(before * after, after, vocab) if after > 0 else None
    return _Folded(None if before == 1.0 else before, None, vocab)


def _per_token(values_C: tuple[float, ...], slot_N: torch.Tensor) -> torch.Tensor | float:
    """A number where every class agrees: the loss core has a shorter way for it."""
    if len(set(values_C)) == 1:
        return values_C[0]
    return torch.tensor(values_C, dtype=torch.float32, device=slot_N.device)[slot_N]


def _base_model(model: nn.Module) -> nn.Module:
    """The transformers model inside an adapter wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator, no-any-return]


def _output_head(model: nn.Module) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if not isinstance(head, nn.Module):
        raise LossNotTakenError(
            f"[dwl] {type(model).__name__} has no output head to take the loss from; it is no language model."
        )
    return head


def _vocab_size(head: nn.Module) -> int:
    for module in (head, getattr(head, "base_layer", None), getattr(head, "original_module", None)):
        if isinstance(size := getattr(module, "out_features", None), int):
            return size
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return weight.shape[0]
    raise LossNotTakenError(f"[dwl] the vocabulary size of the output head {type(head).__name__} cannot be read.")


def _as_linear(head: nn.Module, patched_before: Any) -> nn.Linear | None:
    """`head` if hidden @ weight.T + bias is all it does."""
    plain = (
        type(head) is nn.Linear and patched_before is None and not head._forward_hooks and not head._forward_pre_hooks
    )
    return head if plain and head.weight.is_floating_point() else None  # type: ignore[return-value, union-attr, operator]
