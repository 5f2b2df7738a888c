"""Every linear scan against a loop over indices; what each scan loses in float32."""

import re
from itertools import product

import pytest
import torch
from torch.autograd import grad, gradcheck

from smearlens.nn.discretize import RULES, discretize
from smearlens.nn.scan import selective_scan, selective_scan_plain
from smearlens.nn.scan_variants import METHODS, linear_scan

EXACT = ["sequential", "doubling", "logspace"]


def loop(a, write, state):
    states = torch.zeros_like(write)
    for b, c, n in product(*(range(size) for size in state.shape)):
        h = state[b, c, n].item()
        for t in range(write.shape[1]):
            h = a[b, t, c, n].item() * h + write[b, t, c, n].item()
            states[b, t, c, n] = h
    return states


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("pos", [1, 2, 3, 8, 13, 31])
@pytest.mark.parametrize("kind", ["positive", "signed", "zeros"])
def test_equals_a_loop(method, pos, kind):
    a = torch.rand(2, pos, 3, 5, dtype=torch.float64)
    write = torch.randn(2, pos, 3, 5, dtype=torch.float64)
    state = torch.randn(2, 3, 5, dtype=torch.float64)
    if kind != "positive":
        a = 2 * a - 1
    if kind == "zeros":
        a[torch.rand_like(a) < 0.1] = 0
        write[torch.rand_like(a) < 0.3] = 0
    states, final = linear_scan(a, write, initial_state=state, method=method)
    expected = loop(a, write, state)
    torch.testing.assert_close(states, expected)
    torch.testing.assert_close(final, expected[:, -1])
    states, _ = linear_scan(a, write, method=method)
    torch.testing.assert_close(states, loop(a, write, torch.zeros_like(state)))


@pytest.mark.parametrize("method", METHODS)
def test_a_scan_of_a_prefix_hands_its_state_on(method):
    a, write = torch.rand(2, 17, 3, 5).double(), torch.rand(2, 17, 3, 5).double() + 0.1
    states, final = linear_scan(a, write, method=method)
    first, middle = linear_scan(a[:, :7], write[:, :7], method=method)
    second, last = linear_scan(a[:, 7:], write[:, 7:], initial_state=middle, method=method)
    torch.testing.assert_close(torch.cat([first, second], 1), states)
    torch.testing.assert_close(last, final)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 11, 3, 5), (2, 1, 3, 5), (2, 11, 3, 1), (1, 1, 3, 1)])
def test_decays_broadcast(method, shape):
    a, write = torch.rand(shape).double(), torch.rand(2, 11, 3, 5).double() + 0.1
    whole = linear_scan(a.expand(2, 11, 3, 5), write, method=method)
    torch.testing.assert_close(linear_scan(a, write, method=method), whole)


