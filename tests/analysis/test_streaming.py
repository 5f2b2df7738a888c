"""Streamed statistics against loops over entries, dense float64 patterns and closed forms."""

import math
from itertools import accumulate, product

import pytest
import torch
from torch.nn import functional as F

from smearlens.analysis.mixing.streaming import (
    RowStatistics,
    diagonal,
    inner,
    js_rows,
    log_normaliser,
    pattern_rows,
    row_statistics,
)

LENGTHS = pytest.mark.parametrize("length", [1, 2, 3, 7, 127, 128, 129, 300])
CAUSAL = pytest.mark.parametrize("causal", [True, False])
PER_HEAD = ("lse", "entropy", "distance", "span", "self_mass", "first_mass", "future_mass")


def random_qk(generator, query, key=None, dtype=torch.float64, sharp=2.0):
    """q and k as views of [batch pos head d_head], scores with a standard deviation of `sharp`."""
    q = torch.randn(2, query, 3, 5, generator=generator, dtype=dtype) * sharp
    k = torch.randn(2, query if key is None else key, 3, 5, generator=generator, dtype=dtype)
    return q.transpose(1, 2), k.transpose(1, 2)


def random_mask(generator, key):
    """Half of the keys hidden; the first sequence hides its first key."""
    mask = torch.rand(2, key, generator=generator) > 0.5
    mask[0, 0] = False
    return mask


