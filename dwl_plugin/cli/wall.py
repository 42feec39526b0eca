"""The second wall: while a stranger's config is looked at, this process runs no code of theirs, unpickles nothing, reaches nobody.

`trust` lists what is known to do such things, and the look ends there. What it does not know ends here, in a hook of the
interpreter (`sys.addaudithook`) that hears of every import, program, unpickling and connection before it happens.
"""

from __future__ import annotations

import contextlib
import functools
import glob
import importlib.machinery
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NoReturn

from dwl_plugin.cli.trust import Danger
from dwl_plugin.hosts.axolotl_preview import import_axolotl, offline

__all__ = ["RefusedError", "came_from_wall", "look_only"]

_CODE = tuple(importlib.machinery.all_suffixes())
_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
_PROGRAMS = frozenset(
    (
        *("uname", "hostname", "nproc", "lscpu", "ldconfig", "nvidia-smi", "rocminfo", "rocm-smi", "amd-smi", "xpu-smi"),
        *("cc", "c++", "gcc", "g++", "clang", "clang++", "ld", "nvcc", "ptxas"),
    )
)
"""What libraries ask for the hardware, and what they compile for it with."""
_FILESYSTEMS = (
    *(f"fsspec.implementations.{name}" for name in ("local", "dirfs", "zip", "tar", "libarchive")),
    *("datasets.filesystems.compression", "huggingface_hub."),  # the hub's is offline
)
_OWN_PICKLES = ("numba", "torch/_inductor", "torch/_dynamo", "torch/_functorch", "multiprocessing", "multiprocess", "concurrent")
"""Libraries that unpickle what they pickled themselves, to compile or to talk to their own processes."""


class RefusedError(PermissionError):
    """What the hook raises in the middle of whatever tried it; an OSError, which libraries are ready for."""


def came_from_wall(error: BaseException | None) -> bool:
    """Whether a refusal is what `error` was raised for, by whatever it went through."""
    seen = set[int]()  # a host may raise an error from itself
    while error is not None and id(error) not in seen and not isinstance(error, RefusedError):
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return isinstance(error, RefusedError)


class _Look:
    """One look at a config: whose code may run meanwhile, and what was refused."""

    def __init__(self) -> None:
        self.refused: list[Danger] = []
        self._places = tuple(map(_folder, _installed()))

    def trusts(self, file: str) -> bool:
        return file.startswith("<") or os.path.realpath(file).startswith((*self._places, *map(_folder, _compiled())))

    def refuse(self, does: Literal["runs code", "fetches"], what: str, value: object) -> NoReturn:
        danger = Danger("while it was loaded", str(value), does, what)
        if danger not in self.refused:
            self.refused.append(danger)
        raise RefusedError(f"refused {what}: {value}")

    def _may_start(self, program: str, given: list[str]) -> bool:
        """Whether it is one of `_PROGRAMS` on the PATH, or this Python with code of an installed package."""
        found = shutil.which(program)
        if found is None:  # it would not start
            return True
        if os.path.samefile(found, sys.executable):
            return len(given) > 1 and given[1].endswith(".py") and self.trusts(given[1])
        folder, name = os.path.split(os.path.abspath(found))
        return name in _PROGRAMS and (self.trusts(found) or folder in filter(os.path.isabs, os.get_exec_path()))

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("exec", "import", "open"):
            file = _code_file(event, arguments)
            if file is not None and not self.trusts(file):
                self.refuse("runs code", "Python that is no installed package's", file)
        elif event in _STARTS:
            program, given = _started(event, arguments)
            if not self._may_start(program, given):
                self.refuse("runs code", "a program", " ".join([program, *given[1:]]))
        elif event == "pickle.find_class":
            if not any(f"/{library}/" in _reader() for library in _OWN_PICKLES):
                self.refuse("runs code", "a pickle, which names what is called when it is read", ".".join(map(str, arguments)))
        elif event == "socket.connect":
            if isinstance(arguments[1], tuple):  # else a socket of this machine
                self.refuse("fetches", "a connection that no line of the config announces", arguments[1][0])
        elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
            self.refuse("fetches", "a connection that no line of the config announces", arguments[0])


