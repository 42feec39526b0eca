"""The YAML: `loss`, `dft` and `dwl` as frozen models. Every default lives here, once.

`parse` is the only way in. It takes the raw mapping, finds every problem before it raises, and returns a `Block` that
the rest of the package reads; `Block.dump` gives back a mapping that parses to the same block.
"""

from dwl_plugin.config.block import Block, DWLConfig, LossName, Reduction
from dwl_plugin.config.classes import BetweenClass, ClassConfig, RegexClass, TokenIdsClass, TokenRegexClass, TokensClass
from dwl_plugin.config.controllers import (
    ControllerOptions,
    DoReMiController,
    DWAController,
    GroupDROController,
    LossControllerOptions,
    RLWController,
    SoftAdaptController,
    SoftmaxLossController,
)
from dwl_plugin.config.parsing import parse
from dwl_plugin.config.reading import read_block
from dwl_plugin.config.schedules import (
    ConstantSchedule,
    CosineSchedule,
    CyclicSchedule,
    ExponentialSchedule,
    KeyframesSchedule,
    LinearSchedule,
    ScheduleOptions,
    SigmoidSchedule,
    StepSchedule,
    WarmupSchedule,
)
from dwl_plugin.loss.token_losses import DFTConfig, EAFTConfig, FocalConfig, TokenLossConfig, TokenLossName
from dwl_plugin.values import FIRST_TARGET, IGNORE_INDEX, REST, Overlap, Position, Weight

__all__ = [
    "FIRST_TARGET",
    "IGNORE_INDEX",
    "REST",
    "BetweenClass",
    "Block",
    "ClassConfig",
    "ConstantSchedule",
    "ControllerOptions",
    "CosineSchedule",
    "CyclicSchedule",
    "DFTConfig",
    "DWAController",
    "DWLConfig",
    "DoReMiController",
    "EAFTConfig",
    "ExponentialSchedule",
    "FocalConfig",
    "GroupDROController",
    "KeyframesSchedule",
    "LinearSchedule",
    "LossControllerOptions",
    "LossName",
    "Overlap",
    "Position",
    "RLWController",
    "Reduction",
    "RegexClass",
    "ScheduleOptions",
    "SigmoidSchedule",
    "SoftAdaptController",
    "SoftmaxLossController",
    "StepSchedule",
    "TokenIdsClass",
    "TokenLossConfig",
    "TokenLossName",
    "TokenRegexClass",
    "TokensClass",
    "WarmupSchedule",
    "Weight",
    "parse",
    "read_block",
]
