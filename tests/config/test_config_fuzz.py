"""Thousands of blocks nobody would write: each is a config, or our own error that says where."""

from __future__ import annotations

import datetime
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from dwl_plugin.config import Block, parse, read_block
from dwl_plugin.errors import ConfigError

NAMES = ["number", "reasoning", "final", "rest", "a-b", "yes"]
PATTERNS = [r"\d+", r"####\s*(.+)$", "(", "(?P<x>a)(b)", "", "[", r"\p{Lu}+", "a" * 200]


def sometimes(values: st.SearchStrategy[Any], *others: Any) -> st.SearchStrategy[Any]:
    """Mostly one of `values`."""
    return st.one_of(values, values, values, st.sampled_from(others))


WEIGHT = sometimes(st.floats(0, 10) | st.integers(0, 5), -1, True, "1e-4", None, 10**400, float("nan"), float("inf"), [1])
POSITION = sometimes(st.sampled_from([0, 10, 200, "10%", "90%", "100%", "2ep", "0.5ep", "50 %"]), 0.1, "soon", -3, "120%", True)
DFT = st.fixed_dictionaries(
    {},
    optional={
        "exponent": WEIGHT,
        "min_weight": WEIGHT,
        "exponnent": WEIGHT,
        "anchor": WEIGHT,
        "schedule": st.sampled_from(
            [
                None,
                {"type": "linear", "to": {"exponent": 0.5}},
                {"type": "step", "at": "5ep", "to": {"exponent": -1}},
                {"type": "keyframes", "at": {3: {"exponent": 1}, True: {}}},
                {"type": "linear"},
                "linear",
            ]
        ),
    },
)
SELECTORS: dict[str, st.SearchStrategy[Any]] = {
    "token_ids": st.lists(sometimes(st.integers(0, 399), "3-9", "9-3", -1, 1.5, None, 10**30), max_size=4),
    "tokens": st.lists(sometimes(st.sampled_from(["<|im_end|>", "a"]), "", None, False, 7), max_size=3),
    "token_regex": st.sampled_from(PATTERNS),
    "regex": sometimes(st.sampled_from(PATTERNS), None, 12, True, ["a"]),
    "between": sometimes(st.sampled_from([["<think>", "</think>"], ["<b>", "</b>"]]), ["<b>"], "<b>", [1, 2], None),
    "turn": st.sampled_from(["last", "first", 0, -1, 1.5]),
    "position": st.dictionaries(st.sampled_from(["first", "last", "mid"]), st.integers(-1, 40), max_size=2),
    "pack": st.sampled_from(["reasoning", "tool_call.arguments", "no such pack", "./no.yml", "./" + "x" * 400, 3]),
    "words": st.lists(sometimes(st.sampled_from(["so", "café", "3rd"]), "", "!", None, True, 2), max_size=3),
    "role": st.sampled_from(["user", "assistant", "narrator", None, 1]),
    "special": st.sampled_from([True, False, "yes"]),
    "added": st.sampled_from([True, None]),
}
LEAF = st.one_of(*(st.fixed_dictionaries({key: values}) for key, values in SELECTORS.items()))
NESTED = st.recursive(
    LEAF,
    lambda inner: (
        st.fixed_dictionaries({"any": st.lists(inner, max_size=3)})
        | st.fixed_dictionaries({"all": st.lists(inner, max_size=3)})
        | st.fixed_dictionaries({"not": inner})
    ),
    max_leaves=6,
)
SELECTORS |= {
    "any": st.lists(NESTED, max_size=3) | st.none(),
    "all": st.lists(NESTED, max_size=3) | st.just("x"),
    "not": NESTED | st.just([]),
}
FOCAL = st.fixed_dictionaries({}, optional={"gamma": WEIGHT, "gama": WEIGHT})
EAFT = st.fixed_dictionaries({}, optional={"k": sometimes(st.integers(1, 50), 0, 1, "many"), "top": WEIGHT})


@st.composite
def a_class(draw: Callable[..., Any]) -> Any:
    kinds = draw(st.lists(st.sampled_from(sorted(SELECTORS)), min_size=1, max_size=1) | st.just([]) | st.just(["regex", "tokens"]))
    spec = {kind: draw(SELECTORS[kind]) for kind in kinds}
    options = st.fixed_dictionaries(
        {},
        optional={
            "token_loss": st.sampled_from(["nll", "dft", "focal", "eaft", "mse"]),
            "dft": DFT,
            "focal": FOCAL,
            "eaft": EAFT,
            "allow_empty": sometimes(st.booleans(), "no"),
            "group": sometimes(st.integers(0, 2), "x", None),
            "include_delimiters": st.booleans(),
            "weight": WEIGHT,
        },
    )
    return {**spec, **draw(st.one_of(st.just({}), st.just({}), options))}


