"""Verdicts on how attention evolves: rules fixed in advance, over seeds and data sets.

A rule reads intervals over seeds (95 %) in every data set. Fewer than 5 seeds leave whatever rests
on a correlation undecided. Leaves out the claims' texts (`claims`) and the measures.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from smearlens.analysis.association import ENOUGH, association_within_run, partial_correlation
from smearlens.analysis.phase_change import PhaseChange, phase_change
from smearlens.analysis.stats import Estimate, over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim
from smearlens.experiments.evolution.costs import better_when_tracked, cheap
from smearlens.experiments.evolution.logs import (
    TRACKED,
    by_data_set,
    layer_mean,
    pairs_at,
    pairs_shuffled,
)
from smearlens.experiments.evolution.samples import balanced_samples, sign
from smearlens.experiments.rules import enough_seeds

Runs = Sequence[dict[str, Any]]

LATE = 0.25  # of the updates: by then the uniform start is past
CHANGE_AT, CHANGE_SHARE = (1500, 2500), (0.3, 0.5)  # claim 25: updates; share of 5,000 updates
HIGH, LOW = (3, 4, 5), (0, 1, 2)  # claim 26: layers 4 to 6, and the layers below
WEAK = 0.3  # a correlation within runs that is surely below this is none to speak of
ENTROPIES = {
    "normalised_entropy": "", "normalised_entropy_without_first": ", first key left out",
}  # fmt: skip
SIMILARITIES = ("js", "centred_cosine")


def judge(found: Runs, times: Runs, compared: Runs) -> list[Verdict]:
    """The verdicts on claims 24 to 30."""
    tracked = [m for m in found if m["name"] == TRACKED]
    n_seeds = len({m["seed"] for m in tracked})
    verdicts = [
        focuses(tracked), specialises(tracked), upper_layers_alike(tracked),
        goes_with_loss(tracked), better_when_tracked(tracked, compared),
        balanced_samples(tracked), cheap(times, compared),
    ]  # fmt: skip
    pairs = len({c["seed"] for c in compared})  # with and without tracking: claim 28 rests on these
    return [
        _enough(replace(v, n_seeds=pairs if v.claim.number == 28 else n_seeds)) for v in verdicts
    ]


def _enough(verdict: Verdict) -> Verdict:
    """The verdict, undecided where it rests on too few seeds."""
    number, n = verdict.claim.number, verdict.n_seeds
    if number in (25, 27, 29) and n < ENOUGH:
        because = f"{n} seeds: fewer than {ENOUGH} show no correlation and no moment. "
        return replace(verdict, outcome="undecided", because=because + verdict.because)
    return verdict if number in (28, 30) else enough_seeds(verdict)


# Claim 24 --------------------------------------------------------------------------------------


def focuses(runs: Runs) -> Verdict:
    """Supported if entropy falls from the start and again once the uniform start is past.

    Both up to the step of the best loss, with and without the first key, in every data set.
    Refuted if in every data set it rises in one of the two.
    """
    findings, falls, rises = [], [], []
    for name, some in by_data_set(runs).items():
        for key, words in ENTROPIES.items():
            whole, late = zip(*(_changes(layer_mean(m, key), m) for m in some), strict=True)
            label = f"{name}, entropy / log n{words}"
            pair = [
                Finding(f"{label}: best step minus start", over_seeds(whole), causal=False),
                Finding(f"{label}: best step minus a quarter of the updates", over_seeds(late),
                        causal=False),
            ]  # fmt: skip
            findings += pair
            falls.append(all(f.estimate.high < 0 for f in pair))
            rises.append(any(f.estimate.low > 0 for f in pair))
    outcome: Outcome = "undecided"
    if all(falls):
        outcome = "supported"
    elif all(rises):
        outcome = "refuted"
    because = {
        "supported": "Entropy starts at its highest by construction; it goes on falling after a "
        "quarter of the updates, on held-out text, with the first key or without.",
        "refuted": "Once the uniform start is past, entropy on held-out text does not fall: it "
        "rises. What the write-up saw is the start.",
        "undecided": f"Entropy falls throughout in {sum(falls)} and rises in {sum(rises)} of "
        f"{len(falls)} cases (data sets, with the first key and without).",
    }[outcome]
    return Verdict(claim(24), outcome, because, tuple(findings))


def _changes(series: list[float], run: dict[str, Any]) -> tuple[float, float]:
    """From the start, and from a quarter of the updates, to the step of the best loss."""
    steps, losses = run["looks"]["steps"], run["looks"]["columns"]["loss"]
    quarter = next(i for i, step in enumerate(steps) if step >= LATE * steps[-1])
    best = max(losses.index(min(losses)), quarter)
    return series[best] - series[0], series[best] - series[quarter]


# Claim 25 --------------------------------------------------------------------------------------


def specialises(runs: Runs) -> Verdict:
    """Supported if in every data set the similarity of layers changes at once, and there.

    "There": 1,500 to 2,500 updates, or the same share of the training as of 5,000 updates. Refuted
    if in every data set it changes at once elsewhere, or in every one along a smooth curve.
    """
    changes = {name: change(some, "js") for name, some in by_data_set(runs).items()}
    total = runs[0]["looks"]["steps"][-1]
    places = [CHANGE_AT, tuple(share * total for share in CHANGE_SHARE)]
    findings = tuple(
        Finding(f"{name}: updates at the largest change of layer similarity",
                Estimate(c.step, c.low, c.high, c.n), causal=False)
        for name, c in changes.items()
    )  # fmt: skip
    sudden = [c for c in changes.values() if c.found]
    inside = [any(a <= c.low and c.high <= b for a, b in places) for c in sudden]
    outside = [all(c.high < a or b < c.low for a, b in places) for c in sudden]
    smooth = all(max(c.delta_bic) < 0 for c in changes.values())
    outcome: Outcome = "undecided"
    everywhere = len(sudden) == len(changes)
    if everywhere and all(inside):
        outcome = "supported"
    elif smooth or (everywhere and all(outside)):
        outcome = "refuted"
    said = "; ".join(f"{name}: {c}" for name, c in changes.items())
    because = {
        "supported": "Layers part at once, and when the write-up says. ",
        "refuted": "No sudden change there: layers part along a smooth curve, or elsewhere. ",
        "undecided": "Whether layers part at once, and when, is not settled. ",
    }[outcome]
    because += f"{said}. No number is finer than the looks; training had {total:,} updates."
    return Verdict(claim(25), outcome, because, findings)


def change(runs: Runs, kind: str) -> PhaseChange:
    """The largest change of the mean over layers, or over pairs of layers."""
    series = [layer_mean(m, kind) for m in runs]
    return phase_change(series, runs[0]["looks"]["steps"])


# Claim 26 --------------------------------------------------------------------------------------


def upper_layers_alike(runs: Runs) -> Verdict:
    """Both halves by contrasts at the end, in which what masks alone make alike cancels.

    Supported if pairs within layers 4 to 6 are more alike than all others, and pairs within the
    lower three more than pairs across, by both measures in every data set; refuted if one of the
    two is the other way round by both measures in every data set.
    """
    findings: list[Finding] = []
    signs: dict[str, list[Estimate]] = {"high": [], "low": []}
    for name, some in by_data_set(runs).items():
        for kind in SIMILARITIES:
            for part, words in (("high", "pairs within 4-6 minus all others"),
                                ("low", "pairs within 1-3 minus pairs across")):  # fmt: skip
                estimate = over_seeds([contrast(pairs_at(m, kind, -1), part) for m in some])
                signs[part].append(estimate)
                label = f"{name}, {kind.replace('_', ' ')}, {words}"
                findings.append(Finding(label, estimate, causal=False))
                nulls = {
                    "untrained": [pairs_at(m, kind, 0) for m in some],
                    "on shuffled text": [pairs_shuffled(m, kind) for m in some],
                }
                findings += [
                    Finding(f"{label}, {null}", over_seeds([contrast(v, part) for v in tables]),
                            causal=False)
                    for null, tables in nulls.items()
                ]  # fmt: skip
    outcome: Outcome = "undecided"
    if all(e.low > 0 for each in signs.values() for e in each):
        outcome = "supported"
    elif any(all(e.high < 0 for e in each) for each in signs.values()):
        outcome = "refuted"
    counts = {part: sum(e.low > 0 for e in each) for part, each in signs.items()}
    because = (
        f"Of {len(signs['high'])} contrasts (data sets, two measures), layers 4 to 6 are more "
        f"alike than other pairs in {counts['high']} and less alike in "
        f"{sum(e.high < 0 for e in signs['high'])}; the lower three more alike than pairs across "
        f"in {counts['low']} and less in {sum(e.high < 0 for e in signs['low'])}. The same "
        "contrasts of untrained models and on shuffled text stand beside them."
    )
    return Verdict(claim(26), outcome, because, tuple(findings))


def contrast(pairs: dict[tuple[int, int], float], part: str) -> float:
    """Mean similarity of the pairs in question minus that of those they are compared with."""
    inside = [v for p, v in pairs.items() if set(p) <= set(HIGH if part == "high" else LOW)]
    others = {
        "high": [v for p, v in pairs.items() if not set(p) <= set(HIGH)],
        "low": [v for (a, b), v in pairs.items() if a in LOW and b in HIGH],
    }[part]
    return statistics.fmean(inside) - statistics.fmean(others)


# Claim 27 --------------------------------------------------------------------------------------


def goes_with_loss(runs: Runs) -> Verdict:
    """By runs within data sets, and by first differences within runs, given the log of the step.

    Supported if both intervals of both metrics leave out 0 and agree in sign. Refuted if for both
    metrics the runs' interval holds 0 and the one of the differences lies within ± 0.3.
    """
    findings, shown, trend = [], [], []
    for key, words in (("js", "layer similarity"), ("distance", "attention span")):
        ends = [layer_mean(m, key)[-1] for m in runs]
        losses = [m["looks"]["columns"]["loss"][-1] for m in runs]
        groups = [m["task"] for m in runs]
        over = Estimate(float("nan"), -1.0, 1.0, len(runs))
        if len(runs) > len(set(groups)) and len(runs) > 2:
            c = partial_correlation(ends, losses, groups=groups)
            over = Estimate(c.value, c.low, c.high, c.n)
        inside = over_seeds([within_run(m, key) for m in runs])
        plain = over_seeds([_plain(layer_mean(m, key), m) for m in runs])
        findings += [
            Finding(f"{words} and held-out loss, over runs within data sets", over, causal=False),
            Finding(f"{words}: first differences within a run, given log step", inside,
                    causal=False),
            Finding(f"{words}: plain correlation within a run, for comparison", plain,
                    causal=False),
        ]  # fmt: skip
        signs = {sign(over), sign(inside)}
        shown.append(signs in ({1}, {-1}))
        trend.append(sign(over) == 0 and max(abs(inside.low), abs(inside.high)) < WEAK)
    outcome: Outcome = "undecided"
    if all(shown):
        outcome = "supported"
    elif all(trend):
        outcome = "refuted"
    because = {
        "supported": "Runs with more of it have another loss, and so do the changes within a run.",
        "refuted": "Within a run both follow the step; without that trend hardly anything is left, "
        "and over runs nothing is shown.",
        "undecided": "Plain correlations within a run are the common trend; what is left of them "
        "over runs and in first differences does not agree well enough for either answer.",
    }[outcome]
    return Verdict(claim(27), outcome, because, tuple(findings))


def within_run(run: dict[str, Any], key: str) -> float:
    """Correlation of the changes from look to look, a straight line in log step taken out."""
    steps, loss = run["looks"]["steps"], run["looks"]["columns"]["loss"]
    differences = np.diff(layer_mean(run, key)), np.diff(loss)
    return association_within_run(*differences, steps[1:]).partial


def _plain(series: list[float], run: dict[str, Any]) -> float:
    return float(np.corrcoef(series, run["looks"]["columns"]["loss"])[0, 1])
