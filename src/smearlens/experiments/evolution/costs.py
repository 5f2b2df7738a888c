"""The verdicts on what tracking changes and what it costs.

Leaves out the other verdicts (`verdicts`), and how runs are compared and timed (`logs`, `times`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from smearlens.analysis.stats import over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim
from smearlens.experiments.evolution.logs import by_data_set

Runs = Sequence[dict[str, Any]]

GAP = 0.0043  # claim 28: 1.4682 - 1.4639 nats
MINIMAL = 0.02  # claim 30: share of the training time


def better_when_tracked(runs: Runs, compared: Runs) -> Verdict:
    """Refuted if the logs of the losses are the same bytes; supported if tracked runs end lower."""
    spread = {
        name: statistics.stdev([m["best_val_loss"] for m in some])
        for name, some in by_data_set(runs).items()
        if len(some) > 1
    }
    differences = over_seeds([c["difference"] for c in compared]) if compared else None
    findings = () if differences is None else (
        Finding("best validation loss, tracked minus not tracked", differences, causal=True),
    )  # fmt: skip
    outcome: Outcome = "undecided"
    if compared and all(c["identical"] for c in compared):
        outcome = "refuted"
    elif differences is not None and differences.high < 0:
        outcome = "supported"
    noise = ", ".join(f"{name} {sd:.4f}" for name, sd in spread.items()) or "one seed"
    same = sum(c["identical"] for c in compared)
    because = (
        f"The logs of all losses are byte for byte the same in {same} of {len(compared)} pairs of "
        f"runs with and without tracking. A gap of {GAP} nats, as in the write-up, is to be read "
        f"beside the spread of seeds that differ in nothing else (s.d. in nats: {noise})."
    )
    return Verdict(claim(28), outcome, because, findings)


def cheap(times: Runs, compared: Runs) -> Verdict:
    """Supported if losses and samples are untouched and a look every 500 updates costs < 2 %."""
    shares = [t["share"] for t in times if "share" in t]
    speeds = [t["tokens_per_second_tracked"] / t["tokens_per_second"] for t in times]
    if not shares or not compared:
        because = "No run was trained both with and without tracking."
        return Verdict(claim(30), "undecided", because, ())
    untouched = all(c["identical"] and c["same_samples"] for c in compared)
    findings = (
        Finding("one look as a share of 500 updates (CPU time)", over_seeds(shares), causal=True),
        Finding("all looks of this study as a share of its updates",
                over_seeds([t["share_as_run"] for t in times if "share" in t]), causal=True),
        Finding("generation: speed with every pattern kept, over speed without",
                over_seeds(speeds), causal=True),
    )  # fmt: skip
    share = findings[0].estimate
    outcome: Outcome = "undecided"
    if not untouched or share.low > MINIMAL:
        outcome = "refuted"
    elif share.high < MINIMAL:
        outcome = "supported"
    because = (
        f"{'Losses and samples are untouched' if untouched else 'Losses or samples differ'}; one "
        f"look costs {share.mean:.2%} of 500 updates (bar {MINIMAL:.0%}). While patterns are kept, "
        f"generation runs at {findings[2].estimate.mean:.2f} of its speed; with nothing attached "
        "it is what it was."
    )
    return Verdict(claim(30), outcome, because, findings)