ALPHA = st.dictionaries(sometimes(st.sampled_from(NAMES), 1, True, "x"), WEIGHT, max_size=5)


Values = st.SearchStrategy[Any]


def schedule(kind: str, **options: Values) -> Callable[[Values], Values]:
    """Of this type, to the vector that it is given."""
    return lambda moved: st.fixed_dictionaries({"type": st.just(kind), "to": moved, **options})


SCHEDULES: list[Callable[[Values], Values]] = [
    lambda moved: st.none(),
    lambda moved: st.sampled_from(["linear", {"type": "constant"}, {"type": "?"}, []]),
    lambda moved: st.fixed_dictionaries({"to": moved}),
    *(schedule(kind, start=st.just("10%"), end=st.just("90%")) for kind in ("linear", "cosine", "exponential", "sigmoid")),
    *(schedule(kind, start=POSITION, end=POSITION) for kind in ("linear", "sigmoid")),
    schedule("exponential", rate=WEIGHT),
    schedule("sigmoid", steepness=WEIGHT),
    schedule("step", at=POSITION),
    schedule("cyclic", period=POSITION),
    schedule("warmup", hold=POSITION, decay=POSITION, final=ALPHA | st.none()),
    lambda moved: st.fixed_dictionaries(
        {
            "type": st.just("keyframes"),
            "at": st.dictionaries(POSITION | st.sampled_from([-1, 2**70, 1.5, None, "2ep"]), moved | ALPHA, max_size=2),
        }
    ),
    lambda moved: schedule("linear")(ALPHA),
]
OTHERS: dict[str, Values] = {
    "token_loss": st.sampled_from(["nll", "dft", "focal", "eaft"]),
    "overlap": st.sampled_from(["first", "sum", "last"]),
    "clases": st.just({}),
    "focal": FOCAL,
    "eaft": EAFT,
    "pack": st.sampled_from(["reasoning", "tool_call", ["code"], 3, None]),
    "controller": st.sampled_from([None, "group_dro", []])
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["softmax_loss", "dwa", "softadapt", "group_dro", "doremi", "rlw", "?", None])},
        optional={
            "every": sometimes(st.integers(1, 50), 0, "1ep", 2**70),
            "warmup": POSITION,
            "min_alpha": WEIGHT,
            "max_change": WEIGHT,
            "ema": WEIGHT,
            "signal": st.sampled_from(["raw", "ratio_to_init", "excess_over_ref"]),
            "eta": WEIGHT,
            "reference": ALPHA | st.sampled_from([None, "base", "best"]),
            "temperature": WEIGHT,
            "seed": WEIGHT,
        },
    )
    | st.sampled_from([{"type": kind} for kind in ("softmax_loss", "dwa", "softadapt", "group_dro", "rlw")]),
}


@st.composite
def a_block(draw: Callable[..., Any]) -> dict[str, Any]:
    """A block that hangs together, then up to three mistakes anywhere in it."""
    names = draw(st.lists(st.sampled_from(NAMES[:3]), unique=True, max_size=3))
    whole = {name: draw(st.floats(0.01, 10)) for name in [*names, "rest"]}
    moved = {name: draw(st.floats(0.01, 10)) for name in whole}
    regexes = {name: {"regex": rf"{index}\d+"} for index, name in enumerate(names)}
    dwl: dict[str, Any] = {
        "classes": draw(st.just(regexes) | st.dictionaries(sometimes(st.sampled_from(NAMES), 1, False), a_class(), max_size=3)),
        "reduction": draw(st.sampled_from(["token_mean", "weighted_mean", "class_mean", "class_maen"])),
        "alpha": draw(st.just(whole) | st.just(whole) | ALPHA | st.none()),
        "schedule": draw(draw(st.sampled_from(SCHEDULES))(st.just(moved))),
    }
    for key in draw(st.lists(st.sampled_from(sorted(OTHERS)), max_size=2)):
        dwl[key] = draw(OTHERS[key])
        if key == "controller" and dwl[key] is not None:
            dwl["schedule"] = None
    block: dict[str, Any] = {"loss": draw(sometimes(st.just("dwl"), "nll", "dft", "dlw", None, 3, ["dwl"])), "dwl": dwl}
    block |= draw(st.fixed_dictionaries({}, optional={"dft": DFT | st.sampled_from([None, 1, []])}))
    for seed in draw(st.lists(st.integers(0, 10**6), max_size=3)):
        key = random.Random(seed).choice(list(block))
        block[key] = mistaken(block[key], random.Random(seed))
    return block


