"""TRL's SFTTrainer: how it is told apart, what of it cannot stand beside the loss, what is taken over, what it wants of a step.

A host built on `transformers.Trainer` needs nothing: `apply` works with it. One that computes a loss of its own, patches the model
or reads the logits gets a file of these six parts, and a call for each of them in `transformers.py`:

    is_...            is this class the host's?
    ..._problems      each of its settings that computes, or changes, the loss, as a `Problem`
    cut_problems      a setting that makes rows in which classes cannot be found
    data_problems     a setting with which rows lose what the data says of their tokens
    take_over         switch off what can be switched off, and say so; `undo` gives it back
    in_place_of_...   before the host's class: its steps as `Trainer` makes them, with the numbers that the host logs of them
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from transformers import Trainer

from dwl_plugin.classes import Labeller
from dwl_plugin.errors import Problem
from dwl_plugin.hosts.trainer import Batch, Items
from dwl_plugin.hosts.versions import older_host, release
from dwl_plugin.loss.deferred_logits import DeferredLogits
from dwl_plugin.loss.heads import base_model
from dwl_plugin.loss.origins import package
from dwl_plugin.loss.shift import IGNORE_INDEX
from dwl_plugin.run.session import Session

__all__ = ["cut_problems", "data_problems", "in_place_of_sft_trainer", "is_sft_trainer", "take_over", "trl_problems"]


def is_sft_trainer(kind: type) -> bool:
    """Whether a `kind` is an SFTTrainer, or derives from it, and no other class of TRL's computes its loss."""
    host = _trls_class(kind)
    return host is not None and host.__name__ == "SFTTrainer"


def _trls_class(kind: type) -> type | None:
    """The class of TRL's whose `compute_loss` a `kind` has, or had before a subclass got one of its own."""
    return next((base for base in kind.__mro__ if package(base.__module__) == "trl" and "compute_loss" in vars(base)), None)


def trl_problems(trainer: Trainer) -> Iterator[Problem]:
    """One problem for each thing of TRL's that computes, or changes, the loss."""
    host = _trls_class(type(trainer))
    if host is None:
        return
    yield from older_host("trl")
    if not is_sft_trainer(host):
        hint = "of TRL's trainers, SFTTrainer is the one whose loss is a cross-entropy of the labels"
        yield Problem("trainer", f"{host.__name__} computes an objective of its own", hint=hint)
        return
    if trainer.args.loss_type == "dft":
        hint = "leave `loss_type` out; `loss: dft` is the same objective, without the logits in full"
        yield Problem("args.loss_type", "weights every token by its probability, as `loss: dft` does", "dft", hint=hint)
    forward = base_model(trainer.model).__dict__.get("forward")
    if _chunks(forward) is not None and _before_chunking(forward) is None:
        why = "has patched the model's forward in a way that cannot be taken back"
        hint = 'load the model anew, and write `loss_type="nll"`; the logits are not held in full either way'
        yield Problem("args.loss_type", why, trainer.args.loss_type, hint=hint)


def cut_problems(args: Any, labeller: Labeller) -> Iterator[Problem]:
    """A problem if rows are cut anywhere and the classes, or the reduction, have to know where a sample ends."""
    cut_anywhere = getattr(args, "packing", False) and args.packing_strategy == "wrapped"
    if cut_anywhere and (labeller.needs_boundaries or labeller.marks_samples):
        why = "loses where a sample ends, and these classes, or this `reduction`, need to know it"
        hint = '`packing_strategy="bfd"` keeps the boundaries; or select by `token_ids`, `tokens` or `token_regex`'
        yield Problem("args.packing_strategy", why, "wrapped", hint=hint)


