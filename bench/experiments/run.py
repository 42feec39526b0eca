"""Train and measure every arm of an experiment, or go on where it was interrupted.

    python -m bench.experiments.run rare_class                 # what is missing of it; results go to results/runs.csv
    python -m bench.experiments.run --gsm8k FOLDER             # all experiments; GSM8K from files in place of the Hub
    python -m bench.experiments.run --run sft --lr 0.001 --seed 3      # one run again: prints its measures, writes nothing
    python -m bench.experiments.tables                         # tables and figures of docs/evidence.md from results/runs.csv

A run is a process of its own on one core, as many at once as there are cores; with `--device cuda` there is one at a time.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import multiprocessing
import os
import platform
import queue
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import dwl_plugin
from bench.experiments.arms import ARMS, EXPERIMENTS, SEEDS, Arm, Experiment
from bench.experiments.data import Row

RESULTS = Path(__file__).parent / "results"
TUNING_SEED = 1000
PACKAGES = ("axolotl-dwl", "axolotl", "torch", "transformers", "peft")
PARTS = ("", "/call", "/call/arguments", "/call/syntax", "/call/end")
PARTS += ("/maths", "/maths/answer", "/maths/number", "/maths/words", "/maths/end", "/end", "/without arguments", "/without answer")
MEASURES = (
    *(f"{what}{part}" for what in ("nll", "p") for part in PARTS),
    *("exact/call", "exact/maths", "nll/prose", "accepted/call", "ended/call"),
)
FIELDS = ("arm", "split", "lr", "seed", *MEASURES, "targets", "steps", "seconds", "date", "device", "code", "python", *PACKAGES)


class Job(NamedTuple):
    """One run."""

    arm: str
    split: str
    """`tune` or `test`: which rows it is measured on"""
    lr: float
    seed: int


Done = dict[Job, dict[str, str]]
"""Runs, and what was written of them."""


class Budget(NamedTuple):
    """Rows by kind, and how much is measured."""

    trained: dict[str, int]
    tune: dict[str, int]
    test: dict[str, int]
    prose: int = 12
    decoded: int = 40
    """Calls; the first of the test rows."""
    decoded_tokens: int = 96
    layers: float = 0.5
    """Share of the layers, from the top, that have adapters."""


BUDGETS = {
    # 7,500 tokens, of which 3,700 are targets, in 15 steps: less than a minute on one core, and half of one to measure
    "cpu": Budget({"call": 20, "maths": 40}, {"call": 40, "maths": 32}, {"call": 80, "maths": 48}),
    "cuda": Budget({"call": 160, "maths": 320}, {"call": 40, "maths": 100}, {"call": 100, "maths": 400}, 24, 100, layers=1.0),
}


class Place(NamedTuple):
    """What a run is done with."""

    gsm8k: Path | None
    device: str = "cpu"
    model: str | None = None
    """A folder or a name on the Hub. None: the quickstart's SmolLM2-135M-Instruct."""

    @property
    def results(self) -> Path:
        return RESULTS / f"runs{'' if self.device == 'cpu' else '-' + self.device}.csv"


def drawn(job: Job, budget: Budget, train: Sequence[Row]) -> list[Row]:
    """The rows that a seed trains on, in their order: the same for every arm."""
    rng = random.Random(job.seed)
    rows = [row for kind, count in budget.trained.items() for row in rng.sample([row for row in train if row.kind == kind], count)]
    rng.shuffle(rows)
    return rows


def written(rows: Sequence[Row], arm: Arm, path: Path) -> Path:
    """The rows as a file for Axolotl, with a column `weight` where the arm has one."""

    def line(row: Row) -> str:
        weight = {} if arm.weights is None else {"weight": arm.weights[row.kind]}
        return json.dumps({"messages": row.messages(), **weight}) + "\n"

    path.write_text("".join(map(line, rows)), encoding="utf-8")
    return path


def keys_of(arm: Arm, seed: int) -> dict[str, Any]:
    """The keys of its config; noise has the seed of the run."""
    keys: dict[str, Any] = json.loads(json.dumps(arm.keys))
    controller = keys.get("dwl", {}).get("controller", {})
    if controller.get("type") == "rlw":
        controller["seed"] = seed
    return keys