ROUND: list[Any] = []
ROUND.append({"classes": ROUND})
DEEP: Any = []
for _ in range(2000):
    DEEP = [DEEP]
MANY: Any = ["x"] * 10
for _ in range(7):
    MANY = [MANY] * 10

JUNK = [
    None,
    True,
    False,
    0,
    -1,
    10**400,
    -(10**400),
    0.1,
    float("nan"),
    float("-inf"),
    "",
    "x",
    "\x00",
    "\ud800",
    "1e999",
    "é" * 300,
    [],
    {},
    [[]],
    {"": None},
    {None: 1},
    {1: {2: 3}},
    datetime.date(2026, 1, 1),
    b"bytes",
    (1, 2),
    {"type": {}},
    10**5000,
    {10**5000: 1},
    {"\udfff": 1},
    {datetime.date(2026, 1, 1): 1},
    datetime.datetime(2026, 1, 1),
    {"x"},
    ROUND,
    DEEP,
    "９",
    "1\u0663%",
    "\u202e%",
    "5" * 400 + "ep",
    "\n",
    {True: 1, "on": 2},
]


def mistaken(node: Any, random: random.Random) -> Any:
    """A copy with one place changed: a value that is something else, a key that is missing, another that is new."""
    if isinstance(node, dict) and node and random.random() < 0.8:
        key = random.choice(list(node))
        kind = random.random()
        if kind < 0.15:
            return {other: value for other, value in node.items() if other != key}
        if kind < 0.3:
            return {**node, random.choice([1, True, "rest", "x", None, 1.5, ("a",)]): random.choice(JUNK)}
        return {**node, key: mistaken(node[key], random)}
    if isinstance(node, list) and node and random.random() < 0.7:
        at = random.randrange(len(node))
        return [mistaken(value, random) if index == at else value for index, value in enumerate(node)]
    return random.choice(JUNK)


outcomes: list[bool] = []


def error_of(work: Callable[[], Any]) -> ConfigError | None:
    """Anything but a `ConfigError` goes through, and fails the test."""
    try:
        work()
    except ConfigError as error:
        return error
    return None


def check(raw: dict[str, Any]) -> None:
    error = error_of(lambda: parse(raw))
    outcomes.append(error is None)
    if error is None:
        block = parse(raw)
        assert block is None or parse(block.dump()) == block
        return
    assert error.problems
    assert str(error).encode()  # can be printed
    for problem in error.problems:
        assert problem.path.split(".")[0].split("[")[0] in Block.model_fields, str(error)


QUIET = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink])


@settings(QUIET, max_examples=60)
@given(a_block())
def test_a_block_is_a_config_or_our_error_with_a_path(raw: dict[str, Any]) -> None:
    check(raw)


@pytest.mark.slow
def test_two_thousand_blocks_are_configs_or_our_errors_with_paths() -> None:
    outcomes.clear()
    settings(QUIET, max_examples=2000)(given(a_block())(check))()
    print(f"{len(outcomes)} blocks: {sum(outcomes)} configs, {len(outcomes) - sum(outcomes)} errors")
    assert len(outcomes) >= 2000
    assert 0.05 < sum(outcomes) / len(outcomes) < 0.8  # both kinds are tried


SNIPPETS = [
    "on: 1",
    "yes: no",
    "2026-02-30",
    "2026-01-01: 1",
    "&a [*a]",
    "&a {b: *a}",
    "*nowhere",
    "<<: *x",
    "<<: [1]",
    "? [a, b]\n: c",
    "9" * 5000,
    "0x" + "f" * 5000,
    "12:30:45",
    "1_000",
    "0o17",
    ".nan: .inf",
    "!!binary YQ==",
    "!!binary é",
    "!!set {a, b}",
    "!!int x",
    "!!bool x",
    "!!float x",
    "!!python/object:os.system x",
    "[" * 1500,
    "{a: " * 500,
    '"\\ud800"',
    '"\\uD83D\\uDE00": x',
    "\t- x",
    "--- {}",
    "%YAML 9.9",
    "#",
    "'",
    "| x",
    "~: ~",
    "\x07",
    "\u0085",
    "\ufeff",
    ": :",
    "- -",
    "!",
    "!!omap [a: 1, a: 2]",
    "!!timestamp x",
    "=: =",
    "&x &y z",
]