def dense_pattern(q, k, *, causal, scale=None, key_mask=None):
    """The pattern in float64, rows without a key NaN."""
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        ahead = torch.arange(k.shape[2]) > torch.arange(q.shape[2])[:, None]
        scores = scores.masked_fill(ahead, -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return scores.softmax(-1)


def dense_entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def loop_statistics(p, mass):
    """Every statistic but lse of [batch head query key], by the words of its definition."""
    found = {name: torch.full(p.shape[:3], torch.nan, dtype=p.dtype) for name in PER_HEAD[1:]}
    for b, h, q in product(*map(range, p.shape[:3])):
        row = p[b, h, q].tolist()
        if math.isnan(row[0]):
            continue
        found["entropy"][b, h, q] = -sum(x * math.log(x) for x in row if x > 0)
        found["distance"][b, h, q] = sum(x * abs(q - i) for i, x in enumerate(row))
        found["first_mass"][b, h, q] = row[0]
        found["future_mass"][b, h, q] = sum(row[q + 1 :])
        if q < len(row):
            found["self_mass"][b, h, q] = row[q]
        for width, held in enumerate(accumulate(row[: q + 1][::-1], initial=0)):
            if held >= mass:  # keys q, q-1, … up to `width` of them
                found["span"][b, h, q] = width - 1 + max(0, q + 1 - len(row))
                break
    return found


def assert_equals(actual: RowStatistics, expected: dict | RowStatistics):
    for name in PER_HEAD if isinstance(expected, RowStatistics) else expected:
        want = getattr(expected, name) if isinstance(expected, RowStatistics) else expected[name]
        torch.testing.assert_close(
            getattr(actual, name), want, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
        )


@CAUSAL
@pytest.mark.parametrize("masked", [False, True])
@LENGTHS
def test_row_statistics_equal_the_loop(length, masked, causal, generator):
    q, k = random_qk(generator, length)
    options = {"causal": causal, "key_mask": random_mask(generator, length) if masked else None}
    p = dense_pattern(q, k, **options)
    assert_equals(row_statistics(q, k, **options), loop_statistics(p, 0.9))


@CAUSAL
@pytest.mark.parametrize(("query", "key"), [(2, 7), (129, 70), (70, 129), (300, 3), (150, 300)])
def test_queries_and_keys_of_different_length(query, key, causal, generator):
    q, k = random_qk(generator, query, key)
    p = dense_pattern(q, k, causal=causal)
    assert_equals(row_statistics(q, k, causal=causal), loop_statistics(p, 0.9))
    torch.testing.assert_close(pattern_rows(q, k, 0, query, causal=causal), p)


@CAUSAL
@pytest.mark.parametrize("mass", [0.01, 0.5, 0.999])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_mass_and_scale_are_the_callers(mass, scale, causal, generator):
    q, k = random_qk(generator, 131)
    p = dense_pattern(q, k, causal=causal, scale=scale)
    found = row_statistics(q, k, causal=causal, scale=scale, mass=mass)
    assert_equals(found, loop_statistics(p, mass))


@CAUSAL
def test_float32_keeps_its_bounds(causal, generator):
    q, k = random_qk(generator, 700, dtype=torch.float32, sharp=1.0)
    p = dense_pattern(q, k, causal=causal)
    found = row_statistics(q, k, causal=causal)
    assert found.entropy.dtype == torch.float32
    assert (found.entropy - dense_entropy(p)).abs().max() < 2e-5
    lag = torch.arange(700)[:, None] - torch.arange(700)
    assert (found.distance - (p * lag.abs()).sum(-1)).abs().max() < 1e-6 * 700
    near = torch.where(lag >= 0, p, 0).flip(-1).cumsum(-1).flip(-1)  # mass on keys j..q
    near = F.pad(near, (0, 1))
    first = torch.arange(700) - found.span  # the window is first..q: enough, and one less is not
    ok = ~found.span.isnan()
    first = first.nan_to_num(0).long()[..., None]
    assert (near.gather(-1, first)[..., 0][ok] > 0.9 - 1e-6).all()
    assert (near.gather(-1, first + 1)[..., 0][ok] < 0.9 + 1e-6).all()
    assert (near[..., 0][~ok] < 0.9 + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_first(dtype, generator):
    q, k = (t.to(dtype) for t in random_qk(generator, 40))
    found = row_statistics(q, k, causal=True)
    assert_equals(found, row_statistics(q.float(), k.float(), causal=True))
    same = js_rows(q, k, q.double(), k.double(), causal=True)
    assert same.dtype == torch.float64
    assert same.max() < 1e-12


@pytest.mark.parametrize("length", [1, 2, 8, 129, 641])
def test_uniform_heads_have_their_closed_forms(length):
    zeros = torch.zeros(2, 3, length, 5)
    found = row_statistics(zeros, zeros, causal=True)
    entropy = torch.full((2, 3), math.lgamma(length + 1) / length)
    torch.testing.assert_close(found.entropy.mean(-1), entropy, atol=2e-6, rtol=0)
    distance = torch.full((2, 3), (length - 1) / 4)
    torch.testing.assert_close(found.distance.mean(-1), distance, atol=1e-6 * length, rtol=0)
    spans = [math.ceil(0.9 * (q + 1) - 1e-9) - 1 for q in range(length)]
    assert found.span[1, 2].tolist() == spans
    torch.testing.assert_close(found.first_mass, found.self_mass)
    if length == 8:
        assert found.entropy.mean().item() == pytest.approx(1.325575, abs=2e-6)
        assert found.distance.mean().item() == pytest.approx(1.75, abs=1e-6)
        previous = diagonal(zeros, zeros, 1, found.lse, causal=True)
        assert previous.mean().item() == pytest.approx(0.245408, abs=1e-6)


def sharp_head(length, lag):
    """A head that attends to the key `lag` before the query, to key 0 if there is none."""
    q = torch.eye(length).roll(lag, 0) * 1e4
    q[:lag] = torch.eye(length)[0] * 1e4
    return q.expand(1, 1, length, length), torch.eye(length).expand(1, 1, length, length)


def test_previous_token_head_and_identity_head():
    found = row_statistics(*sharp_head(130, 1), causal=True)
    assert found.distance[0, 0].tolist() == [0.0] + [1.0] * 129
    assert found.span[0, 0].tolist() == [0.0] + [1.0] * 129
    assert found.entropy.abs().max() < 1e-6
    js = js_rows(*sharp_head(130, 0), *sharp_head(130, 1), causal=True)[0, 0]
    assert js[0] == 0
    torch.testing.assert_close(js[1:], torch.full((129,), math.log(2)))
    cosine = inner(*sharp_head(130, 0), *sharp_head(130, 1), causal=True).cosine[0, 0]
    assert cosine.tolist() == [1.0] + [0.0] * 129


def test_uniform_against_identity_has_its_closed_form():
    zeros = torch.zeros(1, 1, 8, 8)
    rows = inner(zeros, zeros, *sharp_head(8, 0), causal=True)
    harmonic = sum(1 / n for n in range(1, 9))
    flat = rows.cross.sum() / (rows.first.sum() * rows.second.sum()).sqrt()
    assert flat.item() == pytest.approx((harmonic / 8) ** 0.5, abs=1e-6)


@CAUSAL
@pytest.mark.parametrize("masked", [False, True])
@LENGTHS
def test_two_patterns_compared_row_by_row(length, masked, causal, generator):
    one, two = random_qk(generator, length), random_qk(generator, length)
    two = tuple(F.pad(t, (0, 2), value=0.3) for t in two)  # another d_head
    options = {"causal": causal, "key_mask": random_mask(generator, length) if masked else None}
    p, q = dense_pattern(*one, **options), dense_pattern(*two, **options)
    expected = dense_entropy((p + q) / 2) - (dense_entropy(p) + dense_entropy(q)) / 2
    torch.testing.assert_close(js_rows(*one, *two, **options), expected, equal_nan=True)
    found = inner(*one, *two, **options)
    for value, product_ in ((found.cross, p * q), (found.first, p * p), (found.second, q * q)):
        torch.testing.assert_close(value, product_.sum(-1), equal_nan=True)
    cosine = F.cosine_similarity(p, q, dim=-1)
    torch.testing.assert_close(found.cosine, cosine, equal_nan=True)


@CAUSAL
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("query", "key"), [(1, 1), (7, 7), (129, 129), (5, 130), (130, 5)])
def test_diagonals_and_rows_are_parts_of_the_pattern(query, key, masked, causal, generator):
    q, k = random_qk(generator, query, key)
    options = {"causal": causal, "key_mask": random_mask(generator, key) if masked else None}
    p = dense_pattern(q, k, **options)
    lse = log_normaliser(q, k, **options)
    torch.testing.assert_close(lse, row_statistics(q, k, **options).lse, equal_nan=True)
    for lag in {1 - key, -1, 0, 1, query - 1} & set(range(1 - key, query)):
        expected = p.diagonal(-lag, dim1=-2, dim2=-1)
        found = diagonal(q, k, lag, lse, **options)
        torch.testing.assert_close(found, expected, equal_nan=True, msg=f"lag {lag}")
    for known, (start, stop) in product((None, lse), ((query // 3, query), (0, query // 2 + 1))):
        rows = pattern_rows(q, k, start, stop, known, **options)
        torch.testing.assert_close(rows, p[:, :, start:stop], equal_nan=True)


def test_lse_is_the_logarithm_of_the_denominator(generator):
    q, k = random_qk(generator, 9)
    scores = q @ k.mT * 0.3
    torch.testing.assert_close(log_normaliser(q, k, causal=False, scale=0.3), scores.logsumexp(-1))


@CAUSAL
def test_rows_without_a_key_are_nan_and_counted(causal, generator):
    q, k = random_qk(generator, 7)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False  # causal: queries 0, 1, 2 of the first sequence see nothing
    mask[1] = False
    found = row_statistics(q, k, causal=causal, key_mask=mask)
    assert found.n_undefined == (10 if causal else 7)
    counts = [[0, 0, 0, 1, 2, 3, 4] if causal else [4] * 7, [0] * 7]
    assert found.n_allowed.tolist() == counts
    empty = (torch.tensor(counts) == 0)[:, None].expand(2, 3, 7)
    for name in set(PER_HEAD) - {"span"}:
        assert torch.equal(getattr(found, name).isnan(), empty), name
    assert found.span.isnan()[empty].all()
    assert torch.equal(js_rows(q, k, k, q, causal=causal, key_mask=mask).isnan(), empty)


@CAUSAL
def test_large_scores_neither_overflow_nor_leak_through_the_mask(causal, generator):
    q, k = random_qk(generator, 20, sharp=1e4)
    options = {"causal": causal, "key_mask": random_mask(generator, 20)}
    p = dense_pattern(q, k, **options)
    assert_equals(row_statistics(q, k, **options), loop_statistics(p, 0.9))
    found = row_statistics(q.float(), k.float(), causal=causal)
    assert found.lse.isfinite().all()


def test_rounding_never_leaves_the_range_of_a_statistic(generator):
    q, k = random_qk(generator, 300, dtype=torch.float32)
    found = row_statistics(q, k, causal=False)
    assert found.future_mass.min() >= 0
    assert found.future_mass[:, :, -1].max() < 1e-6
    js = js_rows(q, k, q, k, causal=False)
    assert 0 <= js.min() <= js.max() < 2e-6
    one, other = torch.randn(2, 100, 1, 6, 1, generator=generator)
    one[:, :, 3:] = other[:, :, :3] = -200  # nothing in common
    ones = torch.ones(100, 1, 1, 1)
    apart = js_rows(ones, one, ones, other, causal=False, scale=1.0)
    assert math.log(2) - 1e-6 < apart.min() <= apart.max() <= torch.tensor(math.log(2))
    cosine = inner(q, k, q, k, causal=False).cosine
    assert 1 - 1e-6 < cosine.min() <= cosine.max() <= 1


def test_no_gradient_is_recorded(generator):
    q, k = (t.requires_grad_() for t in random_qk(generator, 7))
    assert not row_statistics(q, k, causal=True).entropy.requires_grad
    assert not pattern_rows(q, k, 0, 7, causal=True).requires_grad
