"""`apply`: our loss in any `transformers.Trainer`, TRL's `SFTTrainer` among them.

In order: what the trainer has that cannot stand beside a loss of ours, the classes and a look at the data, what of TRL's is
taken over, `join`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from os import PathLike
from typing import Any

import torch
from transformers import Trainer

from dwl_plugin.classes import ClassSurvey, Labeller
from dwl_plugin.config import Block, read_block
from dwl_plugin.errors import ConfigError, LossNotTakenError, Problem
from dwl_plugin.hosts.trainer import Session, TrainerMixin, join, leave, less_is_better, say, shadowed
from dwl_plugin.hosts.versions import transformers_problems
from dwl_plugin.loss.deferred_logits import DeferredLogits
from dwl_plugin.loss.shift import IGNORE_INDEX
from dwl_plugin.run.dataset_check import labeller_of, look_at, picked_rows

__all__ = ["AppliedLoss", "apply"]


class AppliedLoss:
    """A loss at work in a trainer. `detach` gives the trainer and its model back as they were."""

    def __init__(self, session: Session, undo: ExitStack) -> None:
        self._session, self._undo = session, undo

    @property
    def block(self) -> Block:
        """The validated settings."""
        return self._session.block

    @property
    def survey(self) -> ClassSurvey | None:
        """What the classes found in the training data before the first step."""
        return self._session.survey

    def detach(self) -> None:
        """Take everything back. Once is enough, twice does no harm."""
        self._undo.close()


def apply(trainer: Trainer, config: Mapping[str, Any] | str | PathLike[str]) -> AppliedLoss:
    """Let `trainer` train and evaluate with the loss of `config`: the same losses, classes, α and metrics as under Axolotl.

        trainer = SFTTrainer(...)
        dwl_plugin.apply(trainer, "train.yml")              # or {"loss": "dwl", "dwl": {...}}
        trainer.train()

    Call it after the trainer is built and before it trains, on every rank. The loss becomes
    (1/N) Σ_t w_c(t)·sg(max(p_t^a, m))·(−log p_t) in nats, N the targets of the optimizer step over micro-batches and ranks.

    Args:
        trainer: a `transformers.Trainer` of a causal language model, or TRL's `SFTTrainer`, with its tokenizer as
            `processing_class` where the config names classes.
        config: a mapping with `loss`, `dft` and `dwl`, or the path of a YAML file that has them; its other keys are not looked
            at, so a whole Axolotl config will do.

    Returns:
        A handle; its `detach()` takes everything back.

    Raises:
        ConfigError: every problem of the config and every setting of the trainer that makes a loss of its own, all at once;
            then every class that the tokenizer or the training data does not have.
        LossNotTakenError: the model has no output head.
    """
    if not isinstance(trainer, Trainer):
        raise ConfigError(
            [
                Problem(
                    "trainer",
                    f"{type(trainer).__name__} is no transformers.Trainer",
                    hint="in a loop of your own, use `dwl_plugin.attach(model, ...)`",
                )
            ]
        )
    problems = list(_refused(trainer))
    try:
        block = read_block(config)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    if problems:
        raise ConfigError(problems)
    labeller, survey = _classes_of(trainer, block)
    is_trl = _is_sft_trainer(_computes_loss(trainer))
    with ExitStack() as undo:
        taken_over = _take_over_trl(trainer, undo) if is_trl else []
        subclass = type(trainer) is not Trainer
        session, hook = join(
            trainer,
            block,
            labeller,
            survey,
            taken_over,
            front=_InFront if subclass else TrainerMixin,
            behind=(_BehindTRL if is_trl else _Behind,) if subclass else (),
        )
        undo.callback(leave, session, trainer)
        trainer.add_callback(hook)
        undo.callback(trainer.remove_callback, hook)
        _pick_the_lower_nll(trainer)
        return AppliedLoss(session, undo.pop_all())


# what cannot stand beside a loss of ours


def _refused(trainer: Trainer) -> Iterator[Problem]:
    """One problem for each thing that computes, or changes, the loss in our place."""
    args, host = trainer.args, _computes_loss(trainer)
    if isinstance(trainer, TrainerMixin):
        hint = "call `detach()` on what the first `apply` returned; under Axolotl the plugin applies the config's `loss:` by itself"
        yield Problem("trainer", f"already trains with `loss: {trainer._dwl.block.loss}`", hint=hint)
        return
    yield from transformers_problems()
    for name in shadowed(trainer):
        yield Problem(
            f"trainer.{name}",
            "was replaced on this one trainer, so ours would never be called",
            hint="replace it after `apply`, or in a subclass",
        )
    if host.__module__.partition(".")[0] == "trl" and not _is_sft_trainer(host):
        hint = "of TRL's trainers, SFTTrainer is the one whose loss is a cross-entropy of the labels"
        yield Problem("trainer", f"{host.__name__} computes an objective of its own", hint=hint)
    own = trainer.compute_loss_func
    if own is not None and getattr(args, "loss_type", None) == "dft":
        hint = "leave `loss_type` out; `loss: dft` is the same objective, without the logits in full"
        yield Problem("args.loss_type", "weights every token by its probability, as `loss: dft` does", "dft", hint=hint)
    elif own is not None:
        yield Problem("compute_loss_func", "computes the loss", getattr(own, "__name__", own), hint="leave it out")
    if trainer.label_smoother is not None:
        yield Problem(
            "args.label_smoothing_factor",
            "smooths the targets of the loss that is replaced",
            args.label_smoothing_factor,
            hint="set it to 0",
        )
    if args.use_liger_kernel:
        yield from _refused_liger(args, is_trl=_is_sft_trainer(host))
    if args.n_gpu > 1:
        hint = "start one process for each GPU: `torchrun` or `accelerate launch`"
        yield Problem("args", f"one process with {args.n_gpu} GPUs runs copies of the model, and the loss is in none", hint=hint)
    if trainer.model_init is not None:
        hint = "build the model, and pass it as `model`"
        yield Problem("model_init", "makes another model when training starts, without this loss", hint=hint)
    if getattr(args, "loss_type", None) == "chunked_nll" and _forward_before_chunking(trainer) is None:
        yield Problem(
            "args.loss_type",
            "has patched the model's forward in a way that cannot be taken back",
            "chunked_nll",
            hint='write `loss_type="nll"`; the logits are not held in full either way',
        )


def _refused_liger(args: Any, is_trl: bool) -> Iterator[Problem]:
    """Its fused loss is on unless it is switched off; TRL counts on that loss being there."""
    options = args.liger_kernel_config or {}
    fused = [key for key, on in (("fused_linear_cross_entropy", True), ("cross_entropy", False)) if options.get(key, on)]
    if is_trl:
        hint = "leave it out; Liger's other kernels can be put on the model before the trainer is built"
    elif fused:
        off = {**options, "fused_linear_cross_entropy": False, "cross_entropy": False}
        hint = f"`liger_kernel_config={off}` keeps Liger's other kernels"
    else:
        return
    yield Problem("args.use_liger_kernel", "Liger computes the loss that is replaced", True, hint=hint)


def _computes_loss(trainer: Trainer) -> type:
    """The class whose `compute_loss` runs."""
    return next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))


def _is_sft_trainer(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == "trl" and kind.__name__ == "SFTTrainer"


# classes, and a look at the data


def _classes_of(trainer: Trainer, block: Block) -> tuple[Labeller | None, ClassSurvey | None]:
    if not block.labels_tokens:
        return None, None
    processing = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)  # a processor has its tokenizer inside
    if tokenizer is None:
        raise ConfigError(
            [
                Problem(
                    "dwl.classes",
                    "need the tokenizer, and this trainer has none",
                    hint="build the trainer with `processing_class=tokenizer`",
                )
            ]
        )
    labeller = labeller_of(block, tokenizer)
    assert labeller is not None
    args = trainer.args
    cut_anywhere = getattr(args, "packing", False) and args.packing_strategy == "wrapped"
    if cut_anywhere and (labeller.needs_boundaries or labeller.marks_samples):
        hint = '`packing_strategy="bfd"` keeps the boundaries; or select by `token_ids`, `tokens` or `token_regex`'
        raise ConfigError(
            [
                Problem(
                    "args.packing_strategy",
                    "loses where a sample ends, and these classes, or this `reduction`, need to know it",
                    "wrapped",
                    hint=hint,
                )
            ]
        )
    return labeller, look_at(labeller, _collated(trainer), block.class_configs)


def _collated(trainer: Trainer) -> Iterator[dict[str, Any]]:
    """Some rows of the training data, each as the trainer's collator makes it; a stream gives none."""
    dataset = trainer.train_dataset
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    with torch.random.fork_rng(devices=[]):  # the run draws what it would have drawn
        for index in picked_rows(len(dataset), trainer.args.seed):
            batch = collate([dict(dataset[index])])
            if "labels" in batch:
                yield {key: batch[key][0] for key in ("input_ids", "labels", "position_ids") if key in batch}


