"""Where a token is held to the base model, there has to be one."""

from __future__ import annotations

from collections.abc import Iterator

from dwl_plugin.config import Block
from dwl_plugin.errors import Problem

__all__ = ["anchor_problems", "without_base_model"]


def without_base_model(block: Block) -> Iterator[Problem]:
    """One problem per anchor, for a run that has no adapter to switch off."""
    why = "is held to the base model, which is the model with its adapter switched off, and this run trains without one"
    return anchor_problems(block, why, "write `adapter: lora` or `qlora`, or delete `anchor`")


def anchor_problems(block: Block, why: str, hint: str) -> Iterator[Problem]:
    """One problem per anchor."""
    options = {f"dwl.classes.{name}.dft": spec.dft for name, spec in block.class_configs.items()}
    for path, dft in {"dft": block.dft, **options}.items():
        if dft is not None and dft.anchor > 0:
            yield Problem(f"{path}.anchor", why, dft.anchor, hint=hint)
