"""The loss without a trainer: a seam that arms itself around every forward of its model that is given labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from dwl_plugin.loss.seam import Seam
from dwl_plugin.loss.spec import LossSpec, PendingLoss

__all__ = ["Attachment", "attach"]


class Attachment:
    """What `attach` returns. `detach` gives the model back as it was."""

    def __init__(self, model: nn.Module, spec: LossSpec, say: Callable[[str], None]) -> None:
        self._spec = spec
        self.seam = Seam(model, say)
        self._hooks = [module.register_forward_pre_hook(self._before, with_kwargs=True) for module in self.seam.called]
        self._hooks += [module.register_forward_hook(self._after, always_call=True) for module in self.seam.called]

    def detach(self) -> None:
        """Give the model back as it was."""
        for hook in self._hooks:
            hook.remove()
        self.seam.detach()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments if args else kwargs
        if given.get("labels") is not None:
            self.seam.arm(PendingLoss(self._spec, given["labels"], denominator=given.get("num_items_in_batch")))

    def _after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.seam.disarm(completed=output is not None)


def attach(model: nn.Module, loss: str | LossSpec = "nll", say: Callable[[str], None] = print) -> Attachment:
    """Make a transformers model compute its training loss from deferred logits, without a trainer.

        loss = model(input_ids=ids, labels=ids).loss        # Σ_t w·sg(max(p^a, m))·nll / number of targets

    A forward without labels, and generation, are left alone.

    Args:
        model: a transformers model with an output head, inside an adapter or not.
        loss: "nll", "dft" or a `LossSpec` of one class without an anchor.
        say: gets the few lines worth knowing.

    Returns:
        A handle; its `detach()` gives the model back.

    Raises:
        ValueError: another loss.
        LossNotTakenError: the model has no output head; from a forward, if its loss was computed elsewhere.
    """
    spec = LossSpec.named(loss) if isinstance(loss, str) else loss
    if spec.is_anchored:
        raise ValueError("attach knows no base model, so its loss can have no anchor")
    if len(spec.weight) != 1:
        raise ValueError(f"attach takes a loss of one class, for every token; got {len(spec.weight)} classes")
    return Attachment(model, spec, say)
