"""The registry of claims: what five student write-ups state, and what a verdict on it looks like.

A claim is judged by a causal test over several seeds, beside the correlational reading that led to
it. Leaves out the tests: each lives with the study that runs it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from smearlens.analysis.stats import Estimate

Outcome = Literal["supported", "refuted", "undecided"]

WRITEUPS = {
    "S0": "Conv-Attn against Attn-Attn on WikiText-2, kernel 5 (English)",
    "S1": "the same study (Russian)",
    "S2": "Conv-Attn against Attn-Attn on WikiText-2, kernel 3 (Russian)",
    "S3": "Pig Latin encoder-decoder transformer and Mamba",
    "S4": "evolution of attention patterns in character models",
}


@dataclass(frozen=True)
class Claim:
    """A statement from a write-up.

    Attributes:
        number: in the registry; 0 for a claim of a study's own
        statement: as a testable sentence
        source: which write-up, a key of `WRITEUPS`
        suspicion: why the figure behind it may be an artefact
        test: the causal test that settles it
    """

    number: int
    statement: str
    source: str
    suspicion: str
    test: str


@dataclass(frozen=True)
class Finding:
    """One number behind a verdict: what it is and its mean, interval and number of seeds."""

    label: str
    estimate: Estimate
    causal: bool  # from an intervention, not from looking

    def __str__(self) -> str:
        return f"{self.label}: {self.estimate}"


@dataclass(frozen=True)
class Verdict:
    """What the runs say about a claim."""

    claim: Claim
    outcome: Outcome
    because: str
    findings: tuple[Finding, ...]
    n_seeds: int = 0  # independent seeds behind it

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for `result.json`."""
        return asdict(self)


def claim(number: int) -> Claim:
    """The claim of that number."""
    for each in CLAIMS:
        if each.number == number:
            return each
    raise ValueError(f"no claim {number}; registered: {[each.number for each in CLAIMS]}")


