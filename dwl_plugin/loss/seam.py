"""Where the loss of a model is replaced: its output head hands out deferred logits and its `loss_function` reduces them.

`Seam` patches two things of one model instance, the forward of its outermost output head and its `loss_function`. Both are
inactive, so generation and every other use get plain logits, until a `PendingLoss` is armed around a forward. The patches are
bound methods of the seam: a deep copy of the model gets a seam of its own.

Shapes: B rows, T positions, N = B·T, H hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwl_plugin.errors import LossNotTakenError
from dwl_plugin.loss import heads
from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.chunked import module_cross_entropy
from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.deferred_logits import DeferredLogits, Folded, HeadFn
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, fused_cross_entropy
from dwl_plugin.loss.membership import Membership
from dwl_plugin.loss.origins import foreign_home, package
from dwl_plugin.loss.shift import IGNORE_INDEX, shift_left
from dwl_plugin.loss.spec import LossSpec, PendingLoss
from dwl_plugin.loss.token_losses import Term
from dwl_plugin.loss.tokens import Targets

__all__ = ["Seam"]

Logits = DeferredLogits | Tensor
Context = Callable[[], AbstractContextManager[Any]]

_LABELS = ("labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True)
class _Inside:
    """Handed to the head beside its input: what to do with it there."""

    work: Callable[[Tensor], Any]


class Seam:
    """The patches of one model; inactive unless armed. `log_line` gets the few lines worth knowing.

    Inside `as_base()` the model is its base model (an adapter switched off); a spec with an anchor needs it.
    """

    def __init__(self, model: nn.Module, log_line: Callable[[str], None], as_base: Context | None = None) -> None:
        _keep_out_of_graphs()
        self.model = heads.base_model(model)
        # Older PEFT calls the model inside it past its hooks, so both carry them.
        self.called = (model,) if model is self.model else (model, self.model)
        self.head = heads.output_head(self.model)
        older = getattr(self.head.__dict__.get("forward"), "__self__", None)
        if isinstance(older, Seam):  # a trainer that is built again over the same model
            older.detach()
        self._log_line, self._logged = log_line, set[str]()
        self._pending: PendingLoss | None = None
        self._is_off = False
        self._layout: int | None = None
        self._constants: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}
        # A wrapper around this model, or a language model inside it, may be the one whose `loss_function` is called.
        owners = [module for module in self.model.modules() if heads.uses_head(module, self.head)]
        self._patches = [(self.head, "forward", self._forward), *((o, "_loss_function", self._loss_function) for o in owners)]
        self._were: list[Any] = [module.__dict__.get(name) for module, name, _ in self._patches]
        self._head_forward: Callable[..., Tensor] = self.head.forward
        self._model_loss: Callable[..., Any] = self.model.loss_function  # type: ignore[assignment]
        self._as_base = as_base
        hooked = self.called if as_base is not None else ()
        self._hooks = [module.register_forward_pre_hook(self._run_base, with_kwargs=True) for module in hooked]
        self.head.forward = self._forward
        for owner in owners:
            owner.loss_function = self._loss_function  # type: ignore[assignment]

    @property
    def replaced(self) -> str:
        """The loss the model came with."""
        return getattr(self._model_loss, "__name__", type(self._model_loss).__name__)

    def detach(self) -> None:
        """Take the patches off; the model is as it was. Once is enough, twice does no harm."""
        self._is_off = True
        for hook in self._hooks:
            hook.remove()
        for (module, name, patch), was in zip(self._patches, self._were, strict=True):
            if module.__dict__.get(name) == patch:
                module.__dict__[name] = was
                if was is None:
                    del module.__dict__[name]

    @property
    def taken(self) -> bool:
        """Whether the loss of the forward that it is armed for was computed here."""
        return self._pending is not None and self._pending.taken > 0

    @contextmanager
    def armed(self, pending: PendingLoss) -> Iterator[PendingLoss]:
        """One forward inside; raises as `disarm`."""
        self.arm(pending)
        completed = False
        try:
            yield pending
            completed = True
        finally:
            self.disarm(completed)

    def arm(self, pending: PendingLoss) -> None:
        """Compute the loss of the next forward as `pending` says."""
        self._pending = pending

    def disarm(self, completed: bool) -> None:
        """Back to plain logits. Raises `LossNotTakenError` if the loss of the armed forward was computed elsewhere."""
        pending, self._pending = self._pending, None
        if completed and pending is not None and pending.taken == 0:
            raise self._not_taken()

    def _run_base(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward whose loss has an anchor: the same inputs through the base model, as far as its head."""
        pending = self._pending
        if pending is None or not pending.spec.is_anchored or pending.base is not None:
            return
        assert self._as_base is not None
        unlabelled = {key: value for key, value in kwargs.items() if key not in _LABELS}
        bound = inspect.signature(model.forward).bind_partial(*args, **unlabelled)
        if args:
            bound.arguments.update({key: None for key in _LABELS if key in bound.arguments})
        was_training, self._pending = model.training, PendingLoss(LossSpec())  # armed, so that the head defers
        try:
            with torch.no_grad(), self._as_base():
                model.eval()  # no dropout and no noise in what the model is held to
                out = model(*bound.args, **bound.kwargs)
        finally:
            model.train(was_training)
            self._pending = pending
        pending.base = out["logits"] if isinstance(out, Mapping) else out[0]

    # the patches

    def _forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], _Inside):
            return args[0].work(hidden)
        if self._pending is None or args or kwargs:
            return self._head_forward(hidden, *args, **kwargs)
        device, vocab_size = hidden.device.type, heads.vocab_size_of(self.head)
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        return DeferredLogits(hidden, self._logits, vocab_size, dtype, (), self._materialised, self._cross_entropy)

    # Spelled out, because trainers read the signature to learn whether the loss divides by num_items_in_batch itself.
    def _loss_function(
        self,
        logits: Any,
        labels: Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._pending is not None:
            return self._causal_loss(logits, labels, shift_labels, ignore_index)
        passed = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
        given = {key: value for key, value in passed.items() if value is not None}
        return self._model_loss(logits, labels, vocab_size=vocab_size, ignore_index=ignore_index, **given)

    # armed

    @property
    def _armed(self) -> PendingLoss:
        assert self._pending is not None
        return self._pending

    def _materialised(self, asked_by: str) -> None:
        self._log_once(f"{type(self.model).__name__} uses `{asked_by}` on its logits, so they are computed in full (more memory).")

    def _causal_loss(self, logits: Logits, labels_BT: Tensor | None, targets_BT: Tensor | None, ignore_index: int) -> Tensor:
        """The model called its `loss_function`: shift, unless the labels came shifted."""
        shifts = targets_BT is None and self.replaced != "ForMaskedLMLoss"
        given_BT = labels_BT if targets_BT is None else targets_BT
        assert given_BT is not None, "a loss without labels"
        pending = self._armed
        class_BT, as_given = pending.class_ids, pending.shifted or targets_BT is None
        if class_BT is not None and not (as_given and class_BT.shape == given_BT.shape):
            class_BT = self._class_ids_like(given_BT)
        if shifts:
            given_BT = shift_left(given_BT, ignore_index)
            class_BT = None if class_BT is None else shift_left(class_BT)
        return self._reduce(logits, given_BT, class_BT, ignore_index)

    def _cross_entropy(
        self,
        logits: Logits,
        targets: Tensor,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = IGNORE_INDEX,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """The model called `F.cross_entropy`, `F.nll_loss` or their modules on its logits: that is its loss."""
        pending = self._pending
        if isinstance(logits, DeferredLogits) and logits.ndim != 2:
            logits = logits.materialise("cross_entropy").as_subclass(Tensor)
        plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
        # A model that divides the sum itself divides by what it counts, not by the denominator of the step.
        known = reduction == "mean" or (reduction == "sum" and pending is not None and pending.denominator is None)
        if pending is None or not plain or not known or targets.is_floating_point():
            true = (logits.materialise("cross_entropy") if isinstance(logits, DeferredLogits) else logits).as_subclass(Tensor)
            return F.cross_entropy(true, targets, weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        if isinstance(logits, Tensor) and logits.ndim > 2:  # (B, V, …)
            logits = logits.movedim(1, -1)
        # The same labels several times over, for several streams of logits: the model takes their mean.
        copies = 1 if pending.labels is None else max(1, targets.numel() // max(1, pending.labels.numel()))
        class_ids = None if pending.class_ids is None else self._class_ids_like(targets, copies)
        return self._reduce(logits, targets, class_ids, ignore_index, copies, divides=reduction == "mean")

    def _class_ids_like(self, targets: Tensor, copies: int = 1) -> Tensor:
        """Class ids in the layout of `targets`, which the model shifted and flattened in its own way."""
        pending = self._armed
        if pending.class_ids is None or pending.labels is None:
            raise self._unmatched()
        labels_BT, class_BT = pending.labels.to(targets.device), pending.class_ids.to(targets.device)
        layouts = ((labels_BT[..., 1:], class_BT[..., 1:]), (shift_left(labels_BT), shift_left(class_BT)), (labels_BT, class_BT))
        wanted = targets.reshape(copies, -1)

        def fits(labels: Tensor) -> Tensor:
            if labels.numel() != wanted.shape[1]:
                return torch.tensor(False)
            return (labels.reshape(1, -1) == wanted).all()

        layout = self._layout
        if layout is None or targets.device.type == "cpu":
            fitting = [at for at, (labels, _) in enumerate(layouts) if fits(labels)]
            if not fitting:
                raise self._unmatched()
            layout = fitting[0]
            if len(fitting) == 1:  # a batch without targets fits several
                self._layout = layout
        else:  # the model does what it did before: the device checks, and nothing waits for it
            torch._assert_async(fits(layouts[layout][0]), str(self._unmatched()))
        return layouts[layout][1].reshape(1, -1).expand_as(wanted).reshape(targets.shape)

    def _not_taken(self) -> LossNotTakenError:
        kind = type(self.model)
        whose = "" if package(kind.__module__) == "transformers" else f" of `{kind.__module__}`"
        why = f"{kind.__name__}{whose} returned a loss that dwl_plugin did not compute."
        if self._is_off:
            return LossNotTakenError(
                f"{why} The configured one was taken off the model, as it is where another trainer over the same model gets a loss "
                "of its own. Go on with that trainer, or `detach()` here and apply the loss again."
            )
        patches = [
            (self.model, "forward", "forward"),
            (self.model, "_loss_function", "loss function"),
            (self.head, "forward", "output head"),
        ]
        for module, method, name in patches:
            if (home := foreign_home(module, method)) is not None:
                return LossNotTakenError(
                    f"{why} Its {name} is that of `{home}`, put there in place of its own. Load the model without "
                    f"`{package(home)}`, in a process that does not import it, or delete the `loss:` line."
                )
        return LossNotTakenError(
            f"{why} Either its own loss is more than a cross-entropy of its logits (label smoothing, for one), or another patch "
            f"replaced its loss or its output head ({type(self.head).__name__}). Remove that, or delete the `loss:` line."
        )

    def _unmatched(self) -> LossNotTakenError:
        return LossNotTakenError(
            f"{type(self.model).__name__} rearranges its labels in a way dwl_plugin does not know, so token classes (and "
            "the base model of an `anchor`) cannot be matched to targets. `loss: nll` and `loss: dft` without them work with it."
        )

    def _reduce(
        self, logits: Logits, targets: Tensor, class_ids: Tensor | None, ignore_index: int, copies: int = 1, *, divides: bool = True
    ) -> Tensor:
        """Σ_t Σ_{c∋t} w_c·f_c(t)·nll_t / denominator, and the tokens handed to the metrics."""
        pending = self._armed
        pending.taken += 1
        spec, classes = pending.spec, len(pending.spec.weight)
        linear = self._linear(self.head) if isinstance(logits, DeferredLogits) else None
        device = logits.device if linear is None else linear.weight.device
        targets_N = targets.reshape(-1).to(device)
        is_target_N = targets_N != ignore_index
        members = Membership.all_rest(is_target_N, classes, spec.overlap)
        if class_ids is not None:
            class_N = torch.where(is_target_N, class_ids.reshape(-1).to(device), IGNORE_INDEX)
            members = Membership.read(class_N, classes, spec.overlap, spec.weighs)
        paying = members if spec.classes_pay or class_ids is None else members.in_rest()
        weight_C = self._constant(spec.weight, device) if pending.class_weight is None else pending.class_weight
        weight_C = weight_C.to(device=device, dtype=torch.float32, non_blocking=True)
        term_C = self._constant(tuple(spec.terms.index(objective) for objective in spec.objective), device)
        # Divided here and not at the end: nothing then scales gradients that were rounded already.
        share_C = weight_C / self._denominator(is_target_N, copies) if divides else weight_C
        terms = [Term(objective, paying.weigh(torch.where(term_C == k, share_C, 0.0))) for k, objective in enumerate(spec.terms)]
        unlikely_N = paying.weigh(share_C, sign=-1) if spec.allow_negative else None
        anchor, anchor_C = None, None
        if spec.is_anchored:
            anchor_C = self._constant(spec.anchor, device)
            anchor = Anchor(paying.weigh(share_C * anchor_C), self._rows_like(pending.base, logits).to(device))
        out = self._token_losses(logits, Targets(targets_N, terms, anchor, ignore_index, unlikely_N), pending.base)
        if pending.on_tokens is not None:
            factors_KN = torch.stack(out.factors)
            pending.on_tokens(ForwardMetrics(members, paying, out.nll, factors_KN, term_C, weight_C, out.kl, anchor_C))
        return out.loss

    def _denominator(self, is_target_N: Tensor, copies: int) -> Tensor | float:
        denominator = self._armed.denominator
        if denominator is None:
            return is_target_N.sum().clamp(min=1)
        if isinstance(denominator, Tensor) and (denominator.ndim or denominator.device.type != "cpu"):  # else a mere number
            denominator = denominator.to(is_target_N.device)
        return denominator * copies

    def _rows_like(self, base: Logits | None, logits: Logits) -> Tensor:
        """The base model's hidden states, or logits, at the rows of `logits`: all positions, or all but the last of each row."""
        rows = logits.numel() // logits.shape[-1]
        values = base.hidden if isinstance(base, DeferredLogits) else base
        for kept in () if values is None or values.ndim != 3 else (values, values[:, :-1]):
            if kept.shape[:-1].numel() == rows:
                return kept.reshape(rows, -1)
        raise self._unmatched()

    def _constant(self, values: tuple[float, ...], device: torch.device) -> Tensor:
        """Copied to the device once: each copy would wait for it."""
        kind = torch.int64 if isinstance(values[0], int) else torch.float32
        if (values, kind, device) not in self._constants:
            self._constants[values, kind, device] = torch.tensor(values, dtype=kind, device=device)
        return self._constants[values, kind, device]

    def _token_losses(self, logits: Logits, given: Targets, base: Logits | None) -> LinearCrossEntropyOutput:
        """What the tokens pay, on whichever path the head allows. The anchor comes without a head: that is decided here."""
        anchor = given.anchor

        def through_modules(head: HeadFn, rows_NX: Tensor, vocab_size: int) -> LinearCrossEntropyOutput:
            anchored = None if anchor is None else replace(anchor, head=self._base_logits(base))
            return module_cross_entropy(rows_NX, head, replace(given, anchor=anchored), vocab_size=vocab_size)

        if isinstance(logits, Tensor):
            self._log_once(f"{type(self.model).__name__} computes its logits in full before its loss (more memory).")
            rows_NV = logits.as_subclass(Tensor).reshape(given.targets.numel(), logits.shape[-1])
            return through_modules(nn.Identity(), rows_NV, logits.shape[-1])

        folded = logits.folded() if logits.head == self._logits else None

        def of(rows_NH: Tensor) -> LinearCrossEntropyOutput:
            linear = self._linear(self.head)
            base_linear = None if anchor is None else self._base_linear(base, folded)
            if linear is None or folded is None or (anchor is not None and base_linear is None):
                return through_modules(logits.compute, rows_NH, logits.vocab_size)
            weight_VH, bias_V = _matrix(linear, folded.vocab)
            anchored = anchor
            if anchored is not None and base_linear is not None and base_linear is not linear:
                anchored = replace(anchored, head=_matrix(base_linear, folded.vocab))
            there_NH, todo, scale = rows_NH.to(weight_VH.device), replace(given, anchor=anchored), folded.logit_scale
            return fused_cross_entropy(there_NH, weight_VH, todo, bias=bias_V, softcap=folded.softcap, logit_scale=scale)

        return self._inside_head(of, logits.rows()) if heads.gathered_by_hooks(self.head) else of(logits.rows())

    def _linear(self, head: nn.Module) -> nn.Linear | None:
        """`head` as a matrix, if nothing else had patched its forward before."""
        return None if head is self.head and self._were[0] is not None else heads.as_linear(head)

    def _base_linear(self, base: Logits | None, folded: Folded | None) -> nn.Linear | None:
        """The base model's head, where it is a matrix under the very scale, cap and vocabulary of the trained one."""
        if not isinstance(base, DeferredLogits) or base.head != self._logits or base.folded() != folded:
            return None
        return self._linear(heads.without_adapter(self.head))

    def _base_logits(self, base: Logits | None) -> HeadFn:
        """From rows of what `_rows_like` gives to the base model's logits."""
        if not isinstance(base, DeferredLogits):
            return nn.Identity()
        if base.head != self._logits:  # what was changed in place is computed already
            return base.compute
        head = heads.without_adapter(self.head)
        return replace(base, head=self._head_forward if head is self.head else head).compute

    def _logits(self, hidden: Tensor) -> Tensor:
        """What the head would have returned."""
        if not heads.gathered_by_hooks(self.head):
            return self._head_forward(hidden)
        logits: Tensor = self.head(hidden, _Inside(self._head_forward))
        return logits

    def _inside_head(self, work: Callable[[Tensor], LinearCrossEntropyOutput], rows_NH: Tensor) -> LinearCrossEntropyOutput:
        """`work` where the head's own hooks have gathered its weight, once for all chunks, and will for its backward."""
        done: list[LinearCrossEntropyOutput] = []

        def loss_of(rows_NH: Tensor) -> Tensor:
            done.append(work(rows_NH))
            return done[0].loss

        loss = self.head(rows_NH, _Inside(loss_of))
        # Mixed precision may have rounded the output; what it hooks for the backward is the tensor before.
        return done[0]._replace(loss=loss) if loss.dtype == done[0].loss.dtype else done[0]

    def _log_once(self, line: str) -> None:
        if line not in self._logged:
            self._logged.add(line)
            self._log_line(line)


@cache
def _keep_out_of_graphs() -> None:
    """The graph of a compiled model ends where its loss begins, which waits for the number of targets. At first use, because it
    imports torch's compiler."""
    for name in ("_loss_function", "_cross_entropy"):
        setattr(Seam, name, torch.compiler.disable(getattr(Seam, name)))  # type: ignore[no-untyped-call]


def _matrix(linear: nn.Linear, vocab: slice) -> tuple[Tensor, Tensor | None]:
    """Weight and bias, gathered if they are in pieces, of a slice of the vocabulary."""
    weight_VH, bias_V = heads.whole(linear.weight), None if linear.bias is None else heads.whole(linear.bias)
    return (weight_VH, bias_V) if vocab == slice(None) else (weight_VH[vocab], None if bias_V is None else bias_V[vocab])
