"""What is said of each mistake of `mistakes.py`: one problem, with its path, its cause and what to write, and at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from tests.cli.mistakes import AFTER_LOADING, AT_ONCE, HINTED, Mistake
from tests.hosts import harness

_WITHOUT_HOSTS = """
import json, os, sys
from pathlib import Path
for name in ("axolotl", "torch", "transformers"):
    sys.modules[name] = None
from click.testing import CliRunner
from dwl_plugin.cli.main import main
said = []
for config, overrides in json.load(sys.stdin):
    Path("train.yml").write_text(config, encoding="utf-8")
    result = CliRunner(env={"COLUMNS": "400", "DWL_OVERRIDES": overrides or None}).invoke(main, ["check", "train.yml"])
    said.append(result.stdout if isinstance(result.exception, SystemExit) else repr(result.exception))
json.dump(said, sys.__stdout__)
"""

_STOP_AT_HOSTS = """
import os, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("axolotl", "torch", "transformers", "datasets"):
            os._exit(7)
sys.meta_path.insert(0, Stop())
from dwl_plugin.cli.main import main
main()
"""


def python(code: str, folder: Path, *arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=folder, input=given, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and rows as far as they are looked at before anything is loaded."""
    folder = tmp_path_factory.mktemp("mistakes")
    (folder / "model").mkdir()
    (folder / "model" / "model.safetensors").touch()
    harness.write_rows(folder / "rows.jsonl", harness.rows(3))
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, str]:
    """What `dwl check` prints of each mistake where there is no Axolotl and no torch."""
    mistakes = [*AT_ONCE, *HINTED]
    done = python(_WITHOUT_HOSTS, folder, given=json.dumps([[mistake.config, mistake.overrides] for mistake in mistakes]))
    assert done.returncode == 0, done.stderr
    return dict(zip([mistake.name for mistake in mistakes], json.loads(done.stdout), strict=True))


def the_problem(output: str) -> str:
    assert output.startswith("1 problem\n"), output
    assert "more problem" not in output
    return output.partition("\n\n")[0].partition("\n  ")[2]


def require(mistake: Mistake, message: str) -> None:
    assert message.startswith(f"{mistake.path}: ")
    assert mistake.cause in message
    assert mistake.remedy in message


@pytest.mark.parametrize("mistake", AT_ONCE, ids=lambda mistake: mistake.name)
def test_a_mistake_is_one_problem_with_path_cause_and_remedy(mistake: Mistake, said: dict[str, str]) -> None:
    require(mistake, the_problem(said[mistake.name]))


@pytest.mark.parametrize("mistake", HINTED, ids=lambda mistake: mistake.name)
def test_what_may_be_meant_is_a_hint(mistake: Mistake, said: dict[str, str]) -> None:
    hints = said[mistake.name].partition("Hints\n")[2]
    assert "problem\n" not in said[mistake.name]
    require(mistake._replace(path=""), f": {hints}")
    assert mistake.path in hints


def read_on(mistake: Mistake) -> bool:
    """Whether there is something to go on with once the mistake is told."""
    return mistake.path not in ("train.yml", "DWL_OVERRIDES") and not mistake.path.startswith("datasets")


ALSO_QUICK = ("plugins: dwl_plugin.DwlPlugin", "plugins without a dash", "classes and alpha at the top level", "loss: DWL")


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(mistake, id=mistake.name, marks=() if mistake.name in ALSO_QUICK else pytest.mark.slow)
        for mistake in filter(read_on, AT_ONCE)
    ],
)
def test_what_comes_after_a_mistake_complains_of_nothing(
    mistake: Mistake, dwl: Callable[..., Result], write_config: Callable[..., Path]
) -> None:
    written = yaml.safe_load(mistake.config)
    result = dwl("check", write_config(**{key: written[key] for key in written if key not in ("base_model", "datasets")}))
    require(mistake, the_problem(result.stdout))
    assert "Not looked at" not in result.stdout


@pytest.mark.parametrize("mistake", AFTER_LOADING, ids=lambda mistake: mistake.name)
def test_a_mistake_that_only_the_tokenizer_or_the_rows_show(
    mistake: Mistake, dwl: Callable[..., Result], write_config: Callable[..., Path]
) -> None:
    config = write_config(**{"max_steps": 20, **yaml.safe_load(mistake.text)})
    require(mistake, the_problem(dwl("check", config).stdout))


@pytest.mark.parametrize(
    "command", [["check"], ["inspect"], ["preflight"], ["score", "--out", "scored"]], ids=lambda words: words[0]
)
def test_the_message_is_out_before_a_host_is_imported(command: list[str], folder: Path) -> None:
    mistake = next(mistake for mistake in AT_ONCE if mistake.name == "a class misspelt in alpha")
    (folder / "misspelt.yml").write_text(mistake.config, encoding="utf-8")
    done = python(_STOP_AT_HOSTS, folder, *command, "misspelt.yml")
    assert done.returncode == 7, "no host was asked for"
    require(mistake, the_problem(done.stdout))
    assert "Axolotl is being loaded to look at the rest" in done.stderr
