"""A function of the host for which another stands in, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["instead"]


@contextmanager
def instead(module: Any, name: str, ours: Any) -> Iterator[None]:
    """While entered, `ours` stands in the place of what `module` calls `name`."""
    theirs = getattr(module, name)
    setattr(module, name, ours)
    try:
        yield
    finally:
        setattr(module, name, theirs)
