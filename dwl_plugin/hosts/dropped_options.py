"""Options that Axolotl's command line takes without a word and throws away."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dwl_plugin.config.overrides import VARIABLE, value_at
from dwl_plugin.errors import ConfigError, Problem
from dwl_plugin.yaml_io import load_yaml

__all__ = ["dropped_options"]

_OURS = re.compile(r"--(?P<key>loss|(?:dft|dwl)(?:[._-].*?)?)(?:=(?P<value>.*))?", flags=re.DOTALL)


def dropped_options(argv: Sequence[str], raw: Mapping[str, Any]) -> Iterator[Problem]:
    """One problem for each option of `argv` below `loss`, `dft` or `dwl` that did not reach the config.

    What the config has anyway is no problem: a W&B sweep hands every parameter over twice, on the command line and in a file.
    """
    for at, word in enumerate(argv):
        match = _OURS.fullmatch(word)
        if match is None:
            continue
        following = argv[at + 1] if at + 1 < len(argv) and not argv[at + 1].startswith("-") else ""
        text = match["value"] if match["value"] is not None else following
        path = match["key"].replace("__", ".")
        if not _same(text, value_at(raw, path)):
            yield Problem(
                f"--{match['key']}",
                "Axolotl drops this option, and the run would go on without it",
                text,
                hint=f"{VARIABLE}='{path}={text}' axolotl train CONFIG",
            )


def _same(text: str, value: Any) -> bool:
    if value is None:
        return False
    try:
        return str(value) == text or bool(load_yaml(text, "") == value)
    except ConfigError:
        return False
