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
        number: in the registry
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
        6,
        "the largest |average kernel weight| at offset -1 confirms smeared keys",
        "S0",
        "a mean over channels of arbitrary sign is not identifiable",
        "RMS profile with its null; remove the lags of the keys alone",
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
)
