"""What a config of somebody else could run or fetch on this machine, in one table.

Axolotl and transformers import modules, run model code and download by name, as the YAML tells them. The commands that look
into a config list such lines and stop there, until they are told to go on.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from dwl_plugin.config.pack_files import is_fetched
from dwl_plugin.errors import DWLError, printable
from dwl_plugin.files import read_regular

__all__ = ["PACKS", "RULES", "Danger", "Rule", "dangers", "fetched_packs", "runs_code", "stop_at_packs"]

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


Test = Callable[[Any, Mapping[str, Any]], bool]
"""Of a value, and of all that stands beside it: key -> value, under Axolotl's own names."""


@dataclass(frozen=True)
class Rule:
    """`keys` are YAML paths in which `*` is each item of a list, or the mapping itself; `**` is anything below."""

    does: Does
    what: str
    keys: tuple[str, ...]
    when: Test = lambda value, beside: bool(value)


def _foreign(name: Any) -> bool:
    """Whether a module is neither this package's nor one of Axolotl's integrations."""
    return not re.match(r"(dwl_plugin|axolotl\.integrations)(\.|$)", str(name).partition(":")[0])


def _foreign_plugin(name: Any, beside: Mapping[str, Any]) -> bool:
    """Or no plugin at all: Axolotl calls whatever has the name."""
    return _foreign(name) or not re.fullmatch(r"[\w.]+\.\w+Plugin", str(name))


def _reports(name: Any, beside: Mapping[str, Any]) -> bool:
    return bool(re.match(r"axolotl\.integrations\.(spectrum|swanlab)\b", str(name)))


def _module_path(value: Any, beside: Mapping[str, Any]) -> bool:
    """A dataset type with dots in it is imported, wherever it lies; `x.load_y` only names a function of the host's own x."""
    if not isinstance(value, str) or "." not in value:
        return False
    own = re.fullmatch(r"[^.].*\.load(_[^.]*)?", value, re.DOTALL)
    return not own and _foreign(value)


def _dotted_types(value: Any, beside: Mapping[str, Any]) -> bool:
    """Under `rl` the x of `x.load_y` is no module of the host's own."""
    return any("." in str(name) for key in _DATA for _, name, _ in _at(beside, [key, "*", "type"], "", frozenset()))


def _not_like(pattern: str) -> Test:
    """Whether a name that is looked up in transformers is none of the kind that belongs there."""
    return lambda value, beside: not re.fullmatch(pattern, str(value))


def _any_string(test: Callable[[str], bool]) -> Callable[[Any], bool]:
    """Whether a value, or anything in it, is a string of that kind."""
    return lambda value: any(isinstance(leaf, str) and test(leaf) for _, leaf in _leaves(value))


_is_url = _any_string(lambda text: "::" in text or any(scheme != "file" for scheme in re.findall(r"([^/:]*)://", text)))
_is_script = _any_string(lambda text: text.endswith(".py"))


def _url(value: Any, beside: Mapping[str, Any]) -> bool:
    return _is_url(value)


def _repository(value: Any, beside: Mapping[str, Any]) -> bool:
    """`org/name`, which the kernels hub would resolve to compiled code."""
    return isinstance(value, str) and "/" in value


_SAFE = {"trust_remote_code": False, "use_kernels": False, "allow_all_kernels": False, "weights_only": True}
_WORDS = (
    *("dtype", "torch_dtype", "type", "rope_type", "hidden_act", "hidden_activation", "attn_implementation", "mode"),
    *("cache_implementation", "padding_side", "truncation_side", "bnb_4bit_quant_type", "bnb_4bit_compute_dtype"),
)
"""Keys of free settings whose strings are words of their own, and no names of anything that lies somewhere."""


