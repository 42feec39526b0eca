"""What can be known of an output head: as numbers, and as a module of a model.

Shapes: R rows, W tokens of a tile of the vocabulary, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dwl_plugin.errors import LossNotTakenError

__all__ = [
    "LinearHead",
    "as_linear",
    "base_model",
    "gathered_by_hooks",
    "logits_of",
    "output_head",
    "uses_head",
    "vocab_size_of",
    "whole",
    "without_adapter",
]


@dataclass(frozen=True)
class LinearHead:
    """logits = softcap · tanh(scale · (hidden Wᵀ + bias) / softcap); without a softcap, scale · (hidden Wᵀ + bias).

    `multiplied` is the dtype F.linear would multiply in, autocast included.
    """

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    softcap: float | None
    multiplied: torch.dtype

    @property
    def summed(self) -> torch.dtype:
        """The dtype of logits, sums and gradients while they accumulate."""
        return torch.float64 if self.multiplied == torch.float64 else torch.float32

    @property
    def unit(self) -> float:
        """What logits are counted in on the way: a softcap, so that tanh is all there is to it."""
        return self.softcap or 1.0


def logits_of(product_RW: torch.Tensor, bias_W: torch.Tensor | None, scale: float, softcap: float | None) -> torch.Tensor:
    """From hidden Wᵀ, in units of a softcap; `scale` is divided by it already."""
    logits_RW = (product_RW if bias_W is None else product_RW + bias_W) * scale
    return logits_RW if softcap is None else torch.tanh(logits_RW)


def base_model(model: Any) -> nn.Module:
    """The transformers model inside an adapter wrapper."""
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


def output_head(model: Any) -> nn.Module:
    """The outermost output head of `model`."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        raise LossNotTakenError(f"{type(model).__name__} has no output head to take the loss from; it is no language model.")
    return head


def uses_head(module: Any, head: nn.Module) -> bool:
    """Whether `module` computes a loss from the logits of `head`."""
    has_both = hasattr(module, "get_output_embeddings") and hasattr(type(module), "loss_function")
    return has_both and module.get_output_embeddings() is head


def without_adapter(head: nn.Module) -> nn.Module:
    """The head as it was before an adapter or a trained copy was put around it."""
    inner = getattr(head, "original_module", None) or getattr(head, "base_layer", None)
    return without_adapter(inner) if isinstance(inner, nn.Module) else head


def vocab_size_of(head: nn.Module) -> int:
    """V, also of a head in an adapter or in pieces."""
    for module in (head, getattr(head, "base_layer", None), getattr(head, "original_module", None)):
        if isinstance(size := getattr(module, "out_features", None), int):
            return size
    weight = getattr(head, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.ndim == 2:
        return weight.shape[0]
    raise LossNotTakenError(f"the vocabulary size of the output head {type(head).__name__} cannot be read.")


def as_linear(head: nn.Module) -> nn.Linear | None:
    """What multiplies, if hidden @ weight.T + bias is all that the forward of `head` does.

    Forward hooks are no obstacle: they have been run around the deferred logits.
    """
    copies = getattr(head, "modules_to_save", None)  # PEFT's trained copies of a module
    if isinstance(copies, nn.ModuleDict):
        active: list[str] = head.active_adapters  # type: ignore[assignment]
        if head.disable_adapters or not active or active[0] not in copies:
            return None
        head = copies[active[0]]
        if "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks:
            return None
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:  # FSDP2 makes a subclass of it
        return None
    return head if head.weight.is_floating_point() else None


def gathered_by_hooks(head: nn.Module) -> bool:
    """Whether the weight is in pieces outside the head's forward: a module of its own to FSDP2 or ZeRO-3."""
    is_fsdp = hasattr(head, "unshard")
    return any((is_fsdp and hasattr(p, "full_tensor")) or hasattr(p, "ds_id") for p in head.parameters())


def whole(parameter: torch.Tensor) -> torch.Tensor:
    """A tensor-parallel parameter gathered, differentiably."""
    gathered: torch.Tensor = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return gathered
