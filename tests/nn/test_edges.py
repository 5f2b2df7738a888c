"""Corners of layers: the smallest sizes, and which weights exist."""

import pytest
import torch

from smearlens.nn.attention import Attention
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


def test_the_step_sizes_of_a_new_layer_lie_in_their_range():
    layer = SelectiveSSM(400, d_state=3, dt_rank=2)
    delta = torch.nn.functional.softplus(layer.dt_proj.bias.detach())
    assert 0.001 - 1e-6 <= float(delta.min()) < 0.002
    assert 0.05 < float(delta.max()) <= 0.1 + 1e-6
    assert float(layer.dt_proj.weight.detach().abs().max()) <= 2**-0.5
    torch.testing.assert_close(layer.A.detach(), -torch.arange(1.0, 4).expand(400, 3))
