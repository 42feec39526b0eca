from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import harness, weighed_rows
from tests.hosts.ranks import Ranks

collect_ignore = [] if find_spec("deepspeed") else ["test_deepspeed.py"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    harness.make_tokenizer(folder)
    harness.make_model(folder)
    return folder


@pytest.fixture(scope="session")
def words_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has the marks of many templates."""
    folder = tmp_path_factory.mktemp("words")
    weighed_rows.make_words_model(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", harness.rows(40))


@pytest.fixture(scope="session")
def uneven(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of four rows, the last two of them for the second rank."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    sums, words = [f"{n} and {n + 3} make {2 * n + 3}" for n in range(20)], "the answer is in the words alone "
    steps = [
        [(sums[0], None), (sums[1], 3), (sums[2], None), (words, 5)],
        [(sums[3], None), (sums[4], None), (words, None), (words * 4, None)],  # the second rank has no numbers
        [(sums[5], None), (words, 2), (sums[6], 0), (words, 0)],  # … has no target at all
        [(words, 1), (words, 0), (sums[7], None), (words * 5, None)],  # … has nearly all of them
        [(sums[8], 0), (words, 0), (sums[9], 0), (words, 0)],  # nobody has one
    ]
    rows = [harness.tokenized(tokenizer, text, targets) for step in steps for text, targets in step]
    return harness.write_rows(tmp_path_factory.mktemp("uneven") / "rows.jsonl", rows)


@pytest.fixture
def configure(model_folder: Path, data_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A whole config; keyword arguments change it, None deletes a key."""

    def make(**changes: Any) -> dict[str, Any]:
        folder = Path(changes.pop("out", tmp_path))
        return harness.config(changes.pop("model", model_folder), changes.pop("data", data_file), folder, **changes)

    return make


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever gets as far as loading a model fails."""
    from axolotl.loaders import ModelLoader

    def load(self: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(ModelLoader, "load", load)


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def samples(tokenizer: Any) -> list[dict[str, Any]]:
    """Tokenised rows whose targets are the assistant's reply."""
    out = []
    for row in harness.rows(40):
        question, reply = (message["content"] for message in row["messages"])
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        answer = tokenizer(f"{reply}<|im_end|>")["input_ids"]
        ids = prompt + answer
        out.append({"input_ids": ids, "labels": [-100] * len(prompt) + answer, "attention_mask": [1] * len(ids)})
    return out


@pytest.fixture
def model(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa")


@pytest.fixture
def trainer_of(model: Any, tokenizer: Any, samples: list[dict[str, Any]], tmp_path: Path) -> harness.Build:
    """A plain `Trainer`; keyword arguments go to it, `arguments` to its arguments."""

    def make(arguments: dict[str, Any] | None = None, kind: type | None = None, **changes: Any) -> Any:
        from datasets import Dataset
        from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

        parts = {
            "model": model,
            "args": TrainingArguments(output_dir=str(tmp_path / "trainer"), **{**harness.ARGUMENTS, **(arguments or {})}),
            "data_collator": DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64),
            "train_dataset": Dataset.from_list(samples),
            "processing_class": tokenizer,
        }
        return (kind or Trainer)(**{**parts, **changes})

    return make


@pytest.fixture
def sft_of(model: Any, tokenizer: Any, samples: list[dict[str, Any]], tmp_path: Path) -> harness.Build:
    """TRL's `SFTTrainer`."""

    def make(arguments: dict[str, Any] | None = None, kind: type | None = None, **changes: Any) -> Any:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        settings = {**harness.ARGUMENTS, "max_length": None, "pad_to_multiple_of": 64, **(arguments or {})}
        parts = {"model": model, "train_dataset": Dataset.from_list(samples), "processing_class": tokenizer}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what TRL is about to drop
            parts["args"] = SFTConfig(output_dir=str(tmp_path / "sft"), **settings)
            return (kind or SFTTrainer)(**{**parts, **changes})

    return make


@pytest.fixture
def coming_back(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The gradients that come back into the fused loss, one of each micro-batch."""
    from dwl_plugin.loss import seam

    seen: list[float] = []
    original = seam.fused_cross_entropy

    def fused(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if out.loss.requires_grad:
            out.loss.register_hook(lambda gradient: seen.append(float(gradient)))
        return out

    monkeypatch.setattr(seam, "fused_cross_entropy", fused)
    return seen


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """`torch_compile`, for one, stays switched on in the environment for every later run of the process."""
    before = dict(os.environ)
    yield
    for name in {*os.environ, *before} - {"PYTEST_CURRENT_TEST"}:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(autouse=True)
def _only_our_plugin() -> Iterator[None]:
    """Axolotl keeps every plugin that any config of the process has named; a test leaves none behind."""
    if harness.AXOLOTL is None:
        yield
        return
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    yield
    for name in set(manager.plugins) - set(before):
        del manager.plugins[name]


@pytest.fixture(scope="session", autouse=True)
def _axolotl() -> None:
    if harness.AXOLOTL is not None:  # `apply` needs none, and its tests run without
        harness.import_host()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two more processes that import the host take longer than a person waits."""
    for item in items:
        if "ranks" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes of one gloo group, see `ranks.py`."""
    pair = Ranks(2)
    yield pair
    pair.stop()
