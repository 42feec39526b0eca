"""The Axolotl plugin: what runs at which of Axolotl's hooks."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from traceback import extract_tb
from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import modelcard

from dwl_plugin.classes import ClassSurvey, Labeller
from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.config import Block
from dwl_plugin.config.overrides import overridden, overrides_of, plain
from dwl_plugin.config.packs import packs_used
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.files import sha256_of
from dwl_plugin.hosts.as_it_ran import config_as_it_ran, config_to_keep, without_password
from dwl_plugin.hosts.axolotl_args import block_of, fused_losses_asked_for
from dwl_plugin.hosts.axolotl_data import data_set_names, prepare_as_ever, read_what_is_prepared, reading_data
from dwl_plugin.hosts.axolotl_fields import DroppedWeight, NumberedRow, dropped_weights, watching
from dwl_plugin.hosts.axolotl_preview import dropped_all, is_stream, packs_of, require_rows_that_tokenise, vocabulary_problems
from dwl_plugin.hosts.checkpoints import choose_checkpoint
from dwl_plugin.hosts.dropped_options import dropped_options
from dwl_plugin.hosts.four_bits import keep_the_training_format
from dwl_plugin.hosts.incompatible import shares_sequences
from dwl_plugin.hosts.needed_files import files_read
from dwl_plugin.hosts.trainer import install, less_is_better, uninstall
from dwl_plugin.hosts.versions import newer_host, older_host
from dwl_plugin.run.dataset_check import (
    check_dataset,
    labeller_of,
    no_rows,
    no_targets,
    picked_rows,
    require_rows,
    require_targets,
    with_targets,
)
from dwl_plugin.run.moving import require_places
from dwl_plugin.run.record import Source
from dwl_plugin.run.startup import log_line

__all__ = ["DWLPlugin"]

_HASHED_BYTES = 1 << 29
"""Of a file that a run writes the sha256 of: half a second."""
_ALL_HASHED_BYTES = 1 << 31
"""Of all of them: the other ranks wait."""


class DWLPlugin(BasePlugin):
    """`loss: nll | dft | dwl` in an Axolotl config. Without that key every hook returns at once."""

    def __init__(self) -> None:
        super().__init__()
        self._labeller: Labeller | None = None
        self._survey: ClassSurvey | None = None
        self._trainer: Any = None
        self._taken_over: list[str] = []
        self._unwritten: tuple[str, ...] = ()
        self._declines_weights = False
        self._ran: dict[str, Any] = {}
        self._packs: dict[str, str] = {}
        self._card: str | None = None

    def get_input_args(self) -> str:
        return "dwl_plugin.hosts.axolotl_args.DWLPluginArgs"

    def register(self, cfg: Any) -> None:
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.utils.schemas.config import AxolotlInputConfig

        self._forget()
        overrides, is_first_rank = overrides_of(os.environ), _is_first_rank()
        for key, value in overridden(cfg, overrides).items() if overrides else ():
            cfg[key] = value
        if overrides and is_first_rank:
            log_line("\n".join(map(str, overrides)))
        ConfigError.raise_any(dropped_options(sys.argv[1:], cfg))
        self._taken_over = fused_losses_asked_for(cfg)
        unsaid = {"axolotl_config_path": cfg.get("axolotl_config_path"), **vars(TrainerCliArgs())}  # its command adds them all
        self._ran = {key: value for key, value in copy.deepcopy(plain(cfg)).items() if key not in unsaid or value != unsaid[key]}
        if is_first_rank:
            path = cfg.get("axolotl_config_path")
            with suppress(ConfigError):  # told when the whole block is parsed
                self._packs = packs_used(self._ran.get("dwl"), [*([Path(path).parent] if path else ()), Path()])
        written = cfg.get("dwl")
        self._unwritten = () if isinstance(written, Mapping) and "reduction" in written else ("reduction",)
        self._declines_weights = isinstance(written, Mapping) and written.get("data_weights") is False
        if cfg.get("loss") is None:
            return
        ConfigError.raise_any(older_host("axolotl"))
        for line in newer_host("axolotl") if is_first_rank else ():
            log_line(line)
        if "loss" in AxolotlInputConfig.model_fields:
            raise ConfigError.at("loss", "this version of Axolotl has a `loss` key of its own; install a dwl_plugin that knows it")
        read_what_is_prepared()

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Less nll is better. The host would take every metric that does not end in `loss` for one to maximise."""
        minimised = cfg.get("loss") is not None and less_is_better(cfg.get("metric_for_best_model"))
        return {"greater_is_better": False} if minimised and cfg.get("greater_is_better") is None else {}

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """Load the host's own datasets, and check them and the checkpoint to go on from before a model is loaded."""
        block = block_of(cfg)
        if block is not None and not preprocess and (line := choose_checkpoint(cfg)):
            log_line(line)
        if block is None or preprocess or _loaded_elsewhere(self):
            return None
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.common.datasets import load_datasets
        from axolotl.loaders import load_tokenizer
        from transformers.hf_argparser import HfArgumentParser

        tokenizer = load_tokenizer(cfg)
        self._labeller = labeller_of(block, tokenizer, data_set_names(cfg, block))
        dropped: list[DroppedWeight] = []

        def see(rows: Sequence[NumberedRow], source: Any) -> None:
            dropped.extend(dropped_weights(rows, source, block.data_weights, bool(cfg.train_on_inputs)))

        cli_args, _ = HfArgumentParser(TrainerCliArgs).parse_args_into_dataclasses(return_remaining_strings=True)
        try:
            # what makes tokens of a stream's rows goes to workers
            with nullcontext() if is_stream(cfg) else watching(see):
                meta = load_datasets(cfg=cfg, cli_args=cli_args)
        except StopIteration:  # of a reader of the `datasets` library
            why = "a file of the training or evaluation data is empty"
            raise ConfigError([no_rows(why=why, value=_paths(cfg))]) from None
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            if _is_for_want_of_rows(error):
                require_rows(())
            if dropped_all(error):
                raise ConfigError([no_targets(None)]) from None
            if "test_size=" in str(error):
                why = "`val_set_size` takes all of the data"
                raise ConfigError([no_rows(why=why, value=cfg.val_set_size)]) from None
            with reading_data(cfg, block):
                require_rows_that_tokenise(cfg, tokenizer)
            raise
        for weight in dropped if _is_first_rank() and not self._declines_weights else ():
            log_line(weight.sentence(block.data_weights, has_loss=True))
        require_rows(meta.train_dataset)
        if block.moves:
            require_places(block, *_planned_length(cfg, meta))
        self._look_at_rows(cfg, block, tokenizer, meta.train_dataset, meta.eval_dataset)
        return meta

    def pre_model_load(self, cfg: Any) -> None:
        if cfg.get("loss") is None:
            return
        self._card = modelcard.AUTOGENERATED_TRAINER_COMMENT
        if cfg.get("axolotl_config_path") and _is_first_rank():  # which is the one that publishes
            cfg["axolotl_config_path"] = str(config_as_it_ran(Path(cfg["axolotl_config_path"]), self._ran))
        if line := keep_the_training_format(cfg):
            log_line(line)
        for line in newer_host("deepspeed") if shares_sequences(cfg) else ():
            log_line(line)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        block = block_of(cfg, self._unwritten)
        if block is None:
            return []
        if self._survey is None:  # they were loaded elsewhere
            require_rows(trainer.train_dataset)
            ConfigError.raise_any(_without_codes(block, trainer))
            tokenizer = trainer.processing_class
            if self._labeller is None:
                self._labeller = labeller_of(block, tokenizer, data_set_names(cfg, block))
            self._look_at_rows(cfg, block, tokenizer, trainer.train_dataset, trainer.eval_dataset)
        session, callback = install(trainer, block, self._labeller, self._survey, self._taken_over)
        session.source = self._source(cfg)
        self._trainer = trainer
        return [callback]

    def post_train_unload(self, cfg: Any) -> None:
        self._forget()

    def _source(self, cfg: Any) -> Source:
        if not _is_first_rank():
            return Source(_paths(cfg))
        return Source(_paths(cfg), self._packs, dict(_hashed(files_read(self._ran))), config_to_keep(self._ran))

    def _look_at_rows(self, cfg: Any, block: Block, tokenizer: Any, training: Any, evaluation: Any) -> None:
        """Label a seeded sample of the rows. Raises `ConfigError` for a class that is nowhere in it, for a sample without a target,
        and for tokens that the model does not have."""
        samples, held_out = (_sample(dataset, cfg.seed or 0) for dataset in (training, evaluation))
        if samples or held_out:
            ConfigError.raise_any(vocabulary_problems(cfg, tokenizer, [*samples, *held_out]))
        if samples and cfg.sample_packing:
            packs_of(samples, cfg)
        self._survey = check_dataset(block, self._labeller, samples)
        require_targets(held_out, "val_set_size" if cfg.val_set_size else "test_datasets")

    def _forget(self) -> None:
        if self._trainer is not None:
            uninstall(self._trainer)
        if self._card is not None:  # the host adds each run's config to it, for all runs of the process
            modelcard.AUTOGENERATED_TRAINER_COMMENT = self._card
            self._card = None
        self._labeller = self._survey = self._trainer = None
        self._packs = {}
        prepare_as_ever()


