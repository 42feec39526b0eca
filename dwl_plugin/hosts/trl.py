"""TRL's SFTTrainer: how it is told apart, what of it cannot stand beside the loss, what is taken over, what it wants of a step.

A host built on `transformers.Trainer` needs nothing: `apply` works with it. One that computes a loss of its own, patches the model
or reads the logits gets a file of these five parts, and a call for each of them in `transformers.py`:

    is_...            is this class the host's?
    ..._problems      each of its settings that computes, or changes, the loss, as a `Problem`
    cut_problems      a setting that makes rows in which classes cannot be found
    take_over         switch off what can be switched off, and say so; `undo` gives it back
    Below...          between the host's class and `Trainer`: what the host reads off the outputs of a step
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import Trainer

from dwl_plugin.classes import Labeller
from dwl_plugin.errors import Problem
from dwl_plugin.hosts.trainer import BelowHost, computes_loss
from dwl_plugin.loss.deferred_logits import DeferredLogits
from dwl_plugin.loss.heads import base_model
from dwl_plugin.loss.shift import IGNORE_INDEX

__all__ = ["BelowSFTTrainer", "cut_problems", "is_sft_trainer", "take_over", "trl_problems"]


def is_sft_trainer(kind: type) -> bool:
    """Whether it is SFTTrainer whose `compute_loss` a `kind` has."""
    host = computes_loss(kind)
    return host.__module__.partition(".")[0] == "trl" and host.__name__ == "SFTTrainer"


def trl_problems(trainer: Trainer) -> Iterator[Problem]:
    """One problem for each thing of TRL's that computes, or changes, the loss."""
    args, host = trainer.args, computes_loss(type(trainer))
    is_sft, loss_type = is_sft_trainer(host), getattr(args, "loss_type", None)
    if host.__module__.partition(".")[0] == "trl" and not is_sft:
        hint = "of TRL's trainers, SFTTrainer is the one whose loss is a cross-entropy of the labels"
        yield Problem("trainer", f"{host.__name__} computes an objective of its own", hint=hint)
    if loss_type == "dft" and trainer.compute_loss_func is not None:
        hint = "leave `loss_type` out; `loss: dft` is the same objective, without the logits in full"
        yield Problem("args.loss_type", "weights every token by its probability, as `loss: dft` does", "dft", hint=hint)
    if is_sft and args.use_liger_kernel:  # its token metrics come from Liger's loss, whatever else of Liger is switched off
        hint = "leave it out; Liger's other kernels can be put on the model before the trainer is built"
        yield Problem("args.use_liger_kernel", "Liger computes the loss that is replaced", True, hint=hint)
    if loss_type == "chunked_nll" and _forward_before_chunking(trainer) is None:
        why = "has patched the model's forward in a way that cannot be taken back"
        hint = 'write `loss_type="nll"`; the logits are not held in full either way'
        yield Problem("args.loss_type", why, "chunked_nll", hint=hint)


def cut_problems(args: Any, labeller: Labeller) -> Iterator[Problem]:
    """A problem if rows are cut anywhere and the classes, or the reduction, have to know where a sample ends."""
    cut_anywhere = getattr(args, "packing", False) and args.packing_strategy == "wrapped"
    if cut_anywhere and (labeller.needs_boundaries or labeller.marks_samples):
        why = "loses where a sample ends, and these classes, or this `reduction`, need to know it"
        hint = '`packing_strategy="bfd"` keeps the boundaries; or select by `token_ids`, `tokens` or `token_regex`'
        yield Problem("args.packing_strategy", why, "wrapped", hint=hint)


def take_over(trainer: Trainer, undo: ExitStack) -> list[str]:
    """Take off the patch that TRL's chunked loss, its default, puts on the model's forward; returns the settings taken over.

    The setting stays, or is put there: under it SFTTrainer reads its token metrics from sums in the outputs and not from logits.
    """
    args, taken_over = trainer.args, []
    was = args.loss_type
    if was == "chunked_nll":
        model, before = base_model(trainer.model), _forward_before_chunking(trainer)
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
    forward, found = base_model(trainer.model).__dict__.get("forward"), None
    while (patch := getattr(forward, "__func__", None)) is not None:
        forward = inspect.getclosurevars(patch).nonlocals.get("original_forward")
        found = forward or found
    return found


class BelowSFTTrainer(BelowHost):
    """Hands SFTTrainer the sums of its `entropy` and `mean_token_accuracy`, for which it would need all logits."""

    def measure(self, outputs: Any, inputs: Mapping[str, Any]) -> None:
        in_pieces = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self._dwl.seam.head.parameters())
        sums = _token_sums(outputs.logits, inputs, rows_at_once=None if in_pieces else _ROWS_AT_ONCE)
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
