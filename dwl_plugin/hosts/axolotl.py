"""The Axolotl plugin: which of our parts runs at which of Axolotl's hooks."""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from dwl_plugin.classes.labeller import ClassSurvey, Labeller, build_labeller, empty_class_problems, survey
from dwl_plugin.config import Block
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.hosts.axolotl_args import block_of, fused_losses_asked_for
from dwl_plugin.hosts.trainer import Session, join, leave

__all__ = ["DWLPlugin"]

SURVEY_ROWS = 512
"""Rows of the training set that are labelled before the model is loaded, to see that every class exists."""


class DWLPlugin(BasePlugin):
    """`loss: nll | dft | dwl` in an Axolotl config. Without that key every hook returns at once."""

    def __init__(self) -> None:
        super().__init__()
        self._labeller: Labeller | None = None
        self._survey: ClassSurvey | None = None
        self._joined: tuple[Session, Any] | None = None
        self._taken_over: list[str] = []

    def get_input_args(self) -> str:
        return "dwl_plugin.hosts.axolotl_args.DWLPluginArgs"

    def register(self, cfg: Any) -> None:
        from axolotl.utils.schemas.config import AxolotlInputConfig

        self._forget()
        self._taken_over = fused_losses_asked_for(cfg)
        if cfg.get("loss") is not None and "loss" in AxolotlInputConfig.model_fields:
            raise ConfigError([
                Problem("loss", "this version of Axolotl has a `loss` key of its own; install a dwl_plugin that knows it")
            ])  # fmt: skip

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """Less nll is better. The host would take every metric that does not end in `loss` for one to maximise."""
        metric = (cfg.get("metric_for_best_model") or "").removeprefix("eval_")
        ours = cfg.get("loss") is not None and (metric == "nll" or metric.startswith("dwl/nll/"))
        return {"greater_is_better": False} if ours and cfg.get("greater_is_better") is None else {}

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> Any:
        """The host's own datasets, looked at before a model is loaded."""
        block = block_of(cfg)
        if block is None or preprocess or not block.class_configs or _loaded_elsewhere(self):
            return None
        from axolotl.cli.args import TrainerCliArgs
        from axolotl.common.datasets import load_datasets
        from axolotl.loaders import load_tokenizer
        from transformers.hf_argparser import HfArgumentParser

        self._labeller = build_labeller(block.class_configs, load_tokenizer(cfg))
        cli_args, _ = HfArgumentParser(TrainerCliArgs).parse_args_into_dataclasses(return_remaining_strings=True)
        meta = load_datasets(cfg=cfg, cli_args=cli_args)
        self._look_at(meta.train_dataset, block, seed=cfg.seed)
        return meta

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        block = block_of(cfg)
        if block is None:
            return []
        if self._labeller is None and block.class_configs:
            self._labeller = build_labeller(block.class_configs, trainer.processing_class)
            self._look_at(trainer.train_dataset, block, seed=cfg.seed)
        session, hook = join(trainer, block, self._labeller, self._survey, self._taken_over)
        self._joined = (session, trainer)
        return [hook]

    def post_train_unload(self, cfg: Any) -> None:
        self._forget()

    def _look_at(self, dataset: Any, block: Block, seed: int | None) -> None:
        """Label a seeded sample of the rows; a class that is nowhere in it is an error."""
        assert self._labeller is not None
        rows = _sample(dataset, SURVEY_ROWS, seed or 0)
        if not rows:
            return
        self._survey = survey(self._labeller, rows)
        problems = empty_class_problems(self._survey, block.class_configs)
        if problems:
            raise ConfigError(problems)

    def _forget(self) -> None:
        if self._joined is not None:
            leave(*self._joined)
        self._labeller = self._survey = self._joined = None


def _sample(dataset: Any, rows: int, seed: int) -> list[dict[str, Any]]:
    """Up to `rows` rows with `input_ids` and `labels`; a stream, or rows that get labels later, give none."""
    if not hasattr(dataset, "select") or not {"input_ids", "labels"} <= set(dataset.column_names or ()):
        return []
    import numpy as np

    count = len(dataset)
    picked = np.random.default_rng(seed).permutation(count)[:rows]
    return list(dataset.select_columns(["input_ids", "labels"]).select(sorted(picked.tolist())))


def _loaded_elsewhere(plugin: BasePlugin) -> bool:
    """Another plugin brings the datasets; then they are looked at when the trainer is there."""
    from axolotl.integrations.base import PluginManager

    others = (other for other in PluginManager.get_instance().plugins.values() if other is not plugin)
    return any(type(other).load_datasets is not BasePlugin.load_datasets for other in others)
