"""Our part of somebody else's `transformers.Trainer`: a few hooks, each handing over to the session.

One optimizer step, in order: the loader's batches carry class ids -> `get_batch_samples` counts them -> the callback moves α to
τ -> `compute_loss` arms the model's seam -> the seam adds per-class sums -> the callback shows them to the controller -> `log`
divides them -> `_save_checkpoint` keeps what a resumed run needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.alpha.schedules import Curve
from dwl_plugin.classes import ClassSurvey, Labeller
from dwl_plugin.config import Block, DFTConfig, TokenLossConfig
from dwl_plugin.errors import ConfigError, DWLError, LossNotTakenError, NotFiniteError, Problem
from dwl_plugin.files import write_whole
from dwl_plugin.hosts.base_nll import base_nll
from dwl_plugin.hosts.checkpoints import finished_checkpoints
from dwl_plugin.hosts.incompatible import without_base_model
from dwl_plugin.hosts.versions import divided_later
from dwl_plugin.loss.class_sums import ClassSums, ForwardMetrics, widest
from dwl_plugin.loss.deferred_logits import DeferredLogits
from dwl_plugin.loss.membership import Membership, count_classes
from dwl_plugin.loss.reduction import class_weights
from dwl_plugin.loss.seam import Seam
from dwl_plugin.loss.shift import IGNORE_INDEX
from dwl_plugin.loss.spec import LossSpec, PendingLoss
from dwl_plugin.loss.token_losses import SCHEDULED, objective_of
from dwl_plugin.run.closed_loop import ClosedLoop
from dwl_plugin.run.collate import CLASS_IDS, LabellingCollator
from dwl_plugin.run.moving import alpha_of, controller_of, token_losses_of
from dwl_plugin.run.nan_guard import FirstBadStep
from dwl_plugin.run.startup import opening_lines, other_length_lines, other_options_lines

__all__ = ["AlphaCallback", "Session", "TrainerMixin", "join", "leave", "less_is_better", "shadowed"]

RESOLVED_CONFIG = "dwl_config.yaml"
STATE = "dwl"
"""Our key in `stateful_callbacks` of the trainer's state."""
OnTokens = Callable[[ForwardMetrics], None]

_PACKING = ("sample_packing", "batch_flattening", "packing", "padding_free")
"""Training arguments, Axolotl's and TRL's, that put several samples into one row."""


