"""The map of the code names every module, no document names a file that is not there, and what pages have from the code is as it
is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs_tools import generate
from docs_tools.check_site import problems
from docs_tools.commands import commands
from docs_tools.reference import METRICS
from dwl_plugin.config.schema import json_schema

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
    found: set[Path] = set()
    folder = inside = PACKAGE
    for line in tree.splitlines():
        entry = re.match(r"( *)(\S+)(.*)", line)
        if entry is None or line.startswith(("```", "dwl_plugin/")):
            continue
        indent, name, says = entry.groups()
        if len(indent) > 4:  # the words above go on
            found |= {inside / file for file in re.findall(r"\w+\.py", line)}
        elif name.endswith("/"):
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


# What is made of the code


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_has_what_the_code_says(page: Path) -> None:
    assert generate.filled(page) == text(page), "python -m docs_tools.generate writes it"


def test_every_block_that_can_be_made_stands_on_a_page() -> None:
    made = {name for page in generate.PAGES for name in re.findall(r"<!-- made: (\w+) -->", text(page))}
    assert made == set(generate.BLOCKS)


def test_the_reference_has_every_option_of_the_schema() -> None:
    _, _, reference = text(ROOT / "docs" / "reference.md").partition("## loss, dft, dwl")
    tables, _, index = reference.partition("## Every key")
    schema = json_schema()
    keys = {key for node in (schema, *schema["$defs"].values()) for key in node.get("properties", {})} - {"type"}
    assert [key for key in keys if f"`{key}`" not in tables or f"\n| `{key}` |" not in index] == []


@pytest.mark.parametrize(
    "row",
    [
        "| `threshold` | number > 0, ≤ 1 | `1` |",
        "| `max_change` | all | number > 0, ≤ 1 | |",
        "| `loss` | `nll`, `dft`, `dwl` | **required** |",
        "| `end` | `warmup` | [position](#values) | `100%` |",
        "| `special` | list of texts | |",
        "`include_delimiters` (default `true`): ",
        "| `top_k` | `eaft` | whole number 2 to 1024 | `20` |",
    ],
)
def test_an_option_stands_with_its_bounds_and_default(row: str) -> None:
    assert row in text(ROOT / "docs" / "reference.md")


def test_every_command_is_on_its_page() -> None:
    page = text(ROOT / "docs" / "cli.md")
    assert len(list(commands())) > 10
    assert [name for name, _ in commands() if f"\n## {name}\n" not in page] == []
    assert "| `--samples N` | `512` | Rows of the data to look at. |" in page


def test_every_metric_that_is_logged_is_in_the_reference() -> None:
    code = text(PACKAGE / "loss" / "class_sums.py") + text(PACKAGE / "run" / "session.py")
    logged = set(re.findall(r'f"(?:dwl/|\{before\})([a-z_]+)[/{]', code)) | {"nll", "p", "kl", "exponent", "min_weight"}
    assert len(logged) > 10
    assert {name for names, *_ in METRICS for name in re.findall(r"dwl/(\w+)/<class>", names)} == logged


def test_every_page_is_in_the_navigation() -> None:
    navigation = re.findall(r"[\w/-]+\.md", text(ROOT / "mkdocs.yml").partition("nav:")[2].partition("theme:")[0])
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert pages == {page for page in navigation if not page.startswith("repository/")}


def test_a_site_that_is_not_whole_is_told(tmp_path: Path) -> None:
    (tmp_path / "a b.html").write_text("<h1 id=top></h1>", encoding="utf-8")
    (tmp_path / "index.html").write_text(
        '<a href="a%20b.html#top"></a><a href="#"></a><a href="https://x.org"></a>', encoding="utf-8"
    )
    assert list(problems(tmp_path)) == []
    wrong = {
        '<a href="b.html">': "leads nowhere",
        '<a href="a%20b.html#end">': "heading that is not there",
        '<a href="../b.html">': "leads out",
        '<img src="b.png">': "leads nowhere",
        '<img src="https://x.org/b.png">': "fetches",
        '<script src="//x.org/b.js"></script>': "fetches",
        '<link rel="stylesheet" href="https://x.org/b.css">': "fetches",
    }
    for html, what in wrong.items():
        (tmp_path / "index.html").write_text(html, encoding="utf-8")
        (problem,) = problems(tmp_path)
        assert what in problem, html
