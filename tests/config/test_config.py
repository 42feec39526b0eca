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
    parts:
      any:
        - all: [{turn: last}, {position: {first: 3, last: 2}}, {not: {words: [a, New York], ignore_case: true}}]
        - not: {any: [{role: tool}, {special: true}, {added: yes}, {turn: -2}]}
      allow_empty: true
  alpha: {reasoning: 1, number: 3, final: 2, digits: 0, soft: 1, control: 1, parts: 0, rest: 2}
  schedule:
    type: cosine
    to: {reasoning: 0, number: 0, final: 1, digits: 0, soft: 0, control: 0, parts: 0, rest: 0}
    start: 10%
    end: 2ep
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
    assert block.class_names == ("reasoning", "number", "final", "digits", "soft", "control", "parts", "rest")
    assert block.alpha == pytest.approx((0.1, 0.3, 0.2, 0.0, 0.1, 0.1, 0.0, 0.2))
    assert [loss.exponent for loss in block.token_losses] == [0.5, 0.5, 0.5, 0.5, 0.3, 0.0, 0.5, 0.5]
    assert block.token_losses[4].min_weight == 0.1


def test_options_of_a_token_loss_come_from_the_class_then_the_block_then_the_defaults() -> None:
    block = parse(
        yaml.safe_load("""
loss: dwl
dwl:
  token_loss: focal
  focal: {gamma: 1.5}
  classes:
    a: {regex: a, focal: {gamma: 3}}
    b: {regex: b}
    c: {regex: c, token_loss: eaft}
    d: {regex: d, token_loss: dft, dft: {threshold: 0.7}}
  overlap: sum
  reduction: sequence_mean_token_sum
""")
    )
    assert block is not None
    a, b, c, d, rest = (token_loss.model_dump() for token_loss in block.token_losses)
    assert (a, b, rest) == ({"gamma": 3.0}, {"gamma": 1.5}, {"gamma": 1.5})
    assert c == {"exponent": 1.0, "top_k": 20}
    assert d["threshold"] == 0.7
    assert (block.overlap, block.reduction) == ("sum", "sequence_mean_token_sum")
    assert parse(block.dump()) == block


def test_more_classes_than_bits_cannot_overlap() -> None:
    classes = {f"c{i}": {"token_ids": [i]} for i in range(63)}
    assert parse({"loss": "dwl", "dwl": {"classes": classes}}) is not None
    with pytest.raises(ConfigError, match=r"dwl.overlap: `sum` takes at most 62 classes, and there are 63"):
        parse({"loss": "dwl", "dwl": {"classes": classes, "overlap": "sum"}})


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
    assert "write `a: {regex: x}`" in found["dwl.classes.a"]
    assert "missing ) at its end" in found["dwl.classes.b.regex"]
    assert "negative" in found["dwl.classes.c.token_ids[0]"]
    assert "ends before it begins" in found["dwl.classes.c.token_ids[1]"]
    assert "tokens and regex" in found["dwl.classes.d"]
    assert "write `between: ['<think>', '</think>']`" in found["dwl.classes.e.between"]
    assert "negative" in found["dwl.alpha.a"]
    assert "did you mean `b`" in found["dwl.alpha.bb"]
    assert "missing" in found["dwl.alpha"]
    assert "write `reduction: class_mean`" in found["dwl.reduction"]
    assert "10%" in found["dwl.schedule.start"]
    assert "missing" in found["dwl.schedule.to"]
    assert len(found) == 13


def test_a_wrong_order_or_a_missing_selector_hides_nothing_beside_it() -> None:
    found = problems_of("""
loss: dwl
dwl:
  token_loss: dft
  focal: {gamma: 1}
  classes:
    a: {regex: x, dft: {schedule: {type: linear, start: 50%, end: 10%, to: {exponent: 1}}}}
""")
    assert found.keys() == {"dwl.focal", "dwl.classes.a.dft.schedule.end"}
    found = problems_of("""
loss: dwl
dwl:
  classes:
    a: {dft: {schedule: {type: linear}}}
""")
    assert found.keys() == {"dwl.classes.a", "dwl.classes.a.dft.schedule.to"}


def test_options_of_a_token_loss_are_dumped_beside_its_name() -> None:
    block = parse(yaml.safe_load(GOOD))
    assert block is not None
    keys = list(block.model_dump()["dwl"])
    assert keys[:5] == ["pack", "token_loss", "focal", "eaft", "classes"]
    of_a_class = list(next(iter(block.class_configs.values())).model_dump())
    assert of_a_class[-5:] == ["token_loss", "dft", "focal", "eaft", "allow_empty"]


