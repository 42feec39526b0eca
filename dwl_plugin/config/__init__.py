"""The YAML: `loss`, `dft` and `dwl` as frozen models. Every default lives here, once.

`parse` is the only way in. It takes the raw mapping, finds every problem before it raises, and returns a `Block` that
the rest of the package reads; `Block.dump` gives back a mapping that parses to the same block.
"""

from dwl_plugin.alpha.controllers import ControllerOptions, LossControllerOptions
from dwl_plugin.alpha.schedules import ScheduleOptions
from dwl_plugin.config.block import Block, DWLConfig, LossName
from dwl_plugin.config.classes import ClassConfig
from dwl_plugin.config.parse import parse, read_block
from dwl_plugin.values import Position, Reduction, Weight

__all__ = [
    "Block",
    "ClassConfig",
    "ControllerOptions",
    "DWLConfig",
    "LossControllerOptions",
    "LossName",
    "Position",
    "Reduction",
    "ScheduleOptions",
    "Weight",
    "parse",
    "read_block",
]
