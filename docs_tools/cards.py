"""What the page on cards shows: memory by the formula, beside what was measured."""

from __future__ import annotations

from docs_tools.reference import table
from dwl_plugin.cli.init import CARDS, largest_that_fits
from dwl_plugin.cli.memory import GIB, MEASURED, MODELS, full_bytes, needed_gib, qlora_bytes

__all__ = ["choice_table", "full_table", "measured_table", "qlora_table"]

TOKENS = (2048, 4096, 8192)
RANKS = (2, 4, 8)


def choice_table() -> str:
    """What `dwl init` takes, by card and tokens of a micro-batch."""
    rows = [(f"`{name}`", *(f"`{largest_that_fits(tokens, card)}`" for tokens in TOKENS)) for name, card in CARDS.items()]
    return table(("`--card`", *(f"{tokens:,} tokens" for tokens in TOKENS)), rows)


def qlora_table() -> str:
    """GiB of one card, by model and tokens of a micro-batch."""
    rows = [
        (f"`{name}`", *(f"{needed_gib(qlora_bytes(shape, tokens)):.1f}" for tokens in TOKENS)) for name, shape in MODELS.items()
    ]
    return table(("GiB, estimated", *(f"{tokens:,} tokens" for tokens in TOKENS)), rows)


def full_table() -> str:
    """GiB of each of several cards, 4,096 tokens of a micro-batch on each."""
    rows = [
        (f"`{name}`", *(f"{needed_gib(full_bytes(shape, 4096, ranks)):.1f}" for ranks in RANKS)) for name, shape in MODELS.items()
    ]
    return table(("GiB of each, estimated", *(f"{ranks} cards" for ranks in RANKS)), rows)


def measured_table() -> str:
    """What torch allocates, without what is outside of it."""
    run = MEASURED
    formula = sum(qlora_bytes(run.shape, run.tokens, run.rank, run.optimizer_bytes).values()) / GIB
    return table(("run", "measured, GiB", "by the formula"), [(run.what, f"{run.peak_mib / 1024:.2f}", f"{formula:.2f}")])
