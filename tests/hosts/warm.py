"""Imported by a fork server: its children have the host already, and none of what tests have done with it."""

from importlib.util import find_spec

from tests.hosts import harness

harness.import_host()
if find_spec("deepspeed"):
    import deepspeed  # noqa: F401
