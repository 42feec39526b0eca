"""τ: where in the run a position of the YAML lies, in optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from dwl_plugin.errors import ConfigError

__all__ = ["RunLength"]


@dataclass(frozen=True)
class RunLength:
    """How long a run is; None where the host does not know. τ is 0 at the first optimizer step."""

    total_steps: int | None
    steps_per_epoch: float | None

    def step(self, position: int | str, path: str) -> float:
        """`position` (`200`, `10%`, `2ep`) in optimizer steps; `path` is its place in the YAML, for the error.

        Reckoned in fractions: in floats 7% of 100 lies after step 7.
        """
        if isinstance(position, int) or position.isdecimal():
            return float(position)
        if position.endswith("%"):
            if self.total_steps is None:
                why = "this run has no known length, so a share of it is no step"
                raise ConfigError.at(path, why, position, hint="write a number of steps, or set `max_steps`")
            return float(Fraction(position[:-1]) / 100 * self.total_steps)
        if self.steps_per_epoch is None:
            why = "the dataset has no known length, so epochs cannot be counted"
            raise ConfigError.at(path, why, position, hint="write a number of steps")
        return float(Fraction(position[:-2]) * Fraction(self.steps_per_epoch))
