"""How varied and how repetitive generated texts are, by their n-grams.

N-grams are made of a stated unit: "char", or "word" (what white space separates). All of these
numbers depend on the length of the texts: compare equal lengths. Leaves out what the texts are
about (`analysis.coherence`), and MAUVE, which needs thousands of samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens._explain import explained
from smearlens._extras import extra

Unit = Literal["char", "word"]
Smoothing = Literal["exp", "floor", "add-k", "none"]


@explained
def distinct_n(
    samples: Sequence[str],
    n: int,
    *,
    unit: Unit,
    denominator: Literal["ngrams", "tokens"] = "ngrams",
    per_sample: bool = False,
) -> float | Float[Tensor, " sample"]:
    """Distinct n-grams as a fraction of all n-grams: 1 if none occurs twice.

    >>> distinct_n(["abcabc"], 2, unit="char")
    0.6

    Args:
        samples: the texts
        n: units in an n-gram
        unit: what n-grams are made of
        denominator: "tokens" divides by the number of units, as the source does
        per_sample: of each text alone instead of all pooled

    Returns:
        a fraction; NaN for samples shorter than n. Per sample: [sample]

    Source:
        Li et al. 2016, "A Diversity-Promoting Objective Function": distinct-1, distinct-2
    """
    if denominator not in ("ngrams", "tokens"):
        raise ValueError(f"denominator must be 'ngrams' or 'tokens', got {denominator!r}")
    split, counts = _counted(samples, n, unit)
    whole = _tensor([c.total() for c in counts])
    if denominator == "tokens":
        whole = _tensor([len(units) if c else 0 for units, c in zip(split, counts, strict=True)])
    if per_sample:
        return _tensor([len(c) for c in counts]) / whole
    return float(_tensor([len(set().union(*counts))]) / whole.sum())


@explained
def rep_n(samples: Sequence[str], n: int, *, unit: Unit) -> Float[Tensor, " sample"]:
    """Fraction of a text's n-grams that stood in it before: 1 - distinct / all.

    >>> float(rep_n(["abcabc"], 2, unit="char"))
    0.4

    Args:
        samples: the texts: continuations without their prompts
        n: units in an n-gram
        unit: what n-grams are made of

    Returns:
        one fraction per sample, NaN for samples shorter than n

    Source:
        Welleck et al. 2020, "Neural Text Generation with Unlikelihood Training": seq-rep-n
    """
    _, counts = _counted(samples, n, unit)
    return 1 - _tensor([len(c) for c in counts]) / _tensor([c.total() for c in counts])


@explained
def repetition(samples: Sequence[str], n: int = 4, *, unit: Unit) -> Float[Tensor, " sample"]:
    """Fraction of a text's n-grams that stand in it more than once, their first time included.

    Where `rep_n` counts the copies alone: "abcabc" has ab, bc, ca, ab, bc; two of the five are
    copies (rep_2 = 0.4), four take part in a repetition (0.8).

    Returns:
        one fraction per sample, NaN for samples shorter than n
    """
    _, counts = _counted(samples, n, unit)
    repeated = _tensor([sum(times for times in c.values() if times > 1) for c in counts])
    return repeated / _tensor([c.total() for c in counts])


@explained
def diversity(samples: Sequence[str], *, unit: Unit) -> Float[Tensor, " sample"]:
    """Product over n = 2, 3, 4 of 1 - `rep_n`, text by text: 1 if nothing repeats.

    Returns:
        one fraction per sample, NaN for samples shorter than 4

    Source:
        Su et al. 2022, "A Contrastive Framework for Neural Text Generation"
    """
    return torch.stack([1 - rep_n(samples, n, unit=unit) for n in (2, 3, 4)]).prod(0)


@explained
def self_bleu(
    samples: Sequence[str], n: int = 4, *, unit: Unit, smoothing: Smoothing = "exp"
) -> Float[Tensor, " sample"]:
    """BLEU of each text against all the others, never itself; lower = more diverse.

    Quadratic in the number of samples; by sacrebleu (extra "text").

    Args:
        samples: the texts, at least two
        n: the longest n-grams that count; 1 to n weigh alike
        unit: what n-grams are made of
        smoothing: of orders without a match, as sacrebleu names it. "exp" (its default): the i-th
            such order counts as 1 / 2^i of a match, and a text that shares no unit with the
            others scores 0

    Returns:
        one fraction per sample (sacrebleu shows it times 100), NaN for samples shorter than n

    Raises:
        MissingExtraError: if sacrebleu is not installed
        ValueError: for fewer than two samples, or another smoothing

    Source:
        Zhu et al. 2018, "Texygen", where each text is among its own references, which is a mistake
    """
    if smoothing not in get_args(Smoothing):
        raise ValueError(f"smoothing must be one of {get_args(Smoothing)}, got {smoothing!r}")
    split, _ = _counted(samples, n, unit)
    if len(split) < 2:
        raise ValueError(f"self-BLEU compares samples; give at least 2, got {len(split)}")
    bleu = extra("sacrebleu.metrics.bleu", "text").BLEU(
        tokenize="none",
        max_ngram_order=n,
        smooth_method=smoothing,
        effective_order=True,
        force=True,
    )
    number: dict[str, int] = {}  # sacrebleu splits at white space, which may be a unit
    lines = [" ".join(str(number.setdefault(u, len(number))) for u in units) for units in split]

    def score(i: int) -> float:
        if len(split[i]) < n:
            return math.nan
        return bleu.sentence_score(lines[i], lines[:i] + lines[i + 1 :]).score / 100

    return _tensor([score(i) for i in range(len(lines))])


def _counted(samples: Sequence[str], n: int, unit: str) -> tuple[list[list[str]], list[Counter]]:
    """The units of each sample, and how often each n-gram stands in it."""
    check_texts(samples, "samples")
    if type(n) is not int or n < 1:
        raise ValueError(f"n must be an int, at least 1, got {n!r}")
    if unit not in get_args(Unit):
        raise ValueError(f"unit must be 'char' or 'word', got {unit!r}")
    split = [list(text) if unit == "char" else text.split() for text in samples]
    return split, [Counter(zip(*(u[i:] for i in range(n)), strict=False)) for u in split]


def check_texts(texts: Any, name: str) -> None:
    """Raise unless `texts` is a list of texts, with one at least."""
    listed = isinstance(texts, Sequence) and not isinstance(texts, str)
    if not listed or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{name} must be a list of texts; of a single one write [text]")
    if not texts:
        raise ValueError(f"{name} is empty; give at least one text")


def _tensor(values: Sequence[float | int]) -> Float[Tensor, " sample"]:
    return torch.tensor(values, dtype=torch.float64)
