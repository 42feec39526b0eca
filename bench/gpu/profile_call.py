"""Which kernels one call of the loss spends its time in; and a trace of it, on a GPU."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.profiler import ProfilerActivity, profile

from bench.gpu.common import CUDA, OUT, TOY, Table, inputs, synchronize
from dwl_plugin import linear_cross_entropy

N, H, V = (40, 32, 1009) if TOY else (8192, 4096, 151936)
SHOWN = 9


def main() -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if CUDA else [])]
    for trained in (False, True):
        head = "trained" if trained else "frozen"
        hidden, weight, targets = inputs(N, H, V, trained=trained)
        for _ in range(3):
            linear_cross_entropy(hidden, weight, targets).loss.backward()
        with profile(activities=activities) as seen:
            hidden.grad = weight.grad = None
            linear_cross_entropy(hidden, weight, targets).loss.backward()
            synchronize()
        taken: dict[str, list[float]] = defaultdict(list)
        for event in seen.events():
            if not CUDA:
                taken[event.name].append(event.self_cpu_time_total / 1e3)
            elif event.device_type == torch.autograd.DeviceType.CUDA:
                taken[event.name].append(event.device_time_total / 1e3)
        times = {name: sum(each) for name, each in taken.items()}
        table = Table(f"{N}x{H}x{V}, {head}: {sum(times.values()):.1f} ms", "kernel", "ms", "times")
        for name in sorted(times, key=lambda name: -times[name])[:SHOWN]:
            table.add(name[:64], times[name], len(taken[name]))
        if CUDA:
            seen.export_chrome_trace(str(OUT / f"trace-{head}.json.gz"))


if __name__ == "__main__":
    main()
