"""Correlations and changes against scipy, closed forms and series whose change is known."""

import math
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from smearlens.analysis.association import (
    association,
    association_within_run,
    partial_correlation,
)
from smearlens.analysis.phase_change import phase_change

EVEN = np.arange(0, 5001, 250)  # 21 checkpoints


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("n", [3, 5, 11])
def test_correlations_equal_those_of_scipy(n, rng):
    x, y = rng.standard_normal((2, n))
    y[0] = y[1]  # a tie
    found = association(x, y)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert found.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert (found.spearman.n, found.spearman.kind) == (n, "spearman")


def test_the_p_value_counts_every_pairing(rng):
    x, y = rng.standard_normal((2, 6))
    observed = abs(np.corrcoef(x, y)[0, 1])
    every = [abs(np.corrcoef(x, y[list(order)])[0, 1]) for order in permutations(range(6))]
    expected = np.mean([r >= observed - 1e-12 for r in every])
    assert association(x, y).pearson.p_value == pytest.approx(expected)
    rising = association([1, 2, 3, 4, 5], [2, 3, 5, 8, 13])
    assert rising.spearman.p_value == pytest.approx(2 / math.factorial(5))


def test_the_interval_is_the_bootstrap_over_runs(rng):
    x = rng.standard_normal(40)
    y = 0.6 * x + rng.standard_normal(40)
    found = association(x, y).pearson
    peer = stats.bootstrap(
        (x, y), lambda a, b: stats.pearsonr(a, b).statistic, paired=True, vectorized=False,
        method="percentile", n_resamples=1000, rng=np.random.default_rng(8),
    ).confidence_interval  # fmt: skip
    assert found.low == pytest.approx(peer.low, abs=0.05)
    assert found.high == pytest.approx(peer.high, abs=0.05)
    narrow = association(x, y, level=0.5).pearson
    assert found.low < narrow.low < found.value < narrow.high < found.high
    assert narrow.p_value == found.p_value  # no hidden randomness


def test_fewer_than_five_runs_describe_and_show_nothing():
    four = association([1, 2, 3, 4], [4, 3, 2, 1])
    for found in (four.spearman, four.pearson):
        assert found.descriptive
        assert (found.value, found.low, found.high) == pytest.approx((-1, -1, 1))
        assert str(found).endswith("n = 4 (descriptive only)")
    five = association([1, 2, 3, 4, 5], [5, 4, 3, 1, 2]).spearman
    assert not five.descriptive
    assert five.high < 0
    assert "descriptive" not in str(five)


def test_a_constant_side_has_no_correlation():
    found = association([0.1] * 6, [1, 2, 3, 4, 5, 6])
    assert math.isnan(found.pearson.value)
    assert math.isnan(found.spearman.p_value)
    assert (found.pearson.low, found.pearson.high) == (-1, 1)


def test_a_shared_trend_is_no_association_within_a_run(rng):
    """Two series that share nothing but their trend: the plain correlation would be near 1."""
    steps = np.unique(np.geomspace(1, 5000, 60).astype(int))
    trend = np.log1p(steps)
    partial, differences = [], []
    for _ in range(50):
        x, y = (slope * trend + rng.standard_normal(len(steps)) for slope in (3, -2))
        assert np.corrcoef(x, y)[0, 1] < -0.9
        found = association_within_run(x, y, steps)
        partial.append(found.partial)
        differences.append(found.differences)
    assert abs(np.mean(partial)) < 0.06
    assert abs(np.mean(differences)) < 0.08
    shared = rng.standard_normal(len(steps))
    found = association_within_run(trend + shared, 5 * trend - 2 * shared, steps)
    assert found.partial == pytest.approx(-1)
    assert found.n == len(steps)


