"""One run with a loss of this package, whichever trainer it is in: the settings, and what changes from step to step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from math import isfinite
from typing import Any

import torch
from pydantic import Field

from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.alpha.schedules import Curve
from dwl_plugin.classes import ClassSurvey, Labeller
from dwl_plugin.config import Block
from dwl_plugin.errors import ConfigError, LossNotTakenError, NotFiniteError
from dwl_plugin.loss.class_sums import ClassSums, ForwardMetrics
from dwl_plugin.loss.membership import Membership, count_classes, widest
from dwl_plugin.loss.reduction import class_weights
from dwl_plugin.loss.seam import Seam
from dwl_plugin.loss.shift import IGNORE_INDEX
from dwl_plugin.loss.spec import LossSpec, PendingLoss
from dwl_plugin.loss.token_losses import SCHEDULED, DFTConfig, TokenLossConfig, objective_of
from dwl_plugin.run.anchors import without_base_model
from dwl_plugin.run.closed_loop import ClosedLoop
from dwl_plugin.run.collate import CLASS_IDS
from dwl_plugin.run.moving import alpha_of, token_losses_of
from dwl_plugin.run.nan_guard import FirstBadStep
from dwl_plugin.run.record import Source
from dwl_plugin.run.startup import log_line
from dwl_plugin.values import Strict

__all__ = ["RunState", "Session"]


class _Length(Strict):
    total_steps: int | None = Field(strict=True, ge=1, le=2**53)
    steps_per_epoch: float | None = Field(strict=True, gt=0.0)


class RunState(Strict):
    """`Session.state`, read back. What a controller keeps is looked at by `ClosedLoop.load`."""

    run: _Length
    controller: dict[str, Any] | None

    @property
    def length(self) -> RunLength:
        """Of the run that wrote it."""
        return RunLength(self.run.total_steps, self.run.steps_per_epoch)


class Session:
    """A run's settings, the seam in its model, and what changes from step to step.

    `taken_over` names the fused losses of the host that were switched off. Raises `ConfigError` for an anchor without an adapter to
    switch off, and as `Seam`.
    """

    def __init__(
        self, model: Any, block: Block, labeller: Labeller | None, survey: ClassSurvey | None, taken_over: Sequence[str]
    ) -> None:
        self.block, self.labeller, self.survey = block, labeller, survey
        self.names = block.class_names
        objectives = tuple(objective_of(token_loss) for token_loss in block.token_losses)
        negative = block.data_weights is not None and block.data_weights.allow_negative
        self.spec = LossSpec(
            block.alpha, objectives, block.overlap, block.loss == "dwl", block.anchors, block.weighs_tokens, negative
        )
        if self.spec.is_anchored and not hasattr(model, "disable_adapter"):
            raise ConfigError(without_base_model(block))
        self.seam = Seam(model, log_line, model.disable_adapter if self.spec.is_anchored else None)
        self.replaced = " and ".join([self.seam.replaced, *(f"`{key}`" for key in taken_over)])
        self.read: Callable[[Any, str], Any] | None = None
        """A data set, and its name -> the same with what its rows say of their tokens; None where rows come with it."""
        self.source: Source | None = None
        """Where the host has a config."""
        self.loop: ClosedLoop | None = None
        self.base_nll: dict[str, float] | None = None
        self.keeps_logits = False
        """Whether an evaluation hands its logits on."""
        self.model_loss: torch.Tensor | None = None
        """Of the last forward, where the host's class has a `compute_loss` of its own."""
        self.given: dict[str, float] = {}
        """The last log, as the host's class got it."""
        self.eval_sums = self.class_sums()
        self.token_losses = block.token_losses
        self._on_device: tuple[tuple[float, ...], torch.Tensor] | None = None
        self.tau = 0
        self.begin(None)

    def begin(self, length: RunLength | None) -> None:
        """Before the first step; again in the same process where a host starts over with smaller batches. None: not known yet."""
        self.length = length or RunLength(None, None)
        self.alpha = self.block.alpha
        self.alpha_at: Curve = lambda tau: self.block.alpha
        self.token_losses_at: Callable[[int], tuple[TokenLossConfig, ...]] | None = None
        if length is not None:
            self.alpha_at, self.token_losses_at = alpha_of(self.block, length), token_losses_of(self.block, length)
        self.train_sums, self.first_bad = self.class_sums(), FirstBadStep(self.names)
        self.has_trained = False
        """Whether a target token was seen in what was measured."""
        self.step_counts: torch.Tensor | None = None

    def class_sums(self) -> ClassSums:
        """From zero, of what this run measures."""
        data_sets = () if self.labeller is None else self.labeller.data_sets
        return ClassSums(self.names, data_sets, factors=self.block.data_weights is not None)

    def move(self, tau: int) -> None:
        """To α and the token losses of optimizer step τ. Raises `NotFiniteError` for an α that is none."""
        self.tau = tau
        self.alpha = self.alpha_at(tau) if self.loop is None else self.loop.controller.alpha
        if not all(map(isfinite, self.alpha)):
            told = ", ".join(f"{name} {alpha:g}" for name, alpha in zip(self.names, self.alpha, strict=True))
            raise NotFiniteError(f"α is infinite or NaN at step {tau + 1} ({told}), so training stops.")
        if self.token_losses_at is not None:
            before, self.token_losses = self.token_losses, self.token_losses_at(tau)
            # To ask for a formula of another package means to look through all that is installed.
            objectives = zip(before, self.token_losses, self.spec.objective, strict=True)
            kept_or_new = tuple(kept if new is old else objective_of(new) for old, new, kept in objectives)
            self.spec = replace(self.spec, objective=kept_or_new)

    def measured(self, reduce: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, float]:
        """What the tokens trained on since the last call cost, as `ClassSums.take`."""
        taken = self.train_sums.take(reduce, device)
        self.has_trained = self.has_trained or bool(taken)
        return taken

    def moving_numbers(self) -> dict[str, float]:
        """α, the controller's signal and scheduled options of token losses, as metrics."""
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
        return {"run": asdict(self.length), "controller": None if self.loop is None else self.loop.state()}

    def counts(self, batches: Sequence[Any], device: torch.device) -> torch.Tensor:
        """As `count_classes`, of all `batches`. The first label of a row predicts nothing and is not counted."""
        classes, weighs = len(self.names), self.spec.weighs
        counts = torch.zeros(1 + weighs, classes + 2, dtype=widest(device) if weighs else torch.int64, device=device)
        for batch in batches:
            is_shifted = "shift_labels" in batch
            labels = batch[CLASS_IDS] if CLASS_IDS in batch else batch.get("shift_labels" if is_shifted else "labels")
            if labels is None:
                continue
            targets = (labels if is_shifted else labels[..., 1:]).to(device)
            if CLASS_IDS not in batch:
                targets = Membership.all_rest(targets != IGNORE_INDEX, classes, self.spec.overlap).ids_N
            counts += count_classes(targets, classes, self.spec.overlap, weighs)
        return counts

    def pending_loss(
        self, inputs: dict[str, Any], counts: torch.Tensor, denominator: Any, on_tokens: Callable[[ForwardMetrics], object]
    ) -> PendingLoss:
        """What the seam needs for one forward; takes the class ids out of `inputs`."""
        weight_C = class_weights(self.block.reduction, self._alpha_on(counts.device), counts[0], counts[-1])
        class_ids = inputs.pop(CLASS_IDS, None)
        if class_ids is None and self.labeller is not None:
            raise LossNotTakenError(
                "a batch arrived without class ids: its data loader was not made by the trainer's own `get_train_dataloader` or "
                "`get_eval_dataloader`."
            )
        return PendingLoss(self.spec, inputs.get("labels"), class_ids, weight_C, denominator, on_tokens, "shift_labels" in inputs)

    def _alpha_on(self, device: torch.device) -> torch.Tensor:
        """α where the counts are. Written there number by number once it has moved: a copy from the host waits for the device."""
        known = self._on_device
        if known is None or known[0] != self.alpha or known[1].device != device:
            numbers = [torch.full((), alpha, dtype=widest(device), device=device) for alpha in self.alpha]
            known = self._on_device = (self.alpha, torch.stack(numbers))
        return known[1]

    def trained_on(self, tokens: ForwardMetrics) -> None:
        """Add the tokens of a forward of the step τ + 1 that is being made."""
        self.first_bad.add(self.tau + 1, tokens)
        tokens_C, nll_C = self.train_sums.add(tokens)
        if self.loop is not None:
            self.loop.add(tokens_C, nll_C)
