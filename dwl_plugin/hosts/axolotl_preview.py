"""A config as Axolotl would train it, without training: validated, its tokenizer, rows of its data.

Nothing is written into the config's folders and no weights are read. The rows go through Axolotl's own dataset code, so they are
masked, cut and dropped as in the run. Only their choice is made here: the host merges, shuffles and splits row numbers, and no more
rows than are asked for are tokenised (`docs/decisions/rows-shown-are-rows-trained.md`).
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dwl_plugin.classes import FOLLOWS
from dwl_plugin.classes.data_codes import DATA_CODES
from dwl_plugin.config import Block
from dwl_plugin.config.overrides import SWEEP_FILE, VARIABLE
from dwl_plugin.errors import ConfigError, DWLError, Problem, first_line
from dwl_plugin.hosts.axolotl_data import reading_data
from dwl_plugin.hosts.axolotl_fields import (
    DroppedWeight,
    NumberedRow,
    dropped_weights,
    not_finite,
    numbered,
    unnamed_marks,
    watching,
    wrong_values,
)
from dwl_plugin.hosts.instead import instead
from dwl_plugin.hosts.plugin_line import names_plugin
from dwl_plugin.run.dataset_check import ids_outside, no_rows, no_targets, picked_rows
from dwl_plugin.run.row_codes import RowCodes, RowError, row_number
from dwl_plugin.values import IGNORE_INDEX

__all__ = [
    "ROW",
    "NotSeenError",
    "Part",
    "Rows",
    "dropped_all",
    "every_part",
    "host_schema",
    "import_axolotl",
    "is_prepared",
    "is_stream",
    "load_cfg",
    "load_model",
    "load_rows",
    "load_tokenizer",
    "offline",
    "packs_of",
    "plugin_is_active",
    "quiet",
    "require_rows_that_tokenise",
    "vocabulary_problems",
]

Sample = dict[str, Any]
"""`input_ids`, `labels` and perhaps `position_ids`, each a list of T."""

_GPU = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_89"}
"""Assumed where there is no GPU, so that a GPU's config can be looked at on a laptop."""

