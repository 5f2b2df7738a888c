"""Verdicts on what the write-ups say of text: padding, masks, convergence, gradients.

Every rule reads intervals over seeds and was fixed in advance. Leaves out what is judged on
repeated tokens (`short_verdicts`, `verdicts`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from smearlens.analysis.stats import Estimate, paired_over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim
from smearlens.experiments.rules import finding, half_way, per_seed, unlike
from smearlens.experiments.smeared_keys.short_verdicts import Measures, runs_of, values

UNMASKED = "pads counted, no mask"
MASKED = "pads counted"
ONE_LAYER_BARE, TWO_LAYERS_BARE = "conv k=3, same padding, bare", "two layers, bare"
DOMINATES = 0.5  # share of a head's weight
EXPLODES = 10.0  # times the median norm of the 20 updates before
CONV = "blocks.0.conv.weight"
PAIRS = (  # claim 10: task, convolution, stack of attention of nearly its size, measure
    ("text", "conv k=5, bare", "four layers, bare", "val_loss"),
    ("text", "conv k=5", "four layers", "val_loss"),
    ("text", "conv k=3, bare", "two layers, bare", "val_loss"),
    ("text", "conv k=3", "two layers", "val_loss"),
    ("wikitext", "conv k=5, bare", "four layers, bare", "loss"),
    ("wikitext", "conv k=5", "four layers", "loss"),
)


def start_accuracy(measures: Measures, padding: Mapping[str, Mapping[str, float]]) -> Verdict:
    """Claim 2: refuted if pads make up what less than an epoch shows, on the same models."""
    if not padding:
        return _no_wikitext(2)
    conv, two = (runs_of(measures, UNMASKED, n) for n in (ONE_LAYER_BARE, TWO_LAYERS_BARE))
    spared = runs_of(measures, "wikitext", "four layers, bare")

    steps = conv[0]["steps"]
    findings = (
        finding(f"conv k=3: accuracy after {steps} updates, pads counted",
                values(conv, "accuracy_with_pads"), causal=False),
        finding("the same models on real tokens", values(conv, "accuracy"), causal=True),
        finding(f"two layers: accuracy after {steps} updates, pads counted",
                values(two, "accuracy_with_pads"), causal=False),
        finding("the same models on real tokens", values(two, "accuracy"), causal=True),
        finding("four layers, trained without pads as targets: accuracy if they are counted",
                values(spared, "accuracy_with_pads"), causal=True),
        finding("the same models on real tokens", values(spared, "accuracy"), causal=True),
    )  # fmt: skip
    gaps = [
        paired_over_seeds(values(runs, "accuracy_with_pads"), values(runs, "accuracy"))
        for runs in (conv, two)
    ]
    constant = padding["128"]["constant"]
    outcome: Outcome = "undecided"
    if findings[1].estimate.low > 0.6 and findings[3].estimate.low > 0.6:
        outcome = "supported"
    elif min(gap.low for gap in gaps) > 0.3 and constant > 0.5:
        outcome = "refuted"
    because = {
        "supported": "Real tokens alone give the figures.",
        "refuted": f"The figures are padding. Of the targets of {padding['128']['lines']:,.0f} "
        f"held-out lines of WikiText-2 ({padding['128']['blank']:,.0f} of them blank), cut at 128 "
        f"tokens, {padding['128']['pad_fraction']:.1%} are pads, so that saying 'pad' every time "
        f"scores {constant:.3f}; saying the most frequent token scores "
        f"{padding['128']['unigram']:.3f} on real targets. The same models show both numbers.",
        "undecided": "Counting pads does not change the accuracy clearly enough.",
    }[outcome]
    return Verdict(claim(2), outcome, because, findings)


def last_token(measures: Measures) -> Verdict:
    """Claim 3: refuted if only models without a mask look ahead; supported if masked ones do."""
    open_runs = [m for m in measures if m["task"] == UNMASKED]
    if not open_runs:
        return _no_wikitext(3)
    masked = [m for m in measures if m["task"] == MASKED]

    def weight(runs: Measures, key: str, pads: str = "pads seen") -> list[float]:
        return per_seed(runs, [m["stripes"][pads][key] for m in runs])

    last = "last token of the line, highest"
    findings = (
        finding("no mask: weight on later keys", weight(open_runs, "later keys"), causal=True),
        finding("causal mask: weight on later keys", weight(masked, "later keys"), causal=True),
        finding("no mask: weight on a line's last token, head with most of it",
                weight(open_runs, last), causal=False),
        finding("no mask: weight on the last position, head with most of it",
                weight(open_runs, "last position, highest"), causal=False),
        finding("no mask: weight of the strongest column, head with most of it",
                weight(open_runs, "strongest column"), causal=False),
        finding("no mask: share of lines where that column is a pad",
                weight(open_runs, "strongest column is a pad"), causal=False),
        finding("no mask: weight on pads", weight(open_runs, "pads"), causal=False),
        finding("share of pads among the keys",
                weight(open_runs, "share of pads among keys"), causal=False),
        finding("no mask, pads hidden: weight on a line's last token, head with most of it",
                weight(open_runs, last, "pads hidden"), causal=True),
        finding("causal mask: weight of earlier tokens on a line's last, head with most of it",
                weight(masked, last), causal=True),
    )  # fmt: skip
    ahead, behind, on_last, _, _, _, on_pads, share, _, masked_last = (f.estimate for f in findings)
    outcome: Outcome = "undecided"
    if masked_last.low > DOMINATES:
        outcome = "supported"
    elif behind.high < 1e-6 and ahead.low > 0.1:
        outcome = "refuted"
    because = _about_stripes(outcome, on_last, on_pads, share)
    return Verdict(claim(3), outcome, because, findings)


def _about_stripes(outcome: Outcome, on_last: Estimate, on_pads: Estimate, share: Estimate) -> str:
    heads = "a head" if on_last.low > DOMINATES else "no head"
    return {
        "supported": "With a causal mask, too, earlier tokens look at the last one.",
        "refuted": "Under a causal mask no earlier token can look at the last one: such a stripe "
        "means that the mask is absent, and then the model reads the future. Without the mask "
        f"the last token of a line dominates {heads} (weight {on_last.mean:.2f} at most); "
        f"{on_pads.mean:.2f} of the weight lies on pads, which are {share.mean:.2f} of the keys.",
        "undecided": "The models without a mask do not look ahead clearly enough.",
    }[outcome]


def converges_faster(measures: Measures) -> Verdict:
    """Claim 10: by paired differences, half-way and at the end, in every pair of nearly equal size.

    Half-way on WikiText-2 is read off the learning curve, which is measured on fewer lines.
    """
    present = {m["task"] for m in measures}
    findings: list[Finding] = []
    ahead, behind, differences = [], [], []
    for task, conv_name, stack_name, key in PAIRS:
        if task not in present:
            continue
        conv, stack = (runs_of(measures, task, name) for name in (conv_name, stack_name))
        end = paired_over_seeds(values(conv, key), values(stack, key))
        early = paired_over_seeds(half_way(conv), half_way(stack))
        where = {"text": "tiny Shakespeare", "wikitext": "WikiText-2"}[task]
        label = f"{where}, {conv_name} minus {stack_name} (nats)"
        findings += [
            Finding(f"{label}: at the end", end, causal=True),
            Finding(f"{label}: half-way", early, causal=True),
        ]
        size = f"with {unlike(conv, stack)} parameters"
        differences.append(f"{where}: {conv_name}, {size}, minus {stack_name} {end.mean:+.2f}")
        ahead.append(end.high < 0 and early.high < 0)
        behind.append(end.low > 0)
    outcome: Outcome = "undecided"
    if all(ahead):
        outcome = "supported"
    elif not any(ahead):
        outcome = "refuted" if any(behind) else "undecided"
    because = {
        "supported": "At nearly equal parameters and equal positions, steps and data the causal "
        "convolution with one attention layer has the lower loss half-way and at the end. ",
        "refuted": "At nearly equal parameters and equal positions, steps and data the causal "
        "convolution is ahead in no pair, and behind in some. ",
        "undecided": f"The causal convolution is ahead in {sum(ahead)} and behind in {sum(behind)} "
        f"of {len(ahead)} pairs of nearly equal parameters. ",
    }[outcome]
    return Verdict(claim(10), outcome, because + "; ".join(differences) + ".", tuple(findings))


def gradients_explode(measures: Measures) -> Verdict:
    """Claim 12: by jumps of the kernel's gradient norm, and by what clipping does to the loss."""
    names = dict.fromkeys(m["name"] for m in measures if m["task"] == "norms")
    settings = [name.removesuffix(", not clipped") for name in names if "not clipped" in name]
    findings: list[Finding] = []
    jumps, gains, beside = [], [], []
    for setting in settings:
        free, clipped = (
            runs_of(measures, "norms", f"{setting}, {word}") for word in ("not clipped", "clipped")
        )
        others = [
            max(_jump(m, n) for n in m["gradient_norms"]["parameters"] if n != CONV) for m in free
        ]
        beside.append(sum(others) / len(others))
        gain = paired_over_seeds(values(clipped, "val_loss"), values(free, "val_loss"))
        if setting.startswith("conv"):
            label = f"{setting}: largest jump of the kernel's gradient norm, not clipped"
            findings.append(finding(label, [_jump(m, CONV) for m in free], causal=False))
            jumps.append(findings[-1].estimate)
            gains.append(gain)
        findings += [
            finding(f"{setting}: largest jump of any other parameter", others, causal=False),
            Finding(f"{setting}: loss clipped minus not clipped (nats)", gain, causal=True),
        ]
    solved = [
        jump.low > EXPLODES and gain.high < 0 for jump, gain in zip(jumps, gains, strict=True)
    ]
    outcome: Outcome = "undecided"
    if any(solved):
        outcome = "supported"
    elif all(jump.high < EXPLODES for jump in jumps):
        outcome = "refuted"
    because = _about_gradients(outcome, jumps, gains, beside)
    return Verdict(claim(12), outcome, because, tuple(findings))


