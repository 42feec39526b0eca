"""`dwl report` on folders that somebody else made: an error of ours or the right report, soon, and of a size that can be read."""

from __future__ import annotations

import json
import math
import os
import random
import re
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from dwl_plugin.cli.main import main
from dwl_plugin.cli.report import run as reading
from dwl_plugin.cli.report.run import read_runs
from tests.cli.little_runs import DWL, Entry, evaluation, step, write_run, write_state
from tests.cli.test_report import checked_page

HISTORY = [
    evaluation(0, number=3.0, rest=1.0),
    *(step(at, number=3.0 - at / 10, rest=1.0, alpha=0.2 + at / 100) for at in range(1, 9)),
    evaluation(8, number=0.6, rest=1.1),
]
STATE, CONFIG = "trainer_state.json", "dwl_config.yaml"


def dwl(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, ["report", *map(str, arguments)])


def checked(result: Result) -> str:
    """The output of a command that ended in a report or in an error of ours."""
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 0 or (result.exit_code == 1 and result.output.startswith("Error: ")), result.output
    assert len(result.output) < 50_000
    assert not {char for char in result.output if unicodedata.category(char) in ("Cc", "Cf", "Cs")} - {"\n"}
    return result.output


def error_of(result: Result) -> str:
    shown = checked(result)
    assert result.exit_code == 1, shown
    return shown


# --- one thing at a time -----------------------------------------------------------------------------------------------------


def write_text(folder: Path, text: str) -> Path:
    """A run whose only state is `text`."""
    path = write_state(folder / "checkpoint-8", HISTORY)
    path.write_text(text)
    return folder


def test_a_pipe_or_a_device_in_the_place_of_a_state_is_named_and_not_waited_for(tmp_path: Path) -> None:
    path = write_state(tmp_path / "checkpoint-1", HISTORY)
    path.unlink()
    os.mkfifo(path)
    assert "checkpoint-1/trainer_state.json is not read: it is a pipe." in error_of(dwl(tmp_path))
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "it is a device" in error_of(dwl(tmp_path))
    path.unlink()
    path.mkdir()
    assert "it is a folder" in error_of(dwl(tmp_path))