# our classes in the host's line of inheritance


class _InFront(TrainerMixin):
    """Sees that the loss which the host returns is the one that came from the model."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        self._dwl.model_loss = None
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if return_outputs else result
        if loss is not self._dwl.model_loss:
            name = _computes_loss_behind(self).__qualname__
            raise LossNotTakenError(
                f"[dwl] {name}.compute_loss returned a loss that is not the model's, so the configured loss would not be the one "
                "that is trained. Return what `super().compute_loss(...)` returns, or do not call `dwl_plugin.apply`."
            )
        return result


class _Behind(Trainer):
    """Between the host's class and `Trainer`: what the host's `super().compute_loss` reaches."""

    _dwl: Session

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._dwl.model_loss = loss
        self._measure(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def _measure(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        """For a host that wants more of the outputs than there is."""


class _BehindTRL(_Behind):
    """Hands SFTTrainer the sums of its `entropy` and `mean_token_accuracy`, which it would need all logits for."""

    def _measure(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        sharded = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self._dwl.seam.head.parameters())
        sums = _token_sums(outputs.logits, inputs, rows_at_once=None if sharded else _ROWS_AT_ONCE)
        outputs.entropy_sum, outputs.num_correct_tokens, outputs.num_valid_tokens = sums


_ROWS_AT_ONCE = 256


@torch.no_grad()
def _token_sums(
    logits: DeferredLogits | torch.Tensor, inputs: Mapping[str, Any], rows_at_once: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Over the targets: Σ entropy in nats (fp32), how many are the likeliest token, how many there are.

    `rows_at_once` bounds the logits that are held; None, where each use of the head is a collective: all at once.
    """
    targets = inputs.get("shift_labels")
    if targets is None:
        length = inputs["labels"].shape[-1]
        logits = logits[:, -length:][:, :-1]  # prompt tuning puts tokens of its own before the sequence
        targets = inputs["labels"][:, 1:]
    is_target = targets != IGNORE_INDEX
    rows, targets_N = logits[is_target], targets[is_target]
    hidden_NH, head = (rows.hidden, rows.compute) if isinstance(rows, DeferredLogits) else (rows, None)
    entropy = torch.zeros((), device=targets_N.device)
    correct = torch.zeros_like(entropy)
    size = max(1, rows_at_once or len(targets_N))
    for hidden, wanted in zip(hidden_NH.split(size), targets_N.split(size), strict=True):
        logits_RV = hidden if head is None else head(hidden)
        log_p_RV = logits_RV.as_subclass(torch.Tensor).float().log_softmax(-1)
        entropy += torch.special.entr(log_p_RV.exp()).sum()
        correct += (log_p_RV.argmax(-1) == wanted).sum()
    return entropy, correct, is_target.sum()


