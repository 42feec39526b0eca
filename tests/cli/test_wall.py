"""Attacks of which the list of dangers knows nothing: the process itself refuses them, and says so."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dwl_plugin.cli import analysis
from dwl_plugin.cli.wall import RefusedError, came_from_wall, look_only

Dwl = Callable[..., Result]
WriteConfig = Callable[..., Path]
Attack = Callable[[Path, str, Path], dict[str, Any]]
"""Gets the folder of the config, Python that leaves a mark, and a little model; gives what changes in the config."""


class Call:
    """Called when the pickle of it is read."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


def pickled_rows(folder: Path, code: str, model: Path) -> dict[str, Any]:
    (folder / "rows.pkl").write_bytes(pickle.dumps(Call(code)))
    return {"datasets": [{"path": "rows.pkl", "ds_type": "pandas", "type": "chat_template"}]}


def code_beside_the_model(folder: Path, code: str, model: Path) -> dict[str, Any]:
    copied = Path(shutil.copytree(model, folder / "model"))
    settings = json.loads((copied / "config.json").read_text())
    settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (copied / "config.json").write_text(json.dumps(settings))
    (copied / "evil.py").write_text(
        f"{code}\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): pass\nclass Model(LlamaForCausalLM): config_class = Config\n"
    )
    return {"model": copied, "trust_remote_code": True}


def a_plugin(folder: Path, code: str, model: Path) -> dict[str, Any]:
    (folder / "evil_plugin.py").write_text(f"{code}\nfrom axolotl.integrations.base import BasePlugin as Plugin\n")
    return {"plugins": ["dwl_plugin.DWLPlugin", "evil_plugin.Plugin"]}


def a_dataset_type(folder: Path, code: str, model: Path) -> dict[str, Any]:
    (folder / "evil_strategy").mkdir()
    (folder / "evil_strategy" / "chat.py").write_text(code)
    return {"datasets": [{"path": "rows.jsonl", "type": "evil_strategy.chat"}]}


def a_config_class(folder: Path, code: str, model: Path) -> dict[str, Any]:
    (folder / "evil_config.py").write_text(f"{code}\nfrom transformers import LlamaConfig as Config\n")
    return {"cls_model_config": "evil_config.Config"}


def a_program(folder: Path, code: str, model: Path) -> dict[str, Any]:
    """Which Axolotl's own plugin starts as soon as it reads the config."""
    program = folder / "gym" / ".venv" / "bin" / "ng_run"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n{code}\n")
    program.chmod(0o755)
    program.with_name("python").touch()
    plugins = ["dwl_plugin.DWLPlugin", "axolotl.integrations.nemo_gym.NemoGymPlugin"]
    return {
        "plugins": plugins,
        "nemo_gym_enabled": True,
        "nemo_gym_dir": str(folder / "gym"),
        "nemo_gym_config_paths": ["a.yaml"],
        "nemo_gym_datasets": [{"path": "a", "server_name": "b"}],
    }


def a_template_for_paths(folder: Path, code: str, model: Path) -> dict[str, Any]:
    """fsspec renders what it refers to by a Jinja template without a sandbox."""
    call = f"{{{{ cycler.__init__.__globals__['__builtins__']['exec']({code!r}) }}}}"
    rows = {"key": f"{call}a{{{{i}}}}", "url": "file://rows.jsonl", "dimensions": {"i": {"stop": 2}}}
    (folder / "refs.json").write_text(json.dumps({"version": 1, "gen": [rows], "refs": {}}))
    return {"datasets": [{"path": ".", "ds_type": "json", "type": "chat_template", "data_files": ["reference::refs.json"]}]}


