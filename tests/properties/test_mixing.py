"""Properties of mixing matrices: rows, blocks, diagonals and the dense array are one matrix.

Leaves out what is measured on them (`test_scores`) and the recurrences alone (`test_scan`).
"""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, random_pattern, rules, scans, seeds, sizes

from smearlens.analysis.mixing.bands import kernel_lags
from smearlens.analysis.mixing.implicit import ImplicitMixing
from smearlens.analysis.mixing.kinds import (
    BandMixing,
    ComposedMixing,
    DenseMixing,
    SoftmaxMixing,
    UniformMixing,
)
from smearlens.analysis.mixing.state_space import SSMMixing
from smearlens.analysis.smearing import composition_gain, score_by_lag, shifted
from smearlens.nn.conv import depthwise_conv
from smearlens.nn.discretize import discretize

close = torch.testing.assert_close


def agrees_with_itself(mixing, size):
    """Rows, blocks of `size`, diagonals: all of the dense matrix."""
    dense = mixing.dense()
    pieces = list(mixing.blocks(size))
    assert [start for start, _, _ in pieces] == list(range(0, mixing.n_queries, size))
    close(torch.cat([rows for _, _, rows in pieces], -2), dense)
    middle = mixing.n_queries // 2
    if middle:
        close(mixing.rows(middle, mixing.n_queries), dense[..., middle:, :])
    for lag in range(1 - mixing.n_keys, mixing.n_queries):
        close(mixing.diagonal(lag), dense.diagonal(-lag, -2, -1))
    if mixing.causal:
        assert not bool(dense.triu(1).any())
    return dense


def drawn_mixing(kind, seed, length):
    """A mixing of each kind that needs no recurrence."""
    pattern = random_pattern(seed, 2, 3, length, length)
    g = generator(seed)
    if kind == "dense":
        return DenseMixing(pattern)
    if kind == "softmax":  # two query heads share a key head
        q, k = (torch.randn(2, length, h, 3, generator=g, dtype=torch.float64) for h in (4, 2))
        return SoftmaxMixing(q, k, causal=seed % 2 == 0)
    kernel = torch.randn(3, 4, generator=g, dtype=torch.float64)
    lags = [tap - seed % 4 for tap in range(4)]
    if kind == "band":
        return BandMixing(kernel, lags, length)
    return ComposedMixing(DenseMixing(pattern), kernel, lags)


@fewer(0.5)
@given(st.sampled_from(("dense", "softmax", "band", "composed")), sizes(1, 9), sizes(1, 5), seeds)
def test_rows_blocks_and_diagonals_are_one_matrix(kind, length, size, seed):
    agrees_with_itself(drawn_mixing(kind, seed, length), size)


@fewer(0.1)
@given(scans(), rules, sizes(1, 5))
def test_the_hidden_attention_is_one_matrix_whatever_it_is_made_of(case, rule, size):
    _, delta, A, B, C, _ = case
    from_delta = SSMMixing.from_delta(delta, A, B, C, rule)
    from_steps = SSMMixing.from_steps(*discretize(delta, A, B, rule), C)
    dense = agrees_with_itself(from_delta, size)
    close(agrees_with_itself(from_steps, size), dense)
    last = delta.shape[2] - 1
    close(from_delta.channels(last, last + 1).dense(), dense[:, last:])
    close(torch.cat([part.dense() for part in from_delta.parts()], 1), dense)


@fewer(0.5)
@given(scans(), rules)
def test_the_hidden_attention_is_the_map_that_the_recurrence_applies(case, rule):
    u, delta, A, B, C, _ = case
    A_bar, B_bar = discretize(delta, A, B, rule)
    state, outputs = torch.zeros_like(B_bar[:, 0]), []
    for t in range(u.shape[1]):
        state = A_bar[:, t] * state + B_bar[:, t] * u[:, t, :, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, 1)
    mixing = SSMMixing.from_delta(delta, A, B, C, rule)
    close(torch.einsum("bcij,bjc->bic", mixing.dense(), u), y)
    close(mixing.reconstruct(u), y)


@fewer(0.25)
@given(scans(most=9), rules, sizes(1, 4), st.booleans(), seeds)
def test_the_implicit_attention_of_a_block_is_the_map_that_the_block_applies(
    case, rule, taps, skips, seed
):
    u, delta, A, B, C, _ = case
    g = generator(seed)
    channels = u.shape[2]
    kernel, gate = torch.randn(channels, taps, generator=g, dtype=torch.float64), u.cos()
    bias, skip = torch.randn(2, channels, generator=g, dtype=torch.float64)
    x = torch.randn(u.shape, generator=g, dtype=torch.float64)
    v = depthwise_conv(x, kernel, bias)
    hidden = SSMMixing.from_delta(delta, A, B, C, rule)
    block = ImplicitMixing(
        hidden, gate, v, kernel, list(range(taps)), skip=skip if skips else None, bias=bias
    )
    activated = torch.nn.functional.silu(v)
    inner = hidden.reconstruct(activated) + (skip * activated if skips else 0)
    close(block.reconstruct(x), inner * gate)
    dense = agrees_with_itself(block, 3)
    silent = ImplicitMixing(hidden, gate, v, kernel, block.lags, skip=skip if skips else None)
    close(torch.einsum("bcij,bjc->bic", dense, x), silent.reconstruct(x))


