"""What a stranger wrote is printed as text: no command lets it drive the terminal, forge a style, or make a line of its own."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import Progress
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

import dwl_plugin
from dwl_plugin.cli.main import main
from dwl_plugin.cli.output import Console, print_json, say
from dwl_plugin.config import parse
from dwl_plugin.config.overrides import overrides_of
from dwl_plugin.errors import ConfigError, DWLError, Problem, RunError, printable
from dwl_plugin.run.startup import log_line
from tests.cli.little_runs import step, write_run

Run = Callable[..., Result]
Write = Callable[..., Path]

FORGED = "No problem found."
ATTACKS = {
    "csi": "\x1b[2K\x1b[1A",
    "conceal": "\x1b[8m",
    "osc": "\x1b]0;pwned\a",
    "link": "\x1b]8;;https://evil.example\x1b\\",
    "c1": "\x9b2K\x9d0;x\x9c",
    "return": "\r",
    "backspace": "\b\b\b",
    "delete": "\x7f",
    "line": f"\n{FORGED}\n",
    "other lines": f"\x0b{FORGED}\x0c{FORGED}\x85{FORGED}\u2028{FORGED}\u2029",
    "bidi": "\u202e\u2066",
    "nothing to see": "\u200b\ufeff\u2063",
    "markup": "[conceal][link=https://evil.example]x[/] [/nothing]",
}
EVIL = "e" + "".join(ATTACKS.values()) + "vil"
IN_YAML = "e" + "".join(text for name, text in ATTACKS.items() if name != "nothing to see") + "\u200bvil"
"""PyYAML takes a U+FEFF inside a text for no character."""


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is printed goes to a terminal that shows colours."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def assert_harmless(printed: str) -> None:
    """Nothing but text, ends of lines and colours as rich writes them; no line that only a stranger wrote."""
    assert "\x1b[8m" not in printed, "concealed"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    assert not [char for char in plain if char != "\n" and printable(char) != char]
    assert FORGED not in map(str.strip, plain.splitlines())


def shown(console_prints: Callable[[Console], None], capsys: pytest.CaptureFixture[str]) -> str:
    console_prints(Console())
    return capsys.readouterr().out


def table(cell: Any) -> Table:
    made = Table(title=EVIL.replace("\n", " "))
    made.add_column(EVIL.replace("\n", " "), overflow="fold")
    made.add_row(cell)
    return made


ONE_LINE = EVIL.replace("\n", " ")


@pytest.mark.parametrize(
    "prints",
    [
        lambda console: console.print(ONE_LINE),
        lambda console: console.print(ONE_LINE, style="bold"),
        lambda console: console.print(Text(ONE_LINE, "red")),
        lambda console: console.print(Text.assemble((ONE_LINE, "bold"), ONE_LINE), soft_wrap=True),
        lambda console: console.print(table(ONE_LINE)),
        lambda console: console.print(table(Text(ONE_LINE))),
        lambda console: console.print(Rule(Text(ONE_LINE))),
        lambda console: console.print(Syntax(ONE_LINE, "yaml")),
        lambda console: console.print(Markdown(ONE_LINE)),
        lambda console: console.rule(ONE_LINE),
        lambda console: console.out(ONE_LINE),
        lambda console: say(console, EVIL),
        lambda console: say(console, EVIL, "bold"),
    ],
)
def test_the_console_prints_text(prints: Callable[[Console], None], capsys: pytest.CaptureFixture[str]) -> None:
    printed = shown(prints, capsys)
    assert "‹1b›" in printed
    assert_harmless(printed)


def test_our_own_styles_and_bars_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert "\x1b[1;31mwrong\x1b[0m" in shown(lambda console: say(console, "wrong", "bold red"), capsys)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(escape(ONE_LINE), total=2)
        bar.update(task, advance=1, refresh=True)
    drawn = capsys.readouterr().err
    assert "\x1b[2K" in drawn  # ours: it moves
    assert "pwned" in drawn
    assert not {"\a", "\x9b", "\b", "\u202e", "\x7f"} & set(drawn)
    assert "\x1b]" not in drawn


def test_json_is_ascii_and_gives_every_string_back(capsys: pytest.CaptureFixture[str]) -> None:
    data = {EVIL: [EVIL, float("nan"), float("-inf"), "\udc80"]}
    printed = shown(lambda console: print_json(console, data), capsys)
    assert re.fullmatch(r"[\n -~]+", printed)
    assert json.loads(printed, parse_constant=pytest.fail) == {EVIL: [EVIL, None, None, "\udc80"]}


def test_every_character_that_is_not_seen_is_shown_by_its_number() -> None:
    every = [chr(code) for code in range(0x110000)]
    unseen = [char for char in every if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    assert len(unseen) > 2000
    assert all(printable(char) == f"‹{ord(char):02x}›" for char in unseen)
    for text in ("It is 7 – “ja” №é́ 你好 🙂 ∑α‹1b›[/]", "\n\t"):
        assert printable(text, keep="\n\t") == text


# Errors, which hosts log as they are


@pytest.mark.parametrize("field", ["path", "message", "value", "allowed", "hint"])
def test_a_problem_has_its_own_lines_and_no_others(field: str) -> None:
    problem = Problem(**{"path": "p", "message": "m", "value": 1, "allowed": "a", "hint": "h", field: EVIL})
    for text in (str(problem), str(ConfigError([problem]))):
        assert len(text.splitlines()) == 3 + (problem is not None and text.startswith("[dwl]"))
        assert_harmless(text)


def test_every_error_of_the_family_is_harmless() -> None:
    for error in (DWLError(EVIL), RunError(EVIL), ConfigError(EVIL)):
        assert "‹1b›" in str(error)
        assert_harmless(str(error).replace(f"\n{FORGED}", ""))  # these may have lines


def test_a_host_s_log_of_a_stranger_s_block_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    classes = {EVIL: {"regex": "x", EVIL: 1}, "a": {"tokens": [EVIL], "token_loss": EVIL}, "b": {EVIL: EVIL}, "c": {"pack": EVIL}}
    dwl = {"classes": classes, "alpha": {EVIL: 1}, "schedule": {"type": EVIL, EVIL: EVIL}, "controller": {"type": EVIL}, EVIL: EVIL}
    with pytest.raises(ConfigError) as caught:
        parse({"loss": "dwl", "dft": {EVIL: EVIL}, "dwl": dwl})
    assert len(caught.value.problems) > 8
    assert_harmless(str(caught.value))
    (override,) = overrides_of({"DWL_OVERRIDES": f"'dwl.alpha.{EVIL}={json.dumps(IN_YAML)}'"})
    assert len(str(override).splitlines()) == 1
    log_line(EVIL)
    printed = capsys.readouterr().out
    assert all(line.startswith("[dwl] ") for line in printed.splitlines())
    assert_harmless(printed)


# Every command


def config(folder: Path, **changes: Any) -> Path:
    """Everything in it that may be a string is an attack, its own name too."""
    classes = {IN_YAML: {"regex": IN_YAML}, "a": {"pack": f"./{IN_YAML}.yml"}, "b": {IN_YAML: IN_YAML}}
    settings = {
        "plugins": ["dwl_plugin.DWLPlugin"],
        "loss": "dwl",
        "dwl": {"classes": classes, "alpha": {IN_YAML: 1}},
        "base_model": f"./{IN_YAML}",
        "datasets": [{"path": IN_YAML + ".jsonl", "type": "chat_template", IN_YAML: IN_YAML}],
        IN_YAML: IN_YAML,
        **changes,
    }
    path = folder / (EVIL.replace("/", "") + ".yml")
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def assert_all_harmless(result: Result) -> None:
    """Rich clears a bar of ours on standard error; nothing else is there but errors."""
    assert_harmless(result.stdout)
    assert_harmless(re.sub(r"\x1b\[\?25[lh]|\x1b\[\d*[AK]|\r", "", result.stderr))


@pytest.mark.parametrize("arguments", [["check"], ["check", "--trust"], ["inspect", "--trust"], ["preflight"], ["schedule"]])
def test_a_config_of_attacks(dwl: Run, tmp_path: Path, arguments: list[str]) -> None:
    for changes in ({}, {"plugins": ["dwl_plugin.DWLPlugin", IN_YAML]}, {"dwl": {"pack": f"hf://{IN_YAML}"}}):
        result = dwl(*arguments, config(tmp_path, **changes) if "--trust" not in arguments else config(tmp_path))
        assert result.exit_code
        assert "‹1b›" in result.output or "\\x1b" in result.output
        assert_all_harmless(result)


def test_a_plugin_cannot_hide_the_line_that_warns_of_it(dwl: Run, tmp_path: Path) -> None:
    for name in (IN_YAML, "evil." + "\x1b" * 60 + "P", "evil." + " " * 5000 + "P", "evil." + "x" * 300):
        result = dwl("check", config(tmp_path, plugins=["dwl_plugin.DWLPlugin", name, "other.Plugin"]))
        plain = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout)
        assert "plugins[1]" in plain
        assert "other.Plugin" in plain
        assert len(plain.splitlines()) < 100
        assert_all_harmless(result)


def test_json_of_a_config_of_attacks_is_json(dwl: Run, tmp_path: Path) -> None:
    path = config(tmp_path, dwl={"classes": {"a": {"regex": "x"}}, "alpha": {"a": float("nan"), "rest": {IN_YAML: 1}}})
    result = dwl("check", path, "--json", "--trust")
    assert re.fullmatch(r"[\n -~]+", result.stdout)
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found["config"] == str(path)
    assert any(IN_YAML in hint for hint in found["hints"])


def test_a_good_config_with_attacks_in_its_rows_and_name(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": EVIL}, {"role": "assistant", "content": f"7 {EVIL}"}]}] * 4
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = write_config(loss="dwl", data=tmp_path / "rows.jsonl", dwl={"classes": {"a": {"regex": "7"}}})
    path = path.rename(path.with_name(EVIL.replace("/", "") + ".yml"))
    for command in ("check", "inspect"):
        result = dwl(command, path)
        assert result.exit_code == 0, result.output
        assert "\x1b[8m" not in result.stdout
        assert not {"\a", "\b", "\r", "\x9b", "\u202e"} & set(result.stdout)
    assert "‹1b›" in result.stdout
    page = dwl("inspect", path, "--html", tmp_path / ("p" + EVIL.replace("/", "") + ".html"))
    assert page.exit_code == 0
    assert_all_harmless(page)


PACK = {
    "description": IN_YAML,
    "classes": {"a": {"regex": "x"}, "b": {"tokens": [IN_YAML]}},
    "tests": [{"text": f"x {IN_YAML}", "special": [IN_YAML], "spans": {"a": [IN_YAML]}}],
}


@pytest.mark.parametrize("changes", [{}, {"classes": {IN_YAML: {"regex": "x"}}}, {IN_YAML: 1}, {"sources": [IN_YAML]}])
def test_a_pack_of_attacks(tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = EVIL.replace("/", "").replace("\n", "").replace("\x85", "") + ".yml"
    (tmp_path / name).write_text(yaml.safe_dump(PACK | changes, allow_unicode=True), encoding="utf-8")
    for command in ("show", "test"):
        result = CliRunner().invoke(main, ["packs", command, name])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "‹1b›" in result.output
        assert_all_harmless(result)


def test_a_run_of_attacks(tmp_path: Path) -> None:
    history = [{key.replace("number", EVIL.replace("/", "")): value for key, value in step(at).items()} for at in (1, 2, 3)]
    name = EVIL.replace("/", "").replace("\n", "")
    for folder in (tmp_path / name, tmp_path / f"{name}2"):
        write_run(folder, history, config=None)
    for arguments in (["report", name], ["report", name, f"{name}2", "--compare"]):
        result = CliRunner().invoke(main, [arguments[0], *(str(tmp_path / at) if at[:1] == "e" else at for at in arguments[1:])])
        assert result.exit_code == 0, result.output
        assert "‹1b›" in result.stdout
        assert_all_harmless(result)


@pytest.mark.parametrize(
    "arguments",
    [
        [EVIL],
        [f"--{EVIL}"],
        ["check", EVIL],
        ["check", __file__, EVIL],
        ["check", __file__, f"--{EVIL}"],
        ["check", __file__, "--samples", EVIL],
        ["schedule", __file__, "--plot", f"x.{EVIL}"],
        ["packs", EVIL],
        ["packs", "show", EVIL],
        ["packs", "show", "numbers", EVIL],
        ["report", ONE_LINE],
    ],
    ids=lambda arguments: " ".join(arguments[:-1]),
)
def test_click_s_own_errors(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2)
    assert_harmless(result.stdout)
    assert_harmless(result.stderr)


def test_help_keeps_its_lines() -> None:
    assert CliRunner().invoke(main, ["packs"]).output.count("\n") > 8


# Nothing goes past it


def test_commands_print_through_one_console() -> None:
    """A second one, a `print` or an `echo` would have to be thought of wherever a stranger's text is printed."""
    root = Path(dwl_plugin.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich")
            for alias in node.names
        }
        for node in ast.walk(tree):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            own = called == "Console" and "Console" in imported
            if own or called in ("print", "rich.print", "click.echo", "click.secho", "rich.console.Console"):
                found.add((path.relative_to(root).as_posix(), called))
    assert found == {
        ("cli/main.py", "click.echo"),  # the schema
        ("cli/quickstart/convert.py", "print"),  # to its parent, as the next one
        ("cli/quickstart/replies.py", "print"),
        ("config/pack_files.py", "print"),
        ("run/startup.py", "print"),
    }
