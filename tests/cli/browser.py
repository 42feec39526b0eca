"""A page in a headless Chromium, where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
)

needs_a_browser = pytest.mark.skipif(_CHROMIUM is None, reason="no Chromium here")

OUT_OF_SIGHT = """
const most = page.documentElement.clientWidth;
const scrolls = (element) => element.closest(".scroll") && !element.closest(".cards");
const reaches = (element) => element.getBoundingClientRect().right > most + 1 && !scrolls(element);
return [...page.body.querySelectorAll("*")].filter(reaches).map((element) => element.outerHTML);
"""
"""Elements that reach beyond the right edge; tables other than those of cards may, they scroll by themselves."""


def looked_at(page: Path, script: str, width: int = 390) -> Any:
    """What `script`, with `page` as its document, returns as JSON."""
    frame = page.with_name("frame.html")
    frame.write_text(
        f"""<!doctype html><iframe id=frame src={page.name} width={width} height=844 style="border: 0"></iframe><pre id=out></pre>
        <script>
        document.getElementById("frame").onload = (event) => {{
          const page = event.target.contentDocument;
          document.getElementById("out").textContent = JSON.stringify((() => {{{script}}})());
        }};
        </script>""",
        encoding="utf-8",
    )
    command = [_CHROMIUM or "", *_QUIET.split(), "--allow-file-access-from-files", f"--user-data-dir={page.with_name('browser')}"]
    shown = subprocess.run([*command, "--dump-dom", frame.as_uri()], capture_output=True, text=True, timeout=60, check=True).stdout
    return json.loads(unescape(re.search(r'<pre id="out">(.*?)</pre>', shown, flags=re.DOTALL)[1]))  # type: ignore[index]
