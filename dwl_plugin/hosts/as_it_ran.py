"""The config as it ran, where the host publishes the file that it was read from.

Axolotl puts that file into the model card and sends it to W&B, MLflow, Comet and Trackio, as it was before the options of the
command line, a sweep's parameters and `DWL_OVERRIDES` were put over it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import NoneType
from typing import Any

import yaml

from dwl_plugin.config import Block
from dwl_plugin.files import UnreadableError, read_regular

__all__ = ["LEFT_OUT", "config_as_it_ran", "config_to_keep", "opens", "without_password"]

LEFT_OUT = "‹left out›"
"""In the place of what opens some service, in the config that a run keeps."""

_SECRET_KEYS = (
    *("apikey", "accesskey", "accesskeyid", "secret", "secretkey", "password", "webhookurl", "credentials", "storageoptions"),
    *("accesstoken", "apitoken", "authtoken", "hftoken", "hubtoken", "sessiontoken", "refreshtoken", "bearertoken"),
)
"""How keys end that open some service, without what is between their words. `pad_token` does not."""
_SECRET_TEXT = re.compile(
    r"\b(?:hf_|gh[pousr]_)[A-Za-z0-9]{20,}|\b(?:glpat-|xox[abprs]-|AIza)[\w-]{20,}|\bsk-[\w-]{20,}|\bgithub_pat_\w{20,}|\bAKIA[A-Z0-9]{16}\b"
    r"|[?&](?:X-Amz-Signature|X-Goog-Signature|sig|signature|token|access_token|api_?key)=",
    re.IGNORECASE,
)
"""Tokens by their looks, and addresses that are signed."""
_MOST_BYTES = 64 << 10
"""Of a file of settings that is kept in the place of its path."""
_WITH_PASSWORD = re.compile(r"://[^/\s]*@")


def without_password(address: str) -> str:
    """A URL without the user and password, or the signature, that open it."""
    address = _WITH_PASSWORD.sub("://", address)
    return address.partition("?")[0] if _SECRET_TEXT.search(address) else address


def config_as_it_ran(file: Path, ran: Mapping[str, Any]) -> Path:
    """`file`, if it says what `ran`; else another that does. What opens some service, and is not in the file, stays out."""
    try:
        written = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except yaml.YAMLError:  # of a config made in Python: the host wrote its enums down with their classes
        written = {}
    changed = {key: value for key, value in ran.items() if key not in written or written[key] != value}
    public = {key: _public(value) for key, value in changed.items() if not opens(key, value)}
    shown = {key: public.get(key, value) for key, value in ran.items() if key in public or key not in changed}
    if not changed.keys() & shown.keys():
        return file
    others = ", ".join(sorted(changed.keys() & shown.keys()))
    with NamedTemporaryFile("w", prefix="axolotl_config_", suffix=".yml", delete=False, encoding="utf-8") as out:
        out.write(f"# {file.name} as it ran; not in the file, or otherwise: {others}\n")
        yaml.dump(shown, out, sort_keys=False, allow_unicode=True)
    return Path(out.name)


def config_to_keep(ran: Mapping[str, Any]) -> dict[str, Any]:
    """What `ran` beside our own keys, which a run keeps resolved: as plain YAML, with the files of settings that it names in it."""
    kept = {str(key): _kept(str(key), value) for key, value in ran.items() if key not in Block.model_fields}
    by_path = ran.get("deepcompile") or (ran.get("tensor_parallel_size") or 1) > 1  # the host opens it then as a file
    if not by_path and isinstance(kept.get("deepspeed"), str) and (text := _text(kept["deepspeed"])) is not None:
        with suppress(ValueError):  # what is no JSON is the host's to complain of
            kept["deepspeed"] = json.loads(text)
    for node in (kept, *(entry for key in ("datasets", "test_datasets") for entry in _list(kept.get(key)))):
        if isinstance(node, dict) and isinstance(path := node.get("chat_template_jinja"), str):
            node["chat_template_jinja"] = _text(path) or path
    return kept


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kept(key: str, value: Any) -> Any:
    """`value` in types that YAML has by itself."""
    if opens(key, value):
        return LEFT_OUT
    if isinstance(value, Enum):
        return _kept(key, value.value)
    if isinstance(value, Mapping):
        return {name if type(name) is int else str(name): _kept(str(name), part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_kept("", part) for part in value]
    return value if type(value) in (bool, int, float, str, date, datetime, NoneType) else str(value)


def _text(path: str) -> str | None:
    """Of a file of settings; None if there is none."""
    try:
        return read_regular(Path(path), _MOST_BYTES).decode()
    except (UnreadableError, ValueError):
        return None


def _public(value: Any) -> Any:
    """`value` without what is secret inside it."""
    if isinstance(value, Mapping):
        return {key: _public(part) for key, part in value.items() if not opens(str(key), part)}
    return [_public(part) for part in value if not opens("", part)] if isinstance(value, list) else value


def opens(key: str, value: Any) -> bool:
    """Whether a value, under this key if it has one, opens some service or stands for what did."""
    if value is None or isinstance(value, bool):
        return False
    name = re.sub("[^a-z]", "", key.lower())
    if name == "token" or name.endswith(_SECRET_KEYS):
        return True
    if not isinstance(value, str):
        return False
    return value == LEFT_OUT or _WITH_PASSWORD.search(value) is not None or _SECRET_TEXT.search(value) is not None
