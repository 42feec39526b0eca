"""How often a call waits for the device, the time of the first one, and what is compiled for other numbers of targets.

Exit status 1 if torch compiled a graph, or Triton no kernel: the loss has kernels, and fell back.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections import Counter
from functools import partial
from typing import Any

import torch

from bench.gpu.common import CUDA, DEVICE, TOY, Table, Work, anchor, four_terms, inputs, milliseconds, synchronize
from dwl_plugin import linear_cross_entropy

H, V, MOST = (32, 1009, 200) if TOY else (2048, 151936, 4096)
STEPS = 12 if TOY else 50


def options() -> dict[str, dict[str, Any]]:
    weight = torch.rand(MOST, device=DEVICE)
    return {
        "plain": {},
        "softcap": {"softcap": 30.0},
        "weights": {"token_weight": weight, "exponent": weight, "min_weight": 0.01},
        "four token losses": {"terms": four_terms(MOST)},
        "anchor": {"anchor": anchor(MOST, H)},
    }


def waits_of(work: Work) -> Counter[str]:
    """The lines at which a call waits for the device; none where there is no GPU."""
    if not CUDA:
        work()
        return Counter()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        work()
    torch.cuda.set_sync_debug_mode("default")
    return Counter(f"{s.filename.split('/')[-1]}:{s.lineno}" for s in said if "synchroniz" in str(s.message))


def seconds(work: Work, *, until_queued: bool = False) -> float:
    """Of a call, until the device has done it, or until the host has queued it."""
    start = time.perf_counter()
    work()
    if not until_queued:
        synchronize()
    return time.perf_counter() - start


def compiled() -> tuple[int, int]:
    """Graphs that torch has compiled so far, and kernels that Triton has."""
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if not CUDA:
        return graphs, 0
    loaded = [module for name in ("step_kernel", "hopper") if (module := sys.modules.get(f"dwl_plugin.loss.{name}"))]
    kernels = [kernel for module in loaded for name, kernel in vars(module).items() if name.endswith("_kernel")]
    return graphs, sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


def one_call(trained: bool, more: dict[str, Any], places: Counter[str]) -> tuple[int, float, float, float]:
    hidden, weight, targets = inputs(MOST, H, V, trained=trained)

    def call() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets, **more).loss.backward()

    first = seconds(call)
    call()
    found = waits_of(call)
    places += found
    queued = 1e3 * seconds(call, until_queued=True)
    return sum(found.values()), first, queued, milliseconds(call, 60)


def many_lengths(trained: bool, more: dict[str, Any], few: bool) -> tuple[int, int, int, float]:
    """Steps with another number of targets each: graphs and kernels that they compile, slow steps, seconds."""
    before, rng, times = compiled(), random.Random(0), []
    for _ in range(STEPS):
        tokens = rng.randint(1, 64) if few else rng.randint(MOST // 8, MOST)
        hidden, weight, targets = inputs(tokens, H, V, trained=trained)
        synchronize()
        loss = partial(linear_cross_entropy, hidden, weight, targets, **more)
        times.append(seconds(lambda loss=loss: loss().loss.backward()))  # type: ignore[misc]
    graphs, kernels = (now - then for now, then in zip(compiled(), before, strict=True))
    return graphs, kernels, sum(taken > 0.5 for taken in times), sum(times)


def main() -> int:
    places: Counter[str] = Counter()
    table = Table(f"one call at {MOST}x{H}x{V}", "options", "waits", "first call, s", "host, ms", "ms")
    for trained in (False, True):
        for name, more in options().items():
            table.measure(f"{name}, {'trained' if trained else 'frozen'}", partial(one_call, trained, more, places))
    print("waits at", dict(places))
    columns = ("graphs compiled", "kernels compiled", "steps over 0.5 s", "seconds in all")
    table = Table("steps with a random number of targets", "head", *columns)
    cases: dict[str, tuple[bool, dict[str, Any], bool]] = {
        "frozen": (False, {}, False),
        "trained": (True, {}, False),
        "softcap": (False, {"softcap": 30.0}, False),
        "few targets": (False, {}, True),
    }
    for name, case in cases.items():
        table.measure(name, partial(many_lengths, *case))
    graphs, kernels = compiled()
    print(f"{graphs} graphs and {kernels} kernels compiled in all")
    return int(graphs > 0 or (CUDA and not kernels))


if __name__ == "__main__":
    sys.exit(main())