def _code_file(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The file whose code is about to run, or to be read for that."""
    file = getattr(arguments[0], "co_filename", None) if event == "exec" else arguments[1 if event == "import" else 0]
    if not isinstance(file, (str, bytes)):
        return None
    name = os.fsdecode(file)
    if event == "open" and not name.endswith(_CODE):
        return None
    with contextlib.suppress(ValueError):  # what was compiled before is named by its source
        return importlib.util.source_from_cache(name)
    return name


def _started(event: str, arguments: tuple[Any, ...]) -> tuple[str, list[str]]:
    """The program, and all of its line."""
    if event == "os.system":
        return "sh", ["sh", "-c", os.fsdecode(arguments[0])]
    program, given = arguments[:2]
    line = [given] if isinstance(given, (str, bytes)) or not isinstance(given, Iterable) else given
    return os.fsdecode(program), [os.fsdecode(word) for word in line]


def _reader() -> str:
    """The file of what asked for the pickle that is being read."""
    frame = sys._getframe(3)
    while frame.f_back is not None and os.path.basename(frame.f_code.co_filename) in ("pickle.py", "_dill.py"):
        frame = frame.f_back
    return frame.f_code.co_filename.replace(os.sep, "/")


def _installed() -> set[str]:
    """Where Python, installed packages and what is imported by now lie; never where the command was started, or above."""
    places = {*sysconfig.get_paths().values()}
    places |= {place for place in sys.path if any(glob.iglob(os.path.join(glob.escape(place), "*.dist-info")))}
    here = os.path.realpath(os.getcwd())
    places = {place for place in places if os.path.commonpath([here, os.path.realpath(place)]) != os.path.realpath(place)}
    # An editable install lies anywhere.
    return places.union(*(getattr(module, "__path__", ()) for name, module in [*sys.modules.items()] if "." not in name))


_look: _Look | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _look is not None:
        _look.hear(event, arguments)


@functools.cache
def _listen() -> None:
    sys.addaudithook(_hook)  # for as long as the process lives


@contextlib.contextmanager
def look_only(trust: bool) -> Iterator[list[Danger]]:
    """Without `trust`, until the end of the block: what was refused. Raises ImportError where there is no Axolotl."""
    global _look
    if trust:
        yield []
        return
    _listen()
    with offline():
        import_axolotl()  # as it is installed, before anything of the config is read
        before, _look = _look, (look := _Look())
        try:
            with _files_of_this_disk(look):
                yield look.refused
        finally:
            _look = before


@contextlib.contextmanager
def _files_of_this_disk(look: _Look) -> Iterator[None]:
    """fsspec opens whatever a path is written like: by Jinja templates (`reference::`), by libraries of Java (`hdfs:`), by git."""
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

    kind: Any = type(AbstractFileSystem)
    make = kind.__call__

    def on_disk(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.__module__.startswith(_FILESYSTEMS):
            protocol = self.protocol if isinstance(self.protocol, str) else self.protocol[0]
            look.refuse("fetches", "a path that is no place on this disk", f"{protocol}://")
        return make(self, *args, **kwargs)

    kind.__call__ = on_disk
    try:
        yield
    finally:
        kind.__call__ = make


def _compiled() -> Iterator[str]:
    """Where torch and Triton write what they compile."""
    yield os.environ.get("TRITON_CACHE_DIR") or os.path.join(os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton")
    module = sys.modules.get("torch._inductor.runtime.cache_dir_utils")
    if module is not None:  # it has compiled
        yield module.cache_dir()


def _folder(place: str) -> str:
    return os.path.join(os.path.realpath(place), "")
