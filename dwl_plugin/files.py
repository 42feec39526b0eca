"""Files of which nothing else is known: one that is written is whole or not there, one that is read is a file and has an end."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from dwl_plugin.errors import DWLError

__all__ = ["UnreadableError", "kind_of_file", "read_regular", "require_new", "sha256_of", "write_whole"]

_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


class UnreadableError(DWLError):
    """A path that is not read, and `why`."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} {why}.")
        self.why = why


def read_regular(path: Path, limit: int) -> bytes:
    """All that is in `path`, links followed. Raises `UnreadableError`: it cannot be read, is no file, or has over `limit` bytes."""
    try:
        _need_regular(path, os.stat(path), limit)  # before it is opened: some devices act on that alone
        with open(path, "rb", opener=_without_waiting) as file:
            _need_regular(path, os.fstat(file.fileno()), limit)
            content = file.read(limit + 1) or b""  # None: a file of the kernel that has nothing yet
    except (OSError, ValueError) as error:  # a ValueError for a name that no file can have
        raise UnreadableError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from error
    _need_small(path, len(content), limit)
    return content


def sha256_of(path: Path, limit: int) -> str | None:
    """In hexadecimal; None of what is no file, has over `limit` bytes, or cannot be read."""
    try:
        _need_regular(path, os.stat(path), limit)
        with open(path, "rb", opener=_without_waiting) as file:
            digest = hashlib.sha256()
            while part := file.read(1 << 20):
                digest.update(part)
            return digest.hexdigest()
    except (OSError, ValueError, UnreadableError):
        return None


def _need_small(path: Path, size: int, limit: int) -> None:
    if size > limit:
        raise UnreadableError(path, f"is not read: it has more than {limit >> 10:,} KiB")


def _need_regular(path: Path, found: os.stat_result, limit: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableError(path, f"is not read: it is a {kind_of_file(found.st_mode)}")
    _need_small(path, found.st_size, limit)


def kind_of_file(mode: int) -> str:
    """What is no regular file, in a word."""
    return _KINDS.get(stat.S_IFMT(mode), "special file")


def _without_waiting(name: str, flags: int) -> int:
    """A pipe that took the place of the file since would wait for its other end."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def require_new(path: Path) -> None:
    """Raises `DWLError` where something has that name, a link to nothing among them."""
    if os.path.lexists(path):
        raise DWLError(f"{path} is there already, and is not written over.")


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
                with suppress(FileNotFoundError):
                    shutil.copymode(target, draft)  # what only its owner could read stays so
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