def _computes_loss_behind(trainer: _InFront) -> type:
    return next(kind for kind in trainer._dwl_host.__mro__ if "compute_loss" in vars(kind))


# what of the host's is taken over


def _take_over_trl(trainer: Trainer, undo: ExitStack) -> list[str]:
    """TRL's chunked loss, its default, patches the model's forward: take the patch off. The setting stays, or is put there:
    under it SFTTrainer reads its token metrics from sums in the outputs and not from logits."""
    args, taken_over = trainer.args, []
    was = args.loss_type
    if was == "chunked_nll":
        model, before = _base_model(trainer), _forward_before_chunking(trainer)
        assert before is not None, "refused before"
        chunked = model.__dict__.pop("forward")
        if getattr(before, "__func__", None) is not type(model).forward:
            model.__dict__["forward"] = before
        undo.callback(model.__dict__.__setitem__, "forward", chunked)
        taken_over.append("loss_type: chunked_nll")
    args.loss_type = "chunked_nll"
    undo.callback(setattr, args, "loss_type", was)
    return taken_over


def _forward_before_chunking(trainer: Trainer) -> Callable[..., Any] | None:
    """What TRL's patch of the model's forward calls without labels; each trainer built over one model adds a patch."""
    forward, found = _base_model(trainer).__dict__.get("forward"), None
    while (patch := getattr(forward, "__func__", None)) is not None:
        forward = inspect.getclosurevars(patch).nonlocals.get("original_forward")
        found = forward or found
    return found


def _base_model(trainer: Trainer) -> torch.nn.Module:
    model = trainer.model
    base: torch.nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def _pick_the_lower_nll(trainer: Trainer) -> None:
    """The arguments were completed before anybody knew of `eval_nll`."""
    args = trainer.args
    if less_is_better(args.metric_for_best_model) and args.greater_is_better:
        args.greater_is_better = False
        say(f"`metric_for_best_model: {args.metric_for_best_model}` is best where it is lowest: greater_is_better is now False")