def test_a_pipe_in_the_place_of_the_config_costs_only_the_config(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", HISTORY, None)
    os.mkfifo(folder / CONFIG)
    result = dwl(folder)
    assert "3.000 → 0.600" in checked(result)
    assert "dwl_config.yaml is not read: it is a pipe." in " ".join(result.output.split())


def test_a_state_that_would_fill_the_memory_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", HISTORY)
    os.truncate(folder / "checkpoint-8" / STATE, 1 << 40)
    assert "more than 262,144 KiB" in error_of(dwl(folder))
    monkeypatch.setattr(reading, "_STATE_VALUES", 1000)
    assert "more than 1,000 values" in error_of(dwl(write_text(tmp_path / "many", f"[{'0,' * 1001}0]")))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"log_history": ' + "[" * 200_000 + "]" * 200_000 + "}"])
def test_json_that_is_nested_without_end_is_passed_over(tmp_path: Path, text: str) -> None:
    assert "was passed over" in error_of(dwl(write_text(tmp_path, text)))


@pytest.mark.parametrize("text", ["loss: " + "[" * 100_000, "%YAML 1." + "1" * 5000 + "\n---\nloss: dwl", "loss: " + "1" * 9000])
def test_yaml_that_cannot_be_read_costs_only_the_config(tmp_path: Path, text: str) -> None:
    folder = write_run(tmp_path / "run", HISTORY)
    (folder / CONFIG).write_text(text)
    assert "3.000 → 0.600" in checked(dwl(folder))


def test_a_report_fetches_no_pack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run writes down has the classes of its packs in it, so one that names a pack is not of a run."""
    asked: list[object] = []
    monkeypatch.setattr("dwl_plugin.config.packs.read_pack", lambda *arguments: asked.append(arguments))
    hub = f"hf://somebody/packs@{'0' * 40}/pack.yml"
    for dwl_block in ({"pack": hub}, {"classes": {"number": {"any": [{"regex": "1"}, {"pack": hub}]}}}):
        folder = write_run(tmp_path / next(iter(dwl_block)), HISTORY, None)
        (folder / CONFIG).write_text(yaml.safe_dump({"loss": "dwl", "dwl": dwl_block}))
        assert "named as they were logged" in " ".join(checked(dwl(folder)).split())
    assert not asked


def test_a_class_may_be_called_pack(tmp_path: Path) -> None:
    history = [{key.replace("number", "pack"): value for key, value in entry.items()} for entry in HISTORY]
    config = yaml.safe_load(yaml.safe_dump(DWL).replace("number", "pack"))
    (run,) = read_runs([write_run(tmp_path / "run", history, config)])
    assert run.block is not None


def test_a_number_beyond_any_run_is_a_gap_and_is_counted(tmp_path: Path) -> None:
    history: list[Entry] = [step(at) for at in range(1, 5)]
    history[1] |= {"nll": 10**400, "dwl/nll/number": 1e308}
    history[2] |= {"dwl/nll/number": -math.inf, "loss": 1e20}
    (run,) = read_runs([write_run(tmp_path / "run", history)])
    assert [math.isnan(value) for value in run.curve("dwl/nll/number").values] == [False, True, True, False]
    assert any("4 numbers were left out" in note for note in run.notes)


@pytest.mark.parametrize("odd", [None, True, "3", 2.5, -1, math.nan, 10**30, [3]])
def test_an_entry_without_a_usable_step_is_left_out_and_counted(tmp_path: Path, odd: object) -> None:
    folder = tmp_path / "run"
    path = write_run(folder, [step(1), step(2), step(3)]) / "checkpoint-3" / STATE
    state = json.loads(path.read_text())
    state["log_history"][1]["step"] = odd
    path.write_text(json.dumps(state))
    (run,) = read_runs([folder])
    assert run.curve("nll").steps == (1, 3)
    assert any("1 entry of the log was left out" in note for note in run.notes)


def test_of_too_many_classes_those_with_the_most_tokens_are_shown_and_the_rule_is_said(tmp_path: Path) -> None:
    names = [f"c{at}" for at in range(2000)]
    entry = {"nll": 1.0, **{f"dwl/{key}/{name}": 0.5 for name in names for key in ("nll", "alpha", "loss_share")}}
    shares = {f"dwl/token_share/{name}": 0.9 if name == "c1234" else (2000 - at) / 1e7 for at, name in enumerate(names)}
    folder, page = write_run(tmp_path / "run", [{"step": at, **entry, **shares} for at in (1, 2)], None), tmp_path / "page.html"
    began = time.perf_counter()
    shown = checked(dwl(folder, "--html", page))
    assert time.perf_counter() - began < 30
    rows = re.findall(r"^ (c\d+) ", shown, flags=re.MULTILINE)
    assert rows == [*names[:99], "c1234"]
    assert "Of 2,000 classes the 100 with the most tokens are shown." in shown
    text = page.read_text()
    assert len(text) < 1_000_000
    assert text.count("Of these 100 classes the 30 with the most tokens are shown.") == 3
    figures = re.findall(r"<figure>.*?</figure>", text, flags=re.DOTALL)
    assert [all(f">{name}<" in figure for name in ("c28", "c1234")) and ">c29<" not in figure for figure in figures] == [True] * 3


def test_of_too_many_steps_some_are_used_and_both_ends_are_among_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_MOST_STEPS", 4)
    (run,) = read_runs([write_run(tmp_path / "run", [step(at) for at in range(11)])])
    assert run.curve("nll").steps == (0, 3, 6, 10)
    assert "Of 11 logged steps 4 are used, evenly spread." in run.notes


def test_a_class_without_a_name_is_not_taken_for_all_targets(tmp_path: Path) -> None:
    history = [{key.removesuffix("number"): value for key, value in entry.items()} for entry in HISTORY]
    folder, page = write_run(tmp_path / "run", history, None), tmp_path / "page.html"
    assert "‹no name›" in checked(dwl(folder, "--compare", write_run(tmp_path / "other", HISTORY), "--html", page))
    assert page.read_text().count("<td>all</td>") == 4


def test_a_checkpoints_name_cannot_steer_the_terminal(tmp_path: Path) -> None:
    os.mkfifo(write_state(tmp_path / "checkpoint-\x1b[31m", HISTORY).with_name("pipe"))
    os.replace(tmp_path / "checkpoint-\x1b[31m" / "pipe", tmp_path / "checkpoint-\x1b[31m" / STATE)
    assert "checkpoint-‹1b›[31m" in error_of(dwl(tmp_path))


def test_thousands_of_broken_checkpoints_are_a_few_lines(tmp_path: Path) -> None:
    for at in range(2000):
        (tmp_path / f"checkpoint-{at}").mkdir()
        (tmp_path / f"checkpoint-{at}" / STATE).write_text("{")
    shown = error_of(dwl(tmp_path))
    assert len(shown.splitlines()) < 15
    assert "And 1,990 more such lines." in shown


def test_states_are_read_until_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [
        write_state(tmp_path / f"checkpoint-{at}", [step(later) for later in range(1, at + 1)], age=at).stat().st_size
        for at in (1, 2, 3)
    ]
    monkeypatch.setattr(reading, "_ALL_STATES_BYTES", sum(sizes[:2]))
    (run,) = read_runs([tmp_path])
    assert run.step == 2
    assert any(note.startswith("1 older states were not looked at") for note in run.notes)


def test_a_path_that_no_folder_can_have_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    for path in ("x" * 5000, tmp_path / "loop"):
        assert "is not a folder" in error_of(dwl(path))


def test_the_page_is_not_written_over_what_it_was_read_from(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", HISTORY)
    link, state = tmp_path / "page.html", folder / "checkpoint-8" / STATE
    link.symlink_to(state)
    before = state.read_bytes()
    for page in (link, state, folder / CONFIG):
        assert "is a file of the run. Nothing was written" in " ".join(error_of(dwl(folder, "--html", page)).split())
    assert state.read_bytes() == before


# --- two hundred at once -----------------------------------------------------------------------------------------------------

VALUES = (
    *(
        10**15,
        10**16,
        -(10**20),
        10**400,
        1e15,
        -1e15,
        1e308,
        5e-324,
        1e-15,
        -0.0,
        math.nan,
        math.inf,
        -math.inf,
        0,
        -1,
        True,
        None,
    ),
    *("3.0", "", "\ud800", [1], [[]], {}, {"a": 1}, [[[[0]]]]),
)
NAMES = (
    *("", "/", "a/b/c", "_private", "all targets", "rest/", "$x^2$", "日本語", "😀", "</svg><script>alert(1)</script>", "'\"&"),
    *("\x00", "\x1b[31m", "\n\n", "\u202eabc", "\ud800", "x" * 100_000, "\x9b", "%s{0}{}", "[bold]", "dwl/nll/a", "0", "NaN"),
)
Mutation = Callable[[random.Random, Path], None]


def of_state(change: Callable[[random.Random, dict[str, Any]], object]) -> Mutation:
    """A mutation of the state as JSON; what `change` returns takes its place."""

    def mutate(rng: random.Random, folder: Path) -> None:
        path = folder / "checkpoint-8" / STATE
        state = json.loads(path.read_text())
        changed = change(rng, state)
        path.write_text(json.dumps(state if changed is None else changed))

    return mutate


def of_bytes(name: str, change: Callable[[random.Random, bytes], bytes]) -> Mutation:
    def mutate(rng: random.Random, folder: Path) -> None:
        path = folder / name
        path.write_bytes(change(rng, path.read_bytes()))

    return mutate


def renamed(rng: random.Random, state: dict[str, Any]) -> None:
    name = rng.choice(NAMES)
    state["log_history"] = [{key.replace("number", name): value for key, value in row.items()} for row in state["log_history"]]


def valued(rng: random.Random, state: dict[str, Any], keys: str = "") -> None:
    """Other values under some keys, the step never among them."""
    for row in rng.sample(state["log_history"], rng.randint(1, 9)):
        for key in [key for key in row if key != "step" and key.endswith(keys) and rng.random() < 0.4]:
            row[key] = rng.choice(VALUES)


def stepped(rng: random.Random, state: dict[str, Any]) -> None:
    for row in rng.sample(state["log_history"], rng.randint(1, 9)):
        row["step"] = rng.choice(VALUES)


def replaced(rng: random.Random, state: dict[str, Any]) -> None:
    rows = state["log_history"]
    rows[rng.randrange(len(rows))] = rng.choice([None, 3, "row", [], [{}], {}, {"step": 3}, {"nll": 1.0}, math.nan])


def topped(rng: random.Random, state: dict[str, Any]) -> object:
    key = rng.choice([*state, ""])
    if not key:
        return rng.choice([[], {}, None, 3, "state", [state]])
    state[key] = rng.choice(VALUES)
    return None


def widened(rng: random.Random, state: dict[str, Any]) -> None:
    more = {f"{what}/{at}": rng.random() for at in range(rng.choice([40, 400])) for what in ("dwl/nll", "dwl/alpha", "dwl/kl")}
    for row in state["log_history"]:
        row |= more


def lengthened(rng: random.Random, state: dict[str, Any]) -> None:
    state["log_history"] += [step(at, number=rng.random()) for at in range(9, rng.choice([100, 3000]))]


def thinned(rng: random.Random, state: dict[str, Any]) -> None:
    state["log_history"] = [
        {key: value for key, value in row.items() if key == "step" or rng.random() < 0.7}
        for row in state["log_history"]
        if rng.random() < 0.8
    ]


def cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) or 1)]


def flipped(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 3, 30])):
        changed[rng.randrange(len(changed))] = rng.randrange(256)
    return bytes(changed)


def inserted(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) or 1)
    pieces = [
        b"\xff\xfe",
        b"\x00",
        b"[" * 3000,
        b"{" * 100_000,
        b"9" * 5000,
        b"1e999",
        b"&a *a",
        b"!!python/name:os.system ",
        b"\n- ",
    ]
    return content[:at] + rng.choice(pieces) + content[at:]


def other_kind(rng: random.Random, folder: Path) -> None:
    """Something that is no file, or another file, in the place of the state or the config."""
    path = folder / rng.choice([f"checkpoint-8/{STATE}", CONFIG])
    path.unlink()
    other = folder.parent / "other.json"
    other.write_text(rng.choice(['{"token": "secret"}', "secret: yes", "[1]", ""]))
    rng.choice(
        [
            lambda: os.mkfifo(path),
            path.mkdir,
            lambda: path.symlink_to("/dev/zero"),
            lambda: path.symlink_to("/dev/full"),
            lambda: path.symlink_to("nowhere"),
            lambda: path.symlink_to(path.name),
            lambda: path.symlink_to(other),
            lambda: path.symlink_to("/proc/self/mem"),
        ]
    )()


def other_checkpoints(rng: random.Random, folder: Path) -> None:
    text = (folder / "checkpoint-8" / STATE).read_bytes()
    for name in rng.sample(
        ["9" * 200, "-1", "\x1b[31m", "nan", "0x8", "٣", "", "8 ", *map(str, range(20, 60))], rng.randint(1, 30)
    ):
        path = folder / f"checkpoint-{name}" / STATE
        path.parent.mkdir()
        path.write_bytes(rng.choice([text, cut(rng, text), b"", b"{}"]))
        os.utime(path, (rng.choice([0, 1, 2**32]),) * 2)


def other_config(rng: random.Random, folder: Path) -> None:
    texts = ["", "3", "- a", "loss: dwl", "loss: nll\ndwl: {classes: {a: {regex: '('}}}", "a: &a [*a]", "dwl: {pack: ./secret.yml}"]
    (folder / CONFIG).write_text(
        rng.choice([*texts, "loss: dft\n" * 3, f"loss: nll\nx: {'y' * 300_000}", "loss: " + "{a: " * 2000])
    )


ANYTHING: tuple[Mutation, ...] = (
    *map(of_state, (renamed, valued, stepped, replaced, topped, widened, lengthened, thinned)),
    *(of_bytes(f"checkpoint-8/{STATE}", change) for change in (cut, flipped, inserted)),
    *(of_bytes(CONFIG, change) for change in (cut, flipped, inserted)),
    *(other_kind, other_checkpoints, other_config),
)


def shuffled_rows(rng: random.Random, state: dict[str, Any]) -> None:
    rng.shuffle(state["log_history"])


def shuffled_keys(rng: random.Random, state: dict[str, Any]) -> object:
    state["log_history"] = [dict(rng.sample(list(row.items()), len(row))) for row in state["log_history"]]
    return dict(rng.sample(list(state.items()), len(state)))


def twice(rng: random.Random, state: dict[str, Any]) -> None:
    """Rows as they were, after wrong ones of the same steps."""
    rows = state["log_history"]
    rows[:0] = [{key: value if key == "step" else 7.0 for key, value in row.items()} for row in rng.sample(rows, 4)]


def more_of_others(rng: random.Random, state: dict[str, Any]) -> None:
    for row in state["log_history"]:
        row |= {"grad_norm": rng.choice(VALUES), "learning_rate": "1e-5", "": [[]], "rewards/x": 10**300, "dwl": 1, "eval_": 2}
    state["log_history"] += [{"step": "9", "train_runtime": 10**30}, {"grad_norm": math.inf}, {}]
    state |= {"stateful_callbacks": {"a": [[[]]]}, "best_metric": 1e400, "epoch": 10**100}


def respaced(rng: random.Random, content: bytes) -> bytes:
    return json.dumps(
        json.loads(content), indent=rng.choice([None, 0, 8]), separators=rng.choice([(",", ":"), (" , ", " : ")])
    ).encode()


def reencoded(rng: random.Random, content: bytes) -> bytes:
    return content.decode().encode(rng.choice(["utf-8-sig", "utf-16", "utf-32"]))


def linked(rng: random.Random, folder: Path) -> None:
    """Where the user keeps large folders."""
    away = folder.parent / "away"
    os.rename(folder / "checkpoint-8", away)
    (folder / "checkpoint-8").symlink_to(away)


def older_checkpoints(rng: random.Random, folder: Path) -> None:
    for at in rng.sample(range(1, 8), 3):
        write_state(folder / f"checkpoint-{at}", HISTORY[:at], age=60)
    path = write_state(folder / "checkpoint-5000", [], age=60)
    path.write_bytes(rng.choice([b"", b"{", b"[]"]))
    os.utime(path, (1, 1))


SAME: tuple[Mutation, ...] = (
    *map(of_state, (shuffled_rows, shuffled_keys, more_of_others)),
    of_bytes(f"checkpoint-8/{STATE}", respaced),
    *(linked, older_checkpoints),
)
LAST_SAME: tuple[Mutation, ...] = (of_bytes(f"checkpoint-8/{STATE}", reencoded), of_state(twice))


def sampled(seed: int, folder: Path) -> tuple[Path, str]:
    """A little run after mutations, and of what kind they are."""
    rng = random.Random(seed)
    run = write_run(folder / f"{seed:05}" / "out", HISTORY)
    kind = rng.choices(["anything", "one class", "same"], [6, 2, 3])[0]
    if kind == "anything":
        mutations = rng.sample(ANYTHING, rng.choice([1, 1, 2, 3]))
    elif kind == "one class":
        mutations = [of_state(lambda rng, state: valued(rng, state, "/number"))]
    else:
        mutations = [*rng.sample(SAME, rng.choice([1, 2, 3])), *rng.sample(LAST_SAME, 1)]
    for mutate in sorted(mutations, key=lambda mutate: mutate is other_kind):  # after it there is nothing to read
        try:
            mutate(rng, run)
        except (
            OSError,
            ValueError,
            AttributeError,
            TypeError,
            KeyError,
            RecursionError,
        ):  # what one made, the next may have no use for
            continue
    return run, kind


def rows_of(shown: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in shown.splitlines() if re.match(r" (number|rest|all) ", line)}


def look_at(folder: Path, seeds: range, with_page: Callable[[int], bool]) -> dict[str, int]:
    """Report on every run; how many of a kind there were, and how many of those ended in an error."""
    right = dwl(write_run(folder / "right" / "out", HISTORY)).output.replace("right/out", "")
    seen: dict[str, int] = {}
    for seed in seeds:
        run, kind = sampled(seed, folder)
        page = folder / f"{seed}.html"
        began = time.perf_counter()
        result = dwl(run, *(["--html", page] if with_page(seed) else []))
        took = time.perf_counter() - began
        shown = checked(result)
        assert took < (30 if with_page(seed) else 10), f"seed {seed}: {took:.1f} s"
        assert "secret" not in shown.replace("./secret.yml", "")
        if kind != "anything":
            assert result.exit_code == 0, f"seed {seed}: {shown}"
        if kind == "same" and not with_page(seed):
            assert shown.replace(f"{seed:05}/out", "") == right, f"seed {seed}"
        if kind == "one class":
            assert rows_of(shown)["rest"] == rows_of(right)["rest"], f"seed {seed}"
        if with_page(seed) and result.exit_code == 0:
            text = page.read_text(encoding="utf-8")
            assert len(text) < 2_000_000
            checked_page(text)
        for key in (kind, f"error of {kind}") if result.exit_code else (kind,):
            seen[key] = seen.get(key, 0) + 1
    return seen


def test_of_200_mutated_runs_each_is_an_error_of_ours_or_the_right_report(tmp_path: Path) -> None:
    seen = look_at(tmp_path, range(200), lambda seed: seed % 40 == 0)
    assert 20 < seen["error of anything"] < seen["anything"] - 20
    assert seen["same"] > 30


@pytest.mark.slow
def test_of_more_mutated_runs_with_their_pages(tmp_path: Path) -> None:
    look_at(tmp_path, range(200, 500), lambda seed: seed % 5 == 0)
