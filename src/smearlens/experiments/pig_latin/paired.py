"""Variants of a study compared on the same held-out words: over seeds, and word by word.

A run is the measures of one cell with `hits`, one "0" or "1" per word, and `validation`, its exact
counts. Leaves out the rules that turn comparisons into verdicts, and the statistics themselves
(`analysis.stats`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from smearlens.analysis.stats import (
    Estimate,
    holm,
    mcnemar,
    over_seeds,
    paired_over_seeds,
    proportion_interval,
)

Runs = Sequence[dict[str, Any]]
FITTED = 0.8  # of the training words: below it a variant was trained too briefly, or cannot learn


@dataclass(frozen=True)
class Comparison:
    """Variant a against variant b.

    Attributes:
        a: name of the first
        b: name of the second
        difference: accuracy of a minus that of b, seed by seed, with its interval over seeds
        better: words that more seeds of a than of b get right
        worse: words that fewer seeds of a get right
        p: exact sign test of these two counts
        p_holm: corrected for all comparisons of the table
    """

    a: str
    b: str
    difference: Estimate
    better: int
    worse: int
    p: float
    p_holm: float

    @property
    def clearly_better(self) -> bool:
        """Over seeds and word by word."""
        return self.difference.low > 0 and self.p_holm < 0.05

    @property
    def clearly_worse(self) -> bool:
        """Over seeds and word by word."""
        return self.difference.high < 0 and self.p_holm < 0.05


def compare(found: Runs, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
    """Each pair of variants, `task/name` against `task/name`, corrected as one table.

    The seeds of a variant share the held-out words, so a word counts once: for the variant of which
    more seeds get it right. That speaks of these words; the interval over seeds speaks of training.
    """
    raw = []
    for a, b in pairs:
        first, second = runs_of(found, a), runs_of(found, b)
        hits = [[sum(column) for column in _columns(runs)] for runs in (first, second)]
        more = [x > y for x, y in zip(*hits, strict=True)]
        fewer = [x < y for x, y in zip(*hits, strict=True)]
        raw.append((paired_over_seeds(accuracies(first), accuracies(second)), mcnemar(more, fewer)))
    corrected = holm([test.p for _, test in raw])
    return [
        Comparison(a, b, difference, test.only_a, test.only_b, test.p, p)
        for (a, b), (difference, test), p in zip(pairs, raw, corrected, strict=True)
    ]


def runs_of(found: Runs, name: str) -> Runs:
    """The runs of `task/name`, by seed.

    Raises:
        ValueError: if there is none
    """
    runs = [m for m in found if f"{m['task']}/{m['name']}" == name]
    if not runs:
        known = sorted({f"{m['task']}/{m['name']}" for m in found})
        raise ValueError(f"no run of {name!r} among {known}")
    return sorted(runs, key=lambda m: m["seed"])


def accuracies(runs: Runs) -> list[float]:
    """Held-out accuracy of every seed."""
    return [m["validation"]["accuracy"] for m in runs]


def accuracy(found: Runs, name: str) -> Estimate:
    """Mean held-out accuracy over seeds."""
    return over_seeds(accuracies(runs_of(found, name)))


def exact_interval(runs: Runs) -> tuple[float, float]:
    """From the lowest to the highest end of the Clopper-Pearson intervals of single seeds.

    All seeds are asked the same words: their counts together are no larger sample of words.
    """
    counts = [m["validation"] for m in runs]
    ends = [proportion_interval(c["right"], c["words"]) for c in counts]
    return min(low for low, _ in ends), max(high for _, high in ends)


def unfit(found: Runs, names: Sequence[str]) -> dict[str, float]:
    """Those of the variants that get less than `FITTED` of their training words right, and it."""
    fitted = {
        name: sum(m["train"]["accuracy"] for m in runs) / len(runs)
        for name in names
        if (runs := runs_of(found, name))
    }
    return {name: accuracy for name, accuracy in fitted.items() if accuracy < FITTED}


def _columns(runs: Runs) -> list[tuple[bool, ...]]:
    return [tuple(hit == "1" for hit in column) for column in zip(*(m["hits"] for m in runs),
                                                                 strict=True)]  # fmt: skip