def say(line: str) -> None:
    """To the console of the main process; every line of ours looks alike."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        with tqdm.external_write_mode():  # not behind the progress bar that the host has begun
            print("\n".join(f"[dwl] {part}" for part in line.splitlines()), flush=True)


class Session:
    """One trainer's run with our loss: the settings, and what changes from step to step."""

    def __init__(
        self, trainer: Trainer, block: Block, labeller: Labeller | None, survey: ClassSurvey | None, taken_over: Sequence[str]
    ) -> None:
        self.block, self.labeller, self.survey = block, labeller, survey
        self.names = block.class_names
        objectives = tuple(objective_of(token_loss) for token_loss in block.token_losses)
        self.spec = LossSpec(block.alpha, objectives, block.overlap, block.loss == "dwl", block.anchors)
        self.seam = Seam(trainer.model, say, _without_adapter(trainer.model, block) if self.spec.is_anchored else None)
        self.replaced = " and ".join([self.seam.replaced, *(f"`{key}`" for key in taken_over)])
        self.token_losses = block.token_losses
        self.token_losses_at: Callable[[int], tuple[TokenLossConfig, ...]] | None = None
        self.alpha_at: Curve = lambda tau: block.alpha  # until the length of the run is known
        self.alpha = block.alpha
        self.length = RunLength(None, None)
        self.loop: ClosedLoop | None = None
        self.base_nll: dict[str, float] | None = None
        self.train_sums, self.eval_sums = ClassSums(self.names), ClassSums(self.names)
        self.step_counts: torch.Tensor | None = None
        self.keeps_logits = False  # an evaluation that hands the logits on
        self.model_loss: torch.Tensor | None = None  # of the last forward, where a host of its own mind is watched
        self.tau, self.first_bad = 0, FirstBadStep(self.names)

    def begin(self, length: RunLength) -> None:
        """A run begins, or begins again in this process with smaller batches: nothing is left of the one before."""
        self.length, self.alpha_at, self.alpha = length, alpha_of(self.block, length), self.block.alpha
        self.token_losses_at = token_losses_of(self.block, length)
        self.train_sums, self.step_counts = ClassSums(self.names), None
        self.first_bad = FirstBadStep(self.names)

    def move(self, tau: int) -> None:
        """α of optimizer step τ, and what tokens pay."""
        self.tau = tau
        self.alpha = self.alpha_at(tau) if self.loop is None else self.loop.controller.alpha
        if self.token_losses_at is not None:
            self.token_losses = self.token_losses_at(tau)
            self.spec = replace(self.spec, objective=tuple(map(objective_of, self.token_losses)))

    def settings(self) -> dict[str, float]:
        """What moves by itself, as the trackers get it."""
        logged = {f"dwl/alpha/{name}": alpha for name, alpha in zip(self.names, self.alpha, strict=True)}
        signal = None if self.loop is None else self.loop.controller.signal
        if signal is not None:
            logged.update({f"dwl/signal/{name}": value for name, value in zip(self.names, signal, strict=True)})
        for name, loss in zip(self.names, self.token_losses, strict=True):
            if isinstance(loss, DFTConfig) and loss.schedule is not None:
                logged.update({f"dwl/{option}/{name}": getattr(loss, option) for option in SCHEDULED})
        return logged

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to keep, as plain values. Every rank has to call it."""
        run = {"total_steps": self.length.total_steps, "steps_per_epoch": self.length.steps_per_epoch}
        return {"run": run, "controller": None if self.loop is None else self.loop.state()}

    def counts(self, batches: list[Any], device: torch.device) -> torch.Tensor:
        """(C + 2,) int64 of `batches`: targets of each class, targets, samples with a target. The first label of a row predicts
        nothing and is not counted."""
        classes = len(self.names)
        counts = torch.zeros(classes + 2, dtype=torch.int64, device=device)
        for batch in batches:
            labels = batch[CLASS_IDS] if CLASS_IDS in batch else batch.get("labels")
            if labels is None:
                continue
            targets = (labels if "shift_labels" in batch else labels[..., 1:]).to(device)
            if CLASS_IDS not in batch:
                targets = Membership.all_rest(targets != IGNORE_INDEX, classes, self.spec.overlap).ids_N
            counts += count_classes(targets, classes, self.spec.overlap)
        return counts

    def _trained_on(self, tokens: ForwardMetrics) -> None:
        self.first_bad.add(self.tau + 1, tokens)
        tokens_C, nll_C = self.train_sums.add(tokens)
        if self.loop is not None:
            self.loop.add(tokens_C, nll_C)

    def _evaluated_on(self, tokens: ForwardMetrics) -> None:
        self.eval_sums.add(tokens)

    def step(self, inputs: dict[str, Any], counts: torch.Tensor, denominator: Any, training: bool) -> PendingLoss:
        """What the seam needs for one forward."""
        device = counts.device  # where the counts are, so that nothing waits for them
        weight_C = class_weights(self.block.reduction, torch.tensor(self.alpha, dtype=widest(device), device=device), counts)
        class_ids = inputs.pop(CLASS_IDS, None)
        if class_ids is None and self.labeller is not None:
            raise LossNotTakenError(
                "[dwl] a batch arrived without class ids: its data loader was not made by the trainer's own "
                "`get_train_dataloader` or `get_eval_dataloader`."
            )
        return PendingLoss(
            self.spec,
            labels=inputs.get("labels"),
            class_ids=class_ids,
            shifted="shift_labels" in inputs,
            class_weight=weight_C,
            denominator=denominator,
            on_tokens=self._trained_on if training else self._evaluated_on,
        )


class TrainerMixin(Trainer):
    """Goes in front of the host's trainer class. `_dwl` and `_dwl_host` are set by `join`."""

    _dwl: Session
    _dwl_host: type[Trainer]

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        for stored in getattr(self, "_eval_dataloaders", {}).values():  # kept for later, prepared again by the host
            self._label(stored)
        return self._label(loader)

    def _label(self, loader: Any) -> Any:
        labeller = self._dwl.labeller
        inner = getattr(loader, "base_dataloader", loader)
        if labeller is not None and not isinstance(inner.collate_fn, LabellingCollator):
            packed = any(getattr(self.args, key, False) for key in _PACKING)
            inner.collate_fn = LabellingCollator(inner.collate_fn, labeller, packed)
        return loader

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        _require_cut_sequences(self.accelerator, batches)
        self._dwl.step_counts = self._over_ranks(self._dwl.counts(batches, device))
        return batches, num_items

    def _over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(tensor, reduction="sum") if self.args.world_size > 1 else tensor

    def _of_every_rank(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.accelerator.gather(tensor) if self.args.world_size > 1 else tensor

    def _averaged_over(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """How many ranks' gradients the host averages without multiplying the loss before.

        The step's targets are counted over all ranks, so that a rank with few of them weighs as little as they do. (Axolotl's own
        loss is the mean of the ranks' means.)
        """
        multiplies = self.args.average_tokens_across_devices and num_items_in_batch is not None
        multiplies = multiplies and (self.model_accepts_loss_kwargs or self.compute_loss_func is not None)
        return int(self.get_tp_size() if multiplies else self.accelerator.num_processes)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        session, training = self._dwl, model.training
        inputs = dict(inputs)
        denominator: torch.Tensor | int
        if training and session.step_counts is not None:
            counts = session.step_counts
            denominator = counts[-2].clamp(min=1) / self._averaged_over(num_items_in_batch)
            denominator = denominator / divided_later(self, num_items_in_batch)
        else:
            counts = session.counts([inputs], self.args.device)
            denominator = counts[-2].clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        step = session.step(inputs, counts, denominator, training)
        if not training and step.on_tokens is not None:
            step.on_tokens = self._without_repeated_rows(inputs, step.on_tokens)
        with session.seam.armed(step):
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
            if session.keeps_logits:
                outputs = result[1]
                if isinstance(outputs, dict) and isinstance(outputs.get("logits"), DeferredLogits):
                    outputs["logits"] = outputs["logits"].materialise("compute_metrics").as_subclass(torch.Tensor)
            return result

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        self._dwl.keeps_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)
        finally:
            self._dwl.keeps_logits = False

    def _without_repeated_rows(self, inputs: dict[str, Any], on_tokens: OnTokens) -> OnTokens:
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

    def stop_if_not_finite(self) -> None:
        """Before anything is logged or saved; the checkpoints from before stay."""
        found = self._dwl.first_bad.found(self._least_over_ranks, self.args.device)
        if found:
            raise _not_finite(found, Path(self.args.output_dir))

    def _least_over_ranks(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.args.world_size > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MIN)
        return tensor

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.stop_if_not_finite()
            logs.update(self._dwl.train_sums.take(self._over_ranks, self.args.device))
            logs.update(self._dwl.settings())
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self.stop_if_not_finite()
        self.state.stateful_callbacks[STATE] = self._dwl.state()
        return super()._save_checkpoint(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._dwl.eval_sums = ClassSums(self._dwl.names)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        measured = self._dwl.eval_sums.take(self._over_ranks, self.args.device)
        output.metrics.update({f"{prefix}_{key}": value for key, value in measured.items()})
        return output


class AlphaCallback(TrainerCallback):
    """Moves α once per optimizer step."""

    def __init__(self, trainer: Trainer, session: Session) -> None:
        self._trainer, self._session = trainer, session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        session = self._session
        session.begin(_run_length(args, state, kwargs.get("train_dataloader")))
        saved = dict(state.stateful_callbacks or {}).get(STATE) if state.global_step else None
        self._close_loop(saved, state.global_step)
        session.move(state.global_step)
        if state.is_world_process_zero:
            _keep_config(session.block, Path(args.output_dir))
        picks = args.metric_for_best_model or "loss" if args.load_best_model_at_end else None
        counts = None if session.survey is None else session.survey.counts
        say("\n".join(opening_lines(session.block, counts, session.alpha_at, session.length, session.replaced, picks)))
        if saved is not None:
            trained_for = RunLength(**saved["run"])
            for line in other_length_lines(session.block, trained_for, session.length, state.global_step):
                say(line)
            if session.loop is not None:
                for line in other_options_lines(session.loop.controller.options, saved["controller"]["options"]):
                    say(line)

    def _close_loop(self, saved: dict[str, Any] | None, steps: int) -> None:
        """The controller, as the checkpoint left it or from the start."""
        session, trainer = self._session, self._trainer
        session.loop = None
        controller = controller_of(session.block, session.length)
        if controller is None:
            return
        state = None if saved is None else saved["controller"]
        if steps and state is None:
            raise ConfigError(
                [
                    Problem(
                        "dwl.controller",
                        f"the checkpoint of step {steps} was not written by a run with a controller, so what it "
                        "had learned until then is not known",
                        controller.options.type,
                        hint="delete `controller`, or start a new run from these weights without `resume_from_checkpoint`",
                    )
                ]
            )
        loop = ClosedLoop(controller, trainer._of_every_rank, trainer.args.device)
        if state is not None:
            loop.load(state, trainer.args.process_index)
        if controller.rows_to_measure:
            if session.base_nll is None:  # kept: a run that begins again with smaller batches has taken steps
                session.base_nll = base_nll(trainer, controller.rows_to_measure, session.names)
            controller.compare_with(session.base_nll)
        session.loop = loop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session.loop is not None:
            self._session.loop.end_step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.stop_if_not_finite()  # what comes next saves the model

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._session.move(state.global_step)


def _keep_config(block: Block, folder: Path) -> None:
    """For people and `dwl report`. Training does not stop for want of it."""
    text = yaml.safe_dump(block.dump(), sort_keys=False, allow_unicode=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / RESOLVED_CONFIG, text.encode())
    except (OSError, DWLError) as error:
        say(f"{error} Training goes on, and `dwl report` will not know this run's settings.")


def _require_cut_sequences(accelerator: Any, batches: Sequence[Any]) -> None:
    """Under context parallelism each rank has its part of every sequence, and of the class ids, from the collator on."""
    parallelism = getattr(accelerator, "parallelism_config", None)
    if (getattr(parallelism, "cp_size", None) or 1) > 1 and not all("_cp_shard" in batch for batch in batches):
        raise DWLError(
            "[dwl] context parallelism cuts these sequences up after their batch was made, where class ids and the number of "
            "targets cannot follow. It works with datasets of text whose batches Axolotl's own collators make."
        )


def _not_finite(found: dict[str, int], output_dir: Path) -> NotFiniteError:
    first = min(found.values())
    classes = " and ".join(f"`{name}`" for name, step in found.items() if step == first)
    whole = finished_checkpoints(output_dir)
    kept = f"The newest checkpoint, {whole[-1]}, is from before." if whole else "No checkpoint was written before."
    return NotFiniteError(
        f"[dwl] the loss of class {classes} is infinite or NaN from step {first} on, so training stops. {kept} A lower "
        "`learning_rate`, `max_grad_norm: 1.0` or bf16 in place of fp16 are the usual remedies; if it is always this step, look "
        "at its rows."
    )


def _without_adapter(model: Any, block: Block) -> Callable[[], AbstractContextManager[Any]]:
    """A context in which the model is its base model."""
    if not hasattr(model, "disable_adapter"):
        raise ConfigError(without_base_model(block))
    found: Callable[[], AbstractContextManager[Any]] = model.disable_adapter
    return found


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
    front: type[TrainerMixin] = TrainerMixin,
    behind: Sequence[type[Trainer]] = (),
) -> tuple[Session, AlphaCallback]:
    """Put `front` before `trainer`'s class, on this instance only, and attach to its model.

    `taken_over` names the fused losses of the host that were switched off for ours. A class in `behind` comes between the
    host's trainer and `transformers.Trainer`: what the host calls with `super()`.
    """
    for name in shadowed(trainer):
        raise DWLError(
            f"[dwl] the trainer's `{name}` was replaced on the instance (llm_compressor does this), so `loss:` would never be "
            "used. Remove that integration, or delete the `loss:` line."
        )
    if trainer.compute_loss_func is not None:
        raise DWLError(
            f"[dwl] the trainer has its own loss, {trainer.compute_loss_func!r}; `loss: {block.loss}` cannot be used with it."
        )
    session = Session(trainer, block, labeller, survey, taken_over)
    host = type(trainer)
    trainer.__class__ = type(f"DWL{host.__name__}", (front, host, *behind), {"_dwl": session, "_dwl_host": host})
    trainer.loss_is_scaled_for_ga = True
    _hide_class_metrics(trainer)
    return session, AlphaCallback(trainer, session)


def shadowed(trainer: Trainer) -> list[str]:
    """Methods of ours that an attribute of the instance would hide."""
    return [name for name in ("compute_loss", "get_batch_samples") if name in vars(trainer)]


def leave(session: Session, trainer: Trainer) -> None:
    """Take everything back."""
    session.seam.detach()
    if not isinstance(trainer, TrainerMixin):
        return
    trainer.__class__ = trainer._dwl_host
    trainer.__dict__.pop("loss_is_scaled_for_ga", None)
    trainer.__dict__.pop("_eval_dataloaders", None)  # kept between evaluations, with our class ids in their batches
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, _ShortLog):
            callback.__class__ = type(callback).__mro__[2]


def less_is_better(metric: str | None) -> bool:
    """`metric` is a cross-entropy of ours. A host takes every metric that does not end in `loss` for one to maximise."""
    return metric is not None and (metric == "nll" or metric.endswith("_nll") or "dwl/nll/" in metric)


def _hide_class_metrics(trainer: Trainer) -> None:
    """The console keeps `loss`, `nll` and α; the trackers get everything."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, (ProgressCallback, PrinterCallback)):
            callback.__class__ = type(callback.__class__.__name__, (_ShortLog, callback.__class__), {})


class _ShortLog:
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if logs is not None:
            logs = {key: value for key, value in logs.items() if "dwl/" not in key or "dwl/alpha/" in key}
        return super().on_log(args, state, control, logs=logs, **kwargs)  # type: ignore[misc]
