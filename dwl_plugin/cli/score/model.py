"""Another model in the place of a config's own, under the config's tokens."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dwl_plugin.cli.analysis import LookedAt
from dwl_plugin.cli.first_look import Raw
from dwl_plugin.errors import ConfigError
from dwl_plugin.files import UnreadableError, read_regular
from dwl_plugin.hosts import axolotl_preview as host

__all__ = ["config_with", "require_same_tokens"]

_ADAPTER = "adapter_config.json"
_OF_THE_OTHER = ("lora_model_dir", "base_model_config", "revision_of_model")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_MAX_BYTES = 1 << 20


def config_with(raw: Mapping[str, Any], model: str) -> Raw:
    """`raw` with another model, or with an adapter on the model it was trained on; the tokenizer stays. Raises `ConfigError`."""
    changed = {key: value for key, value in raw.items() if key not in _OF_THE_OTHER}
    changed["tokenizer_config"] = raw.get("tokenizer_config") or raw.get("base_model")
    if not (Path(model) / _ADAPTER).is_file():
        return changed | {"base_model": model}
    kind = raw.get("adapter") or ("qlora" if raw.get("load_in_4bit") else "lora")
    return changed | {"base_model": _base_of(model) or raw.get("base_model"), "adapter": kind, "lora_model_dir": model}


def require_same_tokens(seen: LookedAt, model: str) -> None:
    """Raise `ConfigError` unless each token of the config's tokenizer has the same id in that of `model`."""
    folder = Path(model)
    if folder.is_dir() and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        if not (folder / _ADAPTER).is_file():
            hint = "put the tokenizer's files beside its weights"
            raise ConfigError.at("--model", "has no tokenizer, so it may mean other tokens by the same ids", model, hint=hint)
        model = str(seen.cfg.base_model)
    cfg = copy.deepcopy(seen.cfg)
    cfg.tokenizer_config = model
    ours, others = seen.tokenizer.get_vocab(), host.load_tokenizer(cfg).get_vocab()
    other = sorted((at, token) for token, at in ours.items() if others.get(token) != at)
    if other:
        at, token = other[0]
        there = f"has the id {others[token]}" if token in others else "is not there"
        message = (
            f"has another tokenizer: of {len(ours):,} tokens {len(other):,} are not the same, such as {token!r}, {at} here, which"
        )
        raise ConfigError.at("--model", f"{message} {there}", model)


def _base_of(adapter: str) -> str | None:
    file = Path(adapter) / _ADAPTER
    try:
        found = json.loads(read_regular(file, _MAX_BYTES))
    except (UnreadableError, ValueError) as error:
        raise ConfigError.at("--model", f"its {_ADAPTER} cannot be read: {error}", adapter) from error
    base = found.get("base_model_name_or_path") if isinstance(found, dict) else None
    return base if isinstance(base, str) else None