def test_within_a_run_by_hand():
    x, y, steps = [0.0, 2.0, 3.0, 7.0, 8.0], [1.0, 0.0, 2.0, 1.0, 5.0], [0, 1, 5, 9, 30]
    found = association_within_run(x, y, steps)
    dx, dy = [2, 1, 4, 1], [-1, 2, -1, 4]
    assert found.differences == pytest.approx(np.corrcoef(dx, dy)[0, 1])
    assert found.rank_differences == pytest.approx(stats.spearmanr(dx, dy).statistic)
    r = np.corrcoef([x, y, np.log1p(steps)])  # the recursion formula of partial correlation
    expected = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    assert found.partial == pytest.approx(expected)


def test_partial_correlation_equals_that_with_dummy_variables(rng):
    groups = rng.integers(4, size=37).tolist()
    z = rng.standard_normal(37)
    x = z + np.array(groups) + rng.standard_normal(37)
    y = z - 3 * np.array(groups) + rng.standard_normal(37)
    design = np.column_stack([np.eye(4)[groups], z])
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (x, y)]
    found = partial_correlation(x, y, groups=groups, given=[z])
    assert found.value == pytest.approx(np.corrcoef(rest)[0, 1])
    ranks = [stats.rankdata(v) for v in (x, y, z)]
    design = np.column_stack([np.eye(4)[groups], ranks[2]])
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in ranks[:2]]
    found = partial_correlation(x, y, groups=groups, given=[z], kind="spearman")
    assert found.value == pytest.approx(np.corrcoef(rest)[0, 1])
    assert math.isnan(found.p_value)


def test_groups_take_out_what_only_temperature_does(rng):
    """Entropy and quality both follow the temperature and have nothing else in common."""
    temperature = np.repeat([0.5, 0.8, 1.0, 1.3], 25)
    x, y = (sign * temperature + 0.1 * rng.standard_normal(100) for sign in (1, -1))
    assert association(x, y).pearson.high < -0.8
    groups = [("prompt", t) for t in temperature]
    found = partial_correlation(x, y, groups=groups)
    assert found.low < 0 < found.high
    assert found.n == 100


def test_units_are_resampled_whole(rng):
    """Copies of an observation are no new evidence: the interval stays that of the five units."""
    x, y = rng.standard_normal((2, 5))
    units = np.repeat(np.arange(5), 30).tolist()
    found = partial_correlation(np.repeat(x, 30), np.repeat(y, 30), units=units)
    single = partial_correlation(x, y)
    assert found.n == single.n == 5
    assert (found.low, found.high) == pytest.approx((single.low, single.high))
    few = partial_correlation(x, y, units=["a", "b", "b", "a", "c"])
    assert few.descriptive
    assert (few.low, few.high) == (-1, 1)


def test_the_interval_over_units_is_that_of_a_bootstrap_of_whole_units(rng):
    """Units of 2, 3 and 5 unlike observations that share much: a draw takes all of each."""
    sizes = np.array([2, 3, 5] * 4)
    units = np.repeat(np.arange(12), sizes)
    x, y = (rng.standard_normal(12)[units] + 0.5 * rng.standard_normal(40) for _ in range(2))
    found = partial_correlation(x, y, units=units.tolist())
    draws, peer = np.random.default_rng(8), []
    for _ in range(2000):
        rows = [i for unit in draws.integers(12, size=12) for i in range(40) if units[i] == unit]
        peer.append(np.corrcoef(x[rows], y[rows])[0, 1])
    low, high = np.quantile(peer, [0.025, 0.975])
    assert found.n == 12
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)


@pytest.mark.parametrize("where", [700, 2600, 4100])
def test_a_jump_is_found_between_its_checkpoints(where, rng):
    series = np.where(where < EVEN, 3.0, 1.0) + 0.05 * rng.standard_normal((4, 21))
    found = phase_change(series, EVEN)
    assert found.found
    assert found.low <= where <= found.high
    assert found.high - found.low == 250  # the spacing, however well the seeds agree
    assert found.jump == pytest.approx(2, abs=0.15)
    assert f"[{found.low:.0f}, {found.high:.0f}]" in str(found)


