"""One number of a run's log, from its start to its end."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

__all__ = ["LoggedCurve", "key_of"]


@dataclass(frozen=True)
class LoggedCurve:
    """One number over the run; NaN where the step has none, such as a class that was absent from it."""

    steps: tuple[int, ...]
    values: tuple[float, ...]

    def __bool__(self) -> bool:
        return any(map(math.isfinite, self.values))

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last value there is."""
        return self._known[0], self._known[-1]

    @property
    def tenths(self) -> tuple[float, float]:
        """The means of the first and of the last tenth of the values: single batches are noisy."""
        count = max(len(self._known) // 10, 1)
        return fmean(self._known[:count]), fmean(self._known[-count:])

    @property
    def mean(self) -> float:
        return fmean(self._known)

    @cached_property
    def _known(self) -> list[float]:
        return [value for value in self.values if math.isfinite(value)] or [math.nan]

    def thinned(self, limit: int) -> LoggedCurve:
        """At most `limit` points, each the mean of as many neighbours."""
        width = math.ceil(len(self.steps) / limit)
        if width <= 1:
            return self
        parts = [LoggedCurve(self.steps[at : at + width], self.values[at : at + width]) for at in range(0, len(self.steps), width)]
        return LoggedCurve(tuple(part.steps[-1] for part in parts), tuple(part.mean for part in parts))


def key_of(what: str, name: str | None) -> str:
    """What `nll` or `p` of a class, or of all targets, is logged as."""
    return f"dwl/{what}/{name}" if name is not None else "nll" if what == "nll" else f"dwl/{what}"
