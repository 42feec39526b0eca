"""What `dwl suggest --write` makes of a config's text: the block is there, and nothing else has changed."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, strategies as st

from dwl_plugin.cli.suggest.edit import edited, write_into
from dwl_plugin.errors import DWLError

BLOCK = ["loss: nll  # why", "dwl:", "  classes:", "    end: {special: true}  # 7 tokens"]
KEYS: dict[str, Any] = {"loss": "nll", "dwl": {"classes": {"end": {"special": True}}}}
TEXT = "\n".join(BLOCK)

CASES = {
    "nothing of ours": ("a: 1\nb: 2\n", f"a: 1\nb: 2\n\nplugins:\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\n"),
    "no line end": ("a: 1", f"a: 1\n\nplugins:\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\n"),
    "a blank line at the end": ("a: 1\n\n", f"a: 1\n\nplugins:\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\n"),
    "a document's marks": (
        "# head\n---\na: 1\n# tail\n...\n",
        f"# head\n---\na: 1\n# tail\n\nplugins:\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\n...\n",
    ),
    "a list of plugins, indented": (
        "plugins:\n  - one.Plugin  # first\n  # more\na: 1\n",
        f"plugins:\n  - one.Plugin  # first\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\n\n  # more\na: 1\n",
    ),
    "a list of plugins, not indented and in quotes": (
        'plugins:\n- "one.Plugin"\n\na: 1\n',
        f'plugins:\n- "one.Plugin"\n- "dwl_plugin.DWLPlugin"\n\n{TEXT}\n\na: 1\n',
    ),
    "a list of plugins in one line": (
        "plugins: [one.Plugin]  # all\na: 1\n",
        f"plugins: [one.Plugin, dwl_plugin.DWLPlugin]  # all\n\n{TEXT}\n\na: 1\n",
    ),
    "an empty list of plugins": ("a: 1\nplugins: []\n", f"a: 1\nplugins: [dwl_plugin.DWLPlugin]\n\n{TEXT}\n"),
    "plugins without a list": ("plugins:  # none\na: 1\n", f"plugins:  # none\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\n\na: 1\n"),
    "our plugin is there": (
        "plugins:\n  - dwl_plugin.DWLPlugin\na: 1\n",
        f"plugins:\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\n\na: 1\n",
    ),
    "a block is there": (
        "plugins: [dwl_plugin.DWLPlugin]\nloss: dwl  # old\ndwl:\n  pack: json\n  # in it\n  alpha:\n    a: 1  # end\n# next\nb: 2",
        f"plugins: [dwl_plugin.DWLPlugin]\n{TEXT}\n# next\nb: 2",
    ),
    "a text at the end of the block": (
        "plugins: [dwl_plugin.DWLPlugin]\nloss: dwl\ndwl:\n  classes:\n    x:\n      regex: >-\n        a\n\n# next\nb: 2\n",
        f"plugins: [dwl_plugin.DWLPlugin]\n{TEXT}\n\n# next\nb: 2\n",
    ),
    "a block in three places": (
        "dft: {exponent: 1}\na: 1\nloss: dft\nb: 2\n\n# of it\n\ndwl: {pack: json}",
        f"plugins:\n  - dwl_plugin.DWLPlugin\n\n{TEXT}\na: 1\nb: 2\n\n# of it\n\n",
    ),
    "anchors elsewhere, a text of many lines": (
        "x: &x {lr: 1}\ny: *x\ntext: |\n  loss: nll\n\n  dwl:\nplugins: [dwl_plugin.DWLPlugin]\nz: {<<: *x}\n",
        f"x: &x {{lr: 1}}\ny: *x\ntext: |\n  loss: nll\n\n  dwl:\nplugins: [dwl_plugin.DWLPlugin]\n\n{TEXT}\n\nz: {{<<: *x}}\n",
    ),
    "a block that is an alias": (
        "x: &x {pack: json}\nloss: dwl\ndwl: *x\nplugins: [dwl_plugin.DWLPlugin]\n",
        f"x: &x {{pack: json}}\n{TEXT}\nplugins: [dwl_plugin.DWLPlugin]\n",
    ),
    "everything indented": (
        "  a: 1\n  loss: dft\n",
        "  a: 1\n  plugins:\n    - dwl_plugin.DWLPlugin\n\n" + "".join(f"  {line}\n" for line in BLOCK),
    ),
    "an empty key and one in quotes": (
        '"loss":\na: .nan\nplugins: [dwl_plugin.DWLPlugin]\n',
        f"{TEXT}\na: .nan\nplugins: [dwl_plugin.DWLPlugin]\n",
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_the_text_that_a_person_would_have_written(name: str, newline: str) -> None:
    before, after = CASES[name]
    if "\n" in before:
        before, after = before.replace("\n", newline), after.replace("\n", newline)
    assert edited(before, BLOCK, KEYS) == after


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{a: 1}", "one mapping in braces"),
        ("x: &x [a.B]\nplugins: *x\n", "no plain list"),
        ("dwl: &d {pack: json}\nother: *d\nloss: dwl\n", "would not be the old config"),  # the anchor would go
        ("base: &b {dft: {exponent: 1}}\n<<: *b\n", "would not be the old config"),  # `dft` would stay
        ("a: |+\n  text\n", "would not be the old config"),  # the blank line would be of the text
    ],
)
def test_what_is_left_to_the_person(text: str, why: str) -> None:
    with pytest.raises(DWLError, match=why):
        edited(text, BLOCK, KEYS)


OTHERS = (
    "a: 1",
    "b: [1, 2]  # why",
    "c:\n  - x: 1   #x\n    y: 'z'\n  - 2",
    "d: |\n  loss: nll\n\n  plugins: []",
    "e: {f: &g 1, h: *g}",
    "# a comment",
    "",
    "i: >-\n  two\n  lines",
    "j:\n- 1\n- 2",
)
OURS: tuple[list[str], ...] = (
    [],
    ["loss: dft"],
    ["loss: nll", "dwl:\n  classes:\n    x: {special: true}\n    # inner\n    y: {added: true}"],
    ["dwl:\n  pack: json", "dft: {exponent: 1}", "loss: dwl"],
)
PLUGINS: tuple[list[str], ...] = (
    [],
    ["plugins:"],
    ["plugins: []"],
    ["plugins: [a.B]"],
    ["plugins:\n  - a.B"],
    ["plugins:\n- 'a.B'"],
    ["plugins:\n  - dwl_plugin.DWLPlugin\n  - a.B"],
)


def kept(text: str) -> list[str]:
    """The lines that neither belong to a block nor name a plugin."""
    ours = {*BLOCK, "loss: dft", "loss: nll", "loss: dwl", "    x: {special: true}", "    y: {added: true}", "  pack: json"}
    ours |= {"    # inner", "dft: {exponent: 1}", ""}
    return [line for line in text.splitlines() if line not in ours and not line.startswith(("plugins:", "  - dwl", "- 'dwl"))]


@given(st.data(), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["", "---\n", "# first\n"]))
def test_no_other_line_is_touched(data: st.DataObject, ends: bool, newline: str, head: str) -> None:
    others = data.draw(st.lists(st.sampled_from(OTHERS), unique=True))
    parts = [*others, *data.draw(st.sampled_from(OURS)), *data.draw(st.sampled_from(PLUGINS))]
    parts = ["keep: 0", *data.draw(st.permutations(parts))]
    text = head + "\n".join(parts) + ("\n" if ends else "")
    old = yaml.safe_load(text)
    try:
        new = edited(text.replace("\n", newline), BLOCK, KEYS)
    except DWLError:
        assert (parts[-1][:2], ends) == ("d:", False)  # the text would get the line end that it lacks
        return
    assert "\n" not in text or new.count("\n") == new.count(newline)
    found = yaml.safe_load(new)
    assert {key: found.pop(key, None) for key in ("loss", "dft", "dwl")} == {**KEYS, "dft": None}
    plugins = found.pop("plugins")
    assert plugins == [*(old.pop("plugins", None) or []), *([] if "dwl_plugin" in text else ["dwl_plugin.DWLPlugin"])]
    assert list(found.items()) == [item for item in old.items() if item[0] not in ("loss", "dft", "dwl")]
    assert kept(text) == kept(new)
    assert edited(new, BLOCK, KEYS) == new


def test_the_file_is_replaced_whole_where_its_link_leads(tmp_path: Path) -> None:
    file, link = tmp_path / "there" / "config.yml", tmp_path / "config.yml"
    file.parent.mkdir()
    file.write_bytes(b"wandb_key: x\r\nplugins: [dwl_plugin.DWLPlugin]")
    os.chmod(file, 0o600)
    link.symlink_to(file)
    write_into(link, {"wandb_key": "x", "plugins": ["dwl_plugin.DWLPlugin"]}, ["loss: nll"], {"loss": "nll"})
    assert link.is_symlink()
    assert file.read_bytes() == b"wandb_key: x\r\nplugins: [dwl_plugin.DWLPlugin]\r\n\r\nloss: nll"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert os.listdir(file.parent) == ["config.yml"]


def test_a_file_that_was_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.yml"
    file.write_text("a: 2\n")
    with pytest.raises(DWLError, match="was changed while it was looked at"):
        write_into(file, {"a": 1}, ["loss: nll"], {"loss": "nll"})
    assert file.read_text() == "a: 2\n"
