"""Packs in a config: what they become, what wins over them, where they may come from, and what a stranger's file cannot do."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings, strategies as st

from dwl_plugin.cli.main import main
from dwl_plugin.config import Block, parse
from dwl_plugin.config.pack_cases import run_case
from dwl_plugin.config.pack_files import MAX_BYTES, PackText, shipped_packs
from dwl_plugin.config.packs import MAX_CLASSES, MAX_PATTERN, parse_pack
from dwl_plugin.errors import ConfigError

PACKS = Path(__file__).parents[2] / "dwl_plugin" / "classes" / "packs"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

MINE = r"""
description: Greetings.
classes:
  loud: {regex: 'HELLO', token_loss: dft}
  greeting: {regex: '(?i)hello', allow_empty: true}
alpha: {loud: 3, greeting: 2, rest: 1}
reduction: class_mean
tests:
  - {text: "hello HELLO", spans: {loud: ["HELLO"], greeting: ["hello"]}}
"""


def parsed(dwl: dict[str, Any], loss: str = "dwl", folder: Path | None = None) -> Block:
    block = parse({"loss": loss, "dwl": dwl}, folder)
    assert block is not None
    return block


def classes_of(block: Block) -> dict[str, Any]:
    return dict(block.dump()["dwl"]["classes"])


def problems_of(dwl: dict[str, Any], folder: Path | None = None) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parsed(dwl, folder=folder)
    return {problem.path: str(problem) for problem in caught.value.problems}


def refusals(text: str) -> dict[str, str]:
    """What is wrong with the text of a pack."""
    with pytest.raises(ConfigError) as caught:
        parse_pack(PackText("p.yml", textwrap.dedent(text)))
    return {problem.path: str(problem) for problem in caught.value.problems}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine.yml").write_text(MINE, encoding="utf-8")
    return tmp_path


# What a pack becomes


def test_a_whole_configuration_is_the_pack_s_classes_alpha_and_reduction(folder: Path) -> None:
    block = parsed({"pack": "./mine.yml"}, folder=folder)
    assert block.class_names == ("loud", "greeting", "rest")
    assert block.alpha == pytest.approx((3 / 6, 2 / 6, 1 / 6))
    assert block.reduction == "class_mean"
    assert [loss.exponent for loss in block.token_losses] == [1.0, 0.0, 0.0]
    assert "pack" not in block.dump()["dwl"]


def test_keys_beside_the_pack_win(folder: Path) -> None:
    own = {"alpha": {"loud": 0, "greeting": 1, "rest": 1}, "reduction": "token_mean"}
    block = parsed({"pack": "./mine.yml", **own}, folder=folder)
    assert block.alpha == (0.0, 0.5, 0.5)
    assert block.reduction == "token_mean"


def test_classes_beside_the_pack_replace_its_own_or_come_first(folder: Path) -> None:
    classes = {"bye": {"regex": "bye"}, "loud": {"regex": "HELLO!"}}
    alpha = {"bye": 1, "loud": 1, "greeting": 1, "rest": 1}
    block = parsed({"pack": "./mine.yml", "classes": classes, "alpha": alpha}, folder=folder)
    assert block.class_names == ("bye", "loud", "greeting", "rest")
    assert classes_of(block)["loud"]["regex"] == "HELLO!"


def test_alpha_is_asked_for_where_the_pack_cannot_know_it(folder: Path) -> None:
    found = problems_of({"pack": "./mine.yml", "classes": {"bye": {"regex": "bye"}}}, folder)
    assert list(found) == ["dwl.alpha"]
    assert "bye" in found["dwl.alpha"]


def test_a_number_of_alpha_beside_a_pack_changes_that_class_alone(folder: Path) -> None:
    block = parsed({"pack": "./mine.yml", "alpha": {"greeting": 4}}, folder=folder)
    assert block.alpha == (3 / 8, 4 / 8, 1 / 8)
    block = parsed({"pack": "./mine.yml", "alpha": {"rest": 0}}, folder=folder)
    assert block.alpha == (3 / 5, 2 / 5, 0.0)
    block = parsed({"pack": "./mine.yml", "classes": {"bye": {"regex": "bye"}}, "alpha": {"bye": 2}}, folder=folder)
    assert dict(zip(block.class_names, block.alpha, strict=True)) == {"bye": 2 / 8, "loud": 3 / 8, "greeting": 2 / 8, "rest": 1 / 8}


def test_a_number_of_alpha_for_no_class_is_a_mistake_and_one_of_a_pack_without_alpha_is_not_enough(folder: Path) -> None:
    (said,) = problems_of({"pack": "./mine.yml", "alpha": {"greetnig": 4}}, folder).items()
    assert said[0] == "dwl.alpha.greetnig"
    assert "did you mean `greeting`?" in said[1]
    (said,) = problems_of({"pack": "./mine.yml", "classes": {"bye": {"regex": "bye"}}, "alpha": {"byee": 4}}, folder).items()
    assert said[0] == "dwl.alpha.byee"
    assert "did you mean `bye`?" in said[1]
    found = problems_of({"pack": "./mine.yml", "classes": {"bye": {"regex": "bye"}}, "alpha": {"greeting": 4}}, folder)
    assert "missing: bye" in found["dwl.alpha"]
    (folder / "bare.yml").write_text("description: d\nclasses: {a: {regex: a}, b: {regex: b}}", encoding="utf-8")
    assert "missing: b, rest" in problems_of({"pack": "./bare.yml", "alpha": {"a": 4}}, folder)["dwl.alpha"]
    for alpha in ([1, 2], 3, {"loud": None}, {"loud": "much"}):
        assert next(iter(problems_of({"pack": "./mine.yml", "alpha": alpha}, folder))).startswith("dwl.alpha")


# Several packs


BYE = """
description: Farewells.
classes: {bye: {regex: bye}, last: {position: {last: 1}}}
alpha: {bye: 1, last: 3, rest: 2}
reduction: class_mean
"""


@pytest.fixture
def two(folder: Path) -> Path:
    (folder / "bye.yml").write_text(BYE, encoding="utf-8")
    return folder


def test_packs_are_joined_in_order_and_at_rest(two: Path) -> None:
    """`rest` counts 1 here and 2 there, so what is there is halved; the other way round, what is here is doubled."""
    block = parsed({"pack": ["./mine.yml", "./bye.yml"]}, folder=two)
    assert block.class_names == ("loud", "greeting", "bye", "last", "rest")
    assert block.dump()["dwl"]["alpha"] == {"loud": 3, "greeting": 2, "rest": 1, "bye": 0.5, "last": 1.5}
    assert block.reduction == "class_mean"
    block = parsed({"pack": ["./bye.yml", "./mine.yml"]}, folder=two)
    assert block.class_names == ("bye", "last", "loud", "greeting", "rest")
    assert list(block.dump()["dwl"]["alpha"].items()) == [("bye", 1), ("last", 3), ("rest", 2), ("loud", 6), ("greeting", 4)]
    one = parsed({"pack": ["./bye.yml"]}, folder=two)
    assert one == parsed({"pack": "./bye.yml"}, folder=two)


def test_a_number_beside_several_packs_is_on_the_scale_of_the_first(two: Path) -> None:
    block = parsed({"pack": ["./bye.yml", "./mine.yml"], "alpha": {"greeting": 5}}, folder=two)
    assert block.dump()["dwl"]["alpha"] == {"bye": 1, "last": 3, "rest": 2, "loud": 6, "greeting": 5}


def test_classes_beside_several_packs_come_first_or_take_a_place(two: Path) -> None:
    own = {"bye": {"words": ["bye"]}, "new": {"regex": "new"}}
    block = parsed({"pack": ["./mine.yml", "./bye.yml"], "classes": own, "alpha": {"new": 1}}, folder=two)
    assert block.class_names == ("new", "loud", "greeting", "bye", "last", "rest")
    assert classes_of(block)["bye"]["words"] == ["bye"]


def test_a_name_of_two_packs_is_refused_until_the_config_says_what_it_is() -> None:
    found = problems_of({"pack": ["numbers", "json", "markdown"]})
    assert list(found) == ["dwl.pack[1]"]
    assert "has a class `number`, and so has numbers (got 'json')" in found["dwl.pack[1]"]
    join = {"number": {"any": [{"pack": "numbers.number"}, {"pack": "json.number"}]}}
    assert "`number: {any: [{pack: numbers.number}, {pack: json.number}]}`" in found["dwl.pack[1]"]
    block = parsed({"pack": ["numbers", "json"], "classes": join})
    assert block.class_names == ("result", "number", "key", "string", "literal", "syntax", "rest")
    assert len(classes_of(block)["number"]["any"]) == 2
    assert block.dump()["dwl"]["alpha"]["number"] == 2, "both suggest it"
    apart = {"json_number": {"pack": "json.number"}, "key": {"pack": "json.key"}}
    block = parsed({"pack": "numbers", "classes": apart, "alpha": {"json_number": 2, "key": 1}})
    assert block.class_names == ("json_number", "key", "result", "number", "rest")


def test_what_packs_do_not_agree_on_is_asked_for(two: Path) -> None:
    other = BYE.replace("bye: 1", "bye: 4").replace("class_mean", "token_mean").replace("last:", "end:").replace("{end", "{last")
    (two / "other.yml").write_text(other)
    both = {"pack": ["./bye.yml", "./other.yml"], "classes": {"bye": {"regex": "bye"}}}
    found = problems_of(both, two)
    assert list(found) == ["dwl.reduction"]
    assert "class_mean (./bye.yml), token_mean (./other.yml)" in found["dwl.reduction"]
    both["reduction"] = "class_mean"
    assert "not the same, for bye" in problems_of(both, two)["dwl.alpha"]
    assert parsed({**both, "alpha": {"bye": 7}}, folder=two).dump()["dwl"]["alpha"]["bye"] == 7
    del both["reduction"]
    assert parsed(both, "nll", two).class_names == ("bye", "last", "end", "rest"), "measured alone"


def test_packs_without_a_common_scale_or_without_alpha_suggest_none(two: Path) -> None:
    (two / "bye.yml").write_text(BYE.replace("rest: 2", "rest: 0"), encoding="utf-8")
    both = {"pack": ["./mine.yml", "./bye.yml"]}
    assert "under ./bye.yml `rest` has α 0" in problems_of(both, two)["dwl.alpha"]
    whole = {"loud": 1, "greeting": 1, "bye": 1, "last": 1, "rest": 1}
    assert parsed({**both, "alpha": whole}, folder=two).alpha == (0.2,) * 5
    assert parsed({"pack": ["./bye.yml"]}, folder=two).alpha == (0.25, 0.75, 0.0)
    (two / "bye.yml").write_text(BYE.replace("alpha: {bye: 1, last: 3, rest: 2}", ""), encoding="utf-8")
    assert "suggest none, or not the same, for bye, last" in problems_of(both, two)["dwl.alpha"]
    block = parsed({**both, "alpha": {"bye": 2, "last": 2}}, folder=two)
    assert block.alpha == (0.3, 0.2, 0.2, 0.2, 0.1)
    (two / "mine.yml").write_text(MINE.replace("alpha: {loud: 3, greeting: 2, rest: 1}", ""), encoding="utf-8")
    assert parsed(both, folder=two).alpha == (0.2,) * 5, "where none suggests anything, all count alike"


@pytest.mark.parametrize(
    ("pack", "path", "says"),
    [
        ([], "dwl.pack", "names one pack, or a list"),
        (["numbers"] * 17, "dwl.pack", "a list of up to 16"),
        (["numbers", "code", "numbers"], "dwl.pack[2]", "stands twice"),
        (["numbers", "raesoning"], "dwl.pack[1]", "did you mean `reasoning`?"),
        (["numbers", "json.key"], "dwl.pack[1]", "{pack: json.key}"),
        (["numbers", 7], "dwl.pack[1]", "not a pack"),
        ([["numbers"]], "dwl.pack[0]", "one pack stands here"),
        ({"numbers": 1}, "dwl.pack", "not a pack"),
        ("./none.yml", "dwl.pack", "no such file"),
    ],
)
def test_a_mistake_in_the_list_is_named_with_its_place(pack: object, path: str, says: str) -> None:
    found = problems_of({"pack": pack})
    assert list(found) == [path]
    assert says in found[path]


def test_a_selector_takes_one_pack() -> None:
    (said,) = problems_of({"classes": {"a": {"pack": ["numbers", "json"]}}}).values()
    assert "`any: [{pack: a}, {pack: b}]`" in said


def test_under_another_loss_a_pack_is_measured(folder: Path) -> None:
    for loss in ("nll", "dft"):
        block = parsed({"pack": "./mine.yml"}, loss, folder)
        assert block.class_names == ("loud", "greeting", "rest")
        assert block.alpha == (1.0, 1.0, 1.0)
        assert {item.exponent for item in block.token_losses} == {0.0 if loss == "nll" else 1.0}


def test_a_member_is_what_the_classes_above_it_leave(folder: Path) -> None:
    block = parsed({"classes": {"g": {"pack": "./mine.yml.greeting"}}}, folder=folder)
    one, other = {"regex": "(?i)hello", "group": 0}, {"not": {"regex": "HELLO", "group": 0}}
    assert classes_of(block) == {"g": {"all": [one, other], "allow_empty": True}}


def test_the_first_member_has_nothing_above_it_and_keeps_what_it_pays(folder: Path) -> None:
    block = parsed({"classes": {"l": {"pack": "./mine.yml.loud"}}}, folder=folder)
    assert classes_of(block) == {"l": {"regex": "HELLO", "group": 0, "token_loss": "dft", "allow_empty": False}}
    block = parsed({"classes": {"l": {"pack": "./mine.yml.loud", "token_loss": "nll"}}}, folder=folder)
    assert classes_of(block)["l"]["token_loss"] == "nll"


def test_without_a_member_it_is_any_of_the_pack(folder: Path) -> None:
    block = parsed({"classes": {"both": {"pack": "./mine.yml", "allow_empty": True}}}, folder=folder)
    both = [{"regex": "HELLO", "group": 0}, {"regex": "(?i)hello", "group": 0}]
    assert classes_of(block) == {"both": {"any": both, "allow_empty": True}}


def test_packs_nest_in_selectors() -> None:
    block = parsed(
        {
            "classes": {
                "number_in_call": {"all": [{"pack": "numbers.number"}, {"pack": "tool_call.arguments"}]},
                "prose": {"not": {"any": [{"pack": "code"}, {"pack": "json"}]}},
            }
        }
    )
    assert "pack" not in yaml.safe_dump(block.dump())


@settings(max_examples=40, deadline=None)
@given(
    whole=st.sampled_from([None, *shipped_packs(), ["numbers", "reasoning"], ["tool_call", "end_of_turn", "math_answer"]]),
    members=st.lists(st.sampled_from([*shipped_packs(), "tool_call.name", "numbers.number", "json.syntax"]), max_size=3),
    loss=st.sampled_from(["nll", "dft", "dwl"]),
)
def test_what_is_dumped_parses_to_the_same(whole: str | list[str] | None, members: list[str], loss: str) -> None:
    classes: dict[str, Any] = {f"own{n}": {"any": [{"pack": name}, {"regex": "x"}]} for n, name in enumerate(members)}
    dwl = ({"classes": classes} if classes else {}) if whole is None else {"pack": whole}
    block = parse({"loss": loss, "dwl": dwl})
    assert block is not None
    assert parse(block.dump()) == block
    assert parse(yaml.safe_load(yaml.safe_dump(block.dump()))) == block


# What is refused in the config


@pytest.mark.parametrize(
    ("dwl", "path", "says"),
    [
        ({"pack": "reasonning"}, "dwl.pack", "did you mean `reasoning`?"),
        ({"pack": "tool_call.name"}, "dwl.pack", "{pack: tool_call.name}"),
        ({"pack": 7}, "dwl.pack", "not a pack"),
        ({"pack": "./nowhere.yml"}, "dwl.pack", "no such file"),
        ({"classes": {"a": {"pack": "tool_call.nmae"}}}, "dwl.classes.a.pack", "did you mean `name`?"),
        ({"classes": {"a": {"any": [{"pack": "nmbers"}]}}}, "dwl.classes.a.any[0].pack", "did you mean `numbers`?"),
        ({"classes": {"a": {"pack": "a b"}}}, "dwl.classes.a.pack", "not a pack"),
        ({"classes": {"a": {"pack": "numbers", "regex": "x"}}}, "dwl.classes.a", "one selector"),
        ({"classes": {"a": {"pack": "numbers", "group": 1}}}, "dwl.classes.a.group", "unknown key"),
        ({"classes": {"a": {"not": {"pack": "numbers", "allow_empty": True}}}}, "dwl.classes.a.not.allow_empty", "unknown key"),
        ({"classes": {"a": {"pack": "hf://u/r/f.yml"}}}, "dwl.classes.a.pack", "full commit"),
        ({"classes": {"a": {"pack": "hf://u/r@main/f.yml"}}}, "dwl.classes.a.pack", "a branch or a tag can be moved"),
        ({"classes": {"a": {"pack": "hf://u/r@0123456/f.yml"}}}, "dwl.classes.a.pack", "40 hexadecimal digits"),
        ({"classes": {"a": {"pack": "hf://f.yml"}}}, "dwl.classes.a.pack", "not an address"),
    ],
)
def test_a_mistake_is_named_with_its_place(dwl: dict[str, Any], path: str, says: str) -> None:
    found = problems_of(dwl)
    assert list(found) == [path]
    assert says in found[path]


def test_a_path_is_looked_up_beside_the_config_then_in_the_working_directory(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path_factory.mktemp("here")
    monkeypatch.chdir(here)
    (here / "other.yml").write_text(MINE.replace("loud", "here"), encoding="utf-8")
    (here / "mine.yml").write_text(MINE.replace("loud", "here"), encoding="utf-8")
    assert "loud" in classes_of(parsed({"pack": "mine.yml"}, folder=folder))
    assert "here" in classes_of(parsed({"pack": "mine.yml"}))
    assert "here" in classes_of(parsed({"pack": "./other.yml"}, folder=folder))
    missing = problems_of({"pack": "./none.yml"}, folder)["dwl.pack"]
    assert str(folder / "none.yml") in missing


# The Hub


def test_without_a_network_the_hub_s_error_is_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = problems_of({"pack": f"hf://user/repo@{COMMIT}/packs/mine.yml"})["dwl.pack"]
    assert "could not be fetched" in found
    assert "download the file once" in found


@pytest.mark.parametrize(("address", "cached"), [("", "models--user--repo"), ("datasets/", "datasets--user--repo")])
def test_a_pack_that_was_fetched_before_is_read_and_its_hash_is_logged(
    address: str, cached: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / cached / "snapshots" / COMMIT / "packs"
    snapshot.mkdir(parents=True)
    (snapshot / "mine.yml").write_text("description: d\nclasses: {x: {regex: x}}\n", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = f"hf://{address}user/repo@{COMMIT}/packs/mine.yml"
    block = parsed({"classes": {"a": {"pack": name}, "b": {"not": {"pack": f"{name}.x"}}}})
    assert classes_of(block)["a"]["regex"] == "x"
    digest = "d40b822d5356ef73520cfe74b0729c8062549d6da369d7e84607ad9bb6147880"  # sha256sum of the file
    assert capsys.readouterr() == ("", f"[dwl] pack {name}: sha256 {digest}\n")
    parsed({"classes": {"b": {"pack": f"{name}.x"}}})
    assert capsys.readouterr() == ("", "")


# A pack is data


def test_a_mistake_in_a_pack_is_named_with_its_place_in_the_file() -> None:
    found = refusals(r"""
        description: d
        sources: [http://plain.org]
        classes:
          a: {regex: '('}
          b: {rgex: x}
          c: {any: [{regex: x, group: 4}]}
          d: {pack: nmbers}
          e f: {regex: x}
        alpha: {a: 1}
        code: os.system
        tests:
          - {text: x, spans: {z: [x]}}
          - {text: x, turns: [{text: y}], spans: {}}
    """)
    assert {
        "p.yml: classes.a.regex",
        "p.yml: classes.b",
        "p.yml: classes.c.any[0].group",
        "p.yml: classes.d.pack",
        "p.yml: classes",
        "p.yml: alpha",
        "p.yml: code",
        "p.yml: tests[0].spans.z",
        "p.yml: tests[1]",
        "p.yml: sources",
    } == set(found)


@pytest.mark.parametrize(
    ("text", "path", "says"),
    [
        ("a: &x [1]\nb: *x", "p.yml:1", "anchors"),
        ("a: !!python/object/apply:os.system ['true']", "p.yml:1", "tags"),
        ("a: !!binary aGk=", "p.yml:1", "tags"),
        ("a: 1\na: 2", "p.yml:2", "stands twice"),
        ("[" * 40_000, "p.yml:1", "nested"),
        ("a: [1", "p.yml:1", "not YAML"),
        ("a: 2026-99-99", "p.yml", "not YAML"),
        ("b: 1\na: " + "9" * 5000, "p.yml:2", "128 characters"),
        ("just words", "p.yml", "a mapping"),
    ],
    ids=["alias", "python", "binary", "twice", "deep", "open", "date", "digits", "words"],
)
def test_yaml_that_is_more_than_data_is_refused(text: str, path: str, says: str) -> None:
    found = refusals(text)
    assert list(found) == [path]
    assert says in found[path]


def test_a_billion_laughs_cost_nothing() -> None:
    lines = ["a0: &a0 [lol, lol]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)]
    began = time.process_time()
    assert "anchors" in refusals("\n".join(lines))["p.yml:1"]
    assert time.process_time() - began < 1


def test_sizes_are_limited(tmp_path: Path) -> None:
    (tmp_path / "big.yml").write_text("#" * (MAX_BYTES + 1), encoding="utf-8")
    assert "KiB" in problems_of({"pack": "big.yml"}, tmp_path)["dwl.pack"]
    long = refusals(f"{{description: d, classes: {{a: {{any: [{{regex: {'a' * (MAX_PATTERN + 1)}}}]}}}}}}")
    assert list(long) == ["p.yml: classes.a.any[0].regex"]
    many = ", ".join(f"c{n}: {{regex: x{n}}}" for n in range(MAX_CLASSES + 1))
    assert str(MAX_CLASSES) in refusals(f"{{description: d, classes: {{{many}}}}}")["p.yml: classes"]
    tools = ", ".join(["{pack: tool_call}"] * 9)
    assert "selectors" in refusals(f"{{description: d, classes: {{a: {{any: [{tools}]}}}}}}")["p.yml: classes"]


@pytest.mark.parametrize(
    "pattern", ["(?:(?:a{1000}){1000}){1000}", "(" * 1500 + ")" * 1500, "a{3000000}", "(?:(?:[ab]{99}){99}c){99}"]
)
def test_a_pattern_that_would_fill_the_memory_when_compiled_is_refused(pattern: str) -> None:
    began = time.process_time()
    assert "dwl.classes.a.regex" in problems_of({"classes": {"a": {"regex": pattern}}})
    assert time.process_time() - began < 1


def test_a_pack_can_use_shipped_packs_and_no_others() -> None:
    shipped = parse_pack(PackText("p.yml", "description: d\nclasses: {a: {not: {pack: numbers.number}}}"))
    assert "pack" not in yaml.safe_dump(shipped.classes["a"].model_dump(mode="json"))
    for other in ("./q.yml", f"hf://u/r@{COMMIT}/q.yml"):
        found = refusals(f"description: d\nclasses: {{a: {{any: [{{pack: '{other}'}}]}}}}")
        assert "only the packs of this package" in found["p.yml: classes.a.any[0].pack"]


# The command


def test_packs_are_listed_and_shown() -> None:
    listed = CliRunner().invoke(main, ["packs", "list"], env={"COLUMNS": "160"})
    assert listed.exit_code == 0
    assert all(name in listed.output for name in shipped_packs())
    shown = CliRunner().invoke(main, ["packs", "show", "numbers"])
    assert shown.exit_code == 0
    assert "weighted_mean" in shown.output
    assert "https://arxiv.org/abs/2110.14168" in shown.output
    assert "tests:" not in shown.output


def test_the_raw_file_of_a_pack_is_a_pack_of_one_s_own(tmp_path: Path) -> None:
    for name in shipped_packs():
        assert CliRunner().invoke(main, ["packs", "show", name, "--raw"]).stdout_bytes == (PACKS / f"{name}.yml").read_bytes()
    dwl = f'"{sys.executable}" -c "from dwl_plugin.cli.main import main; main()"'
    line = f"{dwl} packs show reasoning --raw > my.yml && {dwl} packs test ./my.yml"
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"\./my\.yml: \d+ cases pass\n", done.stdout)


def test_a_raw_file_drives_no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "odd.yml").write_text("description: \u202edetrevni\nclasses: {a: {regex: a}}\n", encoding="utf-8")
    as_it_is = CliRunner().invoke(main, ["packs", "show", str(tmp_path / "odd.yml"), "--raw"])
    assert as_it_is.stdout_bytes == (tmp_path / "odd.yml").read_bytes()
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True, raising=False)
    shown = CliRunner().invoke(main, ["packs", "show", str(tmp_path / "odd.yml"), "--raw"])
    assert shown.output == "description: ‹202e›detrevni\nclasses: {a: {regex: a}}\n"
    no_pack = CliRunner().invoke(main, ["packs", "show", str(tmp_path / "none.yml"), "--raw"])
    assert no_pack.exit_code == 1


def test_a_pack_file_runs_its_own_cases(folder: Path) -> None:
    file = folder / "mine.yml"
    passed = CliRunner().invoke(main, ["packs", "test", str(file), "numbers"])
    assert passed.exit_code == 0, passed.output
    assert "1 case passes" in passed.output
    file.write_text(MINE.replace('"hello HELLO"', '"hullo HELLO"'), encoding="utf-8")
    failed = CliRunner().invoke(main, ["packs", "test", str(file)])
    assert failed.exit_code == 1
    assert "1 of 1 cases fail" in failed.output
    assert "'hello'" in failed.output


def test_a_pack_that_is_none_is_an_error_of_one_line_each(folder: Path) -> None:
    for arguments in (["show", "nothing"], ["test", str(folder / "none.yml")], ["show", "tool_call.name"]):
        result = CliRunner().invoke(main, ["packs", *arguments])
        assert result.exit_code == 1
        assert "Error: 1 problem\n" in result.output


# What the data says


MARKED = """
description: Tokens that somebody found to decide.
classes:
  critical: {marked: critical}
  number: {regex: '[0-9]+'}
alpha: {critical: 2, number: 1, rest: 1}
tests:
  - {prompt: "1 ", text: "2 two", mark: critical, spans: {critical: ["2 two"]}}
  - {text: "2 two", mark: dull, spans: {number: ["2"], rest: [" two"]}}
  - turns: [{text: "a1"}, {prompt: "b", text: "c3", mark: critical}]
    spans: {number: ["1"], critical: ["c3"], rest: ["a"]}
"""


def test_a_case_says_what_the_data_marks() -> None:
    pack = parse_pack(PackText("p.yml", MARKED))
    assert all(run_case(pack, case).passed for case in pack.tests)
    wrong = parse_pack(PackText("p.yml", MARKED.replace("mark: dull, ", "mark: critical, ")))
    assert [run_case(wrong, case).passed for case in wrong.tests] == [True, False, True]


def test_a_config_with_such_a_pack_reads_the_data(tmp_path: Path) -> None:
    (tmp_path / "marked.yml").write_text(MARKED, encoding="utf-8")
    block = parsed({"pack": "./marked.yml", "data_weights": True}, folder=tmp_path)
    assert (block.reads_data, block.marks) == (True, ("critical",))
    assert block.data_weights is not None


def test_a_pack_names_no_data_set_and_a_case_of_turns_marks_each() -> None:
    (said,) = refusals(MARKED.replace("{marked: critical}", "{any: [{dataset: math}, {regex: x}]}")).values()
    assert "`dataset: math` is a name in one config, and a pack is for many" in said
    (said,) = refusals(MARKED.replace("  - turns:", "  - mark: critical\n    turns:")).values()
    assert "with `turns`, each turn has its own `mark`" in said