@given(sizes(1, 3), sizes(1, 9), sizes(1, 5), sizes(0, 4), seeds)
def test_a_band_is_the_convolution_it_stands_for(channels, length, taps, ahead, seed):
    ahead = min(ahead, taps - 1)
    g = generator(seed)
    kernel = torch.randn(channels, taps, generator=g, dtype=torch.float64)
    x = torch.randn(2, length, channels, generator=g, dtype=torch.float64)
    band = BandMixing(kernel, [tap - ahead for tap in range(taps)], length).dense()
    close(torch.einsum("cqk,bkc->bqc", band[0], x), depthwise_conv(x, kernel, future=ahead))


@given(sizes(1, 4), sizes(6, 13), sizes(1, 5), sizes(0, 4), st.booleans(), seeds)
def test_the_lags_of_a_kernel_are_found_in_its_activations(
    channels, length, taps, ahead, bias, seed
):
    ahead = min(ahead, taps - 1)
    g = generator(seed)
    kernel = torch.randn(channels, taps, generator=g, dtype=torch.float64)
    x = torch.randn(3, length, channels, generator=g, dtype=torch.float64)
    constant = torch.randn(channels, generator=g, dtype=torch.float64) if bias else None
    out = depthwise_conv(x, kernel, constant, future=ahead)
    cache = {"c.hook_in": x, "c.hook_kernel": kernel, "c.hook_out": out}
    assert kernel_lags(cache, "c") == [tap - ahead for tap in range(taps)]


@given(sizes(1, 7), sizes(-9, 9), seeds)
def test_composition_by_one_lag_moves_the_keys(length, lag, seed):
    pattern = random_pattern(seed, 2, 3, length, length)
    gain = torch.ones(3, 1, dtype=torch.float64)
    found = ComposedMixing(DenseMixing(pattern), gain, [lag]).dense()
    expected = torch.zeros_like(found)
    for s in range(length):
        if 0 <= s + lag < length:
            expected[..., s] = pattern[..., s + lag]
    close(found, expected)


@given(sizes(1, 3), sizes(1, 4), sizes(2, 4), seeds)
def test_composition_gains_are_shares_and_ignore_the_size_of_weights(heads, taps, width, seed):
    g = generator(seed)
    kernel = torch.randn(width, taps, generator=g, dtype=torch.float64)
    w_v = torch.randn(heads, width, 2, generator=g, dtype=torch.float64)
    w_o = torch.randn(heads, 2, width, generator=g, dtype=torch.float64)
    gain = composition_gain(kernel, w_v, w_o)
    close(gain.sum(-1), torch.ones(heads, dtype=torch.float64))
    close(composition_gain(-3 * kernel, w_v, 2 * w_o), gain)
    for head in range(heads):
        ov = (w_v[head] @ w_o[head]).T  # W_O W_V as a map of columns
        norms = torch.stack([(ov @ torch.diag(kernel[:, tap])).norm() for tap in range(taps)])
        close(gain[head], norms / norms.sum())


@given(sizes(1, 2), sizes(6, 9), sizes(1, 3), sizes(0, 2), st.sampled_from((0.0, 1.0)), seeds)
def test_scores_by_lag_add_up_to_the_scores(batch, length, taps, ahead, carried, seed):
    ahead = min(ahead, taps - 1)
    g = generator(seed)
    x = torch.randn(batch, length, 4, generator=g, dtype=torch.float64)
    kernel = torch.randn(4, taps, generator=g, dtype=torch.float64)
    q = torch.randn(batch, length, 2, 3, generator=g, dtype=torch.float64)
    w_k = torch.randn(2, 4, 3, generator=g, dtype=torch.float64)
    out = depthwise_conv(x, kernel, future=ahead)
    cache = {"c.hook_in": x, "c.hook_kernel": kernel, "c.hook_out": out, "a.hook_q": q}
    parts = score_by_lag(cache, w_k, conv="c", attn="a", carried=carried)
    keys = torch.einsum("bkm,hmd->bkhd", out + carried * x, w_k)
    whole = torch.einsum("bqhd,bkhd->bhqk", q, keys) / 3**0.5
    assert list(parts) == [tap - ahead for tap in range(taps)]
    close(sum(parts.values()), whole)


@given(sizes(1, 9), sizes(-10, 10), seeds)
def test_shifting_there_and_back_keeps_what_did_not_fall_off(length, lag, seed):
    x = torch.randn(2, length, 3, generator=generator(seed))
    back = shifted(shifted(x, lag), -lag)
    position = torch.arange(length)
    kept = (position + lag >= 0) & (position + lag < length)
    assert back.equal(x * kept[:, None])


@fewer(0.5)
@given(sizes(1, 9), sizes(1, 9), st.booleans(), sizes(1, 4))
def test_uniform_rows_are_even_over_what_is_allowed(queries, keys, causal, size):
    keys = queries if causal else keys
    dense = agrees_with_itself(UniformMixing(queries, keys, causal=causal), size)
    close(dense.sum(-1), torch.ones(1, 1, queries, dtype=torch.float64))
    for q, row in enumerate(dense[0, 0]):
        assert len(row[row > 0].unique()) == 1
        assert int((row > 0).sum()) == (q + 1 if causal else keys)


@fewer(0.25)
@given(scans(most=7), st.floats(-2, 2))
def test_the_hidden_attention_is_linear_in_its_read_out(case, factor):
    _, delta, A, B, C, _ = case
    other = C.flip(1)
    assume(C.shape[1] > 1)
    one, two, both = (
        SSMMixing.from_delta(delta, A, B, read).dense() for read in (C, other, C + factor * other)
    )
    close(both, one + factor * two)
