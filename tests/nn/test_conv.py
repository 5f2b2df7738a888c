"""The convolution against a plain loop and `nn.Conv1d`."""

import re
from itertools import product

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import nn

from smearlens._hooks import HookedRootModule, caching_hook
from smearlens.nn import conv as conv_module
from smearlens.nn.conv import DepthwiseConv, depthwise_conv, depthwise_conv_plain

BOTH = pytest.mark.parametrize("convolve", [depthwise_conv, depthwise_conv_plain])


def loop_conv(x, weight, bias, future):
    """y[t, c] = bias[c] + Σ_i weight[c, i] x[t - (i - future), c], entry by entry."""
    batch, length, channels = x.shape
    y = torch.zeros(batch, length, channels, dtype=torch.float64)
    for b, t, c, i in product(range(batch), range(length), range(channels), range(weight.shape[1])):
        source = t - (i - future)
        if 0 <= source < length:
            y[b, t, c] += weight[c, i].double() * x[b, source, c].double()
    return y if bias is None else y + bias.double()


def random_inputs(generator, batch=2, length=7, channels=3, taps=5, dtype=torch.float64):
    shapes = ((batch, length, channels), (channels, taps), (channels,))
    return [
        torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes
    ]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 24 numbers, so that small inputs are cut along both batch and positions."""
    monkeypatch.setattr(conv_module, "_TILE", 24)


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


@BOTH
@pytest.mark.parametrize(("taps", "future"), [(1, 0), (2, 0), (3, 1), (4, 2), (5, 0), (5, 4)])
@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_equals_the_loop(convolve, length, taps, future, generator):
    x, weight, bias = random_inputs(generator, length=length, taps=taps)
    for b in (bias, None):
        y = convolve(x, weight, b, future=future)
        torch.testing.assert_close(y, loop_conv(x, weight, b, future).detach())


@pytest.mark.parametrize("length", [1, 2, 9, 31])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 8, 16])
def test_equals_conv1d_in_value_and_gradient(length, causal, taps, generator, small_tiles):
    inputs = random_inputs(generator, 5, length, 3, taps, torch.float32)
    future = 0 if causal else taps // 2
    theirs = nn.Conv1d(3, 3, taps, padding=taps - 1, groups=3)
    x, weight, bias = inputs
    theirs.weight.data, theirs.bias.data = weight.detach().flip(-1)[:, None], bias.detach()
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)[:, future : future + length]
    actual = depthwise_conv(x, weight, bias, future=future)
    torch.testing.assert_close(actual, expected, atol=5e-6, rtol=0)
    dy = torch.randn(actual.shape, generator=generator)
    dx, dw, db = torch.autograd.grad(expected, (x, theirs.weight, theirs.bias), dy)
    for mine, want in zip(
        torch.autograd.grad(actual, inputs, dy), (dx, dw[:, 0].flip(-1), db), strict=True
    ):
        torch.testing.assert_close(mine, want, atol=5e-6 * float(want.abs().max()), rtol=0)


@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize("future", [0, 2])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients_and_their_gradients(length, future, with_bias, generator, small_tiles):
    inputs = random_inputs(generator, length=length, taps=3)[: 2 + with_bias]

    def convolve(*tensors):
        return depthwise_conv(*tensors, future=future)

    assert torch.autograd.gradcheck(convolve, inputs)
    assert torch.autograd.gradgradcheck(convolve, inputs)


def test_more_channels_than_a_tile_holds_are_one_position_at_a_time(generator, small_tiles):
    given = random_inputs(generator, length=3, channels=29, taps=2)
    values, gradients = [], []
    for convolve in (depthwise_conv, depthwise_conv_plain):
        values.append(convolve(*given))
        gradients.append(torch.autograd.grad(values[-1].square().sum(), given))
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("wanted", [0, 1, 2])
@pytest.mark.parametrize("create_graph", [True, False])
def test_only_the_asked_gradient_is_computed(wanted, create_graph, generator):
    inputs = [t.detach() for t in random_inputs(generator)]
    inputs[wanted].requires_grad_()
    grads = []
    for convolve in (depthwise_conv, depthwise_conv_plain):
        y = convolve(*inputs, future=1)
        grads += torch.autograd.grad(y.square().sum(), inputs[wanted], create_graph=create_graph)
    torch.testing.assert_close(*grads)


def test_any_strides_and_an_expanded_gradient(generator):
    x, weight, bias = random_inputs(generator, dtype=torch.float32)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.testing.assert_close(
        depthwise_conv(turned, weight, bias), depthwise_conv(x, weight, bias)
    )
    mine = torch.autograd.grad(depthwise_conv(turned, weight).sum(), (turned, weight))
    want = torch.autograd.grad(depthwise_conv_plain(x, weight).sum(), (x, weight))
    torch.testing.assert_close(mine, want)


def test_empty_batches_and_sequences_pass(generator):
    weight = torch.randn(3, 4, generator=generator, requires_grad=True)
    for shape in ((0, 5, 3), (2, 0, 3)):
        y = depthwise_conv(torch.zeros(shape), weight)
        assert y.shape == shape
        (grad,) = torch.autograd.grad(y.sum(), weight)
        assert not grad.any()


def test_half_precision_sums_in_float32(generator):
    x, weight, bias = (t.bfloat16() for t in random_inputs(generator, taps=16, length=40))
    exact = depthwise_conv(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(depthwise_conv(x, weight, bias), exact.bfloat16())
    mixed = depthwise_conv(x, weight.float(), bias.float())
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact.float())


@pytest.mark.parametrize(
    ("x", "weight", "bias", "future", "message"),
    [
        (
            (2, 7, 3),
            (4, 5),
            None,
            0,
            "x must be [batch pos channel] with the 4 channels of the wei",
        ),
        ((7, 4), (4, 5), None, 0, "got [7, 4]"),
        ((2, 7, 4), (4, 5), (3,), 0, "bias must be [channel] = [4], got [3]"),
        (
            (2, 7, 4),
            (4, 5),
            None,
            5,
            "future=5 taps of 5 cannot read ahead; allowed: 0 (causal) to",
        ),
        ((2, 7, 4), (4, 5), None, -1, "future=-1"),
    ],
)
def test_wrong_input_is_explained(unchecked, x, weight, bias, future, message):
    bias = None if bias is None else torch.zeros(bias)
    with pytest.raises(ValueError, match=re.escape(message)):
        depthwise_conv(torch.zeros(x), torch.zeros(weight), bias, future=future)


@pytest.mark.parametrize(
    ("taps", "causal", "lags"),
    [
        (1, True, [0]),
        (4, True, [0, 1, 2, 3]),
        (4, False, [-2, -1, 0, 1]),
        (5, False, [-2, -1, 0, 1, 2]),
    ],
)
def test_lags_say_which_token_a_tap_reads(taps, causal, lags):
    module = DepthwiseConv(1, taps, causal=causal)
    assert module.lags == lags
    impulse = torch.zeros(1, 11, 1)
    impulse[0, 5] = 1
    for tap, lag in enumerate(lags):
        module.weight.data.zero_()
        module.weight.data[0, tap] = 1
        assert module(impulse).flatten().argmax() == 5 + lag


@pytest.mark.parametrize("taps", [2, 3, 6])
def test_same_padding_is_that_of_conv1d(taps, generator):
    theirs = nn.Conv1d(3, 3, taps, padding=(taps - 1) // 2, groups=3, bias=False)
    module = DepthwiseConv(3, taps, causal=False)
    module.weight.data = theirs.weight.data[:, 0].flip(-1)
    x = torch.randn(2, 11, 3, generator=generator)
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)  # one shorter where taps is even
    torch.testing.assert_close(module(x)[:, : expected.shape[1]], expected)


def test_initialisation_is_uniform_within_that_of_conv1d():
    module = DepthwiseConv(4000, 5, bias=True)
    for values in (module.weight, module.bias):
        assert values.abs().max() <= 5**-0.5
        torch.testing.assert_close(values.std(), torch.tensor(5**-0.5 / 3**0.5), rtol=0.03, atol=0)


class Hooked(HookedRootModule):
    """A root for one module, as a model is."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.setup()

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("causal", [True, False])
def test_every_hook_of_the_convolution_sees_its_tensor(causal, generator):
    model = Hooked(DepthwiseConv(3, 4, causal=causal, bias=True))
    x = torch.randn(2, 7, 3, generator=generator)
    y, cache = model.run_with_cache(x)
    assert {name: tuple(t.shape) for name, t in cache.items()} == {
        "layer.hook_in": (2, 7, 3),
        "layer.hook_kernel": (3, 4),
        "layer.hook_out": (2, 7, 3),
    }
    torch.testing.assert_close(cache["layer.hook_kernel"], model.layer.weight.detach())
    torch.testing.assert_close(cache["layer.hook_out"], y)