def _without_codes(block: Block, trainer: Any) -> Iterator[Problem]:
    for name in ("train_dataset", "eval_dataset") if block.reads_data else ():
        columns = getattr(getattr(trainer, name), "column_names", None)
        if columns and DATA_CODES not in columns:
            why = "another plugin makes the rows, without the weights and marks that `dwl` reads of them"
            yield Problem("plugins", why, hint="delete what `dwl` reads of the data, or the line of that plugin")


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _sample(dataset: Any, seed: int) -> list[dict[str, Any]]:
    """Rows with `input_ids` and `labels`, some of them with a target if any is; a stream, or rows labelled later, give none."""
    if not hasattr(dataset, "select") or not {"input_ids", "labels"} <= set(dataset.column_names or ()):
        return []
    rows = dataset.select_columns([name for name in ("input_ids", "labels", DATA_CODES) if name in dataset.column_names])
    return with_targets(list(rows.select(picked_rows(len(rows), seed))), rows)


def _hashed(names: Iterable[str]) -> Iterator[tuple[str, str | None]]:
    left = _ALL_HASHED_BYTES
    for name in names:
        digest = sha256_of(Path(name), min(_HASHED_BYTES, left))
        left -= 0 if digest is None else os.path.getsize(name)
        yield name, digest


def _paths(cfg: Any) -> list[str]:
    keys = ("datasets", "pretraining_dataset", "test_datasets")
    return [without_password(str(dataset.get("path"))) for key in keys for dataset in cfg.get(key) or () if hasattr(dataset, "get")]


def _is_for_want_of_rows(error: Exception) -> bool:
    """The sampler of a packed set says so; the reader of rows that were prepared earlier only fails."""
    where = extract_tb(error.__traceback__)[-1].filename
    return "num_samples=0" in str(error) or (isinstance(error, IndexError) and where.endswith("datasets/table.py"))


def _planned_length(cfg: Any, meta: Any) -> tuple[int | None, float | None]:
    """Steps of the run to come, and about how many of them are an epoch; None for what a stream does not tell."""
    from axolotl.utils.trainer import calculate_total_num_steps

    total = cfg.max_steps or meta.total_num_steps
    if not hasattr(meta.train_dataset, "select"):
        return (total if total and total > 0 else None), None
    uncut = calculate_total_num_steps(cfg, meta.train_dataset, update=False) if cfg.max_steps else total
    return total, uncut / cfg.num_epochs


def _loaded_elsewhere(plugin: BasePlugin) -> bool:
    """Whether another plugin loads the datasets; then they are checked when the trainer is built."""
    from axolotl.integrations.base import PluginManager

    others = (other for other in PluginManager.get_instance().plugins.values() if other is not plugin)
    return any(type(other).load_datasets is not BasePlugin.load_datasets for other in others)
