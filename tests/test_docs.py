"""The map of the code names every module, and no document names a file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dwl_plugin"
MAP = ROOT / "docs" / "architecture.md"
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "bench").rglob("*.md"))]
each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))

MADE_UP = re.compile(r"NAME|my_pack")
"""To be filled in, or of a user's folder."""


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def listed() -> set[Path]:
    """The files of the tree in the map; a folder's line names the files in it."""
    _, _, after = text(MAP).partition("<!-- files -->")
    tree, _, _ = after.partition("<!-- end of files -->")
    found, folder = set(), PACKAGE
    for line in tree.splitlines():
        entry = re.match(r"( *)(\S+)(.*)", line)
        if entry is None or line.startswith(("```", "dwl_plugin/")):
            continue
        indent, name, says = entry.groups()
        if name.endswith("/"):
            inside = (folder if len(indent) == 4 else PACKAGE) / name
            if len(indent) == 2:
                folder = inside
            found |= {inside / file for file in re.findall(r"\w+\.py", says)}
        else:
            found.add((PACKAGE if len(indent) == 2 else folder) / name)
    return {path for path in found if "*" not in path.name}


def test_the_map_has_every_module_and_no_other() -> None:
    modules = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"} | {PACKAGE / "__init__.py"}
    assert {str(path.relative_to(ROOT)) for path in listed()} == {str(path.relative_to(ROOT)) for path in modules}


@each
def test_links_lead_somewhere(document: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text(document)) if not link.startswith("http")]
    assert [link for link in links if not (document.parent / link).exists()] == []


@each
def test_files_that_are_named_exist(document: Path) -> None:
    """`loss/seam.py`, say: below the root, the package, or the document's own folder."""
    if document.name == "CHANGELOG.md":  # of the past, too
        return
    prose = re.sub(r"```.*?```", "", text(document), flags=re.S)
    named = re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|yml|md)|[\w.-]+/)`", prose)
    places = (ROOT, PACKAGE, document.parent)
    assert [name for name in named if not MADE_UP.search(name) and not any((place / name).exists() for place in places)] == []


@each
def test_tests_that_are_named_exist(document: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text(document))
    assert [(file, test) for file, test in named if f"def {test}(" not in text(ROOT / file)] == []


def test_links_into_a_document_find_their_heading() -> None:
    headings = {
        document: {
            re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.+)$", text(document), re.M)
        }
        for document in DOCUMENTS
    }
    for document in DOCUMENTS:
        for path, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]+)\)", text(document)):
            target = (document.parent / path).resolve() if path else document
            assert anchor in headings[target], f"{document.name} links to {path}#{anchor}"


def test_a_hundred_tokens_count_what_the_page_says() -> None:
    """`docs/choosing.md`: ten numbers, ninety others, α 0.6 and 0.4."""
    torch = pytest.importorskip("torch")
    from dwl_plugin.loss.reduction import class_weights

    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| (\d+) % \| ([\d.]+) \|$", text(ROOT / "docs" / "choosing.md"), re.M)
    assert [name for name, *_ in rows] == ["weighted_mean", "token_mean", "class_mean"]
    alpha, counts = torch.tensor([0.6, 0.4], dtype=torch.float64), torch.tensor([10.0, 90.0, 100.0, 4.0])
    for name, *said in rows:
        number, other = class_weights(name, alpha, counts).tolist()
        total = (10 * number + 90 * other) / 100
        assert said == [f"{number:.3g}", f"{other:.2g}", f"{10 * number / total:.0f}", f"{total:.2g}"], name