def _about_gradients(
    outcome: Outcome, jumps: Sequence[Estimate], gains: Sequence[Estimate], others: Sequence[float]
) -> str:
    most = max(jump.mean for jump in jumps)
    change = max(abs(gain.mean) for gain in gains)
    beside = (
        f" Other parameters jump up to {max(others):.1f}-fold, and clipping at 1 changes the "
        f"held-out loss of the convolution models by {change:.4f} nats at most. Single precision: "
        "what half precision overflows is not tested."
    )
    return {
        "supported": "The kernel's gradient norm jumps tenfold in every run of a setting, and "
        "clipping lowers the loss there.",
        "refuted": "In no setting does the gradient norm of the kernel jump tenfold over the 20 "
        f"updates before; the largest jump is {most:.1f}-fold on average.",
        "undecided": f"The largest jump of the kernel's gradient norm is {most:.1f}-fold on "
        "average; the seeds do not agree on whether it is tenfold, or clipping does not help.",
    }[outcome] + beside


def _jump(run: dict[str, Any], parameter: str) -> float:
    return run["gradient_norms"]["parameters"][parameter]["jump"]


def _no_wikitext(number: int) -> Verdict:
    because = "WikiText-2 was out of reach: pass the folder that holds it."
    return Verdict(claim(number), "undecided", because, ())
