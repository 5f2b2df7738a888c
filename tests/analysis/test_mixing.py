"""Mixings: rows, diagonals and the dense array agree, and are what the layer applies."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref
from torch.nn import functional as F

from smearlens import ConvAttn, ConvAttnConfig, DepthwiseConv, mixings, prev_token_score
from smearlens.analysis.mixing.bands import kernel_lags
from smearlens.analysis.mixing.kinds import (
    BandMixing,
    ComposedMixing,
    DenseMixing,
    SoftmaxMixing,
    UniformMixing,
)
from smearlens.nn.conv import depthwise_conv_plain

LENGTHS = [1, 2, 127, 128, 129, 300]


def softmax_case(length, *, causal=True, dtype=torch.float64, keys=None):
    """q, k and their pattern by the plain formula."""
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, 3, 5, generator=generator, dtype=dtype)
    k = torch.randn(2, keys or length, 3, 5, generator=generator, dtype=dtype)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(5)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return q, k, scores.softmax(-1)


def all_mixings(length):
    """(mixing, the matrix it stands for) of every kind."""
    q, k, pattern = softmax_case(length)
    kernel = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    band = torch.from_numpy(ref.conv_matrix(kernel.numpy(), [-1, 0, 1], min(length, 9)))
    gain = torch.rand(3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = F.pad(pattern, (0, 1))[..., 1:]  # A[q, s + 1]
    even = torch.ones(length, length, dtype=torch.float64).tril()
    return [
        (DenseMixing(pattern), pattern),
        (SoftmaxMixing(q, k), pattern),
        (BandMixing(kernel, [-1, 0, 1], min(length, 9)), band[None]),
        (
            ComposedMixing(DenseMixing(pattern), gain, [0, 1]),
            pattern * gain[:, :1, None] + moved * gain[:, 1:, None],
        ),
        (UniformMixing(length, length, causal=True), (even / even.sum(-1, True))[None, None]),
    ]


@pytest.mark.parametrize("length", LENGTHS)
def test_rows_diagonals_and_dense_agree(length):
    for mixing, matrix in all_mixings(length):
        n = matrix.shape[-1]
        assert (mixing.n_examples, mixing.n_heads, mixing.n_queries, mixing.n_keys) == matrix.shape
        torch.testing.assert_close(mixing.dense(), matrix)
        for size in (1, 50, 128, n) if n < 10 else (50, 128, n):
            pieces = list(mixing.blocks(size))
            assert [p[0] for p in pieces] == list(range(0, n, size))
            assert [p[1] for p in pieces] == [min(s + size, n) for s in range(0, n, size)]
            torch.testing.assert_close(torch.cat([p[2] for p in pieces], -2), matrix)
        for lag in {0, 1, 2, n - 1, -1, 1 - n, n // 2} & set(range(1 - n, n)):
            expected = matrix.diagonal(-lag, dim1=-2, dim2=-1)
            torch.testing.assert_close(mixing.diagonal(lag), expected)
            assert mixing.diagonal(lag).shape[-1] == n - abs(lag)


@pytest.mark.parametrize("lag", [7, -7, 40])
def test_a_lag_outside_is_refused_by_every_mixing(lag):
    for mixing, _ in all_mixings(7):
        with pytest.raises(ValueError, match=rf"lag={lag} is outside .* allowed: -6..6"):
            mixing.diagonal(lag)


@pytest.mark.parametrize("causal", [True, False])
def test_softmax_of_q_and_k_equals_a_plain_loop(causal):
    q, k, _ = softmax_case(6, causal=causal)
    expected = ref.attention(q.numpy(), k.numpy(), causal=causal)
    np.testing.assert_allclose(SoftmaxMixing(q, k, causal=causal).dense(), expected, atol=1e-12)
    half = SoftmaxMixing(q.bfloat16(), k.bfloat16(), causal=causal)
    assert half.dense().dtype == torch.float32
    np.testing.assert_allclose(half.dense(), expected, atol=2e-2)


def test_softmax_statistics_are_those_of_the_rows():
    q, k, _ = softmax_case(6)
    pattern = ref.attention(q.numpy(), k.numpy(), causal=True)
    found = SoftmaxMixing(q, k).statistics(mass=0.7)
    for name, value in (
        ("entropy", ref.entropy), ("distance", ref.distance), ("span", ref.span(0.7)),
    ):  # fmt: skip
        expected = ref.per_example(pattern, value, ref.Leave())
        np.testing.assert_allclose(getattr(found, name).mean(-1), expected, atol=1e-9)


def test_grouped_queries_share_a_key_head():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 7, 6, 5, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 7, 3, 5, generator=generator, dtype=torch.float64)
    expected = ref.attention(q.numpy(), k.numpy()[:, :, [0, 0, 1, 1, 2, 2]], causal=True)
    np.testing.assert_allclose(SoftmaxMixing(q, k).dense(), expected, atol=1e-12)


# From a cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["learned", "rotary", None])
def test_queries_and_keys_give_what_the_pattern_gives(positions, generator):
    config = ConvAttnConfig(
        d_vocab=11, d_model=12, n_heads=3, kernel_size=5, n_ctx=150, positions=positions, smear=True
    )
    model = ConvAttn(config).eval()
    tokens = torch.randint(0, 11, (2, 133), generator=generator)
    _, cache = model.run_with_cache(tokens)
    both = {n: cache[n] for n in ("blocks.0.attn.hook_q", "blocks.0.attn.hook_k")}
    (streamed,), (stored,) = mixings(both).values(), mixings(cache).values()
    assert isinstance(streamed, SoftmaxMixing)
    assert isinstance(stored, DenseMixing)  # the pattern itself where it is cached
    torch.testing.assert_close(streamed.dense(), stored.dense(), atol=1e-6, rtol=1e-5)
    for lag in (0, 1, 132):
        torch.testing.assert_close(
            streamed.diagonal(lag), stored.diagonal(lag), atol=1e-6, rtol=1e-5
        )
    found, expected = prev_token_score(both), prev_token_score(cache)
    torch.testing.assert_close(
        found["blocks.0.attn"], expected["blocks.0.attn"], atol=1e-6, rtol=1e-5
    )


def test_who_may_read_ahead_is_told_by_the_name():
    q, k, _ = softmax_case(5)
    layers = {"blocks.0.attn": 1, "decoder.blocks.0.attn": 1, "encoder.blocks.0.attn": 0}
    layers["decoder.blocks.0.cross_attn"] = 0
    causal = ref.attention(q.numpy(), k.numpy(), causal=True)
    whole = ref.attention(q.numpy(), k.numpy(), causal=False)
    cache = {f"{layer}.hook_{n}": t for layer in layers for n, t in (("q", q), ("k", k))}
    for layer, mixing in mixings(cache).items():
        assert mixing.causal == layers[layer]
        assert mixing.crossed == layer.endswith("cross_attn")
        np.testing.assert_allclose(mixing.dense(), causal if layers[layer] else whole, atol=1e-12)
    for mixing in mixings(cache, causal=False).values():
        np.testing.assert_allclose(mixing.dense(), whole, atol=1e-12)
    diagonal = torch.eye(5)[None, None]  # square and, by chance, triangular
    found = mixings({f"{layer}.hook_pattern": diagonal for layer in layers})
    assert {layer: int(m.causal) for layer, m in found.items()} == layers


def test_a_band_comes_only_when_asked_for():
    config = ConvAttnConfig(d_vocab=11, d_model=12, n_heads=3, kernel_size=3, n_ctx=20)
    _, cache = ConvAttn(config).run_with_cache(torch.arange(11)[None])
    assert list(mixings(cache)) == ["blocks.0.attn"]
    assert list(mixings(cache, kind="conv")) == ["blocks.0.conv"]
    assert list(mixings(cache, kind=("attention", "conv"))) == ["blocks.0.attn", "blocks.0.conv"]
    config = ConvAttnConfig(d_vocab=11, d_model=12, n_heads=3, n_ctx=20, conv_on="k")
    _, cache = ConvAttn(config).run_with_cache(torch.arange(11)[None])
    band = mixings(cache, kind="conv")["blocks.0.attn.conv_k"]
    assert (band.n_heads, band.n_queries, band.signed, band.causal) == (12, 11, True, True)


# Convolutions ------------------------------------------------------------------------------------


def conv_run(taps, causal, *, bias=True, length=11, batch=2, dtype=torch.float32):
    """Cache of a convolution alone, and the module."""
    torch.manual_seed(taps)
    conv = DepthwiseConv(5, taps, causal=causal, bias=bias).to(dtype)
    x = torch.randn(batch, length, 5, dtype=dtype)
    out = conv(x).detach()
    names = {"hook_in": x, "hook_kernel": conv.weight.detach().clone(), "hook_out": out}
    return {f"blocks.0.conv.{name}": t for name, t in names.items()}, conv


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", range(1, 8))
def test_the_band_times_the_input_is_the_output(taps, causal):
    for length in (2, 3, 7, 130):
        cache, conv = conv_run(taps, causal, length=length, dtype=torch.float64)
        (band,) = mixings(cache, kind="conv").values()
        assert band.lags == conv.lags
        assert band.causal == (min(conv.lags) >= 0)
        if length < 10:
            matrix = ref.conv_matrix(conv.weight.detach().numpy(), conv.lags, length)
            np.testing.assert_array_equal(band.dense()[0], matrix)
        x, out = (cache[f"blocks.0.conv.hook_{n}"] for n in ("in", "out"))
        made = torch.einsum("cqk,bkc->bqc", band.dense()[0], x) + conv.bias
        torch.testing.assert_close(made, out)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("taps", range(1, 8))
def test_lags_of_causal_and_same_kernels(taps, bias):
    """Against `nn.Conv1d` itself: causal padding K - 1, "same" padding (K - 1) // 2."""
    for causal, ahead in ((True, 0), (False, taps // 2)):
        cache, _ = conv_run(taps, causal, bias=bias)
        lags = list(range(-ahead, taps - ahead))
        assert kernel_lags(cache, "blocks.0.conv") == lags
        x, kernel = (cache[f"blocks.0.conv.hook_{n}"] for n in ("in", "kernel"))
        padded = F.pad(x.mT, (taps - 1 - ahead, ahead))
        theirs = F.conv1d(padded, kernel.flip(-1)[:, None], groups=5).mT + 3 * bias
        assert kernel_lags({**cache, "blocks.0.conv.hook_out": theirs}, "blocks.0.conv") == lags


def test_four_units_of_rounding_are_no_misfit():
    """Of the coarsest of the three; above, something has edited the output."""
    x, kernel = torch.randn(2, 40, 5), torch.randn(5, 3).bfloat16()
    out, noise = depthwise_conv_plain(x, kernel.float()), torch.randn(2, 40, 5)
    noise -= noise.mean((0, 1))
    noise *= (out - out.mean((0, 1))).norm() / noise.norm() * torch.finfo(torch.bfloat16).eps
    cache = {"c.hook_in": x, "c.hook_kernel": kernel, "c.hook_out": out + 3.6 * noise}
    assert kernel_lags(cache, "c") == [0, 1, 2]
    with pytest.raises(ValueError, match=r"best misfit 3\.4e-02"):
        kernel_lags({**cache, "c.hook_out": out + 4.4 * noise}, "c")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lags_survive_half_precision_and_a_dropped_batch_axis(dtype):
    for causal in (True, False):
        cache, conv = conv_run(5, causal, length=40)
        half = {name: t.to(dtype) for name, t in cache.items()}
        assert kernel_lags(half, "blocks.0.conv") == conv.lags
        single, conv = conv_run(5, causal, batch=1)
        flat = {n: t if n.endswith("kernel") else t[0] for n, t in single.items()}
        assert kernel_lags(flat, "blocks.0.conv") == conv.lags


@pytest.mark.parametrize("point", ["hook_in", "hook_out", "hook_kernel"])
def test_edited_activations_are_refused(point):
    for dtype in (torch.float32, torch.bfloat16):
        cache, _ = conv_run(3, True, length=40)
        edited = {n: t.to(dtype) for n, t in cache.items()}
        edited[f"blocks.0.conv.{point}"] = edited[f"blocks.0.conv.{point}"].flip(0)
        with pytest.raises(ValueError, match=r"hook_out is not hook_in convolved .* edited by a h"):
            kernel_lags(edited, "blocks.0.conv")


def test_lags_that_cannot_be_told_are_not_guessed():
    short, _ = conv_run(3, False, length=1, batch=1)
    cache, _ = conv_run(3, False)
    zero = {
        n: torch.zeros_like(t) if n.endswith(("kernel", "out")) else t for n, t in cache.items()
    }
    for case, shape in ((short, r"\[1, 1, 5\]"), (zero, r"\[2, 11, 5\]")):
        message = rf"paddings with \[0, 1, 2\] taps ahead all turn hook_in {shape} into hook_out"
        with pytest.raises(ValueError, match=message):
            kernel_lags(case, "blocks.0.conv")


def test_taps_in_the_order_of_torch_are_recognised():
    cache, _ = conv_run(3, True)
    cache["blocks.0.conv.hook_kernel"] = cache["blocks.0.conv.hook_kernel"].flip(-1)
    with pytest.raises(ValueError, match=r"in reverse.*cache weight.flip\(-1\)"):
        kernel_lags(cache, "blocks.0.conv")


def test_a_kernel_of_other_channels_is_explained():
    cache, _ = conv_run(3, True)
    cache["blocks.0.conv.hook_kernel"] = cache["blocks.0.conv.hook_kernel"][1:]
    with pytest.raises(ValueError, match="with the channels of hook_kernel"):
        kernel_lags(cache, "blocks.0.conv")


def test_a_kernel_alone_does_not_tell_its_lags():
    cache, _ = conv_run(3, True)
    del cache["blocks.0.conv.hook_in"]
    with pytest.raises(ValueError, match=r"need \['blocks.0.conv.hook_in'\] in the cache"):
        kernel_lags(cache, "blocks.0.conv")


# Convolution, then attention ---------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("lags", [[0, 1, 2, 3, 4], [-2, -1, 0, 1, 2], [0], [-1, 0]])
def test_composed_equals_the_loop_also_where_the_kernel_is_longer_than_the_sequence(length, lags):
    pattern = ref.random_pattern(1, 2, 3, length)
    gain = np.random.default_rng(2).random((3, len(lags)))
    mixing = ComposedMixing(DenseMixing(torch.from_numpy(pattern)), torch.from_numpy(gain), lags)
    np.testing.assert_allclose(mixing.dense(), ref.composed(pattern, gain, lags), atol=1e-12)
    assert mixing.causal == (min(lags) >= 0)
    assert not mixing.signed
    assert ComposedMixing(mixing.attention, -torch.from_numpy(gain), lags).signed


def test_composed_is_exact_for_a_kernel_that_all_channels_share():
    """A (w * x) = E x: attention reads the convolved stream, E reads the tokens."""
    generator = torch.Generator().manual_seed(0)
    length, taps, causal = 9, 3, False
    gain = torch.randn(3, taps, generator=generator, dtype=torch.float64)
    pattern = torch.from_numpy(ref.random_pattern(3, 2, 3, length))
    x = torch.randn(2, length, 5, generator=generator, dtype=torch.float64)
    lags = DepthwiseConv(5, taps, causal=causal).lags
    composed = ComposedMixing(DenseMixing(pattern), gain, lags).dense()
    for head in range(3):
        conv = DepthwiseConv(5, taps, causal=causal).double()
        with torch.no_grad():
            conv.weight.copy_(gain[head].expand(5, taps))
        attended = pattern[:, head] @ conv(x)
        torch.testing.assert_close(composed[:, head] @ x, attended)
        band = BandMixing(gain[head][None], lags, length).dense()[0, 0]
        torch.testing.assert_close(composed[:, head], pattern[:, head] @ band)


# Properties --------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 5), st.integers(0, 999))
def test_any_band_is_its_matrix(length, taps, ahead, seed):
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(3, taps, generator=generator, dtype=torch.float64)
    lags = [i - min(ahead, taps - 1) for i in range(taps)]
    band = BandMixing(kernel, lags, length)
    np.testing.assert_array_equal(band.dense()[0], ref.conv_matrix(kernel.numpy(), lags, length))
    for lag in range(1 - length, length):
        expected = kernel[:, lags.index(lag)] if lag in lags else torch.zeros(3).double()
        assert torch.equal(
            band.diagonal(lag), expected[None, :, None].expand(1, 3, length - abs(lag))
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 10), st.integers(1, 11), st.booleans(), st.integers(0, 999))
def test_any_softmax_has_rows_of_sum_one_and_diagonals_of_its_rows(queries, keys, causal, seed):
    keys = queries if causal else keys
    generator = torch.Generator().manual_seed(seed)
    q = 4 * torch.randn(2, queries, 3, 5, generator=generator)
    k = torch.randn(2, keys, 3, 5, generator=generator)
    mixing = SoftmaxMixing(q, k, causal=causal)
    dense = mixing.dense()
    assert dense.shape == (2, 3, queries, keys)
    torch.testing.assert_close(dense.sum(-1), torch.ones(2, 3, queries))
    for lag in range(1 - keys, queries):
        expected = dense.diagonal(-lag, dim1=-2, dim2=-1)
        torch.testing.assert_close(mixing.diagonal(lag), expected, rtol=1e-4, atol=1e-6)
