from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hosts import harness


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    harness.make_tokenizer(folder)
    harness.make_model(folder)
    return folder


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", harness.rows(40))


@pytest.fixture
def configure(model_folder: Path, data_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """A whole config; keyword arguments change it, None deletes a key."""

    def make(**changes: Any) -> dict[str, Any]:
        folder = Path(changes.pop("out", tmp_path))
        return harness.config(changes.pop("model", model_folder), changes.pop("data", data_file), folder, **changes)

    return make


@pytest.fixture(autouse=True)
def _only_our_plugin() -> Iterator[None]:
    """Axolotl keeps every plugin that any config of the process has named; a test leaves none behind."""
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    before = dict(manager.plugins)
    yield
    for name in set(manager.plugins) - set(before):
        del manager.plugins[name]


@pytest.fixture(scope="session", autouse=True)
def _axolotl() -> None:
    """Import the host once, keep its heap out of the collections that every run asks for, and let it prepare these few rows
    in this process: a pool that imports everything again takes longer than the test."""
    import gc

    import axolotl.core.builders
    import axolotl.train  # noqa: F401
    from datasets import Dataset

    for name in ("save_to_disk", "map", "filter"):
        method = getattr(Dataset, name)

        def alone(*args: Any, _method: Any = method, num_proc: Any = None, **kwargs: Any) -> Any:
            return _method(*args, **kwargs)

        setattr(Dataset, name, alone)
    gc.collect()
    gc.freeze()
