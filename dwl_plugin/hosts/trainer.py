"""Our part of somebody else's `transformers.Trainer`: a few hooks, each handing over to the session.

One optimizer step, in order: the loader's batches carry class ids -> `get_batch_samples` counts them -> the callback moves α to
τ -> `compute_loss` arms the model's seam -> the seam adds per-class sums -> `log` divides them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dwl_plugin.alpha.schedule import Alpha, alpha_of
from dwl_plugin.alpha.tau import RunLength
from dwl_plugin.classes.labeller import ClassSurvey, Labeller
from dwl_plugin.config import Block
from dwl_plugin.errors import DWLError, LossNotTakenError
from dwl_plugin.hosts.collate import CLASS_IDS, LabellingCollator
from dwl_plugin.hosts.opening import opening_lines
from dwl_plugin.loss.reduction import class_weights
from dwl_plugin.loss.seam import LossSpec, LossStep, Seam
from dwl_plugin.loss.shift import IGNORE_INDEX
from dwl_plugin.metrics import ClassSums, widest

__all__ = ["Session", "StepHook", "join"]

RESOLVED_CONFIG = "dwl_config.yaml"


def say(line: str) -> None:
    """To the console of the main process; every line of ours looks alike."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print("\n".join(f"[dwl] {part}" for part in line.splitlines()), flush=True)


class Session:
    """One trainer's run with our loss: the settings, and what changes from step to step."""

    def __init__(
        self,
        trainer: Trainer,
        block: Block,
        labeller: Labeller | None,
        survey: ClassSurvey | None,
        taken_over: Sequence[str],
    ) -> None:
        self.block, self.labeller, self.survey = block, labeller, survey
        self.names = block.class_names
        losses = block.token_losses
        self.spec = LossSpec(
            weight=block.alpha,
            exponent=tuple(loss.exponent for loss in losses),
            min_weight=tuple(loss.min_weight for loss in losses),
        )
        self.seam = Seam(trainer.model, say)
        self.replaced = " and ".join([self.seam.replaced, *(f"`{key}`" for key in taken_over)])
        self.alpha_at: Alpha = lambda tau: block.alpha  # until the length of the run is known
        self.alpha = block.alpha
        self.train_sums, self.eval_sums = ClassSums(self.names), ClassSums(self.names)
        self.step_counts: torch.Tensor | None = None

    def move(self, tau: int) -> None:
        """α of optimizer step τ."""
        self.alpha = self.alpha_at(tau)

    def counts(self, batches: list[Any], device: torch.device) -> torch.Tensor:
        """Targets per class (C,) in `batches`, int64. The first label of a row predicts nothing and is not counted."""
        counts_C = torch.zeros(len(self.names), dtype=torch.int64, device=device)
        for batch in batches:
            labels = batch[CLASS_IDS] if CLASS_IDS in batch else batch.get("labels")
            if labels is None:
                continue
            targets = labels if "shift_labels" in batch else labels[..., 1:]
            is_target = targets != IGNORE_INDEX
            slot = torch.where(is_target, targets if CLASS_IDS in batch else len(self.names) - 1, len(self.names))
            counts_C += torch.bincount(slot.reshape(-1).to(device), minlength=len(self.names) + 1)[:-1]
        return counts_C

    def step(self, inputs: dict[str, Any], counts_C: torch.Tensor, denominator: Any, sums: ClassSums) -> LossStep:
        """What the seam needs for one forward."""
        device = counts_C.device  # where the counts are, so that nothing waits for them
        weight_C = class_weights(
            self.block.reduction, torch.tensor(self.alpha, dtype=widest(device), device=device), counts_C
        )
        class_ids = inputs.pop(CLASS_IDS, None)
        if class_ids is None and self.labeller is not None:
            raise LossNotTakenError(
                "[dwl] a batch arrived without class ids: its data loader was not made by the trainer's own "
                "`get_train_dataloader` or `get_eval_dataloader`."
            )
        return LossStep(
            self.spec,
            labels=inputs.get("labels"),
            class_ids=class_ids,
            shifted="shift_labels" in inputs,
            class_weight=weight_C,
            denominator=denominator,
            on_tokens=sums.add,
        )