def test_a_tap_is_ablated_by_a_hook_and_learns_through_it(generator):
    model = Hooked(DepthwiseConv(3, 4))
    x = torch.randn(2, 7, 3, generator=generator)
    without = model.layer.weight.detach().clone()
    without[:, 1] = 0

    def ablate(kernel, hook):
        kernel[:, 1] = 0
        return kernel

    y = model.run_with_hooks(x, fwd_hooks=[("layer.hook_kernel", ablate)])
    torch.testing.assert_close(y, loop_conv(x, without, None, 0).float())
    y.sum().backward()
    assert not model.layer.weight.grad[:, 1].any()
    assert model.layer.weight.grad[:, 2].all()
    assert model.layer.weight[:, 1].all(), "the weight itself must not change"


def test_an_edit_of_input_or_output_takes_effect(generator):
    model = Hooked(DepthwiseConv(3, 4))
    x = torch.randn(2, 7, 3, generator=generator)
    twice = [(f"layer.{point}", lambda t, hook: t.mul_(2)) for point in ("hook_in", "hook_out")]
    torch.testing.assert_close(model.run_with_hooks(x, fwd_hooks=twice), 4 * model(x))


def test_a_cached_kernel_does_not_follow_the_optimiser(generator):
    model = Hooked(DepthwiseConv(3, 4))
    cache = {}
    model.layer.hook_kernel.add_hook(caching_hook(cache))
    model(torch.randn(2, 7, 3, generator=generator))
    before = cache["layer.hook_kernel"].clone()
    with torch.no_grad():
        model.layer.weight.mul_(2)
    torch.testing.assert_close(cache["layer.hook_kernel"], before)


