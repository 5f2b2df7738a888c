"""Exact tests and intervals against enumeration and their definitions."""

from itertools import permutations, product
from math import comb

import pytest

from smearlens.analysis.stats import holm, mcnemar, proportion_interval


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 7), (0, 11)])
def test_mcnemar_equals_every_way_to_split_the_disagreements(only_a, only_b):
    a = [True] * only_a + [False] * only_b + [True, True, False]
    b = [False] * only_a + [True] * only_b + [True, True, False]
    found = mcnemar(a, b)
    n, uneven = only_a + only_b, abs(only_a - only_b)
    splits = [sum(split) for split in product((0, 1), repeat=n)]  # who wins each disagreement
    as_uneven = sum(abs(2 * wins - n) >= uneven for wins in splits)
    assert found.p == pytest.approx(as_uneven / len(splits), rel=1e-12)
    assert (found.only_a, found.only_b, found.n) == (only_a, only_b, n + 3)
    assert found.difference == pytest.approx(sum(a) / len(a) - sum(b) / len(b))
    assert mcnemar(b, a).p == pytest.approx(found.p, rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [([True], [True, False]), ([], [])])
def test_mcnemar_needs_pairs(a, b):
    with pytest.raises(ValueError, match="outcomes on the same examples, got"):
        mcnemar(a, b)


def test_holm_by_hand():
    # smallest first: 4 * 0.01 = 0.04; 3 * 0.012 = 0.036, at least 0.04; 2 * 0.04; 1 * 0.9
    assert holm([0.04, 0.01, 0.9, 0.012]) == pytest.approx([0.08, 0.04, 0.9, 0.04])
    assert holm([0.5, 0.6, 0.7]) == [1.0, 1.0, 1.0]
    assert holm([]) == []
    assert holm([0.03]) == [0.03]


def test_holm_rejects_what_the_step_down_procedure_rejects():
    def rejected(p_values, level):  # Holm 1979: go on until the first that is too large
        out, order = set(), sorted(range(len(p_values)), key=lambda i: p_values[i])
        for rank, i in enumerate(order):
            if p_values[i] > level / (len(p_values) - rank):
                break
            out.add(i)
        return out

    for p_values in permutations([0.001, 0.013, 0.02, 0.021, 0.3]):
        corrected = holm(p_values)
        for level in (0.004, 0.01, 0.05, 0.06, 0.2):
            assert {i for i, p in enumerate(corrected) if p <= level} == rejected(p_values, level)


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan")])
def test_holm_takes_probabilities(wrong):
    with pytest.raises(ValueError, match=r"p_values must be in \[0, 1\], got"):
        holm([0.1, wrong])


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (7, 7), (3, 11), (622, 640)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_clopper_pearson_ends_have_their_tail_probability(successes, trials, level):
    def at_least(k, p):
        return sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k, trials + 1))

    low, high = proportion_interval(successes, trials, level)
    tail = (1 - level) / 2
    if successes == 0:
        assert low == 0
    else:
        assert at_least(successes, low) == pytest.approx(tail, rel=1e-6)
    if successes == trials:
        assert high == 1
    else:
        assert 1 - at_least(successes + 1, high) == pytest.approx(tail, rel=1e-6)
