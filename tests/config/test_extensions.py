"""Schedules and controllers of another package, which a YAML can name once it is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest

from dwl_plugin.alpha.controllers import CONTROLLERS, Controller
from dwl_plugin.alpha.run_length import RunLength
from dwl_plugin.config import Block, parse
from dwl_plugin.errors import ConfigError, DWLError
from dwl_plugin.run.moving import alpha_of, controller_of

LENGTH = RunLength(100, 10.0)

MODULE = '''
from dwl_plugin.config import LossControllerOptions, Position, ScheduleOptions, Weight

class BounceOptions(ScheduleOptions):
    vector_keys = ("to",)
    to: dict[str, Weight]
    every: Position = 10

class Bounce:
    Options = BounceOptions

    def __init__(self, options, run):
        self.every, self.first, self.to = run.step(options.every, "every"), run.first, run.vector(options.to)

    def __call__(self, tau):
        return self.to if tau // self.every % 2 else self.first

class Off(Bounce):
    def __call__(self, tau):
        return [2.0, -1.0]

class LeaderOptions(LossControllerOptions):
    lead: Weight = 2.0

class Leader:
    """The class of the largest loss so far has `lead` nats more than the others."""
    Options = LeaderOptions

    def __init__(self, options):
        self.lead = options.lead

    def __call__(self, window, memory):
        memory["most"] = max(memory.get("most", 0.0), float(window.signal_C.max()))
        return window.prior_C + self.lead * (window.signal_C == memory["most"])

class Lost(Leader):
    def __call__(self, window, memory):
        return [float("nan")] * 2

class Bare:
    pass

from dataclasses import dataclass
from pathlib import Path
from dwl_plugin.loss.token_losses import TokenLoss, TokenLossOptions

class ClippedOptions(TokenLossOptions):
    ceiling: Weight = 0.5

@dataclass(frozen=True)
class Clipped(TokenLoss):
    Options = ClippedOptions
    ceiling: float

    def __call__(self, token):
        return token.p.clamp(max=self.ceiling).detach() * token.nll

class StrictOptions(TokenLossOptions):
    floor: Weight

class StrictLoss(Clipped):
    Options = StrictOptions

PACK = "description: d\\nclasses: {shout: {regex: '[A-Z]+'}}\\nalpha: {shout: 2, rest: 1}"
PACK_FILE = Path(__file__).with_name("their_pack.yml")
LARGE = "#" * 200_000
'''

POINTS = """
[dwl_plugin.schedules]
bounce = little_extension:Bounce
off = little_extension:Off
bare = little_extension:Bare
gone = little_extension.nowhere:Gone

[dwl_plugin.controllers]
leader = little_extension:Leader
lost = little_extension:Lost
bounce_too = little_extension:Bounce

[dwl_plugin.token_losses]
clipped = little_extension:Clipped
strict = little_extension:StrictLoss
dft = little_extension:Clipped

