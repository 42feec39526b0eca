"""Dynamic Weighted Loss for fine-tuning: L(θ, τ) = Σ_c α_c(τ)·L_c(θ) over user-defined classes of target tokens.

Importing this package imports neither torch nor a training framework: each public name is resolved when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwl_plugin.errors import ConfigError as ConfigError, DWLError as DWLError
    from dwl_plugin.hosts.axolotl import DWLPlugin as DWLPlugin
    from dwl_plugin.hosts.transformers import AppliedLoss as AppliedLoss, apply as apply
    from dwl_plugin.loss.attach import attach as attach
    from dwl_plugin.loss.linear_cross_entropy import (
        LinearCrossEntropyOutput as LinearCrossEntropyOutput,
        linear_cross_entropy as linear_cross_entropy,
    )
    from dwl_plugin.loss.spec import LossSpec as LossSpec

_HOME = {
    "AppliedLoss": "dwl_plugin.hosts.transformers",
    "ConfigError": "dwl_plugin.errors",
    "DWLError": "dwl_plugin.errors",
    "DWLPlugin": "dwl_plugin.hosts.axolotl",
    "LossSpec": "dwl_plugin.loss.spec",
    "LinearCrossEntropyOutput": "dwl_plugin.loss.linear_cross_entropy",
    "apply": "dwl_plugin.hosts.transformers",
    "attach": "dwl_plugin.loss.attach",
    "linear_cross_entropy": "dwl_plugin.loss.linear_cross_entropy",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("axolotl-dwl")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
