"""Which checkpoint a run can go on from. A save that was cut off leaves a folder that the host takes for a checkpoint, and one that
somebody else wrote may hold anything."""

from __future__ import annotations

import json
import re
import reprlib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError
from safetensors import SafetensorError, safe_open

from dwl_plugin.errors import ConfigError
from dwl_plugin.files import UnreadableError, read_regular

__all__ = ["choose_checkpoint", "finished_checkpoints", "named_in", "require_whole", "unfinished"]

_STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")

_MOST_BYTES = 1 << 30
"""Of a trainer's state: a million logged steps. To read as many takes ten seconds and 6 GB."""

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxlist = 2, 8


class _TrainerState(BaseModel):
    """What a run goes by, of what the host keeps."""

    global_step: int = Field(strict=True, ge=0, lt=2**53)
    log_history: list[dict[str, Any]] = []
    stateful_callbacks: dict[str, Any] | None = None


def choose_checkpoint(cfg: Any) -> str | None:
    """Let an automatic resume start from the newest checkpoint that was written to its end; returns what to tell the user.

    Raises:
        ConfigError: `resume_from_checkpoint` names one that was not.
    """
    asked, output_dir = cfg.get("resume_from_checkpoint"), Path(cfg["output_dir"])
    folders = _checkpoints(output_dir)
    if isinstance(asked, str):
        require_whole(asked, output_dir)
        return None
    if asked is not None or not cfg.get("auto_resume_from_checkpoints") or not folders:
        return None
    newest = folders[-1]
    why = unfinished(newest)
    if why is None:
        return None
    if whole := [folder for folder in folders if unfinished(folder) is None]:
        cfg["resume_from_checkpoint"] = str(whole[-1])
        return f"{newest.name} is damaged ({why}): resuming from {whole[-1].name}"
    cfg["auto_resume_from_checkpoints"] = False
    return f"{newest.name} is damaged ({why}) and there is none before it: starting from the beginning"


def require_whole(asked: str | Path, output_dir: Path) -> None:
    """Raise `ConfigError` for a checkpoint that cannot be used, naming the newest in `output_dir` that can."""
    if not str(asked):
        raise ConfigError.at("resume_from_checkpoint", "names no folder", asked, hint="delete the line to begin from the start")
    folder = Path(asked)
    if why := unfinished(folder):
        whole = finished_checkpoints(output_dir)
        hint = f"the newest whole one is `{whole[-1]}`" if whole else f"no checkpoint in `{output_dir}` is whole"
        what = f"this checkpoint is damaged: {why}" if folder.is_dir() else "there is no such folder"
        raise ConfigError.at("resume_from_checkpoint", what, str(folder), hint=hint)


@contextmanager
def named_in(folder: Path | None, place: str) -> Iterator[None]:
    """Turn what pydantic finds wrong at `place` in the state of a checkpoint into a `ConfigError` that names folder and fields."""
    try:
        yield
    except ValidationError as error:
        told = [_told(place, item) for item in error.errors(include_url=False, include_context=False)]
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        why = f"the checkpoint `{folder}` is damaged: in its {_STATE}, {'; '.join(told[:3])}{more}"
        raise ConfigError.at("resume_from_checkpoint", why, hint="resume from another checkpoint, or start a new run") from None


def finished_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that were written to their end, oldest first."""
    return [folder for folder in _checkpoints(output_dir) if unfinished(folder) is None]


def unfinished(folder: Path) -> str | None:
    """Why the checkpoint in `folder` cannot be used; None if it can. The host writes the trainer's state last."""
    state = folder / _STATE
    if not state.exists():
        return f"it has no {_STATE}, which is written last"
    try:
        written = json.loads(read_regular(state, _MOST_BYTES).decode("utf-8"))
        if not isinstance(written, dict):
            return f"its {_STATE} is no JSON object"
        _TrainerState.model_validate(written)
    except UnreadableError as error:
        return f"its {_STATE} {error.why}"
    except ValidationError as error:
        return f"in its {_STATE}, {_told('', error.errors(include_url=False, include_context=False)[0])}"
    except RecursionError:
        return f"its {_STATE} is nested too deep"
    except ValueError:  # a text that is cut off, also in the middle of a character
        return f"its {_STATE} breaks off"
    # A later run that wrote the same step again found an old state there.
    for file in sorted(folder.rglob("*")):  # DeepSpeed's parts are in a folder of their own
        if file.is_dir():
            continue
        if not file.is_file():  # to open a pipe means to wait
            return f"its {file.relative_to(folder)} is no file"
        if not _is_whole(file):
            return f"its {file.relative_to(folder)} breaks off"
    return None


def _told(place: str, item: Any) -> str:
    """One pydantic error in a line, whatever the size and the depth of what it is about."""
    path = place
    for part in item["loc"][:8]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else str(part)
    got = "" if item["type"] == "missing" else f" (got {_SHORT.repr(item['input'])})"
    return f"`{path[:200]}`: {item['msg'][:1].lower()}{item['msg'][1:]}{got}"


def _is_whole(file: Path) -> bool:
    """Whether what is in `file` is as long as it says itself; weights and pickles of torch only."""
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False
    return True


def _checkpoints(output_dir: Path) -> list[Path]:
    """As the host looks for them."""
    if not output_dir.is_dir():
        return []
    numbered = ((match, folder) for folder in output_dir.iterdir() if (match := _FOLDER.fullmatch(folder.name)))
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in numbered if folder.is_dir())]
