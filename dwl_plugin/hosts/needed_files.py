"""What of this disk a run will read, and what of it is not there or is no file, found before anything is loaded.

A name that could be a repository on the hub is not a missing file: whether the hub has it is not known here.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from dwl_plugin.errors import ConfigError, Problem, closest
from dwl_plugin.files import UnreadableError, kind_of_file, read_regular
from dwl_plugin.hosts.checkpoints import require_whole

__all__ = ["MISSING_DATA", "MODELS", "READERS", "data_entries", "file_problems", "files_read", "on_the_hub_perhaps", "strings"]

MODELS = ("base_model", "base_model_config", "tokenizer_config", "processor_config")
_DATA = ("datasets", "test_datasets", "pretraining_dataset")
READERS = ("json", "csv", "parquet", "arrow", "text")
_ROWS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".txt", ".zst", ".gz", ".xz", ".bz2", ".zip")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".ckpt")
_TAKEN_FIRST = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Of these transformers loads the first that is there: an index of the other format may have been left without its files."""
_MAX_BYTES = 64 << 20
_MOST_BESIDE = 2000
"""Files that are looked through for one of nearly the same name."""

_MOST_FILES = 16
"""Of a folder that are named one by one."""

_FOR_PATH = ("file", "files", "filename", "name", "dataset", "data")
"""What people write for `path`."""

_MISSING_FILE = "there is no such file"
_MISSING_FOLDER = "there is no such folder"
_MISSING_EITHER = "there is no such file or folder"
MISSING_DATA = (_MISSING_FILE, _MISSING_EITHER)
"""What is said of rows that are not there, and is nothing to a run that finds them prepared."""


def file_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """One problem for each key of a config that was only parsed; relative paths are looked up where the command was started."""
    for key in MODELS:
        if isinstance(name := raw.get(key), str) and name:
            yield from _model_problems(key, name, weights=key == "base_model" and not raw.get("reinit_weights"))
    for key in ("datasets", "test_datasets"):
        whole = raw.get(key)
        if whole is not None and not isinstance(whole, list):
            yield Problem(key, "has to be a list", whole, hint="write `- path: …` below it, with the other keys of that data set")
        for index, entry in enumerate(whole if isinstance(whole, list) else ()):
            if not isinstance(entry, (Mapping, list)):
                yield Problem(f"{key}[{index}]", "has to be a mapping, with a `path`", entry)
    for path, entry in data_entries(raw):
        yield from _data_problems(path, entry)
        yield from _template_problems(f"{path}.", entry)
    yield from _template_problems("", raw)
    if isinstance(name := raw.get("deepspeed"), str) and name:
        yield from _deepspeed_problems(name)
    if isinstance(name := raw.get("resume_from_checkpoint"), str):
        yield from _checkpoint_problems(name, raw.get("output_dir"))
    if isinstance(name := raw.get("lora_model_dir"), str) and name and raw.get("adapter"):
        if os.path.isdir(name):
            if not os.path.isfile(os.path.join(name, "adapter_config.json")):
                yield Problem("lora_model_dir", "this folder has no adapter_config.json, so there is no adapter in it", name)
            yield from _special_files("lora_model_dir", name)
        elif not _may_be_on_the_hub(name):
            yield Problem("lora_model_dir", _MISSING_FOLDER, name)


def files_read(raw: Mapping[str, Any]) -> Iterator[str]:
    """What of the model, an adapter and the data lies on this disk, by the names of the config: files, and of a folder those in it
    that hold weights or rows; a folder that has too many, or none, by itself."""
    names = [raw.get(key) for key in (*MODELS, "lora_model_dir")]
    for _, entry in data_entries(raw):
        names += [entry.get("path"), *strings(entry.get("data_files"))]
    for name in dict.fromkeys(name for name in names if isinstance(name, str) and os.path.exists(name)):
        inside = sorted(os.listdir(name)) if os.path.isdir(name) else []
        files = [os.path.join(name, file) for file in inside if file.endswith((*_WEIGHTS, *_ROWS))]
        yield from files if 0 < len(files) <= _MOST_FILES else [name]


def on_the_hub_perhaps(raw: Mapping[str, Any]) -> Iterator[str]:
    """What a run reads and no look gets to, where it is not on this disk and may be on the hub."""
    names = [("lora_model_dir", raw.get("lora_model_dir") if raw.get("adapter") else None)]
    names += [(f"{path}.path", entry.get("path")) for path, entry in data_entries(raw) if path.startswith("test_datasets")]
    for path, name in names:
        if isinstance(name, str) and name and not os.path.exists(name) and _may_be_on_the_hub(name):
            yield f"{path} {name}: it is not on this disk, and whether the hub has it was not asked"