def test_segments_are_lines_in_log_step():
    """A kink: the fit is exact, and the change lies beside the checkpoint of the kink.

    Half a doubling away from it, the lines of slope -0.5 and -2.5 are 1 apart.
    """
    steps = np.array([0, 1, 3, 7, 15, 31, 63, 127, 255, 511, 1023])
    x = np.log2(steps + 1)
    found = phase_change(5 - 0.5 * x - 2 * np.maximum(0, x - 6), steps)
    assert (found.low, found.high) in ((31, 63), (63, 127))
    assert found.low < found.step < found.high
    assert found.found
    assert abs(found.jump) == pytest.approx(1)


def test_the_interval_widens_when_seeds_disagree(rng):
    changes = np.array([900, 1600, 2700])[:, None]
    series = np.where(changes < EVEN, 1.0, 0.0) + 0.03 * rng.standard_normal((3, 21))
    found = phase_change(series, EVEN)
    assert found.found
    assert found.low < 900
    assert found.high > 2700
    alone = phase_change(series[1], EVEN)
    assert (alone.low, alone.high, alone.n) == (1500, 1750, 1)


@pytest.mark.parametrize("noise", [0.02, 0.1])
@pytest.mark.parametrize("curve", ["power", "relaxation", "line", "flat", "sigmoid"])
def test_smooth_curves_have_no_change(curve, noise, rng):
    """At most one of 40 series of a smooth curve with noise passes for a change."""
    x = np.log1p(EVEN)
    smooth = {
        "power": (1 + EVEN) ** -0.3,
        "relaxation": np.exp(-EVEN / 400),
        "line": x / 8,
        "flat": 0 * x,
        "sigmoid": 1 / (1 + np.exp(5.5 - x)),
    }[curve]
    series = smooth + noise * rng.standard_normal((40, 21))
    found = phase_change(series, EVEN)
    assert sum(delta > 10 for delta in found.delta_bic) <= 1
    assert not found.found
    assert str(found).startswith("no change beyond a smooth curve")


def test_without_noise_smooth_stays_smooth_and_broken_stays_broken():
    x = np.log1p(EVEN)
    assert not phase_change(3 - x / 4, EVEN).found
    assert not phase_change(np.zeros(21), EVEN).found
    assert phase_change(np.where(EVEN > 1100, 1.0, 0.0), EVEN).found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: association([1, 2, 3], [1, 2]), r"same length, at least 3; got shapes \(3,\)"),
        (lambda: association([1, 2], [1, 2]), "at least 3"),
        (lambda: association([1, 2, math.nan], [1, 2, 3]), "leave out the runs without a value"),
        (lambda: association([1, 2, 3], [1, math.inf, 3]), "leave out the runs without a value"),
        (lambda: association([1, 2, 3], [1, 2, 4], level=95), "for 95 % write 0.95"),
        (
            lambda: association_within_run([1, 2, 3, 4], [1, 2, 3, 5], [0, 1, 1, 2]),
            "4 rising numbers from 0 on",
        ),
        (
            lambda: association_within_run([1, 2, 3, 4], [1, 2, 3, 5], [-1, 0, 1, 2]),
            "4 rising numbers from 0 on",
        ),
        (
            lambda: partial_correlation([1, 2, 3], [3, 1, 2], groups=["a", "b", "c"]),
            "nothing varies within any",
        ),
        (
            lambda: partial_correlation([1, 2, 3], [3, 1, 2], units=["a"]),
            "units needs one label per observation, got 1 for 3",
        ),
        (lambda: phase_change([1.0] * 7, range(7)), "at least 8 checkpoints"),
        (lambda: phase_change([1.0] * 8, [0] * 8), "steps must rise"),
        (lambda: phase_change([1.0] * 8, [*range(7), math.inf]), "steps must rise"),
        (lambda: phase_change([1.0] * 7 + [math.nan], range(8)), "series must be finite"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