def _leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What is no mapping and no list, each with the last key above it; aliases of YAML are gone through once."""
    stack, seen = [(key, node)], set[tuple[str, int]]()
    while stack:
        key, node = stack.pop()
        if not isinstance(node, (Mapping, list)):
            yield key, node
        elif (key, id(node)) not in seen:
            seen.add((key, id(node)))
            stack.extend(
                ((str(name), item) for name, item in node.items()) if isinstance(node, Mapping) else ((key, item) for item in node)
            )


def _opens(value: Any, beside: Mapping[str, Any]) -> bool:
    """Whether free settings, which a loader is given as they stand, switch code on or name anything: numbers do neither."""
    for key, leaf in _leaves(value):
        if key in _SAFE:
            if leaf is not None and bool(leaf) is not _SAFE[key]:
                return True
        elif isinstance(leaf, str) and (key not in _WORDS or not re.fullmatch(r"[\w -]*", leaf)):
            return True
    return False


_READERS = frozenset(("json", "csv", "parquet", "arrow", "text", "xml", "webdataset", "imagefolder", "audiofolder", "videofolder"))
"""Of the `datasets` library, those that were read and only parse."""

_OTHER_READERS = frozenset(
    (
        *("pandas", "cache", "sql", "spark", "generator", "iceberg", "lance", "hdf5", "eval", "conll", "tsfile"),
        *("meshfolder", "niftifolder", "pdffolder", "folder_based_builder"),
    )
)
"""The others: pandas unpickles, iceberg imports what it is told to, and of the rest nobody makes rows of text."""


def _is_list(value: Any, beside: Mapping[str, Any]) -> bool:
    return isinstance(value, list)


def _foreign_reader(value: Any, beside: Mapping[str, Any]) -> bool:
    return not (isinstance(value, str) and value in _READERS)


def _reader_or_script(value: Any, beside: Mapping[str, Any]) -> bool:
    """A path that names a reader is that reader, whatever folder has the same name."""
    if not isinstance(value, str):
        return False
    return value in _OTHER_READERS or _is_script(value) or os.path.isfile(os.path.join(value, f"{Path(value).name}.py"))


def _script(value: Any, beside: Mapping[str, Any]) -> bool:
    return _is_script(value)


def _from_hub(kind: str, here: Callable[[str], bool], revision: str = "") -> Test:
    """Whether the hub is asked for a name.

    Args:
        kind: "model" or "dataset".
        here: whether what loads it takes a name for something on this disk.
        revision: the key beside it that asks for another revision than the newest.
    """

    def asked(value: Any, beside: Mapping[str, Any]) -> bool:
        return isinstance(value, str) and (_is_url(value) or (not here(value) and _asked(kind, value, beside.get(revision))))

    return asked


def _asked(kind: str, name: str, revision: Any) -> bool:
    try:
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:  # then there is no Axolotl either
        return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name))
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        snapshot_download(name, repo_type=kind, revision=revision and str(revision), local_files_only=True)
    except HFValidationError:  # no name of a repository
        return name.startswith("buckets/")
    except (OSError, ValueError):
        return True
    return False


def _has(file: str) -> Callable[[str], bool]:
    return lambda folder: os.path.isfile(os.path.join(folder, file))


_MAX_BYTES = 16 << 20
"""Of settings that lie beside a model or data."""

_UNASKED = ("btlm", "stablelm_epoch")
"""Kinds of models whose code Axolotl runs whatever `trust_remote_code` says."""


def _folder_runs(value: Any, beside: Mapping[str, Any]) -> bool:
    leaves = _leaves(_settings(value, "config.json")) if isinstance(value, str) else ()
    return any(
        leaf in _UNASKED
        if key == "model_type"
        else key.endswith(("attn_implementation", "experts_implementation")) and "/" in str(leaf)
        for key, leaf in leaves
    )


def _folder_fetches(value: Any, beside: Mapping[str, Any]) -> bool:
    """An adapter without a model: transformers goes on to the model that it names."""
    if not isinstance(value, str) or _has("config.json")(value):
        return False
    settings = _settings(value, "adapter_config.json")
    return isinstance(settings, Mapping) and _model_asked(settings.get("base_model_name_or_path"), beside)


def _card_fetches(value: Any, beside: Mapping[str, Any]) -> bool:
    """The card of a folder of data can say that its files lie elsewhere."""
    if not isinstance(value, str) or not os.path.isdir(value):
        return False
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    found = REGEX_YAML_BLOCK.search(_text(value, "README.md"))
    card = found[2] if found else ""
    return any(_is_url(leaf) for text in (card, _text(value, ".huggingface.yaml")) for _, leaf in _leaves(_configs(text)))


def _configs(text: str) -> Any:
    import yaml

    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        card = yaml.safe_load(text)
        return card.get("configs") if isinstance(card, Mapping) else None
    return None


def _settings(folder: str, file: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):  # what cannot be read is the host's to complain of
        return json.loads(_text(folder, file))
    return None


def _text(folder: str, file: str) -> str:
    with contextlib.suppress(DWLError, ValueError):  # no file, or none of a size that settings have
        return read_regular(Path(folder, file), _MAX_BYTES).decode()
    return ""


def _pack_on_hub(value: Any, beside: Mapping[str, Any]) -> bool:
    return isinstance(value, str) and value.startswith("hf://") and not is_fetched(value)


_DATA = ("datasets", "test_datasets")
_STREAMED = ("pretraining_dataset",)


def _data(*fields: str, of: tuple[str, ...] = (*_DATA, *_STREAMED)) -> tuple[str, ...]:
    return tuple(f"{key}.*.{field}" for key in of for field in fields)


_model_asked = _from_hub("model", os.path.isdir, "revision_of_model")
_data_asked = _from_hub("dataset", os.path.exists, "revision")
_stream_asked = _from_hub("dataset", lambda name: os.path.isdir(name) or name in _READERS)
_adapter_asked = _from_hub("model", _has("adapter_config.json"))

_MODELS = ("base_model", "base_model_config", "tokenizer_config", "processor_config")
_FREE = ("overrides_of_model_config", "overrides_of_model_kwargs", "processor_kwargs")
_COMPILED = ("torch_compile_options", "flex_attn_compile_kwargs")
_PATHS = (*_STREAMED, *_data("path"))

RULES: tuple[Rule, ...] = (
    Rule("runs code", "Axolotl imports this module and runs its hooks", ("plugins.*",), _foreign_plugin),
    Rule("runs code", "Python that lies beside the model's weights is run", ("trust_remote_code",)),
    Rule("runs code", "Python that lies beside the data is run", _data("trust_remote_code")),
    Rule("runs code", "goes to a loader as it stands: it turns on code, or could name some", _FREE, _opens),
    Rule("runs code", "Axolotl imports this class by its path", ("cls_model_config",), _not_like(r"\w+Config")),
    Rule(
        "runs code",
        "Axolotl takes what has this name for the tokenizer",
        ("tokenizer_type",),
        _not_like(r"\w+(Tokenizer|TokenizerFast|Backend)"),
    ),
    Rule("runs code", "Axolotl takes what has this name for the processor", ("processor_type",), _not_like(r"\w+Processor")),
    Rule(
        "runs code", "Axolotl takes what has this name for the model", ("type_of_model",), _not_like(r"\w+(For\w+|HeadModel|Model)")
    ),
    Rule("runs code", "Axolotl imports this class and trains with it", ("trainer_cls",)),
    Rule("runs code", "Axolotl imports this module to read the data", _data("type"), _module_path),
    Rule("runs code", "with it Axolotl imports what stands before the dot in a dataset's type", ("rl",), _dotted_types),
    Rule("runs code", "Axolotl imports this function to read the data", _data("input_transform")),
    Rule(
        "runs code",
        "Axolotl makes a dataset of this list, whatever it names",
        tuple(f"{key}.*" for key in (*_DATA, *_STREAMED)),
        _is_list,
    ),
    Rule("runs code", "a reader of data that does more than parse", _data("ds_type"), _foreign_reader),
    Rule("runs code", "a reader of data that does more than parse, or a script", _PATHS, _reader_or_script),
    Rule("runs code", "a dataset script is Python that is run", _data("data_files"), _script),
    Rule("runs code", "Axolotl imports this function", ("trl.reward_funcs.*", "trl.rollout_func", "hatchery.reward_funcs.*")),
    Rule("runs code", "this module serves the model", ("vllm.serve_module", "vllm.worker_extension_cls")),
    Rule("runs code", "programs in this folder are run", ("export.llama_cpp_dir", "nemo_gym_dir")),
    Rule("runs code", "a server is fetched, built and started as soon as Axolotl reads the config", ("nemo_gym_enabled",)),
    Rule("runs code", "torch's compiler is told which programs to run", _COMPILED, _opens),
    Rule("runs code", "a compiled kernel is downloaded and run", ("attn_implementation", "experts_implementation"), _repository),
    Rule("runs code", "compiled kernels are downloaded and run", ("use_kernels",)),
    Rule("runs code", "a metric's script is downloaded and run", ("eval_causal_lm_metrics.*",), _repository),
    Rule("runs code", "what lies in this folder names code that is run", _MODELS, _folder_runs),
    Rule("fetches", "config and tokenizer, and for a run the weights, come from the hub", _MODELS, _model_asked),
    Rule("fetches", "the adapter comes from the hub", ("lora_model_dir",), _adapter_asked),
    Rule("fetches", "the adapter in this folder is for a model on the hub", _MODELS, _folder_fetches),
    Rule("fetches", "as the model is loaded, it asks or tells a server", ("plugins.*",), _reports),
    Rule("fetches", "the data comes over the network", _data("path", of=_DATA), _data_asked),
    Rule("fetches", "the data is streamed over the network", (*_STREAMED, *_data("path", of=_STREAMED)), _stream_asked),
    Rule("fetches", "files of the data come over the network", _data("data_files"), _url),
    Rule("fetches", "the card in this folder says that the data lies elsewhere", _PATHS, _card_fetches),
)
PACKS = Rule("fetches", "a pack of classes comes from the hub", ("dwl.**",), _pack_on_hub)


_NUMBA = ".numba_config.yaml"
"""Numba, which packs the samples, takes settings from the folder it is imported in; they name modules and files to write."""


def dangers(raw: Mapping[str, Any]) -> list[Danger]:
    """What `RULES` find in a config that was only parsed, one entry per line of it; first what runs code.

    Imports Axolotl, if there is one: its schema has other names for some keys. But not in a folder that has settings for it.
    """
    if os.path.lexists(_NUMBA):
        return [
            Danger("the folder you are in", _NUMBA, "runs code", "numba loads and writes what these settings of it name"),
            *fetched_packs(raw),
        ]
    from dwl_plugin.hosts.axolotl_keys import other_names
    from dwl_plugin.hosts.axolotl_preview import import_axolotl

    own: Set[tuple[str, str]] = frozenset()
    with contextlib.suppress(ImportError):  # then nothing of the config is loaded either
        import_axolotl()
        own = other_names()
    return _found(raw, (*RULES, PACKS), own)


def runs_code(raw: Mapping[str, Any]) -> list[Danger]:
    """The part of `dangers` that runs code, without Axolotl and its other names for keys."""
    return _found(raw, tuple(rule for rule in RULES if rule.does == "runs code"), frozenset())


def fetched_packs(raw: Mapping[str, Any]) -> list[Danger]:
    """The part of `dangers` that is this package's own, without Axolotl."""
    return _found(raw, (PACKS,), frozenset())


