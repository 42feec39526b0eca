"""Which hosts are supported, and what differs between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from dwl_plugin.errors import Problem

__all__ = [
    "AXOLOTL",
    "DEEPSPEED",
    "TRANSFORMERS",
    "TRL",
    "divided_later",
    "gradients_are_averaged",
    "newer_host",
    "older_host",
    "release",
]

Release = tuple[int, int]

AXOLOTL: tuple[Release, Release] = ((0, 19), (0, 21))
"""Oldest and newest Axolotl that the tests run under."""

TRANSFORMERS: tuple[Release, Release] = ((5, 16), (5, 24))
TRL: tuple[Release, Release] = ((1, 9), (1, 16))
"""Oldest and newest of each that the tests of `apply` run under."""

DEEPSPEED: tuple[Release, Release] = ((0, 19), (0, 19))
"""That the tests of shared sequences run under: what it does with gradients there is not the same everywhere."""

_BOUNDS = {"axolotl": AXOLOTL, "transformers": TRANSFORMERS, "trl": TRL, "deepspeed": DEEPSPEED}


def release(package: str) -> Release:
    """The first two numbers of an installed package's version."""
    first = re.findall(r"\d+", version(package))[:2]
    return int(first[0]), int(first[1])


def older_host(package: str) -> Iterator[Problem]:
    """A problem if this package is older than what is supported."""
    oldest, supported = _supported(package)
    if release(package) < _BOUNDS[package][0]:
        why = f"{_installed(package)} is older than dwl_plugin supports, {supported}"
        path, otherwise = ("loss", ", or delete the `loss:` line") if package == "axolotl" else ("trainer", "")
        yield Problem(path, why, hint=f"`pip install '{package}>={oldest}'`{otherwise}")


def newer_host(package: str) -> Iterator[str]:
    """A sentence if this package is newer than what the tests run under."""
    if release(package) > _BOUNDS[package][1]:
        tested = f"what this dwl_plugin was tested with, {_supported(package)[1]}"
        yield f"{_installed(package)} is newer than {tested}: look for a newer dwl_plugin"


def _supported(package: str) -> tuple[str, str]:
    """The oldest release, and the whole range."""
    oldest, newest = ("{}.{}".format(*of) for of in _BOUNDS[package])
    return oldest, f"{oldest} to {newest}"


def _installed(package: str) -> str:
    return f"{'Axolotl' if package == 'axolotl' else package} {version(package)}"


def divided_later(trainer: Any, num_items_in_batch: Any) -> int:
    """The micro-batches of the step, if the trainer divides a loss by them after `compute_loss`, else 1.

    It does where it takes the loss for one that is not divided yet, as Axolotl 0.19 does with most models, and is too old to know
    `loss_is_scaled_for_ga`.
    """
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    if counted or trainer.compute_loss_func is not None or hasattr(trainer._dwl_host, "loss_is_scaled_for_ga"):
        return 1
    return int(trainer.current_gradient_accumulation_steps)


def gradients_are_averaged(engine: Any) -> bool:
    """Whether a DeepSpeed engine averages the gradients of the ranks that share a sequence: ZeRO-3 does as it scatters them, while
    the other stages add them up (https://github.com/deepspeedai/DeepSpeed/issues/5248)."""
    return bool(engine.zero_optimization_stage() == 3 and engine.zero_reduce_scatter())
