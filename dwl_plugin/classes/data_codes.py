"""What the data says of a token, in one int64: its factor, its data set and its marks.

Bits 0 to 21 are the marks, 22 to 29 the number of the data set, 30 to 61 the factor in fp32, xor that of 1: a token of which
nothing is said has code 0. A class id is such a code with the class, or its classes' bits, in the place of the marks; the bit above
is `FIRST_TARGET`. So factors go wherever class ids go, through packing, padding and sharding.

Suffixes: T tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dwl_plugin.classes.token_bytes import Ints

__all__ = [
    "CLASS_BITS",
    "DATA_CODES",
    "DATA_SET_BITS",
    "FACTOR_SHIFT",
    "MOST_DATA_SETS",
    "MOST_MARKS",
    "ONE",
    "data_sets_of",
    "encode",
    "factors_of",
    "marks_of",
]

DATA_CODES = "dwl_data"
"""Column of rows that are tokenised: the code of each token. Longer than the tokens where the host cut those off."""

CLASS_BITS, DATA_SET_BITS = 22, 8
FACTOR_SHIFT = CLASS_BITS + DATA_SET_BITS
MOST_MARKS, MOST_DATA_SETS = CLASS_BITS, (1 << DATA_SET_BITS) - 1
ONE = int(np.float32(1).view(np.uint32))
"""The bits of a factor of 1."""

_CLASS, _DATA_SET, _FACTOR = (1 << CLASS_BITS) - 1, (1 << DATA_SET_BITS) - 1, (1 << 32) - 1


def encode(factors_T: Any, marks_T: Any = 0, data_set: Any = 0) -> Ints:
    """Codes (T,) of finite factors, sets of marks (bit k for mark k) and data sets, numbered from 1; 0 says nothing."""
    bits_T = np.asarray(factors_T, np.float32).view(np.uint32).astype(np.int64) ^ ONE
    return bits_T << FACTOR_SHIFT | np.asarray(data_set, np.int64) << CLASS_BITS | np.asarray(marks_T, np.int64)


def factors_of(codes_T: Ints) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(T,) fp32."""
    return ((codes_T >> FACTOR_SHIFT & _FACTOR) ^ ONE).astype(np.uint32).view(np.float32)


def data_sets_of(codes_T: Ints) -> Ints:
    """(T,) from 1; 0 is none."""
    return codes_T >> CLASS_BITS & _DATA_SET


def marks_of(codes_T: Ints) -> Ints:
    """(T,) bit k for mark k; of a class id, the class."""
    return codes_T & _CLASS
