"""Text to plain values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml

from dwl_plugin.errors import DWLError

__all__ = ["load_yaml", "yaml_errors"]


@contextmanager
def yaml_errors() -> Iterator[None]:
    """PyYAML lets whatever went wrong through for a date or a number that is none, a value that does not fit its tag, and lists
    nested without end: here it is a `yaml.YAMLError` as everything else that is not YAML."""
    try:
        yield
    except (yaml.YAMLError, DWLError):
        raise
    except Exception as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def load_yaml(text: str) -> Any:
    """`yaml.safe_load` that raises `yaml.YAMLError` alone."""
    with yaml_errors():
        return yaml.safe_load(text)