def execute(job: Job, place: Place) -> dict[str, Any]:
    """Train and measure: a row of the CSV."""
    import torch
    from rich.console import Console

    from bench.experiments.data import pick, splits
    from bench.experiments.measure import Bench, is_accepted
    from bench.experiments.train import axolotl_train, settings
    from dwl_plugin.cli.quickstart.model import prepared_model

    began = time.monotonic()
    arm, budget, cut = ARMS[job.arm], BUDGETS[place.device], splits(place.gsm8k)
    rows = drawn(job, budget, cut.train)
    cpu_has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if place.device == "cuda" or cpu_has_bf16 else torch.float32
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        config = settings(
            place.model or str(prepared_model(Console(quiet=True))),
            written(rows, arm, out / "rows.jsonl"),
            out,
            keys_of(arm, job.seed),
            lr=job.lr,
            seed=job.seed,
            end=arm.end,
            layers=budget.layers,
        )
        trainer, model, tokenizer = axolotl_train(config, dtype)
    assert trainer.state.epoch == 1.0, f"{trainer.state.epoch} of the rows were trained on"
    bench = Bench(model, tokenizer, arm.end, dtype)
    held_out = pick(cut.tune, **budget.tune) if job.split == "tune" else pick(cut.test, **budget.test)
    found: dict[str, Any] = bench.replies(held_out)
    found["nll/prose"] = bench.text(cut.prose[: budget.prose])
    if arm.decodes and job.split == "test":
        calls = [row for row in held_out if row.kind == "call"][: budget.decoded]
        decoded = bench.decode(calls, budget.decoded_tokens)
        found["ended/call"] = sum(ended for _, ended in decoded) / len(calls)
        found["accepted/call"] = sum(is_accepted(row, text) for row, (text, _) in zip(calls, decoded, strict=True)) / len(calls)
    return {
        **job._asdict(),
        **{key: round(value, 6) for key, value in found.items()},
        "targets": sum(len(bench.reply(row)[0]) + 1 for row in rows),
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - began),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if place.device == "cuda" else f"{platform.machine()} {str(dtype).split('.')[1]}",
        "code": code(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def code() -> str:
    """A hash of what a number hangs on: the package, and these files but those that only show results."""
    package, here = Path(dwl_plugin.__file__).parent, Path(__file__).parent
    files = [*sorted(package.rglob("*.py")), *sorted(set(here.glob("*.py")) - {here / "tables.py"})]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _child(job: Job, place: Place, log: str, answer: Any) -> None:
    """A process of its own: whatever a run patches or leaves in memory goes with it."""
    import torch

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if place.device == "cpu":
        torch.set_num_threads(1)
    answer.put(execute(job, place))


def finished(results: Path) -> Done:
    """What a CSV of results holds."""
    if not results.exists():
        return {}
    with results.open(newline="", encoding="utf-8") as file:
        rows = [(Job(row["arm"], row["split"], float(row["lr"]), int(row["seed"])), row) for row in csv.DictReader(file)]
    assert len(rows) == len(dict(rows)), f"{results} has a run twice"
    return dict(rows)


def measures(row: Mapping[str, str]) -> dict[str, float]:
    """What a row of the CSV measured."""
    return {name: float(row[name]) for name in MEASURES if row.get(name)}


def chosen_lr(experiment: Experiment, arm: str, done: Done) -> float | None:
    """The learning rate whose tuning run comes nearest to what is wanted. None: not every rate has run yet."""
    wants = ARMS[arm].wants or experiment.wants
    assert wants is not None
    found = {lr: done.get(Job(arm, "tune", lr, TUNING_SEED)) for lr in experiment.lrs}
    if not all(found.values()):
        return None
    return min(experiment.lrs, key=lambda lr: wants(measures(found[lr] or {})))


def tests_of(experiment: Experiment, arm: str, done: Done) -> list[Job]:
    """The runs of an arm that are reported, as far as they are known."""
    if experiment.wants is None:
        lrs = experiment.lrs
    else:
        lr = chosen_lr(experiment, arm, done)
        lrs = () if lr is None else (lr,)
    return [Job(arm, "test", lr, seed) for lr in lrs for seed in SEEDS]


def untrained(experiment: Experiment) -> Job:
    """What the model was worth before: a learning rate of 0 leaves it as it is."""
    return Job(experiment.baseline, "test", 0.0, 0)


def wanted(names: Iterable[str], done: Done) -> list[Job]:
    """The runs that are missing: tuning first, then every arm with one seed, every arm with the next."""
    tuning, testing = [], []
    for experiment in (EXPERIMENTS[name] for name in names):
        testing.append(untrained(experiment))
        for arm in experiment.arms:
            if experiment.wants is not None:
                tuning += [Job(arm, "tune", lr, TUNING_SEED) for lr in experiment.lrs]
            testing += tests_of(experiment, arm, done)
    ordered = [*tuning, *sorted(testing, key=lambda job: job.seed)]
    return [job for job in dict.fromkeys(ordered) if job not in done]


def append(row: Mapping[str, Any], results: Path) -> None:
    """One line more; a file that is new begins with the names of the fields."""
    new = not results.exists()
    results.parent.mkdir(exist_ok=True)
    with results.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def run_all(names: list[str], place: Place, workers: int) -> None:
    """Until nothing is wanted. A run that fails stops everything: an arm with fewer seeds than another is no comparison."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.experiments.preload"])
    lock, failed = threading.Lock(), threading.Event()
    done, running = finished(place.results), set[Job]()
    logs = Path(tempfile.mkdtemp(prefix="experiments-"))
    print(f"logs of the runs: {logs}", flush=True)

    def work() -> None:
        while not failed.is_set():
            with lock:
                left = [job for job in wanted(names, done) if job not in running]
                if not left and not running:
                    return
                job = left[0] if left else None
                if job:
                    running.add(job)
            if job is None:  # the next ones hang on what the others find
                time.sleep(1)
                continue
            answer, log = context.Queue(), logs / f"{len(done)}-{job.arm}-{job.lr}-{job.seed}.log".replace("/", "_")
            child = context.Process(target=_child, args=(job, place, str(log), answer))
            child.start()
            row = None
            while row is None and (child.is_alive() or not answer.empty()):
                try:
                    row = answer.get(timeout=1)
                except queue.Empty:
                    continue
            child.join()
            with lock:
                running.discard(job)
                if row is None:
                    failed.set()
                    print(f"{job} failed: {log}\n{log.read_text(errors='replace')[-2000:]}", flush=True)
                    return
                append(row, place.results)
                done[job] = {key: str(value) for key, value in row.items()}
                still = len(wanted(names, done))
            log.unlink(missing_ok=True)
            print(
                f"{datetime.datetime.now():%H:%M:%S} {job}: nll {row['nll']:.4f} in {row['seconds']} s; {still} known to be left",
                flush=True,
            )

    threads = [threading.Thread(target=work) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed.is_set():
        sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--gsm8k", type=Path, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", help="a folder or a name on the Hub (default: the quickstart's SmolLM2-135M-Instruct)")
    parser.add_argument("--workers", type=int, help="runs at once (default: cores on a CPU, 1 on a GPU)")
    parser.add_argument("--run", metavar="ARM", choices=list(ARMS), help="only this run; prints it")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("tune", "test"), default="test")
    options = parser.parse_args()
    os.environ.update(AXOLOTL_DO_NOT_TRACK="1", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    place = Place(options.gsm8k and options.gsm8k.resolve(), options.device, options.model)
    if options.run:
        if options.lr is None:
            parser.error("--run needs --lr, --seed and --split as results/runs.csv has them")
        import torch

        torch.set_num_threads(1)
        print(json.dumps(execute(Job(options.run, options.split, options.lr, options.seed), place), indent=1))
        return
    for name in options.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"no experiment {name}; there are: {', '.join(EXPERIMENTS)}")
    workers = options.workers or (1 if options.device == "cuda" else len(os.sched_getaffinity(0)))
    run_all(options.experiments or list(EXPERIMENTS), place, workers)


if __name__ == "__main__":
    main()