def data_problems(args: Any) -> Iterator[Problem]:
    """A problem for each setting with which a trainer keeps the tokens of its rows, and not what these say of them."""
    if (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    what = "of the data's weights and marks"
    for key in ("packing", "eval_packing"):
        if getattr(args, key):
            hint = f"`{key}=False`; with FlashAttention `padding_free=True` does without padding as well"
            yield Problem(f"args.{key}", f"packs rows when the trainer is built, and keeps nothing {what}", True, hint=hint)
    if args.max_length is not None and args.truncation_mode == "keep_end":
        why = f"cuts rows off at their beginning when the trainer is built, and nothing {what}"
        yield Problem("args.truncation_mode", why, "keep_end", hint='`truncation_mode="keep_start"`, or `max_length=None`')
    if args.use_liger_kernel and release("trl") < (1, 15):
        why = f"TRL before 1.15 keeps nothing {what} beside Liger's kernels"
        yield Problem("args.use_liger_kernel", why, True, hint="`pip install 'trl>=1.15'`, or leave it out")


def take_over(trainer: Trainer, undo: ExitStack) -> list[str]:
    """Take off the patch that TRL's chunked loss puts on the model's forward; returns what is not used any more."""
    model: Any = base_model(trainer.model)
    asked, kept = (getattr(of, "router_aux_loss_coef", None) for of in (model.config.get_text_config(), model))
    if None not in (asked, kept) and asked != kept:  # TRL writes its own into the config, after the model has read it
        model.router_aux_loss_coef = asked
        undo.callback(setattr, model, "router_aux_loss_coef", kept)
    patched = model.__dict__.get("forward")
    if _chunks(patched) is None:
        return ["fused_lm_head"] if package(_home(patched)) == "trl" else []
    before = _before_chunking(patched)
    assert before is not None, "refused before"
    del model.__dict__["forward"]
    if getattr(before, "__func__", None) is not type(model).forward:
        model.__dict__["forward"] = before
    undo.callback(model.__dict__.__setitem__, "forward", patched)
    return ["loss_type: chunked_nll"]


def _home(forward: Any) -> str:
    """The module that a method was written in, whatever name it was given since."""
    return str(getattr(getattr(forward, "__func__", None), "__globals__", {}).get("__name__", ""))


def _chunks(forward: Any) -> Any:
    """The function of TRL's (to 1.14) that computes a loss of its own wherever there are labels. That of later versions has to be
    asked to, and nobody does."""
    patch: Any = getattr(forward, "__func__", None)
    return patch if package(_home(forward)) == "trl" and "fused_lm_head" not in patch.__code__.co_varnames else None


def _before_chunking(forward: Any) -> Any:
    """What it calls without labels; each trainer built over one model adds a patch. None where it cannot be told."""
    while (patch := _chunks(forward)) is not None:
        forward = inspect.getclosurevars(patch).nonlocals.get("original_forward")
    return forward


def in_place_of_sft_trainer(kind: type) -> type[InPlaceOfSFTTrainer]:
    """What comes before the SFTTrainer that a `kind` derives from, and behind all that derives from it; made for one trainer."""
    sft = _trls_class(kind)
    assert sft is not None, f"{kind} is no SFTTrainer"
    return type(sft.__name__, (InPlaceOfSFTTrainer, sft), {"_dwl_sums": {True: [], False: []}, "_dwl_tokens": 0})


class InPlaceOfSFTTrainer(Trainer):
    """The steps are those of `Trainer`, and the numbers those that SFTTrainer would log of them.

    SFTTrainer's own `compute_loss` changes with every few releases; that the loss is what the model returns is a promise of
    `Trainer`'s.
    """

    _dwl: Session
    _dwl_sums: dict[bool, list[torch.Tensor]]
    """By whether it trains: of each micro-batch since the last log Σ entropy, the targets that are likeliest, the targets, and an
    auxiliary loss where there is one."""
    _dwl_tokens: torch.Tensor | int
    """Trained on by this rank since the last log, padding left out."""
    _total_train_tokens: int
    """TRL's, which goes on where another training of this trainer is without us."""

    def compute_loss(self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Items = None) -> Any:
        asked = {"use_cache": False}
        if getattr(self, "aux_loss_enabled", False):  # of a mixture of experts
            asked["output_router_logits"] = True
        loss, outputs = Trainer.compute_loss(self, model, {**inputs, **asked}, True, num_items_in_batch)
        self._dwl.model_loss = loss
        if self._dwl.seam.taken:  # if not, the run stops, and the outputs may be anything
            self._measure(outputs, inputs)
        return (loss, outputs) if return_outputs else loss

    def _measure(self, outputs: Any, inputs: Batch) -> None:
        in_pieces = any(hasattr(p, "ds_id") or hasattr(p, "full_tensor") for p in self._dwl.seam.head.parameters())
        sums = [*_token_sums(outputs.logits, inputs, rows_at_once=None if in_pieces else _ROWS_AT_ONCE)]
        if (aux_loss := getattr(outputs, "aux_loss", None)) is not None:
            sums.append(aux_loss.detach().to(sums[0].device))
        self._dwl_sums[self.model.training].append(torch.stack([number.float() for number in sums]))
        if self.model.training:
            here = inputs.get("attention_mask")
            type(self)._dwl_tokens += inputs["input_ids"].numel() if here is None else here.sum()

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        return Trainer.prediction_step(self, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        training = self.model.training
        rows = self._dwl_sums[training]
        if rows:
            prefix = "" if training else "eval_"
            logs.update({f"{prefix}{key}": value for key, value in self._token_numbers(torch.stack(rows)).items()})
            rows.clear()
        super().log(logs, start_time)

    def _token_numbers(self, sums: torch.Tensor) -> dict[str, float]:
        """The mean over micro-batches of what each is on all ranks."""
        over_ranks = self._over_ranks
        entropy, correct, targets, *aux_loss = over_ranks(sums).T
        means = {"entropy": entropy / targets.clamp(min=1), "mean_token_accuracy": correct / targets.clamp(min=1)}
        if aux_loss:
            means["aux_loss"] = aux_loss[0] / self.accelerator.num_processes
        tokens = over_ranks(torch.as_tensor(self._dwl_tokens, device=sums.device))
        type(self)._dwl_tokens = 0
        self._total_train_tokens += int(tokens.item()) // self.get_tp_size()
        return {**{key: values.mean().item() for key, values in means.items()}, "num_tokens": self._total_train_tokens}


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
    places = is_target.nonzero(as_tuple=True)  # once: with the mask for an index each use of it would wait for the device
    rows, targets_N = logits[places], targets[places]
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
