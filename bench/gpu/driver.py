"""Runs the stages one after the other, each in a process of its own and within its time.

    bench/gpu/run                                      # all of them, in nine minutes at most
    bench/gpu/run --stages plans peers --seconds 150   # some of them
    bench/gpu/run --toy                                # on the CPU at toy sizes: does every stage start?

A stage that fails does not stop the next; the exit status is 1 if one did. The console gets the last lines of each stage. In the
output folder, `results.jsonl` has every row of every table, `logs.tar.gz` all that was printed. OUT, STAGES and KIT_SECONDS in the
environment are the defaults of --out, --stages and --seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

NOISE = re.compile(r"[Ww]arning|warnings\.warn|^\s*$|it/s\]|s/it\]|^[WI]\d{4} |^USDT:")
WIDTH = 150
PACKING = 8
"""Seconds that `train` leaves at the end, for its table and for what comes after it."""


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: int
    lines: int
    """How many of its last lines the console gets."""
    module: str = ""
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", self.module or f"bench.gpu.{self.name}", *self.arguments]


STAGES = (  # what is right first, beside the imports of `train`; then what is fast; last what only explains it
    Stage("versions", 45, 7),
    Stage("tests", 75, 8, "pytest", ("-n", "0", "-q", "-p", "no:cacheprovider", "tests/gpu")),
    Stage("errors", 50, 12),
    Stage("waits", 50, 19),
    Stage("cards", 25, 8),
    Stage("peers", 110, 60),
    Stage("train", 0, 30),  # what is left of the time
    Stage("profile", 30, 21, "bench.gpu.profile_call"),
    Stage("kernels", 40, 24),
    Stage("plans", 45, 27),
    Stage("fake", 30, 18, "bench.gpu.fake_cuda"),
)


class Run:
    """The stages of one call: where they write, and until when."""

    def __init__(self, out: Path, seconds: float, toy: bool) -> None:
        self.out, self.until, self.toy = out, time.monotonic() + seconds, toy
        self.logs: list[Path] = []
        self.failed: list[str] = []
        self.environment = {
            **os.environ,
            "OUT": str(out),
            "AXOLOTL_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_DISABLED": "true",
            **({"CUDA_VISIBLE_DEVICES": "", "TOY": "1"} if toy else {}),
        }

    @property
    def left(self) -> float:
        return self.until - time.monotonic()

    def start(self, stage: Stage, *more: str) -> subprocess.Popen[bytes]:
        log = self.out / f"{stage.name}.log"
        self.logs.append(log)
        with log.open("wb") as file:
            # A session of its own, so that its whole family can be ended.
            return subprocess.Popen(
                [*stage.command, *more], stdout=file, stderr=subprocess.STDOUT, env=self.environment, start_new_session=True
            )

    def finish(self, stage: Stage, process: subprocess.Popen[bytes]) -> None:
        """Wait for it, but no longer than it may take; then its last lines. A toy has all the time there is."""
        began = time.monotonic()
        seconds = self.left if self.toy else min(stage.seconds or self.left, self.left)
        print(f"=== {stage.name} (up to {max(seconds, 0):.0f} s)", flush=True)
        try:
            status = process.wait(max(seconds, 0))
            ended = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            ended = "was out of time"
        with contextlib.suppress(ProcessLookupError):  # what it left behind, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        text = (self.out / f"{stage.name}.log").read_text(errors="replace")
        for line in [line for line in text.splitlines() if not NOISE.search(line)][-stage.lines :]:
            print(line[:WIDTH])
        if ended:
            self.failed.append(stage.name)
            print(f"--- {stage.name} {ended}")
        print(f"    {time.monotonic() - began:.0f} s", flush=True)

    def pack(self) -> None:
        """One archive of all that was printed."""
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as archive:
            for log in sorted({*self.logs, *self.out.glob("train-*.log")}):
                archive.add(log, log.name)
                log.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        prog="bench/gpu/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT") or "gpu-out", help="folder of the results (gpu-out)")
    parser.add_argument("--stages", nargs="+", choices=names, default=(os.environ.get("STAGES") or " ".join(names)).split())
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("KIT_SECONDS") or 525), help="of all stages (525)")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, as on a machine without a GPU")
    options = parser.parse_args(arguments)
    unknown = set(options.stages) - set(names)
    if unknown:
        parser.error(f"no stage {' '.join(sorted(unknown))}; there are: {' '.join(names)}")

    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").unlink(missing_ok=True)
    go = out / ".go"
    go.unlink(missing_ok=True)
    run = Run(out, options.seconds, options.toy)
    began = time.monotonic()
    wanted = [stage for stage in STAGES if stage.name in options.stages]
    # Training imports and reads its data while the other stages run, and touches the device only afterwards. A toy times nothing.
    if options.toy:
        go.touch()
    trainings = {
        stage.name: run.start(stage, "--go", str(go), "--until", str(run.until - PACKING))
        for stage in wanted
        if stage.name == "train"
    }
    for stage in wanted:
        if stage.name in trainings:
            go.touch()
            run.finish(stage, trainings[stage.name])
        elif run.left < 5:
            print(f"=== {stage.name}: no time left")
            run.failed.append(stage.name)
        else:
            run.finish(stage, run.start(stage))
    go.unlink(missing_ok=True)
    run.pack()
    print(f"=== done after {time.monotonic() - began:.0f} s, {out}/results.jsonl and logs.tar.gz have everything")
    if run.failed:
        print("failed:", ", ".join(run.failed))
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
