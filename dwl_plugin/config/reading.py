"""A block from what a script has in hand: a mapping, or a YAML file that may be a whole Axolotl config."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import yaml

from dwl_plugin.config.block import Block, LossName
from dwl_plugin.config.parsing import parse
from dwl_plugin.config.validate import one_of
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.yaml_io import load_yaml

__all__ = ["read_block"]


def read_block(source: Mapping[str, Any] | str | PathLike[str]) -> Block:
    """`loss`, `dft` and `dwl` of `source`; its other keys are not looked at.

    Raises:
        ConfigError: the file cannot be read, it has no `loss`, or what `parse` finds.
    """
    block = parse(source if isinstance(source, Mapping) else _load(fspath(source)))
    if block is None:
        hint = "add a line such as `loss: dft`, or a `loss: dwl` with its `dwl` block"
        raise ConfigError([Problem("loss", "is missing, so there is no loss to train with", allowed=one_of(LossName), hint=hint)])
    return block


def _load(path: str) -> Mapping[str, Any]:
    try:
        raw = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([Problem(path, f"cannot be read: {error.strerror}", hint="a path to a YAML file, or a dict")]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = " ".join(str(error).split())
        raise ConfigError([Problem(path, f"is not YAML: {where}")]) from None
    if not isinstance(raw, Mapping):
        raise ConfigError([Problem(path, "a config is a mapping of keys to values", raw)])
    return raw