_CPU_ONLY = {
    "attn_implementation": "sdpa",
    **dict.fromkeys(("bf16", "fp16", "tf32"), False),
    **{f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")},
}
"""What a model needs to run where there is no GPU."""

_ENVIRONMENT = {"AXOLOTL_DO_NOT_TRACK": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}

ROW = "dwl_row"
"""Key of a sample in a `Part`: the number of its row in the data set, from 0; absent where a row may become several."""

_COLUMNS = ("input_ids", "labels", "position_ids", "attention_mask", DATA_CODES, ROW)

_OUT_OF_REACH = ("offline", "connection", "max retries", "couldn't reach", "could not be loaded", "doesn't exist on the hub")
"""In the messages of errors that are the network's, whatever their type."""


class NotSeenError(DWLError):
    """A part of the run could not be loaded; the message names it and the reason."""


@dataclass(frozen=True)
class Rows:
    """The head of the training data.

    Args:
        samples: in the order of the run.
        packs: for each row of a packed batch, the indices of its samples, packed among themselves where the run packs them with
            all the others; None where a row is a sample.
        total: rows of the training set before any is dropped; None for a stream.
        looked_at: rows that were tokenised.
        too_long: of those, dropped for their length.
        masked: of those, dropped because every label was -100.
        notes: what differs from the run, and marks of the data that no class asks for.
        dropped: weights in the data that change nothing in training.
    """

    samples: list[Sample]
    packs: list[list[int]] | None = None
    total: int | None = None
    looked_at: int = 0
    too_long: int = 0
    masked: int = 0
    notes: list[str] = field(default_factory=list)
    dropped: list[DroppedWeight] = field(default_factory=list)


@dataclass(frozen=True)
class Part:
    """Rows of one data set that stand together.

    Args:
        data_set: its name.
        rows: how many.
        digest: of their content, as the data has it; of their tokens where they come from a stream.
        samples: what the run makes of them, unpacked; those that it drops are not among them.
    """

    data_set: str
    rows: int
    digest: Callable[[], str]
    samples: Callable[[], list[Sample]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The host's logs, bars and warnings, kept from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _without_overrides() -> Iterator[None]:
    """Without the variables of overrides: `raw` has their values already, and keys that it leaves out stay out."""
    kept = {name: os.environ.pop(name) for name in (VARIABLE, SWEEP_FILE) if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


@functools.cache
def _scratch() -> str:
    """A folder that is gone when this process is."""
    folder = tempfile.mkdtemp(prefix="dwl-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """By the hub's own switch: what is in its cache is used, and nothing else is asked for."""
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def import_axolotl() -> None:
    """All of it that a look needs. It is to report to nobody and to write no log of its own."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with quiet(), offline():  # there are packages that look for compiled kernels as soon as they are imported
        import axolotl.cli.config
        import axolotl.loaders
        import axolotl.utils.data.sft  # noqa: F401


def load_cfg(raw: Mapping[str, Any], path: Path, *, to_run: bool = False) -> tuple[Any, list[str]]:
    """The validated config, and what was changed in it. `to_run`: it is about to run here, so a CPU gets a CPU's settings.

    Raises:
        ConfigError: everything that Axolotl or this package refuses.
        NotSeenError: the model's own config could not be read.
    """
    with quiet(), _without_overrides():
        import torch
        from axolotl.cli.config import gpu_capabilities, plugin_set_cfg, prepare_plugins
        from axolotl.utils.config import normalize_cfg_datasets, normalize_config, validate_config
        from axolotl.utils.dict import DictDefault

        cfg, notes = DictDefault(copy.deepcopy(dict(raw))), []
        cfg.axolotl_config_path = str(path)
        cfg.output_dir = _scratch()  # Axolotl writes there while it only looks
        capabilities, versions = gpu_capabilities()
        has_flash_attention = any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface")))
        if not torch.cuda.is_available():
            if to_run:
                cfg.update(_CPU_ONLY)
                notes.append("no GPU here: the model runs in fp32, with sdpa attention")
            else:
                capabilities = _GPU
                notes.append("no GPU here: the config was validated as for one NVIDIA GPU with bf16 (sm_89)")
        elif str(cfg.attn_implementation or "").startswith("flash_attention") and not has_flash_attention:
            cfg.attn_implementation = "sdpa"  # otherwise Axolotl downloads a compiled kernel in its place
            notes.append("flash-attn is not installed here: the config was looked at with `attn_implementation: sdpa`")
        with _axolotl_problems("plugins"):
            prepare_plugins(cfg)
        with _axolotl_problems("axolotl"):
            cfg = validate_config(cfg, capabilities=capabilities, env_capabilities=versions)
        with _loading("base_model", cfg.base_model):
            normalize_config(cfg)
        normalize_cfg_datasets(cfg)
        plugin_set_cfg(cfg)
        kernels = [f"`{key}`" for key in _CPU_ONLY if key.startswith("lora_") and cfg[key]]
        if kernels and not torch.cuda.is_available():
            which = f"the kernels for LoRA, which this config has or Axolotl turns on ({', '.join(kernels)}), run on a GPU only"
            notes.append(f"{which}: to train on this machine, set them to `false`")
    return cfg, notes


def host_schema() -> dict[str, Any]:
    """The JSON Schema of Axolotl's own keys."""
    with quiet():
        from axolotl.utils.schemas.config import AxolotlInputConfig
        from pydantic import PydanticInvalidForJsonSchema
        from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
        from pydantic_core import PydanticSerializationError

        class Tolerant(GenerateJsonSchema):
            """A few of the host's fields are Python objects, which no YAML can write: anything goes there."""

            def generate_inner(self, schema: Any) -> JsonSchemaValue:
                try:
                    return super().generate_inner(schema)
                except (PydanticInvalidForJsonSchema, PydanticSerializationError):
                    return {}

        schema: dict[str, Any] = AxolotlInputConfig.model_json_schema(schema_generator=Tolerant)
    return schema


def plugin_is_active(raw: Mapping[str, Any]) -> bool:
    """Whether Axolotl would load this plugin for the config: by its `plugins:` line, or because it is installed."""
    with quiet():
        from axolotl.integrations import base

        installed: tuple[str, ...] = getattr(base, "get_builtin_plugins", tuple)()  # Axolotl 0.21 finds installed plugins by itself
    return names_plugin(raw) or any("dwl_plugin" in name for name in installed)


def load_tokenizer(cfg: Any) -> Any:
    """Axolotl's tokenizer, with the chat template and the tokens that the config adds. Raises as `load_model`."""
    with quiet():
        from axolotl.loaders import load_tokenizer as load

        with _loading("tokenizer_config" if cfg.tokenizer_config != cfg.base_model else "base_model", cfg.tokenizer_config):
            return load(cfg)


def load_rows(cfg: Any, tokenizer: Any, count: int, block: Block | None = None, *, spread: bool = False) -> Rows:
    """The first `count` rows that training sees, tokenised, masked, cut and dropped as in the run; `spread`: `count` rows from
    all over the data, picked as a run picks those it looks at before its first step. A stream has only its head. They come with the
    codes of what `block` reads of them.

    Raises:
        NotSeenError: the data cannot be reached, or has no tokens before a batch is made.
        ConfigError: Axolotl refuses the data.
    """
    with _reading(cfg, block):
        if is_stream(cfg):
            fields = _Fields(cfg, block)
            with watching(fields.see_of_stream):
                return replace(_stream(cfg, tokenizer, count), notes=fields.notes, dropped=fields.dropped)
        return _packed(_table(cfg, tokenizer, count, block, spread), cfg)


def every_part(cfg: Any, tokenizer: Any, size: int, rows: int | None = None, block: Block | None = None) -> list[Part]:
    """All of the training data, or its first `rows`, in the order of the data and in parts of up to `size` rows: also what the run
    holds out for its evaluation, and from where the data lies, whether or not the host has prepared it. Of a stream `rows` is how
    many. Raises as `load_rows`, and so do the parts."""
    cfg = copy.deepcopy(cfg)
    cfg.dataset_num_proc, cfg.dataset_keep_in_memory = None, True
    with _reading(cfg, block):
        if is_stream(cfg):
            assert rows is not None, "a stream has no end"
            samples = [piece for row in _stream(cfg, tokenizer, rows).samples for piece in _pieces(row)][:rows]
            return [_part_of_stream(_paths(cfg), samples[begin : begin + size]) for begin in range(0, len(samples), size)]
        sources = _raw_datasets(cfg, tokenizer)
    parts, left = [], sum(len(dataset) for dataset, _ in sources) if rows is None else rows
    for dataset, how in sources:
        count = min(len(dataset), left)
        parts += [_part(cfg, dataset, range(begin, min(begin + size, count)), how) for begin in range(0, count, size)]
        left -= count
    if not parts:
        raise _no_rows(cfg)
    return parts


def _part(cfg: Any, dataset: Any, numbers: range, how: Any) -> Part:
    def digest() -> str:
        return _digest(dataset[numbers.start : numbers.stop])

    def samples() -> list[Sample]:
        with _reading(cfg):
            return _made_for_run(cfg, dataset, numbers, how)

    source = how.keywords["dataset_config"]
    return Part(str(source.name or source.path), len(numbers), digest, samples)


def _made_for_run(cfg: Any, dataset: Any, numbers: range, how: Any) -> list[Sample]:
    from axolotl.utils.data import sft

    made = _tokenised(dataset, numbers, how)
    if not len(made):
        return []
    if "input_ids" not in made.column_names:
        raise _made_with_a_batch()
    if len(made) == len(numbers):  # else the host drops some, or cuts them up
        made = made.add_column(ROW, [row_number(dataset, number) for number in numbers])
    kept = sft.handle_long_seq_in_dataset(made, cfg.sequence_len, cfg)
    if cfg.sample_packing and len(kept):
        try:
            kept = sft.process_datasets_for_packing(cfg, kept, None)[0]
        except ValueError as error:
            if not dropped_all(error):
                raise
            return []
    return [piece for row in _samples(kept) for piece in _pieces(row)]


def _part_of_stream(name: str, samples: list[Sample]) -> Part:
    return Part(name, len(samples), lambda: _digest(samples), lambda: samples)


def _pieces(row: Sample) -> Iterator[Sample]:
    """The samples of a row; where it has several, those with a target."""
    starts = [at for at, position in enumerate(row.pop("position_ids", [0])) if position == 0]
    for begin, end in itertools.pairwise((*starts, len(row["input_ids"]))):
        piece = {key: values[begin:end] if isinstance(values, list) else values for key, values in row.items()}
        if len(starts) == 1 or any(label != IGNORE_INDEX for label in piece["labels"]):
            yield piece


def _digest(rows: Any) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=repr).encode()).hexdigest()


def is_stream(cfg: Any) -> bool:
    """Whether the training data is read as it comes, without an end that is known."""
    return bool(cfg.streaming or cfg.pretraining_dataset)


@contextlib.contextmanager
def _reading(cfg: Any, block: Block | None = None) -> Iterator[None]:
    """Whatever goes wrong with the data, as `load_rows` raises it."""
    with quiet(), _nothing_cached_beside_the_data(), reading_data(cfg, block):
        from axolotl.integrations.base import BasePlugin, PluginManager

        for name, plugin in PluginManager.get_instance().plugins.items():
            if type(plugin).load_datasets is not BasePlugin.load_datasets and "dwl_plugin" not in name:
                raise NotSeenError(f"datasets: they are made by the plugin {name} when the run starts")
        try:
            yield
        except DWLError:
            raise
        except StopIteration:  # what the host makes of a file without a row
            raise _no_rows(cfg) from None
        except Exception as error:  # whatever a dataset and its template can raise
            if dropped_all(error):
                raise ConfigError([no_targets(None)]) from None
            if isinstance(error, OSError) or any(words in str(error).lower() for words in _OUT_OF_REACH):
                raise NotSeenError(f"datasets: {first_line(error)}") from error
            raise ConfigError.at("datasets", f"Axolotl cannot read them: {first_line(error)}") from error


def dropped_all(error: Exception) -> bool:
    """Whether the host's packing found a target in no row."""
    return isinstance(error, ValueError) and "no trainable tokens" in str(error)


@contextlib.contextmanager
def _nothing_cached_beside_the_data() -> Iterator[None]:
    """A dataset that was saved to a folder keeps what is made of it there."""
    import datasets

    was_enabled = datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_caching()


def vocabulary_problems(cfg: Any, tokenizer: Any, samples: Iterable[Sample]) -> Iterator[Problem]:
    """As `ids_outside`, for the model of the config."""
    from axolotl.loaders.utils import load_model_config

    with quiet(), _loading("base_model", cfg.base_model):
        config = load_model_config(cfg)
    asked = math.ceil(len(tokenizer) / 32) * 32 if cfg.resize_token_embeddings_to_32x else len(tokenizer)
    text_config = getattr(config, "get_text_config", lambda: config)()
    size = asked if cfg.shrink_embeddings else max(asked, getattr(text_config, "vocab_size", None) or 0)
    yield from ids_outside(samples, size)


def load_model(cfg: Any, tokenizer: Any) -> Any:
    """The model as training begins with it: quantised, with its adapter, in evaluation mode.

    Raises:
        NotSeenError: it lies on the hub, and the hub does not give it.
        ConfigError: anything else that keeps it from being loaded.
    """
    with quiet():
        from axolotl.loaders import ModelLoader

        with _loading("base_model", cfg.base_model):
            return ModelLoader(cfg, tokenizer).load()[0].eval()


def _raised_by_axolotl(error: BaseException) -> bool:
    import axolotl

    where = traceback.extract_tb(error.__traceback__)[-1].filename
    return where.startswith(tuple(axolotl.__path__))


@contextlib.contextmanager
def _loading(key: str, name: Any) -> Iterator[None]:
    """What is here and cannot be read is the config's mistake; what the hub has may be out of reach."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (ValueError, NotImplementedError)) and _raised_by_axolotl(error):  # it refuses something else
            raise ConfigError.at("axolotl", first_line(error)) from error
        exists = Path(str(name)).exists()
        if isinstance(error, OSError) and not exists:
            raise NotSeenError(f"{key} {name}: {first_line(error)}") from error
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise ConfigError.at(key, f"cannot be loaded: {kind}{first_line(error)}", name) from error


def _table(cfg: Any, tokenizer: Any, count: int, block: Block | None, spread: bool) -> Rows:
    """Rows of datasets that can be indexed."""
    import numpy as np
    from axolotl.common.const import DEFAULT_DATASET_PREPARED_PATH
    from axolotl.utils.data import sft
    from datasets import concatenate_datasets

    cfg = copy.deepcopy(cfg)
    cfg.dataset_num_proc, cfg.dataset_keep_in_memory = None, True
    prepared = _prepared(cfg, tokenizer, "datasets")
    sources, order = [], prepared
    if prepared is None:
        sources = _raw_datasets(cfg, tokenizer)
        order = _order_of_the_run([len(dataset) for dataset, _ in sources], cfg)
    if not len(order):
        raise _no_rows(cfg)
    total = _training_rows(len(order), cfg)
    if total < 1:
        raise ConfigError([no_rows(why=f"`val_set_size` takes all {len(order):,} of the data", value=cfg.val_set_size)])
    head = order.select(picked_rows(total, cfg.seed or 0, count) if spread else range(min(count, total)))
    if prepared is not None:
        folder = cfg.dataset_prepared_path or DEFAULT_DATASET_PREPARED_PATH
        note = f"the rows are those prepared earlier under {folder}, as the run would take them; their files were not looked at"
        return Rows(_samples(head), total=total, looked_at=len(head), notes=[note])

    picked = head.with_format("numpy")[:]
    by_source = [(picked["row"][picked["source"] == k], dataset, how) for k, (dataset, how) in enumerate(sources)]
    by_source = [source for source in by_source if len(source[0])]
    fields = _Fields(cfg, block)
    for numbers, dataset, how in by_source:
        fields.see(numbered(dataset, sorted(map(int, numbers))), how.keywords["dataset_config"])
    fields.require_right()
    tokenised = [_tokenised(dataset, numbers, how) for numbers, dataset, how in by_source]
    if not all("input_ids" in rows.column_names for rows in tokenised):
        raise _made_with_a_batch()
    merged = concatenate_datasets(tokenised)
    if len(merged) == len(picked["row"]):  # none was dropped on the way, so the rows of one source can go between those of another
        merged = merged.select(np.argsort(np.argsort(picked["source"], kind="stable")))
    merged = merged.flatten_indices(keep_in_memory=True)
    short = sft.handle_long_seq_in_dataset(merged, cfg.sequence_len, cfg)
    kept = sft.process_datasets_for_packing(cfg, short, None)[0] if cfg.sample_packing else short
    too_long, masked = len(merged) - len(short), len(short) - len(kept)
    return Rows(_samples(kept), None, total, len(merged), too_long, masked, fields.notes, fields.dropped)


class _Fields:
    """What is to say of the fields of rows: `problems` are of values that `block` cannot take for a factor or a mark."""

    def __init__(self, cfg: Any, block: Block | None) -> None:
        self.weights = None if block is None else block.data_weights
        self.block = block if block is not None and block.reads_data else None
        self.trains_inputs = bool(cfg.train_on_inputs)
        self.packs_streams = bool(cfg.sample_packing)  # after they were shuffled
        self.problems = not_finite(cfg, block)
        self.dropped: list[DroppedWeight] = []
        self.notes: list[str] = []

    def see(self, rows: Sequence[NumberedRow], source: Any) -> None:
        known = {(weight.level, weight.path) for weight in self.dropped}
        found = dropped_weights(rows, source, self.weights, self.trains_inputs)
        self.dropped += [weight for weight in found if (weight.level, weight.path) not in known]
        if self.block is not None:
            self.problems += wrong_values(rows, source, RowCodes.of(self.block))
            self.notes += [note for note in unnamed_marks(rows, source, self.block.marks) if note not in self.notes]

    def see_of_stream(self, rows: Sequence[NumberedRow], source: Any) -> None:
        """The next rows; what is wrong with them is raised before tokens are made of them."""
        self.see([(None, row) for _, row in rows] if self.packs_streams else rows, source)
        self.require_right()

    def require_right(self) -> None:
        ConfigError.raise_any({str(problem): problem for problem in self.problems}.values())


def is_prepared(cfg: Any, tokenizer: Any, key: str, block: Block | None = None) -> bool:
    """Whether the host has the rows of `key` on this disk as it made them earlier, and will not read their files."""
    try:
        with quiet(), reading_data(cfg, block):
            return _prepared(cfg, tokenizer, key) is not None
    except (OSError, ValueError):  # a folder that breaks off
        return False


def _prepared(cfg: Any, tokenizer: Any, key: str) -> Any:
    """The rows of `key` as the host made them earlier; None where it would make them anew."""
    from axolotl.utils.data.shared import generate_dataset_hash_from_config, load_preprocessed_dataset

    return load_preprocessed_dataset(cfg, generate_dataset_hash_from_config(cfg, cfg[key], tokenizer.name_or_path))


def require_rows_that_tokenise(cfg: Any, tokenizer: Any) -> None:
    """Raise `ConfigError` for the first row of the training or evaluation data that the host cannot tokenise."""
    cfg = copy.deepcopy(cfg)
    cfg.dataset_num_proc, cfg.dataset_keep_in_memory = None, True
    with quiet(), _nothing_cached_beside_the_data():
        for key in ("datasets", "test_datasets"):
            for dataset, how in _raw_datasets(cfg, tokenizer, key):
                _tokenised(dataset, range(len(dataset)), how)


def _tokenised(dataset: Any, numbers: Sequence[int], how: Any) -> Any:
    """These rows of a dataset as the host makes them. Raises `ConfigError` with the first that it cannot."""
    try:
        return _made(dataset, numbers, how)
    except RowError as found:
        raise found if found.number is None else found.numbered(row_number(dataset, int(numbers[found.number]))) from None
    except (OSError, ConfigError):
        raise
    except Exception as whole:  # whatever a prompt's strategy and its template make of a row
        error, last = whole, int(numbers[-1])
        while len(numbers) > 1:
            half = numbers[: len(numbers) // 2]
            try:
                _made(dataset, half, how)
            except Exception as nearer:
                error, numbers = nearer, half
            else:
                numbers = numbers[len(half) :]
        source = how.keywords["dataset_config"]
        row = dict(dataset[int(numbers[0])])
        said = f"{type(error).__name__}: {first_line(error)}"
        why, which = _odd_messages(row, source) or f"Axolotl stops at it: {said}", f"row {int(numbers[0]) + 1:,}"
        if last != numbers[0] and said == _said_of(dataset, last, how):  # more likely the settings or the columns than the row
            first, second = sorted((int(numbers[0]) + 1, last + 1))
            why, which = f"Axolotl stops at both, and perhaps at all: {said}", f"rows {first:,} and {second:,}"
        raise ConfigError.at("datasets", f"{which} of {source.path}: {why}", row) from error


def _made(dataset: Any, numbers: Sequence[int], how: Any) -> Any:
    return how(dataset=dataset.select(numbers).flatten_indices(keep_in_memory=True))[0]


def _said_of(dataset: Any, number: int, how: Any) -> str:
    """What the host says of one row that it cannot tokenise."""
    try:
        _made(dataset, [number], how)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def _odd_messages(row: Mapping[str, Any], source: Any) -> str:
    """What is wrong with a conversation, where that can be seen without a template."""
    if not str(source.type).startswith("chat_template"):
        return ""
    field = source.field_messages or "messages"
    messages = row.get(field)
    if not isinstance(messages, list):
        return f"it has no list under `{field}`" + ("" if field in row else f"; its columns are {', '.join(row)}")
    if not messages:
        return f"its `{field}` is empty"
    odd = [k for k, message in enumerate(messages) if not isinstance(message, Mapping)]
    return f"`{field}[{odd[0]}]` is no message" if odd else ""


def _raw_datasets(cfg: Any, tokenizer: Any, key: str = "datasets") -> list[tuple[Any, Any]]:
    """Each dataset before it is tokenised, and what tokenises it."""
    from axolotl.utils.data import sft
    from axolotl.utils.data.shared import datasets_with_name_generator

    sources: list[tuple[Any, Any]] = []
    tokenise = sft.get_dataset_wrapper

    def keep(*, dataset: Any, **how: Any) -> tuple[Any, None]:
        sources.append((dataset, functools.partial(tokenise, **how)))
        return dataset, None

    with instead(sft, "get_dataset_wrapper", keep):
        for config in datasets_with_name_generator(cfg[key] or []):
            split = "train" if key == "datasets" else "test"
            sft._load_and_process_single_dataset(dataset_config=config, cfg=cfg, tokenizer=tokenizer, split=split, seed=cfg.seed)
    return sources


def _order_of_the_run(lengths: list[int], cfg: Any) -> Any:
    """(source, row) in the order in which the host merges and shuffles, found on row numbers alone."""
    from axolotl.utils.data import sft
    from axolotl.utils.data.shared import merge_datasets
    from datasets import Dataset

    numbers = [Dataset.from_dict({"source": [k] * length, "row": list(range(length))}) for k, length in enumerate(lengths)]
    return sft._apply_dataset_sharding(merge_datasets(numbers, cfg), cfg)


def _training_rows(rows: int, cfg: Any) -> int:
    """Those left when the validation set is cut off the end."""
    held_out = cfg.val_set_size or 0
    return rows - (math.ceil(rows * held_out) if 0 < held_out < 1 else int(held_out))


def _samples(dataset: Any) -> list[Sample]:
    columns = [name for name in _COLUMNS if name in dataset.column_names]
    if "labels" not in columns:
        raise _made_with_a_batch()
    return [dict(row) for row in dataset.select_columns(columns).with_format(None)]


def _made_with_a_batch() -> NotSeenError:
    return NotSeenError("datasets: the tokens and labels of this kind of data are made only when a batch is")


def _packed(rows: Rows, cfg: Any) -> Rows:
    if not cfg.sample_packing or not rows.samples:
        return rows
    return replace(rows, packs=packs_of(rows.samples, cfg))


def packs_of(samples: list[Sample], cfg: Any) -> list[list[int]]:
    """The rows that Axolotl's own sampler packs `samples` into, as their indices; all but the first of each become `FOLLOWS`."""
    import numpy as np
    from axolotl.utils.samplers import MultipackBatchSampler
    from torch.utils.data import SequentialSampler

    real = bool(cfg.multipack_real_batches)
    sampler = MultipackBatchSampler(
        SequentialSampler(range(len(samples))),
        batch_size=cfg.micro_batch_size if real else 1,
        batch_max_len=cfg.sequence_len if real else cfg.sequence_len * cfg.micro_batch_size,
        lengths=np.array([len(sample["input_ids"]) for sample in samples]),
        bin_size=cfg.sample_packing_bin_size or 200,
        sequential=bool(cfg.sample_packing_sequentially),
        group_size=cfg.sample_packing_group_size or 100_000,
        num_processes=1,
        drop_last=False,
    )
    packs = sorted(sorted(map(int, pack)) for batch in sampler.generate_batches() for pack in batch)
    for index in (index for pack in packs for index in pack[1:]):
        samples[index][FOLLOWS] = True
    return packs


def _stream(cfg: Any, tokenizer: Any, count: int) -> Rows:
    """Rows of a stream; each may hold several samples, told apart by `position_ids`."""
    import numpy as np
    from axolotl.utils.data import sft

    cfg = copy.deepcopy(cfg)
    cfg.dataset_num_proc = None
    cfg.streaming_multipack_buffer_size = min(cfg.streaming_multipack_buffer_size or count, max(count, 64))
    cfg.val_set_size = 0
    dataset = sft._prepare_streaming_dataset(cfg, tokenizer, None)[0]
    samples = []
    for row in itertools.islice(dataset, count):
        if "input_ids" not in row:
            raise _made_with_a_batch()
        flat = {key: np.asarray(row[key]).reshape(-1).tolist() for key in _COLUMNS if key in row}
        flat.setdefault("labels", list(flat["input_ids"]))  # pretraining: the collator makes them of the ids
        samples.append(flat)
    if not samples:
        raise _no_rows(cfg)
    return Rows(samples, looked_at=len(samples))


def _no_rows(cfg: Any) -> ConfigError:
    key = "pretraining_dataset" if cfg.pretraining_dataset else "datasets"
    return ConfigError([no_rows(key, value=_paths(cfg))])


def _paths(cfg: Any) -> str:
    named = cfg.pretraining_dataset or cfg.datasets
    return str(named) if isinstance(named, str) else ", ".join(str(dataset.path) for dataset in named)


@contextlib.contextmanager
def _axolotl_problems(where: str) -> Iterator[None]:
    """Whatever is complained of inside, as a `ConfigError`."""
    from pydantic import ValidationError

    try:
        yield
    except ConfigError:
        raise
    except ValidationError as error:
        raise ConfigError(map(_problem, error.errors())) from error
    except ImportError as error:
        raise ConfigError.at(where, f"cannot be loaded: {first_line(error)}") from error
    except Exception as error:  # a validator may raise anything
        raise ConfigError.at(where, first_line(error)) from error


def _problem(item: Any) -> Problem:
    path = ".".join(str(part) for part in item["loc"]) or "axolotl"
    message = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not item["loc"] or not _is_plain(item["input"]):
        return Problem(path, f"Axolotl: {message}" if item["loc"] else message)
    return Problem(path, f"Axolotl: {message}", item["input"])


def _is_plain(value: Any) -> bool:
    """Whether it is a value of YAML: a validator may have been given objects of the host."""
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if isinstance(value, list) else value is None or isinstance(value, (str, int, float))
