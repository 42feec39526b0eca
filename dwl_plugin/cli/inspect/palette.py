"""How classes are told apart: a colour that the colour-blind can tell from the others, a kind of underline, and a number."""

from __future__ import annotations

from dwl_plugin.cli.plots import PALETTE

__all__ = ["UNDERLINES", "look"]

UNDERLINES = ("solid", "double", "dotted", "dashed", "wavy")


def look(index: int) -> tuple[str, str]:
    """Colour and underline of the class with this index; no two of the first thirty look alike."""
    return PALETTE[index % len(PALETTE)], UNDERLINES[(index + index // len(PALETTE)) % len(UNDERLINES)]