@pytest.mark.parametrize(
    ("text", "path", "words"),
    [
        ("dwl: {classes: {}}", "dwl", "loss: dwl"),
        ("dft: {exponent: 1}", "dft", "loss: dft"),
        ("loss: dwl", "dwl", "needs a `dwl` block"),
        ("loss: dlw\ndwl: {}", "loss", "write `loss: dwl`"),
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
        ("loss: dwl\ndwl: {classes: {a: {any: [{regex: a}, {regx: b}]}}}", "dwl.classes.a.any[1]", "write `- {regex: b}`"),
        ("loss: dwl\ndwl: {classes: {a: {any: [{regex: a}, {regex: (}]}}}", "dwl.classes.a.any[1].regex", "compile"),
        ("loss: dwl\ndwl: {classes: {a: {any: [{regex: a, token_loss: dft}]}}}", "dwl.classes.a.any[0].token_loss", "unknown key"),
        ("loss: dwl\ndwl: {classes: {a: {not: {all: [{regex: a, group: 1}]}}}}", "dwl.classes.a.not.all[0].group", "0 group"),
        ("loss: dwl\ndwl: {classes: {a: {not: [{regex: a}]}}}", "dwl.classes.a.not", "a mapping with one selector"),
        ("loss: dwl\ndwl: {classes: {a: {all: {regex: a}}}}", "dwl.classes.a.all", "a list of selectors"),
        ("loss: dwl\ndwl: {classes: {a: {any: []}}}", "dwl.classes.a.any", "at least 1"),
        ("loss: dwl\ndwl: {classes: {a: {any: [{regex: a}], not: {regex: b}}}}", "dwl.classes.a", "any and not"),
        ("loss: dwl\ndwl: {classes: {a: {any: [{yes: a}]}}}", "dwl.classes.a.any[0]", "booleans"),
        ("loss: dwl\ndwl: {classes: {a: {turn: lst}}}", "dwl.classes.a.turn", "`first`, `last`"),
        ("loss: dwl\ndwl: {classes: {a: {turn: 0}}}", "dwl.classes.a.turn", "1 for the first"),
        ("loss: dwl\ndwl: {classes: {a: {position: {}}}}", "dwl.classes.a.position", "`first`, `last`"),
        ("loss: dwl\ndwl: {classes: {a: {position: {frist: 3}}}}", "dwl.classes.a.position.frist", "did you mean `first`"),
        ("loss: dwl\ndwl: {classes: {a: {position: {last: 0}}}}", "dwl.classes.a.position.last", "greater than"),
        ("loss: dwl\ndwl: {classes: {a: {role: asistant}}}", "dwl.classes.a.role", "write `role: assistant`"),
        ("loss: dwl\ndwl: {classes: {a: {special: no}}}", "dwl.classes.a.special", "use `not`"),
        ("loss: dwl\ndwl: {classes: {a: {words: [no]}}}", "dwl.classes.a.words[0]", "quotes"),
        ("loss: dwl\ndwl: {classes: {a: {words: ['+x']}}}", "dwl.classes.a.words[0]", "use `regex`"),
        ("loss: dwl\ndwl: {classes: {}}", "dwl.classes", "no class in it"),
        ("loss: dwl\ndft: {exponent: 0.5}\ndwl: {}", "dft", "no token pays dft"),
        ("loss: nll\ndwl: {classes: {}, alpha: {rest: 1}}", "dwl.alpha", "loss: dwl"),
        ("loss: nll\ndwl: {schedule: {type: linear, to: {rest: 1}}}", "dwl.schedule", "loss: dwl"),
        ("loss: nll\ndwl: {reduction: class_mean}", "dwl.reduction", "loss: dwl"),
        ("loss: nll\ndwl: {focal: {gamma: 1}}", "dwl.focal", "loss: dwl"),
        ("loss: dft\ndwl: {classes: {a: {regex: a, eaft: {top_k: 5}}}}", "dwl.classes.a.eaft", "loss: dwl"),
        ("loss: dwl\ndwl: {focal: {gamma: 1}}", "dwl.focal", "no token pays focal"),
        ("loss: dwl\ndwl: {token_loss: focal, classes: {a: {regex: a, eaft: {}}}}", "dwl.classes.a.eaft", "pays focal"),
        ("loss: dwl\ndwl: {token_loss: focal, focal: {gamma: -1}}", "dwl.focal.gamma", "greater than or equal to 0"),
        ("loss: dwl\ndwl: {token_loss: eaft, eaft: {top_k: 1}}", "dwl.eaft.top_k", "greater than or equal to 2"),
        ("loss: dft\ndft: {threshold: 0}", "dft.threshold", "greater than 0"),
        ("loss: dwl\ndwl: {token_loss: gft}", "dwl.token_loss", "`dft: {threshold: 0.7}`"),
        ("loss: dwl\ndwl: {overlap: summ}", "dwl.overlap", "write `overlap: sum`"),
        ("loss: dft\ndft: {exponent: -1}", "dft.exponent", "greater than or equal to 0"),
        ("loss: dft\ndft: {min_weigth: 0}", "dft.min_weigth", "did you mean `min_weight`"),
        ("loss: dwl\ndwl: {schedule: {type: linear, to: {rest: 1}, start: 50%, end: 10%}}", "dwl.schedule.end", "after"),
        ("loss: dwl\ndwl: {schedule: {type: linear, to: {rest: 1}, end: 120%}}", "dwl.schedule.end", "100%"),
        ("loss: dwl\ndwl: {schedule: {type: linear, to: {rest: 1}, end: soon}}", "dwl.schedule.end", "2ep"),
        ("loss: dwl\ndwl: {schedule: {to: {rest: 1}}}", "dwl.schedule.type", "cosine"),
        ("loss: dwl\ndwl: {alpha: {rest: .inf}}", "dwl.alpha.rest", "finite"),
    ],
)
def test_bad_input_names_the_place_and_the_way_out(text: str, path: str, words: str) -> None:
    found = problems_of(text)
    assert words in found[path]
    assert len(found) == 1


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 300)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["nll", "dft", "dwl", "10%", "2ep", "linear", "keyframes", "cyclic", r"\d+", "(", "100-199", "rest"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "classes",
                    "alpha",
                    "schedule",
                    "reduction",
                    "token_loss",
                    "dft",
                    "exponent",
                    "min_weight",
                    "regex",
                    "group",
                    "token_ids",
                    "tokens",
                    "token_regex",
                    "between",
                    "type",
                    "to",
                    "start",
                    "end",
                    "rest",
                    "a",
                    "overlap",
                    "any",
                    "all",
                    "not",
                    "turn",
                    "position",
                    "first",
                    "last",
                    "role",
                    "special",
                    "added",
                    "words",
                    "at",
                    "period",
                    "hold",
                    "final",
                    5,
                ]
            )
            | st.text(max_size=4)
            | st.booleans(),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.fixed_dictionaries({"loss": JUNK | st.sampled_from(["nll", "dft", "dwl"])}, optional={"dft": JUNK, "dwl": JUNK}))
