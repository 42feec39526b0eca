"""Imported by a fork server: its children have the host already, and none of what tests have done with it."""

from tests.hosts import harness

harness.import_host()
