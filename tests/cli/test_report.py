"""`dwl report`: from a trainer's state made by hand to the terminal and the page."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dwl_plugin.cli import plots, report
from dwl_plugin.cli.main import main
from dwl_plugin.cli.report.run import read_runs
from dwl_plugin.cli.report.tables import compared, differing, rows_of
from dwl_plugin.files import write_whole
from dwl_plugin.run.curve import LoggedCurve
from tests.cli.browser import OUT_OF_SIGHT, looked_at, needs_a_browser
from tests.cli.little_runs import DWL, Entry, evaluation, step, write_run, write_state

OWN_SCRIPT = Path(report.__file__).with_name("page.js")

HISTORY = [
    evaluation(0, number=3.0, rest=1.0),
    step(1, number=3.0, rest=1.0, alpha=0.2),
    step(2, number=2.0, rest=1.0, alpha=0.45),
    step(3, number=1.0, rest=0.5, alpha=0.7),
    evaluation(3, number=0.6, rest=1.1, p=0.625),
    {"step": 3, "train_runtime": 1.0},
]

RECORD = {
    "began": "2026-11-27T10:05:12+00:00",
    "resumed_at_step": 4,
    "model": "Qwen/\x1b]0;title\x07Qwen2.5",
    "data": ["a.jsonl", "<b>.jsonl"],
    "rows": 1234,
    "learning_rate": 0.0002,
    "batch": {"micro": 2, "accumulation": 8, "ranks": 4},
    "versions": {"dwl_plugin": "0.1.0", "torch": "2.14.1"},
    "of a later version": [1],
}


def dwl(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["report", *map(str, arguments)])


def cells_of(result: Result, name: str) -> list[str]:
    """The cells of the row that begins with `name`, without it."""
    line = next(line for line in result.output.splitlines() if line.split()[:1] == [name])
    return re.split(r"\s{2,}", line.strip())[1:]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "exp" / "out", HISTORY)


# --- what is read ------------------------------------------------------------------------------------------------------------


def test_a_class_is_shown_from_the_start_of_the_run_to_its_end(run: Path) -> None:
    result = dwl(run)
    assert result.exit_code == 0, result.output
    cells = cells_of(result, "number")
    # share of the loss: 0.25·0.2·3 of 0.25·0.2·3 + 0.75·0.8·1 = 20 %, and 0.25·0.7·1 of … + 0.75·0.3·0.5 = 60.9 %
    assert cells == ["25.0 %", "20 % → 61 %", "0.20 → 0.70", "3.000 → 0.600", "0.50 → 0.62"]
    assert "1.500 → 0.975" in result.output  # all: 0.25·3 + 0.75·1 and 0.25·0.6 + 0.75·1.1
    assert "exp/out: loss: dwl, weighted_mean, 3 optimizer steps" in result.output
    assert "held-out rows" in result.output


def test_classes_keep_the_order_of_the_config(tmp_path: Path) -> None:
    config = {"loss": "nll", "dwl": {"classes": {"word": {"regex": "a"}, "number": {"regex": "1"}}}}
    (run,) = read_runs([write_run(tmp_path / "run", HISTORY, config)])
    assert run.classes == ("word", "number", "rest")


def test_without_an_evaluation_the_training_batches_are_shown_and_it_says_so(tmp_path: Path) -> None:
    ends = {1: 5.0, 2: 3.0, 19: 1.0, 20: 3.0}
    history = [step(at, number=ends.get(at, 9.0)) for at in range(1, 21)]
    result = dwl(write_run(tmp_path / "run", history))
    assert result.exit_code == 0
    assert "4.000 → 2.000" in result.output  # means of the first and the last tenth: two steps each
    assert "No evaluation was logged" in result.output


def test_a_single_step_is_its_own_start_and_end(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [step(1, number=2.0)])
    assert "2.000 → 2.000" in dwl(folder, "--html", tmp_path / "page.html").output
    assert (tmp_path / "page.html").is_file()


def test_a_class_that_is_absent_at_times_has_a_gap_and_not_a_zero(tmp_path: Path) -> None:
    gone = {key: value for key, value in step(2, share=0.0).items() if key not in ("dwl/nll/number", "dwl/p/number")}
    (run,) = read_runs([write_run(tmp_path / "run", [step(1, number=3.0), gone, step(3, number=1.0)])])
    values = run.curve("dwl/nll/number").values
    assert [values[0], values[2]] == [3.0, 1.0]
    assert math.isnan(values[1])
    assert rows_of(run)[0].nll == (3.0, 1.0)


def test_a_class_that_was_never_seen_has_no_numbers(tmp_path: Path) -> None:
    history = [{key: value for key, value in entry.items() if "nll/number" not in key} for entry in HISTORY]
    result = dwl(write_run(tmp_path / "run", history))
    assert result.exit_code == 0
    assert cells_of(result, "number")[-2:] == ["–", "0.50 → 0.62"]


def test_what_is_no_number_is_a_gap(tmp_path: Path) -> None:
    odd = [math.nan, math.inf, None, "3.0", True, [1]]
    between = [{**step(at), "dwl/nll/number": value} for at, value in enumerate(odd, start=2)]
    folder = write_run(tmp_path / "run", [step(1, number=3.0), *between, step(9, number=1.0)])
    (run,) = read_runs([folder])
    first, *values, last = run.curve("dwl/nll/number").values
    assert (first, last) == (3.0, 1.0)
    assert all(map(math.isnan, values))
    assert dwl(folder, "--html", tmp_path / "page.html").exit_code == 0


def test_a_run_without_classes_is_one_row(tmp_path: Path) -> None:
    history = [
        {
            "step": at,
            "loss": 0.1 / at,
            "nll": 2.0 / at,
            "dwl/p": 0.1,
            "dwl/alpha/rest": 1.0,
            "dwl/nll/rest": 2.0 / at,
            "dwl/token_share/rest": 1.0,
            "dwl/loss_share/rest": 1.0,
        }
        for at in (1, 2)
    ]
    result = dwl(write_run(tmp_path / "run", history, {"loss": "dft"}), "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    assert "2.000 → 1.000" in result.output
    assert "rest" not in result.output
    assert "In training: loss ↓ 0.100 → 0.050, nll ↓ 2.000 → 1.000." in result.output


def test_what_moves_beside_alpha_is_in_the_terminal_and_on_the_page(tmp_path: Path) -> None:
    history = [
        step(at)
        | {
            "dwl/signal/number": 3.0 - at / 10,
            "dwl/signal/rest": 1.0,
            "dwl/exponent/number": at / 10,
            "dwl/min_weight/number": 0.25,
            "dwl/kl/number": 0.0,
            "dwl/kl/rest": at / 100,
        }
        for at in (0, 5, 10)
    ]
    folder, page = write_run(tmp_path / "run", history), tmp_path / "page.html"
    shown = " ".join(dwl(folder, "--html", page).output.split())
    assert "Signal: number 3.000 → 2.000, rest 1.000 → 1.000." in shown
    assert "Exponent of dft: number 0.000 → 1.000." in shown
    assert "Least weight of dft: number 0.250 → 0.250." in shown
    assert "KL to the base model: number 0.000 → 0.000, rest 0.000 → 0.100." in shown
    for title in ("Signal", "Exponent of dft", "Least weight of dft", "KL to the base model"):
        assert page.read_text().count(f'aria-label="{title}"') == 1


def test_data_sets_are_a_table_and_factors_move_in_the_terminal_and_on_the_page(tmp_path: Path) -> None:
    def of(at: int) -> Entry:
        sums = {"nll": 2.0 - at / 10, "p": 0.25, "token_share": 0.75, "loss_share": 0.5 + at / 100}
        named = {f"dwl/dataset/{what}/sums": value for what, value in sums.items()}
        path = {f"dwl/dataset/{what}//data/words {{}}.jsonl": 1 - value for what, value in sums.items() if "share" in what}
        factors = {"dwl/factor/number": 0.5, "dwl/factor/rest": 1.0, "dwl/p_negative/number": 0.1}
        return {**step(at), **named, **path, **factors}

    held_out = {"eval_dwl/dataset/nll/<unseen>": 3.0, "eval_dwl/dataset/token_share/<unseen>": 1.0}
    history = [of(0), evaluation(0, 3.0, 1.0) | held_out, of(5), of(10), evaluation(10, 3.0, 1.0) | held_out]
    folder, page = write_run(tmp_path / "run", history), tmp_path / "page.html"
    result = dwl(folder, "--html", page)
    assert cells_of(result, "sums") == ["75.0 %", "50 % → 60 %", "2.00 → 1.00", "0.25 → 0.25", "–"]
    assert cells_of(result, "/data/words") == ["25.0 %", "50 % → 40 %", "–", "–", "–"]
    assert cells_of(result, "<unseen>") == ["–", "–", "–", "–", "3.00 → 3.00"]
    assert "Mean factor: number 0.500 → 0.500, rest 1.000 → 1.000." in result.output
    assert "p where the factor is below 0 ↓: number 0.100 → 0.100." in result.output
    written = page.read_text()
    assert re.search(r"<td>sums</td><td[^>]*>75.0\xa0%</td><td[^>]*>50\xa0%\xa0→ 60\xa0%</td><td[^>]*>2.00\xa0→ 1.00</td>", written)
    assert "<td>&lt;unseen&gt;</td>" in written
    assert written.count('aria-label="Mean factor"') == 1
    assert "<th>class</th>" in written


def test_shares_of_data_sets_add_up_where_a_step_has_none_of_one(tmp_path: Path) -> None:
    def of(at: int, **shares: float) -> Entry:
        return {
            **step(at),
            **{f"dwl/dataset/{what}_share/{name}": share for name, share in shares.items() for what in ("token", "loss")},
        }

    result = dwl(write_run(tmp_path / "run", [of(0, a=1.0), of(5, b=1.0), of(10, a=0.5, b=0.5)]))
    assert cells_of(result, "a") == ["50.0 %", "100 % → 50 %", "–", "–", "–"]
    assert cells_of(result, "b") == ["50.0 %", "0.0 % → 50 %", "–", "–", "–"]


def test_of_one_data_set_there_is_no_table(run: Path) -> None:
    assert "data set" not in dwl(run).output


def test_under_nll_classes_have_no_alpha(tmp_path: Path) -> None:
    entries = [{**step(at), "dwl/alpha/number": 1.0, "dwl/alpha/rest": 1.0} for at in (1, 2)]
    measured = {"loss": "nll", "dwl": {"classes": DWL["dwl"]["classes"]}}  # type: ignore[index]
    for config in (measured, None):
        (run,) = read_runs([write_run(tmp_path / str(config is None), entries, config)])
        assert not run.weighs_classes


# --- which state -------------------------------------------------------------------------------------------------------------


def test_the_state_that_was_written_last_is_read(tmp_path: Path) -> None:
    """A shorter run over the folder of a longer one."""
    write_state(tmp_path / "checkpoint-9", [step(at, number=9.0) for at in range(1, 10)], age=60)
    write_state(tmp_path / "checkpoint-2", [step(at, number=2.0) for at in (1, 2)])
    (run,) = read_runs([tmp_path])
    assert run.state.parent.name == "checkpoint-2"


def test_of_one_run_the_state_that_is_further_along_is_read(tmp_path: Path) -> None:
    """Copied without their times, the checkpoints of a run are newest in any order."""
    history = [step(at) for at in range(1, 10)]
    write_state(tmp_path / "checkpoint-9", history, age=60)
    write_state(tmp_path / "checkpoint-2", history[:2])
    (run,) = read_runs([tmp_path])
    assert run.step == 9


def test_a_checkpoint_can_be_named_itself(run: Path) -> None:
    (read,) = read_runs([run / "checkpoint-3"])
    assert read.block is not None
    assert read.step == 3


def test_a_state_that_is_being_written_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-1", [step(1)], age=5)
    newer = write_state(tmp_path / "checkpoint-2", [step(1), step(2)])
    newer.write_text(newer.read_text()[:-40])
    result = dwl(tmp_path)
    assert result.exit_code == 0
    assert "1 optimizer steps" in result.output
    assert re.search(r"checkpoint-2.*cut off", result.output.replace("\n", ""))


def test_a_checkpoint_that_the_trainer_removes_meanwhile_is_no_crash(run: Path) -> None:
    """`save_total_limit` at work: what was listed is not there any more."""
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "trainer_state.json").symlink_to(run / "gone")
    assert dwl(run).exit_code == 0


def error_of(result: Result) -> str:
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit), "a crash"
    return " ".join(result.output.split())


def test_only_broken_states_are_one_error(tmp_path: Path) -> None:
    write_state(tmp_path, []).write_text('{"log_history": [')
    assert "cut off" in error_of(dwl(tmp_path))


@pytest.mark.parametrize("text", ["[]", "{}", '{"log_history": 3}', '"x"'])
def test_another_json_of_that_name_is_no_state(tmp_path: Path, text: str) -> None:
    (tmp_path / "trainer_state.json").write_text(text)
    assert "no `log_history`" in error_of(dwl(tmp_path))


def test_a_folder_without_a_state_says_what_writes_one_and_where_one_is(run: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "save_steps" in error_of(dwl(empty))
    assert f"Did you mean {run}?" in error_of(dwl(run.parent))
    assert "output_dir" in error_of(dwl(tmp_path / "nowhere"))


def test_a_run_of_plain_axolotl_is_told_apart_from_one_that_has_not_begun(tmp_path: Path) -> None:
    assert "without `loss:`" in error_of(dwl(write_run(tmp_path / "plain", [{"step": 1, "loss": 2.0}], None)))
    assert "nothing yet" in error_of(dwl(write_run(tmp_path / "fresh", [], None)))


def test_a_config_of_another_version_costs_the_names_order_and_not_the_report(run: Path) -> None:
    (run / "dwl_config.yaml").write_text("loss: [not, ours]\n")
    result = dwl(run)
    assert result.exit_code == 0
    assert "number" in result.output
    assert "named as they were logged" in " ".join(result.output.split())


# --- several runs ------------------------------------------------------------------------------------------------------------


def test_runs_are_compared_class_by_class_against_the_first(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "two" / "out", [*HISTORY[:4], evaluation(3, number=0.9, rest=0.55)])
    result = dwl(run, "--compare", other)
    assert result.exit_code == 0, result.output
    assert "exp/out" in result.output
    assert "two/out" in result.output
    assert cells_of(result, "number") == ["0.600", "0.900 (+50.0 %)"]
    assert cells_of(result, "rest") == ["1.100", "0.550 (−50.0 %)"]
    rows, source, notes = compared(read_runs([run, other]))
    assert [(row.name, row.best) for row in rows] == [("number", 0), ("rest", 1), (None, 1)]
    assert (source, notes) == ("the held-out rows", [])


def test_what_differs_between_runs_is_said_and_nothing_else(tmp_path: Path) -> None:
    other = {"loss": "dwl", "dwl": {**DWL["dwl"], "alpha": {"number": 0.4, "rest": 0.6}}}  # type: ignore[dict-item]
    one = write_run(tmp_path / "one", HISTORY, {**DWL, "run": RECORD})
    two = write_run(
        tmp_path / "two", HISTORY, {**other, "run": {**RECORD, "learning_rate": 0.001, "versions": {"torch": "2.13.0"}}}
    )
    rows, told = differing(read_runs([one, two]))
    assert rows == [
        ("learning rate", ["0.0002", "0.001"]),
        ("dwl_plugin", ["0.1.0", "–"]),
        ("torch", ["2.14.1", "2.13.0"]),
        ("dwl.alpha.number", ["0.2", "0.4"]),
        ("dwl.alpha.rest", ["0.8", "0.6"]),
    ]
    assert told == ""
    result = dwl(one, "--compare", two, "--html", tmp_path / "page.html")
    assert cells_of(result, "dwl.alpha.number") == ["0.2", "0.4"]
    assert "<td>dwl.<wbr>alpha.<wbr>number</td><td>0.2</td><td>0.4</td>" in (tmp_path / "page.html").read_text()
    assert "No setting differs." in dwl(one, "--compare", one / "checkpoint-3").output
    bare = write_run(tmp_path / "bare", HISTORY)
    assert "is not known: bare has no dwl_config.yaml that tells all" in " ".join(dwl(one, "--compare", bare).output.split())


def test_p_is_compared_and_the_highest_is_best(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name, [*HISTORY[:4], evaluation(3, 1.0, 1.0, p=p)]) for name, p in (("a", 0.5), ("b", 0.75)))
    rows, _, _ = compared(read_runs([one, two]), "p")
    assert [(row.name, row.cells, row.best) for row in rows] == [
        (name, ["0.500", "0.750 (+0.250)"], 1) for name in ("number", "rest", None)
    ]
    assert "p ↑ at the end, the held-out rows" in dwl(one, "--compare", two).output


def test_what_does_not_compare_is_said(run: Path, tmp_path: Path) -> None:
    shorter = write_run(tmp_path / "shorter", HISTORY[:3])
    other_data = write_run(tmp_path / "data", [*HISTORY[:4], evaluation(3, number=1.0, rest=1.0, share=0.5)])
    _, _, notes = compared(read_runs([run, shorter]))
    assert any("not come equally far" in note for note in notes)
    _, _, notes = compared(read_runs([run, other_data]))
    assert any("different shares" in note for note in notes)


def test_a_run_without_evaluation_makes_training_batches_the_measure(run: Path, tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", HISTORY[1:4])
    rows, source, notes = compared(read_runs([run, bare]))
    assert source == "the last tenth of the training batches"
    assert rows[0].values == (1.0, 1.0)
    assert any("Not every run has an evaluation" in note for note in notes)


def test_a_class_that_one_run_lacks_is_a_dash(run: Path, tmp_path: Path) -> None:
    swapped = [{key.replace("number", "word"): value for key, value in entry.items()} for entry in HISTORY]
    other = write_run(tmp_path / "other", swapped, None)
    result = dwl(run, "--compare", other, "--html", tmp_path / "page.html")
    assert result.exit_code == 0
    assert cells_of(result, "word") == ["–", "0.600 (–)"]


def test_one_run_and_several_are_asked_for_in_different_words(run: Path) -> None:
    for arguments in ([run, run.parent], [run, "--compare"], []):
        assert dwl(*arguments).exit_code == 2
    assert "named twice" in error_of(dwl(run, "--compare", run))


def test_a_baseline_without_alpha_has_no_line_among_the_alphas(run: Path, tmp_path: Path) -> None:
    measured = {"loss": "nll", "dwl": {"classes": DWL["dwl"]["classes"]}}  # type: ignore[index]
    history = [{**entry, **{key: 1.0 for key in entry if key.startswith("dwl/alpha/")}} for entry in HISTORY]
    baseline = write_run(tmp_path / "nll" / "out", history, measured)
    text = page_of(baseline, "--compare", run, at=tmp_path / "page.html")
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert [legend_of(figure) for figure in figures if "<h2>α by class</h2>" in figure] == [["exp/out"]]
    assert [legend_of(figure)[:2] for figure in figures if "<h2>nll by class</h2>" in figure] == [["nll/out", "nll/out, held out"]]


# --- the page ----------------------------------------------------------------------------------------------------------------


def legend_of(figure: str) -> list[str]:
    return re.findall(r"</svg>([^<]*)</li>", figure)


HOSTILE = "</svg><script>alert(1)</script>\"'&$x^2$"


class Tags(HTMLParser):
    """What a browser makes of the page: elements, links, attributes by name, the text of scripts and of what is no script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.script = self.words = ""
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.script += data
        else:
            self.words += data

    @property
    def curves(self) -> list[dict[str, Any]]:
        """What the page's script reads, a panel each."""
        return [json.loads(value) for name, value in self.attributes if name == "data-curves"]


