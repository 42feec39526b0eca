"""The yardstick of the experiments: rows, measures and tables, against hand-made cases."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.experiments import data, run, tables
from bench.experiments.arms import ARMS, EXPERIMENTS, HALF_WAY, LRS, SEEDS, UNKNOWN_END, Experiment
from bench.experiments.data import Row, divided
from bench.experiments.measure import Bench, is_accepted, spans
from bench.experiments.train import TEMPLATE
from dwl_plugin.config import parse
from tests.hosts.harness import make_model, make_tokenizer

CALL = Row(
    "call",
    "Function area(base: integer, unit?: string): Area.\n\nBase of 10?",
    '<tool_call>\n{"name": "area", "arguments": {"base": 10, "of": {"a": "}"}}}\n</tool_call>',
    "area",
    {"base": [10], "unit": ["cm", ""], "of": [{"a": ["}"]}]},
)
MATHS = Row("maths", "How many?", "Add 1,000 and 2 = 1,002 apples.\n#### 1,002", "How many?")


# Rows


def problem(name: str) -> Row:
    return Row("maths", name, f"It is 1.\n#### {name}", name)


def some_splits(**changes: Any) -> data.Splits:
    calls = [Row("call", f"q{i}", "r", f"function{i % 10}", {}) for i in range(40)]
    learn, held_out = [problem(f"a{i}") for i in range(20)], [problem(f"b{i}") for i in range(10)]
    return divided(**{"calls": calls, "learn": learn, "held_out": held_out, "seed": 0, "tuning_problems": 5, **changes})


def test_a_function_and_a_problem_are_in_one_split() -> None:
    cut = some_splits()
    assert [len({row.group for row in rows if row.kind == "call"}) for rows in (cut.test, cut.tune, cut.train)] == [3, 2, 5]
    assert [sum(row.kind == "maths" for row in rows) for rows in (cut.test, cut.tune, cut.train)] == [10, 5, 15]
    assert len(cut.train) + len(cut.tune) + len(cut.test) == 70
    with pytest.raises(AssertionError, match=r"train and test share \['b3'\]"):
        some_splits(learn=[*(problem(f"a{i}") for i in range(20)), problem("b3")], tuning_problems=0)


def test_a_wheel_is_read_as_its_authors_mean_it(monkeypatch: pytest.MonkeyPatch) -> None:
    function = {
        "name": "area",
        "description": "Area. ",
        "parameters": {"properties": {"base": {"type": "integer"}, "unit": {"type": "string"}}, "required": ["base"]},
    }
    question = {"id": "1", "question": [[{"role": "user", "content": "Base of 10?"}]], "function": [function]}
    again = {**question, "id": "4"}  # asked of another function
    third = {**question, "id": "5", "question": [[{"role": "user", "content": "Base of 12?"}]]}
    long = {**question, "id": "2", "question": [[{"role": "user", "content": "?" * 600}]]}
    nested = {**question, "id": "3"}
    answers = [
        {"id": "1", "ground_truth": [{"area": {"base": [10, 10.0], "unit": ["cm", ""]}}]},
        {"id": "2", "ground_truth": [{"area": {"base": [1]}}]},
        {"id": "3", "ground_truth": [{"area": {"base": [{"a": [1]}]}}]},
        {"id": "4", "ground_truth": [{"surface": {"base": [10]}}]},
        {"id": "5", "ground_truth": [{"area": {"base": [12]}}]},
    ]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("bfcl_eval/data/BFCL_v4_one.json", "\n".join(map(json.dumps, [question, long, nested, again, third])))
        wheel.writestr("bfcl_eval/data/possible_answer/BFCL_v4_one.json", "\n".join(map(json.dumps, answers)))
    monkeypatch.setattr(data, "CALLS_OF", ("one",))
    monkeypatch.setattr(data, "CALLS_OF_A_FUNCTION", 1)
    (row,) = data._calls(zipfile.ZipFile(file))
    assert row.question == "Function area(base: integer, unit?: string): Area.\n\nBase of 10?"
    assert row.reply == '<tool_call>\n{"name": "area", "arguments": {"base": 10}}\n</tool_call>'
    assert (row.group, row.accepted) == ("area", {"base": [10, 10.0], "unit": ["cm", ""]})


def test_a_seed_draws_the_same_rows_for_every_arm(tmp_path: Path) -> None:
    cut, budget = some_splits(), run.BUDGETS["cpu"]._replace(trained={"call": 5, "maths": 6})
    drawn = {arm: run.drawn(run.Job(arm, "test", lr, 3), budget, cut.train) for arm, lr in (("sft", 0.1), ("dft", 0.2))}
    assert drawn["sft"] == drawn["dft"] != run.drawn(run.Job("sft", "test", 0.1, 4), budget, cut.train)
    assert sorted(row.kind for row in drawn["sft"]) == ["call"] * 5 + ["maths"] * 6
    weights = {}
    for arm in ("sft", "calls: row weights", "nll x mean p"):
        lines = run.written(drawn["sft"], ARMS[arm], tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert [row["messages"] for row in rows] == [row.messages() for row in drawn["sft"]]
        weights[arm] = {(kind.kind, row.get("weight")) for kind, row in zip(drawn["sft"], rows, strict=True)}
    assert weights == {
        "sft": {("call", None), ("maths", None)},
        "calls: row weights": {("call", 2.5), ("maths", 0.5)},
        "nll x mean p": {("call", 0.6), ("maths", 0.6)},
    }


# Measures


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (CALL, [('<tool_call>\n{"name": "area", "arguments": ', "syntax"), ('{"base": 10, "of": {"a": "}"}}', "arguments")]),
        (MATHS, [("Add ", "words"), ("1,000", "number"), (" and ", "words"), ("2", "number"), (" = ", "words")]),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_characters_have_the_part_that_a_person_would_say(row: Row, parts: list[tuple[str, str]]) -> None:
    of = [next(part for first, last, part in spans(row) if first <= at < last) for at in range(len(row.reply))]
    at = 0
    for text, part in parts:
        assert row.reply[at : at + len(text)] == text
        assert set(of[at : at + len(text)]) == {part}, text
        at += len(text)
    if row is MATHS:
        assert of[-5:] == ["answer"] * 5
        assert set(of[-10:-5]) == {"words"}
    else:
        assert set(of[at:]) == {"syntax"}


def test_a_blank_belongs_to_the_word_that_follows() -> None:
    tokens = ["It", " is", " 12", "\n", "####", " 7"]
    ends = list(itertools.accumulate(map(len, tokens)))
    offsets = list(zip([0, *ends], ends, strict=False))
    bench = object.__new__(Bench)
    bench.tokenizer = lambda text, **_: {"input_ids": list(range(6)), "offset_mapping": offsets}
    row = Row("maths", "", "".join(tokens), "")
    assert bench.reply(row) == ([0, 1, 2, 3, 4, 5], ["words", "words", "number", "words", "words", "answer"])


ACCEPTED = {
    "area(10)": ('<tool_call>\n{"name": "area", "arguments": {"base": 10}}\n</tool_call>', True),
    "without line breaks, a float": ('<tool_call>{"arguments": {"base": 10.0}, "name": "area"}</tool_call>', True),
    "what may be left out": ('<tool_call>\n{"name": "area", "arguments": {"base": 10, "unit": "CM"}}\n</tool_call>', True),
    "a wrong value of it": ('<tool_call>\n{"name": "area", "arguments": {"base": 10, "unit": "m"}}\n</tool_call>', False),
    "another value": ('<tool_call>\n{"name": "area", "arguments": {"base": 11}}\n</tool_call>', False),
    "a string": ('<tool_call>\n{"name": "area", "arguments": {"base": "10"}}\n</tool_call>', False),
    "a bool": ('<tool_call>\n{"name": "area", "arguments": {"base": true}}\n</tool_call>', False),
    "nothing": ('<tool_call>\n{"name": "area", "arguments": {}}\n</tool_call>', False),
    "one too many": ('<tool_call>\n{"name": "area", "arguments": {"base": 10, "height": 1}}\n</tool_call>', False),
    "another function": ('<tool_call>\n{"name": "volume", "arguments": {"base": 10}}\n</tool_call>', False),
    "no JSON": ("<tool_call>\n{name: area}\n</tool_call>", False),
    "no call": ("The area is 10.", False),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_call_is_right_if_its_values_are(name: str) -> None:
    text, right = ACCEPTED[name]
    asked = Row("call", "", "", "area", {"base": [10], "unit": ["cm", ""]})
    assert is_accepted(asked, text) is right


@pytest.mark.parametrize(
    ("text", "right"), [("so\n#### 1002", True), ("#### 1,002", True), ("#### 1002 apples", False), ("1002", False)]
)
def test_a_problem_is_right_if_it_ends_in_the_number(text: str, right: bool) -> None:
    assert is_accepted(MATHS, text) is right


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def bench(model_folder: Path) -> Bench:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    model.get_base_model = lambda: model
    return Bench(model, AutoTokenizer.from_pretrained(model_folder), "<|im_end|>", torch.float32, tokens=200)


def test_measures_are_those_of_one_token_after_another(bench: Bench) -> None:
    rows = [CALL, MATHS, Row("maths", "Short?", "No.\n#### 7", "Short?")]
    nll: dict[str, list[float]] = {}
    for row in rows:
        sequence, (ids, parts) = list(bench.prompt(row)), bench.reply(row)
        for token, part in zip([*ids, bench.end], [*parts, "end"], strict=True):
            p = bench.model(torch.tensor([sequence])).logits[0, -1].double().softmax(-1)[token].item()
            for key in ("", f"/{row.kind}", f"/{row.kind}/{part}", *(["/end"] if part == "end" else [])):
                nll.setdefault(key, []).append(-math.log(p))
            for other in {"arguments", "answer"} - {part}:
                nll.setdefault(f"/without {other}", []).append(-math.log(p))
            sequence.append(token)
    found = bench.replies(rows)
    assert found.keys() == {f"{what}{key}" for what in ("nll", "p") for key in nll} | {"exact/call", "exact/maths"}
    for key, values in nll.items():
        assert found[f"nll{key}"] == pytest.approx(sum(values) / len(values), abs=1e-5), key
        assert found[f"p{key}"] == pytest.approx(sum(map(math.exp, map(float.__neg__, values))) / len(values), abs=1e-5), key


def test_the_ends_of_a_class_and_of_the_rest_make_up_all(bench: Bench) -> None:
    found = bench.replies([CALL, MATHS])
    arguments, targets = bench.reply(CALL)[1].count("arguments"), sum(len(bench.reply(row)[0]) + 1 for row in (CALL, MATHS))
    both = arguments * found["nll/call/arguments"] + (targets - arguments) * found["nll/without arguments"]
    assert both / targets == pytest.approx(found["nll"], abs=1e-9)


def test_exact_replies_are_what_greedy_decoding_writes(bench: Bench) -> None:
    """After the model knows one reply by heart."""
    model = copy.deepcopy(bench.model)
    model.get_base_model = lambda: model
    knows = Bench(model, bench.tokenizer, "<|im_end|>", torch.float32)
    ids = torch.tensor([[*knows.prompt(MATHS), *knows.reply(MATHS)[0], knows.end]])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert knows.decode([CALL, MATHS], 60)[1] == (MATHS.reply, True)
    assert knows.decode([MATHS], len(knows.reply(MATHS)[0])) == [(MATHS.reply, False)], "the end is a token more"
    found = knows.replies([MATHS, CALL, Row("maths", MATHS.question, MATHS.reply + "3", "")])
    assert (found["exact/maths"], found["exact/call"]) == (0.5, 0.0)


def test_plain_text_is_measured_from_its_second_token(bench: Bench) -> None:
    texts = ["What is 2 + 3?", "The answer is 5, as I see it."]
    total = count = 0.0
    for text in texts:
        ids = bench.tokenizer(text, add_special_tokens=False)["input_ids"]
        log_p = bench.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_p[at, token].item() for at, token in enumerate(ids[1:]))
        count += len(ids) - 1
    assert bench.text(texts) == pytest.approx(total / count, abs=1e-5)


# Which runs


TUNED = Experiment(("sft", "dft"), lambda found: found["nll"], baseline="dft")


def measured(job: run.Job, **found: float) -> dict[str, str]:
    return {**{key: str(value) for key, value in job._asdict().items()}, **{key: str(value) for key, value in found.items()}}


def test_an_arm_is_tested_at_the_rate_that_its_tuning_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERIMENTS, "tuned", TUNED)
    tuning = [run.Job(arm, "tune", lr, run.TUNING_SEED) for arm in TUNED.arms for lr in LRS]
    base = run.Job("dft", "test", 0.0, 0)
    assert run.wanted(["tuned"], {}) == [*tuning, base]
    nll = {"sft": (0.3, 0.1, 0.2), "dft": (0.1, 0.2, 0.3)}
    done = {job: measured(job, nll=nll[job.arm][LRS.index(job.lr)]) for job in tuning[:-1]}
    assert run.wanted(["tuned"], done) == [tuning[-1], base, *(run.Job("sft", "test", LRS[1], seed) for seed in SEEDS)]
    done[tuning[-1]] = measured(tuning[-1], nll=0.3)
    chosen = {"sft": LRS[1], "dft": LRS[0]}
    tests = [run.Job(arm, "test", lr, seed) for seed in SEEDS for arm, lr in chosen.items()]
    assert run.wanted(["tuned"], done) == [base, *tests]
    done |= {job: measured(job) for job in [base, *tests[:3]]}
    assert run.wanted(["tuned"], done) == tests[3:]


def test_a_steered_arm_is_tuned_by_what_it_was_asked_for() -> None:
    experiment, arm = EXPERIMENTS["steering"], "arguments 0.95 weighted_mean"
    found = {LRS[0]: (0.9, 0.1), LRS[1]: (0.5, 0.5), LRS[2]: (0.1, 9.0)}
    done = {
        (job := run.Job(arm, "tune", lr, run.TUNING_SEED)): measured(
            job, **{"nll": rest, "nll/call/arguments": arguments, "nll/without arguments": rest}
        )
        for lr, (arguments, rest) in found.items()
    }
    assert run.chosen_lr(experiment, arm, done) == LRS[1]  # 0.86, 0.5, 0.545


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "runs.csv"
    jobs = [run.Job("sft", "test", 0.001, 0), run.Job("end: dft, min_weight 0.1", "tune", 0.01, 1000)]
    for at, job in enumerate(jobs):
        run.append({**job._asdict(), "nll": at + 0.5}, path)
    found = run.finished(path)
    assert list(found) == jobs
    assert [run.measures(row) for row in found.values()] == [{"nll": 0.5}, {"nll": 1.5}]


def test_arms_are_configs_of_ours_and_ask_for_what_they_say() -> None:
    for name, arm in ARMS.items():
        block = parse(run.keys_of(arm, 0))
        assert block is not None, name
        assert block.reads_data is (arm.weights is not None), name
        assert (UNKNOWN_END in json.dumps(arm.keys)) <= (arm.end == UNKNOWN_END), name
    assert sum(HALF_WAY.values()) == pytest.approx(1, abs=1e-3)


def test_a_conversation_reads_as_in_the_models_own_template(model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    messages = [*MATHS.messages(), *CALL.messages()]
    own = tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = TEMPLATE.replace("END", "<|im_end|>")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == own
    tokenizer.chat_template = TEMPLATE.replace("END", UNKNOWN_END)
    replies = [f"{row.reply}<|im_end|>" for row in (MATHS, CALL)]
    for reply in replies:
        assert reply in own
        own = own.replace(reply, reply.replace("<|im_end|>", UNKNOWN_END))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == own


def test_noise_has_the_seed_of_its_run_and_other_arms_no_seed() -> None:
    for name, arm in ARMS.items():
        keys = run.keys_of(arm, 3)
        if name.endswith("rlw"):
            assert keys["dwl"]["controller"].pop("seed") == 3, name
        assert keys == json.loads(json.dumps(arm.keys)), name


# Tables


def test_an_interval_is_students() -> None:
    mean, half = tables.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    assert half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), abs=1e-5)


def test_differences_are_of_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXPERIMENTS, "tuned", TUNED)
    done = {}
    for arm, lr in (("sft", LRS[1]), ("dft", LRS[0])):
        for rate in LRS:
            job = run.Job(arm, "tune", rate, run.TUNING_SEED)
            done[job] = measured(job, nll=float(rate != lr))
    for seed in reversed(SEEDS):  # in another order than the other arm's
        job = run.Job("sft", "test", LRS[1], seed)
        done[job] = measured(job, nll=10.0 * seed + 0.2)
    for seed in SEEDS:
        job = run.Job("dft", "test", LRS[0], seed)
        done[job] = measured(job, nll=10.0 * seed + 0.1 * (seed % 2))
    base = run.untrained(TUNED)
    done[base] = measured(base, nll=7.0)
    twin = done[run.Job("sft", "test", LRS[1], 3)]
    column = tables.nll("", "nll")
    ours, theirs = tables.tests_of(TUNED, "sft", done), tables.tests_of(TUNED, "dft", done)
    assert tables.against(ours[::-1], theirs, done, column.of) == pytest.approx([0.2, 0.1, 0.2, 0.1, 0.2])
    assert tables.table("tuned", done, [column]) == [
        "| | learning rate | nll |",
        "|---|---:|---:|",
        "| before training | | 7.000 |",
        "| `sft` | 0.003 | 20.200 (**+0.160 ± 0.068**) |",
        "| `dft` | 0.001 | 20.040 |",
    ]
    assert tables.table("tuned", done, [column], baseline="sft")[3:] == [
        "| `sft` | 0.003 | 20.200 |",
        "| `dft` | 0.001 | 20.040 (**−0.160 ± 0.068**) |",
    ]
    twin["targets"] = "7"
    with pytest.raises(AssertionError, match="differ in targets"):
        tables.against(ours, theirs, done, column.of)


@pytest.mark.parametrize(("at", "number"), [(0, "12.8"), (1, "81 runs")])
def test_the_pages_are_what_the_results_say(monkeypatch: pytest.MonkeyPatch, at: int, number: str) -> None:
    monkeypatch.setattr("sys.argv", ["tables", "--check"])
    tables.main()
    text = tables.PAGES[at].read_text(encoding="utf-8")
    page = SimpleNamespace(read_text=lambda encoding: text.replace(number, "7"), relative_to=tables.PAGES[at].relative_to)
    monkeypatch.setattr(tables, "PAGES", (page,))
    with pytest.raises(SystemExit, match="is not what"):
        tables.main()
