"""Hidden attention against a naive loop, for every rule; what states keep, against closed forms."""

import math
import re
from itertools import product

import pytest
import torch
from jaxtyping import config as jaxtyping_config

from smearlens.analysis.mixing.state_space import SSMMixing
from smearlens.analysis.states import (
    half_life,
    memory_profile,
    retention,
    state_boundary,
    write_weight,
)

RULES = ["mamba", "zoh", "bilinear", "bilinear-clamped"]
EACH = pytest.mark.parametrize("rule", RULES)
LENGTH = 71  # two blocks of 32 rows and a piece


def tensors(length=LENGTH, d_decay=5, scale=2.0, dtype=torch.float64):
    """delta, A, B, C for 2 examples, 3 channels, 5 states; some delta and one A exactly 0."""
    delta = torch.rand(2, length, 3, dtype=dtype) * scale
    delta[:, 3::7] = 0
    A = -torch.rand(3, d_decay, dtype=dtype) * 2
    if d_decay > 1:
        A[1, 2] = 0
    B, C = torch.randn(2, 2, length, 5, dtype=dtype)
    return delta, A, B, C


def steps(delta, A, B, rule):
    """A_bar, B_bar [batch pos channel d_state] by the textbook formulas."""
    step = delta[..., None]
    z = step * A
    exact = torch.where(z == 0, step, torch.expm1(z) / torch.where(A == 0, 1, A))
    A_bar, gain = {
        "mamba": (torch.exp(z), step.expand_as(z)),
        "zoh": (torch.exp(z), exact),
        "bilinear": ((2 + z) / (2 - z), 2 * step / (2 - z)),
        "bilinear-clamped": (((2 + z) / (2 - z)).clamp(min=0), 2 * step / (2 - z)),
    }[rule]
    return A_bar, gain * B[:, :, None]


def naive(A_bar, B_bar, C):
    """M[b, c, i, j], every entry by its own product."""
    batch, length, channel, _ = B_bar.shape
    A_bar = A_bar.expand_as(B_bar)
    M = torch.zeros(batch, channel, length, length, dtype=C.dtype)
    for i in range(length):
        for j in range(i + 1):
            decay = A_bar[:, j + 1 : i + 1].prod(1)  # [batch channel d_state]
            M[:, :, i, j] = (C[:, i, None] * decay * B_bar[:, j]).sum(-1)
    return M


def both(rule, **options):
    """The two ways to build a mixing, and the naive matrix."""
    delta, A, B, C = tensors(**options)
    A_bar, B_bar = steps(delta, A, B, rule)
    built = SSMMixing.from_delta(delta, A, B, C, rule), SSMMixing.from_steps(A_bar, B_bar, C)
    return built, naive(A_bar, B_bar, C)


