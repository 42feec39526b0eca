"""The gallery has what the packs and the example configs say, marked as the packs mark it."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import pytest
import yaml

from dwl_plugin.cli.packs import read
from dwl_plugin.cli.packs.pages import section
from dwl_plugin.config import parse
from dwl_plugin.config.pack_files import PackText, shipped_packs
from dwl_plugin.config.packs import parse_pack

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))


def test_every_pack_and_every_example_is_there() -> None:
    examples = [path.stem for path in sorted((ROOT / "example_configs").rglob("*.yml"))]
    assert list(SECTIONS) == [*shipped_packs(), *examples]
    assert len(examples) >= 10


@pytest.mark.parametrize("name", shipped_packs())
def test_a_pack_is_shown_by_one_of_its_cases(name: str) -> None:
    """The marks are read back out of the page and compared with what the case itself says."""
    (marked,) = re.findall(r"<pre><code>(.*?)</code></pre>", SECTIONS[name], re.DOTALL)
    pack = read(name)
    whole = unescape(re.sub(r"<sub>\w+</sub>|</?(mark|i)>|↵", "", marked))
    (case,) = [case for case in pack.tests if "".join(turn.prompt + turn.text for turn in case.sample) == whole]
    shown: dict[str, list[str]] = {}
    for text, label in re.findall(r"<mark>(.*?)</mark><sub>(\w+)</sub>", marked, re.DOTALL):
        shown.setdefault(label, []).append(unescape(text))
    says = {label: texts for label, texts in case.spans.items() if texts and label != "rest"}
    assert shown == {label: [text.strip("\n") or "↵" for text in texts] for label, texts in says.items()}
    prompts = [unescape(text) for text in re.findall(r"<i>(.*?)</i>", marked, re.DOTALL)]
    assert prompts == [turn.prompt for turn in case.sample if turn.prompt]
    (config,) = re.findall(r"```yaml\n(.*?)```", SECTIONS[name], re.DOTALL)
    block = parse(yaml.safe_load(config))
    assert block is not None
    weights = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|$", SECTIONS[name], re.MULTILINE)
    total = sum(float(alpha) for _, alpha in weights)
    assert [label for label, _ in weights] == list(block.class_names)
    assert [float(alpha) / total for _, alpha in weights] == pytest.approx(block.alpha)
    assert all(f"<{source}>" in SECTIONS[name] for source in pack.sources)


@pytest.mark.parametrize("path", sorted((ROOT / "example_configs").rglob("*.yml")), ids=lambda path: path.stem)
def test_an_example_shows_its_whole_loss(path: Path) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", SECTIONS[path.stem], re.DOTALL)
    assert parse(yaml.safe_load(shown)) == parse(yaml.safe_load(path.read_text(encoding="utf-8")))
    assert max(map(len, shown.splitlines())) <= 100
    assert SECTIONS[path.stem].strip().splitlines()[0] != ""
    assert "Needs " in SECTIONS[path.stem]


def test_what_a_class_takes_of_lines_alone_is_seen_too() -> None:
    text = 'description: d\nclasses: {end: {regex: \'\\n+\'}}\ntests: [{text: "b\\nb", spans: {end: ["\\n"]}}]'
    pack = parse_pack(PackText("p", text))
    assert "<pre><code>b<mark>↵</mark><sub>end</sub>\nb</code></pre>" in section(pack, "./p.yml")
