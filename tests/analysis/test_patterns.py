"""Statistics of rows without a target: against plain loops and closed forms."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref

from smearlens import (
    attention_entropy,
    attention_span,
    future_mass,
    head_diversity,
    lag_profile,
    prev_token_score,
    self_mass,
    sink_mass,
)
from smearlens.analysis.patterns import Profile, entropies

NAME = "blocks.0.attn"
BATCH, HEADS, LENGTH = 2, 3, 7
PADS = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1, 1]]).bool()
OPTIONS = {
    "plain": {},
    "bos": {"exclude_bos": True},
    "bos kept small": {"exclude_bos": True, "renormalise": False},
    "self": {"exclude_self": True},
    "pads": {"query_mask": PADS, "key_mask": PADS},
    "all": {"key_mask": PADS, "exclude_bos": True, "exclude_self": True},
}
CASES = [*((choice, True) for choice in OPTIONS), ("plain", False), ("pads", False)]


def furthest(b, q, row):
    return float(max(abs(q - k) for k in row))


METRICS = {
    "entropy": (attention_entropy, ref.entropy, lambda b, q, r: math.log(len(r))),
    "entropy in bits": (
        partial(attention_entropy, base=2.0),
        lambda b, q, r: ref.entropy(b, q, r) / math.log(2),
        lambda b, q, r: math.log2(len(r)),
    ),
    "normalised entropy": (
        partial(attention_entropy, normalised=True),
        ref.normalised_entropy,
        lambda b, q, r: 1.0 if len(r) > 1 else None,
    ),
    "distance": (attention_span, ref.distance, furthest),
    "relative distance": (
        partial(attention_span, kind="relative"),
        ref.relative_distance,
        lambda b, q, r: furthest(b, q, r) / q if q else None,
    ),
    "span of 0.9": (
        partial(attention_span, kind="mass"),
        ref.span(0.9),
        lambda b, q, r: max(q - min(r), 0.0) if ref.span(0.9)(b, q, r) is not None else None,
    ),
    "span of 0.5": (partial(attention_span, kind="mass", mass=0.5), ref.span(0.5), None),
    "effective tokens": (
        partial(attention_span, kind="effective"),
        ref.effective_tokens,
        lambda b, q, r: float(len(r)),
    ),
    "sink": (sink_mass, ref.sink, None),
    "self": (self_mass, ref.on_self, None),
    "future": (future_mass, ref.future, lambda b, q, r: float(any(k > q for k in r))),
}


@pytest.mark.parametrize(("choice", "causal"), CASES)
@pytest.mark.parametrize("metric", METRICS)
def test_equals_a_plain_loop_with_every_option(metric, choice, causal):
    pattern = ref.random_pattern(4, BATCH, HEADS, LENGTH, causal=causal)
    pattern[1, :, 2] = np.nan
    options, (ours, theirs, ceiling) = OPTIONS[choice], METRICS[metric]
    leave = ref.leave_of(options, BATCH, causal=causal)
    expected = ref.per_example(pattern, theirs, leave)
    even = ref.per_example(ref.uniform(BATCH, LENGTH, LENGTH, causal=causal), theirs, leave)

    scores = ours({f"{NAME}.hook_pattern": torch.from_numpy(pattern).float()}, **options)
    exact = ours(torch.from_numpy(pattern), **options)

    np.testing.assert_allclose(exact, expected, atol=1e-9)
    np.testing.assert_allclose(scores[NAME], expected, atol=2e-6)
    np.testing.assert_allclose(scores.chance[NAME], ref.nanmean(even), atol=1e-9)
    if ceiling is not None:
        highest = ref.nanmean(ref.per_example(pattern, ceiling, leave))
        np.testing.assert_allclose(scores.maximum[NAME].expand(HEADS), highest, atol=1e-9)
    pooled = ref.pooled(pattern, theirs, leave)
    np.testing.assert_allclose(scores.mean("micro")[NAME], pooled, atol=2e-6)


# Closed forms ------------------------------------------------------------------------------------


def test_uniform_head():
    pattern = torch.from_numpy(ref.uniform(2, 8, 8, causal=True))
    cache = {f"{NAME}.hook_pattern": pattern}
    for metric, value in (
        (attention_entropy, math.lgamma(9) / 8),
        (partial(attention_entropy, base=2.0), math.lgamma(9) / 8 / math.log(2)),
        (partial(attention_entropy, normalised=True), 1.0),
        (attention_span, 7 / 4),
        (partial(attention_span, kind="relative"), 0.5),
        (partial(attention_span, kind="effective"), 4.5),
        (sink_mass, sum(1 / n for n in range(1, 9)) / 8),
        (self_mass, sum(1 / n for n in range(1, 9)) / 8),
        (future_mass, 0.0),
    ):
        scores = metric(cache)
        assert float(scores.mean()[NAME]) == pytest.approx(value, abs=1e-9)
        assert float(scores.chance[NAME]) == pytest.approx(value, abs=1e-9)
    assert math.lgamma(9) / 8 == pytest.approx(1.325575, abs=1e-6)


def test_uniform_head_that_sees_the_future():
    pattern = torch.full((1, 1, 5, 5), 1 / 5)
    assert float(future_mass(pattern)) == pytest.approx(0.4)
    scores = future_mass({"encoder.blocks.0.attn.hook_pattern": pattern})
    (name,) = scores
    assert float(scores.chance[name]) == pytest.approx(0.4)
    assert float(scores.maximum[name]) == pytest.approx(0.8)  # the last query has no future


def test_planted_spans():
    """Rows by hand: the smallest w with 0.9 on q-w..q."""
    pattern = torch.zeros(1, 1, 5, 5)
    pattern[0, 0, 0, 0] = 1  # w = 0
    pattern[0, 0, 1, :2] = torch.tensor([0.1, 0.9])  # w = 0, exactly 0.9
    pattern[0, 0, 2, :3] = torch.tensor([0.2, 0.0, 0.8])  # w = 2
    pattern[0, 0, 3, :4] = torch.tensor([0.05, 0.0, 0.9, 0.05])  # w = 1
    pattern[0, 0, 4, 0] = 1  # w = 4
    for query, width in enumerate([0, 0, 2, 1, 4]):
        only = torch.arange(5) == query
        assert float(attention_span(pattern, kind="mass", query_mask=only)) == width
    assert float(attention_span(pattern, kind="mass", mass=1.0)) == (0 + 1 + 2 + 3 + 4) / 5


def test_a_span_that_does_not_exist_is_left_out():
    """A query that looks ahead holds less than 0.9 on its past at any width."""
    pattern = torch.zeros(1, 1, 3, 3)
    pattern[0, 0, :, 2] = 1
    assert float(attention_span(pattern, kind="mass")) == 0.0  # of the last query alone
    assert attention_span(pattern[:, :, :, [2, 1, 0]], kind="mass").item() == 1.0  # (0 + 1 + 2) / 3
    ahead = torch.arange(3) < 2
    assert attention_span(pattern, kind="mass", query_mask=ahead).isnan().all()


@pytest.mark.parametrize(
    ("options", "name", "unit"),
    [
        ({}, "attention_entropy", "nats"),
        ({"base": 2.0}, "attention_entropy", "log base 2"),
        ({"normalised": True}, "attention_entropy(normalised)", "fraction of log n"),
    ],
)
def test_an_entropy_says_in_which_unit_it_is(options, name, unit):
    scores = attention_entropy({"a.hook_pattern": torch.eye(3).expand(1, 2, 3, 3)}, **options)
    assert (scores.name, scores.unit) == (name, unit)


def test_entropy_of_zero_weights_is_zero():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [1e-40, 1.0, 0.0]])
    found = entropies(weights)
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(2), 0.0]))


# Profiles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "causal"), CASES)
@pytest.mark.parametrize("max_lag", [1, 3, 40])
def test_lag_profile_equals_a_plain_loop(choice, causal, max_lag):
    pattern = ref.random_pattern(5, BATCH, HEADS, LENGTH, causal=causal)
    pattern[1, :, 2] = 0
    options, last = OPTIONS[choice], min(max_lag, LENGTH - 1)
    lags = list(range(0 if causal else -last, last + 1))
    leave = ref.leave_of(options, BATCH, causal=causal)
    expected = ref.lag_profile(pattern, lags, leave)

    alone = lag_profile(torch.from_numpy(pattern), max_lag=max_lag, **options)
    assert alone.lags == lags
    np.testing.assert_allclose(alone.values, expected, atol=1e-9)
    share = ref.lag_profile(pattern, lags, leave, everywhere=True)
    np.testing.assert_allclose(alone.share, share, atol=1e-9)
    cache = {f"{n}.hook_pattern": torch.from_numpy(pattern) for n in ("a", "b")}
    by_layer = lag_profile(cache, max_lag=max_lag, **options)
    assert list(by_layer) == ["a", "b"]
    mean = np.stack([ref.nanmean(expected[..., i]) for i in range(len(lags))], -1)
    np.testing.assert_allclose(by_layer["b"].mean(), mean, atol=1e-9)
    np.testing.assert_allclose(by_layer["b"].at(1), mean[:, lags.index(1)], atol=1e-9)


def test_profile_of_a_sink_and_of_a_fixed_lag():
    sink = torch.zeros(1, 1, 6, 6)
    sink[..., 0] = 1
    profile = lag_profile(sink)
    assert profile.mean()[0].tolist() == pytest.approx([1 / n for n in (6, 5, 4, 3, 2, 1)])
    assert profile.share[0, 0].tolist() == pytest.approx([1 / 6] * 6)  # each query at its own lag
    back = torch.zeros(1, 1, 6, 6)
    back[0, 0, range(2, 6), range(4)] = 1
    back[0, 0, :2, 0] = 1
    assert float(lag_profile(back).at(2)) == 1
    assert float(lag_profile(back).share[0, 0, 2]) == pytest.approx(4 / 6)
    assert repr(profile).splitlines()[::6] == [" lag   head 0", "   5    1.000"]
    assert repr(lag_profile(torch.eye(40).expand(1, 9, 40, 40))).endswith(
        "… of 9 heads, lags 0..32: .mean()"
    )
    with pytest.raises(ValueError, match=r"lag 6 was not profiled; lags: 0..5"):
        profile.at(6)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(0, 999), st.booleans())
def test_the_share_sums_to_one_and_the_profile_holds_the_other_statistics(length, seed, causal):
    pattern = torch.from_numpy(ref.random_pattern(seed, 2, 3, length, causal=causal))
    profile: Profile = lag_profile(pattern, max_lag=10)
    torch.testing.assert_close(profile.share.sum(-1), torch.ones(2, 3, dtype=torch.float64))
    lags = torch.tensor(profile.lags).double()
    torch.testing.assert_close(profile.share @ lags.abs(), attention_span(pattern))
    ahead = profile.share[..., lags < 0].sum(-1)
    torch.testing.assert_close(ahead, future_mass(pattern))
    own = profile.values[..., profile.lags.index(0)]
    torch.testing.assert_close(own, self_mass(pattern))
    if length > 1:
        before = profile.values[..., profile.lags.index(1)]
        torch.testing.assert_close(before, prev_token_score(pattern))


# Diversity of heads ------------------------------------------------------------------------------


@pytest.mark.parametrize(("choice", "causal"), CASES)
def test_head_diversity_equals_a_plain_loop(choice, causal):
    pattern = ref.random_pattern(6, BATCH, HEADS, LENGTH, causal=causal)
    pattern[0, 1, 4] = np.nan  # of one head: the row counts for none
    leave = ref.leave_of(OPTIONS[choice], BATCH, causal=causal)
    for kind, reference in (("js", ref.head_diversity), ("variance", ref.head_variance)):
        found = head_diversity(torch.from_numpy(pattern), kind=kind, **OPTIONS[choice])
        np.testing.assert_allclose(found, reference(pattern, leave), atol=1e-9)
        cache = {f"{NAME}.hook_pattern": torch.from_numpy(pattern).float()}
        by_layer = head_diversity(cache, kind=kind, **OPTIONS[choice])
        np.testing.assert_allclose(by_layer[NAME], found, atol=1e-6)


def test_diversity_of_equal_disjoint_and_single_heads():
    identity, previous = torch.eye(8), torch.zeros(8, 8)
    previous[range(1, 8), range(7)] = 1
    previous[0, 0] = 1
    disjoint = torch.stack((identity, previous))[None]
    assert float(head_diversity(disjoint)) == pytest.approx(1.0)
    random = torch.from_numpy(ref.random_pattern(0, 2, 1, 8))
    same = random.expand(-1, 3, -1, -1)
    for kind in ("js", "variance"):
        assert head_diversity(same, kind=kind).abs().max() < 1e-12
        assert head_diversity(random, kind=kind).isnan().all()


def test_variance_shrinks_with_the_context_and_divergence_does_not():
    short, long = (torch.from_numpy(ref.random_pattern(0, 1, 4, n)) for n in (9, 90))
    ratio = {
        k: head_diversity(long, kind=k) / head_diversity(short, kind=k) for k in ("js", "variance")
    }
    assert float(ratio["variance"]) < 0.3
    assert 0.8 < float(ratio["js"]) < 1.5


# Properties --------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 9), st.integers(0, 999), st.booleans())
def test_bounds(length, seed, causal):
    pattern = torch.from_numpy(ref.random_pattern(seed, 2, 3, length, causal=causal))
    cache = {f"{NAME}.hook_pattern": pattern}
    for metric, _, ceiling in METRICS.values():
        scores = metric(cache)
        assert bool((scores[NAME] >= -1e-9).all())
        if ceiling is not None:
            assert bool((scores.mean()[NAME] <= scores.maximum[NAME] + 1e-9).all())
    js = head_diversity(pattern)
    assert bool(((js >= 0) & (js <= 1)).all())


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(0, 999))
def test_permuting_heads_and_examples_permutes_the_statistics(length, seed):
    pattern = torch.from_numpy(ref.random_pattern(seed, 3, 2, length))
    for metric, _, _ in METRICS.values():
        expected = metric(pattern)[[2, 0, 1]].flip(1)
        torch.testing.assert_close(
            metric(pattern[[2, 0, 1]].flip(1)), expected, equal_nan=True, rtol=0, atol=0
        )
    torch.testing.assert_close(
        head_diversity(pattern[[2, 0, 1]].flip(1)), head_diversity(pattern)[[2, 0, 1]],
        equal_nan=True,
    )  # fmt: skip


def test_what_cross_attention_can_be_asked():
    layer = "decoder.blocks.0.cross_attn"
    pattern = ref.random_pattern(3, 2, 3, 5, 7, causal=False)
    cache = {f"{layer}.hook_pattern": torch.from_numpy(pattern)}
    leave = ref.Leave(causal=False)
    for metric, value in (
        (attention_entropy, ref.entropy),
        (partial(attention_entropy, normalised=True), ref.normalised_entropy),
        (partial(attention_span, kind="effective"), ref.effective_tokens),
        (sink_mass, ref.sink),
    ):
        scores = metric(cache)
        np.testing.assert_allclose(scores[layer], ref.per_example(pattern, value, leave), atol=1e-9)
    assert float(sink_mass(cache).chance[layer]) == pytest.approx(1 / 7)
    found = head_diversity(cache)[layer]
    np.testing.assert_allclose(found, ref.head_diversity(pattern, leave), atol=1e-9)
