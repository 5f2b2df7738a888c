"""Verdicts of the whole smeared-keys study: rules fixed in advance, read from intervals over seeds.

Claims 1, 6, 8 and 9 keep the rules of the short form (`short_verdicts`). Here are those about
layers, kernels and taps that read ahead. Leaves out padding, masks, convergence and gradients
(`text_verdicts`) and the claims' texts (`claims`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from smearlens.analysis.stats import over_seeds, paired_over_seeds
from smearlens.experiments.claims import Finding, Outcome, Verdict, claim
from smearlens.experiments.rules import enough_seeds, finding, per_seed
from smearlens.experiments.smeared_keys import short_verdicts, text_verdicts
from smearlens.experiments.smeared_keys.short_verdicts import (
    Measures,
    runs_of,
    values,
    without_lags,
)

BARE = ("conv k=3, bare", "conv k=5, bare")  # the last is the write-up's own stack
ALONE = 0.4  # accuracy below which one attention layer alone has not learned the task
AHEAD = ((), (-2,), (-1,), (-2, -1))  # lags of a kernel of 5 that are removed in turn


def judge(measures: Measures, padding: Mapping[str, Mapping[str, float]]) -> list[Verdict]:
    """Verdicts on claims 1-10 and 12.

    Args:
        measures: of every run
        padding: by length, what padding alone does to WikiText-2's lines; empty without them
    """
    repeats = len({m["seed"] for m in measures if m["task"] == "repeats"})
    texts = len({m["seed"] for m in measures if m["task"] == "text"})
    found = [
        replace(short_verdicts.padded_convolution(measures), n_seeds=texts),
        replace(text_verdicts.start_accuracy(measures, padding), n_seeds=texts),
        replace(text_verdicts.last_token(measures), n_seeds=texts),
        replace(first_layer(measures), n_seeds=repeats),
        replace(kernel_range(measures), n_seeds=repeats),
        replace(short_verdicts.average_kernel(measures), n_seeds=repeats),
        replace(future_tap(measures), n_seeds=texts),
        replace(stripe(measures), n_seeds=repeats),
        replace(kernel_sizes(measures), n_seeds=repeats),
        replace(text_verdicts.converges_faster(measures), n_seeds=texts),
        replace(text_verdicts.gradients_explode(measures), n_seeds=texts),
    ]
    return [enough_seeds(v) if v.findings else v for v in found]


def first_layer(measures: Measures) -> Verdict:
    """Claim 4: by the excess of each layer's induction score over its control, and by ablation."""
    runs = runs_of(measures, "repeats", "two layers")
    alone = runs_of(measures, "repeats", "attention only")

    def of(layer: int, score: str, key: str = "score") -> list[float]:
        return [m["layers"][layer][score][key] for m in runs]

    excess = [paired_over_seeds(of(i, "induction"), of(i, "induction", "control")) for i in (0, 1)]
    findings = (
        finding("accuracy, two layers", values(runs, "accuracy"), causal=False),
        Finding("first layer: best induction score minus its control", excess[0], causal=False),
        Finding("second layer: best induction score minus its control", excess[1], causal=False),
        finding("first layer: best duplicate-token score", of(0, "duplicate_token"), causal=False),
        finding("first layer: best previous-token score", of(0, "prev_token"), causal=False),
        finding("first layer without its best induction head: change of accuracy",
                of(0, "without_induction", "effect"), causal=True),
        finding("first layer without its best previous-token head: change of accuracy",
                of(0, "without_prev_token", "effect"), causal=True),
        finding("second layer without its best induction head: change of accuracy",
                of(1, "without_induction", "effect"), causal=True),
        finding("accuracy, one attention layer alone", values(alone, "accuracy"), causal=True),
    )  # fmt: skip
    learned = findings[0].estimate.low > 0.7
    outcome: Outcome = "undecided"
    if learned and excess[0].low > 0.2 and findings[5].estimate.high < -0.1:
        outcome = "supported"
    elif (
        learned and excess[0].high < 0.1 and excess[1].low > 0.1
        and findings[8].estimate.high < ALONE
    ):  # fmt: skip
        outcome = "refuted"
    because = {
        "supported": "The first layer scores beyond its control and the task depends on that head.",
        "refuted": "On repeats of varied period no head of the first layer scores induction beyond "
        "its control, and one layer alone does not learn the task; the second layer's heads do. "
        "Diagonals of a first layer are not induction.",
        "undecided": "The two layers did not learn the task in every run, their scores are not "
        "apart, or one layer alone learns it too.",
    }[outcome]
    return Verdict(claim(4), outcome, because, findings)


