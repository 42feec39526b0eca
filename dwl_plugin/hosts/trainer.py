"""The loss in a `transformers.Trainer` or a subclass: a few hooks, each handing over to the session.

One optimizer step, in order: the loader's batches carry class ids -> `get_batch_samples` counts them -> the callback moves α to
τ -> `compute_loss` arms the model's seam -> the seam adds per-class sums -> the callback shows them to the controller -> `log`
divides them -> `_save_checkpoint` keeps what a resumed run needs.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.classes import ClassSurvey, Labeller
from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.config import Block
from dwl_plugin.errors import ConfigError, LossNotTakenError, NotFiniteError, RunError, first_line
from dwl_plugin.hosts.base_nll import base_nll
from dwl_plugin.hosts.checkpoints import finished_checkpoints, named_in, require_whole, unfinished
from dwl_plugin.hosts.model_card import add_section, section, without_our_metrics
from dwl_plugin.hosts.versions import divided_later, gradients_are_averaged
from dwl_plugin.loss.class_sums import ForwardMetrics
from dwl_plugin.loss.deferred_logits import DeferredLogits
from dwl_plugin.loss.membership import Membership
from dwl_plugin.loss.shift import IGNORE_INDEX
from dwl_plugin.run.closed_loop import ClosedLoop
from dwl_plugin.run.collate import LabellingCollator
from dwl_plugin.run.dataset_check import NO_TARGET
from dwl_plugin.run.moving import controller_of
from dwl_plugin.run.record import BatchSize, Record
from dwl_plugin.run.row_codes import RowError
from dwl_plugin.run.session import RunState, Session
from dwl_plugin.run.startup import keep_config, log_line, other_length_lines, other_options_lines, startup_lines

__all__ = [
    "Batch",
    "BelowHost",
    "Items",
    "TrainerMixin",
    "computes_loss",
    "install",
    "less_is_better",
    "ranks_per_sequence",
    "replaced_methods",
    "uninstall",
]

_STATE = "dwl"
"""The key in `stateful_callbacks` of the trainer's state."""
_PACKING = ("sample_packing", "batch_flattening", "packing", "padding_free")
"""Training arguments, Axolotl's and TRL's, that put several samples into one row."""
_VERSIONED = ("axolotl", "transformers", "trl", "peft", "accelerate", "deepspeed", "torch")
_LARGEST_EXPONENT = math.log(sys.float_info.max)

Batch = dict[str, Any]
Items = torch.Tensor | int | None
OnTokens = Callable[[ForwardMetrics], object]


