"""A file is whole or it is not there: what we write appears under its name only when all of it is on the disk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from dwl_plugin.errors import DWLError

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename over it. Raises `DWLError` with the reason; what stood there before then still stands."""
    target = Path(os.path.realpath(path))  # a link keeps pointing where it pointed
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():  # a device or a pipe, which nothing may replace
            path.write_bytes(content)
            return
        try:
            with open(draft, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, target)
        finally:
            with suppress(OSError):
                draft.unlink()
    except OSError as error:
        kept = "; the file that is there was not touched" if target.is_file() else ""
        raise DWLError(f"{path} cannot be written: {error.strerror or error}{kept}.") from error