def stop_at_packs(config: Path, raw: Mapping[str, Any]) -> None:
    """Raise `DWLError` with the packs that would have to be fetched, if there are any."""
    if packs := fetched_packs(raw):
        listed = "\n".join(f"  {printable(str(danger))}" for danger in packs)
        raise DWLError(f"{printable(str(config))} fetches:\n{listed}\nNothing was fetched. If you trust it, say so with --trust.")


def _found(raw: Mapping[str, Any], rules: tuple[Rule, ...], own: Set[tuple[str, str]]) -> list[Danger]:
    found: dict[str, Danger] = {}
    for rule in rules:
        for path, value, beside in (at for key in rule.keys for at in _at(raw, key.split("."), "", own)):
            if value is not None and rule.when(value, beside):
                found.setdefault(path, Danger(path, value, rule.does, rule.what))
    return list(found.values())


def _at(
    node: Any, keys: list[str], path: str, own: Set[tuple[str, str]], beside: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The values that a rule's key leads to, under any of its names, with their own paths and what stands beside them."""
    first, below = (keys[0], keys if keys[0] == "**" else keys[1:]) if keys else ("", [])
    if isinstance(node, list) and first in ("*", "**"):
        for index, item in enumerate(node):
            yield from _at(item, below, f"{path}[{index}]", own, beside)
    elif isinstance(node, Mapping) and first not in ("", "*"):
        named = {**node, **{key: node[alias] for alias, key in own if alias in node}}
        for key, value in node.items():
            if first in ("**", key) or (key, first) in own:
                yield from _at(value, below, f"{path}.{key}".lstrip("."), own, named)
    elif first == "*":
        yield from _at(node, below, path, own, beside)
    elif first in ("", "**"):
        yield path, node, beside
