"""What the verdict rules of all studies share: numbers over seeds, and that one seed is too few.

Leaves out the rules themselves (the studies) and what a verdict is (`claims`).
"""

from __future__ import annotations

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


def half_way(runs: Runs) -> list[float]:
    """Held-out loss of every run in the middle of its learning curve, nats."""
    return [m["curve"][len(m["curve"]) // 2]["loss"] for m in runs]
