"""The keys `loss`, `dft` and `dwl` in Axolotl's schema. Axolotl inherits this class into its own by its bare name."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator

from dwl_plugin.config import Block, DWLConfig, LossName, parse
from dwl_plugin.config.overrides import plain
from dwl_plugin.errors import ConfigError
from dwl_plugin.hosts.incompatible import refused, shares_sequences
from dwl_plugin.loss.token_losses import DFTConfig
from dwl_plugin.run.anchors import anchor_problems, without_base_model

__all__ = ["FUSED_LOSSES", "DWLPluginArgs", "block_of", "fused_losses_asked_for"]

FUSED_LOSSES = (
    "cut_cross_entropy",
    "liger_fused_linear_cross_entropy",
    "liger_cross_entropy",
    "chunked_cross_entropy",
    "flash_attn_cross_entropy",
)
"""Keys of the host that patch the loss that is replaced, for the whole process and before the model is loaded."""


class DWLPluginArgs(BaseModel):
    """`loss`, `dft`, `dwl`."""

    loss: LossName | None = Field(default=None, description="nll, dft or dwl. Absent: the plugin does nothing.")
    dft: DFTConfig | None = Field(default=None, description="Options of the dft token loss.")
    dwl: DWLConfig | None = Field(default=None, description="Token classes, their weights α, and how they move.")

    @model_validator(mode="before")
    @classmethod
    def _check_loss_block(cls, data: Any) -> Any:
        """Raise every `Problem` at once, in a `ConfigError` that pydantic does not wrap, before the host validates its own keys."""
        if not isinstance(data, dict):
            return data
        problems, path = [], data.get("axolotl_config_path")  # the host tells it for a config that it read from a file
        try:
            block = parse(data, folder=None if path is None else Path(path).parent)
        except ConfigError as error:
            block, problems = None, list(error.problems)
        loss = data.get("loss")
        if loss is not None:
            problems += refused(data, loss)
        if block is not None and not data.get("adapter"):
            problems += without_base_model(block)
        elif block is not None and shares_sequences(data):
            why = "is held to the base model, whose forward is in eval mode, where DeepSpeed's sequence parallelism is switched off"
            problems += anchor_problems(block, why, "leave `context_parallel_size` or `deepspeed` out, or delete `anchor`")
        ConfigError.raise_any(problems)
        return data if block is None else {**data, **block.dump()}

    @model_validator(mode="after")
    def _take_over_fused_losses(self) -> DWLPluginArgs:
        """Switch them off while it is only a config: the rest of those plugins stays, and the next run finds no patch."""
        if self.loss is not None:
            for key in FUSED_LOSSES:
                if getattr(self, key, None):
                    setattr(self, key, False)
        return self


def fused_losses_asked_for(cfg: Any) -> list[str]:
    """The fused losses that an unvalidated config switches on; the Cut Cross Entropy plugin does so by being there."""
    asked = [key for key in FUSED_LOSSES if cfg.get(key)]
    if any("cut_cross_entropy" in str(name) for name in cfg.get("plugins") or ()) and cfg.get(FUSED_LOSSES[0]) is None:
        asked.insert(0, FUSED_LOSSES[0])
    return asked


def block_of(cfg: Any, unwritten: Container[str] = ()) -> Block | None:
    """The block of a validated Axolotl config; None without `loss`.

    The host has written all defaults out; those of `dwl` that are `unwritten` are taken to be ones again.
    """
    raw = {key: plain(cfg.get(key)) for key in ("loss", "dft", "dwl")}
    if raw["dwl"]:
        defaults = {key: info.default for key, info in DWLConfig.model_fields.items() if key in unwritten}
        raw["dwl"] = {key: value for key, value in raw["dwl"].items() if key not in defaults or defaults[key] != value}
    return parse(raw)
