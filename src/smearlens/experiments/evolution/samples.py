"""The verdict on samples: whether balanced attention, or few strong heads, goes with how they read.

Leaves out the other verdicts (`verdicts`), and how samples are made and measured (`measures`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from smearlens.analysis.association import partial_correlation
from smearlens.analysis.stats import Estimate, over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim

Runs = Sequence[dict[str, Any]]

FAINT = 0.1  # a correlation between samples that is surely above -0.1 is none to speak of
HALF = {(True, False): "holds", (False, True): "does not hold"}  # (holds, fails): what is said
SHARP, FLAT = "scores x 2", "scores x 0.5"
STATISTICS = ("entropy", "imbalance", "distance", "dominance")


def balanced_samples(runs: Runs) -> Verdict:
    """Claim 29, in two halves, each by a partial correlation and by an intervention.

    Balance: within prompt and temperature, samples whose entropy is far from their group's mean are
    worse, and so are samples written with scores doubled and with scores halved. Dominance: within
    prompt and temperature, samples in which few heads add most are worse, and without the dominant
    head they are better than without others. Supported if both hold. A half fails if its
    correlation is surely above -0.1, or the interventions say the opposite; refuted if both fail. A
    half of which both can be said, clear but faint, is not settled.
    """
    far, strong = (correlation(runs, name, "quality") for name in ("imbalance", "dominance"))
    effects = {name: over_seeds([effect(m, name) for m in runs]) for name in (SHARP, FLAT)}
    dominant = over_seeds([effect(m, "dominant head", "other head") for m in runs])
    findings = (
        Finding("distance of entropy from the group's mean, and quality", far, causal=False),
        Finding("share of the strongest heads, and quality", strong, causal=False),
        Finding("quality with attention scores doubled (sharper)", effects[SHARP], causal=True),
        Finding("quality with attention scores halved (flatter)", effects[FLAT], causal=True),
        Finding("quality without the dominant head, minus without another", dominant, causal=True),
        *(Finding(f"{name} and {quality}, within prompt and temperature",
                  correlation(runs, name, quality), causal=False)
          for name in ("entropy", "distance") for quality in ("diversity", "coherence", "words")),
    )  # fmt: skip
    both_ways = [sign(e) for e in effects.values()]
    balance = {"holds": sign(far) < 0 and both_ways == [-1, -1],
               "fails": far.low > -FAINT or 1 in both_ways}  # fmt: skip
    dominance = {"holds": sign(strong) < 0 and sign(dominant) > 0,
                 "fails": strong.low > -FAINT or sign(dominant) < 0}  # fmt: skip
    said = tuple(
        HALF.get((half["holds"], half["fails"]), "is not settled") for half in (balance, dominance)
    )
    outcomes: dict[tuple[str, ...], Outcome] = {
        (HALF[True, False],) * 2: "supported", (HALF[False, True],) * 2: "refuted",
    }  # fmt: skip
    outcome = outcomes.get(said, "undecided")
    return Verdict(claim(29), outcome, _because(said, findings), findings)


def _because(said: tuple[str, ...], findings: tuple[Finding, ...]) -> str:
    far, strong, sharper, flatter, dominant = (f.estimate for f in findings[:5])
    return (
        "Samples of one prompt and temperature are compared with each other, runs are the units. "
        f"That balanced entropy goes with quality (diversity · known words) {said[0]}: the "
        f"correlation with its distance from the group's mean is {far.mean:+.2f}; doubling all "
        f"attention scores changes the quality by {sharper.mean:+.3f}, halving by "
        f"{flatter.mean:+.3f}. That dominance of few heads goes with poor samples {said[1]}: the "
        f"correlation is {strong.mean:+.2f}, and knocking out the dominant head changes the "
        f"quality by {dominant.mean:+.3f} more than knocking out another."
    )


def correlation(runs: Runs, statistic: str, quality: str) -> Estimate:
    """Partial Spearman correlation within run, prompt and temperature; runs are resampled.

    "imbalance" is the distance of a sample's entropy from the mean of its group.
    """
    x: list[float] = []
    y: list[float] = []
    groups: list[Hashable] = []
    units: list[Hashable] = []
    for m in runs:
        samples = m["samples"]
        own = [
            (m["task"], m["seed"], *each)
            for each in zip(samples["prompt"], samples["temperature"], strict=True)
        ]
        values = samples["entropy" if statistic == "imbalance" else statistic]
        x += _imbalance(values, own) if statistic == "imbalance" else values
        y += samples[quality]
        groups += own
        units += [(m["task"], m["seed"])] * len(own)
    found = partial_correlation(x, y, groups=groups, units=units, kind="spearman")
    return Estimate(found.value, found.low, found.high, found.n)


def _imbalance(values: list[float], groups: list[tuple]) -> list[float]:
    means = {g: np.mean([v for v, h in zip(values, groups, strict=True) if h == g])
             for g in set(groups)}  # fmt: skip
    return [float(abs(v - means[g])) for v, g in zip(values, groups, strict=True)]


def effect(run: dict[str, Any], change: str, base: str = "none", quality: str = "quality") -> float:
    """Mean quality of samples under a change, minus that under another or none."""
    found = run["interventions"]
    return found[change][quality] - found[base][quality]


def sign(estimate: Estimate) -> int:
    """1 or -1 if the interval lies on that side of 0; else 0."""
    return int(estimate.low > 0) - int(estimate.high < 0)
