"""A pack goes to the Hub and comes back from it, by the Hub's own client and against a stand-in of its API."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from dwl_plugin.cli.main import main
from tests.cli.hub import Hub, serve

GREETINGS = """
description: "Greetings | of <all> kinds: `hello`, and louder."
sources: [https://en.wikipedia.org/wiki/Greeting]
classes:
  loud: {regex: 'HELLO'}
  greeting: {regex: '(?i)hello'}
alpha: {loud: 3, greeting: 2, rest: 1}
reduction: weighted_mean
tests:
  - {text: "hello", spans: {greeting: [hello]}}
  - {prompt: "Say it. ", text: "HELLO, hello <b>", spans: {loud: [HELLO], greeting: [hello]}}
"""
CODE = """
import json, sys
from click.testing import CliRunner
from dwl_plugin.cli.main import main

for line in sys.stdin:
    arguments, token = json.loads(line)
    result = CliRunner(env={"HF_TOKEN": token, "COLUMNS": "200"}).invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    print(json.dumps([result.exit_code, result.output]), flush=True)
"""


class Told(NamedTuple):
    status: int
    text: str

    @property
    def address(self) -> str:
        found = re.search(r"^  pack: (hf://\S+@[0-9a-f]{40}/\S+)$", self.text, re.MULTILINE)
        assert found is not None, self.text
        return found[1]

    @property
    def commit(self) -> str:
        return self.address.partition("@")[2][:40]


Dwl = Callable[..., Told]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    (folder / "greet.yml").write_text(GREETINGS, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@pytest.fixture(scope="module")
def dwl(hub: Hub, folder: Path) -> Iterator[Dwl]:
    """The command, in one process for all: the client takes the Hub's address from the environment as it is imported."""
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def run(*arguments: str, token: str | None = "token-ann") -> Told:
        process.stdin.write(json.dumps([arguments, token]) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        return Told(*json.loads(process.stdout.readline()))  # type: ignore[union-attr]

    yield run
    process.stdin.close()
    process.wait(20)
    process.stdout.close()


@pytest.fixture(scope="module")
def pushed(dwl: Dwl) -> Told:
    told = dwl("packs", "push", "greet.yml", "ann/greetings")
    assert told.status == 0, told.text
    return told


def test_what_is_pushed_is_the_file_and_a_card_in_one_commit(hub: Hub, pushed: Told, folder: Path) -> None:
    (_, (oid, files)) = hub.repos["models", "ann/greetings"]
    assert pushed.address == f"hf://ann/greetings@{oid}/greet.yml"
    assert files["greet.yml"] == (folder / "greet.yml").read_bytes()
    assert f"sha256 {hashlib.sha256(files['greet.yml']).hexdigest()}" in pushed.text
    assert "with its 2 cases" in pushed.text
    card = files["README.md"].decode()
    assert card.startswith("---\ntags: [axolotl-dwl, token-weights]\n---\n\n# greet\n")
    assert "Greetings \\| of \\<all\\> kinds: `hello`, and louder." in card
    assert "| `loud` | 3 |\n| `greeting` | 2 |\n| `rest` | 1 |" in card
    assert "dwl: {pack: 'hf://ann/greetings@<commit>/greet.yml'}" in card
    assert "<i>Say it. </i><mark>HELLO</mark><sub>loud</sub>, <mark>hello</mark><sub>greeting</sub> &lt;b&gt;" in card
    assert "<https://en.wikipedia.org/wiki/Greeting>" in card
    assert "ann/greetings" not in hub.private


def test_what_was_pushed_is_fetched_by_its_commit_also_after_the_next(hub: Hub, dwl: Dwl, pushed: Told, folder: Path) -> None:
    config = folder / "train.yml"
    config.write_text(f"loss: dwl\ndwl: {{pack: ['{pushed.address}', numbers], alpha: {{loud: 5}}}}\nmax_steps: 10\n")
    before = dwl("schedule", "train.yml")
    assert before.status == 1
    assert f"dwl.pack[0]: {pushed.address}" in before.text
    assert "Nothing was fetched" in before.text

    (folder / "louder").mkdir()
    (folder / "louder" / "greet.yml").write_text(GREETINGS.replace("HELLO", "HEY"), encoding="utf-8")
    card = hub.repos["models", "ann/greetings"][-1][1]["README.md"]
    newer = dwl("packs", "push", "louder/greet.yml", "ann/greetings")
    assert newer.address != pushed.address
    assert hub.repos["models", "ann/greetings"][-1][1]["README.md"] == card, "there was one"

    for told, word, other in ((pushed, "HELLO", "HEY"), (newer, "HEY", "HELLO")):
        shown = dwl("packs", "show", told.address, token=None)
        assert (shown.status, f"regex: '{word}'" in shown.text, f"regex: '{other}'" in shown.text) == (0, True, False)
        assert dwl("packs", "test", told.address, token=None).text.endswith(f"{told.address}: 2 cases pass\n")
        raw = dwl("packs", "show", "--raw", told.address, token=None)
        assert raw.text.encode() == dict(hub.repos["models", "ann/greetings"])[told.commit]["greet.yml"]

    after = dwl("schedule", "train.yml", token=None)
    assert after.status == 0, "a pack that was looked at is on this disk, and fetches nothing"
    assert re.findall(r"0\.\d\d", after.text) == ["0.36", "0.14", "0.29", "0.14", "0.07"], "5, 2, 4, 2 and 1 of 14"


def test_the_same_again_is_the_same_commit(hub: Hub, dwl: Dwl) -> None:
    first = dwl("packs", "push", "greet.yml", "ann/twice")
    assert dwl("packs", "push", "greet.yml", "ann/twice").address == first.address
    assert len(hub.repos["models", "ann/twice"]) == 2


def test_data_sets_organisations_and_private_repositories(hub: Hub, dwl: Dwl) -> None:
    told = dwl("packs", "push", "greet.yml", "datasets/acme/rows", "--private")
    oid = hub.repos["datasets", "acme/rows"][-1][0]
    assert told.address == f"hf://datasets/acme/rows@{oid}/greet.yml"
    assert "acme/rows" in hub.private
    assert "Pushed to datasets/acme/rows" in told.text
    assert dwl("packs", "test", told.address).status == 0


@pytest.mark.parametrize(
    ("repo", "token", "says"),
    [
        ("ann/new", None, "There is no token for the Hub: log in with `hf auth login`"),
        ("ann/new", "token-of-nobody", "The Hub does not know this token"),
        ("ann/new", "token-ann-read", "does not let this token of ann write to ann/new: make one with write access"),
        ("nobody/new", "token-ann", "does not let ann write under `nobody`: the names that are theirs are `ann` and `acme`."),
        ("ann/greetings", "token-bob", "does not let bob write under `ann`: the names that are theirs are `bob`."),
        ("ann/full", "token-ann", "The Hub did not take it (507): No space left for ann"),
        ("greetings", "token-ann", "greetings is no repository of the Hub: write `user/repo`"),
        ("hf://ann/greetings", "token-ann", "is no repository of the Hub"),
        ("ann/../greetings", "token-ann", "is no repository of the Hub"),
    ],
)
def test_what_is_in_the_way_is_one_sentence(hub: Hub, dwl: Dwl, pushed: Told, repo: str, token: str | None, says: str) -> None:
    hub.repos.setdefault(("models", "ann/full"), [("0" * 40, {})])
    before = {key: list(commits) for key, commits in hub.repos.items()}
    told = dwl("packs", "push", "greet.yml", repo, token=token)
    assert told.status == 1
    (line,) = [line for line in told.text.splitlines() if line.startswith("Error: ")]
    assert says in line
    assert told.text.endswith(f"{line}\n")
    assert hub.repos == before


def test_only_a_pack_that_keeps_its_word_is_pushed(hub: Hub, dwl: Dwl, folder: Path) -> None:
    def push(text: str, *options: str) -> Told:
        (folder / "odd.yml").write_text(text, encoding="utf-8")
        return dwl("packs", "push", "odd.yml", "ann/odd", *options)

    wrong = GREETINGS.replace("greeting: [hello]}", "greeting: [hullo]}", 1)
    none = GREETINGS.partition("tests:")[0]
    to_write = GREETINGS.replace('description: "', 'description: "TODO: ')
    for text, why in (
        (wrong, "a case fails. --untested"),
        (none, "without a case nobody sees"),
        (to_write, "still to be written."),
    ):
        told = push(text)
        assert (told.status, why in told.text) == (1, True), told.text
        assert ("models", "ann/odd") not in hub.repos
    assert "1 of 2 cases fail" in push(wrong).text
    assert push(to_write, "--untested").status == 1
    assert "classes" in push("description: d\nclases: {}").text
    assert ("models", "ann/odd") not in hub.repos
    for text in (wrong, none):
        assert push(text, "--untested").status == 0
        assert hub.repos["models", "ann/odd"][-1][1]["odd.yml"].decode() == text
    (folder / "odd.txt").write_text(GREETINGS)
    assert "odd.txt is no name for a pack on the Hub" in dwl("packs", "push", "odd.txt", "ann/odd").text


def test_what_is_not_on_the_hub_is_said(hub: Hub, dwl: Dwl, pushed: Told) -> None:
    hub.repos["models", "ann/big"] = [("0" * 40, {})]
    oid = hub.commit("models", "ann/big", {"big.yml": b"#" * 140_000})
    for address, says in (
        (pushed.address.replace("greet.yml", "gone.yml"), "no such file at this commit"),
        (pushed.address.replace(pushed.commit, "1" * 40), "has no such commit"),
        (pushed.address.replace("greetings", "nothing"), "no such repository, or it is private"),
        (f"hf://ann/big@{oid}/big.yml", "at most 128 KiB; this one has 140,000 bytes"),
    ):
        told = dwl("packs", "show", address)
        assert (told.status, says in told.text) == (1, True), told.text


def test_without_a_network_nothing_is_sent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")
    result: Any = CliRunner().invoke(main, ["packs", "push", str(folder / "greet.yml"), "ann/greetings"])
    assert result.exit_code == 1
    assert "Error: HF_HUB_OFFLINE is set, so nothing is sent to the Hub" in result.output