def _may_be_on_the_hub(name: str) -> bool:
    """Or at an address. A name that ends like a file of rows is taken for one."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if "://" in name or "::" in name:
        return True
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.lower().endswith(_ROWS)


def data_entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key in _DATA:
        value = raw.get(key)
        if isinstance(value, str):
            value = {"path": value}
        if isinstance(value, Mapping):
            yield key, value
        for index, entry in enumerate(value if isinstance(value, list) else ()):
            if isinstance(entry, Mapping):
                yield f"{key}[{index}]", entry


def _data_problems(path: str, entry: Mapping[str, Any]) -> Iterator[Problem]:
    name = entry.get("path")
    if name is None and entry.get("data_files") is None and any(isinstance(value, str) for value in entry.values()):
        other = next((key for key in entry if key in _FOR_PATH or closest(key, ["path"])), None)
        hint = f"write `path: {entry[other]}` in place of `{other}`" if other else "write `path: rows.jsonl`, or a name on the hub"
        yield Problem(path, "has no `path`", hint=hint)
    if not isinstance(name, str) or not name:
        return
    if os.path.exists(name):
        yield from _special_files(f"{path}.path", name)
    elif not _may_be_on_the_hub(name):
        yield Problem(f"{path}.path", _MISSING_EITHER, name, hint=_expanded(name) or _near("path", name))
        return
    if name in READERS or os.path.isdir(name):
        for file in strings(entry.get("data_files")):
            if os.path.exists(file):
                yield from _special_files(f"{path}.data_files", file)
            elif not any(mark in file for mark in "*?[:"):
                yield Problem(f"{path}.data_files", _MISSING_FILE, file, hint=_expanded(file) or _near("data_files", file))


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ():
        yield from strings(item)


def _near(key: str, name: str) -> str:
    """The line with the name of a file beside that is a slip of the fingers away, or what else lies there."""
    folder = os.path.dirname(name)
    try:
        with os.scandir(folder or ".") as entries:
            beside = sorted(entry.name for entry in islice(entries, _MOST_BESIDE))
    except OSError:
        return f"there is no folder {folder} either" if folder and not os.path.exists(folder) else ""
    if near := closest(os.path.basename(name), beside):
        return f"write `{key}: {os.path.join(folder, near)}`"
    rows = [file for file in beside if file.lower().endswith(_ROWS)]
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    where = f"in {folder}" if folder else "in the folder that the command is started from"
    return f"files of rows {where}: {', '.join(rows[:5])}{more}" if rows else f"there are no files of rows {where}"


def _expanded(name: str) -> str:
    return "write the folder out: nobody expands `~` here" if name.startswith("~") else ""


def _model_problems(key: str, name: str, weights: bool) -> Iterator[Problem]:
    if not os.path.isdir(name):
        if os.path.exists(name) or not _may_be_on_the_hub(name):
            yield Problem(key, "this is no folder" if os.path.exists(name) else _MISSING_FOLDER, name, hint=_expanded(name))
        return
    yield from (special := list(_special_files(key, name)))
    if weights and not special:
        files = os.listdir(name)
        if not any(file.endswith(_WEIGHTS) for file in files):
            yield Problem(key, "there are no weights in this folder", name)
        taken = next((file for file in _TAKEN_FIRST if file in files), "")
        shards = {str(shard) for shard in _shards(Path(name, taken))} if taken.endswith(".json") else ()
        lost = sorted(shard for shard in shards if not os.path.exists(os.path.join(name, shard)))
        if lost:
            yield Problem(key, f"{len(lost)} files of its weights are not in this folder, {lost[0]} among them", name)


def _shards(index: Path) -> Iterator[Any]:
    try:
        content = json.loads(read_regular(index, _MAX_BYTES))
    except (UnreadableError, ValueError, RecursionError):
        return
    shards = content.get("weight_map") if isinstance(content, dict) else None
    yield from shards.values() if isinstance(shards, dict) else ()


def _special_files(key: str, name: str) -> Iterator[Problem]:
    """To open a pipe means to wait, and a device may have no end."""
    try:
        files = sorted(os.path.join(name, entry) for entry in os.listdir(name)) if os.path.isdir(name) else [name]
    except OSError as error:
        yield Problem(key, f"this folder cannot be read: {error.strerror}", name)
        return
    for file in files:
        try:
            mode = os.stat(file).st_mode
        except OSError:  # a link to nothing, which the host may or may not ask for
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            yield Problem(key, f"{os.path.basename(file)} is no file: it is a {kind_of_file(mode)}", name)


def _template_problems(prefix: str, block: Mapping[str, Any]) -> Iterator[Problem]:
    """What is neither a file nor a template is rendered as it stands, the same for every row."""
    text = block.get("chat_template_jinja")
    if not isinstance(text, str) or not text or block.get("chat_template") not in (None, "jinja"):
        return
    if os.path.isfile(text):
        return
    if len(text) < 4096 and "\n" not in text and os.path.exists(text):
        yield Problem(f"{prefix}chat_template_jinja", "this is no file", text)
    elif "{" not in text:
        yield Problem(f"{prefix}chat_template_jinja", f"{_MISSING_FILE}, and a template it is not", text)


def _deepspeed_problems(name: str) -> Iterator[Problem]:
    if not os.path.exists(name):
        fetched = "`axolotl fetch deepspeed_configs` brings those of Axolotl into this folder"
        yield Problem("deepspeed", _MISSING_FILE, name, hint=fetched if "deepspeed_configs/" in name else "")
        return
    try:
        if not isinstance(json.loads(read_regular(Path(name), _MAX_BYTES)), dict):
            yield Problem("deepspeed", "this file holds no JSON object", name)
    except UnreadableError as error:
        yield Problem("deepspeed", error.why, name)
    except (ValueError, RecursionError):
        yield Problem("deepspeed", "this file is not JSON", name)


def _checkpoint_problems(name: str, output_dir: Any) -> Iterator[Problem]:
    try:
        require_whole(name, Path(output_dir if isinstance(output_dir, str) else "model-out"))
    except ConfigError as error:
        yield from error.problems
    except OSError as error:
        yield Problem("resume_from_checkpoint", f"cannot be read: {error.strerror}", name)
