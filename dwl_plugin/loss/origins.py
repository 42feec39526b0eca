"""Whose code computes the loss of a model, if it is not ours: what a message can name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from inspect import getattr_static
from typing import Any

from torch import nn

__all__ = ["foreign_home", "package"]

_AT_HOME = {"accelerate", "contextlib", "dwl_plugin", "functools", "peft", "torch", "transformers", "trl"}
"""Packages that wrap a forward, or hand it on to ours."""


def package(module: str) -> str:
    """The package of a module, by its full name."""
    return module.partition(".")[0]


def foreign_home(module: nn.Module, method: str) -> str | None:
    """The module that the `method` of `module` was written in, if it is from neither the package of its class nor a known one."""
    known = {*_AT_HOME, package(type(module).__module__)}
    patches = (module.__dict__.get(method), getattr_static(type(module), method, None))
    return next((home for patch in patches for home in _homes(patch) if package(home) not in known), None)


def _homes(function: Any) -> Iterator[str]:
    """Of a function and all that it wraps. By where its code looks for names: `functools.wraps` passes `__module__` on."""
    seen = set[int]()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        if isinstance(function, partial):
            function = function.func
            continue
        code = getattr(function, "__func__", function)
        if not hasattr(code, "__globals__"):
            code = getattr(type(code).__call__, "__func__", type(code).__call__)
        if hasattr(code, "__globals__"):
            yield str(code.__globals__.get("__name__") or code.__code__.co_filename.strip("<>"))
        function = getattr(function, "__wrapped__", None)
