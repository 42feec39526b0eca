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
    """`key` is a YAML path in which `*` is each item of a list, or the mapping itself; `**` is any text below."""

    key: str
    does: Does
    what: str
    when: Callable[[Any], bool] = bool


def _foreign_plugin(name: Any) -> bool:
    module = str(name).partition(":")[0]
    return not re.match(r"(dwl_plugin|axolotl\.integrations)(\.|$)", module)


def _module_path(value: Any) -> bool:
    """A dataset type with dots in it is imported, wherever it lies; `x.load_y` only names a function of the host's own x."""
    last = value.rsplit(".", 1)[-1] if isinstance(value, str) else ""
    return isinstance(value, str) and "." in value and not (last == "load" or last.startswith("load_"))


def _script(value: Any) -> bool:
    files = value if isinstance(value, list) else [value]
    return any(isinstance(file, str) and file.endswith(".py") for file in files)


def _repository(value: Any) -> bool:
    """`org/name`, which the kernels hub would resolve to compiled code."""
    return isinstance(value, str) and "/" in value


def _remote_code(value: Any) -> bool:
    return isinstance(value, Mapping) and any(value.get(key) for key in ("trust_remote_code", "auto_map", "code_revision"))


def _url(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and "://" in item and not item.startswith("file://") for item in values)


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
    return any(
        os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")).expanduser()


_PACKAGED = ("json", "csv", "parquet", "arrow", "text", "xml", "webdataset", "imagefolder", "audiofolder", "videofolder")


def _data_on_hub(value: Any) -> bool:
    return value not in _PACKAGED and _on_hub("dataset")(value)


def _pack_on_hub(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("hf://")


_DATASETS = ("datasets", "test_datasets", "pretraining_dataset")

RULES: tuple[Rule, ...] = (
    Rule("plugins.*", "runs code", "Axolotl imports this module and runs its hooks", _foreign_plugin),
    Rule("trust_remote_code", "runs code", "Python that lies beside the model's weights is run"),
    *(Rule(f"{key}.*.trust_remote_code", "runs code", "Python that lies beside the data is run") for key in _DATASETS),
    Rule("overrides_of_model_config", "runs code", "turns on Python that lies beside the model's weights", _remote_code),
    Rule("overrides_of_model_kwargs", "runs code", "turns on Python that lies beside the model's weights", _remote_code),
    Rule("cls_model_config", "runs code", "Axolotl imports this class by its path", _module_path),
    Rule("trainer_cls", "runs code", "Axolotl imports this class and trains with it"),
    *(Rule(f"{key}.*.type", "runs code", "Axolotl imports this module to read the data", _module_path) for key in _DATASETS),
    *(Rule(f"{key}.*.input_transform", "runs code", "Axolotl imports this function to read the data") for key in _DATASETS),
    *(
        Rule(f"{key}.*.{field}", "runs code", "a dataset script is Python that is run", _script)
        for key in _DATASETS
        for field in ("path", "ds_type", "data_files")
    ),
    Rule("trl.reward_funcs.*", "runs code", "Axolotl imports this function"),
    Rule("trl.rollout_func", "runs code", "Axolotl imports this function"),
    Rule("attn_implementation", "runs code", "a compiled kernel is downloaded and run", _repository),
    Rule("experts_implementation", "runs code", "a compiled kernel is downloaded and run", _repository),
    Rule("use_kernels", "runs code", "compiled kernels are downloaded and run"),
    Rule("eval_causal_lm_metrics.*", "runs code", "a metric's script is downloaded and run", _repository),
    *(
        Rule(key, "fetches", "config and tokenizer, and for a run the weights, come from the hub", _on_hub("model"))
        for key in ("base_model", "base_model_config", "tokenizer_config", "processor_config", "lora_model_dir")
    ),
    *(Rule(f"{key}.*.path", "fetches", "the data comes over the network", _data_on_hub) for key in _DATASETS),
    Rule("pretraining_dataset", "fetches", "the data comes over the network", _on_hub("dataset")),
    *(Rule(f"{key}.*.ds_type", "fetches", "the reader of the data comes from the hub", _data_on_hub) for key in _DATASETS),
    *(Rule(f"{key}.*.data_files", "fetches", "the data comes over the network", _url) for key in _DATASETS),
    Rule("dwl.**", "fetches", "a pack of classes comes from the hub", _pack_on_hub),
)


def dangers(raw: Mapping[str, Any]) -> list[Danger]:
    """What `RULES` find in a config that was only parsed, one entry per line of it."""
    found: dict[str, Danger] = {}
    for rule in RULES:
        for path, value in _at(raw, rule.key.split("."), ""):
            if value is not None and rule.when(value):
                found.setdefault(path, Danger(path, value, rule.does, rule.what))
    return sorted(found.values(), key=lambda danger: danger.does == "fetches")


def _at(node: Any, keys: list[str], path: str) -> Iterator[tuple[str, Any]]:
    """The values that a rule's key leads to, with their own paths."""
    if not keys:
        yield path, node
    elif keys[0] == "**":
        yield from _below(node, path)
    elif keys[0] == "*":
        if isinstance(node, list):
            for index, item in enumerate(node):
                yield from _at(item, keys[1:], f"{path}[{index}]")
        else:
            yield from _at(node, keys[1:], path)
    elif isinstance(node, Mapping) and keys[0] in node:
        yield from _at(node[keys[0]], keys[1:], f"{path}.{keys[0]}".lstrip("."))


def _below(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _below(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, item in enumerate(node):
            yield from _below(item, f"{path}[{index}]")
    else:
        yield path, node
