"""Properties of intervals and tests, correlations, changes over time and paths of losses."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binom, pearsonr, spearmanr
from tests.properties.strategies import fewer, generator, seeds, sizes

from smearlens.analysis.association import (
    association,
    association_within_run,
    partial_correlation,
)
from smearlens.analysis.loss_paths import loss_paths
from smearlens.analysis.phase_change import phase_change
from smearlens.analysis.stats import (
    bootstrap_interval,
    holm,
    mcnemar,
    over_seeds,
    paired_over_seeds,
    proportion_interval,
)

close = torch.testing.assert_close
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))
series = st.lists(numbers, min_size=2, max_size=9)
levels = st.floats(0.5, 0.99)


@fewer(0.25)
@given(sizes(2, 9), sizes(1, 3), st.floats(0.1, 5), st.floats(-5, 5), seeds)
def test_a_bootstrap_interval_follows_scale_and_shift_and_holds_the_mean(
    n, heads, scale, shift, seed
):
    values = torch.randn(n, heads, generator=generator(seed), dtype=torch.float64)
    found = bootstrap_interval(values)
    close(bootstrap_interval(scale * values + shift), scale * found + shift)
    mean = values.mean(0)
    assert bool(((found[:, 0] <= mean) & (mean <= found[:, 1])).all())
    assert bool((found[:, 0] >= values.min(0).values - 1e-12).all())
    with_gap = torch.cat([values, torch.full((1, heads), torch.nan)])
    close(bootstrap_interval(with_gap), found)


@given(series, numbers, st.floats(0.1, 9), levels)
def test_an_interval_over_seeds_follows_scale_and_shift(values, shift, scale, level):
    plain = over_seeds(values, level)
    moved = over_seeds([scale * v + shift for v in values], level)
    for name in ("mean", "low", "high"):
        expected = scale * getattr(plain, name) + shift
        assert getattr(moved, name) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    half = plain.high - plain.mean
    assert plain.mean - plain.low == pytest.approx(half, abs=1e-9)
    wider = over_seeds(values, (1 + level) / 2)
    assert wider.high - wider.mean >= half - 1e-12
    other = list(reversed(values))
    assert paired_over_seeds(values, other, level) == over_seeds(
        [a - b for a, b in zip(values, other, strict=True)], level
    )


@given(sizes(1, 40), sizes(0, 40), levels)
def test_an_exact_interval_is_where_the_tails_reach_the_level(trials, successes, level):
    successes = min(successes, trials)
    low, high = proportion_interval(successes, trials, level)
    tail = (1 - level) / 2
    assert (
        (low == 0)
        if successes == 0
        else binom.sf(successes - 1, trials, low) == pytest.approx(tail)
    )
    assert (
        (high == 1)
        if successes == trials
        else binom.cdf(successes, trials, high) == pytest.approx(tail)
    )
    other = proportion_interval(trials - successes, trials, level)
    assert (1 - other[1], 1 - other[0]) == pytest.approx((low, high))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=25))
def test_two_classifiers_are_compared_where_they_disagree(pairs):
    a, b = zip(*pairs, strict=True)
    found, swapped = mcnemar(a, b), mcnemar(b, a)
    assert found.p == swapped.p
    assert found.difference == -swapped.difference == (sum(a) - sum(b)) / len(pairs)
    k, n = min(found.only_a, found.only_b), found.only_a + found.only_b
    two_sided = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    assert found.p == pytest.approx(two_sided if n else 1.0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), seeds)
def test_corrected_p_values_keep_their_order_and_do_not_fall(values, seed):
    found = holm(values)
    m = len(values)
    assert all(c >= p for c, p in zip(found, values, strict=True))
    assert all(c <= min(1, m * p) + 1e-12 for c, p in zip(found, values, strict=True))
    ranked = sorted(range(m), key=lambda i: values[i])
    corrected = [found[i] for i in ranked]
    assert corrected == sorted(corrected)
    assert corrected[0] == min(1.0, m * values[ranked[0]])
    order = torch.randperm(m, generator=generator(seed)).tolist()
    assert holm([values[i] for i in order]) == [found[i] for i in order]


pairs_of_series = st.integers(4, 6).flatmap(
    lambda n: st.tuples(*(st.lists(numbers, min_size=n, max_size=n, unique=True),) * 2)
)


@fewer(0.1)
@given(pairs_of_series, st.floats(0.1, 9), numbers)
def test_correlations_over_runs_are_those_of_scipy_and_ignore_units(pair, scale, shift):
    x, y = pair
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("smearlens.analysis.association.RESAMPLES", 9)
        found, swapped = association(x, y), association(y, x)
        moved = association([-scale * v + shift for v in x], y)
    assert found.pearson.value == pytest.approx(pearsonr(x, y)[0], abs=1e-9)
    assert found.spearman.value == pytest.approx(spearmanr(x, y)[0], abs=1e-9)
    assert found.pearson.descriptive == (len(x) < 5)
    assert -1 <= found.pearson.low <= found.pearson.high <= 1
    assert 0 < found.pearson.p_value <= 1
    assert moved.pearson.value == pytest.approx(-found.pearson.value, abs=1e-7)
    assert swapped.spearman.p_value == pytest.approx(found.spearman.p_value)


@given(st.integers(4, 9), st.floats(-3, 3), st.floats(-3, 3), seeds)
def test_a_trend_in_log_step_does_not_enter_the_partial_correlation(n, one, other, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n))
    steps = np.cumsum(rng.integers(1, 50, n))
    trend = np.log1p(steps)
    plain = association_within_run(x, y, steps)
    moved = association_within_run(x + one * trend + 2, y + other * trend - 1, steps)
    assert moved.partial == pytest.approx(plain.partial, abs=1e-6)
    assert plain.differences == pytest.approx(pearsonr(np.diff(x), np.diff(y))[0], abs=1e-9)
    assert plain.n == n


@fewer(0.25)
@given(st.integers(6, 12), st.floats(-3, 3), seeds)
def test_a_partial_correlation_is_that_of_residuals_within_groups(n, effect, seed):
    rng = np.random.default_rng(seed)
    groups = [i % 2 for i in range(n)]
    x, y, z = rng.normal(size=(3, n))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("smearlens.analysis.association.RESAMPLES", 3)
        plain = partial_correlation(x, y, groups=groups, given=[z])
        level = np.where(groups, 7.0, -2.0)
        moved = partial_correlation(x + level + effect * z, 3 * y - level, groups=groups, given=[z])
    assert moved.value == pytest.approx(plain.value, abs=1e-7)
    design = np.column_stack([np.equal(groups, 0), np.equal(groups, 1), z]).astype(float)
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    assert plain.value == pytest.approx(pearsonr(*rest)[0], abs=1e-7)


@fewer(0.1)
@given(sizes(10, 16), st.floats(0.1, 9), st.floats(-9, 9), sizes(3, 12), seeds)
def test_a_change_is_found_where_it_was_planted_whatever_the_units(n, scale, shift, where, seed):
    where = 3 + where % (n - 5)
    rng = np.random.default_rng(seed)
    steps = np.cumsum(rng.integers(1, 30, n)) - 1
    y = rng.normal(size=n) * 0.01
    y[where:] += 5.0
    found = phase_change(y, steps)
    assert (found.low, found.high) == (steps[where - 1], steps[where])
    assert found.low <= found.step <= found.high
    assert found.jump == pytest.approx(5, abs=0.5)
    moved = phase_change(-scale * y + shift, steps)
    assert (moved.low, moved.high) == (found.low, found.high)
    assert moved.jump == pytest.approx(-scale * found.jump, rel=1e-6)
    assert moved.delta_bic[0] == pytest.approx(found.delta_bic[0], rel=1e-4, abs=1e-4)


@fewer(0.5)
@given(sizes(3, 8), sizes(3, 6), sizes(1, 3), seeds)
def test_paths_of_losses_are_projections_and_ignore_a_common_shift(n, tokens, components, seed):
    g = generator(seed)
    losses = {
        name: torch.randn(rows, tokens, generator=g, dtype=torch.float64)
        for name, rows in (("a", n), ("b", n + 2))
    }
    found = loss_paths(losses, n_components=components)
    rows = torch.cat(list(losses.values()))
    paths = torch.cat(list(found.paths.values()))
    close(paths, (rows - rows.mean(0)) @ found.components.T)
    close(found.components @ found.components.T, torch.eye(components, dtype=torch.float64))
    variance = torch.linalg.eigvalsh((rows - rows.mean(0)).T @ (rows - rows.mean(0))).flip(0)
    close(found.explained, variance[:components] / variance.sum())
    moved = loss_paths({name: x + 3 for name, x in losses.items()}, n_components=components)
    assume(bool((found.components.sum(1).abs() > 1e-6).all()))
    for name, path in found.paths.items():
        close(moved.paths[name], path, atol=1e-8, rtol=1e-7)
