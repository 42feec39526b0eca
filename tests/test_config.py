"""The YAML: what is accepted, what is refused, and with which words."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st

from dwl_plugin.config import parse
from dwl_plugin.errors import ConfigError

GOOD = r"""
loss: dwl
dft: {exponent: 0.5}
dwl:
  token_loss: dft
  reduction: class_mean
  classes:
    reasoning: {between: ["<think>", "</think>"], include_delimiters: false}
    number: {regex: '\d[\d,]*(?:\.\d+)?'}
    final: {regex: '####\s*(.+)$', group: 1, allow_empty: true}
    digits: {token_regex: '\s?\d+'}
    soft: {token_ids: [11, 12, "100-199"], dft: {exponent: 0.3, min_weight: 0.1}}
    control: {tokens: ["<|im_end|>"], token_loss: nll}
  alpha: {reasoning: 1, number: 3, final: 2, digits: 0, soft: 1, control: 1, rest: 2}
  schedule: {type: cosine, to: {reasoning: 0, number: 0, final: 1, digits: 0, soft: 0, control: 0, rest: 0}, start: 10%, end: 2ep}
"""


def problems_of(text: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse(yaml.safe_load(text))
    return {problem.path: str(problem) for problem in caught.value.problems}


def test_whole_grammar_parses_and_survives_its_own_dump_twice() -> None:
    block = parse(yaml.safe_load(GOOD))
    assert block is not None
    assert parse(block.dump()) == block
    assert parse(parse(block.dump()).dump()) == block  # type: ignore[union-attr]


def test_resolved_numbers_are_the_ones_written_down() -> None:
    block = parse(yaml.safe_load(GOOD))
    assert block is not None
    assert block.class_names == ("reasoning", "number", "final", "digits", "soft", "control", "rest")
    assert block.alpha == pytest.approx((0.1, 0.3, 0.2, 0.0, 0.1, 0.1, 0.2))
    assert [loss.exponent for loss in block.token_losses] == [0.5, 0.5, 0.5, 0.5, 0.3, 0.0, 0.5]
    assert block.token_losses[4].min_weight == 0.1


def test_a_zero_stays_a_zero() -> None:
    block = parse({"loss": "dft", "dft": {"exponent": 0.0}})
    assert block is not None
    assert block.token_losses[0].exponent == 0.0


def test_config_without_our_keys_is_none() -> None:
    assert parse({"base_model": "x", "dwl": None}) is None


def test_every_problem_is_reported_at_once_with_its_path() -> None:
    found = problems_of("""
loss: dwl
dwl:
  clases: {}
  classes:
    a: {regx: x}
    b: {regex: '(ab'}
    c: {token_ids: [-1, "9-3"]}
    d: {regex: x, tokens: [a]}
    e: {between: ["<think>"]}
  alpha: {a: -1, bb: 2}
  reduction: clas_mean
  schedule: {type: linear, start: 0.1, to: {a: 1}}
