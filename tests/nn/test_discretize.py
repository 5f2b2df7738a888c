"""The discretisation rules against matrix exponentials, quadrature, series and values by hand."""

import math
import re

import numpy as np
import pytest
import torch

from smearlens.nn.discretize import (
    RULES,
    at_least_float32,
    discretize,
    negative_share,
    rule_named,
)
from smearlens.nn.scan import selective_scan, selective_scan_plain

ALL = sorted(RULES)


def pair(delta, a, rule, dtype=torch.float64):
    """(A_bar, B_bar) of one channel with one state and B = 1."""
    tensor = torch.tensor([[delta]], dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    return [float(x) for x in discretize(tensor, a * one, one, rule)]


@pytest.mark.parametrize(
    ("rule", "delta", "a", "expected"),
    [
        ("mamba", 0.7, -1, (0.496585, 0.7)),
        ("zoh", 0.7, -1, (0.496585, 0.503415)),
        ("bilinear", 0.7, -1, (0.481481, 0.518519)),
        ("mamba", 0.5, -2, (0.367879, 0.5)),
        ("zoh", 0.5, -2, (0.367879, 0.316060)),
        ("bilinear", 0.5, -2, (0.333333, 0.333333)),
        ("bilinear", 2, -1, (0, 1)),
        ("bilinear", 3, -1, (-0.2, 1.2)),
        ("bilinear", 6, -1, (-0.5, 1.5)),
        ("bilinear-clamped", 0.7, -1, (0.481481, 0.518519)),
        ("bilinear-clamped", 6, -1, (0, 1.5)),
    ],
)
def test_pairs_computed_by_hand(rule, delta, a, expected):
    assert pair(delta, a, rule) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("delta", [1e-3, 0.1, 1.0, 1.6, 7.0])
def test_zoh_is_the_matrix_exponential(delta):
    a = -1.3  # exp([[a, 1], [0, 0]]·delta) holds A_bar and the gain in its first row
    generator = torch.tensor([[a, 1.0], [0.0, 0.0]], dtype=torch.float64) * delta
    A_bar, gain = torch.linalg.matrix_exp(generator)[0]
    assert pair(delta, a, "zoh") == pytest.approx((float(A_bar), float(gain)), rel=1e-13)


@pytest.mark.parametrize("delta", [0.01, 0.1, 1.0, 1.6, 5.0])
def test_gain_of_a_constant_input(delta):
    dc = {}
    for rule in ALL:
        A_bar, B_bar = pair(delta, -1.0, rule)
        dc[rule] = B_bar / (1 - A_bar)
    kept = 1 if delta < 2 else delta / (1 + delta / 2)  # a clamped A_bar lets go of it all
    assert dc["bilinear-clamped"] == pytest.approx(kept, rel=1e-13)
    assert dc["zoh"] == pytest.approx(1, rel=1e-13)
    assert dc["bilinear"] == pytest.approx(1, rel=1e-13)
    assert dc["mamba"] == pytest.approx(delta / (1 - math.exp(-delta)), rel=1e-13)


@pytest.mark.parametrize("rule", ALL)
def test_a_step_of_zero_is_skipped_and_a_rate_of_zero_sums(rule):
    assert pair(0.0, -3.0, rule) == [1.0, 0.0]
    assert pair(0.3, 0.0, rule, torch.float64) == [1.0, 0.3]


@pytest.mark.parametrize("exponent", [-30, -12, -8, -7, -4, -2, -1, 0, 1])
def test_zoh_keeps_its_digits_near_zero(exponent):
    z = -(10.0**exponent)
    exact = math.expm1(z) / z if exponent > -20 else 1.0
    assert pair(0.25, 4 * z, "zoh", torch.float32)[1] == pytest.approx(0.25 * exact, rel=3e-7)
    assert pair(0.25, 4 * z, "zoh", torch.float64)[1] == pytest.approx(0.25 * exact, rel=3e-15)


@pytest.mark.parametrize("a", [0.0, -1e-25, -1e-9, -1e-3, -0.2])
def test_gradient_of_zoh_near_zero(a):
    delta = torch.tensor([[0.5]], dtype=torch.float64)
    A = torch.full((1, 1), a, dtype=torch.float64, requires_grad=True)
    gain = discretize(delta, A, torch.ones(1, 1, dtype=torch.float64), "zoh")[1].sum()
    (slope,) = torch.autograd.grad(gain, A, create_graph=True)
    (curve,) = torch.autograd.grad(slope, A)
    terms = range(20)  # d/da and d²/da² of Σ delta (delta a)^k / (k+1)!
    z = 0.5 * a
    first = sum(0.25 * (k + 1) * z**k / math.factorial(k + 2) for k in terms)
    second = sum(0.125 * (k + 1) * (k + 2) * z**k / math.factorial(k + 3) for k in terms)
    assert slope.item() == pytest.approx(first, rel=1e-12)
    assert curve.item() == pytest.approx(second, rel=1e-11)


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("columns", [1, 5])
def test_gradients_of_both_orders(rule, columns):
    delta = torch.rand(2, 3, 7, dtype=torch.float64) * 2
    delta[0, 1] = 0
    A = -torch.rand(7, columns, dtype=torch.float64) * 3
    A[4] = 0
    B = torch.randn(2, 3, 5, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (delta, A, B)]
    assert torch.autograd.gradcheck(lambda *x: discretize(*x, rule), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: discretize(*x, rule), inputs)


def moment(z, order):
    """∫₀¹ s^order exp(z·s) ds by Gauss-Legendre quadrature, in float64."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(60))
    s = (nodes + 1) / 2
    return (torch.exp(z.double()[..., None] * s) * s**order * weights / 2).sum(-1)


SLOPES = {  # α', φ' as functions of z
    "mamba": lambda z: (torch.exp(z), 0 * z),
    "zoh": lambda z: (torch.exp(z), moment(z, 1)),
    "bilinear": lambda z: (1 / (1 - z / 2) ** 2, 0.5 / (1 - z / 2) ** 2),
    "bilinear-clamped": lambda z: ((z > -2) / (1 - z / 2) ** 2, 0.5 / (1 - z / 2) ** 2),
}
PHIS = {
    "mamba": torch.ones_like,
    "zoh": lambda z: moment(z, 0),
    "bilinear": lambda z: 2 / (2 - z),
    "bilinear-clamped": lambda z: 2 / (2 - z),
}


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place_kernels(rule, dtype):
    delta = torch.rand(11, 2, 1, 7, dtype=dtype) * 3
    A = -torch.rand(5, 7, dtype=dtype) * torch.logspace(-6, 1, 5, dtype=dtype)[:, None]
    delta[3], A[2, 4] = 0, 0
    z = delta.double() * A.double()
    assert (z < -2).any()
    decay, phi, d_decay, d_phi = torch.randn(4, 11, 2, 5, 7, dtype=dtype)
    kernel, tolerance = RULES[rule], 1e-6 if dtype == torch.float32 else 1e-13
    kernel.fill(delta, A, decay, phi)
    A_bar, _ = kernel.factors(delta, A)
    assert (decay - A_bar).abs().max() < tolerance
    if not kernel.constant_phi:
        assert (phi / PHIS[rule](z) - 1).abs().max() < tolerance
    alpha_slope, phi_slope = SLOPES[rule](z)
    expected = d_decay * alpha_slope + d_phi * phi_slope
    found = kernel.pull(d_decay, d_phi, delta, A, decay, phi)
    assert found.data_ptr() == d_decay.data_ptr()
    assert (found - expected).abs().max() < 10 * tolerance


def test_the_slopes_of_zoh_where_states_grow():
    """Rates above 0, on both sides of the radius of the series."""
    delta = torch.linspace(0.01, 1, 13, dtype=torch.float64).view(13, 1, 1, 1)
    A = torch.tensor([[0.02, 0.3], [1.0, 3.0]], dtype=torch.float64)
    z, kernel = delta * A, RULES["zoh"]
    decay, phi, d_decay, d_phi = torch.randn(4, 13, 1, 2, 2, dtype=torch.float64)
    kernel.fill(delta, A, decay, phi)
    expected = d_decay * torch.exp(z) + d_phi * moment(z, 1)
    torch.testing.assert_close(kernel.pull(d_decay, d_phi, delta, A, decay, phi), expected)


def test_a_shared_rate_keeps_its_axis_at_size_one():
    delta, B = torch.rand(2, 11, 3), torch.randn(2, 11, 5)
    A_bar, B_bar = discretize(delta, -torch.ones(3, 1), B, "zoh")
    full_A_bar, full_B_bar = discretize(delta, -torch.ones(3, 5), B, "zoh")
    assert A_bar.shape == (2, 11, 3, 1)
    torch.testing.assert_close(A_bar.expand(2, 11, 3, 5), full_A_bar, rtol=0, atol=0)
    torch.testing.assert_close(B_bar, full_B_bar, rtol=0, atol=0)


def test_negative_share_counts_what_the_rule_produces():
    delta = torch.rand(2, 31, 3) * 4
    A = -torch.rand(3, 5) * 4
    expected = torch.zeros(3)
    for channel in range(3):
        products = delta[:, :, channel, None] * -A[channel]
        expected[channel] = (products > 2).float().mean()
    assert 0.1 < expected.min() < expected.max() < 0.9
    torch.testing.assert_close(negative_share(delta, A, "bilinear"), expected)
    assert negative_share(delta, A, "mamba").tolist() == [0, 0, 0]
    for rule in ("zoh", "bilinear-clamped"):
        assert negative_share(delta, A, rule).tolist() == [0, 0, 0]


def test_the_blocked_scan_runs_the_clamped_rule_as_its_twin_does():
    u, delta, B, C = torch.randn(4, 2, 67, 5, dtype=torch.float64).unbind(0)
    delta, A = delta.abs() * 2, -torch.rand(5, 5, dtype=torch.float64) * 3
    assert negative_share(delta, A, "bilinear").min() > 0.1
    inputs = [x.requires_grad_() for x in (u, delta, A, B, C)]
    found = []
    for scan in (selective_scan, selective_scan_plain):
        y, _ = scan(*inputs, rule="bilinear-clamped")
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    torch.testing.assert_close(*found)


def test_low_precision_inputs_are_discretised_in_float32():
    delta, A, B = torch.rand(2, 3).bfloat16(), -torch.rand(3, 5).bfloat16(), torch.randn(2, 5)
    A_bar, B_bar = discretize(delta, A, B.bfloat16(), "bilinear")
    assert A_bar.dtype == B_bar.dtype == torch.float32
    assert {x.dtype for x in at_least_float32(delta, A.double())} == {torch.float64}


@pytest.mark.parametrize(
    ("wrong", "nearest"), [("mambo", "mamba"), ("zero", "zoh"), ("tustin_bilinear", "bilinear")]
)
def test_an_unknown_rule_names_the_nearest(wrong, nearest):
    message = f"no discretisation rule {wrong!r}; nearest: [{nearest!r}]; rules: ['mamba', 'zoh',"
    with pytest.raises(ValueError, match=re.escape(message)):
        rule_named(wrong)
    with pytest.raises(ValueError, match=re.escape(message)):
        discretize(torch.ones(1, 1), -torch.ones(1, 1), torch.ones(1, 1), wrong)
