"""Names and samples of strangers, made safe for a terminal."""

from __future__ import annotations

import unicodedata

__all__ = ["printable"]


def printable(text: str, keep: str = "") -> str:
    """`text` with what could drive a terminal shown by its number, as ‹1b›; but for the characters of `keep`."""
    return "".join(
        char if char in keep or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else f"‹{ord(char):02x}›" for char in text
    )