CLAIMS = (
    Claim(
        1,
        "Conv-Attn with kernel 3 reaches loss 0.0070 and accuracy 99.81 % on next-token prediction",
        "S2",
        "a perplexity of 1.007 on WikiText-2 is impossible: a padded convolution reads the future",
        "audit for leaks; loss on independent tokens against ln V; retrain with causal padding",
    ),
    Claim(
        2,
        "training starts at accuracy 81.94 % (Conv-Attn) and 67.60 % (Attn-Attn)",
        "S2",
        "36,718 lines cut to 128 tokens are about half padding, and padding was counted",
        "count targets and padding; the same runs with padding counted and not; constant predictor",
    ),
    Claim(
        3,
        "the last token dominates attention: vertical stripes",
        "S2",
        "under a causal mask no earlier query can attend to the last token: an absent mask, "
        "or padding",
        "weight on later keys, weight on padding and on the first key, with and without a "
        "causal mask",
    ),
    Claim(
        4,
        "layer 1 of Attn-Attn has classic induction heads (A-B-A)",
        "S2",
        "no earlier layer wrote the previous token into its keys; it may match equal tokens "
        "instead",
        "induction against duplicate-token score of every layer; varied periods; ablate its "
        "best head",
    ),
    Claim(
        5,
        "kernel weights within [-0.04, 0.04] match smeared keys",
        "S2",
        "the default initialisation of a convolution is uniform within 1/√(3d): 0.036 at d = 256",
        "the weights' range against an untrained kernel; how far training moved them",
    ),
    Claim(
        6,
        "the largest |average kernel weight| at offset -1 confirms smeared keys",
        "S0",
        "a mean over channels of arbitrary sign is not identifiable",
        "RMS profile with its null; remove the lags of the keys alone",
    ),
    Claim(
        7,
        "the negative kernel weight at +2 suppresses the future and enforces causality",
        "S0",
        "a tap at +2 exists only because the padding is not causal: it reads the future",
        "remove the future taps one by one: the loss returns to the causal level",
    ),
    Claim(
        8,
        "a depthwise convolution forms an induction stripe without additional attention layers",
        "S0",
        "the stripe was never scored, and a leak makes induction unnecessary",
        "causal convolution + 1 attention layer against 1 and 2 attention layers, varied periods, "
        "induction score with control, lags removed from Q, K, V one at a time",
    ),
    Claim(
        9,
        "kernel 3 is too sharp, the stripe nearly disappears; kernel 5 resolves it",
        "S0",
        "with 'same' padding the next token sits in a tap of the kernel and attention has no work",
        "kernel size x causal or 'same' padding x seeds, induction score and accuracy",
    ),
    Claim(
        10,
        "Conv-Attn converges faster than Attn-Attn and ends at a lower loss (5.98 against 6.99)",
        "S0",
        "different depth, parameters and position information; one seed",
        "equal parameters, positions, steps and data; paired difference over seeds",
    ),
    Claim(
        11,
        "the shift head of Attn-Attn is better on rare long-range dependencies",
        "S0",
        "no table is behind it, and the two write-ups word it differently",
        "loss on tokens that an earlier bigram predicts, by distance and by frequency, paired"
        " by token",
    ),
    Claim(
        12,
        "gradients of the convolution explode; clipping solves it",
        "S0",
        "no norms are shown",
        "gradient norm of every parameter at every step, with and without clipping",
    ),
    Claim(
        13,
        "one encoder head holds the previous token, and cross attention matches it",
        "S3",
        "three words of one small model",
        "previous-token score of every encoder head, alignment of cross attention with the "
        "rule's, and a patch of that head into the keys of cross attention",
    ),
    Claim(
        14,
        "the embedding of [SOS] is close to the first vowel",
        "S3",
        "read off a picture",
        "cosine against that of random tokens; exchange the embedding",
    ),
    Claim(
        15,
        "leaving out position embeddings costs 40 %, training them gains 5.83 %",
        "S3",
        "two relative differences on different bases: 33.3 and 5.3 points",
        "differences in points on one base, paired over seeds, with intervals",
    ),
    Claim(
        16,
        "8 heads, width 64 and 2 + 2 layers are best; the small model beats the large one",
        "S3",
        "about 100 validation words: one standard error is 3 points; averages over unequal batches",
        "exact counts, Clopper-Pearson intervals, paired tests, Holm over the table",
    ),
    Claim(
        17,
        "bilinear discretisation beats zero-order hold",
        "S3",
        "two tables of the write-up disagree, and bilinear decay is negative where Δ|A| > 2",
        "discretisations x seeds on equal terms; the share of negative decays; the same clamped",
    ),
    Claim(
        18,
        "with A = -1 the weight of token s at t is exp(-ΣΔ)",
        "S3",
        "the derivation loses its index range",
        "the closed form, summed from s + 1, against the states of the trained model",
    ),
    Claim(
        19,
        "a selective Δ is not needed: a constant one reaches 0.839 against 0.833",
        "S3",
        "two of the four rows are marked NA",
        "all four combinations of A and Δ with seeds; freeze Δ at its mean after training",
    ),
    Claim(
        20,
        "all of the word's context sits in the state at [EOS]",
        "S3",
        "a kernel of 16 taps covers most words and their translation: the convolution can decode",
        "exchange the state at [EOS] between words; no writes after it; cut the convolution "
        "at it; retrain with kernel 4",
    ),
    Claim(
        21,
        "Mamba behaves exactly like a recurrent network",
        "S3",
        "every state-space layer is a linear one; put so it cannot fail",
        "exchange the state at every position; parity, which a nonlinear recurrence learns",
    ),
    Claim(
        22,
        "a parallel scan loses precision with length",
        "S3",
        "a log-space scan with log 0 := -12",
        "error of every scan against float64 by length, precision and scale of the input",
    ),
    Claim(
        23,
        "a tuned Mamba is slightly better than a tuned transformer",
        "S3",
        "trained on files of different size, one seed, about 100 words",
        "both families on both files, paired by word, several seeds",
    ),
    Claim(
        24,
        "attention becomes focused in training: its entropy falls",
        "S4",
        "it starts uniform, so it can only fall",
        "normalised entropy on held-out text over training, several seeds, with the step of "
        "the best loss",
    ),
    Claim(
        25,
        "layers specialise at about iteration 2,000",
        "S4",
        "logged every 500 iterations, one seed, no test",
        "change point with an interval over seeds, against a smooth curve by BIC",
    ),
    Claim(
        26,
        "layers 4-6 are most similar, and low layers are alike",
        "S4",
        "causal masks alone make patterns similar: random heads have cosine 0.5 to 0.7",
        "centred cosine and Jensen-Shannon similarity of every pair beside their nulls",
    ),
    Claim(
        27,
        "layer similarity and attention span correlate with validation loss",
        "S4",
        "everything trends with time; three data sets",
        "over seeds, in first differences, and with the step partialled out",
    ),
    Claim(
        28,
        "tracking layer similarity goes with a slightly better validation loss",
        "S4",
        "1.4639 against 1.4682 while only logging changed: this is the noise",
        "the log of the losses with and without tracking, byte by byte; spread over seeds",
    ),
    Claim(
        29,
        "good samples have balanced entropy, poor ones a few dominant heads",
        "S4",
        "quality and entropy share length and temperature",
        "partial correlation within prompt and temperature; attention sharpened or flattened,"
        " quality again",
    ),
    Claim(
        30,
        "tracking attention has minimal impact",
        "S4",
        "420 against 411, 424 against 388 tokens per second",
        "cost of tracking as a share of training; nothing attached is bit-identical",
    ),
)
