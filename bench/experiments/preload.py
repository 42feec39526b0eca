"""Imported once by the server that every run is forked from."""

import gc

import axolotl.cli.train
import axolotl.core.builders
import axolotl.train  # noqa: F401

import bench.experiments.data
import bench.experiments.measure
import bench.experiments.train  # noqa: F401

gc.collect()
gc.freeze()  # Axolotl collects after many a step, and this heap does not change
