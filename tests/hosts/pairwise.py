"""Few cases in which every pair of values of any two factors meets."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

Case = dict[str, str]
Pair = tuple[tuple[str, str], tuple[str, str]]


def pairs_of(case: Mapping[str, str]) -> set[Pair]:
    return set(combinations(sorted(case.items()), 2))


def pairwise(factors: Mapping[str, Sequence[str]], allowed: Callable[[Case], bool], tries: int = 60, seed: int = 0) -> list[Case]:
    """Greedy: each case is the best of `tries` that were begun with a pair still missing. A pair that no try can complete to an
    allowed case is left out, as one that the host does not allow."""
    rng = random.Random(seed)
    names = sorted(factors)
    missing = {((a, x), (b, y)) for a, b in combinations(names, 2) for x in factors[a] for y in factors[b]}
    cases: list[Case] = []
    while missing:
        target = min(missing)
        best: Case | None = None
        gain = 0
        for _ in range(tries):
            case = {name: rng.choice(factors[name]) for name in names} | dict(target)
            if allowed(case) and (covered := len(pairs_of(case) & missing)) > gain:
                best, gain = case, covered
        if best is None:
            missing.discard(target)
            continue
        cases.append(best)
        missing -= pairs_of(best)
    return cases
