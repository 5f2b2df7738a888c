"""Verdicts on hybrids, convergence and rare long-range dependencies: rules fixed in advance.

Every rule reads intervals over seeds (Student's t, 95 %) in every text. Leaves out the claims'
texts (`claims`) and the measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from smearlens.analysis.stats import Estimate, bootstrap_interval, over_seeds, paired_over_seeds
from smearlens.experiments.claims import Claim, Finding, Outcome, Verdict, claim
from smearlens.experiments.rules import apply_rules, half_way, unlike

Runs = Sequence[dict[str, Any]]

HYBRID, STACK, LEARNED = "conv + rotary", "two rotary layers", "conv + learned positions"
BARE = "conv, no positions"
REPEATS = "repeats"
COSTS = 0.02  # nats: a longer context that raises the loss by more than this does harm
DROPS = 0.1  # of accuracy on repeats: what length alone may take away
LEARNT = 0.5  # accuracy below which a model says nothing about how far it holds, or looks
NO_SHIFT_HEAD = (
    ": they have not learnt to look back, and without a shift head nothing can be said of one."
)

CLAIM = Claim(
    0,
    "Conv + Rotary + SDPA, trained at 256 tokens, holds out on longer sequences",
    "the outlook of the k=5 write-up",
    "it was proposed and not trained; rotary positions beyond the trained length are untrained",
    "the same tokens with the whole context of up to 4,096 and with a trained one, and repeats at "
    "trained gaps within 4,096 tokens, beside the parts at equal parameters",
)


def judge(found: Runs) -> list[Verdict]:
    """The verdicts on the hybrid and on claims 10 and 11."""
    return apply_rules((holds_out, converges_faster, rare_and_far), found)


def texts(found: Runs) -> list[str]:
    """Names of the texts, in order."""
    return list(dict.fromkeys(m["task"] for m in found if m["task"] != REPEATS))


def of(found: Runs, task: str, name: str) -> list[dict[str, Any]]:
    """The runs of a model on a task, by seed."""
    runs = [m for m in found if m["task"] == task and m["name"] == name]
    return sorted(runs, key=lambda m: m["seed"])


# The hybrid ------------------------------------------------------------------------------------


def holds_out(found: Runs) -> Verdict:
    """Supported if far positions cost < 0.02 nats in every text and repeats lose < 0.1 accuracy.

    Far positions are the last doubling, against the same tokens with a trained context; repeats
    are taken at trained gaps, at the longest length against the trained one. Refuted if either
    surely fails; undecided also where the model did not learn the repeats.
    """
    costs = {name: over_seeds([harm(m) for m in of(found, name, HYBRID)]) for name in texts(found)}
    findings = [
        Finding(f"{name}: loss at the last positions, whole context minus trained one", e,
                causal=True)
        for name, e in costs.items()
    ]  # fmt: skip
    runs = of(found, REPEATS, HYBRID)
    learned = over_seeds([trained_gaps(m, "first") for m in runs])
    drop = over_seeds([trained_gaps(m, "last") - trained_gaps(m, "first") for m in runs])
    findings += [
        Finding("accuracy on repeats at the trained length", learned, causal=True),
        Finding("accuracy at trained gaps in the longest sequences, minus that", drop, causal=True),
    ]
    for name in ("rotary", BARE, STACK):
        findings += [
            Finding(f"{text}, {name}: loss at the last positions, whole minus trained context",
                    over_seeds([harm(m) for m in of(found, text, name)]), causal=True)
            for text in costs
        ]  # fmt: skip
    outcome: Outcome = "undecided"
    if any(e.low > COSTS for e in costs.values()) or (learned.low > LEARNT and drop.high < -DROPS):
        outcome = "refuted"
    elif all(e.high < COSTS for e in costs.values()) and learned.low > LEARNT and drop.low > -DROPS:
        outcome = "supported"
    said, bare = (_costs(found, name) for name in (HYBRID, BARE))
    because = (
        f"What the whole context does to the loss at the last positions: {said}. On repeats at "
        f"trained gaps the accuracy is {learned.mean:.2f} at the trained length and changes by "
        f"{drop.mean:+.2f} in the longest sequences. The convolution without positions: {bare}."
    )
    return Verdict(CLAIM, outcome, because, tuple(findings))


def _costs(found: Runs, model: str) -> str:
    means = {n: over_seeds([harm(m) for m in of(found, n, model)]).mean for n in texts(found)}
    return "; ".join(f"{name} {mean:+.3f} nats" for name, mean in means.items())


def harm(run: dict[str, Any]) -> float:
    """Loss at the last positions with the whole context, minus that with a trained one; nats."""
    return run["beyond"][-1]["loss"] - run["beyond"][-1]["short"]


def trained_gaps(run: dict[str, Any], which: str) -> float:
    """Mean accuracy at trained gaps that both have, in trained sequences or in the longest."""
    lengths = list(run["by_length"].values())
    first, last = lengths[0], lengths[-1]
    chosen = {"first": first, "last": last}[which]
    both = [chosen[gap] for gap in first if gap in last]
    return sum(both) / len(both)


# Claims 10 and 11 ------------------------------------------------------------------------------


def converges_faster(found: Runs) -> Verdict:
    """Claim 10: supported if the convolution is lower half-way and at the end in every text.

    Both with rotary positions and nearly as many weights; refuted if it ends higher in every text.
    """
    findings, ahead, behind = [], [], []
    for name in texts(found):
        conv, stack = (of(found, name, which) for which in (HYBRID, STACK))
        end = paired_over_seeds([m["val_loss"] for m in conv], [m["val_loss"] for m in stack])
        early = paired_over_seeds(half_way(conv), half_way(stack))
        label = f"{name}, {HYBRID} minus {STACK} (nats)"
        findings += [Finding(f"{label}: at the end", end, causal=True),
                     Finding(f"{label}: half-way", early, causal=True)]  # fmt: skip
        ahead.append(end.high < 0 and early.high < 0)
        behind.append(end.low > 0)
    outcome: Outcome = "undecided"
    if all(ahead):
        outcome = "supported"
    elif all(behind):
        outcome = "refuted"
    sizes = "; ".join(
        f"{unlike(of(found, name, HYBRID), of(found, name, STACK))} on {name}"
        for name in texts(found)
    )
    because = (
        "At equal rotary positions, steps and data, and nearly equal weights (the convolution has "
        f"{sizes}), the convolution with one layer is "
        f"ahead half-way and at the end in {sum(ahead)} of {len(ahead)} texts, and behind at the "
        f"end in {sum(behind)}."
    )
    return Verdict(claim(10), outcome, because, tuple(findings))


def rare_and_far(found: Runs) -> Verdict:
    """Claim 11: by the loss on rare bigrams last seen 64 or more tokens ago, paired by token.

    Supported if two attention layers are lower in every text, refuted if the convolution is; both
    only if two layers, which need a head that looks one token back for that, learnt the repeats.
    """
    findings, better, worse = [], [], []
    for name in texts(found):
        conv, stack = (of(found, name, which) for which in (HYBRID, STACK))
        rare = paired_over_seeds([_rare_far(m) for m in conv], [_rare_far(m) for m in stack])
        rest = paired_over_seeds([m["val_loss"] for m in conv], [m["val_loss"] for m in stack])
        n = row(conv[0], "far", "rare")["n"]
        label = f"{name}, {HYBRID} minus {STACK} (nats)"
        each = {f"rare and far ({n} tokens)": rare, "all tokens": rest,
                "rare and far, interval over windows": by_window(conv, stack)}  # fmt: skip
        findings += [Finding(f"{label}: {what}", e, causal=True) for what, e in each.items()]
        better.append(rare.low > 0)
        worse.append(rare.high < 0)
    one, other = (of(found, REPEATS, which) for which in (HYBRID, STACK))
    at_gap = paired_over_seeds([farthest(m) for m in one], [farthest(m) for m in other])
    label = f"repeats, {HYBRID} minus {STACK}: accuracy at the largest trained gap"
    learned = over_seeds([trained_gaps(m, "first") for m in other])
    findings += [
        Finding(label, at_gap, causal=True),
        Finding(f"repeats, {STACK}: accuracy at the trained length", learned, causal=True),
    ]
    outcome: Outcome = "undecided"
    if learned.low > LEARNT and (all(better) or all(worse)):
        outcome = "supported" if all(better) else "refuted"
    because = (
        "On rare bigrams last seen 64 or more tokens ago the two attention layers have the lower "
        f"loss in {sum(better)} and the convolution in {sum(worse)} of {len(better)} texts, on the "
        f"same tokens. On repeats two layers reach an accuracy of {learned.mean:.2f}"
        f"{'.' if learned.low > LEARNT else NO_SHIFT_HEAD}"
    )
    return Verdict(claim(11), outcome, because, tuple(findings))


def row(run: dict[str, Any], distance: str, frequency: str) -> dict[str, Any]:
    """The row of a run's recall table."""
    wanted = (distance, frequency)
    return next(r for r in run["recall"] if (r["distance"], r["frequency"]) == wanted)


def _rare_far(run: dict[str, Any]) -> float:
    loss = row(run, "far", "rare")["loss"]
    return float("nan") if loss is None else loss


def farthest(run: dict[str, Any]) -> float:
    """Accuracy at the largest gap in sequences of the trained length."""
    return list(next(iter(run["by_length"].values())).values())[-1]


def by_window(one: Runs, other: Runs) -> Estimate:
    """Difference on rare, far tokens with a bootstrap interval over windows, seeds averaged."""
    differences = [
        sum(values) / len(values)
        for values in zip(
            *([_minus(a, b) for a, b in zip(m["rare_far"], k["rare_far"], strict=True)]
              for m, k in zip(one, other, strict=True)),
            strict=True,
        )
        if None not in values
    ]  # fmt: skip
    if len(differences) < 2:
        return Estimate(float("nan"), -float("inf"), float("inf"), len(differences))
    column = torch.tensor(differences, dtype=torch.float64)[:, None]
    low, high = bootstrap_interval(column)[0].tolist()
    return Estimate(float(column.mean()), low, high, len(differences))


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
