"""Kernels, smearing, scores by lag: plain loops, planted coefficients, the model's own scores."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref

from smearlens import (
    ConvAttn,
    ConvAttnConfig,
    DepthwiseConv,
    KeySmear,
    kernel_profile,
    score_by_lag,
    smear_coefficient,
    smear_evidence,
)
from smearlens.analysis.kernels import only_layer
from smearlens.analysis.mixing.kinds import ComposedMixing
from smearlens.analysis.mixing.layers import mixings
from smearlens.analysis.smearing import composition_gain, shifted


def model_and_cache(tokens=None, **changes):
    torch.manual_seed(2)
    sizes = {"d_vocab": 7, "d_model": 6, "n_heads": 2, "kernel_size": 3, "n_ctx": 20}
    model = ConvAttn(ConvAttnConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    tokens = torch.randint(0, 7, (2, 9)) if tokens is None else tokens
    return model, tokens, model.run_with_cache(tokens)[1]


# Profiles ----------------------------------------------------------------------------------------


def test_profile_of_planted_taps():
    """Lag 1 of equal size and opposite signs: nothing in the signed mean, all in the RMS."""
    kernel = torch.zeros(4, 3)
    kernel[:, 1] = torch.tensor([3.0, -3.0, 3.0, -3.0])
    kernel[:, 0] = torch.tensor([1.0, 1.0, -1.0, 3.0])
    profile = kernel_profile(kernel)
    assert profile.lags == [0, 1, 2]
    assert profile.rms.tolist() == pytest.approx([math.sqrt(3), 3, 0])
    assert profile.signed_mean.tolist() == pytest.approx([1, 0, 0])
    assert profile.mean_abs.tolist() == pytest.approx([1.5, 3, 0])
    assert profile.share.tolist() == pytest.approx([12 / 48, 36 / 48, 0])
    assert (float(profile.low[1]), float(profile.high[1])) == pytest.approx((3, 3))
    assert profile.records()[1]["lag"] == 1
    assert "untrained: rms 0.333" in repr(profile)


def test_profile_is_sorted_by_lag_and_counts_the_future():
    kernel = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
    turned = kernel_profile(kernel, lags=[1, 0, -2])
    assert turned.lags == [-2, 0, 1]
    assert turned.signed_mean.tolist() == [3, 2, 1]
    assert turned.future_share == pytest.approx(9 / 14)
    assert kernel_profile(kernel).future_share == 0


@pytest.mark.parametrize(("causal", "lags"), [(True, [0, 1, 2, 3]), (False, [-2, -1, 0, 1])])
def test_profile_of_a_cache_finds_its_lags(causal, lags):
    model, _, cache = model_and_cache(kernel_size=4, causal=causal)
    profile = kernel_profile(cache)
    assert profile.lags == lags
    kernel = model.blocks[0].conv.weight.detach().double()
    torch.testing.assert_close(profile.rms, kernel.square().mean(0).sqrt())
    share = kernel.square().sum(0)[: -min(lags)].sum() / kernel.square().sum()
    assert profile.future_share == pytest.approx(float(share) if min(lags) else 0)


def test_the_untrained_null_is_that_of_fresh_convolutions():
    """512 channels, 5 taps: the signed mean has s.d. 0.011, against modules freshly drawn."""
    torch.manual_seed(0)
    profile = kernel_profile(torch.ones(512, 5))
    assert profile.null_rms == pytest.approx((1 / 5 / 3) ** 0.5)
    assert profile.null_signed / 2.2414 == pytest.approx(0.0114, rel=0.1)  # P(|z| < 2.24) = 0.975
    fresh = torch.cat([DepthwiseConv(512, 5).weight.detach() for _ in range(60)], 1).double()
    assert float(fresh.mean(0).std()) == pytest.approx(0.011, abs=0.0015)
    assert float((fresh.mean(0).abs() > profile.null_signed).double().mean()) < 0.09
    rms = fresh.square().mean(0).sqrt()
    assert float(rms.mean()) == pytest.approx(profile.null_rms, rel=0.01)
    assert 0.003 < float((rms > profile.null_high).double().mean()) < 0.07


def test_interval_of_the_rms_is_a_bootstrap_over_channels():
    kernel = np.random.default_rng(0).normal(size=(40, 2))
    profile = kernel_profile(torch.from_numpy(kernel))
    for tap in range(2):
        low, high = ref.bootstrap(kernel[:, tap] ** 2, 0.95, 4000, seed=tap)
        assert float(profile.low[tap]) == pytest.approx(math.sqrt(low), abs=0.02)
        assert float(profile.high[tap]) == pytest.approx(math.sqrt(high), abs=0.02)


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 7), st.integers(1, 5), st.integers(0, 999))
def test_only_the_signed_mean_sees_the_sign_of_a_channel(channels, taps, seed):
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(channels, taps, generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (channels, 1), generator=generator) * 2 - 1
    one, two = kernel_profile(kernel), kernel_profile(kernel * signs)
    for name in ("rms", "share", "mean_abs", "low", "high"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert float(one.share.sum()) == pytest.approx(1)
    torch.testing.assert_close(two.signed_mean, (kernel * signs).mean(0))


# Smearing ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_planted_smear_coefficients_are_recovered(noise, generator):
    plain = torch.randn(3, 400, 2, 5, generator=generator, dtype=torch.float64)
    a, b = torch.tensor([0.8, -1.5]), torch.tensor([0.3, -0.5])
    before = torch.cat((plain[:, :1], plain[:, :-1]), 1)
    smeared = a[:, None] * plain + b[:, None] * before
    smeared = smeared + noise * torch.randn(smeared.shape, generator=generator)
    fit = smear_coefficient(smeared, plain)
    near = 1e-7 if noise == 0 else 0.03
    torch.testing.assert_close(fit.a, a.double(), atol=near, rtol=0)
    torch.testing.assert_close(fit.b, b.double(), atol=near, rtol=0)
    torch.testing.assert_close(
        fit.coefficient, (b / (a.abs() + b.abs())).double(), atol=near, rtol=0
    )
    signal = (a.square() + b.square()).double()
    torch.testing.assert_close(fit.r2, signal / (signal + noise**2), atol=near, rtol=0)


def test_smear_fit_equals_least_squares_by_numpy(generator):
    smeared, plain = torch.randn(2, 3, 11, 2, 5, generator=generator, dtype=torch.float64)
    fit = smear_coefficient(smeared, plain)
    for head in range(2):
        y = smeared[:, 1:, head].numpy().ravel()
        x = np.stack((plain[:, 1:, head].numpy().ravel(), plain[:, :-1, head].numpy().ravel()), 1)
        (a, b), rest, *_ = np.linalg.lstsq(x, y, rcond=None)
        assert (float(fit.a[head]), float(fit.b[head])) == pytest.approx((a, b))
        assert float(fit.r2[head]) == pytest.approx(1 - rest[0] / (y @ y))


def test_key_smear_is_recovered_with_its_weight(generator):
    smear = KeySmear(3)
    with torch.no_grad():
        smear.alpha.copy_(torch.tensor([0.0, 2.0, -1.0]))
    keys = torch.randn(2, 9, 3, 5, generator=generator)
    fit = smear_coefficient(smear(keys).detach(), keys)
    weight = 1 - torch.sigmoid(torch.tensor([0.0, 2.0, -1.0]))
    torch.testing.assert_close(fit.coefficient, weight.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(fit.r2, torch.ones(3).double())
    ours, _, cache = model_and_cache(conv_on=None, smear=True, positions=None)
    plain = torch.einsum(
        "bpm,hmd->bphd", cache["blocks.0.hook_resid_pre"], ours.blocks[0].attn.W_K.detach()
    )
    fit = smear_coefficient(cache["blocks.0.attn.hook_k"], plain)
    expected = cache["blocks.0.attn.smear.hook_weight"].double()
    torch.testing.assert_close(fit.coefficient, expected, atol=1e-5, rtol=0)


def test_half_smeared_unit_keys():
    keys = torch.eye(5)[None, :, None]  # e_0, e_1, …
    smeared = KeySmear(1)(keys).detach()[0, :, 0]
    torch.testing.assert_close(smeared[1:], (torch.eye(5)[1:] + torch.eye(5)[:-1]) / 2)
    torch.testing.assert_close(smeared[0], torch.eye(5)[0])
    fit = smear_coefficient(smeared[None, :, None], keys)
    assert float(fit.coefficient) == pytest.approx(0.5)


# Scores by lag -----------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_scores_by_lag_equal_a_plain_loop(causal):
    model, _, cache = model_and_cache(torch.randint(0, 7, (2, 5)), causal=causal)
    w_k = model.blocks[0].attn.W_K.detach()
    parts = score_by_lag(cache, w_k)
    conv = model.blocks[0].conv
    assert list(parts) == conv.lags
    for column, lag in enumerate(conv.lags):
        expected = ref.score_of_lag(
            cache["blocks.0.attn.hook_q"].numpy(), cache["blocks.0.conv.hook_in"].numpy(),
            conv.weight.detach().numpy()[:, column], w_k.numpy(), lag,
        )  # fmt: skip
        np.testing.assert_allclose(parts[lag], expected, atol=2e-5)


@pytest.mark.parametrize("positions", ["learned", None])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_the_parts_sum_to_the_scores_of_the_model(residual, causal, positions):
    """Learned positions are part of what the convolution reads, so of `hook_in`."""
    model, _, cache = model_and_cache(residual=residual, causal=causal, positions=positions)
    carried = {"carried": 1.0} if residual else {}
    w_k = model.blocks[0].attn.W_K
    parts = score_by_lag(cache, w_k, **carried)
    scores = cache["blocks.0.attn.hook_attn_scores"]
    past = torch.ones(9, 9).tril().bool()
    total = sum(parts.values())
    torch.testing.assert_close(total[..., past], scores[..., past], atol=1e-4, rtol=1e-4)
    assert not total.requires_grad
    with pytest.raises(ValueError, match="pass carried=1 if a skip connection"):
        score_by_lag(cache, w_k, carried=1 - float(residual))
    alone = {name: t for name, t in cache.items() if not name.endswith("attn_scores")}
    without = score_by_lag(alone, w_k, carried=1 - float(residual))
    wrong = sum(without.values()) - scores.masked_fill(~past, 0)
    assert float(wrong[..., past].abs().max()) > 0.05
    _, flat = model.run_with_cache(torch.randint(0, 7, (1, 9)), remove_batch_dim=True)
    batched = {n: t if n.endswith(("kernel",)) else t[None] for n, t in flat.items()}
    for lag, part in score_by_lag(flat, w_k, **carried).items():
        torch.testing.assert_close(part, score_by_lag(batched, w_k, **carried)[lag])


def test_smear_evidence_equals_a_plain_loop():
    model, tokens, cache = model_and_cache()
    tokens[1] = torch.arange(9) % 7
    parts = score_by_lag(cache, model.blocks[0].attn.W_K)
    found = smear_evidence(parts, tokens)
    assert list(found) == [0, 1, 2]
    for lag, evidence in found.items():
        expected = ref.smear_evidence(parts[lag].numpy(), tokens.numpy())
        np.testing.assert_allclose(evidence, expected, atol=1e-5)
    none = smear_evidence(parts, torch.stack((tokens[0], torch.arange(9))))
    assert none[1][1].isnan().all()
    assert none[1][0].isfinite().all()


def test_evidence_of_planted_key_smearing():
    """Keys that hold only the previous token, queries that look for their own: lag 1 leads."""
    tokens = torch.tensor([[4, 2, 5, 1, 4, 2, 5, 1, 4]])
    kernel = torch.zeros(7, 3)
    kernel[:, 1] = 1
    x = torch.eye(7)[tokens]
    out = shifted(x, 1)
    cache = {
        "blocks.0.conv.hook_in": x, "blocks.0.conv.hook_kernel": kernel,
        "blocks.0.conv.hook_out": out, "blocks.0.attn.hook_q": x[:, :, None] * 7**0.5,
    }  # fmt: skip
    evidence = smear_evidence(score_by_lag(cache, torch.eye(7)[None]), tokens)
    assert {lag: float(e) for lag, e in evidence.items()} == pytest.approx({0: 0, 1: 1, 2: 0})


# Convolution, then attention ---------------------------------------------------------------------


def test_composition_gain_is_a_frobenius_norm_per_lag(generator):
    kernel = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    w_v = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    w_o = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    found = composition_gain(kernel, w_v, w_o)
    for head in range(2):
        norms = [
            float(torch.linalg.matrix_norm(w_o[head].T @ w_v[head].T @ torch.diag(kernel[:, tap])))
            for tap in range(3)
        ]
        assert found[head].tolist() == pytest.approx([n / sum(norms) for n in norms])


def test_composed_attention_of_a_model_with_one_tap_is_its_attention_moved():
    model, _, cache = model_and_cache()
    kernel = torch.zeros(6, 3)
    kernel[:, 1] = 0.5
    attn = model.blocks[0].attn
    gain = composition_gain(kernel, attn.W_V.detach(), attn.W_O.detach())
    torch.testing.assert_close(gain, torch.tensor([[0.0, 1.0, 0.0]] * 2))
    (attention,) = mixings(cache).values()
    moved = ComposedMixing(attention, gain, [0, 1, 2]).dense()
    torch.testing.assert_close(moved[..., :-1], cache["blocks.0.attn.hook_pattern"][..., 1:])
    assert moved[..., -1].abs().max() == 0


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 9), st.integers(-10, 10), st.integers(0, 99))
def test_shifting_is_by_index(length, lag, seed):
    x = torch.randn(2, length, 3, generator=torch.Generator().manual_seed(seed))
    moved = shifted(x, lag)
    for t in range(length):
        expected = x[:, t - lag] if 0 <= t - lag < length else torch.zeros(2, 3)
        assert torch.equal(moved[:, t], expected)


def test_the_layer_can_be_named():
    kernels = {f"blocks.{i}.conv.hook_kernel": torch.ones(5, 3) for i in range(2)}
    assert only_layer(kernels, "hook_kernel", "blocks.1.conv") == "blocks.1.conv"
    assert kernel_profile(kernels, layer="blocks.0.conv", lags=[-1, 0, 1]).lags == [-1, 0, 1]