@pytest.mark.parametrize("taps", [1, 2, 5])
@pytest.mark.parametrize("pieces", [[1] * 11, [4, 1, 1, 5], [11], [1, 0, 10]])
def test_steps_equal_one_full_convolution(taps, pieces, generator):
    module = DepthwiseConv(3, taps, bias=True)
    x = torch.randn(2, 11, 3, generator=generator)
    buffer, outputs, state, stateful = None, [], {}, []
    for piece in x.split(pieces, dim=1):
        y, buffer = module.step(piece, buffer)
        outputs.append(y)
        stateful.append(module(piece, state=state))
    torch.testing.assert_close(torch.cat(outputs, 1), module(x))
    torch.testing.assert_close(torch.cat(stateful, 1), module(x))
    torch.testing.assert_close(buffer, x[:, 11 - (taps - 1) :])


def test_steps_keep_what_a_hook_made_of_the_input(generator):
    model = Hooked(DepthwiseConv(3, 3))
    x = torch.randn(2, 5, 3, generator=generator)
    expected = model(x * 2)
    model.layer.hook_in.add_hook(lambda t, hook: t * 2)
    state = {}
    y = torch.cat([model.layer(piece, state=state) for piece in x.split(2, dim=1)], 1)
    torch.testing.assert_close(y, expected)
    assert list(state) == ["layer.past"]


def test_steps_that_cannot_be_are_explained(unchecked):
    with pytest.raises(ValueError, match="causal=False reads tokens that do not exist yet"):
        DepthwiseConv(3, 3, causal=False).step(torch.zeros(2, 1, 3))
    with pytest.raises(ValueError, match=re.escape("last 2 inputs, [2, 2, 3], got [2, 3, 3]")):
        DepthwiseConv(3, 3).step(torch.zeros(2, 1, 3), torch.zeros(2, 3, 3))
    with pytest.raises(ValueError, match="with the 3 channels of the weight"):
        DepthwiseConv(3, 3).step(torch.zeros(2, 1, 1))  # one channel would spread over all three
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0"):
        DepthwiseConv(3, 0)
    with pytest.raises(ValueError, match="channels must be at least 1, got -2"):
        DepthwiseConv(-2, 3)