def test_any_mapping_gives_a_block_that_round_trips_or_our_own_error(raw: dict[str, Any]) -> None:
    try:
        block = parse(raw)
    except ConfigError as error:
        paths = [problem.path for problem in error.problems]
        if not paths or not all(paths):
            pytest.fail(f"an error without a place: {error}")
    else:
        assert block is None or parse(block.dump()) == block


def test_selectors_are_not_nested_without_end() -> None:
    selector: dict[str, Any] = {"regex": "a"}
    for _ in range(500):
        selector = {"not": selector}
    with pytest.raises(ConfigError) as caught:
        parse({"loss": "dwl", "dwl": {"classes": {"a": selector}}})
    assert "deep" in str(caught.value)


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("yes", "write it without quotes: `data_weights: true`"),
        ("weight", "for example `data_weights: {row: weight}`"),
        ([], "is `true`, or a mapping to the names of fields in the data"),
        ({}, "names no field of the data"),
        ({"row": None}, "names no field of the data"),
        ({"row": 3}, "YAML read this as a number"),
        ({"rows": "weight"}, "did you mean `row`?"),
    ],
)
def test_data_weights_that_say_nothing_that_can_be_looked_up(written: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"loss": "dwl", "dwl": {"data_weights": written}})
    (problem,) = caught.value.problems
    assert problem.path.startswith("dwl.data_weights")
    assert said in str(problem)


@pytest.mark.parametrize("loss", ["nll", "dft", "dwl"])
def test_data_weights_are_of_use_under_every_loss(loss: str) -> None:
    usual = {"row": "weight", "message": "weight", "part": "weight", "token": "token_weight"}
    for written, names, negative in (
        (True, usual, False),
        ({"allow_negative": True}, usual, True),
        ({"token": "w"}, {"token": "w"}, False),
    ):
        block = parse({"loss": loss, "dwl": {"data_weights": written}})
        assert block is not None
        assert block.data_weights is not None
        assert (block.data_weights.names, block.data_weights.allow_negative) == (names, negative)
        assert parse(block.dump()) == block


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"marked": ["a", "b"]}, "for several write `any: [{marked: a}, {marked: b}]`"),
        ({"marked": True}, "put it in quotes"),
        ({"marked": 2.5}, "put it in quotes"),
        ({"mark": "a"}, "write `c: {marked: a}`"),
        ({"dataset": 1}, "put it in quotes"),
        ({"datasets": "a"}, "write `c: {dataset: a}`"),
    ],
)
def test_marks_and_data_sets_that_are_no_names(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"loss": "dwl", "dwl": {"classes": {"c": spec}}})
    assert said in str(caught.value)
