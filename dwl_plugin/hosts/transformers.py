"""`apply`: the loss in any `transformers.Trainer`, TRL's `SFTTrainer` among them.

In order: what the trainer has that cannot stand beside the loss, the classes and a look at the data, what of TRL's is taken over,
`install`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from os import PathLike
from typing import Any

import torch
from transformers import Trainer

from dwl_plugin.classes import ClassSurvey, Labeller
from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.config import Block, read_block
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.hosts import trl
from dwl_plugin.hosts.trainer import (
    BelowHost,
    TrainerMixin,
    install,
    less_is_better,
    ranks_per_sequence,
    replaced_methods,
    uninstall,
)
from dwl_plugin.hosts.trainer_data import Reader
from dwl_plugin.hosts.versions import newer_host, older_host
from dwl_plugin.run.collate import collated_codes
from dwl_plugin.run.dataset_check import (
    check_dataset,
    ids_outside,
    labeller_of,
    picked_rows,
    require_rows,
    require_targets,
    with_targets,
)
from dwl_plugin.run.session import Session
from dwl_plugin.run.startup import log_line

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

    Where the config reads weights or marks of the data, they are read from the columns of the trainer's data sets: a row's own, one
    for each token, and those of `messages`, or `prompt` and `completion`, which are placed by the chat template.

    Returns:
        A handle; its `detach()` takes everything back.

    Raises:
        ConfigError: every problem of the config and every setting of the trainer that makes a loss of its own, all at once;
            then training data without a token to train on; then every class that the tokenizer or the data does not have.
        LossNotTakenError: the model has no output head.
    """
    if not isinstance(trainer, Trainer):
        why = f"{type(trainer).__name__} is no transformers.Trainer"
        raise ConfigError.at("trainer", why, hint="in a loop of your own, use `dwl_plugin.attach(model, ...)`")
    problems = list(_problems(trainer))
    try:
        block = read_block(config)
    except ConfigError as error:
        raise ConfigError([*error.problems, *problems]) from None
    is_sft = trl.is_sft_trainer(type(trainer))
    if block.reads_data and is_sft:
        problems += trl.data_problems(trainer.args)
    ConfigError.raise_any(problems)
    require_rows(trainer.train_dataset, "train_dataset")
    labeller = _labeller_of(trainer, block)
    read = Reader.of(trainer, block, _tokenizer_of(trainer)) if block.reads_data else None
    train_dataset, eval_dataset = trainer.train_dataset, trainer.eval_dataset
    if read is not None:
        train_dataset = read(train_dataset, "train_dataset", streams=False)
        eval_dataset = read(eval_dataset, "eval_dataset", streams=False)
    rows = [] if labeller is None and _has_own(trainer, "get_train_dataloader") else _looked_at(trainer, train_dataset)
    embedding = trainer.model.get_input_embeddings()
    if type(embedding) is torch.nn.Embedding:  # one that derives from it may know more ids than it has rows
        ConfigError.raise_any(ids_outside(rows, embedding.num_embeddings, "train_dataset"))
    survey = check_dataset(block, labeller, rows, "train_dataset")
    held_out = None if _has_own(trainer, "get_eval_dataloader", "evaluate") else eval_dataset
    for dataset in held_out.values() if isinstance(held_out, dict) else [held_out]:
        require_targets(_looked_at(trainer, dataset), "eval_dataset")
    below = None if type(trainer) is Trainer else trl.in_place_of_sft_trainer(type(trainer)) if is_sft else BelowHost
    for line in (line for package in ("transformers", *(("trl",) if is_sft else ())) for line in newer_host(package)):
        log_line(line)
    with ExitStack() as undo:
        taken_over = trl.take_over(trainer, undo) if is_sft else []
        session, callback = install(trainer, block, labeller, survey, taken_over, below)
        undo.callback(uninstall, trainer)
        session.read = read
        for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
            undo.callback(setattr, trainer, name, getattr(trainer, name))
            setattr(trainer, name, dataset)
        trainer.add_callback(callback)
        undo.callback(trainer.remove_callback, callback)
        args = trainer.args
        if less_is_better(args.metric_for_best_model) and args.greater_is_better:  # completed before `eval_nll` was known
            args.greater_is_better = False
            metric = f"`metric_for_best_model: {args.metric_for_best_model}`"
            log_line(f"{metric} is best where it is lowest: greater_is_better is now False")
        return AppliedLoss(session, undo.pop_all())


