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
from smearlens.experiments.rules import finding, per_seed

Runs = Sequence[dict[str, Any]]

GAP = 0.0043  # claim 28: 1.4682 - 1.4639 nats
MINIMAL = 0.02  # claim 30: share of the time to train, and of the speed of generation


def better_when_tracked(runs: Runs, compared: Runs) -> Verdict:
    """Refuted if the logs of the losses are the same bytes; supported if tracked runs end lower."""
    spread = {
        name: statistics.stdev([m["best_val_loss"] for m in some])
        for name, some in by_data_set(runs).items()
        if len(some) > 1
    }
    gaps = per_seed(compared, [c["difference"] for c in compared])
    differences = over_seeds(gaps) if compared else None
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
    """Supported if losses and samples are untouched and a look and generation cost < 2 %.

    A look: of 500 updates. Generation: while every pattern is kept. Refuted if something is
    touched, or if a look surely costs more; where only generation costs more, undecided.
    """
    trained = [t for t in times if "share" in t]
    if not trained or not compared:
        because = "No run was trained both with and without tracking."
        return Verdict(claim(30), "undecided", because, ())
    untouched = all(c["identical"] and c["same_samples"] for c in compared)
    speeds = [t["tokens_per_second_tracked"] / t["tokens_per_second"] for t in times]
    findings = (
        finding("one look as a share of 500 updates (CPU time)",
                per_seed(trained, [t["share"] for t in trained]), causal=True),
        finding("all looks of this study as a share of its updates",
                per_seed(trained, [t["share_as_run"] for t in trained]), causal=True),
        finding("generation: speed with every pattern kept, over speed without",
                per_seed(times, speeds), causal=True),
    )  # fmt: skip
    share, _, speed = (f.estimate for f in findings)
    outcome: Outcome = "undecided"
    if not untouched or share.low > MINIMAL:
        outcome = "refuted"
    elif share.high < MINIMAL and speed.low > 1 - MINIMAL:
        outcome = "supported"
    pairs = f"{len(compared)} pairs of runs with and without tracking"
    because = (
        f"{'Losses and samples are untouched' if untouched else 'Losses or samples differ'} in "
        f"{pairs}; one look in training costs {share.mean:.2%} of 500 updates (bar {MINIMAL:.0%}). "
        f"Generation runs at {speed.mean:.3f} of its speed while every pattern is kept: it costs "
        f"{1 - speed.mean:.1%} (bar {MINIMAL:.0%})."
    )
    return Verdict(claim(30), outcome, because, findings)
