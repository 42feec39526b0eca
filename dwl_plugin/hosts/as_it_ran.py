"""The config as it ran, where the host publishes the file that it was read from.

Axolotl puts that file into the model card and sends it to W&B, MLflow, Comet and Trackio, as it was before the options of the
command line, a sweep's parameters and `DWL_OVERRIDES` were put over it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import yaml

__all__ = ["config_as_it_ran", "without_password"]

_SECRET = ("api_key", "secret", "password", "webhook_url")
_WITH_PASSWORD = re.compile(r"://[^/\s]*@")


def without_password(address: str) -> str:
    """A URL without the user and password that open it."""
    return _WITH_PASSWORD.sub("://", address)


def config_as_it_ran(file: Path, ran: Mapping[str, Any]) -> Path:
    """`file`, if it says what `ran`; else another that does. What opens some service, and is not in the file, stays out."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except yaml.YAMLError:  # of a config made in Python: the host wrote its enums down with their classes
        written = {}
    changed = {key: value for key, value in ran.items() if key not in written or written[key] != value}
    public = {key: _public(value) for key, value in changed.items() if not key.endswith((*_SECRET, "token")) and not _opens(value)}
    shown = {key: public.get(key, value) for key, value in ran.items() if key in public or key not in changed}
    if not changed.keys() & shown.keys():
        return file
    others = ", ".join(sorted(changed.keys() & shown.keys()))
    with NamedTemporaryFile("w", prefix="axolotl_config_", suffix=".yml", delete=False, encoding="utf-8") as out:
        out.write(f"# {file.name} as it ran; not in the file, or otherwise: {others}\n")
        yaml.dump(shown, out, sort_keys=False, allow_unicode=True)
    return Path(out.name)


def _public(value: Any) -> Any:
    """`value` without what is secret inside it."""
    if isinstance(value, Mapping):
        inside = value.items()
        return {key: _public(part) for key, part in inside if not str(key).endswith(_SECRET) and not _opens(part)}
    return [_public(part) for part in value if not _opens(part)] if isinstance(value, list) else value


def _opens(value: Any) -> bool:
    return isinstance(value, str) and _WITH_PASSWORD.search(value) is not None