def kernel_range(measures: Measures) -> Verdict:
    """Claim 5: refuted if kernels that do smear keys leave the range they were started in."""
    runs = [m for n in ("conv k=3", "conv k=5") for m in runs_of(measures, "repeats", n)]

    def in_bounds(key: str) -> list[float]:
        return per_seed(runs, [m["kernel"][key] / m["kernel"]["bound"] for m in runs])

    def at_one(key: str) -> list[float]:
        return per_seed(runs, [m["kernel"][key][m["kernel"]["lags"].index(1)] for m in runs])

    findings = (
        finding("largest |weight| of an untrained kernel / bound", in_bounds("start_largest"),
                causal=False),
        finding("largest |weight| after training / bound", in_bounds("largest"), causal=False),
        finding("RMS weight at lag 1, untrained", at_one("start_rms"), causal=False),
        finding("RMS weight at lag 1, trained", at_one("rms"), causal=False),
        finding("distance moved / length at the start",
                per_seed(runs, values_in(runs, "kernel", "moved_in_all")), causal=False),
        finding("accuracy", per_seed(runs, values(runs, "accuracy")), causal=True),
        finding("accuracy without the lags of K",
                per_seed(runs, [without_lags(m, "k") for m in runs]), causal=True),
    )  # fmt: skip
    fatal = all(without_lags(m, "k") < m["accuracy"] - 0.5 for m in runs)
    trained = findings[1].estimate
    outcome: Outcome = "undecided"
    if fatal and trained.low > 1.2:
        outcome = "refuted"
    elif fatal and trained.high <= 1.0:
        outcome = "supported"
    because = {
        "supported": "Kernels that smear keys stay within the range of their initialisation.",
        "refuted": "A range of ± 0.04 is what an untrained dense convolution has: uniform within "
        "1/√(3·256) = 0.036, or 1/√(3·200) = 0.041. Kernels that do smear keys (without the lags "
        f"of K the models fail) leave the range they started in, {trained.mean:.1f} times as far.",
        "undecided": "The keys do not depend on their lags in every run, or the range is unclear.",
    }[outcome]
    return Verdict(claim(5), outcome, because, findings)


def _loss_without(runs: Measures, removed: tuple[int, ...]) -> list[float]:
    """Loss of every run when these lags are removed."""
    rows = [next(r for r in m["future_taps"] if r["removed"] == [*removed]) for m in runs]
    return values(rows, "loss")


def values_in(runs: Measures, group: str, key: str) -> list[float]:
    """One measure of a group of measures, of every run."""
    return [m[group][key] for m in runs]


def future_tap(measures: Measures) -> Verdict:
    """Claim 7: refuted if the taps that read ahead supply what causal models lack."""
    text, repeats = (
        runs_of(measures, task, "conv k=5, same padding") for task in ("text", "repeats")
    )
    causal = runs_of(measures, "text", "conv k=5")
    words = ("all taps", "without +2", "without +1", "without both")
    signed = [m["kernel"]["signed_mean"][m["kernel"]["lags"].index(-2)] for m in text]
    findings = (
        finding("influence of later tokens on earlier logits",
                values_in(text, "audit", "influence"), causal=True),
        *(finding(f"tiny Shakespeare, nats per character, {word}", _loss_without(text, lags),
                  causal=True)
          for word, lags in zip(words, AHEAD, strict=True)),
        finding("trained with causal padding", values(causal, "val_loss"), causal=True),
        *(finding(f"repeats, nats per token, {word}", _loss_without(repeats, lags), causal=True)
          for word, lags in zip(words, AHEAD, strict=True)),
        finding("average weight at +2", signed, causal=False),
    )  # fmt: skip
    reads = not any(m["audit"]["passed"] for m in (*text, *repeats))
    lost = paired_over_seeds(_loss_without(text, AHEAD[-1]), _loss_without(text, AHEAD[0]))
    alone = paired_over_seeds(_loss_without(text, AHEAD[1]), _loss_without(text, AHEAD[0]))
    level = paired_over_seeds(_loss_without(text, AHEAD[-1]), values(causal, "val_loss"))
    outcome: Outcome = "undecided"
    if reads and lost.low > 0 and level.high > 0:
        outcome = "refuted"
    elif all(m["audit"]["passed"] for m in (*text, *repeats)):
        outcome = "supported"
    negative = sum(weight < 0 for weight in signed)
    because = {
        "supported": "A kernel with taps ahead of the token learned not to read the future.",
        "refuted": "Padding on both sides lets the model read the future: later tokens change "
        f"earlier logits, and without both taps the loss rises by {lost.mean:.2f} nats, to that of "
        "a model trained with causal padding or above. The tap at +2 keeps nothing out: without it "
        f"alone the loss changes by {alone.mean:+.2f}, and its average weight is negative in "
        f"{negative} of {len(signed)} runs.",
        "undecided": "The padded models do not all read the future, or removing the taps costs "
        "less than causal padding does.",
    }[outcome]
    return Verdict(claim(7), outcome, because, findings)