[dwl_plugin.packs]
theirs = little_extension:PACK
in_a_file = little_extension:PACK_FILE
large = little_extension:LARGE
numbers = little_extension:LARGE
"""


def install(folder: Path, name: str, points: str) -> None:
    """What an installer leaves behind, as far as entry points go."""
    info = folder / f"{name.replace('-', '_')}-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(points, encoding="utf-8")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "little_extension.py").write_text(MODULE, encoding="utf-8")
    install(tmp_path, "little-extension", POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "little_extension", raising=False)
    return tmp_path


def parsed(key: str, **options: Any) -> Block:
    block = parse({"loss": "dwl", "dwl": {"classes": {"a": {"regex": "a"}}, key: options}})
    assert block is not None
    return block


def controlled(block: Block) -> Controller:
    controller = controller_of(block, LENGTH)
    assert controller is not None
    return controller


def problem(key: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parsed(key, **options)
    (found,) = caught.value.problems
    assert found.path.startswith(f"dwl.{key}")
    return str(found)


@pytest.mark.usefixtures("site")
def test_a_schedule_of_another_package_moves_alpha() -> None:
    block = parsed("schedule", type="bounce", to={"a": 3, "rest": 1}, every="20%")
    assert parse(block.dump()) == block
    alpha = alpha_of(block, LENGTH)
    assert [alpha(tau) for tau in (0, 19, 20, 39, 40)] == [(0.5, 0.5)] * 2 + [(0.75, 0.25)] * 2 + [(0.5, 0.5)]


@pytest.mark.usefixtures("site")
def test_a_controller_of_another_package_moves_alpha_and_its_memory_is_kept() -> None:
    block = parsed("controller", type="leader", lead=1.0, every=1, ema=0.0, min_alpha=0.0)
    assert parse(block.dump()) == block
    first, second = controlled(block), controlled(block)
    first.update(1, [3.0, 1.0], [1, 1])
    e = 2.718281828459045
    assert first.alpha == pytest.approx((e / (1 + e), 1 / (1 + e)), abs=1e-12)
    second.load(first.state())
    second.update(2, [2.0, 1.0], [1, 1])
    assert second.alpha == (0.5, 0.5), "3 was more, and is remembered"


@pytest.mark.usefixtures("site")
def test_its_options_are_checked_like_ours() -> None:
    assert "did you mean `every`" in problem("schedule", type="bounce", to={"a": 1, "rest": 1}, evry=3)
    assert "missing: rest" in problem("schedule", type="bounce", to={"a": 1})
    assert "did you mean `lead`" in problem("controller", type="leader", leed=3)


@pytest.mark.usefixtures("site")
def test_an_unknown_name_lists_what_is_installed() -> None:
    said = problem("schedule", type="bonce")
    assert "warmup, cyclic, bare, bounce, gone, off" in said
    assert "did you mean `bounce`" in said
    assert "once that package is installed" in problem("controller", type="magic")


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gone", "`little_extension.nowhere:Gone`, which cannot be imported: ModuleNotFoundError"),
        ("bare", "needs `Options`, derived from ScheduleOptions"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_package(name: str, words: str) -> None:
    said = problem("schedule", type=name)
    assert words in said
    assert "little-extension 1.5" in said


@pytest.mark.usefixtures("site")
def test_a_schedule_is_no_controller() -> None:
    assert "derived from ControllerOptions" in problem("controller", type="bounce_too")


def test_a_name_that_two_packages_offer_is_refused(site: Path) -> None:
    install(site, "other-extension", "[dwl_plugin.schedules]\nbounce = elsewhere:Bounce\n")
    assert "little-extension 1.5 and other-extension 1.5 both offer" in problem("schedule", type="bounce")


@pytest.mark.usefixtures("site")
def test_numbers_that_are_no_weights_stop_the_run_and_name_who_gave_them() -> None:
    with pytest.raises(DWLError, match="schedule `off` gave"):
        alpha_of(parsed("schedule", type="off", to={"a": 1, "rest": 1}), LENGTH)(3)
    with pytest.raises(DWLError, match="controller `lost` gave"):
        controlled(parsed("controller", type="lost")).update(10, [1.0, 1.0], [1, 1])


def test_without_other_packages_there_are_only_ours() -> None:
    assert f"allowed: {', '.join(CONTROLLERS)}\n" in problem("controller", type="leadre") + "\n"


@pytest.mark.usefixtures("site")
def test_a_token_loss_of_another_package_is_written_by_its_name_or_with_its_options() -> None:
    block = parsed("token_loss", type="clipped", ceiling=0.25)
    assert block.dump()["dwl"]["token_loss"] == {"type": "clipped", "ceiling": 0.25}
    by_name = parse({"loss": "dwl", "dwl": {"classes": {"a": {"regex": "a", "token_loss": "clipped"}}, "token_loss": "dft"}})
    assert by_name is not None
    assert [getattr(options, "ceiling", None) for options in by_name.token_losses] == [0.5, None]
    for whole in (block, by_name):
        assert parse(whole.dump()) == whole
        assert Block.model_validate(whole.dump()) == whole
    assert by_name.token_losses[1].model_dump()["exponent"] == 1.0, "a name of ours is always ours"


@pytest.mark.usefixtures("site")
def test_its_options_are_checked_too() -> None:
    assert "did you mean `ceiling`" in problem("token_loss", type="clipped", cieling=1)
    assert "allowed: nll, dft, focal, eaft, clipped, strict" in problem("token_loss", type="clippd")
    with pytest.raises(ConfigError, match=r"dwl\.token_loss\.floor: is required"):
        parse({"loss": "dwl", "dwl": {"token_loss": "strict"}})
    assert "no token pays focal" in str(error_of({"token_loss": "clipped", "focal": {}}))


def error_of(dwl: dict[str, Any]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse({"loss": "dwl", "dwl": dwl})
    return caught.value


@pytest.mark.parametrize("name", ["theirs", "in_a_file"])
def test_a_pack_of_another_package_is_used_by_its_name(site: Path, name: str) -> None:
    (site / "their_pack.yml").write_text("description: d\nclasses: {shout: {regex: '[A-Z]+'}}\nalpha: {shout: 2, rest: 1}")
    block = parse({"loss": "dwl", "dwl": {"pack": name}})
    assert block is not None
    assert (block.class_names, block.alpha) == (("shout", "rest"), (2 / 3, 1 / 3))
    inside = parse({"loss": "dwl", "dwl": {"classes": {"calm": {"not": {"pack": f"{name}.shout"}}}}})
    assert inside is not None
    assert parse(inside.dump()) == inside


def test_its_text_has_the_bounds_of_any_pack_and_ours_keep_their_names(site: Path) -> None:
    assert "more than 128 KiB" in str(error_of({"pack": "large"}))
    assert "cannot be read" in str(error_of({"pack": "in_a_file"}))
    assert "did you mean `theirs`" in str(error_of({"classes": {"a": {"pack": "their"}}}))
    assert parse({"loss": "dwl", "dwl": {"pack": "numbers"}}) is not None
    install(site, "other-extension", "[dwl_plugin.packs]\ntheirs = elsewhere:PACK\n")
    assert "little-extension 1.5 and other-extension 1.5 both offer" in str(error_of({"pack": "theirs"}))


def a_wheel(folder: Path) -> Path:
    """A package of two packs, one in a file and one that cannot be read, as its author would build it."""
    info = "recipes_for_dwl-2.0.dist-info"
    files = {
        "recipes_for_dwl/__init__.py": "import pathlib\nGREET = pathlib.Path(__file__).with_name('greet.yml')\nODD = 'd: 1'\n",
        "recipes_for_dwl/greet.yml": "description: Greetings.\nclasses: {hi: {regex: hi}}\nalpha: {hi: 2, rest: 1}\n"
        "tests: [{text: oh hi, spans: {hi: [hi]}}]\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: recipes-for-dwl\nVersion: 2.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[dwl_plugin.packs]\ngreetings = recipes_for_dwl:GREET\nodd = recipes_for_dwl:ODD\n",
    }
    record = "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD"))
    wheel = folder / "recipes_for_dwl-2.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def test_packs_of_a_package_that_is_installed_are_listed_with_it_and_used(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site)]
    subprocess.run([*install, str(a_wheel(tmp_path))], check=True)
    (tmp_path / "train.yml").write_text("loss: dwl\ndwl: {pack: [greetings, numbers]}\nmax_steps: 1\n")
    commands = [
        ["packs", "list"],
        ["packs", "test", "greetings"],
        ["packs", "show", "greetings", "--raw"],
        ["schedule", "train.yml"],
    ]
    code = f"""
from click.testing import CliRunner
from dwl_plugin.cli.main import main
for command in {commands}:
    result = CliRunner(env={{"COLUMNS": "200"}}).invoke(main, command)
    print(result.exit_code, result.output, sep="\\n", end="---\\n")
"""
    paths = os.pathsep.join([str(site), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    listed, tested, raw, schedule, _ = done.stdout.split("---\n")
    assert listed.startswith("0\n")
    assert re.search(r"greetings +│ hi → 2 +│ Greetings\.", listed)
    assert listed.count("of recipes-for-dwl 2.0") == 2
    assert "not a pack, which is a mapping with `classes`" in listed, "one that is broken hides no other"
    assert "reasoning" in listed
    assert tested == "0\ngreetings: 1 case passes\n"
    assert raw == f"0\n{(site / 'recipes_for_dwl' / 'greet.yml').read_text()}"
    assert schedule.startswith("0\n")
    assert re.findall(r"0\.\d\d", schedule) == ["0.22", "0.44", "0.22", "0.11"], "2, 4, 2 and 1 of 9"
