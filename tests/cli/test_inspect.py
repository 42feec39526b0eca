"""`dwl inspect`: what is shown is what is trained, and a sample's text is never more than text."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from dwl_plugin.cli.inspect.rows import look
from dwl_plugin.cli.output import printable
from tests.cli.browser import OUT_OF_SIGHT, looked_at, needs_a_browser
from tests.hosts import harness

Run = Callable[..., Result]
Write = Callable[..., Path]

HOSTILE = '</script><img src=x onerror="alert(1)"><script>alert(2)</script> {{ 7*7 }} & \'"` 7'
CLASSES = {"control": {"tokens": ["<|im_end|>"]}, "number": {"regex": r"\d+"}}


class Page(HTMLParser):
    """Elements, and for each token its attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[dict[str, str | None], str]] = []
        self.scripts: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "span" and "data-id" in dict(attrs):
            self.tokens.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] == ["span"] and self.tokens and self.elements:
            attributes, text = self.tokens[-1]
            self.tokens[-1] = (attributes, text + data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture
def page(dwl: Run, write_config: Write, tmp_path: Path) -> Callable[..., Page]:
    def make(samples: int = 4, **changes: Any) -> Page:
        out = tmp_path / "page.html"
        result = dwl("inspect", write_config(**changes), "--samples", samples, "--html", out)
        assert result.exit_code == 0, result.output
        return Page(out.read_text(encoding="utf-8"))

    return make


def tokenizer_of(model: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def test_ids_text_and_classes_on_the_page(page: Callable[..., Page], little_model: Path) -> None:
    shown = page(4, loss="dwl", dwl={"classes": CLASSES}, shuffle_merged_datasets=False)
    tokenizer = tokenizer_of(little_model)
    expected = [tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=False) for row in harness.rows(4)]
    assert [int(attributes["data-id"] or "") for attributes, _ in shown.tokens] == [i for ids in expected for i in ids]
    for attributes, text in shown.tokens:
        if attributes["data-class"] == "control":
            assert text == "<|im_end|>"
        elif attributes["data-class"] == "number":
            assert re.search(r"\d", text)
        elif attributes["data-class"] == "rest":
            assert not re.search(r"\d", text)
    first_row = "".join(text for _, text in shown.tokens[: len(expected[0])])
    assert "What is 2 + 1?" in first_row
    masked = "".join(text for attributes, text in shown.tokens if not attributes["data-class"])
    assert "What is 2 + 1?" in masked
    assert "The answer is" not in masked


def test_a_samples_markup_stays_text(page: Callable[..., Page], tmp_path: Path) -> None:
    turn = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    data = harness.write_rows(tmp_path / "hostile.jsonl", [{"messages": turn}] * 3)
    shown = page(2, data=data, loss="dwl", dwl={"classes": CLASSES})
    assert shown.named("img") == []
    assert len(shown.named("script")) == 1
    assert "".join(text for _, text in shown.tokens).count(HOSTILE) == 4


def test_a_configs_own_name_stays_text(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(loss="dft").rename(tmp_path / "<img src=x>.yml")
    out = tmp_path / "page.html"
    dwl("inspect", config, "--samples", 1, "--html", out)
    assert Page(out.read_text(encoding="utf-8")).named("img") == []


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_leaves_the_old_page_and_says_so(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    result = dwl("inspect", write_config(loss="dft"), "--samples", 1, "--html", out)
    assert result.exit_code == 1
    assert "page.html cannot be written: No space left on device; the file that is there was not touched." in result.output
    assert out.read_text() == "old"


def test_the_page_asks_for_nothing_and_runs_only_its_own_script(page: Callable[..., Page]) -> None:
    shown = page(1, loss="dwl", dwl={"classes": CLASSES})
    policy = next(meta["content"] for meta in shown.named("meta") if "http-equiv" in meta) or ""
    digest = base64.b64encode(hashlib.sha256("".join(shown.scripts).encode()).digest()).decode()
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy
    assert not [attributes for _, attributes in shown.elements if "src" in attributes or "style" in attributes]
    assert all((link["href"] or "").startswith("#") for link in shown.named("a"))
    assert shown.named("link") == []


@needs_a_browser
def test_a_phone_shows_all_of_the_page(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    alpha = {"control": 2, "number": 1, "rest": 1}
    dwl("inspect", write_config(loss="dwl", dwl={"classes": CLASSES, "alpha": alpha}), "--samples", 2, "--html", out)
    assert looked_at(out, OUT_OF_SIGHT) == []
    named = "return [...page.querySelectorAll('tr:has(#k0) td')].map((cell) => getComputedStyle(cell, '::before').content)"
    assert looked_at(out, named) == ['"tokens"', '"share"', '"α"', '"one token, vs SFT"', '"share of the weight"']


def test_the_samples_of_a_packed_row_are_told_apart(page: Callable[..., Page]) -> None:
    changes = {"sample_packing": True, "sequence_len": 256, "micro_batch_size": 1}
    shown = page(12, loss="dwl", dwl={"classes": CLASSES}, **changes)
    sections = [attributes["id"] for attributes in shown.named("section")]
    assert len(sections) == 12
    assert len(shown.named("article")) < 12
    assert {link["href"] for link in shown.named("a")} <= {f"#{name}" for name in sections}


def test_what_a_token_weighs(page: Callable[..., Page]) -> None:
    shown = page(3, loss="dwl", dwl={"classes": CLASSES, "alpha": {"control": 2, "number": 1, "rest": 1}})
    weights = {attributes["data-class"]: attributes.get("data-weight") for attributes, _ in shown.tokens}
    assert weights == {"": None, "control": "0.5", "number": "0.25", "rest": "0.25"}


def test_a_token_of_two_classes_weighs_what_both_do_where_classes_are_summed(page: Callable[..., Page]) -> None:
    classes = {"odd": {"regex": r"\d*[13579]\b"}, "number": {"regex": r"\d+"}}
    dwl_block = {"classes": classes, "overlap": "sum", "alpha": {"odd": 2, "number": 1, "rest": 1}}
    shown = page(6, loss="dwl", dwl=dwl_block)
    weights = {attributes["data-class"]: attributes.get("data-weight") for attributes, _ in shown.tokens}
    assert weights == {"": None, "odd, also number": "0.75", "number": "0.25", "rest": "0.25"}


def test_in_the_terminal_the_number_of_a_class_stands_before_it_without_colour(dwl: Run, write_config: Write) -> None:
    result = dwl("inspect", write_config(loss="dwl", dwl={"classes": CLASSES}), "--samples", 2)
    assert result.exit_code == 0, result.output
    assert "¹control" in result.output
    assert "¹<|im_end|>" in result.output
    assert re.search(r"The answer is ?²", result.output)


def test_a_sample_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n\tc", keep="\n\t") == "a‹1b›[2Jb\n\tc"


def test_no_two_of_thirty_classes_look_alike() -> None:
    assert len({look(index) for index in range(30)}) == 30


def weighed_rows(folder: Path) -> Path:
    """Four rows of factors 1, 0.3, 0 and, in their second half, −1; the second is marked."""
    plain, fainter, none, pushed = harness.rows(4)
    answer = pushed["messages"][1]["content"]
    parts = [{"type": "text", "text": answer[:8]}, {"type": "text", "text": answer[8:], "weight": -1}]
    pushed["messages"][1]["content"] = parts
    return harness.write_rows(
        folder / "weighed.jsonl", [plain, {**fainter, "weight": 0.3, "mark": "critical"}, {**none, "weight": 0}, pushed]
    )


WEIGHED = {"classes": {**CLASSES, "critical": {"marked": "critical"}}, "data_weights": {"allow_negative": True}}


def test_the_factor_of_each_token_and_what_else_the_data_says(page: Callable[..., Page], tmp_path: Path) -> None:
    shown = page(4, data=weighed_rows(tmp_path), loss="dwl", dwl=WEIGHED, shuffle_merged_datasets=False)
    begins = [k for k, (_, text) in enumerate(shown.tokens) if text == "<|im_start|>"][::2]  # of a user and an assistant
    tokens = [attributes for attributes, _ in shown.tokens]
    plain, fainter, none, pushed = (tokens[a:b] for a, b in zip(begins, [*begins[1:], None], strict=True))
    assert {token.get("data-says") for token in plain} == {None}
    assert {token.get("data-says") for token in fainter} == {"0.3"}
    assert {token.get("data-marks") for token in fainter} == {"critical"}
    assert {token.get("data-says") for token in pushed} == {None, "-1"}

    def of_targets(tokens: list[dict[str, str | None]]) -> set[str]:
        return {str(token["class"]).split()[1] for token in tokens if token["data-class"]}

    assert [of_targets(tokens) for tokens in (plain, fainter, none)] == [{"f4"}, {"f2"}, set()]
    assert of_targets(pushed) == {"f4", "neg"}
    out, masked = ([token for token in none if ("data-out" in token) is there] for there in (True, False))
    assert {str(token["class"]) for token in out} == {"t f0 m"}  # struck out, where the host's own mask is only grey
    assert {str(token["class"]) for token in masked} == {"t m"}
    assert [mark["data-factor"] for mark in shown.named("i") if mark.get("class") == "factor"] == [
        *("×-1", "×0", "×0.3", "×1"),  # the legend
        *("×0.3", "×0", "×-1", "×1"),  # the rows, each of which begins with 1
    ]


def test_what_a_token_weighs_is_its_classes_weight_times_its_factor(page: Callable[..., Page], tmp_path: Path) -> None:
    alpha = {"control": 2, "number": 1, "critical": 0, "rest": 1}
    shown = page(4, data=weighed_rows(tmp_path), loss="dwl", dwl={**WEIGHED, "alpha": alpha})
    found = {
        (token["data-class"], token.get("data-says"), token.get("data-weight")) for token, _ in shown.tokens if token["data-class"]
    }
    assert found == {
        *(("control", None, "0.5"), ("number", None, "0.25"), ("rest", None, "0.25")),
        *(("control, also critical", "0.3", "0.15"), ("number, also critical", "0.3", "0.075"), ("critical", "0.3", "0")),
        *(("number", "-1", "-0.25"), ("rest", "-1", "-0.25")),
    }


def test_in_the_terminal_a_run_of_one_factor_begins_with_it(dwl: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(data=weighed_rows(tmp_path), loss="nll", dwl=WEIGHED, shuffle_merged_datasets=False)
    said = dwl("inspect", config, "--samples", 4).output
    assert "×₀taken out by the data" in said
    one, fainter, none, pushed = said.split("row 1 of 4")[1].split("tokens ─")[1:]
    assert "×" not in one
    assert [re.findall("×[₀-₉₋.]+", row) for row in (fainter, none, pushed)] == [["×₀.₃"], ["×₀"], ["×₋₁", "×₁"]]


@pytest.mark.parametrize("html", [True, False])
def test_where_the_data_says_nothing_no_factor_is_shown(dwl: Run, write_config: Write, tmp_path: Path, html: bool) -> None:
    config = write_config(loss="nll", dwl={"classes": CLASSES, "data_weights": True})
    result = dwl("inspect", config, "--samples", 2, *(["--html", tmp_path / "page.html"] if html else []))
    shown = (tmp_path / "page.html").read_text(encoding="utf-8").partition("<body>")[2] if html else result.output
    assert "×1" not in shown
    assert "×₁" not in shown
    assert "from × on" not in shown