def stripe(measures: Measures) -> Verdict:
    """Claim 8: the rule of the short form, which the write-up's own stack has to pass as well.

    That is kernel 5 without skip connections. The bare stack with kernel 3 stands beside it.
    """
    verdict = short_verdicts.stripe_without_layers(measures)
    bare = {name: runs_of(measures, "repeats", name) for name in BARE}
    only, two = (
        runs_of(measures, "repeats", name) for name in ("attention only, bare", "two layers, bare")
    )
    findings, said = [*verdict.findings], []
    for name, runs in bare.items():
        findings += _of_bare_stack(name, runs)
        said.append(_where_the_stripe_lies(name, runs))
    own, _ = short_verdicts.stripe_rule(bare[BARE[-1]], only, two)
    outcome = verdict.outcome
    if outcome == "supported" and own != "supported":
        outcome = "undecided"
    because = f"{verdict.because} Without them, as in the write-ups: {'; '.join(said)}."
    return replace(verdict, outcome=outcome, because=because, findings=tuple(findings))


def _of_bare_stack(name: str, runs: Measures) -> list[Finding]:
    """What is shown of a stack without skip connections."""
    found = [
        finding(f"{name}: accuracy", values(runs, "accuracy"), causal=True),
        *(finding(f"{name}: accuracy without lags on {role.upper()}",
                  [without_lags(m, role) for m in runs], causal=True)
          for role in ("k", "v")),
    ]  # fmt: skip
    best = [m["scores"]["induction"]["best"] for m in runs]
    found += [
        finding(f"{name}: induction score of the best head", [b["score"] for b in best],
                causal=False),
        finding(f"{name}: the same head on another example's tokens", [b["control"] for b in best],
                causal=False),
    ]  # fmt: skip
    return found + [
        finding(f"{name}: weight {offset} tokens after an earlier occurrence",
                [m["offsets"][offset]["score"] for m in runs], causal=False)
        for offset in runs[0]["offsets"]
    ]  # fmt: skip


def _where_the_stripe_lies(name: str, runs: Measures) -> str:
    """Accuracy and score of a bare stack, and how far after an earlier occurrence it looks most."""
    places = [max(m["offsets"], key=lambda o: m["offsets"][o]["score"]) for m in runs]
    best = [m["scores"]["induction"]["best"] for m in runs]
    accuracy, score, control = (
        over_seeds(each).mean
        for each in (values(runs, "accuracy"), [b["score"] for b in best],
                     [b["control"] for b in best])
    )  # fmt: skip
    counts = [f"+{place} in {places.count(place)}" for place in sorted(set(places), key=int)]
    return (
        f"{name}: accuracy {accuracy:.2f}, induction score {score:.2f} one token after an earlier "
        f"occurrence (on another example's tokens {control:.2f}); of the places {_span(runs)} most "
        f"weight lies at {', '.join(counts)} of {len(places)} runs"
    )


def _span(runs: Measures) -> str:
    offsets = sorted(map(int, runs[0]["offsets"]))
    return f"{offsets[0]:+d} to {offsets[-1]:+d}"


def kernel_sizes(measures: Measures) -> Verdict:
    """Claim 9: the rule of the short form, with every kernel size of the sweep beside it."""
    verdict = short_verdicts.too_sharp(measures)
    stream = [m for m in measures if m["task"] == "repeats" and m["config"].get("residual")]
    stream = [m for m in stream if m["config"].get("conv_on") == "stream"]
    sweep = []
    for name in dict.fromkeys(m["name"] for m in stream):
        runs = [m for m in stream if m["name"] == name]
        scores = [m["scores"]["induction"]["best"]["score"] for m in runs]
        sweep.append(finding(f"{name}: accuracy", values(runs, "accuracy"), causal=True))
        sweep.append(finding(f"{name}: induction score", scores, causal=True))
    return replace(verdict, findings=(*verdict.findings, *sweep))
