"""Corners of layers: the smallest sizes, and which weights exist."""

import jaxtyping
import pytest
import torch

from smearlens.nn.attention import Attention
from smearlens.nn.conv import depthwise_conv, depthwise_conv_plain
from smearlens.nn.layers import MLP
from smearlens.nn.scan import selective_scan, selective_scan_plain
from smearlens.nn.scan_variants import linear_scan
from smearlens.nn.ssm import SelectiveSSM


@pytest.mark.parametrize(("d_model", "n_heads"), [(0, 1), (6, 0), (6, 4), (-6, 3)])
def test_heads_must_divide_a_width_of_at_least_one(d_model, n_heads):
    with pytest.raises(ValueError, match="must be at least 1 and divide d_model"):
        Attention(d_model, n_heads)


def test_a_width_of_one_is_enough():
    x = torch.randn(2, 3, 1)
    assert Attention(1, 1)(x).shape == x.shape


def test_projections_have_biases_only_where_they_are_asked_for():
    layer = SelectiveSSM(5, d_state=3, dt_rank=2)
    assert layer.x_proj.bias is None
    assert layer.dt_proj.bias.shape == (5,)
    for bias in (True, False):
        layer = Attention(6, 3, bias=bias)
        assert (layer.in_proj.bias is not None) is bias
        assert (layer.out_proj.bias is not None) is bias
        mlp = MLP(6, 5, bias=bias)
        assert (mlp.up.bias is not None) is (mlp.down.bias is not None) is bias


def test_the_step_sizes_of_a_new_layer_lie_in_their_range():
    layer = SelectiveSSM(400, d_state=3, dt_rank=2)
    delta = torch.nn.functional.softplus(layer.dt_proj.bias.detach())
    assert 0.001 - 1e-6 <= float(delta.min()) < 0.002
    assert 0.05 < float(delta.max()) <= 0.1 + 1e-6
    assert float(layer.dt_proj.weight.detach().abs().max()) <= 2**-0.5
    torch.testing.assert_close(layer.A.detach(), -torch.arange(1.0, 4).expand(400, 3))


def test_steps_are_scaled_by_the_root_of_the_width():
    assert SelectiveSSM(16, d_state=3, dt_rank=2, scale_delta=True).scale == 0.25
    assert SelectiveSSM(16, d_state=3, dt_rank=2).scale == 1.0


def test_a_width_that_is_not_the_layers_is_refused():
    with pytest.raises(ValueError, match=r"x must be \[batch pos d_model=6\], got"):
        Attention(6, 3)(torch.rand(2, 3, 5))


def test_an_unknown_scan_has_a_nearest_one_however_far():
    with pytest.raises(ValueError, match=r"no scan 'q'; nearest: \['[a-z-]+'\]"):
        linear_scan(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), method="q")


@pytest.mark.parametrize("rule", ["mamba", "zoh", "bilinear"])
def test_the_gradient_of_a_gradient_knows_the_rule_and_the_state_before(rule):
    def second(scan):
        g = torch.Generator().manual_seed(0)
        u, delta = torch.rand(2, 2, 5, 3, generator=g, dtype=torch.float64)
        B, C = torch.rand(2, 2, 5, 2, generator=g, dtype=torch.float64)
        state = torch.rand(2, 3, 2, generator=g, dtype=torch.float64)
        A = -torch.rand(3, 2, generator=g, dtype=torch.float64)
        inputs = [t.requires_grad_() for t in (u, delta, A, B, C, state)]
        y, last = scan(*inputs[:5], rule=rule, initial_state=state)
        first = torch.autograd.grad(y.square().sum() + last.sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), inputs)

    torch.testing.assert_close(second(selective_scan), second(selective_scan_plain))


def test_a_gradient_of_a_gradient_when_inputs_depend_on_each_other():
    """The same kernel twice: the input of the second convolution is made with its weight."""
    sizes = (2, 7, 3), (3, 4), (3,)
    x, w, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes)

    def found(conv, create_graph):
        y = conv(conv(x, w, b), w, b).pow(2).sum()
        return torch.autograd.grad(y, (x, w, b), create_graph=create_graph)

    expected = found(depthwise_conv_plain, False)
    for create_graph in (False, True):
        torch.testing.assert_close(found(depthwise_conv, create_graph), expected)


def test_only_the_read_out_is_differentiated_twice():
    u, delta, B = torch.randn(2, 5, 3), torch.rand(2, 5, 3), torch.randn(2, 5, 4)
    C = torch.randn(2, 5, 4, requires_grad=True)
    y, state = selective_scan(u, delta, -torch.rand(3, 4), B, C)
    (first,) = torch.autograd.grad(y.pow(2).sum() + state.sum(), C, create_graph=True)
    assert torch.autograd.grad(first.sum(), C)[0].isfinite().all()


def test_decay_rates_are_as_precise_as_the_layer():
    layer = SelectiveSSM(5, d_state=3, dt_rank=2).double()
    layer.A_log.data = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(layer.A, -layer.A_log.exp())
    assert layer.half().A.dtype == torch.float32


def test_convolutions_of_a_layer_on_its_own_do_not_share_a_state():
    layer, x, state = Attention(6, 2, conv_on=("q", "k", "v")), torch.randn(2, 7, 6), {}
    pieces = [layer(piece, state=state) for piece in x.split([3, 1, 3], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"a": "Learned"}, r"a must be one of \['learned', 'minus-one'\], got 'Learned'"),
        (
            {"delta": "foo"},
            r"delta must be one of \['selective', 'constant', 'position'\], got 'foo'",
        ),
        ({"method": "foo"}, r"method must be one of \['fused', 'sequential', .*\], got 'foo'"),
        ({"delta": "position"}, "delta='position' needs n_ctx, the number of positions, got 0"),
    ],
)
def test_a_state_space_layer_that_cannot_run_is_not_made(options, message):
    jaxtyping.config.update("jaxtyping_disable", True)  # as for a user: our own messages come out
    try:
        with pytest.raises(ValueError, match=message):
            SelectiveSSM(5, d_state=3, dt_rank=2, **options)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_positions_are_counted_by_the_tokens_of_a_state():
    layer = SelectiveSSM(5, d_state=3, dt_rank=2, delta="position", n_ctx=7)
    u, gate = torch.randn(2, 2, 7, 5)
    whole, state = layer(u, gate), {}
    first = layer(u[:, :3], gate[:, :3], state=state)
    with pytest.raises(ValueError, match="no 'tokens' that count them, and delta='position' needs"):
        layer(u[:, 3:], gate[:, 3:], state=state)
    state["tokens"] = torch.zeros(2, 3, dtype=torch.int64)
    rest = layer(u[:, 3:], gate[:, 3:], state=state)
    torch.testing.assert_close(torch.cat((first, rest), 1), whole)
