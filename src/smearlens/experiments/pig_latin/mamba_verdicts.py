"""Verdicts on the claims about Mamba and Pig Latin: rules fixed before the runs were seen.

Rules read intervals over seeds (Student's t, 95 %) and exact tests over words, never one run; a
claim is undecided when an interval straddles its threshold. Leaves out the claims' texts
(`claims`), the comparisons (`paired`), and claim 22, which is about scans.
"""

from __future__ import annotations

from collections.abc import Sequence

from smearlens.analysis.stats import Estimate, over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim
from smearlens.experiments.pig_latin.mamba_evidence import MEMORY
from smearlens.experiments.pig_latin.paired import Comparison, Runs, accuracy, compare, runs_of
from smearlens.experiments.pig_latin.parity import NAMES
from smearlens.experiments.pig_latin.verdicts import finding_of, judged

WORTH = 0.02  # of the words: a smaller advantage is none
EXACT = 1e-4  # of the largest state: error of a closed form in float32
CARRIES = 0.9  # of the words a model gets right: what carries so much carries the word
FAILS = 0.5  # of the same: what leaves less does not

EXACTLY = 0.99  # of the same: what must not change anything
WORSE = 0.1  # of the answers on parity
MUST_KEEP = ("own states", "states and windows")  # controls of the exchange
MUST_BREAK = "a third word's states"
EXCHANGED = ("states", "windows", "not exchanged", *MUST_KEEP, MUST_BREAK)

FOLLOWS = "translation follows the states of another word put in at [EOS]"
CUT = "convolution cut at [EOS]"


def judge(found: Runs) -> list[Verdict]:
    """Verdicts on claims 17 to 21 and 23."""
    rules = (
        bilinear_beats_hold, weights_decay, constant_delta, state_at_end, like_a_recurrence,
        beats_transformer,
    )  # fmt: skip
    return judged(rules, found, base="small/bilinear")


def bilinear_beats_hold(found: Runs) -> Verdict:
    """Claim 17: bilinear against both exponential rules, Δ as it is and divided by √d."""
    pairs = [
        (f"small/bilinear{scaled}", f"small/{other}{scaled}")
        for scaled in ("", ", scaled")
        for other in ("zoh", "mamba rule")
    ]
    compared = compare(found, [*pairs, ("small/bilinear clamped", "small/bilinear")])
    hold = [compared[0], compared[2]]
    negative = [m["evidence"]["negative_decays"] for m in runs_of(found, "small/bilinear")]
    findings = (
        *map(finding_of, compared),
        Finding("share of decays below 0, bilinear", over_seeds(negative), False),
    )
    outcome: Outcome = "undecided"
    if all(c.clearly_better for c in hold):
        outcome = "supported"
    elif all(c.difference.high < WORTH for c in hold):
        outcome = "refuted"
    because = {
        "supported": "Bilinear is better than zero-order hold with Δ as it is and with Δ/√d, over "
        "seeds and word by word.",
        "refuted": "On equal terms bilinear is at most two points better than zero-order hold, "
        "with Δ as it is and with Δ/√d.",
        "undecided": "On equal terms the difference of the two rules is not clear of the noise: "
        + _points(hold)
        + ".",
    }[outcome]
    return Verdict(claim(17), outcome, because, findings)


def weights_decay(found: Runs) -> Verdict:
    """Claim 18: the closed form against the states, summed from s + 1 and from s."""
    seen = [m["evidence"]["closed_form"] for m in runs_of(found, "small/A = -1, selective")]
    right, wrong = (over_seeds([s[key] for s in seen]) for key in ("from s + 1", "from s"))
    findings = (
        Finding("error of the states, sum of Δ from s + 1 to t, of the largest state", right, True),
        Finding("the same with the step of s itself in the sum", wrong, True),
    )
    outcome: Outcome = "undecided"
    if right.high < EXACT:
        outcome = "supported"
    elif right.low > EXACT:
        outcome = "refuted"
    because = {
        "supported": "The states of the trained model are the sum of what was written, weighted "
        "so, if the sum of Δ runs from s + 1: a token is not decayed by its own step.",
        "refuted": "The closed form does not give the states of the trained model.",
        "undecided": "The closed form is exact for some seeds only.",
    }[outcome]
    return Verdict(claim(18), outcome, because, findings)


