"""The first step at which the loss of a class, or the loss that is trained, was not a number.

Hosts hide it: `logging_nan_inf_filter`, on by default, puts the running mean in its place. To look at every micro-batch would
make the device wait each time, so the step is kept on the device and read where the host waits anyway: when it logs, and before
it saves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from dwl_plugin.loss.class_sums import ForwardMetrics

__all__ = ["FirstBadStep"]

_NEVER = 2**62


class FirstBadStep:
    """The first step with an infinite or NaN token, of each class, and with such a loss; on the device of the tokens."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._first_C: torch.Tensor | None = None
        self._first_loss: torch.Tensor | None = None

    def add(self, step: int, tokens: ForwardMetrics) -> None:
        """The tokens of one forward in `step`."""
        finite_N = torch.isfinite(tokens.nll_N) & torch.isfinite(tokens.factors_KN).all(0)
        hits_C = tokens.members.sums((~finite_N)[None].long())[0, :-1]
        self._first_C = _earlier(self._first_C, torch.where(hits_C > 0, step, _NEVER))

    def add_loss(self, step: int, loss: torch.Tensor) -> None:
        """What one forward in `step` hands to the gradients: weights, an anchor and the model's own terms are in it."""
        self._first_loss = _earlier(self._first_loss, torch.where(torch.isfinite(loss.detach()), _NEVER, step).reshape(1))

    def found(self, everywhere: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str | None, int]:
        """class -> first bad step, of the classes that have one, and None -> that of the loss; `everywhere` turns (1, C + 1) into
        (ranks, C + 1), so every rank calls."""
        never = torch.full((len(self.names) + 1,), _NEVER, dtype=torch.int64, device=device)
        first_C = never[:-1] if self._first_C is None else self._first_C.to(device)
        first_loss = never[-1:] if self._first_loss is None else self._first_loss.to(device)
        steps = everywhere(torch.cat([first_C, first_loss])[None]).amin(0).tolist()
        return {name: step for name, step in zip((*self.names, None), steps, strict=True) if step != _NEVER}


def _earlier(known: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    return new if known is None else torch.minimum(known.to(new.device), new)
