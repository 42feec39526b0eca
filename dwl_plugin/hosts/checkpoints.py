"""Which checkpoint a run can go on from. A save that was cut off leaves a folder that the host takes for a checkpoint."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dwl_plugin.errors import ConfigError

__all__ = ["choose_checkpoint", "finished_checkpoints", "unfinished"]

_STATE = "trainer_state.json"
_FOLDER = re.compile(r"checkpoint-(\d+)")


def choose_checkpoint(cfg: Any) -> str | None:
    """Let an automatic resume start from the newest checkpoint that was written to its end; returns what to tell the user.

    Raises:
        ConfigError: `resume_from_checkpoint` names one that was not.
    """
    asked, folders = cfg.get("resume_from_checkpoint"), _checkpoints(Path(cfg["output_dir"]))
    if isinstance(asked, str) and Path(asked).is_dir():
        chosen = Path(asked)
    elif asked is None and cfg.get("auto_resume_from_checkpoints") and folders:
        chosen = folders[-1]
    else:
        return None
    why = unfinished(chosen)
    if why is None:
        return None
    whole = [folder for folder in folders if unfinished(folder) is None]
    if asked is not None:
        hint = f"the newest whole one is `{whole[-1]}`" if whole else f"no checkpoint in `{cfg['output_dir']}` is whole"
        raise ConfigError.at("resume_from_checkpoint", f"this checkpoint is damaged: {why}", asked, hint=hint)
    if whole:
        cfg["resume_from_checkpoint"] = str(whole[-1])
        return f"{chosen.name} is damaged ({why}): resuming from {whole[-1].name}"
    cfg["auto_resume_from_checkpoints"] = False
    return f"{chosen.name} is damaged ({why}) and there is none before it: starting from the beginning"


def finished_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that were written to their end, oldest first."""
    return [folder for folder in _checkpoints(output_dir) if unfinished(folder) is None]


def unfinished(folder: Path) -> str | None:
    """Why the checkpoint in `folder` cannot be used; None if it can. The host writes the trainer's state last."""
    state = folder / _STATE
    if not state.is_file():
        return f"it has no {_STATE}, which is written last"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except ValueError:  # a text that is cut off, also in the middle of a character
        return f"its {_STATE} breaks off"
    # A later run that wrote the same step again found an old state there.
    for file in sorted(folder.iterdir()):
        if not _is_whole(file):
            return f"its {file.name} breaks off"
    return None


def _is_whole(file: Path) -> bool:
    """Whether what is in `file` is as long as it says itself; weights and pickles of torch only."""
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return True
        except SafetensorError:
            return False
    return True


def _checkpoints(output_dir: Path) -> list[Path]:
    """As the host looks for them."""
    if not output_dir.is_dir():
        return []
    numbered = ((match, folder) for folder in output_dir.iterdir() if (match := _FOLDER.fullmatch(folder.name)))
    return [folder for _, folder in sorted((int(match[1]), folder) for match, folder in numbered if folder.is_dir())]
