"""What the tests of the kernels have in common: kernels with a mistake in them, and how far off their results are."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch


def off(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """The largest error of each: of a row of a matrix by its largest number, of a number by itself or by 1."""
    result = {}
    for name, want in wanted.items():
        got = found[name].double()
        size = want.abs().nan_to_num(posinf=0.0)
        size = size.amax(-1, keepdim=True) if want.ndim > 1 else size.clamp(min=1)
        wrong = torch.where(got == want, 0.0, (got - want).abs() / size)
        result[name] = wrong.nan_to_num(nan=math.inf).max().item()
    return result


def mutated(module: ModuleType, function: str, right: str, wrong: str, folder: Path) -> Any:
    """The module with one mistake in one function; the interpreter reads a kernel's source again, so it has to be a file."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text()
    begin = source.index(f"def {function}(")
    end = source.index("\n\n\n", begin)
    assert source.count(right, begin, end) == 1
    file = folder / "mutant.py"
    file.write_text(source[:begin] + source[begin:end].replace(right, wrong) + source[end:])
    spec = importlib.util.spec_from_file_location("mutant", file)
    assert spec is not None
    assert spec.loader is not None
    mutant = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = mutant  # where its dataclasses look for their module
    try:
        spec.loader.exec_module(mutant)
    finally:
        del sys.modules[spec.name]
    return mutant
