"""Which hosts are supported, and what differs between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from dwl_plugin.errors import Problem

__all__ = ["AXOLOTL", "TRANSFORMERS", "axolotl_problems", "divided_later", "newer_axolotl", "transformers_problems"]

Release = tuple[int, int]

AXOLOTL: tuple[Release, Release] = ((0, 19), (0, 21))
"""Oldest and newest Axolotl that the tests run under."""

TRANSFORMERS: Release = (5, 16)
"""Oldest transformers that the tests run under."""


def release(package: str) -> Release:
    """The first two numbers of an installed package's version."""
    first = re.findall(r"\d+", version(package))[:2]
    return int(first[0]), int(first[1])


def _name(of: Release) -> str:
    return f"{of[0]}.{of[1]}"


def axolotl_problems() -> Iterator[Problem]:
    """A problem if this Axolotl is older than what is supported."""
    oldest, newest = AXOLOTL
    if release("axolotl") < oldest:
        yield Problem(
            "loss",
            f"Axolotl {version('axolotl')} is older than dwl_plugin supports, {_name(oldest)} to {_name(newest)}",
            hint=f"`pip install 'axolotl>={_name(oldest)}'`, or delete the `loss:` line",
        )


def newer_axolotl() -> str | None:
    """A sentence if this Axolotl is newer than what the tests run under."""
    oldest, newest = AXOLOTL
    if release("axolotl") <= newest:
        return None
    return (
        f"Axolotl {version('axolotl')} is newer than what this dwl_plugin was tested with, {_name(oldest)} to {_name(newest)}: "
        "look for a newer dwl_plugin"
    )


def transformers_problems() -> Iterator[Problem]:
    """A problem if this transformers is older than what is supported."""
    if release("transformers") < TRANSFORMERS:
        yield Problem(
            "trainer",
            f"transformers {version('transformers')} is older than dwl_plugin supports, {_name(TRANSFORMERS)}",
            hint=f"`pip install 'transformers>={_name(TRANSFORMERS)}'`",
        )


def divided_later(trainer: Any, num_items_in_batch: Any) -> int:
    """The micro-batches of the step, if the trainer divides a loss by them after `compute_loss`, else 1.

    It does where it takes the loss for one that is not divided yet, as Axolotl 0.19 does with most models, and is too old to know
    `loss_is_scaled_for_ga`.
    """
    counted = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
    if counted or trainer.compute_loss_func is not None or hasattr(trainer._dwl_host, "loss_is_scaled_for_ga"):
        return 1
    return int(trainer.current_gradient_accumulation_steps)
