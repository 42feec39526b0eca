"""Where a model's loss becomes ours: its output head hands out deferred logits and its `loss_function` reduces them.

`Seam` patches two things of one model instance, the forward of its outermost output head and its `loss_function`. Both stay
asleep, so generation and every other use get plain logits, until a `PendingLoss` is armed around a forward. `attach` arms one
around every forward that is given labels. The patches are bound methods of the seam: a deep copy of the model gets a seam of
its own.

Shapes: B rows, T positions, N = B·T, H hidden size, V vocabulary, C classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dwl_plugin.errors import LossNotTakenError
from dwl_plugin.loss.anchor import Anchor
from dwl_plugin.loss.chunked import module_cross_entropy
from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.deferred_logits import DeferredLogits
from dwl_plugin.loss.linear_cross_entropy import LinearCrossEntropyOutput, linear_cross_entropy
from dwl_plugin.loss.membership import Membership
from dwl_plugin.loss.shift import IGNORE_INDEX, shift_left
from dwl_plugin.loss.token_losses import Objective, Power, Term
from dwl_plugin.values import Overlap

__all__ = ["LossSpec", "PendingLoss", "Seam", "attach"]


@dataclass(frozen=True)
class LossSpec:
    """What each class pays and how much it counts, over C classes (last: every token no class claims).

    Token t pays Σ_{c∋t} w_c·f_c(t)·(−log p_t): `weight` is w, `objective` says what f is. `overlap` says how class ids name the
    classes of a token: `first` by the index of its class, `sum` by a bit for each of them. Without `classes_pay` classes are only
    measured, and every token pays once, what the last class pays. `anchor` adds w_c·λ_c·KL(base‖θ), for a seam that knows the base
    model; empty: none.
    """

    weight: tuple[float, ...] = (1.0,)
    objective: tuple[Objective, ...] = (Power(),)
    overlap: Overlap = "first"
    classes_pay: bool = True
    anchor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.weight) == len(self.objective) >= 1 or len(self.anchor) not in (0, len(self.weight)):
            raise ValueError("weight, objective and anchor need one entry per class, of at least one class")

    @classmethod
    def named(cls, loss: str) -> LossSpec:
        """`nll` or `dft`, for every token."""
        if loss not in ("nll", "dft"):
            raise ValueError(f"loss is 'nll', 'dft' or a LossSpec, not {loss!r}")
        return cls(objective=(Power(1.0 if loss == "dft" else 0.0),))

    @property
    def terms(self) -> tuple[Objective, ...]:
        """The different objectives: classes that pay alike are one term of the loss."""
        return tuple(dict.fromkeys(self.objective))

    @property
    def is_anchored(self) -> bool:
        return any(self.anchor)


@dataclass
class PendingLoss:
    """What one forward has to know. `denominator` divides the summed loss; None: the number of targets of this forward.

    `class_ids` (B, T) has the layout of `labels`, or, if `shifted`, of the `shift_labels` that the model is given as well. It is
    read at the positions that are targets; None: everything is the last class. `on_tokens` gets what they paid, detached.
    """

    spec: LossSpec
    labels: torch.Tensor | None = None
    class_ids: torch.Tensor | None = None
    class_weight: torch.Tensor | None = None
    denominator: torch.Tensor | float | None = None
    on_tokens: Callable[[ForwardMetrics], None] | None = None
    shifted: bool = False
    base: DeferredLogits | torch.Tensor | None = field(default=None, init=False)
    """The base model's logits, where the spec has an anchor."""
    taken: int = field(default=0, init=False)


_LABELS = ("labels", "shift_labels", "num_items_in_batch")


@dataclass(frozen=True)
class _Inside:
    """Handed to the head beside its input: what to do with it there."""

    work: Callable[[torch.Tensor], Any]


