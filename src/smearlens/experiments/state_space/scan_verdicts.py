"""The verdict on the claim that a parallel scan loses precision with length: fixed in advance.

It reads the errors of the study of scans, in float32. Leaves out how they are measured (`scans`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from smearlens.analysis.stats import Estimate, over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim

GATES = ("gates, s = 1", "gates, s = 4", "gates, s = 16")  # the write-up's setting: logits N(0, s²)
REGIMES = ("initial", "trained", "long memory", *GATES)
LOGARITHMIC = ("log-space", "log-space, log 0 := -12")
PARALLEL = ("doubling", *LOGARITHMIC)
SLOPE = 0.25  # log error against log length: below, an error does not grow with length
TIMES_LOOP = (
    10.0  # error at the longest length, as a multiple of the loop's: below, nothing is lost
)


def judge(found: list[dict[str, Any]]) -> Verdict:
    """Does a parallel scan lose precision with length? In float32, with the write-up's gates.

    One loses if, at some scale of the gates, its error grows with length (the interval of the slope
    of log error against log length lies above 0.25, or it stops being finite) and at the longest is
    ten times the loop's. One keeps its precision if at every scale it clearly does neither.
    Supported if all lose; refuted if one keeps it and loses in no other regime, for then
    parallelism is not the cause.
    """
    states = {scan: [_state(found, scan, regime) for regime in GATES] for scan in PARALLEL}
    lose = [scan for scan, each in states.items() if "loses" in each]
    keep = [scan for scan, each in states.items() if set(each) == {"keeps"}]
    others = [regime for regime in REGIMES if regime not in GATES]
    others = [regime for regime in others if any(row["regime"] == regime for row in found)]
    beyond = {scan: {r: _state(found, scan, r) for r in others} for scan in keep}
    outcome: Outcome = "undecided"
    if len(lose) == len(PARALLEL):
        outcome = "supported"
    elif any("loses" not in each.values() for each in beyond.values()):
        outcome = "refuted"
    findings = _findings(found, GATES, ("loop", *PARALLEL))
    findings += _findings(found, others, ("loop", *keep))
    seeds = len({row["seed"] for row in found})
    elsewhere = _elsewhere(found, beyond)
    because = _because(outcome, lose, keep) + elsewhere
    return Verdict(claim(22), outcome, because, tuple(findings), n_seeds=seeds)


def _findings(
    found: list[dict[str, Any]], regimes: Sequence[str], scans: Sequence[str]
) -> list[Finding]:
    """Slope and last error of these scans, regime by regime; none where an error is not finite."""
    return [
        Finding(f"{label}, {scan}, {regime}", estimate, causal=True)
        for regime in regimes
        for scan in scans
        for label, estimate in (
            ("slope of log error against log length", slope(found, scan, regime)),
            ("log10 of the error at the longest length", last_error(found, scan, regime)),
        )
        if estimate is not None
    ]


def _because(outcome: Outcome, lose: list[str], keep: list[str]) -> str:
    limits = "With the write-up's gates, in float32: "
    if outcome == "supported":
        return limits + "every parallel scan loses digits with length, the doubling scan too."
    named = f"{limits}lost with length: {_and(lose)}; kept: {_and(keep)}. "
    if outcome == "undecided":
        why = "The one that keeps them there loses them elsewhere." if keep else (
            "Between the two the seeds do not decide."
        )  # fmt: skip
        return named + why
    if not lose:
        return named + "Here no scan loses precision with length."
    if not set(lose) <= set(LOGARITHMIC) or "doubling" not in keep:
        return named + "A scan that runs in parallel can keep its digits."
    return named + (
        "There it is the logarithm that loses digits, not running in parallel: a sum of logarithms "
        "as large as |Σ log Ā| carries an error of 2^-24 of it, which grows with length and with "
        "the size of the logits; the scan that multiplies decays does not."
    )


def _elsewhere(found: list[dict[str, Any]], beyond: dict[str, dict[str, str]]) -> str:
    """Where else, in float32, scans that keep their digits with these gates lose them, or may."""
    said = []
    for scan, states in beyond.items():
        for regime, state in states.items():
            if state == "keeps":
                continue
            grows, ends = slope(found, scan, regime), last_error(found, scan, regime)
            loop, numbers = last_error(found, "loop", regime), "not finite"
            if grows is not None and ends is not None and loop is not None:
                times = 10 ** (ends.mean - loop.mean)
                numbers = (
                    f"slope {grows.mean:.2f}, at the longest {times:.0f} times the loop's error"
                )
            how = "loses" if state == "loses" else "may lose"
            said.append(f"{scan} {how} digits with {regime} inputs ({numbers})")
    return f" In other regimes, in float32: {'; '.join(said)}." if said else ""


def _and(scans: list[str]) -> str:
    return " and ".join(scans) or "none"


def _state(found: list[dict[str, Any]], scan: str, regime: str) -> str:
    """`loses`, `keeps` or `unclear`, by slope and error in float32."""
    grows, at_end = slope(found, scan, regime), last_error(found, scan, regime)
    loop = last_error(found, "loop", regime)
    if grows is None or at_end is None or loop is None:
        return "loses"  # not finite at some length
    margin = math.log10(TIMES_LOOP)
    if grows.low > SLOPE and at_end.low > loop.high + margin:
        return "loses"
    return "keeps" if grows.high < SLOPE or at_end.high < loop.low + margin else "unclear"


def slope(found: list[dict[str, Any]], scan: str, regime: str) -> Estimate | None:
    """Slope of log error against log length over seeds, least squares; None if not all finite."""
    values = []
    for rows in _by_seed(found, scan, regime):
        if any(row["error"] is None for row in rows):
            return None
        x = [math.log(row["length"]) for row in rows]
        y = [math.log(max(row["error"], 1e-12)) for row in rows]
        middle = sum(x) / len(x)
        values.append(
            sum((a - middle) * b for a, b in zip(x, y, strict=True))
            / sum((a - middle) ** 2 for a in x)
        )
    return over_seeds(values)


def last_error(found: list[dict[str, Any]], scan: str, regime: str) -> Estimate | None:
    """log10 of the error at the longest length over seeds; None if not all are finite."""
    ends = [rows[-1]["error"] for rows in _by_seed(found, scan, regime)]
    if any(error is None for error in ends):
        return None
    return over_seeds([math.log10(max(error, 1e-12)) for error in ends])


def _by_seed(found: list[dict[str, Any]], scan: str, regime: str) -> list[list[dict[str, Any]]]:
    """The float32 rows of a scan in a regime, one list per seed, shortest first."""
    rows = [r for r in found if (r["scan"], r["regime"], r["dtype"]) == (scan, regime, "float32")]
    seeds = sorted({row["seed"] for row in rows})
    return [sorted((r for r in rows if r["seed"] == s), key=lambda r: r["length"]) for s in seeds]
