"""A proposal as lines of YAML, each with its reason behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from dwl_plugin.cli.suggest.rules import Proposal

__all__ = ["block_lines"]

_LONGEST = 60
"""Characters of a line that others are aligned with."""


def block_lines(proposal: Proposal, rows: int) -> list[str]:
    """The lines of `proposal.keys`. No comment has a line of its own: whoever replaces the block takes all of them."""
    targets = sum(proposal.counts)
    why = {line.key: line.why for line in proposal.why}
    why |= {
        f"classes.{entry.name}": f"{entry.found.tokens:,} tokens ({entry.found.tokens / max(targets, 1):.1%}) "
        f"in {entry.found.rows:,} of {rows:,} rows"
        for entry in proposal.classes
    }
    lines = list(_lines(proposal.keys))
    width = max(len(line) for _, line in lines if len(line) <= _LONGEST)
    return [f"{line:<{width}}  # {why[key]}" if key in why else line for key, line in lines]


def _lines(keys: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each line with the key whose reason it takes."""
    for key, value in keys.items():
        if key != "dwl" or not isinstance(value, Mapping):
            yield key, f"{key}: {_flow(value)}"
            continue
        yield key, "dwl:"
        for option, inner in value.items():
            if option == "classes" and inner:
                yield option, "  classes:"
                yield from ((f"classes.{name}", f"    {name}: {_flow(spec)}") for name, spec in inner.items())
            else:
                yield option, f"  {option}: {_flow(inner)}"


def _flow(value: Any) -> str:
    """In one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=float("inf"))
    return text.removesuffix("\n").removesuffix("\n...")