class _TrainerMixin(Trainer):
    """Goes in front of the host's trainer class. `_dwl` is set by `join`."""

    _dwl: Session

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        for stored in getattr(self, "_eval_dataloaders", {}).values():  # kept for later, prepared again by the host
            self._label(stored)
        return self._label(loader)

    def _label(self, loader: Any) -> Any:
        labeller = self._dwl.labeller
        inner = getattr(loader, "base_dataloader", loader)
        if labeller is not None and not isinstance(inner.collate_fn, LabellingCollator):
            packed = bool(getattr(self.args, "sample_packing", False) or getattr(self.args, "batch_flattening", False))
            inner.collate_fn = LabellingCollator(inner.collate_fn, labeller, packed)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._dwl.step_counts = self._over_ranks(self._dwl.counts(batches, device))
        return batches, num_items

    def _over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum") if self.args.world_size > 1 else tensor

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        session, training = self._dwl, model.training
        inputs = dict(inputs)
        if training and session.step_counts is not None:
            counts_C = session.step_counts
        else:
            counts_C = session.counts([inputs], self.args.device)
        denominator = num_items_in_batch
        if denominator is None:
            # The host did not count (its model takes no num_items_in_batch): divide by the step's targets ourselves, and undo the
            # average that the ranks' gradients will be given.
            denominator = counts_C.sum().clamp(min=1)
            if training:
                denominator = denominator / self.accelerator.num_processes
        step = session.step(inputs, counts_C, denominator, session.train_sums if training else session.eval_sums)
        with session.seam.armed(step):
            return super().compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._dwl.train_sums.take(self._over_ranks, self.args.device))
            logs.update(
                {f"dwl/alpha/{name}": value for name, value in zip(self._dwl.names, self._dwl.alpha, strict=True)}
            )
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._dwl.eval_sums = ClassSums(self._dwl.names)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        measured = self._dwl.eval_sums.take(self._over_ranks, self.args.device)
        output.metrics.update({f"{prefix}_{key}": value for key, value in measured.items()})
        return output


class StepHook(TrainerCallback):
    """Moves α once per optimizer step."""

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer, self._session = trainer, session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._session
        length = _run_length(args, state, kwargs.get("train_dataloader"))
        session.alpha_at = alpha_of(session.block, length)
        session.move(state.global_step)
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(session.block.dump(), sort_keys=False, allow_unicode=True)
            (folder / RESOLVED_CONFIG).write_text(text, encoding="utf-8")
        picks = args.metric_for_best_model or "loss" if args.load_best_model_at_end else None
        counts = None if session.survey is None else session.survey.tokens
        say("\n".join(opening_lines(session.block, counts, session.alpha_at, length, session.replaced, picks)))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.move(state.global_step)


def _run_length(args: Any, state: Any, loader: Any) -> RunLength:
    try:
        per_epoch = len(loader) if loader is not None else None
    except TypeError:  # a stream
        per_epoch = None
    if per_epoch is not None:
        accumulation = args.gradient_accumulation_steps
        per_epoch = max(per_epoch // accumulation + int(per_epoch % accumulation > 0), 1)
    return RunLength(state.max_steps if state.max_steps > 0 else None, per_epoch)


def join(
    trainer: Trainer,
    block: Block,
    labeller: Labeller | None,
    survey: ClassSurvey | None = None,
    taken_over: Sequence[str] = (),
) -> tuple[Session, StepHook]:
    """Put the mixin in front of `trainer`'s class, on this instance only, and attach to its model.

    `taken_over` names the fused losses of the host that were switched off for ours.
    """
    if "compute_loss" in trainer.__dict__:
        raise DWLError(
            "[dwl] the trainer's `compute_loss` was replaced on the instance (llm_compressor does this), so `loss:` would never be "
            "used. Remove that integration, or delete the `loss:` line."
        )
    if trainer.compute_loss_func is not None:
        raise DWLError(
            f"[dwl] the trainer has its own loss, {trainer.compute_loss_func!r}; `loss: {block.loss}` cannot be used with it."
        )
    session = Session(trainer, block, labeller, survey, taken_over)
    host = type(trainer)
    trainer.__class__ = type(f"DWL{host.__name__}", (_TrainerMixin, host), {"_dwl": session})
    trainer.loss_is_scaled_for_ga = True
    _quiet_console(trainer)
    return session, StepHook(trainer, session)


def leave(session: Session, trainer: Trainer) -> None:
    """Take everything back."""
    session.seam.detach()
    if _TrainerMixin in type(trainer).__mro__:
        trainer.__class__ = type(trainer).__mro__[2]


def _quiet_console(trainer: Trainer) -> None:
    """The console keeps `loss`, `nll` and α; the trackers get everything."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (ProgressCallback, PrinterCallback)):
            callback.__class__ = type(callback.__class__.__name__, (_ShortLog, callback.__class__), {})


class _ShortLog:
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if logs is not None:
            logs = {key: value for key, value in logs.items() if "dwl/" not in key or "dwl/alpha/" in key}
        return super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[misc]
