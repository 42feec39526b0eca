"""What the classes cost the base model: the reference that a controller may compare with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from transformers import Trainer

from dwl_plugin.errors import ConfigError
from dwl_plugin.run.dataset_check import picked_rows

__all__ = ["base_nll"]

_PREFIX = "reference"


def base_nll(trainer: Trainer, rows: int, names: tuple[str, ...]) -> dict[str, float]:
    """class -> nll of the model without its adapter, over a seeded sample of the training set; a class without a token is absent.

    To be called before the first step: a model that is trained as a whole is its own base only until then. The random numbers of
    the training are left as they are.
    """
    dataset = trainer.train_dataset
    if not hasattr(dataset, "select"):
        why = "the training set is a stream, so no rows of it can be measured on"
        raise ConfigError.at("dwl.controller.reference", why, "base", hint="write the numbers: class -> nll")
    picked = picked_rows(len(dataset), trainer.args.seed, rows)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext(), torch.random.fork_rng():
        # With persistent workers the host would keep this loader for its own.
        kept = trainer.__dict__.pop("_eval_dataloaders", None)
        try:
            loader = trainer.get_eval_dataloader(dataset.select(picked))
        finally:
            trainer.__dict__.pop("_eval_dataloaders", None)
            if kept is not None:
                trainer._eval_dataloaders = kept
        output = trainer.evaluation_loop(loader, _PREFIX, prediction_loss_only=True, metric_key_prefix=_PREFIX)
    trainer.callback_handler.on_predict(trainer.args, trainer.state, trainer.control, {})  # closes the progress bar
    measured = {name: f"{_PREFIX}_dwl/nll/{name}" for name in names}
    return {name: output.metrics[key] for name, key in measured.items() if key in output.metrics}