@pytest.mark.parametrize("method", EXACT)
def test_gradients_are_numerical_derivatives(method):
    a = (torch.rand(2, 5, 3, 2, dtype=torch.float64) * 2 - 1).requires_grad_()
    write = torch.randn(2, 5, 3, 2, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(
        lambda a, w, h: linear_scan(a, w, initial_state=h, method=method), (a, write, state)
    )


def test_zeros_stay_zero_in_log_space_and_their_gradient_is_lost():
    a = torch.full((1, 5, 1, 1), 0.5, requires_grad=True)
    write = torch.tensor([0.0, 0, 1, 0, -0.25]).view(1, 5, 1, 1).requires_grad_()
    states, final = linear_scan(a, write, method="logspace")
    torch.testing.assert_close(states.flatten(), torch.tensor([0, 0, 1, 0.5, 0]), atol=1e-7, rtol=0)
    assert states.flatten()[:2].tolist() == [0, 0]
    d_a, d_write = grad(final.sum(), (a, write))
    assert d_a.isfinite().all()
    torch.testing.assert_close(d_write.flatten(), torch.tensor([0, 0, 0.25, 0, 1]))  # true: 2^(t-4)


def test_the_floor_counts_a_zero_write_as_exp_minus_12():
    a, write = torch.full((1, 4, 1, 1), 0.5), torch.zeros(1, 4, 1, 1)
    states, _ = linear_scan(a, write, method="logspace-floor")
    floor = 6.144212e-6
    expected = torch.tensor([1, 1.5, 1.75, 1.875]) * floor
    torch.testing.assert_close(states.flatten(), expected, rtol=1e-5, atol=0)
    a, write = torch.zeros(1, 4, 1, 1).double(), torch.ones(1, 4, 1, 1).double()
    states, _ = linear_scan(a, write, method="logspace-floor")  # a decay of 0 leaks as much
    expected = 1 + torch.tensor([0, 1, 1, 1]).double() * floor
    torch.testing.assert_close(states.flatten(), expected, rtol=1e-10, atol=0)


def fresh(length):
    """The recurrence of a freshly initialised layer: decays and writes, float32."""
    delta = torch.logspace(-3, -1, 7) * torch.exp(0.3 * torch.randn(1, length, 7))
    A = -torch.arange(1.0, 17).repeat(7, 1)
    a, b_bar = discretize(delta, A, torch.randn(1, length, 16))
    return a, b_bar * torch.randn(1, length, 7, 1)


def error(a, write, method):
    """Largest error over time relative to the channel's largest state, and max |Σ log a|."""
    exact, _ = linear_scan(a.double(), write.double())
    found, _ = linear_scan(a, write, method=method)
    size = a.double().log().sum(1).abs().max().item()
    return ((found - exact).abs().amax(1) / exact.abs().amax(1)).max().item(), size


@pytest.mark.parametrize("length", [64, 1024, 8192])
def test_log_space_errors_follow_the_cumulative_logarithm(length):
    a, write = fresh(length)
    assert error(a, write, "sequential")[0] < 1.5e-6
    assert error(a, write, "doubling")[0] < 1.5e-6
    logspace, size = error(a, write, "logspace")
    assert 0.1 * 2**-24 * size < logspace < 8 * 2**-24 * size
    assert 1e-4 < error(a, write, "logspace-floor")[0] < 2e-2


def test_products_do_not_lose_precision_over_long_memory():
    delta = torch.rand(1, 8192, 3, 1) * 2e-5
    a, write = torch.exp(-delta), delta * torch.randn(1, 8192, 3, 5)
    assert error(a, write, "sequential")[0] < 1e-5
    assert error(a, write, "doubling")[0] < 1e-4
    assert error(a, write, "logspace-floor")[0] > 0.1  # the writes are as small as the floor


def test_wrong_calls_are_explained():
    a = torch.ones(1, 3, 1, 1)
    message = "no scan 'doublin'; nearest: ['doubling']; methods: ['sequential',"
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_scan(a, a, method="doublin")
    with pytest.raises(
        ValueError, match=re.escape("at least one position, got shape (1, 0, 1, 1)")
    ):
        linear_scan(a[:, :0], a[:, :0])


def regime(name, length, batch=1, channel=7, d_state=16):
    """Inputs with the step sizes of a fresh model, a trained one, or one that never forgets."""
    z = torch.randn(batch, length, channel)
    rates = {"fresh": (1, 16), "trained": (1, 64), "long": (0.5, 1.5)}[name]
    delta = {
        "fresh": torch.logspace(-3, -1, channel) * torch.exp(0.3 * z),
        "trained": torch.nn.functional.softplus(2 * z),
        "long": 2e-5 * torch.rand_like(z),
    }[name]
    A = -torch.linspace(*rates, d_state).repeat(channel, 1)
    B, C = torch.randn(2, batch, length, d_state)
    return torch.randn(batch, length, channel), delta, A, B, C


def worst(found, exact):
    """Largest error over time, relative to the largest value of the same channel."""
    return ((found - exact).abs().amax(1) / exact.abs().amax(1)).max().item()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("name", "length", "bound"),
    [
        ("fresh", 512, 1.5e-6),
        ("fresh", 16384, 1.5e-6),
        ("trained", 2048, 5e-7),
        ("long", 8192, 1e-5),
    ],
)
def test_precision_in_float32(rule, name, length, bound):
    tensors = regime(name, length)
    exact, _ = selective_scan_plain(*(x.double() for x in tensors), rule=rule)
    for scan in (selective_scan, selective_scan_plain):
        assert worst(scan(*tensors, rule=rule)[0], exact) < bound


@pytest.mark.parametrize("rule", RULES)
def test_precision_of_gradients_in_float32(rule):
    tensors = [x.requires_grad_() for x in regime("fresh", 1024, 2, 37)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    weight = torch.randn(2, 1024, 37)
    found = grad(selective_scan(*tensors, rule=rule)[0], tensors, weight)
    exact = grad(selective_scan_plain(*wide, rule=rule)[0], wide, weight.double())
    for one, other in zip(found, exact, strict=True):
        assert (one - other).abs().max() < 2e-6 * other.abs().max()
