"""4-bit weights on a CPU, where an evaluation must not cut the gradient of later steps.

On a CPU with instructions for bf16, bitsandbytes repacks a layer's weights at its first forward in evaluation mode, for a product
that is rounded to bf16 and passes no gradient on. Axolotl evaluates before the first step: a QLoRA run would go on, and all but its
last adapters would learn nothing.
"""

from __future__ import annotations

from typing import Any

__all__ = ["keep_the_training_format"]


def keep_the_training_format(cfg: Any) -> str | None:
    """On a CPU, make bitsandbytes leave 4-bit layers as they are from now on. Returns a line to print, if that changes anything."""
    if not cfg.get("load_in_4bit"):
        return None
    import torch

    if torch.cuda.is_available():
        return None
    from bitsandbytes.nn import modules

    asks = getattr(modules, "has_avx512bf16", None)  # each layer does, when it is made
    if asks is None or not asks():
        return None
    modules.has_avx512bf16 = lambda: False
    return (
        "4-bit weights stay as they are in evaluations: "
        "the format that bitsandbytes would repack them to on this CPU passes no gradient on"
    )
