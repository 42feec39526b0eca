"""`dwl schedule`: the run's α before the run."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from dwl_plugin.cli import plots
from dwl_plugin.cli.main import main

COSINE = {"type": "cosine", "to": {"number": 0.6, "rest": 0.4}, "start": "10%", "end": "90%"}


def config(folder: Path, schedule: dict[str, Any] | None = COSINE, **host: Any) -> Path:
    dwl = {"classes": {"number": {"regex": r"\d+"}}, "alpha": {"number": 0.2, "rest": 0.8}}
    if schedule is not None:
        dwl["schedule"] = schedule
    path = folder / "train.yml"
    path.write_text(yaml.safe_dump({"loss": "dwl", "dwl": dwl, **host}))
    return path


def dwl(*arguments: object, columns: int = 100) -> Result:
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(main, ["schedule", *map(str, arguments)])


def rows_of(result: Result) -> list[list[str]]:
    assert result.exit_code == 0, result.output
    return [line.split() for line in result.output.splitlines() if line.split() and line.split()[0].isdecimal()]


def error_of(result: Result) -> str:
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "a crash"
    return " ".join(result.output.split())


def test_alpha_stands_at_every_tenth_of_the_run(tmp_path: Path) -> None:
    rows = rows_of(dwl(config(tmp_path, max_steps=200)))
    assert [row[0] for row in rows] == [str(20 * k) for k in range(11)]
    assert [row[1] for row in rows] == [str(10 * k) for k in range(11)]
    for k, row in enumerate(rows):
        s = (1 - math.cos(math.pi * min(max((k / 10 - 0.1) / 0.8, 0), 1))) / 2
        assert float(row[3]) == pytest.approx(0.2 + 0.4 * s, abs=0.0051)
        assert float(row[3]) + float(row[5]) == pytest.approx(1, abs=0.011)


def test_a_short_run_shows_each_step_once(tmp_path: Path) -> None:
    assert [row[0] for row in rows_of(dwl(config(tmp_path, max_steps=5)))] == ["0", "1", "2", "3", "4", "5"]
    assert [row[0] for row in rows_of(dwl(tmp_path / "train.yml", "--steps", 1))] == ["0", "1"]


def test_steps_go_before_the_yamls_own_number(tmp_path: Path) -> None:
    assert rows_of(dwl(config(tmp_path, max_steps=200), "--steps", 50))[-1][0] == "50"


def test_a_share_of_an_unknown_run_asks_for_its_length(tmp_path: Path) -> None:
    text = error_of(dwl(config(tmp_path)))
    assert "dwl.schedule.start" in text
    assert "--steps N" in text


def test_steps_alone_need_no_length(tmp_path: Path) -> None:
    rows = rows_of(dwl(config(tmp_path, {**COSINE, "start": 0, "end": 500})))
    assert rows[-1][:2] == ["600", "0.60"]
    assert "%" not in dwl(tmp_path / "train.yml").output


def test_epochs_divide_a_run_that_nothing_cuts_short(tmp_path: Path) -> None:
    schedule = {**COSINE, "type": "linear", "start": 0, "end": "2ep"}
    rows = rows_of(dwl(config(tmp_path, schedule, num_epochs=4), "--steps", 100))
    assert [row[3] for row in rows if row[0] in ("50", "60")] == ["0.60", "0.60"]
    assert next(row[3] for row in rows if row[0] == "40") == "0.52"
    cut = config(tmp_path, schedule, num_epochs=4, max_steps=30)
    assert "--epoch-steps N" in error_of(dwl(cut))
    assert rows_of(dwl(cut, "--epoch-steps", 10))[-1][3] == "0.60"


def test_without_a_schedule_alpha_is_said_to_be_constant(tmp_path: Path) -> None:
    result = dwl(config(tmp_path, None))
    assert "constant" in result.output
    assert [(row[1], row[3]) for row in rows_of(result)] == [("0.20", "0.80")]


def test_a_controllers_way_is_not_made_up(tmp_path: Path) -> None:
    path = config(tmp_path, None, max_steps=20)
    raw = yaml.safe_load(path.read_text())
    raw["dwl"]["controller"] = {"type": "group_dro"}
    path.write_text(yaml.safe_dump(raw))
    result = dwl(path)
    assert "`group_dro` moves α by the losses it will see" in result.output
    assert [(row[0], row[3], row[5]) for row in rows_of(result)] == [("0", "0.20", "0.80")]
    assert "no curve to draw" in error_of(dwl(path, "--plot", tmp_path / "alpha.png"))
    assert not (tmp_path / "alpha.png").exists()


@pytest.mark.parametrize("loss", ["nll", "dft", None])
def test_a_config_without_alpha_is_told_so(tmp_path: Path, loss: str | None) -> None:
    path = tmp_path / "train.yml"
    path.write_text(yaml.safe_dump({"loss": loss, "max_steps": 5}))
    assert "has no α" in error_of(dwl(path))


DFT = {"exponent": 0, "schedule": {"type": "linear", "to": {"exponent": 1, "min_weight": 0.5}}}


def test_dft_without_alpha_shows_the_numbers_that_move(tmp_path: Path) -> None:
    path = tmp_path / "train.yml"
    path.write_text(yaml.safe_dump({"loss": "dft", "dft": DFT, "max_steps": 100}))
    result = dwl(path, "--plot", tmp_path / "dft.svg")
    rows = rows_of(result)
    assert "exponent" in result.output
    assert "min_weight" in result.output
    moving = [(float(row[3]), float(next(cell for cell in row[4:] if cell[0] == "0"))) for row in rows]
    assert moving == [(pytest.approx(k / 10), pytest.approx(k / 20)) for k in range(11)]
    assert "min_weight" in (tmp_path / "dft.svg").read_text()


def test_dft_of_a_class_is_shown_beside_alpha_by_its_name(tmp_path: Path) -> None:
    path = config(tmp_path, max_steps=20)
    raw = yaml.safe_load(path.read_text())
    raw["dwl"]["classes"]["number"] |= {"token_loss": "dft", "dft": DFT}
    path.write_text(yaml.safe_dump(raw))
    result = dwl(path)
    assert len(rows_of(result)) == 22
    assert "exponent number" in result.output
    assert "exponent rest" not in result.output


def test_a_schedule_that_the_run_stops_before_is_said(tmp_path: Path) -> None:
    path = config(tmp_path, {**COSINE, "end": 300}, max_steps=200)
    assert "`dwl.schedule.end` is step 300 and this run ends at step 200" in dwl(path).output
    assert "dwl.schedule.end" not in dwl(path, "--steps", 300).output


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "", "loss: dwl\ndwl: {classes: {a: {regexp: x}}}", b"\xff\xfe"])
def test_a_file_that_is_no_config_is_one_clear_error(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "train.yml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert any(word in error_of(dwl(path)) for word in ("train.yml", "dwl.classes.a"))


def test_many_classes_take_more_tables_and_lose_none(tmp_path: Path) -> None:
    names = [f"a_class_of_the_number_{i}" for i in range(9)]
    path = tmp_path / "train.yml"
    classes = {name: {"token_ids": [i]} for i, name in enumerate(names)}
    path.write_text(yaml.safe_dump({"loss": "dwl", "dwl": {"classes": classes}}))
    result = dwl(path, columns=80)
    assert len(rows_of(result)) > 1
    assert all(result.output.count(name) == 1 for name in names)
    assert max(map(len, result.output.splitlines())) <= 80


def test_of_more_lines_than_can_be_told_apart_the_first_are_drawn_and_it_says_so(tmp_path: Path) -> None:
    path, plot = config(tmp_path, max_steps=20), tmp_path / "alpha.svg"
    raw = yaml.safe_load(path.read_text())
    names = [f"c{at:02}" for at in range(40)]
    raw["dwl"] = {"classes": {name: {"regex": name} for name in names}, "alpha": dict.fromkeys([*names, "rest"], 1)}
    raw["dwl"]["schedule"] = {"type": "linear", "to": dict(zip([*names, "rest"], range(1, 42), strict=True))}
    path.write_text(yaml.safe_dump(raw))
    result = dwl(path, "--plot", plot)
    assert "It has the first 30 of 41 lines; all of them are in the tables." in " ".join(result.output.split())
    drawn = plot.read_text()
    assert ">c29<" in drawn
    assert ">c30<" not in drawn


def test_an_epoch_without_end_is_no_length(tmp_path: Path) -> None:
    path = config(tmp_path, {"type": "linear", "to": {"number": 0.6, "rest": 0.4}, "end": "1ep"}, num_epochs=1e-308)
    assert "--epoch-steps N" in error_of(dwl(path, "--steps", "100"))


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_figures_form_is_its_suffix(tmp_path: Path, suffix: str, magic: bytes) -> None:
    plot = tmp_path / f"alpha{suffix}"
    result = dwl(config(tmp_path, max_steps=20), "--plot", plot)
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(magic)


def test_another_suffix_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    result = dwl(config(tmp_path, max_steps=20), "--plot", tmp_path / "alpha.gif")
    assert result.exit_code == 2
    assert ".png, .svg, .pdf" in result.output


def test_without_matplotlib_the_table_is_there_and_the_figure_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    result = dwl(config(tmp_path, max_steps=20), "--plot", tmp_path / "alpha.png")
    assert "pip install 'axolotl-dwl[plots]'" in error_of(result)
    assert "0.60" in result.output


def test_it_reads_only_the_yaml_and_imports_nothing_heavy(tmp_path: Path) -> None:
    path = config(tmp_path, max_steps=20)
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; from dwl_plugin.cli.schedule import schedule;"
        f"schedule(Console(quiet=True), Path({str(path)!r}), None, None, None);"
        "print([name for name in ('torch', 'axolotl', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_pack_on_the_hub_is_not_fetched_before_it_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda **where: fetched.append(where["repo_id"]))
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: SimpleNamespace(size=10))
    path = tmp_path / "config.yml"
    path.write_text(f"loss: dwl\nmax_steps: 3\ndwl: {{pack: 'hf://user/repo@{'0' * 40}/mine.yml'}}\n", encoding="utf-8")
    assert "--trust" in error_of(dwl(path))
    assert fetched == []
    dwl(path, "--trust")
    assert fetched[:1] == ["user/repo"]


def test_a_key_that_stands_twice_is_a_hint(tmp_path: Path) -> None:
    path = tmp_path / "config.yml"
    path.write_text("loss: dwl\ndwl: {classes: {a: {regex: x}}, alpha: {a: 1, rest: 1,\n  a: 3}}\n", encoding="utf-8")
    result = dwl(path)
    assert result.exit_code == 0
    assert "hint: `dwl.alpha.a` stands twice, in lines 2 and 3" in result.output
    assert "0.75" in result.output
