"""Properties of what states keep and of what kernels carry."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, rules, scans, seeds, sizes

from smearlens.analysis.kernels import kernel_profile
from smearlens.analysis.smearing import smear_coefficient, smear_evidence
from smearlens.analysis.states import (
    half_life,
    memory_profile,
    retention,
    state_boundary,
    write_weight,
)
from smearlens.nn.discretize import discretize

close = torch.testing.assert_close


def steps_of(case, rule):
    _, delta, A, B, _, _ = case
    A_bar, B_bar = discretize(delta, A, B, rule)
    return A_bar.expand_as(B_bar).contiguous(), B_bar


@given(scans(), rules, sizes(0, 12), sizes(0, 12))
def test_retention_is_a_product_over_the_way(case, rule, first, second):
    A_bar, B_bar = steps_of(case, rule)
    pos = A_bar.shape[1]
    near, far = sorted((first % pos, second % pos))
    kept = retention(A_bar, far)
    assert kept.shape[1] == far + 1
    for s in range(far + 1):
        close(kept[:, s], A_bar[:, s + 1 : far + 1].abs().prod(1))
    close(kept[:, : near + 1], retention(A_bar, near) * kept[:, near : near + 1])
    close(retention(A_bar, far - pos), kept)
    close(write_weight(A_bar, B_bar, far), kept * B_bar[:, : far + 1].abs())


@fewer(0.5)
@given(scans(), rules)
def test_a_half_life_is_the_first_lag_that_keeps_less_than_half(case, rule):
    A_bar, _ = steps_of(case, rule)
    pos = A_bar.shape[1]
    found = half_life(A_bar)
    for s in range(pos):
        kept = A_bar[:, s + 1 :].abs().cumprod(1)
        gone = kept < 0.5
        lag = torch.where(gone.any(1), gone.double().argmax(1) + 1.0, torch.inf) if s + 1 < pos \
            else torch.full_like(found[:, s], torch.inf)  # fmt: skip
        close(found[:, s], lag.to(found))


@fewer(0.25)
@given(scans(), rules, st.booleans(), seeds)
def test_a_memory_profile_averages_write_weights_by_lag(case, rule, masked, seed):
    A_bar, B_bar = steps_of(case, rule)
    batch, pos = A_bar.shape[:2]
    mask = torch.rand(batch, pos, generator=generator(seed)) < (0.7 if masked else 2)
    found = memory_profile(A_bar, B_bar, mask=mask if masked else None)
    for lag in range(pos):
        pairs = mask[:, lag:] & mask[:, : pos - lag]
        weights = torch.stack(
            [write_weight(A_bar, B_bar, t)[:, t - lag].mean(-1) for t in range(lag, pos)], 1
        )
        expected = (weights * pairs[..., None]).sum(1) / pairs.sum(1, keepdim=True)
        close(found[..., lag], expected, equal_nan=True)
    close(memory_profile(A_bar, B_bar, max_lag=0)[..., 0], B_bar.abs().mean((1, 3)))


@given(scans(), rules, sizes(0, 12), seeds)
def test_a_boundary_has_two_sides(case, rule, where, seed):
    A_bar, B_bar = steps_of(case, rule)
    batch, pos = A_bar.shape[:2]
    boundary = (torch.arange(batch) + where) % pos
    mask = torch.rand(batch, pos, generator=generator(seed)) < 0.8
    found = state_boundary(A_bar, B_bar, boundary, mask=mask)
    writes = B_bar.abs().mean(-1)
    for b in range(batch):
        e = int(boundary[b])
        after, before = writes[b, e + 1 :][mask[b, e + 1 :]], writes[b, :e][mask[b, :e]]
        close(found.write_ratio[b], after.mean(0) / before.mean(0), equal_nan=True)
        kept = A_bar[b, e + 1 :][mask[b, e + 1 :]].abs().prod(0).mean(-1)
        close(found.retention[b], kept)


@fewer(0.25)
@given(sizes(2, 7), sizes(1, 5), st.permutations(range(5)), seeds)
def test_a_kernel_profile_ignores_signs_of_channels_and_order_of_taps(channels, taps, order, seed):
    g = generator(seed)
    kernel = torch.randn(channels, taps, generator=g, dtype=torch.float64)
    order = [tap for tap in order if tap < taps]
    sign = torch.randint(2, (channels, 1), generator=g) * 2 - 1
    lags = list(range(-1, taps - 1))
    plain = kernel_profile(kernel, lags=lags)
    moved = kernel_profile((sign * kernel)[:, order], lags=[lags[tap] for tap in order])
    assert moved.lags == plain.lags == lags
    for name in ("rms", "share", "mean_abs", "low", "high"):
        close(getattr(moved, name), getattr(plain, name))
    close(float(plain.share.sum()), 1.0)
    close(plain.future_share, float(kernel[:, 0].square().sum() / kernel.square().sum()))
    assert bool((plain.low <= plain.rms + 1e-9).all() and (plain.rms <= plain.high + 1e-9).all())


@given(sizes(1, 3), sizes(3, 9), sizes(1, 3), st.floats(-2, 2), st.floats(-2, 2), seeds)
def test_a_planted_smear_is_found(batch, pos, heads, a, b, seed):
    keys = torch.randn(batch, pos, heads, 3, generator=generator(seed), dtype=torch.float64)
    smeared = keys.clone()
    smeared[:, 1:] = a * keys[:, 1:] + b * keys[:, :-1]
    found = smear_coefficient(smeared, keys)
    close(found.a, torch.full_like(found.a, a), atol=1e-6, rtol=0)
    close(found.b, torch.full_like(found.b, b), atol=1e-6, rtol=0)
    if abs(a) + abs(b) > 1e-3:
        close(found.r2, torch.ones_like(found.r2))
        close(found.coefficient, torch.full_like(found.a, b / (abs(a) + abs(b))), atol=1e-3, rtol=0)


@given(sizes(1, 3), sizes(2, 8), sizes(1, 4), st.floats(-3, 3), seeds)
def test_evidence_adds_up_over_lags_and_ignores_a_constant(batch, pos, kinds, constant, seed):
    g = generator(seed)
    tokens = torch.randint(kinds, (batch, pos), generator=g)
    one, two = torch.randn(2, batch, 2, pos, pos, generator=g, dtype=torch.float64)
    found = smear_evidence({0: one, 1: two, 2: one + two, 3: one + constant}, tokens)
    close(found[2], found[0] + found[1], equal_nan=True)
    match = (tokens[:, :, None] == tokens[:, None]).tril(-1)
    whole = torch.ones(pos, pos).tril()
    target = torch.zeros_like(match)
    target[..., 1:] = match[..., :-1]
    both = ((whole - target.double()) > 0).any(-1) | ~target.any(-1)  # rows with keys on both sides
    if bool(both.all()):
        close(found[3], found[0], equal_nan=True)