def checked_page(text: str) -> Tags:
    """A page that has no script but its own, no handler, and asks for nothing."""
    tags = Tags(text)
    assert tags.tags.count("script") == 1
    digest = base64.b64encode(hashlib.sha256(tags.script.encode()).digest()).decode()
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-" + digest + "'"
    assert ("content", policy) in tags.attributes
    assert tags.script == OWN_SCRIPT.read_text(encoding="utf-8")
    assert {"link", "img", "iframe", "object", "image", "base", "form"}.isdisjoint(tags.tags)
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in tags.links)
    assert not re.findall(r"url\((?!#)|@import", text)
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    return tags


def page_of(*arguments: object, at: Path) -> str:
    result = dwl(*arguments, "--html", at)
    assert result.exit_code == 0, result.output
    return at.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return page_of(write_run(folder / "run", HISTORY), at=folder / "page.html")


def test_the_page_stands_alone(page: str) -> None:
    checked_page(page)
    assert page.count('role="img"') == 1 + 3 + 3 + 1  # α; nll and p of all targets, number, rest; shares


def test_names_from_strangers_are_text_and_nothing_else(tmp_path: Path) -> None:
    history = [{key.replace("number", HOSTILE): value for key, value in entry.items()} for entry in HISTORY]
    hostile = write_run(tmp_path / HOSTILE.replace("/", "∕"), history, {**DWL, "run": {**RECORD, "model": HOSTILE}})
    other = write_run(tmp_path / "b", history, {**DWL, "run": {**RECORD, "model": "b"}})
    for arguments in ([hostile], [hostile, "--compare", other]):
        tags = checked_page(page_of(*arguments, at=tmp_path / "page.html"))
        assert HOSTILE in tags.words
        drawn = "".join(re.findall(r"<text.*?</text>", (tmp_path / "page.html").read_text(), flags=re.DOTALL))
        if len(arguments) == 1:  # the share of the loss has the names of classes in it
            assert "$x^2$" in drawn, "a name was read as a formula"
            assert HOSTILE in [line["name"] for line in tags.curves[0]["lines"]]


