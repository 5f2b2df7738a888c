"""Verdicts on the transformer's claims about Pig Latin: rules fixed before the runs were seen.

Rules read intervals over seeds (Student's t, 95 %) and exact tests over words, never one run; a
claim is undecided when an interval straddles its threshold. Leaves out the claims' texts
(`claims`), the comparisons (`paired`) and Mamba (`mamba_verdicts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from smearlens.experiments.claims import Finding, Outcome, Verdict, claim
from smearlens.experiments.pig_latin.paired import (
    Comparison,
    Runs,
    accuracies,
    accuracy,
    compare,
    runs_of,
    unfit,
)
from smearlens.experiments.rules import apply_rules, finding

LEARNT = 0.3  # of the words: a base that gets less right says nothing of its variants
PREVIOUS = 0.5  # weight on the token before from which a head is a previous-token head
IDLE = 0.3  # below it no head is one
COSTS = 0.1  # of the words: what a change must break for the model to rest on it
NOTHING = 0.05  # of the words: less is no dependence
APART = 2.0  # standard deviations of a random choice of letters
COST, GAIN = 0.40, 0.0583  # of no positions and of trained ones, as the write-up states them
RANKING = (
    ("8 heads", "base"), ("8 heads", "16 heads"), ("base", "width 32"), ("base", "1 + 1 layers"),
    ("base", "4 + 4 layers"), ("beast small", "beast large"),
)  # fmt: skip


def judge(found: Runs) -> list[Verdict]:
    """Verdicts on claims 13 to 16."""
    rules = (previous_token_head, start_near_vowels, positions, ranking)
    return judged(rules, found, base="small pairs/base")


def judged(rules: Sequence[Callable[[Runs], Verdict]], found: Runs, *, base: str) -> list[Verdict]:
    """Every rule applied; undecided with one seed, or where the base has not learnt the task."""
    verdicts = apply_rules(rules, found)
    if (learnt := accuracy(found, base).mean) >= LEARNT:
        return verdicts
    reason = f"Trained too briefly: the base gets {100 * learnt:.0f} % of the words right."
    return [replace(v, outcome="undecided", because=reason) for v in verdicts]


def previous_token_head(found: Runs) -> Verdict:
    """Claim 13: the best previous-token head of the encoder, and what the keys lose without it."""
    measured = {name: _previous(found, name) for name in ("2 heads", "beast small")}
    findings = tuple(f for values in measured.values() for f in values)
    score, aligned, lost, _, apart, _ = (f.estimate for f in measured["2 heads"])
    outcome: Outcome = "undecided"
    if score.low > PREVIOUS and aligned.low > PREVIOUS and lost.low > COSTS and apart.low > 0:
        outcome = "supported"
    elif score.high < IDLE or lost.high < NOTHING:
        outcome = "refuted"
    because = {
        "supported": "In the model of two heads one encoder head looks at the token before, cross "
        "attention lies on the next character's source, and it finds it through that head: with "
        "another word's previous tokens in its keys the translation breaks, and the other heads' "
        "share of the keys matters less.",
        "refuted": "Either no encoder head looks at the token before, or the keys of cross "
        "attention do not need what the best such head tells them.",
        "undecided": "A head, its alignment or its effect on the keys is not clear of its "
        "threshold over the seeds.",
    }[outcome]
    tuned = [f.estimate.mean for f in measured["beast small"]]
    because += (
        f" In the tuned model another word's share of the keys costs {100 * tuned[2]:.1f} points "
        f"through its best such head, and {100 * tuned[5]:.1f} if all keys are the other word's."
    )
    return Verdict(claim(13), outcome, because, findings)


def _previous(found: Runs, name: str) -> list[Finding]:
    best, aligned, lost, others, whole = [], [], [], [], []
    for m in runs_of(found, f"small pairs/{name}"):
        seen = m["evidence"]
        scores = [s for layer in seen["previous"]["scores"] for s in layer]
        changed = [c for layer in seen["keys"]["changed"] for c in layer]
        top = scores.index(max(scores))
        rest = changed[:top] + changed[top + 1 :]
        best.append(scores[top])
        aligned.append(max(v for layer in seen["alignment"]["mass"] for v in layer))
        lost.append(seen["keys"]["clean"] - changed[top])
        others.append(seen["keys"]["clean"] - sum(rest) / len(rest))
        whole.append(seen["keys"]["clean"] - seen["keys"]["whole"])
    apart = [x - y for x, y in zip(lost, others, strict=True)]
    return [
        finding(f"{name}: best previous-token score of an encoder head", best, causal=False),
        finding(f"{name}: best cross-attention weight on the next character's source", aligned,
                causal=False),
        finding(f"{name}: words lost with another word's previous tokens in the cross-attention "
                "keys, through that head", lost, causal=True),
        finding(f"{name}: the same through the other heads, mean", others, causal=True),
        finding(f"{name}: difference of the two", apart, causal=True),
        finding(f"{name}: words lost with all cross-attention keys of another word", whole,
                causal=True),
    ]  # fmt: skip


def start_near_vowels(found: Runs) -> Verdict:
    """Claim 14: cosine to vowels against consonants, and [SOS] replaced by either."""
    findings = []
    for name in ("2 heads", "beast small"):
        seen = [m["evidence"] for m in runs_of(found, f"small pairs/{name}")]
        z = [s["letters"]["[SOS] to vowels"]["z"] for s in seen]
        starts = [s["start"] for s in seen]
        gain = [s["vowels"] - s["consonants"] for s in starts]
        findings += [
            finding(f"{name}: cosine of [SOS] to vowels minus consonants, in s.d. of chance", z,
                    causal=False),
            finding(f"{name}: first characters right with the mean vowel for [SOS] minus with "
                    "consonants", gain, causal=True),
            finding(f"{name}: first characters right with no embedding of [SOS]",
                    [s["nothing"] for s in starts], causal=True),
        ]  # fmt: skip
    z, gain = findings[0].estimate, findings[1].estimate
    outcome: Outcome = "undecided"
    if z.low > APART and gain.low > 0:
        outcome = "supported"
    elif z.high < APART:
        outcome = "refuted"
    because = {
        "supported": "The embedding of [SOS] is nearer to vowels than five random letters would "
        "be, and a vowel does its work better than a consonant.",
        "refuted": "The embedding of [SOS] is no nearer to vowels than to five random letters.",
        "undecided": "The seeds do not tell the embedding of [SOS] from a random one, or its "
        "nearness has no effect.",
    }[outcome]
    return Verdict(claim(14), outcome, because, tuple(findings))


def positions(found: Runs) -> Verdict:
    """Claim 15: both differences in points, after the same training, against the sinusoids."""
    names = ("base", "no positions", "trained positions")
    pairs = (names[:2], (names[2], names[0]))
    without, trained = _compared(found, pairs)
    cost, gain = without.difference, trained.difference
    base, none, best = (accuracies(runs_of(found, f"small pairs/{n}")) for n in names)
    relative = [1 - x / max(y, 1e-9) for x, y in zip(none, best, strict=True)]
    findings = (
        finding("held-out accuracy, sinusoids", base, causal=True),
        Finding("lost without positions, fraction of the words", cost, True),
        Finding("gained by training them, fraction of the words", gain, True),
        finding("lost without positions relative to trained ones, as the write-up divides",
                relative, causal=True),
    )  # fmt: skip
    poor = unfit(found, [f"small pairs/{n}" for n in names])
    learnt = [f"small pairs/{n}" not in poor for n in names[1:]]
    holds = [cost.low <= COST <= cost.high, gain.low <= GAIN <= gain.high]
    outcome: Outcome = "undecided"
    if all(holds) and all(learnt) and cost.low > 0 and gain.low > 0:
        outcome = "supported"
    elif any(known and not held for known, held in zip(learnt, holds, strict=True)):
        outcome = "refuted"
    because = {
        "supported": "Both figures lie within the intervals of the differences in points.",
        "refuted": f"On one base and in points, leaving positions out costs {100 * cost.mean:.1f} "
        f"points and training them gains {100 * gain.mean:.1f}: "
        + " and ".join(
            text
            for text, held, known in zip(("40 is outside the interval of the first",
                                          "5.83 is outside that of the second"),
                                         holds, learnt, strict=True)
            if known and not held
        )
        + ".",
        "undecided": "The intervals hold the stated figures and zero, or a variant has not learnt.",
    }[outcome]  # fmt: skip
    return Verdict(claim(15), outcome, because + _not_learnt(poor), findings)


def _not_learnt(poor: dict[str, float]) -> str:
    """A sentence on variants that do not get their training words right."""
    if not poor:
        return ""
    said = (f"{name.partition('/')[2]} {100 * share:.0f} %" for name, share in poor.items())
    return f" Of the training words too few are right after this training: {', '.join(said)}."


def ranking(found: Runs) -> Verdict:
    """Claim 16: supported if every ranking holds, refuted if one is reversed."""
    compared = _compared(found, RANKING)
    findings = tuple(map(finding_of, compared))
    poor = unfit(found, [f"small pairs/{name}" for pair in RANKING for name in pair])
    learnt = [c for c in compared if not {f"small pairs/{c.a}", f"small pairs/{c.b}"} & poor.keys()]
    reversed_ = [c for c in learnt if c.clearly_worse]
    outcome: Outcome = "undecided"
    if len(learnt) == len(compared) and all(c.clearly_better for c in compared):
        outcome = "supported"
    elif reversed_:
        outcome = "refuted"
    held = [f"{c.a} over {c.b}" for c in learnt if c.clearly_better]
    because = {
        "supported": "Each of the rankings holds over seeds and word by word.",
        "refuted": "Reversed over seeds and word by word: "
        + ", ".join(f"{c.b} beats {c.a}" for c in reversed_)
        + ".",
        "undecided": f"Clear rankings: {', '.join(held) or 'none'}; the others are within the "
        "noise of seeds or words.",
    }[outcome]
    return Verdict(claim(16), outcome, because + _not_learnt(poor), findings)


def _compared(found: Runs, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    named = [(f"small pairs/{a}", f"small pairs/{b}") for a, b in pairs]
    found_pairs = zip(compare(found, named), pairs, strict=True)
    return [replace(c, a=a, b=b) for c, (a, b) in found_pairs]


def finding_of(c: Comparison) -> Finding:
    """A comparison as a number behind a verdict, with its words and its corrected p."""
    label = (
        f"{c.a} minus {c.b}, fraction of the words ({c.better} words better, {c.worse} worse, "
        f"Holm p = {c.p_holm:.2g})"
    )
    return Finding(label, c.difference, True)
