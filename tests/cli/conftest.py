from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click import Command
from click.testing import CliRunner, Result

from dwl_plugin.cli.main import main
from tests.hosts import harness


@pytest.fixture(scope="session")
def host() -> None:
    """Axolotl, imported once for all, and kept out of the collections that every loaded model asks for; what it warns about is its
    own."""
    import gc
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import axolotl.cli.config
        import axolotl.loaders
        import axolotl.utils.data.sft  # noqa: F401
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def little_model(tmp_path_factory: pytest.TempPathFactory, host: None) -> Path:
    folder = tmp_path_factory.mktemp("little") / "model"
    harness.make_tokenizer(folder)
    harness.make_model(folder)
    return folder


@pytest.fixture
def write_config(little_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """A whole config in a file, with 40 little sums as its data; keyword arguments change it, None deletes a key."""

    def write(**changes: Any) -> Path:
        data = changes.pop("data", None) or harness.write_rows(tmp_path / "rows.jsonl", harness.rows(40))
        settings = harness.config(changes.pop("model", little_model), data, tmp_path, **changes)
        settings["dataset_prepared_path"] = str(tmp_path / "prepared")
        path = tmp_path / "config.yml"
        path.write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path

    return write


@pytest.fixture
def dwl(host: None) -> Iterator[Callable[..., Result]]:
    """The command, in this process. Axolotl keeps every plugin that a config named; none is left behind."""
    from axolotl.integrations.base import PluginManager

    manager = PluginManager.get_instance()
    before = dict(manager.plugins)

    def run(*arguments: object, command: Command = main) -> Result:
        result = CliRunner(env={"COLUMNS": "160"}).invoke(command, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    yield run
    for name in set(manager.plugins) - set(before):
        del manager.plugins[name]