class TrainerMixin(Trainer):
    """Goes in front of the host's trainer class. `_dwl` and `_dwl_host` are set by `install`."""

    _dwl: Session
    _dwl_host: type[Trainer]
    _signature_columns: Any
    _dwl_checkpoint: Path | None = None
    """What this run goes on from."""

    def train(self, resume_from_checkpoint: str | PathLike[str] | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        asked = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self._dwl_checkpoint = Path(asked) if asked else None
        if self._dwl_checkpoint is not None and self._dwl_checkpoint.is_dir():
            require_whole(self._dwl_checkpoint, Path(self.args.output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        """What rows say of their tokens stays with them up to the collator."""
        super()._set_signature_columns_if_needed()
        if self._dwl.block.reads_data and DATA_CODES not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, DATA_CODES]

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        if self._dwl.read is not None:  # one that was handed to `evaluate`, say
            dataset = self._dwl.read(dataset, "train_dataset" if kwargs.get("is_training", False) else "eval_dataset")
        loader = super()._get_dataloader(dataset, *args, **kwargs)
        for stored in getattr(self, "_eval_dataloaders", {}).values():  # kept for later, prepared again by the host
            self._label(stored)
        return self._label(loader, shifted=kwargs.get("is_training", False) and ranks_per_sequence(self.accelerator) > 1)

    def _label(self, loader: Any, shifted: bool = False) -> Any:
        labeller = self._dwl.labeller
        inner = getattr(loader, "base_dataloader", loader)
        if labeller is not None and not isinstance(inner.collate_fn, LabellingCollator):
            packed = any(getattr(self.args, key, False) for key in _PACKING)
            inner.collate_fn = LabellingCollator(inner.collate_fn, labeller, packed, shifted)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        try:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        except RowError as error:  # of a stream, whose rows are read as the run goes
            raise RunError(error.said) from None
        _require_cut_sequences(self.accelerator, batches)
        self._dwl.step_counts = self._over_ranks(self._dwl.counts(batches, device))
        return batches, num_items

    def _over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum") if self.args.world_size > 1 else tensor

    def _averaged_over(self, num_items_in_batch: Items) -> int:
        """How many ranks' gradients the host averages without multiplying the loss before.

        The step's targets are counted over all ranks, so that a rank with few of them weighs as little as they do. (Axolotl's own
        loss is the mean of the ranks' means.)
        """
        multiplies = self.args.average_tokens_across_devices and num_items_in_batch is not None
        multiplies = multiplies and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        return int(self.get_tp_size() if multiplies else self.accelerator.num_processes)

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Items = None) -> Any:
        session, training = self._dwl, model.training
        inputs = dict(inputs)
        denominator: torch.Tensor | int
        if training and session.step_counts is not None:
            counts = session.step_counts
            divided = self._averaged_over(num_items_in_batch) * divided_later(self, num_items_in_batch)
            denominator = counts[0, -2].clamp(min=1) / divided
        else:
            counts = session.counts([inputs], self.args.device)
            denominator = counts[0, -2].clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        on_tokens = session.trained_on if training else self._without_repeated_rows(inputs, session.eval_sums.add)
        with session.seam.armed(session.pending_loss(inputs, counts, denominator, on_tokens)):
            sharing = ranks_per_sequence(self.accelerator) if training else 1
            result = super().compute_loss(
                model, inputs, return_outputs=return_outputs or sharing > 1, num_items_in_batch=num_items_in_batch
            )
            if sharing > 1:  # the host weighs the ranks' losses by their targets; ours are parts of one sum
                loss = _share(result[1]["loss"], sharing, gradients_are_averaged(model))
                result = (loss, result[1]) if return_outputs else loss
            if training:
                session.first_bad.add_loss(session.tau + 1, result[0] if return_outputs else result)
            if session.keeps_logits:
                outputs = result[1]
                if isinstance(outputs, dict) and isinstance(outputs.get("logits"), DeferredLogits):
                    outputs["logits"] = outputs["logits"].materialise("compute_metrics").as_subclass(torch.Tensor)
            return result

    def prediction_step(self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        self._dwl.keeps_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._dwl.keeps_logits = False

    def _without_repeated_rows(self, inputs: Batch, on_tokens: OnTokens) -> OnTokens:
        """The host repeats rows of the evaluation set to give every rank as many; they come last, and are not measured again."""
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        repeats = self.args.world_size > 1 and self.accelerator.even_batches and state.end_of_dataloader
        if not repeats or state.remainder <= 0 or labels is None:
            return on_tokens
        rows = len(labels)
        own = min(max(state.remainder - self.args.process_index * rows, 0), rows)

        def of_own(members: Membership) -> Membership:
            ids_BT = members.ids_N.reshape(rows, -1).clone()
            ids_BT[own:] = IGNORE_INDEX
            return replace(members, ids_N=ids_BT.reshape(-1))

        def on_own_tokens(tokens: ForwardMetrics) -> None:
            members = of_own(tokens.members)
            paying = members if tokens.paying is tokens.members else of_own(tokens.paying)
            on_tokens(replace(tokens, members=members, paying=paying))

        return on_own_tokens

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The host's, with a section on the loss in place of a column for each of our metrics."""
        with without_our_metrics(self):
            super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_section(Path(self.args.output_dir) / "README.md", section(self._dwl, self.state.log_history))

    def stop_if_not_finite(self) -> None:
        """Before anything is logged or saved; the checkpoints from before stay."""
        found = self._dwl.first_bad.found(self.accelerator.gather, self.args.device)
        if not found:
            return
        first = min(found.values())
        classes = " and ".join(f"`{name}`" for name, step in found.items() if name is not None and step == first)
        what = f"the loss of class {classes}" if classes else "the trained loss, though not that of any token,"
        raise NotFiniteError(
            f"{what} is infinite or NaN from step {first} on, so training stops. {self._kept('is from before')} A lower "
            "`learning_rate`, `max_grad_norm: 1.0` or bf16 in place of fp16 are the usual remedies; if it is always this step, "
            "look at its rows."
        )

    def _kept(self, of_it: str) -> str:
        """A sentence on the newest checkpoint there is."""
        whole = finished_checkpoints(Path(self.args.output_dir))
        return f"The newest checkpoint, {whole[-1]}, {of_it}." if whole else "No checkpoint was written before."

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.stop_if_not_finite()
            logs.update(self._dwl.measured(self._over_ranks, self.args.device))
            logs.update(self._dwl.moving_numbers())
        self._dwl.given = dict(logs)
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self.stop_if_not_finite()
        self.state.stateful_callbacks[_STATE] = self._dwl.state()
        try:
            return super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # a full disk: each of four writers has another
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            why = unfinished(folder) if folder.is_dir() else "it is not there"
            if why is None:
                raise
            free = shutil.disk_usage(self.args.output_dir).free / 1e6
            raise RunError(
                f"the checkpoint of step {self.state.global_step} could not be written ({first_line(error)}; {free:,.1f} MB are "
                f"free on the disk), so training stops. {self._kept('is whole: resume from it when there is room')} "
                f"{folder.name} is not ({why}), and can be deleted."
            ) from error

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._dwl.eval_sums = self._dwl.class_sums()
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        measured = self._dwl.eval_sums.take(self._over_ranks, self.args.device)
        if not measured and f"{prefix}_loss" in output.metrics:
            log_line(f"the evaluation set has no target token, so `{prefix}_loss` says nothing and there is no `{prefix}_nll`")
        output.metrics.update({f"{prefix}_{key}": value for key, value in measured.items()})
        return output


class _CheckedMixin(TrainerMixin):
    """For a host with a `compute_loss` of its own: the loss it returns has to be the one that came from the model."""

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Items = None) -> Any:
        self._dwl.model_loss = None
        try:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        except LossNotTakenError:
            if self._dwl.model_loss is not None:
                raise
            result = (None, None)
        loss = result[0] if return_outputs else result
        if loss is None or loss is not self._dwl.model_loss:
            name = computes_loss(self._dwl_host).__qualname__
            raise LossNotTakenError(
                f"{name}.compute_loss returned a loss that is not the model's, so the configured loss would not be the one "
                "that is trained. Return what `super().compute_loss(...)` returns, or do not call `dwl_plugin.apply`."
            )
        return result


class BelowHost(Trainer):
    """Between the host's class and `Trainer`: what the host's `super().compute_loss` reaches."""

    _dwl: Session

    def compute_loss(self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Items = None) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        self._dwl.model_loss = loss
        return (loss, outputs) if return_outputs else loss


class _PerplexityOfNll(Trainer):
    """Below the host's class: a perplexity that it made of the loss on the way down is one of nll before anything sees it.

    One that `compute_metrics` made was in the log before, and one without a loss of its name is of something else.
    """

    _dwl: Session

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        given = self._dwl.given
        for key in [key for key, value in logs.items() if key.endswith("ppl") and given.get(key) != value]:
            name = key.removesuffix("ppl")
            if f"{name}loss" not in logs:
                continue
            nll = logs.get(f"{name}nll")
            if nll is None:  # no target, so there is none
                del logs[key]
            else:
                logs[key] = math.exp(nll) if nll < _LARGEST_EXPONENT else math.inf
        super().log(logs, start_time)


class AlphaCallback(TrainerCallback):
    """Moves α once per optimizer step, and shows the controller what the step cost."""

    def __init__(self, trainer: TrainerMixin) -> None:
        self._trainer, self._session, self._began_at = trainer, trainer._dwl, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session, tau = self._session, state.global_step
        self._began_at = tau
        kept = dict(state.stateful_callbacks or {}).get(_STATE) if tau else None
        with named_in(self._trainer._dwl_checkpoint, f"stateful_callbacks.{_STATE}"):
            saved = None if kept is None else RunState.model_validate(kept)
        session.begin(_run_length(args, state, kwargs.get("train_dataloader")))
        session.loop = self._closed_loop(saved, tau)
        session.move(tau)
        if state.is_world_process_zero:
            config = None if session.source is None else session.source.config
            keep_config(session.block, _record(self._trainer, tau), config, Path(args.output_dir))
        picks = args.metric_for_best_model or "loss" if args.load_best_model_at_end else None
        lines = [*startup_lines(session.block, session.survey, session.alpha_at, session.length, session.replaced, picks)]
        if saved is not None:
            lines += other_length_lines(session.block, saved.length, session.length, tau)
            if session.loop is not None and saved.controller is not None:
                lines += other_options_lines(session.loop.controller.options, saved.controller["options"])
        log_line("\n".join(lines))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.move(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session.loop is not None:
            self._session.loop.end_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, session = self._trainer, self._session
        trainer.stop_if_not_finite()  # what comes next saves the model
        session.measured(trainer._over_ranks, trainer.args.device)
        if not session.has_trained and state.global_step > self._began_at:
            raise RunError(f"no batch of this run had a target token, so nothing was trained and no model is saved ({NO_TARGET})")

    def _closed_loop(self, saved: RunState | None, tau: int) -> ClosedLoop | None:
        """The controller, as the checkpoint left it or from the start."""
        session, trainer = self._session, self._trainer
        controller = controller_of(session.block, session.length)
        if controller is None:
            return None
        state = None if saved is None else saved.controller
        if tau and state is None:
            raise ConfigError.at(
                "dwl.controller",
                f"the checkpoint of step {tau} was not written by a run with a controller, so what it had learned until then is "
                "not known",
                controller.options.type,
                hint="delete `controller`, or start a new run from these weights without `resume_from_checkpoint`",
            )
        loop = ClosedLoop(controller, trainer.accelerator.gather, trainer.args.device)
        if state is not None:
            with named_in(trainer._dwl_checkpoint, f"stateful_callbacks.{_STATE}.controller"):
                loop.load(state, trainer.args.process_index)
        if controller.rows_to_measure:
            if session.base_nll is None:  # kept: a run that begins again with smaller batches has taken steps
                session.base_nll = base_nll(trainer, controller.rows_to_measure, session.names)
            controller.compare_with(session.base_nll)
        return loop


def ranks_per_sequence(accelerator: Any) -> int:
    """How many ranks share a sequence in training: several under DeepSpeed's sequence parallelism."""
    return getattr(getattr(accelerator, "parallelism_config", None), "sp_size", None) or 1


def _share(loss: torch.Tensor, sharing: int, averaged: bool) -> torch.Tensor:
    """A rank's share of the loss of its sequence, which the host multiplies again for its log; with the whole gradient where those
    of the ranks are averaged, and its share where they are added."""
    share = loss / sharing
    return share + (loss - share) - (loss - share).detach() if averaged else share


def _require_cut_sequences(accelerator: Any, batches: Sequence[Any]) -> None:
    """Under context parallelism each rank has its part of every sequence, and of the class ids, from the collator on."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    if (getattr(parallelism, "cp_size", None) or 1) > 1 and not all("_cp_shard" in batch for batch in batches):
        raise RunError(
            "context parallelism cuts these sequences up after their batch was made, where class ids and the number of "
            "targets cannot follow. It works with datasets of text whose batches Axolotl's own collators make."
        )


def _record(trainer: TrainerMixin, tau: int) -> Record:
    args, rows, source = trainer.args, trainer.train_dataset, trainer._dwl.source
    model = getattr(trainer.accelerator.unwrap_model(trainer.model), "config", None)
    batch = trainer.get_total_train_batch_size(args)
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    names = {"dwl_plugin": "axolotl-dwl", **{name: name for name in _VERSIONED if name in sys.modules}}
    versions = {}
    for name, package in names.items():
        with suppress(PackageNotFoundError):  # a checkout that is on the path, and not installed
            versions[name] = version(package)
    return Record(
        began=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        resumed_at_step=tau or None,
        model=getattr(model, "name_or_path", None) or None,
        model_commit=getattr(model, "_commit_hash", None),
        data=None if source is None else source.data,
        rows=len(rows) if hasattr(rows, "__len__") else None,
        learning_rate=args.learning_rate,
        batch=BatchSize(micro=micro, accumulation=accumulation, ranks=max(batch // (micro * accumulation), 1)),
        versions=versions,
        packs=None if source is None else dict(source.packs),
        files=None if source is None else dict(source.files),
    )


def _run_length(args: Any, state: Any, loader: Any) -> RunLength:
    try:
        per_epoch = max(math.ceil(len(loader) / args.gradient_accumulation_steps), 1)
    except TypeError:  # a stream, or none
        per_epoch = None
    return RunLength(state.max_steps if state.max_steps > 0 else None, per_epoch)


def install(
    trainer: Trainer,
    block: Block,
    labeller: Labeller | None,
    survey: ClassSurvey | None = None,
    taken_over: Sequence[str] = (),
    below: type[Trainer] | None = None,
) -> tuple[Session, AlphaCallback]:
    """Put a mixin before the class of `trainer`, on this instance only, and a seam into its model.

    `taken_over` names the fused losses of the host that were switched off. `below` is what the host's `super().compute_loss`
    reaches, or what is in the place of the host's own; what the host returns is then compared with the loss of the model.
    """
    for name in replaced_methods(trainer):
        raise RunError(
            f"the trainer's `{name}` was replaced on the instance (llm_compressor does this), so `loss:` would never be used. "
            "Remove that integration, or delete the `loss:` line."
        )
    if trainer.compute_loss_func is not None:
        raise RunError(f"the trainer has its own loss, {trainer.compute_loss_func!r}; `loss: {block.loss}` cannot be used with it.")
    session = Session(trainer.model, block, labeller, survey, taken_over)
    host = type(trainer)
    bases: tuple[type, ...] = (TrainerMixin, host)
    if below is not None:
        bases = (_CheckedMixin, below) if issubclass(below, host) else (_CheckedMixin, host, below)
    if host is not Trainer:
        bases += (_PerplexityOfNll,)
    trainer.__class__ = type(f"DWL{host.__name__}", bases, {"_dwl": session, "_dwl_host": host})
    trainer.loss_is_scaled_for_ga = True
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (ProgressCallback, PrinterCallback)):
            callback.__class__ = type(callback.__class__.__name__, (_ShortLog, callback.__class__), {})
    assert isinstance(trainer, TrainerMixin)
    return session, AlphaCallback(trainer)


def uninstall(trainer: Trainer) -> None:
    """Give the trainer and its model back as they were. Once is enough, twice does no harm."""
    if not isinstance(trainer, TrainerMixin):
        return
    trainer._dwl.seam.detach()
    trainer.__class__ = trainer._dwl_host
    trainer.__dict__.pop("loss_is_scaled_for_ga", None)
    trainer._signature_columns = None
    trainer.__dict__.pop("_eval_dataloaders", None)  # kept between evaluations, with class ids in their batches
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _ShortLog):
            callback.__class__ = type(callback).__mro__[2]


def replaced_methods(trainer: Trainer) -> list[str]:
    """Methods of `TrainerMixin` that an attribute of the instance would hide."""
    return [name for name in ("compute_loss", "get_batch_samples") if name in vars(trainer)]


def computes_loss(kind: type) -> type:
    """The class whose `compute_loss` runs in a `kind`."""
    return next(base for base in kind.__mro__ if "compute_loss" in vars(base))


def less_is_better(metric: str | None) -> bool:
    """Whether `metric` is a cross-entropy or a perplexity. A host maximises every metric that does not end in `loss`."""
    return metric is not None and (metric.rpartition("_")[2] in ("nll", "ppl") or "/nll/" in metric)


class _ShortLog:
    """The console keeps `loss`, `nll` and α; the trackers get everything."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if logs is not None:
            logs = {key: value for key, value in logs.items() if "dwl/" not in key or "dwl/alpha/" in key}
        return super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[misc]
