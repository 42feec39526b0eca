"""Each line that the list of dangers has, through each command that looks into a config: nothing happens but the list.

A hook of the interpreter (`sys.addaudithook`) writes down what would be something: code, programs, pickles and connections.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

from tests.cli.test_trust import FETCHES, RUNS

WRITTEN: list[str] | None = None

_STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
_READ = (".json", ".yml", ".yaml", ".md")
"""The config itself, and settings of folders that it names, which the list looks into."""
_CONNECTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname")


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if WRITTEN is None:
        return
    here = os.getcwd() + os.sep
    if event in ("pickle.find_class", *_STARTS, *_CONNECTS):
        WRITTEN.append(f"{event} {arguments}")
    elif event in ("exec", "open"):
        file = getattr(arguments[0], "co_filename", "") if event == "exec" else arguments[0]
        if not isinstance(file, str):  # a descriptor
            return
        if os.path.abspath(file).startswith(here) and not file.endswith(_READ) and not file.startswith("<"):
            WRITTEN.append(f"{event} {file}")
    elif event == "import" and arguments[0].partition(".")[0] in ("somebody", "mine", "evil"):
        WRITTEN.append(f"{event} {arguments[0]}")


@functools.cache
def _listen() -> None:
    sys.addaudithook(_hear)  # for as long as the process lives


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """What happened, in a folder of its own from which Python would import, and with a hub that may be asked."""
    global WRITTEN
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("somebody", "mine", "evil"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit(99)\n")
    _listen()
    WRITTEN = []
    yield WRITTEN
    WRITTEN = None


def test_the_hook_hears(heard: list[str]) -> None:
    with pytest.raises(SystemExit):
        import mine  # type: ignore[import-not-found]  # noqa: F401
    assert next(line.split()[0] for line in heard if "mine" in line) == "import"
    assert any(line.startswith("exec ") for line in heard)


@pytest.mark.parametrize("command", ["check", "inspect", "preflight"])
def test_nothing_happens_before_the_list(command: str, heard: list[str], dwl: Callable[..., Result], tmp_path: Path) -> None:
    config = tmp_path / "config.yml"
    for path, lines in {**RUNS, **FETCHES}.items():
        config.write_text(yaml.safe_dump({"loss": "dft", "base_model": "./model", **lines}))
        result = dwl(command, config)
        assert heard == [], path
        assert result.exit_code in (1, 2), path
        assert "Nothing of it was done" in result.output, path