class Seam:
    """The patches of one model; asleep outside `armed`. `say` gets the few lines worth knowing.

    Inside `as_base()` the model is its base model (an adapter switched off); a spec with an anchor needs it.
    """

    def __init__(
        self, model: nn.Module, say: Callable[[str], None], as_base: Callable[[], AbstractContextManager[Any]] | None = None
    ) -> None:
        self.model = _base_model(model)
        # Older PEFT calls the model inside it past its hooks, so both carry them.
        self.called = (model,) if model is self.model else (model, self.model)
        self.head = _output_head(self.model)
        older = getattr(self.head.__dict__.get("forward"), "__self__", None)
        if isinstance(older, Seam):  # a trainer that is built again over the same model
            older.detach()
        self._say, self._said = say, set[str]()
        self._step: PendingLoss | None = None
        self._layout: int | None = None
        self._constants: dict[tuple[tuple[float, ...], torch.dtype, torch.device], torch.Tensor] = {}
        # A wrapper around this model, or a language model inside it, may be the one whose `loss_function` is called.
        self._owners = [module for module in self.model.modules() if _has_head(module, self.head)]
        self._head_was: Any = self.head.__dict__.get("forward")
        self._head_forward: Callable[..., torch.Tensor] = self.head.forward
        self._losses_were: list[Any] = [owner.__dict__.get("_loss_function") for owner in self._owners]
        self._model_loss: Callable[..., Any] = self.model.loss_function  # type: ignore[assignment]
        self._as_base = as_base
        self._hooks = (
            []
            if as_base is None
            else [module.register_forward_pre_hook(self._run_base, with_kwargs=True) for module in self.called]
        )
        self.head.forward = self._forward
        for owner in self._owners:
            owner.loss_function = self._loss_function  # type: ignore[assignment]

    @property
    def replaced(self) -> str:
        """The loss the model came with."""
        return getattr(self._model_loss, "__name__", type(self._model_loss).__name__)

    def detach(self) -> None:
        """Take the patches off; the model is as it was. Once is enough, twice does no harm."""
        for hook in self._hooks:
            hook.remove()
        if self.head.__dict__.get("forward") == self._forward:
            _put_back(self.head, "forward", self._head_was)
        for owner, was in zip(self._owners, self._losses_were, strict=True):
            if owner.__dict__.get("_loss_function") == self._loss_function:
                _put_back(owner, "_loss_function", was)

    @contextmanager
    def armed(self, step: PendingLoss) -> Iterator[PendingLoss]:
        """One forward inside; raises `LossNotTakenError` if its loss was computed by somebody else."""
        self._step = step
        try:
            yield step
        finally:
            self._step = None
        self._check(step)

    def _check(self, step: PendingLoss) -> None:
        if step.taken == 0:
            raise LossNotTakenError(
                f"[dwl] {type(self.model).__name__} returned a loss that dwl_plugin did not compute. Either its own loss is more "
                "than a cross-entropy of its logits (label smoothing, for one), or another patch replaced its loss or its output "
                f"head ({type(self.head).__name__}). Remove that, or delete the `loss:` line."
            )

    def _run_base(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward whose loss has an anchor: the same inputs through the base model, as far as its head."""
        step = self._step
        if step is None or not step.spec.is_anchored or step.base is not None:
            return
        assert self._as_base is not None
        unlabelled = {key: value for key, value in kwargs.items() if key not in _LABELS}
        bound = inspect.signature(model.forward).bind_partial(*args, **unlabelled)
        if args:
            bound.arguments.update({key: None for key in _LABELS if key in bound.arguments})
        was_training, self._step = model.training, PendingLoss(LossSpec())  # awake, so that the head defers
        try:
            with torch.no_grad(), self._as_base():
                model.eval()  # no dropout and no noise in what the model is held to
                out = model(*bound.args, **bound.kwargs)
        finally:
            model.train(was_training)
            self._step = step
        step.base = out["logits"] if isinstance(out, Mapping) else out[0]

    # the patches

    def _forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], _Inside):
            return args[0].work(hidden)
        if self._step is None or args or kwargs:
            return self._head_forward(hidden, *args, **kwargs)
        device = hidden.device.type
        return DeferredLogits(
            hidden,
            self._logits,
            vocab_size=_vocab_size(self.head),
            dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype,
            on_materialise=self._materialised,
            on_cross_entropy=self._cross_entropy,
        )

    # Spelled out, because trainers read the signature to learn whether the loss divides by num_items_in_batch itself.
    def _loss_function(
        self,
        logits: Any,
        labels: torch.Tensor | None = None,
        vocab_size: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if self._step is not None:
            return self._causal_loss(logits, labels, shift_labels, ignore_index, self._step)
        passed = {"num_items_in_batch": num_items_in_batch, "shift_labels": shift_labels, **kwargs}
        return self._model_loss(
            logits,
            labels,
            vocab_size=vocab_size,
            ignore_index=ignore_index,
            **{key: value for key, value in passed.items() if value is not None},
        )

    # awake

    def _materialised(self, asked_by: str) -> None:
        self._say_once(f"{type(self.model).__name__} uses `{asked_by}` on its logits, so they are computed in full (more memory).")

    def _causal_loss(
        self,
        logits: DeferredLogits | torch.Tensor,
        labels_BT: torch.Tensor | None,
        targets_BT: torch.Tensor | None,
        ignore_index: int,
        step: PendingLoss,
    ) -> torch.Tensor:
        """The model called its `loss_function`: shift, unless the labels came shifted."""
        shifts = targets_BT is None and self.replaced != "ForMaskedLMLoss"
        given_BT = labels_BT if targets_BT is None else targets_BT
        assert given_BT is not None, "a loss without labels"
        class_BT = step.class_ids
        as_given = step.shifted if labels_BT is None or targets_BT is not None else True
        if class_BT is not None and not (as_given and class_BT.shape == given_BT.shape):
            class_BT = self._class_ids_like(given_BT, 1, step)
        if shifts:
            given_BT = shift_left(given_BT, ignore_index)
            class_BT = None if class_BT is None else shift_left(class_BT)
        return self._reduce(logits, given_BT, class_BT, ignore_index, step)

    def _cross_entropy(
        self,
        logits: DeferredLogits | torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = IGNORE_INDEX,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> torch.Tensor:
        """The model called `F.cross_entropy`, `F.nll_loss` or their modules on its logits: that is its loss."""
        step = self._step
        if isinstance(logits, DeferredLogits) and logits.ndim != 2:
            logits = logits.materialise("cross_entropy").as_subclass(torch.Tensor)
        plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
        # A model that divides the sum itself divides by what it counts, not by the denominator of the step.
        known = reduction == "mean" or (reduction == "sum" and step is not None and step.denominator is None)
        if step is None or not plain or not known or targets.is_floating_point():
            true = logits.materialise("cross_entropy") if isinstance(logits, DeferredLogits) else logits
            return F.cross_entropy(
                true.as_subclass(torch.Tensor), targets, weight, size_average, ignore_index, reduce, reduction, label_smoothing
            )
        if isinstance(logits, torch.Tensor) and logits.ndim > 2:  # (B, V, …)
            logits = logits.movedim(1, -1)
        # The same labels several times over, for several streams of logits: the model takes their mean.
        copies = 1 if step.labels is None else max(1, targets.numel() // max(1, step.labels.numel()))
        class_ids = None if step.class_ids is None else self._class_ids_like(targets, copies, step)
        loss = self._reduce(logits, targets, class_ids, ignore_index, step, copies)
        return loss if reduction == "mean" else loss * (targets != ignore_index).sum()

    def _class_ids_like(self, targets: torch.Tensor, copies: int, step: PendingLoss) -> torch.Tensor:
        """Class ids in the layout of `targets`, which the model shifted and flattened in its own way."""
        if step.class_ids is None or step.labels is None:
            raise self._unmatched()
        labels_BT, class_BT = step.labels.to(targets.device), step.class_ids.to(targets.device)
        layouts = ((labels_BT[..., 1:], class_BT[..., 1:]), (shift_left(labels_BT), shift_left(class_BT)), (labels_BT, class_BT))
        wanted = targets.reshape(copies, -1)

        def fits(labels: torch.Tensor) -> torch.Tensor:
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

    def _unmatched(self) -> LossNotTakenError:
        return LossNotTakenError(
            f"[dwl] {type(self.model).__name__} rearranges its labels in a way dwl_plugin does not know, so token classes (and "
            "the base model of an `anchor`) cannot be matched to targets. `loss: nll` and `loss: dft` without them work with it."
        )

    def _reduce(
        self,
        logits: DeferredLogits | torch.Tensor,
        targets: torch.Tensor,
        class_ids: torch.Tensor | None,
        ignore_index: int,
        step: PendingLoss,
        copies: int = 1,
    ) -> torch.Tensor:
        """Σ_t Σ_{c∋t} w_c·f_c(t)·nll_t / denominator, and the tokens handed to the metrics."""
        if torch.compiler.is_compiling():
            disable: Callable[..., Callable[..., torch.Tensor]] = torch.compiler.disable
            uncompiled = disable(Seam._reduce)
            return uncompiled(self, logits, targets, class_ids, ignore_index, step, copies)
        step.taken += 1
        linear = _as_linear(self.head, self._head_was) if isinstance(logits, DeferredLogits) else None
        device = logits.device if linear is None else linear.weight.device
        targets_N = targets.reshape(-1).to(device)
        is_target_N = targets_N != ignore_index
        spec = step.spec
        classes = len(spec.weight)
        if class_ids is None:
            members = Membership.all_rest(is_target_N, classes, spec.overlap)
        else:
            class_N = torch.where(is_target_N, class_ids.reshape(-1).to(device), IGNORE_INDEX)
            members = Membership.read(class_N, classes, spec.overlap)
        weight_C = self._constant(spec.weight, device) if step.class_weight is None else step.class_weight
        weight_C = weight_C.to(device=device, dtype=torch.float32, non_blocking=True)
        term_C = self._constant(tuple(spec.terms.index(objective) for objective in spec.objective), device)
        paying = members if spec.classes_pay else Membership.all_rest(is_target_N, classes, spec.overlap)
        terms = [Term(objective, paying.weigh(torch.where(term_C == k, weight_C, 0.0))) for k, objective in enumerate(spec.terms)]
        options: dict[str, Any] = {"terms": terms, "ignore_index": ignore_index}
        anchor_C = None
        if spec.is_anchored:
            anchor_C = self._constant(spec.anchor, device)
            options["anchor"] = Anchor(paying.weigh(weight_C * anchor_C), _rows_like(step.base, logits, self._unmatched).to(device))
        out = self._token_loss(logits, targets_N, options, step.base)
        if step.on_tokens is not None:
            step.on_tokens(ForwardMetrics(members, paying, out.nll, torch.stack(out.factors), term_C, weight_C, out.kl, anchor_C))
        denominator = step.denominator
        if denominator is None:
            return out.loss / is_target_N.sum().clamp(min=1)
        if isinstance(denominator, torch.Tensor):
            denominator = denominator.to(device)
        return out.loss / (denominator * copies)

    def _constant(self, values: tuple[float, ...], device: torch.device) -> torch.Tensor:
        """Copied to the device once: each copy would wait for it."""
        kind = torch.int64 if isinstance(values[0], int) else torch.float32
        if (values, kind, device) not in self._constants:
            self._constants[values, kind, device] = torch.tensor(values, dtype=kind, device=device)
        return self._constants[values, kind, device]

    def _token_loss(
        self,
        logits: DeferredLogits | torch.Tensor,
        targets_N: torch.Tensor,
        options: dict[str, Any],
        base: DeferredLogits | torch.Tensor | None,
    ) -> LinearCrossEntropyOutput:
        """Terms and anchor on whichever path the head allows. The anchor comes without a head: that is decided here."""
        anchor: Anchor | None = options.pop("anchor", None)

        def through_modules(
            head: Callable[[torch.Tensor], torch.Tensor], rows_NX: torch.Tensor, **more: Any
        ) -> LinearCrossEntropyOutput:
            anchored = None if anchor is None else replace(anchor, head=self._base_logits(base))
            return module_cross_entropy(rows_NX, head, targets_N, anchor=anchored, **options, **more)

        if isinstance(logits, torch.Tensor):
            self._say_once(f"{type(self.model).__name__} computes its logits in full before its loss (more memory).")
            logits_NV = logits.as_subclass(torch.Tensor).reshape(targets_N.numel(), logits.shape[-1])
            return through_modules(_identity, logits_NV)
        deferred, fused = logits, _fold(logits) if logits.head == self._logits else None

        def of(rows_NH: torch.Tensor) -> LinearCrossEntropyOutput:
            linear = _as_linear(self.head, self._head_was)
            base_linear = None if anchor is None else self._base_linear(base, fused)
            if linear is None or fused is None or (anchor is not None and base_linear is None):
                return through_modules(deferred.compute, rows_NH, vocab_size=deferred.vocab_size)
            weight_VH, bias_V = _whole(linear.weight), _whole(linear.bias)
            assert weight_VH is not None
            if fused.vocab != slice(None):
                weight_VH, bias_V = weight_VH[fused.vocab], None if bias_V is None else bias_V[fused.vocab]
            anchored = anchor
            if anchored is not None and base_linear is not None and base_linear is not linear:
                base_VH, base_V = base_linear.weight[fused.vocab], base_linear.bias
                anchored = replace(anchored, head=(base_VH, None if base_V is None else base_V[fused.vocab]))
            return linear_cross_entropy(
                rows_NH.to(weight_VH.device),
                weight_VH,
                targets_N,
                bias=bias_V,
                softcap=fused.softcap,
                logit_scale=fused.logit_scale,
                anchor=anchored,
                **options,
            )

        return self._inside_head(of, logits.rows()) if _gathered_by_hooks(self.head) else of(logits.rows())

    def _base_linear(self, base: DeferredLogits | torch.Tensor | None, fused: _Folded | None) -> nn.Linear | None:
        """The base model's head, where it is a matrix under the very scale, cap and vocabulary of ours."""
        if not isinstance(base, DeferredLogits) or base.head != self._logits or _fold(base) != fused:
            return None
        head = _base_module(self.head)
        return _as_linear(head, self._head_was if head is self.head else None)

    def _base_logits(self, base: DeferredLogits | torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """From rows of what `_rows_like` gives to the base model's logits."""
        if not isinstance(base, DeferredLogits):
            return _identity
        if base.head != self._logits:  # what was changed in place is computed already
            return base.compute
        head = _base_module(self.head)
        return replace(base, head=self._head_forward if head is self.head else head).compute

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the head would have returned."""
        if not _gathered_by_hooks(self.head):
            return self._head_forward(hidden)
        logits: torch.Tensor = self.head(hidden, _Inside(self._head_forward))
        return logits

    def _inside_head(
        self, work: Callable[[torch.Tensor], LinearCrossEntropyOutput], rows_NH: torch.Tensor
    ) -> LinearCrossEntropyOutput:
        """`work` where the head's own hooks have gathered its weight, once for all chunks, and will for its backward."""
        done: list[LinearCrossEntropyOutput] = []

        def loss_of(rows_NH: torch.Tensor) -> torch.Tensor:
            done.append(work(rows_NH))
            return done[0].loss

        loss = self.head(rows_NH, _Inside(loss_of))
        # Mixed precision may have rounded the output; what it hooks for the backward is the tensor before.
        return LinearCrossEntropyOutput(loss if loss.dtype == done[0].loss.dtype else done[0].loss, done[0].nll)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)


class Attachment:
    """A seam that arms itself around every forward of its model that is given labels."""

    def __init__(self, model: nn.Module, spec: LossSpec, say: Callable[[str], None]) -> None:
        self._spec = spec
        self.seam = Seam(model, say)
        self._hooks = [
            hook
            for module in self.seam.called
            for hook in (
                module.register_forward_pre_hook(self._before, with_kwargs=True),
                module.register_forward_hook(self._after, always_call=True),
            )
        ]

    def detach(self) -> None:
        """Give the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self.seam.detach()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs
        if args:
            given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        labels = given.get("labels")
        if labels is not None:
            self.seam._step = PendingLoss(self._spec, labels, denominator=given.get("num_items_in_batch"))

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        step, self.seam._step = self.seam._step, None
        if step is not None and output is not None:
            self.seam._check(step)


def attach(model: nn.Module, loss: str | LossSpec = "nll", say: Callable[[str], None] = print) -> Attachment:
    """Make a transformers model compute its training loss from deferred logits, without a trainer.

        loss = model(input_ids=ids, labels=ids).loss        # Σ_t w·sg(max(p^a, m))·nll / number of targets

    `loss` is "nll", "dft" or a `LossSpec` of one class. A forward without labels, and generation, are left alone. `say` gets
    the few lines worth knowing. Returns a handle; `.detach()` gives the model back.
    """
    spec = LossSpec.named(loss) if isinstance(loss, str) else loss
    if spec.is_anchored:
        raise ValueError("attach knows no base model, so its loss can have no anchor")
    if len(spec.weight) != 1:
        raise ValueError(f"attach takes a loss of one class, for every token; got {len(spec.weight)} classes")
    return Attachment(model, spec, say)


@dataclass(frozen=True)
class _Folded:
    logit_scale: float | None
    softcap: float | None
    vocab: slice


def _fold(logits: DeferredLogits) -> _Folded | None:
    """The recorded operations as softcap·tanh(logit_scale·z / softcap) over a slice of the vocabulary; None if they are not."""
    before, after, capped, vocab = 1.0, 1.0, False, slice(None)
    operations = logits.operations[:-1] if logits.is_log_probability else logits.operations  # a cross-entropy takes either
    for operation in operations:
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


def _base_model(model: Any) -> nn.Module:
    """The transformers model inside an adapter wrapper."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _output_head(model: Any) -> nn.Module:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise LossNotTakenError(f"[dwl] {type(model).__name__} has no output head to take the loss from; it is no language model.")
    return head


def _vocab_size(head: nn.Module) -> int:
    for module in (head, getattr(head, "base_layer", None), getattr(head, "original_module", None)):
        if isinstance(size := getattr(module, "out_features", None), int):
            return size
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return weight.shape[0]
    raise LossNotTakenError(f"[dwl] the vocabulary size of the output head {type(head).__name__} cannot be read.")


def _has_head(module: Any, head: nn.Module) -> bool:
    """`module` computes a loss from the logits of `head`."""
    if not (hasattr(module, "get_output_embeddings") and hasattr(type(module), "loss_function")):
        return False
    its_head: object = module.get_output_embeddings()
    return its_head is head


def _rows_like(
    base: DeferredLogits | torch.Tensor | None, logits: DeferredLogits | torch.Tensor, unmatched: Callable[[], Exception]
) -> torch.Tensor:
    """The base model's hidden states, or logits, at the rows of `logits`: all positions, or all but the last of each row."""
    rows = logits.numel() // logits.shape[-1]
    values = base.hidden if isinstance(base, DeferredLogits) else base
    if (
        values is None
        or values.ndim != 3
        or rows not in (values.shape[0] * values.shape[1], values.shape[0] * (values.shape[1] - 1))
    ):
        raise unmatched()
    kept = values if rows == values.shape[0] * values.shape[1] else values[:, :-1]
    return kept.reshape(rows, -1)


def _base_module(head: nn.Module) -> nn.Module:
    """The head as it was before an adapter or a trained copy was put around it."""
    inner = getattr(head, "original_module", None) or getattr(head, "base_layer", None)
    return _base_module(inner) if isinstance(inner, nn.Module) else head


def _identity(rows: torch.Tensor) -> torch.Tensor:
    return rows


def _put_back(module: nn.Module, name: str, was: Any) -> None:
    if was is None:
        del module.__dict__[name]
    else:
        module.__dict__[name] = was


def _as_linear(head: nn.Module, patched_before: Any) -> nn.Linear | None:
    """What multiplies, if hidden @ weight.T + bias is all that `head.forward` does.

    Forward hooks are no obstacle: they have been run around the deferred logits.
    """
    if patched_before is not None:
        return None
    copies = getattr(head, "modules_to_save", None)  # PEFT's trained copies of a module
    if isinstance(copies, nn.ModuleDict):
        active: list[str] = head.active_adapters  # type: ignore[assignment]
        if head.disable_adapters or not active or active[0] not in copies:
            return None
        head = copies[active[0]]
        if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
            return None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:  # FSDP2 makes a subclass of it
        return None
    return head if head.weight.is_floating_point() else None


def _gathered_by_hooks(head: nn.Module) -> bool:
    """The weight is in pieces outside the head's forward: a module of its own to FSDP2 or ZeRO-3."""
    is_fsdp = hasattr(head, "unshard")
    return any((is_fsdp and hasattr(p, "full_tensor")) or hasattr(p, "ds_id") for p in head.parameters())


def _whole(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor-parallel parameter gathered, differentiably."""
    if parameter is None or not hasattr(parameter, "full_tensor"):
        return parameter
    whole: torch.Tensor = parameter.full_tensor()
    return whole
