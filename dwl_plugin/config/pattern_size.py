"""How large a pattern becomes when it is compiled: the compiler writes out the least number of repetitions.

`(?:(?:a{1000}){1000}){1000}` is 27 characters and would fill any memory.
"""

from __future__ import annotations

import regex

__all__ = ["unrolled_size"]

_PIECE = regex.compile(
    r"""
    (?P<repeat>\{(?P<least>\d+)(?:,\d*)?\}|\{,\d+\})[?+]?
    | (?P<open>\()
    | (?P<close>\))
    | (?P<atom>\\.|\[\^?\]?(?:\\.|[^\]\\])*+\]?|.)
    """,
    regex.VERBOSE | regex.DOTALL,
)


def unrolled_size(pattern: str) -> int:
    """The number of atoms after every `{n}` and `{n,}` and `{n,m}` is written out n times; an estimate from above."""
    outer: list[int] = []
    total = last = 0  # of the group that is open; of the atom or group that a repetition would repeat
    for piece in _PIECE.finditer(pattern):
        if piece["repeat"]:
            total += last * (max(int(piece["least"] or 1), 1) - 1)
            last *= max(int(piece["least"] or 1), 1)
        elif piece["open"]:
            outer.append(total)
            total = last = 0
        elif piece["close"] and outer:
            last, total = total, outer.pop() + total
        else:
            last, total = 1, total + 1
    return total + sum(outer)