def test_a_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    history = [{key.replace("number", "\x1b[31mred[bold]"): value for key, value in entry.items()} for entry in HISTORY]
    result = dwl(write_run(tmp_path / "run", history, None))
    assert "\x1b" not in result.output
    assert "[31mred" in result.output


def curves_of(page: str, figure: str) -> list[dict[str, Any]]:
    return Tags(next(part for part in page.split("<figure>") if f"<h2>{figure}</h2>" in part)).curves


def test_under_the_pointer_are_the_values_that_were_logged(page: str) -> None:
    def lines(panel: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
        return {line["name"]: list(zip(line["steps"], line["values"], strict=True)) for line in panel["lines"]}

    (alpha,) = curves_of(page, "α over the run")
    assert lines(alpha) == {"number": [(1, 0.2), (2, 0.45), (3, 0.7)], "rest": [(1, 0.8), (2, 0.55), (3, 0.3)]}
    _, number, rest = curves_of(page, "nll by class")
    assert lines(number) == {"training batches": [(1, 3.0), (2, 2.0), (3, 1.0)], "held-out rows": [(0, 3.0), (3, 0.6)]}
    assert lines(rest) == {"training batches": [(1, 1.0), (2, 1.0), (3, 0.5)], "held-out rows": [(0, 1.0), (3, 1.1)]}
    every, *_ = curves_of(page, "p by class")
    assert lines(every) == {"training batches": [(1, 0.5), (2, 0.5), (3, 0.5)], "held-out rows": [(0, 0.5), (3, 0.625)]}


def test_a_gap_is_null_and_a_name_of_a_stranger_ends_no_attribute(tmp_path: Path) -> None:
    name = "'\"><script>&amp;</script>\ud800"
    gone = {key: value for key, value in step(2).items() if key != "dwl/nll/number"}
    history = [{key.replace("number", name): value for key, value in entry.items()} for entry in (step(1), gone, step(3))]
    text = page_of(write_run(tmp_path / "run", history, None), at=tmp_path / "page.html")
    checked_page(text)
    assert curves_of(text, "nll by class")[1]["lines"][0]["values"] == [3.0, None, 3.0]
    assert curves_of(text, "α over the run")[0]["lines"][0]["name"] == "'\"><script>&amp;</script>‹d800›"


@pytest.mark.parametrize("last", [1.0, 0.01])
def test_a_value_is_marked_where_its_curve_is_drawn(tmp_path: Path, last: float) -> None:
    """On linear axes, and on logarithmic ones."""
    history: list[Entry] = [step(at, number=number) for at, number in ((1, 3.0), (4, 2.0), (6, last))]
    text = page_of(write_run(tmp_path / "run", history), at=tmp_path / "page.html")
    panel = re.findall(r"<svg[^>]*role=\"img\".*?</svg>", text[text.index("<h2>nll by class") :], flags=re.DOTALL)[1]
    number = curves_of(text, "nll by class")[1]
    width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', panel).groups())  # type: ignore[union-attr]
    scale = math.log if number["log"] else float
    assert number["log"] == (last == 0.01)

    def share(value: float, ends: tuple[float, float], by: Any = float) -> float:
        return (by(value) - by(ends[0])) / (by(ends[1]) - by(ends[0]))

    left, top, right, bottom = number["box"]
    line = number["lines"][0]
    marked = [
        (width * (left + (right - left) * share(x, number["x"])), height * (bottom - (bottom - top) * share(y, number["y"], scale)))
        for x, y in zip(line["steps"], line["values"], strict=True)
    ]
    drawn = re.findall(r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*--c0', panel)
    assert [float(value) for value in drawn[0]] == pytest.approx([value for point in marked for value in point], abs=0.01)


def test_an_axis_that_is_logarithmic_says_so_and_a_small_range_is_linear(tmp_path: Path) -> None:
    wide: list[Entry] = [step(1, number=3.0), step(2, number=0.01)]
    texts = [
        page_of(write_run(tmp_path / name, history), at=tmp_path / "page.html") for name, history in (("a", wide), ("b", HISTORY))
    ]
    drawn = [re.findall(r"<text[^>]*>(nll[^<]*)</text>", text) for text in texts]
    assert drawn == [["nll, logarithmic"] * 3, ["nll"] * 3]


def test_each_point_of_a_long_curve_is_said_to_be_a_mean(tmp_path: Path) -> None:
    history: list[Entry] = [step(at, number=float(at)) for at in range(1, 161)]
    text = page_of(write_run(tmp_path / "run", history), at=tmp_path / "page.html")
    assert text.count("Each point is the mean of up to 2 logged steps.") == 2  # nll and p; α is drawn step by step
    assert curves_of(text, "nll by class")[1]["lines"][0]["values"][:2] == [1.5, 3.5]


def test_a_phone_shows_no_letter_below_nine_pixels(page: str) -> None:
    """A figure is as wide as its page; on a phone of 390 pixels that is 358."""
    drawn = re.findall(r'<svg[^>]*role="img".*?</svg>', page, flags=re.DOTALL)
    for svg in drawn:
        width = float(re.search(r'viewBox="0 0 (\S+)', svg)[1])  # type: ignore[index]
        sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:bold )?([\d.]+)px", svg)]
        assert min(sizes) * 358 / width >= 9


@needs_a_browser
def test_a_phone_shows_all_of_the_page_and_a_value_where_it_points(tmp_path: Path) -> None:
    history = [{key.replace("number", "a_class_with_a_long_name" * 4): value for key, value in entry.items()} for entry in HISTORY]
    runs = [write_run(tmp_path / f"a_folder_with_a_long_name_{at}" / "out", history, {**DWL, "run": RECORD}) for at in (1, 2)]
    for arguments in ([runs[0]], [runs[0], "--compare", runs[1]]):
        page_of(*arguments, at=tmp_path / "page.html")
        assert looked_at(tmp_path / "page.html", OUT_OF_SIGHT) == []
    page_of(write_run(tmp_path / "run", HISTORY), at=tmp_path / "page.html")
    pointing = """
      const panel = page.querySelectorAll("[data-curves]")[2];  // nll of number
      const tip = page.getElementById("tip");
      const { left, top, width } = panel.getBoundingClientRect();
      const at = (share) => ({ clientX: left + share * width, clientY: top + 50, bubbles: true, pointerType: "mouse" });
      const seen = [];
      const note = (event) => { panel.dispatchEvent(event); seen.push(tip.innerText); };
      for (const share of [0.999, 0.5, 0.05]) note(new PointerEvent("pointermove", at(share)));
      panel.dispatchEvent(new PointerEvent("pointerleave", at(0)));
      seen.push(tip.hidden);
      for (const key of ["End", "ArrowLeft"]) note(new KeyboardEvent("keydown", { key }));
      return seen.map((words) => String(words).replace(/\\s+/g, " ").trim());
    """
    assert looked_at(tmp_path / "page.html", pointing) == [
        "step 3 training batches 1 held-out rows 0.6",
        "step 1 training batches 3",
        "step 0 held-out rows 3",
        "true",
        "step 3 training batches 1 held-out rows 0.6",
        "step 2 training batches 2",
    ]


def test_on_a_narrow_page_each_number_of_a_class_is_named(page: str) -> None:
    for cells in re.findall(r"<tr[^>]*><td>(?:number|rest|all)</td>(.*?)</tr>", page):
        assert re.findall(r'data-of="([^"]*)"', cells) == ["tokens", "share of loss", "α", "nll ↓", "p ↑"]


def test_which_way_is_good_is_said_of_each_number(page: str) -> None:
    told = dict(re.findall(r"<tr><td>([^<]*)</td><td>(lower|higher|neither)</td>", page))
    assert told == {"nll": "lower", "p": "higher", "α": "neither", "share of loss": "neither", "loss": "lower"}


def test_what_trl_logs_of_all_targets_is_in_the_terminal_and_on_the_page(tmp_path: Path) -> None:
    history = [step(at) | {"entropy": 2.0 - at / 10, "mean_token_accuracy": 0.5} for at in range(1, 4)]
    folder, page = write_run(tmp_path / "run", history), tmp_path / "page.html"
    result = dwl(folder, "--html", page)
    assert "entropy 1.900 → 1.700, token accuracy ↑ 0.500 → 0.500." in " ".join(result.output.split())
    text = page.read_text()
    assert [line["values"] for line in curves_of(text, "Entropy")[0]["lines"]] == [[1.9, 1.8, 1.7]]
    assert "<td>Entropy</td><td>neither</td>" in text


def test_colours_are_the_pages_so_that_dark_and_print_change_them(page: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert not re.search("|".join([*plots.PALETTE, plots.INK, plots.GRID]), drawn)
    assert set(re.findall(r"var\((--\w+)\)", drawn)) <= set(re.findall(r"(--\w+):", page))
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page


def test_no_two_of_thirty_lines_look_alike() -> None:
    assert len({str(plots.look_of(index)) for index in range(30)}) == 30


def test_a_long_curve_is_drawn_as_means_of_neighbours_and_keeps_its_gaps() -> None:
    curve = LoggedCurve(tuple(range(1, 9)), (1.0, 3.0, math.nan, 5.0, math.nan, math.nan, 7.0, 9.0))
    thin = curve.thinned(4)
    assert thin.steps == (2, 4, 6, 8)
    assert (thin.values[0], thin.values[1], thin.values[3]) == (2.0, 5.0, 8.0)
    assert math.isnan(thin.values[2])
    assert curve.thinned(8) is curve


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    history: list[Entry] = [step(at, number=1 + 1 / at) for at in range(1, 5001)]
    assert len(page_of(write_run(tmp_path / "run", history), at=tmp_path / "page.html")) < 300_000


# --- writing -----------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_page_and_says_so(run: Path, tmp_path: Path) -> None:
    old = tmp_path / "page.html"
    old.write_text("old")

    assert "No space left on device; the file that is there was not touched" in error_of(dwl(run, "--html", old))
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp", "page.html"]


def test_a_folder_that_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    assert "No such file or directory" in error_of(dwl(run, "--html", tmp_path / "no" / "page.html"))


def test_a_written_file_replaces_whole_and_follows_links(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


def test_a_pipe_or_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert pipe.is_fifo()


def test_without_matplotlib_the_table_is_there_and_the_page_names_the_remedy(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    assert dwl(run).exit_code == 0
    result = dwl(run, "--html", tmp_path / "page.html")
    assert "pip install 'axolotl-dwl[plots]'" in error_of(result)
    assert "0.20 → 0.70" in " ".join(result.output.split()), "the table comes first"


def test_reading_a_state_needs_nothing_heavy(run: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys; from pathlib import Path; from rich.console import Console; from dwl_plugin.cli.report import report;"
        f"report(Console(quiet=True), [Path({json.dumps(str(run))})], None);"
        "print([name for name in ('torch', 'axolotl', 'transformers', 'matplotlib') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


OF_RECORD = (
    "data a.jsonl, <b>.jsonl; rows 1,234",
    "began 2026-11-27 10:05:12+00:00, resumed at step 4",
    "learning rate 0.0002; batch 64 rows (2 × 8 accumulated × 4 ranks)",
    "torch 2.14.1",
)


def test_a_run_tells_what_it_was_made_of(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", HISTORY, {**DWL, "run": RECORD})
    told = dwl(run).output
    assert all(words in told for words in OF_RECORD)
    assert "\x1b" not in told


@pytest.mark.parametrize("record", [None, [1], "text", {"rows": -1}, {"batch": {"micro": 10**16}}, {"data": {"a": 1}}, {}])
def test_what_no_run_wrote_of_itself_is_left_out_and_the_rest_is_read(tmp_path: Path, record: Any) -> None:
    plain, odd = (
        write_run(tmp_path / name / "run", HISTORY, config) for name, config in (("a", DWL), ("b", {**DWL, "run": record}))
    )
    assert dwl(odd).output == dwl(plain).output.replace("a/run", "b/run")