ATTACKS: list[Attack] = [
    a_template_for_paths,
    a_program,
    pickled_rows,
    code_beside_the_model,
    a_plugin,
    a_dataset_type,
    a_config_class,
]


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The list of dangers is empty, whatever the config; the folder that the command is started in, which Python imports from."""
    monkeypatch.setattr(analysis, "dangers", lambda raw: [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


@pytest.mark.parametrize("attack", ATTACKS)
def test_code_of_a_stranger_is_refused(
    attack: Attack, unlisted: Path, write_config: WriteConfig, dwl: Dwl, little_model: Path
) -> None:
    mark = unlisted / "mark"
    config = write_config(loss="dft", **attack(unlisted, f"open({str(mark)!r}, 'w').close()", little_model))
    result = dwl("check", config)
    assert not mark.exists()
    assert result.exit_code == 2, result.output
    assert ("fetches" if attack is a_template_for_paths else "runs code") in result.output
    assert "--trust" in result.output
    dwl("check", config, "--trust")
    assert mark.exists(), "the attack is none"


def test_a_model_is_loaded_behind_the_wall(unlisted: Path, write_config: WriteConfig, dwl: Dwl, little_model: Path) -> None:
    """`check` does not load it."""
    mark = unlisted / "mark"
    changes = code_beside_the_model(unlisted, f"open({str(mark)!r}, 'w').close()", little_model)
    settings = json.loads((changes["model"] / "config.json").read_text())
    del settings["auto_map"]["AutoConfig"]
    (changes["model"] / "config.json").write_text(json.dumps(settings))
    del changes["trust_remote_code"]
    result = dwl("preflight", write_config(loss="dft", model_kwargs={"trust_remote_code": True}, **changes), "--samples", "2")
    assert not mark.exists()
    assert result.exit_code == 2, result.output
    assert "while it was loaded" in result.output


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """A server on this machine, and the requests that reached it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", asked
        http.shutdown()


def test_nobody_is_reached(unlisted: Path, write_config: WriteConfig, dwl: Dwl, server: tuple[str, list[str]]) -> None:
    address, asked = server
    (unlisted / "data").mkdir()
    card = {"configs": [{"config_name": "default", "data_files": [{"split": "train", "path": f"{address}/rows.jsonl"}]}]}
    (unlisted / "data" / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    config = write_config(loss="dft", datasets=[{"path": "./data", "type": "chat_template", "split": "train"}])
    result = dwl("check", config)
    assert asked == []
    assert result.exit_code == 2, result.output
    assert "fetches" in result.output
    dwl("check", config, "--trust")
    assert asked, "the attack is none"


@pytest.mark.parametrize("line", [["sh", "-c", "true"], ["git", "clone"], ["./tool"], [sys.executable, "tool.py"]])
def test_programs_of_a_stranger_do_not_start(line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: None) -> None:
    for name in ("tool", "tool.py"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    with look_only(trust=False) as refused, pytest.raises(PermissionError, match="refused"):
        subprocess.run(line)
    assert len(refused) == 1


def test_programs_of_this_machine_start(host: None) -> None:
    """Libraries ask them what hardware there is."""
    with look_only(trust=False) as refused:
        assert subprocess.run(["uname"], capture_output=True, check=True).stdout
    assert refused == []


def test_an_error_that_was_raised_from_itself_ends() -> None:
    error = ValueError("plugin")
    error.__cause__ = error
    assert not came_from_wall(error)
    error.__cause__ = RuntimeError()
    error.__cause__.__context__ = RefusedError()
    assert came_from_wall(error)


def test_a_look_inside_a_look_leaves_the_wall_standing(host: None) -> None:
    with look_only(trust=False):
        with look_only(trust=False):
            pass
        with pytest.raises(PermissionError):
            subprocess.run(["git", "--version"])


def test_what_compilers_wrote_is_not_the_config_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: None) -> None:
    """On a GPU `preflight` compiles kernels, and Triton imports the launcher that it wrote."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "launcher.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "triton")
    with look_only(trust=False) as refused:
        import launcher  # type: ignore[import-not-found]
    assert (launcher.value, refused) == (1, [])


def test_the_wall_is_gone_after_the_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: None) -> None:
    (tmp_path / "own_module.py").write_text("value = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with look_only(trust=False) as refused, pytest.raises(OSError, match="own_module"):
        import own_module  # type: ignore[import-not-found]
    assert [danger.does for danger in refused] == ["runs code"]
    import own_module

    assert pickle.loads(pickle.dumps(own_module.value)) == 1