@st.composite
def a_text(draw: Callable[..., Any]) -> str:
    """A block as YAML, with snippets put into it: in place of a value, as a line, or anywhere."""
    names = ["number", "rest"]
    block = {
        "loss": "dwl",
        "dwl": {
            "classes": {"number": {"regex": r"\d+"}},
            "alpha": dict.fromkeys(names, 1),
            "schedule": {"type": "linear", "to": dict.fromkeys(names, 2), "start": 3},
        },
    }
    text = yaml.safe_dump(block, sort_keys=False)
    for snippet in draw(st.lists(st.sampled_from(SNIPPETS), min_size=1, max_size=2)):
        lines = text.splitlines(keepends=True)
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(": ")
        how = draw(st.sampled_from(["value", "line", "anywhere"]))
        if how == "value" and colon:
            lines[at] = f"{key}: {snippet}\n"
        elif how == "anywhere":
            cut = draw(st.integers(0, len(lines[at])))
            lines[at] = lines[at][:cut] + snippet + lines[at][cut:]
        else:
            lines.insert(at, f"{' ' * (len(key) - len(key.lstrip()))}{snippet}\n")
        text = "".join(lines)
    return text


@settings(QUIET, max_examples=80)
@given(a_text())
def test_a_file_is_a_config_or_our_error(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yml")
        path.write_text(text, encoding="utf-8")
        error = error_of(lambda: read_block(path))
    assert error is None or str(error).encode()


def test_what_has_no_end_is_refused_before_it_is_walked() -> None:
    for junk in (ROUND, DEEP, MANY):
        error = error_of(lambda junk=junk: parse({"loss": "dwl", "dwl": {"classes": junk}}))  # type: ignore[misc]
        assert error is not None
        (problem,) = error.problems
        assert problem.path == "dwl"


HOST_OPTIONS: list[dict[str, Any]] = [
    {},
    {"sample_packing": True, "pad_to_sequence_len": True},
    {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True},
    {"val_set_size": 0.1, "eval_steps": 5},
    {"gradient_checkpointing": True, "gradient_accumulation_steps": 4},
    {"loss_watchdog_threshold": 5.0, "loss_watchdog_patience": 3},
    {"neftune_noise_alpha": 5},
]


def has_thousands_of_digits(block: dict[str, Any]) -> bool:
    try:
        return not repr(block)
    except ValueError:
        return True


def loads(configs: int, tmp_path: Path) -> tuple[int, int]:
    """(valid, refused) of so many whole configs through the host's own loader."""
    from axolotl.cli.config import load_cfg
    from axolotl.utils.dict import DictDefault

    from dwl_plugin.hosts.axolotl_args import block_of
    from tests.hosts import harness

    harness.make_tokenizer(tmp_path)
    harness.make_model(tmp_path)
    data = harness.write_rows(tmp_path / "rows.jsonl", harness.rows(4))
    blocks: list[dict[str, Any]] = []

    @settings(QUIET, max_examples=configs + configs // 4, phases=[Phase.generate])
    @given(a_block())
    def collect(block: dict[str, Any]) -> None:
        """But what the host cannot copy or write down itself: lists without end, numbers of thousands of digits."""
        error = error_of(lambda: parse(block))
        if error is None or ("nested more than" not in str(error) and not has_thousands_of_digits(block)):
            blocks.append(block)

    collect()
    valid = refused = 0
    for index, block in enumerate(blocks[:configs]):
        options = HOST_OPTIONS[index % len(HOST_OPTIONS)]
        whole = DictDefault(harness.config(tmp_path, data, tmp_path / "out", **{**options, **block}))
        loaded: list[Any] = []
        error = error_of(lambda whole=whole, loaded=loaded: loaded.append(load_cfg(whole)))  # type: ignore[misc]
        if error is None:
            valid += 1
            assert block_of(loaded[0]) == parse(block)
        else:
            refused += 1
            assert error.problems
            assert all(problem.path for problem in error.problems)
    return valid, refused


@pytest.mark.filterwarnings("ignore")
def test_a_whole_config_loads_or_is_refused_by_us(tmp_path: Path) -> None:
    assert sum(loads(15, tmp_path)) >= 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_whole_configs_load_or_are_refused_by_us(tmp_path: Path) -> None:
    valid, refused = loads(120, tmp_path)
    print(f"{valid} configs, {refused} errors")
    assert valid + refused >= 100
    assert valid >= 10
    assert refused >= 10