@EACH
@pytest.mark.parametrize("d_decay", [5, 1])
@pytest.mark.parametrize("length", [1, 2, 31, 33, LENGTH])
def test_rows_diagonals_and_dense_equal_the_naive_matrix(rule, length, d_decay):
    built, expected = both(rule, length=length, d_decay=d_decay)
    if rule == "bilinear" and length > 30:
        assert (steps(*tensors(length, d_decay)[:3], rule)[0] < 0).any()
    for mixing in built:
        torch.testing.assert_close(mixing.dense(), expected)
        for start, stop in [(0, 1), (length - 1, length), (length // 3, length // 2 + 1)]:
            torch.testing.assert_close(mixing.rows(start, stop), expected[:, :, start:stop])
        for size in (32, 7):
            parts = list(mixing.blocks(size))
            assert [start for start, _, _ in parts] == list(range(0, length, size))
            assert [stop for _, stop, _ in parts][-1] == length
            torch.testing.assert_close(torch.cat([rows for _, _, rows in parts], 2), expected)
        for lag in {0, 1, 2, 3, 5, 8, 21, length - 1} & set(range(length)):
            found = mixing.diagonal(lag)
            torch.testing.assert_close(found, expected.diagonal(-lag, 2, 3))


@EACH
def test_reconstruction(rule):
    (from_delta, from_steps), M = both(rule)
    u = torch.randn(2, LENGTH, 3, dtype=torch.float64)
    A_bar, B_bar = steps(*(inputs := tensors())[:3], rule)
    mixing = SSMMixing.from_steps(A_bar, B_bar, inputs[3])
    h, y = torch.zeros(2, 3, 5, dtype=torch.float64), torch.zeros_like(u)
    for t in range(LENGTH):
        h = A_bar[:, t] * h + B_bar[:, t] * u[:, t, :, None]
        y[:, t] = (h * inputs[3][:, t, None]).sum(-1)
    assert (mixing.reconstruct(u) - y).abs().max() < 1e-10
    assert (torch.einsum("bcij,bjc->bic", mixing.dense(), u) - y).abs().max() < 1e-10
    for other in (from_delta, from_steps):
        by_matrix = torch.einsum("bcij,bjc->bic", M, u)
        assert (other.reconstruct(u) - by_matrix).abs().max() < 1e-10


@EACH
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_precision_in_float32(rule, scale):
    inputs = tensors(length=200, scale=0.1 * scale, dtype=torch.float32)
    exact = SSMMixing.from_delta(*(x.double() for x in inputs), rule)
    A_bar, B_bar = steps(*inputs[:3], rule)
    largest = exact.dense().abs().max()
    for mixing in (
        SSMMixing.from_delta(*inputs, rule),
        SSMMixing.from_steps(A_bar, B_bar, inputs[3]),
    ):
        assert mixing.dense().dtype == torch.float32
        assert (mixing.dense() - exact.dense()).abs().max() < 1e-6 * largest
        for lag in (1, 150):
            assert (mixing.diagonal(lag) - exact.diagonal(lag)).abs().max() < 1e-6 * largest


def test_a_diagonal_far_from_the_start_keeps_its_digits():
    delta = torch.rand(1, 16384, 2) * 0.1  # the time elapsed reaches 800
    A, ones = -torch.rand(2, 1) * 16, torch.ones(1, 16384, 3)
    exact = SSMMixing.from_delta(delta.double(), A.double(), ones.double(), ones.double())
    found = SSMMixing.from_delta(delta, A, ones, ones).diagonal(1)
    torch.testing.assert_close(found, exact.diagonal(1).float(), rtol=1e-6, atol=0)


def test_constant_step_closed_form():
    d = 0.3
    delta, one = torch.full((1, 19, 1), d).double(), torch.ones(1, 19, 1).double()
    mixing = SSMMixing.from_delta(delta, -one[0, :1], one, one)
    lag = torch.arange(19)[:, None] - torch.arange(19)
    expected = torch.where(lag >= 0, d * torch.exp(-d * lag.double()), 0)
    torch.testing.assert_close(mixing.dense()[0, 0], expected)


def test_what_it_says_of_itself():
    (mixing, _), _ = both("zoh")
    assert (mixing.n_examples, mixing.n_heads) == (2, 3)
    assert (mixing.n_queries, mixing.n_keys) == (LENGTH, LENGTH)
    assert mixing.causal
    assert mixing.signed
    assert mixing.diagonal(-4).abs().max() == 0
    assert mixing.diagonal(-4).shape == (2, 3, LENGTH - 4)
    with pytest.raises(ValueError, match="lag=71 is outside"):
        mixing.diagonal(LENGTH)
    rows = mixing.rows(3, 5)
    rows.zero_()  # the caller's own
    assert mixing.rows(3, 5).abs().max() > 0


@pytest.mark.parametrize("way", [0, 1])
def test_some_channels_alone(way):
    built, expected = both("bilinear")
    part = built[way].channels(1, 3)
    assert part.n_heads == 2
    torch.testing.assert_close(part.dense(), expected[:, 1:])
    torch.testing.assert_close(part.diagonal(5), expected[:, 1:].diagonal(-5, 2, 3))
    with pytest.raises(ValueError, match=re.escape("channels 2..4 are outside 0..3")):
        built[way].channels(2, 4)


def test_half_precision_caches_are_widened():
    delta, A, B, C = tensors(dtype=torch.float32)
    A_bar, B_bar = steps(delta, A, B, "mamba")
    low = [x.bfloat16() for x in (A_bar, B_bar, C)]
    exact = SSMMixing.from_steps(*(x.float() for x in low))
    torch.testing.assert_close(SSMMixing.from_steps(*low).dense(), exact.dense(), rtol=0, atol=0)


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def test_wrong_parts_are_named(unchecked):
    delta, A, B, C = tensors()
    A_bar, B_bar = steps(delta, A, B, "mamba")
    with pytest.raises(ValueError, match=re.escape("'bilinear', 'bilinear-clamped'], got 'euler'")):
        SSMMixing.from_delta(delta, A, B, C, "euler")
    with pytest.raises(ValueError, match=re.escape("C must be [batch pos d_state] = (2, 71, 5)")):
        SSMMixing.from_delta(delta, A, B, C[:, :9])
    for wrong in [(A[:2], B), (A[:, :3], B), (A, B[:, :9])]:
        with pytest.raises(ValueError, match=re.escape("must go with delta (2, 71, 3), got (")):
            SSMMixing.from_delta(delta, *wrong, C)
    for wrong in [(A_bar[0], B_bar[0]), (A_bar[:, :9], B_bar), (A_bar[..., :3], B_bar)]:
        with pytest.raises(ValueError, match=re.escape("must be [batch pos channel d_state]")):
            SSMMixing.from_steps(*wrong, C)


def test_a_cache_with_gradients_is_read_without_them():
    delta, A, B, C = (x.requires_grad_() for x in tensors())
    mixing = SSMMixing.from_delta(delta, A, B, C, "zoh")
    assert not mixing.dense().requires_grad
    assert not mixing.diagonal(3).requires_grad


def bilinear_pair():
    delta, A, B, _ = tensors(length=23, scale=6.0)
    A_bar, B_bar = steps(delta, A, B, "bilinear")
    assert (A_bar < 0).any()
    return A_bar, B_bar


@pytest.mark.parametrize("target", [-1, 22, 9, 0, -23])
def test_retention_and_write_weight_equal_a_loop(target):
    A_bar, B_bar = bilinear_pair()
    end = target % 23
    kept = torch.stack([A_bar[:, s + 1 : end + 1].abs().prod(1) for s in range(end + 1)], 1)
    torch.testing.assert_close(retention(A_bar, target), kept)
    torch.testing.assert_close(write_weight(A_bar, B_bar, target), kept * B_bar[:, : end + 1].abs())


@pytest.mark.parametrize("length", [1, 2, 8, 23, 64])
def test_half_life_equals_a_loop(length):
    delta, A, B, _ = tensors(length=length, scale=0.5)
    A_bar, _ = steps(delta, A, B, "zoh")
    expected = torch.full_like(A_bar, torch.inf)
    for b, s, c, n in product(range(2), range(length), range(3), range(5)):
        kept = 1.0
        for lag in range(1, length - s):
            kept *= abs(A_bar[b, s + lag, c, n].item())
            if kept < 0.5:
                expected[b, s, c, n] = lag
                break
    torch.testing.assert_close(half_life(A_bar), expected, rtol=0, atol=0)
    assert expected[:, :, 1, 2].isinf().all()  # A = 0 never forgets


@pytest.mark.parametrize("d", [0.01, 0.1, 0.3, 1.0])
def test_half_life_of_a_constant_step(d):
    A_bar = torch.full((1, 101, 1, 1), math.exp(-d))
    assert half_life(A_bar)[0, 0, 0, 0] == math.floor(math.log(2) / d) + 1
    assert half_life(A_bar)[0, -1, 0, 0] == torch.inf


@pytest.mark.parametrize("masked", [False, True])
def test_memory_profile_equals_a_loop(masked):
    A_bar, B_bar = bilinear_pair()
    mask = torch.ones(2, 23, dtype=torch.bool)
    if masked:
        mask[0, 19:] = mask[1, :3] = False
    found = memory_profile(A_bar, B_bar, mask=mask if masked else None)
    assert found.shape == (2, 3, 23)
    for b, lag in product(range(2), range(23)):
        pairs = [(t - lag, t) for t in range(lag, 23) if mask[b, t] and mask[b, t - lag]]
        weights = [write_weight(A_bar, B_bar, t)[b, s].mean(-1) for s, t in pairs]
        expected = torch.stack(weights).mean(0) if weights else torch.full((3,), torch.nan)
        torch.testing.assert_close(found[b, :, lag], expected.to(found), equal_nan=True)
    short = memory_profile(A_bar, B_bar, max_lag=4, mask=mask)
    torch.testing.assert_close(short, memory_profile(A_bar, B_bar, mask=mask)[..., :5])
    with pytest.raises(ValueError, match=re.escape("max_lag must be in 0..22, got 23")):
        memory_profile(A_bar, B_bar, max_lag=23)


def test_memory_of_half_precision_caches_is_in_float32():
    A_bar, B_bar = (x.bfloat16() for x in bilinear_pair())
    kept = retention(A_bar)
    assert kept.dtype == half_life(A_bar).dtype == torch.float32
    torch.testing.assert_close(kept, retention(A_bar.float()), rtol=0, atol=0)
    assert memory_profile(A_bar, B_bar, max_lag=2).dtype == torch.float32


def test_state_boundary_of_a_layer_that_stops_writing():
    A_bar, B_bar = torch.full((2, 9, 3, 5), 0.9), torch.ones(2, 9, 3, 5)
    B_bar[0, 4:] = 0.25
    A_bar[0, 4:] = 1
    A_bar[1, 7] = -0.5
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 8] = False
    B_bar[1, 8], A_bar[1, 8] = 100, 0
    found = state_boundary(A_bar, B_bar, torch.tensor([3, 6]), mask=mask)
    torch.testing.assert_close(found.write_ratio, torch.tensor([[0.25] * 3, [1.0] * 3]))
    torch.testing.assert_close(found.retention, torch.tensor([[1.0] * 3, [0.5] * 3]))
    edges = state_boundary(A_bar, B_bar, torch.tensor([0, 8]))
    assert edges.write_ratio.isnan().all()
    with pytest.raises(ValueError, match=re.escape("boundary must be in 0..8, got [3, 9]")):
        state_boundary(A_bar, B_bar, torch.tensor([3, 9]))
    with pytest.raises(ValueError, match=re.escape("target must be in -9..8, got 9")):
        retention(A_bar, 9)
