"""The built site needs nothing but its folder: every link of every page, and every anchor in it, is there, and nothing is fetched.
Its pages have the lists and tables that they have on GitHub, whose Markdown is another.

    python -m docs_tools.check_site .site
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

DOCS = Path(__file__).parents[1] / "docs"

FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "video": "src", "audio": "src", "link": "href"}
"""What a browser loads by itself; of `link` only some."""
NAMED_ONLY = ("canonical", "next", "prev", "alternate")


class Page(HTMLParser):
    """`links` are (tag, address) of what is followed or fetched, `anchors` what a link may end in."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[tuple[str, str]] = []
        self.anchors = {"", "__consent"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        of = {name: value or "" for name, value in attributes}
        self.anchors |= {of[name] for name in ("id", "name") if name in of}
        if tag == "a" and "href" in of:
            self.links.append(("a", of["href"]))
        elif FETCHED.get(tag, "") in of and of.get("rel") not in NAMED_ONLY:
            self.links.append((tag, of[FETCHED[tag]]))


def problems(site: Path) -> Iterator[str]:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    if not pages:
        yield f"{site} has no pages"
    for path, page in pages.items():
        for tag, link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                if tag != "a" and address.scheme != "data":
                    yield f"{path.relative_to(site)} fetches {link}"
                continue
            below = site if address.path.startswith("/") else path.parent
            target = (below / unquote(address.path).lstrip("/")).resolve() if address.path else path.resolve()
            if path.name == "404.html":  # of a server, which has the site at its root
                continue
            if address.path.startswith("/") or not target.is_relative_to(site.resolve()):
                yield f"{path.relative_to(site)} leads out of the site: {link}"
            elif not target.is_file():
                yield f"{path.relative_to(site)} leads nowhere: {link}"
            elif target in pages and unquote(address.fragment) not in pages[target].anchors:
                yield f"{path.relative_to(site)} leads to a heading that is not there: {link}"
    for style in site.rglob("*.css"):
        yield from (
            f"{style.relative_to(site)} fetches {url}" for url in re.findall(r"url\(['\"]?(https?:[^)]*)", style.read_text())
        )


def read_otherwise(site: Path) -> Iterator[str]:
    """Pages of docs/ that have become something else than CommonMark makes of them."""
    from markdown_it import MarkdownIt

    def parts(html: str) -> dict[str, int]:
        return {tag: len(re.findall(rf"<{tag}[ >]", html)) for tag in ("li", "ol", "ul", "table", "tr", "pre", "img", "h2", "h3")}

    commonmark = MarkdownIt("commonmark").enable("table")
    for page in sorted(DOCS.rglob("*.md")):
        article = (site / page.relative_to(DOCS).with_suffix(".html")).read_text(encoding="utf-8")
        article = article[article.index("<article") : article.index("</article>")]
        wanted, there = parts(commonmark.render(page.read_text(encoding="utf-8"))), parts(article)
        for tag in wanted:
            if wanted[tag] != there[tag]:
                yield f"{page.relative_to(DOCS)} has {there[tag]} <{tag}> in place of {wanted[tag]}"
        if r"\|" in re.sub(r"<pre.*?</pre>", "", article, flags=re.DOTALL):
            yield rf"{page.relative_to(DOCS)} shows \|"


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    found = [*sorted(problems(folder)), *read_otherwise(folder)]
    sys.exit("\n".join(found) if found else None)
