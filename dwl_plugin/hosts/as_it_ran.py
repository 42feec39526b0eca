"""The config as it ran, where the host publishes the file that it was read from.

Axolotl puts that file into the model card and sends it to W&B, MLflow, Comet and Trackio, as it was before the options of the
command line, a sweep's parameters and `DWL_OVERRIDES` were put over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

__all__ = ["config_as_it_ran"]


def config_as_it_ran(file: Path, ran: Mapping[str, Any]) -> Path:
    """`file`, if it says what `ran`; else another that does. A key for some service that is not in the file stays out."""
    written = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    changed = {key: value for key, value in ran.items() if key not in written or written[key] != value}
    shown = {key: value for key, value in ran.items() if not (key in changed and key.endswith(("api_key", "token")))}
    if not changed.keys() & shown.keys():
        return file
    others = ", ".join(sorted(changed.keys() & shown.keys()))
    with NamedTemporaryFile("w", prefix="axolotl_config_", suffix=".yml", delete=False, encoding="utf-8") as out:
        out.write(f"# {file.name} as it ran; not in the file, or otherwise: {others}\n")
        yaml.safe_dump(shown, out, sort_keys=False, allow_unicode=True)
    return Path(out.name)
