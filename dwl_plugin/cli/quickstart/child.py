"""A module of this package run by a process of its own, which says what it is doing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from dwl_plugin.cli.progress import progress
from dwl_plugin.errors import DWLError

__all__ = ["environment", "run_module"]

_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # everything is local: no waiting for a hub that may not be there
    "AXOLOTL_DO_NOT_TRACK": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow a machine with other things to do many times
}


def environment() -> dict[str, str]:
    """For a process that trains on the CPU: several visible GPUs would be used as replicas."""
    return {**_DEFAULTS, **os.environ, "CUDA_VISIBLE_DEVICES": ""}


def run_module(module: str, *arguments: object, doing: str, failed: str) -> None:
    """Its memory is free again afterwards, and its warnings are shown only when it fails. Raises `DWLError` then.

    Each line of its stdout is one of its stages, and is shown behind `doing`.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, progress(doing) as step:
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8", env=environment()
        ) as child:
            try:
                for line in child.stdout or ():
                    step(f"{doing}: {line.strip()}")
            except BaseException:
                child.kill()  # an interrupt may have reached this process alone, and what the child writes to is about to go
                raise
        if child.returncode != 0:
            errors.seek(0)
            last = "".join(errors.readlines()[-15:])
            raise DWLError(f"{failed} (exit code {child.returncode}):\n{last}")
