"""What a config of somebody else could run or fetch on this machine, in one table.

Axolotl and transformers import modules, run model code and download by name, as the YAML tells them. The commands that look
into a config list such lines and stop there, until they are told to go on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

__all__ = ["RULES", "Danger", "Rule", "dangers"]

Does = Literal["runs code", "fetches"]


@dataclass(frozen=True)
class Danger:
    """One line of a config that deserves a look before anything is loaded."""

    path: str
    value: Any
    does: Does
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.value}   {self.what}"


@dataclass(frozen=True)
class Rule:
    """`keys` are YAML paths in which `*` is each item of a list, or the mapping itself; `**` is anything below."""

    does: Does
    what: str
    keys: tuple[str, ...]
    when: Callable[[Any], bool] = bool


def _foreign_plugin(name: Any) -> bool:
    module = str(name).partition(":")[0]
    return not re.match(r"(dwl_plugin|axolotl\.integrations)(\.|$)", module)


def _module_path(value: Any) -> bool:
    """A dataset type with dots in it is imported, wherever it lies; `x.load_y` only names a function of the host's own x."""
    last = value.rsplit(".", 1)[-1] if isinstance(value, str) else ""
    return isinstance(value, str) and "." in value and not (last == "load" or last.startswith("load_"))


def _any_string(test: Callable[[str], bool]) -> Callable[[Any], bool]:
    """Whether a value, or an item of it, is a string of that kind."""
    return lambda value: any(isinstance(item, str) and test(item) for item in (value if isinstance(value, list) else [value]))


_script = _any_string(lambda text: text.endswith(".py"))
_url = _any_string(lambda text: "://" in text and not text.startswith("file://"))


def _repository(value: Any) -> bool:
    """`org/name`, which the kernels hub would resolve to compiled code."""
    return isinstance(value, str) and "/" in value


def _remote_code(value: Any) -> bool:
    return isinstance(value, Mapping) and any(value.get(key) for key in ("trust_remote_code", "auto_map", "code_revision"))


_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
_DATA_FILES = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt")


def _on_hub(kind: str) -> Callable[[Any], bool]:
    """Whether a name has to be fetched from the hub: it is no path here, nor in the cache, and the hub may be asked."""

    def fetched(value: Any) -> bool:
        if not isinstance(value, str) or Path(value).expanduser().exists():
            return False
        if _url(value):
            return True
        if _offline() or not _HUB_NAME.fullmatch(value) or value.endswith(_DATA_FILES):
            return False
        return not (_hub_cache() / f"{kind}s--{value.replace('/', '--')}" / "snapshots").is_dir()

    return fetched


def _offline() -> bool:
    said = (os.environ.get(name, "").upper() for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return not {"1", "TRUE", "YES", "ON"}.isdisjoint(said)


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


_PACKAGED = ("json", "csv", "parquet", "arrow", "text", "xml", "webdataset", "imagefolder", "audiofolder", "videofolder")


def _data_on_hub(value: Any) -> bool:
    return value not in _PACKAGED and _on_hub("dataset")(value)


def _pack_on_hub(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("hf://")


def _data(*fields: str) -> tuple[str, ...]:
    return tuple(f"{key}.*.{field}" for key in ("datasets", "test_datasets", "pretraining_dataset") for field in fields)


_MODELS = ("base_model", "base_model_config", "tokenizer_config", "processor_config", "lora_model_dir")
_MODEL_OPTIONS = ("overrides_of_model_config", "overrides_of_model_kwargs")

RULES: tuple[Rule, ...] = (
    Rule("runs code", "Axolotl imports this module and runs its hooks", ("plugins.*",), _foreign_plugin),
    Rule("runs code", "Python that lies beside the model's weights is run", ("trust_remote_code",)),
    Rule("runs code", "Python that lies beside the data is run", _data("trust_remote_code")),
    Rule("runs code", "turns on Python that lies beside the model's weights", _MODEL_OPTIONS, _remote_code),
    Rule("runs code", "Axolotl imports this class by its path", ("cls_model_config",), _module_path),
    Rule("runs code", "Axolotl imports this class and trains with it", ("trainer_cls",)),
    Rule("runs code", "Axolotl imports this module to read the data", _data("type"), _module_path),
    Rule("runs code", "Axolotl imports this function to read the data", _data("input_transform")),
    Rule("runs code", "a dataset script is Python that is run", _data("path", "ds_type", "data_files"), _script),
    Rule("runs code", "Axolotl imports this function", ("trl.reward_funcs.*", "trl.rollout_func")),
    Rule("runs code", "a compiled kernel is downloaded and run", ("attn_implementation", "experts_implementation"), _repository),
    Rule("runs code", "compiled kernels are downloaded and run", ("use_kernels",)),
    Rule("runs code", "a metric's script is downloaded and run", ("eval_causal_lm_metrics.*",), _repository),
    Rule("fetches", "config and tokenizer, and for a run the weights, come from the hub", _MODELS, _on_hub("model")),
    Rule("fetches", "the data comes over the network", _data("path"), _data_on_hub),
    Rule("fetches", "the data comes over the network", ("pretraining_dataset",), _on_hub("dataset")),
    Rule("fetches", "the reader of the data comes from the hub", _data("ds_type"), _data_on_hub),
    Rule("fetches", "the data comes over the network", _data("data_files"), _url),
    Rule("fetches", "a pack of classes comes from the hub", ("dwl.**",), _pack_on_hub),
)


def dangers(raw: Mapping[str, Any]) -> list[Danger]:
    """What `RULES` find in a config that was only parsed, one entry per line of it; first what runs code."""
    found: dict[str, Danger] = {}
    for rule in RULES:
        for path, value in (at for key in rule.keys for at in _at(raw, key.split("."), "")):
            if value is not None and rule.when(value):
                found.setdefault(path, Danger(path, value, rule.does, rule.what))
    return list(found.values())


def _at(node: Any, keys: list[str], path: str) -> Iterator[tuple[str, Any]]:
    """The values that a rule's key leads to, with their own paths."""
    first, below = (keys[0], keys if keys[0] == "**" else keys[1:]) if keys else ("", [])
    if isinstance(node, list) and first in ("*", "**"):
        for index, item in enumerate(node):
            yield from _at(item, below, f"{path}[{index}]")
    elif isinstance(node, Mapping) and first not in ("", "*"):
        for key in node if first == "**" else [first] if first in node else []:
            yield from _at(node[key], below, f"{path}.{key}".lstrip("."))
    elif first == "*":
        yield from _at(node, below, path)
    elif first in ("", "**"):
        yield path, node
