"""The first step at which a class's loss was not a number.

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
    """Per class, the first step with an infinite or NaN token; on the device of the tokens."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._first_C: torch.Tensor | None = None

    def add(self, step: int, tokens: ForwardMetrics) -> None:
        """The tokens of one forward in `step`."""
        finite_N = torch.isfinite(tokens.nll_N) & torch.isfinite(tokens.factors_KN).all(0)
        hits_C = tokens.members.sums((~finite_N)[None].long())[0, :-1]
        first_C = torch.where(hits_C > 0, step, _NEVER)
        self._first_C = first_C if self._first_C is None else torch.minimum(self._first_C.to(first_C.device), first_C)

    def found(self, everywhere: Callable[[torch.Tensor], torch.Tensor], device: torch.device) -> dict[str, int]:
        """class -> first bad step, of the classes that have one; `everywhere` turns (1, C) into (ranks, C), so every rank calls."""
        first_C = self._first_C
        if first_C is None:
            first_C = torch.full((len(self.names),), _NEVER, dtype=torch.int64, device=device)
        steps = everywhere(first_C.to(device)[None]).amin(0).tolist()
        return {name: step for name, step in zip(self.names, steps, strict=True) if step != _NEVER}
