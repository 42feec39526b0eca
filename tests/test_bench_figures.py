"""Figures of `bench/` are drawn again from what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import linear_cross_entropy as bench, worst_class

RESULTS = Path(bench.__file__).with_name("RESULTS.md")


@pytest.mark.parametrize("cap", [None, 30.0])
def test_a_table_is_read_as_it_was_written(cap: float | None) -> None:
    case = bench.Case(2048, 576, 49152, 0.6, "float32", True, cap)
    found = {"ours, nll": (0.268, 1.0, 15.6), "TRL dft_loss": (2.498, 8.92, 1545.7)}
    assert bench.read(f"# Measured\n\n{bench.table(case, found)}\nwords\n\n## On a GPU\n") == {case: found}


def test_the_figures_numbers_stand_in_the_results() -> None:
    stored = bench.read(RESULTS.read_text(encoding="utf-8"))
    frozen, trained = (stored[bench.Case(2048, 576, 49152, 0.6, "float32", head, None)] for head in (False, True))
    assert frozen["ours, nll"] == (0.268, 1.0, 15.6)
    assert trained["Apple CCE, compiled"] == (0.73, 1.79, 258.1)


def test_curves_are_read_as_they_were_written(tmp_path: Path) -> None:
    curves = {"constant α": {0: {20: 1.25, 40: 0.5}}, "group_dro, eta 0.1": {0: {20: 1.0, 40: 0.375}, 1: {20: 2.0}}}
    worst_class.write(curves, tmp_path / "curves.csv")
    assert worst_class.read(tmp_path / "curves.csv") == curves