def constant_delta(found: Runs) -> Verdict:
    """Claim 19: selective against constant Δ under either A, and Δ frozen after training."""
    compared = compare(
        found,
        [
            ("small/mamba rule", "small/A learned, constant"),
            ("small/A = -1, selective", "small/A = -1, constant"),
            ("small/A = -1, selective", "small/A learned, constant"),
            ("small/mamba rule", "small/A learned, position"),
            ("small/A = -1, selective", "small/A = -1, position"),
        ],
    )
    frozen = [m["evidence"]["frozen_delta"] for m in runs_of(found, "small/mamba rule")]
    lost = over_seeds([f["clean"] - f["frozen"] for f in frozen])
    findings = (
        *map(finding_of, compared),
        Finding("words lost when Δ is frozen at its mean after training", lost, True),
    )
    both = [c.difference for c in compared[:2]]
    outcome: Outcome = "undecided"
    if all(d.high < WORTH for d in both):
        outcome = "supported"
    elif any(d.low > WORTH for d in both):
        outcome = "refuted"
    because = {
        "supported": "Trained with a constant Δ the models are as good, within two points.",
        "refuted": "A selective Δ is worth more than two points: " + _points(compared[:2]) + ".",
        "undecided": "Selective minus constant Δ is not clear of two points: "
        + _points(compared[:2])
        + ".",
    }[outcome]
    because += f" A model trained with a selective Δ loses {100 * lost.mean:.0f} points of the "
    because += "words when it is frozen afterwards."
    return Verdict(claim(19), outcome, because, findings)


def state_at_end(found: Runs) -> Verdict:
    """Claim 20, for the write-up's kernel of 16: what the states carry, what the convolution."""
    kept = {name: _carried(found, name) for name in MEMORY}
    findings = tuple(
        Finding(f"{name}: {label}, of the words it gets right", estimate, True)
        for name, rows in kept.items()
        for label, estimate in rows.items()
    )
    (follows, cut), (follows4, cut4) = (
        (kept[name][FOLLOWS], kept[name][CUT]) for name in ("small, kernel 16", "small")
    )
    outcome: Outcome = "undecided"
    if follows.low > CARRIES and cut.low > CARRIES:
        outcome = "supported"
    elif follows.high < FAILS or cut.high < FAILS:
        outcome = "refuted"
    because = {
        "supported": "The translation follows the states that are put in at [EOS], and does "
        "without what the convolution sees of the word.",
        "refuted": "With a kernel of 16 taps the word is not in the states alone: "
        f"{_percent(follows)} of the translations follow states put in at [EOS], and "
        f"{_percent(cut)} survive without what the convolution sees of the word. With 4 taps it "
        f"is {_percent(follows4)} and {_percent(cut4)}.",
        "undecided": "What states and convolution carry is not clear of the thresholds over the "
        "seeds.",
    }[outcome]
    return Verdict(claim(20), outcome, because, findings)


def _carried(found: Runs, name: str) -> dict[str, Estimate]:
    """Shares of the words a model gets right that an intervention at [EOS] leaves right."""
    seen = [m["evidence"] for m in runs_of(found, f"small/{name}")]
    moved = [s["exchange"]["0"] for s in seen]
    memory = [s["memory"] for s in seen]

    return {
        FOLLOWS: _of_right(moved, "states"),
        "the same with the convolution cut at [EOS]": _of_right(moved, "states, convolution cut"),
        "translation follows the convolution's window put in there": _of_right(moved, "windows"),
        **{key: _of_right(memory, key) for key in (CUT, "states wiped at [EOS]",
                                                   "nothing written after [EOS]")},
    }  # fmt: skip


def _of_right(runs: Runs, key: str) -> Estimate:
    """A share as one of what is right without an intervention, over seeds."""
    return over_seeds([run[key] / max(run["clean"], 1e-9) for run in runs])