""")
    assert "did you mean `classes`" in found["dwl.clases"]
    assert "did you mean `regex`" in found["dwl.classes.a"]
    assert "missing ) at position 3" in found["dwl.classes.b.regex"]
    assert "negative" in found["dwl.classes.c.token_ids[0]"]
    assert "ends before it begins" in found["dwl.classes.c.token_ids[1]"]
    assert "tokens and regex" in found["dwl.classes.d"]
    assert "required" in found["dwl.classes.e.between[1]"]
    assert "negative" in found["dwl.alpha.a"]
    assert "did you mean `b`" in found["dwl.alpha.bb"]
    assert "missing" in found["dwl.alpha"]
    assert "did you mean `class_mean`" in found["dwl.reduction"]
    assert "10%" in found["dwl.schedule.start"]
    assert "missing" in found["dwl.schedule.to"]
    assert len(found) == 13


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("dwl: {classes: {}}", "dwl", "loss: dwl"),
        ("dft: {exponent: 1}", "dft", "loss: dft"),
        ("loss: dwl", "dwl", "needs a `dwl` block"),
        ("loss: dlw\ndwl: {}", "loss", "did you mean `dwl`"),
        ("loss: dwl\ndwl: {classes: {f: {regex: #### (.+)\n}}}", "dwl.classes.f.regex", "unquoted `#`"),
        ("loss: dwl\ndwl: {classes: {yes: {regex: a}}}", "dwl.classes", "booleans"),
        ("loss: dwl\ndwl: {classes: {a: {tokens: [no]}}}", "dwl.classes.a.tokens[0]", "quotes"),
        ("loss: dwl\ndwl: {classes: {1: {regex: a}}}", "dwl.classes", "'1'"),
        ("loss: dwl\ndwl: {classes: {a: {regex: 12}}}", "dwl.classes.a.regex", "quotes"),
        ("loss: dwl\ndwl: {classes: {rest: {regex: a}}}", "dwl.classes.rest", "unclaimed"),
        ("loss: dwl\ndwl: {classes: {a-b: {regex: a}}}", "dwl.classes", "letters"),
        ("loss: dwl\ndwl: {classes: {a: {regex: a}}, alpha: {a: 0, rest: 0}}", "dwl.alpha", "above 0"),
        ("loss: dwl\ndwl: {classes: {a: {regex: a}}, alpha: {a: yes, rest: 1}}", "dwl.alpha.a", "boolean"),
        ("loss: dwl\ndwl: {classes: {a: {regex: (a), group: 2}}}", "dwl.classes.a.group", "1 group"),
        ("loss: dwl\ndwl: {classes: {a: {regex: a, dft: {exponent: 1}}}}", "dwl.classes.a.dft", "token_loss: dft"),
        ("loss: dwl\ndft: {exponent: 0.5}\ndwl: {classes: {}}", "dft", "no token pays dft"),
        ("loss: nll\ndwl: {classes: {}, alpha: {rest: 1}}", "dwl.alpha", "loss: dwl"),
        ("loss: nll\ndwl: {schedule: {type: linear, to: {rest: 1}}}", "dwl.schedule", "loss: dwl"),
        ("loss: nll\ndwl: {reduction: class_mean}", "dwl.reduction", "loss: dwl"),
        ("loss: dft\ndft: {exponent: -1}", "dft.exponent", "greater than or equal to 0"),
        ("loss: dft\ndft: {min_weigth: 0}", "dft.min_weigth", "did you mean `min_weight`"),
        ("loss: dwl\ndwl: {schedule: {type: linear, to: {rest: 1}, start: 50%, end: 10%}}", "dwl.schedule.end", "after"),
        ("loss: dwl\ndwl: {schedule: {type: linear, to: {rest: 1}, end: 120%}}", "dwl.schedule.end", "100%"),
        ("loss: dwl\ndwl: {schedule: {type: linear, to: {rest: 1}, end: soon}}", "dwl.schedule.end", "2ep"),
        ("loss: dwl\ndwl: {schedule: {to: {rest: 1}}}", "dwl.schedule.type", "cosine"),
        ("loss: dwl\ndwl: {alpha: {rest: .inf}}", "dwl.alpha.rest", "finite"),
    ],
)  # fmt: skip
def test_bad_input_names_the_place_and_the_way_out(text: str, path: str, words: str) -> None:
    found = problems_of(text)
    assert words in found[path]
    assert len(found) == 1


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=6)
    | st.sampled_from(["nll", "dft", "dwl", "10%", "2ep", "linear", r"\d+", "(", "100-199", "rest"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from([
            "classes", "alpha", "schedule", "reduction", "token_loss", "dft", "exponent", "min_weight", "regex", "group",
            "token_ids", "tokens", "token_regex", "between", "type", "to", "start", "end", "rest", "a", "overlap",
        ]) | st.text(max_size=4) | st.booleans(),
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(
    st.fixed_dictionaries({"loss": JUNK | st.sampled_from(["nll", "dft", "dwl"])}, optional={"dft": JUNK, "dwl": JUNK})
)
def test_any_mapping_gives_a_block_that_round_trips_or_our_own_error(raw: dict[str, Any]) -> None:
    try:
        block = parse(raw)
    except ConfigError as error:
        paths = [problem.path for problem in error.problems]
        if not paths or not all(paths):
            pytest.fail(f"an error without a place: {error}")
    else:
        assert block is None or parse(block.dump()) == block
