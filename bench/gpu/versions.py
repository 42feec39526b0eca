"""Which machine this is, and its two ceilings: every time of the other stages is to be read beside them."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.gpu.common import CUDA, DEVICE, TOY, Table, milliseconds

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "trl",
    "axolotl",
    "liger-kernel",
    "cut-cross-entropy",
    "numpy",
)


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def main() -> None:
    print("Python", platform.python_version(), "|", ", ".join(f"{name} {installed(name)}" for name in PACKAGES))
    if CUDA:
        card = torch.cuda.get_device_properties(0)
        memory, units = card.total_memory / 2**30, card.multi_processor_count
        print(f"{card.name}, {memory:.0f} GiB, {units} SMs, compute {card.major}.{card.minor}, CUDA {torch.version.cuda}")
    table = Table("ceilings", "what", "value")
    n = 256 if TOY else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    table.measure("bf16 matmul, TFLOP/s", lambda: 2 * n**3 / milliseconds(lambda: torch.mm(a, b, out=product)) / 1e9)
    size = 2**20 if TOY else 2**32
    source, target = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    table.measure("copy, TB/s read + written", lambda: 2 * size / milliseconds(lambda: target.copy_(source)) / 1e9)


if __name__ == "__main__":
    main()
