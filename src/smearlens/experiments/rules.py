"""What the verdict rules of all studies share: numbers over seeds, and that one seed is too few.

Leaves out the rules themselves (the studies) and what a verdict is (`claims`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from smearlens.analysis.stats import over_seeds
from smearlens.experiments.claims import Finding, Verdict

Runs = Sequence[dict[str, Any]]


def apply_rules(rules: Sequence[Callable[[Runs], Verdict]], found: Runs) -> list[Verdict]:
    """The verdict of every rule on the measures of all runs; undecided with one seed."""
    n_seeds = len({m["seed"] for m in found})
    return [enough_seeds(replace(rule(found), n_seeds=n_seeds)) for rule in rules]


def enough_seeds(verdict: Verdict) -> Verdict:
    """The verdict, undecided where one seed is all there is."""
    if verdict.n_seeds > 1:
        return verdict
    return replace(verdict, outcome="undecided", because="One seed proves nothing.")


def finding(label: str, values: Sequence[float], *, causal: bool) -> Finding:
    """A number behind a verdict from its values in every run."""
    return Finding(label, over_seeds(values), causal)


def per_seed(runs: Runs, values: Sequence[float]) -> list[float]:
    """The mean of a seed's values, by seed: runs of one seed are no more evidence than one.

    >>> per_seed([{"seed": 0}, {"seed": 1}, {"seed": 0}], [1.0, 5.0, 2.0])
    [1.5, 5.0]
    """
    found: dict[int, list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        found.setdefault(run["seed"], []).append(value)
    return [statistics.fmean(found[seed]) for seed in sorted(found)]


def half_way(runs: Runs) -> list[float]:
    """Held-out loss of every run half-way, nats: at the evaluation nearest half of its updates.

    Of two that are equally near it is the earlier one.
    """
    return [_middle(m["curve"])["loss"] for m in runs]


def _middle(curve: Sequence[dict[str, Any]]) -> dict[str, Any]:
    last = curve[-1]["step"]
    return min(curve, key=lambda row: abs(2 * row["step"] - last))


def unlike(one: Runs, other: Runs) -> str:
    """By how much the first models have more or fewer parameters than the second, in words.

    >>> unlike([{"n_parameters": 103}], [{"n_parameters": 100}])
    '3.0 % more'
    """
    share = one[0]["n_parameters"] / other[0]["n_parameters"] - 1
    return f"{abs(share):.1%} {'more' if share > 0 else 'fewer'}".replace("%", " %")