def _problems(trainer: Trainer) -> Iterator[Problem]:
    """One problem for each thing that computes, or changes, the loss in place of the configured one."""
    args = trainer.args
    if isinstance(trainer, TrainerMixin):
        hint = "call `detach()` on what the first `apply` returned; under Axolotl the plugin applies the config's `loss:` by itself"
        yield Problem("trainer", f"already trains with `loss: {trainer._dwl.block.loss}`", hint=hint)
        return
    yield from older_host("transformers")
    yield from trl.trl_problems(trainer)
    for name in replaced_methods(trainer):
        why = "was replaced on this one trainer, so ours would never be called"
        yield Problem(f"trainer.{name}", why, hint="replace it after `apply`, or in a subclass")
    own = trainer.compute_loss_func
    if own is not None and getattr(args, "loss_type", None) != "dft":
        yield Problem("compute_loss_func", "computes the loss", getattr(own, "__name__", own), hint="leave it out")
    if trainer.label_smoother is not None:
        why = "smooths the targets of the loss that is replaced"
        yield Problem("args.label_smoothing_factor", why, args.label_smoothing_factor, hint="set it to 0")
    if args.use_liger_kernel:
        yield from _liger_problems(args.liger_kernel_config or {})
    if args.n_gpu > 1:
        hint = "start one process for each GPU: `torchrun` or `accelerate launch`"
        yield Problem("args", f"one process with {args.n_gpu} GPUs runs copies of the model, and the loss is in none", hint=hint)
    if ranks_per_sequence(trainer.accelerator) > 1:
        hint = "train with Axolotl and `context_parallel_size`, or without `sp_size`"
        yield Problem("args.parallelism_config", "the ranks that share a sequence get losses of their own to weigh", hint=hint)
    if trainer.model_init is not None:
        hint = "build the model, and pass it as `model`"
        yield Problem("model_init", "makes another model when training starts, without this loss", hint=hint)


def _liger_problems(options: Mapping[str, Any]) -> Iterator[Problem]:
    """A problem unless Liger's losses are off; the fused one is on by default."""
    if options.get("fused_linear_cross_entropy", True) or options.get("cross_entropy", False):
        off = {**options, "fused_linear_cross_entropy": False, "cross_entropy": False}
        hint = f"`liger_kernel_config={off}` keeps Liger's other kernels"
        yield Problem("args.use_liger_kernel", "Liger computes the loss that is replaced", True, hint=hint)


def _labeller_of(trainer: Trainer, block: Block) -> Labeller | None:
    if not block.labels_tokens:
        return None
    tokenizer = _tokenizer_of(trainer)
    if tokenizer is None:
        why = "need the tokenizer, and this trainer has none"
        raise ConfigError.at("dwl.classes", why, hint="build the trainer with `processing_class=tokenizer`")
    labeller = labeller_of(block, tokenizer)
    assert labeller is not None
    ConfigError.raise_any(trl.cut_problems(trainer.args, labeller))
    return labeller


def _tokenizer_of(trainer: Trainer) -> Any:
    processing = trainer.processing_class
    return getattr(processing, "tokenizer", processing)  # a processor has its tokenizer inside


def _has_own(trainer: Trainer, *methods: str) -> bool:
    """Whether a subclass of somebody's brings one of these methods; then it need not use the trainer's collator."""
    return any(not getattr(type(trainer), name).__module__.startswith(("transformers.", "trl.")) for name in methods)


def _looked_at(trainer: Trainer, dataset: Any) -> list[dict[str, Any]]:
    """Some rows of a dataset, some of them with a target if any is; a stream gives none."""
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        return []
    with torch.random.fork_rng(devices=[]):  # the run draws what it would have drawn
        picked = list(_collated(trainer, dataset, picked_rows(len(dataset), trainer.args.seed)))
        return with_targets(picked, _collated(trainer, dataset, range(len(dataset))))


def _collated(trainer: Trainer, dataset: Any, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Rows as the trainer's collator makes each."""
    collate = trainer._get_collator_with_removed_columns(trainer.data_collator)
    for number in numbers:
        row = dataset[number]
        known = {key: value for key, value in row.items() if key != DATA_CODES} if isinstance(row, Mapping) else {}
        batch = collate([known]) if known else {}  # only a mapping is known to have labels
        if "labels" in batch:
            seen = {key: batch[key][0] for key in ("input_ids", "labels", "position_ids") if key in batch}
            yield {**seen, DATA_CODES: collated_codes(collate, [row])[0]} if DATA_CODES in row else seen