def like_a_recurrence(found: Runs) -> Verdict:
    """Claim 21, as far as it can fail: states alone decide what follows, and parity is learnt."""
    kept, controls, findings = [], [], []
    for name in ("small", "small, kernel 16"):
        seen = [m["evidence"]["exchange"] for m in runs_of(found, f"small/{name}")]
        for offset in seen[0]:
            exchanges = {key: _of_right([s[offset] for s in seen], key) for key in EXCHANGED}
            kept.append(exchanges["states"])
            controls += [exchanges[key].low > EXACTLY for key in MUST_KEEP]
            controls.append(exchanges[MUST_BREAK].high < FAILS)
            findings += [
                Finding(f"{name}: right with {key} put in {offset} tokens after [EOS]", e, True)
                for key, e in exchanges.items()
            ]
    beyond, apart = _parity(found)
    findings += [Finding(f"parity beyond the trained length, {n}", e, True)
                 for n, e in beyond.items()]  # fmt: skip
    findings.append(Finding("parity: tanh network minus the better Mamba", apart, True))
    unlearnt = beyond[NAMES[0]].low > CARRIES and apart.low > WORSE
    outcome: Outcome = "undecided"
    if not all(controls):
        because = "The exchange does not do what it must: its controls fail."
        return Verdict(claim(21), outcome, because, tuple(findings))
    if all(e.low > CARRIES for e in kept) and not unlearnt:
        outcome = "supported"
    elif any(e.high < FAILS for e in kept) or unlearnt:
        outcome = "refuted"
    return Verdict(claim(21), outcome, _like_because(outcome, kept, apart), tuple(findings))


def _like_because(outcome: Outcome, kept: Sequence[Estimate], apart: Estimate) -> str:
    low, high = min(e.mean for e in kept), max(e.mean for e in kept)
    end = " Not all of it is clear of the thresholds." if outcome == "undecided" else ""
    return (
        f"States alone decide what follows for {100 * low:.0f} to {100 * high:.0f} % of the words, "
        "by kernel and place; states and the inputs that the short convolution still holds decide "
        "all of it, which is true of any recurrence by construction. Beyond the trained length of "
        f"parity a tanh network leads the better of two Mambas by {100 * apart.mean:.0f} points "
        f"[{100 * apart.low:.0f}, {100 * apart.high:.0f}].{end}"
    )


def _parity(found: Runs) -> tuple[dict[str, Estimate], Estimate]:
    """Right answers beyond the trained length by model; the first's lead over the best other."""
    values = {name: [m["beyond"] for m in runs_of(found, f"parity/{name}")] for name in NAMES}
    network, *mambas = values.values()
    apart = [x - max(others) for x, *others in zip(network, *mambas, strict=True)]
    return {name: over_seeds(v) for name, v in values.items()}, over_seeds(apart)


def beats_transformer(found: Runs) -> Verdict:
    """Claim 23: the tuned models of either family on either list, word by word."""
    compared = compare(
        found,
        [("small/small", "small pairs/beast small"), ("large/large", "large pairs/beast small")],
    )
    names = ("small/small", "small pairs/beast small", "large/large", "large pairs/beast small")
    findings = (
        *(Finding(f"held-out accuracy, {name}", accuracy(found, name), True) for name in names),
        *map(finding_of, compared),
    )
    outcome: Outcome = "undecided"
    if all(c.clearly_better for c in compared):
        outcome = "supported"
    elif any(c.clearly_worse for c in compared) and not any(c.clearly_better for c in compared):
        outcome = "refuted"
    because = {
        "supported": "On either list, with the same words held out, the tuned Mamba is better: ",
        "refuted": "On equal data the tuned transformer is better: the write-up compared a Mamba "
        "trained on the large list with transformers trained on the small one. ",
        "undecided": "On equal data the two do not differ clearly, or not in one direction: ",
    }[outcome]
    return Verdict(claim(23), outcome, f"{because}{_points(compared)}.", findings)


def _points(compared: Sequence[Comparison]) -> str:
    """Differences in points, with their intervals."""
    return "; ".join(
        f"{c.a} minus {c.b} {100 * c.difference.mean:+.1f} "
        f"[{100 * c.difference.low:+.1f}, {100 * c.difference.high:+.1f}] points"
        for c in compared
    )


def _percent(share: Estimate) -> str:
    return f"{100 * share.mean:.0f} %"
