"""Attention against torch's own layer, a naive loop and complex numbers; positions; the MLP."""

import math
from itertools import product

import pytest
import torch
from jaxtyping import config as jaxtyping_config
from torch import nn
from torch.nn import functional as F

from smearlens._hooks import HookedRootModule, HookPoint
from smearlens.nn.attention import Attention, explicit_attention
from smearlens.nn.layers import MLP, Block
from smearlens.nn.positions import Positions, Rotary, sinusoids


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


class Hooked(HookedRootModule):
    """A root for one layer, as a model is."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.setup()

    def forward(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)


def loop_attention(q, k, v, seen):
    """softmax(q k' / √d) v, entry by entry; `seen(b, i, j)` says whether query i sees key j."""
    batch, n_queries, heads, width = q.shape
    z = torch.zeros(batch, n_queries, heads, width, dtype=torch.float64)
    for b, i, h in product(range(batch), range(n_queries), range(heads)):
        keys = [j for j in range(k.shape[1]) if seen(b, i, j)]
        weights = [math.exp(float(q[b, i, h] @ k[b, j, h]) / math.sqrt(width)) for j in keys]
        for weight, j in zip(weights, keys, strict=True):
            z[b, i, h] += weight / sum(weights) * v[b, j, h]
    return z


def project(layer, x, role):
    weight = layer.in_proj.weight.chunk(3)[role].detach()
    return (x @ weight.T).unflatten(-1, (layer.n_heads, layer.d_head))


# The layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_equals_torch_multihead_attention_in_value_and_gradient(
    length, causal, explicit, generator
):
    ours = Attention(15, 3, causal=causal).double()
    theirs = nn.MultiheadAttention(15, 3, bias=False, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data = ours.in_proj.weight.data.clone()
    theirs.out_proj.weight.data = ours.out_proj.weight.data.clone()
    if explicit:
        ours.hook_pattern.add_hook(lambda t, hook: None)
    x = normal(generator, 2, length, 15)
    ahead = torch.ones(length, length, dtype=torch.bool).triu(1) if causal else None
    expected, weights = theirs(x, x, x, attn_mask=ahead, average_attn_weights=False)
    found = ours(x)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    mine = torch.autograd.grad(found, [x, ours.in_proj.weight, ours.out_proj.weight], upstream)
    reference = torch.autograd.grad(
        expected, [x, theirs.in_proj_weight, theirs.out_proj.weight], upstream
    )
    torch.testing.assert_close(mine, reference)
    if explicit:
        _, cache = Hooked(ours).run_with_cache(x)
        torch.testing.assert_close(cache["layer.hook_pattern"], weights.detach())


@pytest.mark.parametrize("explicit", [False, True])
def test_cross_attention_with_a_mask_equals_a_plain_loop(explicit, generator):
    layer = Attention(6, 2, causal=False).double()
    if explicit:
        layer.hook_attn_scores.add_hook(lambda t, hook: None)
    x, source = normal(generator, 2, 5, 6).detach(), normal(generator, 2, 7, 6).detach()
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 0, 1, 0]]).bool()
    q, k, v = project(layer, x, 0), project(layer, source, 1), project(layer, source, 2)
    for given, seen in ((mask, lambda b, i, j: bool(mask[b, j])), (None, lambda b, i, j: True)):
        z = loop_attention(q, k, v, seen).flatten(2)
        torch.testing.assert_close(layer(x, source, key_mask=given), z @ layer.out_proj.weight.T)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_self_attention_with_a_mask_equals_a_plain_loop(causal, explicit, generator):
    layer = Attention(6, 2, causal=causal).double()
    if explicit:
        layer.hook_pattern.add_hook(lambda t, hook: None)
    x = normal(generator, 2, 5, 6).detach()
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]).bool()
    q, k, v = (project(layer, x, role) for role in range(3))
    z = loop_attention(q, k, v, lambda b, i, j: bool(mask[b, j]) and (j <= i or not causal))
    torch.testing.assert_close(layer(x, key_mask=mask), z.flatten(2) @ layer.out_proj.weight.T)


def test_masked_keys_get_no_gradient(generator):
    layer = Attention(6, 2, causal=False).double()
    x, source = normal(generator, 2, 5, 6), normal(generator, 2, 7, 6)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3] = False
    (gradient,) = torch.autograd.grad(layer(x, source, key_mask=mask).sum(), source)
    assert not gradient[0, 3].any()
    assert gradient[1, 3].any()


def test_the_explicit_core_equals_the_fused_one(generator):
    q, k, v = (normal(generator, 2, 3, length, 4) for length in (5, 7, 7))
    mask = torch.zeros(2, 1, 1, 7, dtype=torch.float64)
    mask[0, ..., 2] = -torch.inf
    point = HookPoint()
    for m in (mask, mask[:1]):
        found = explicit_attention(q, k, v, m, 0.3, point, point)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=m, scale=0.3)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.square().sum(), (q, k, v)),
            torch.autograd.grad(expected.square().sum(), (q, k, v)),
        )


def test_scores_and_pattern_are_the_ones_used(generator):
    layer = Attention(6, 2).double()
    x = normal(generator, 2, 5, 6).detach()
    _, cache = Hooked(layer).run_with_cache(x)
    q, k, v, z, scores, pattern = (
        cache[f"layer.hook_{name}"] for name in ("q", "k", "v", "z", "attn_scores", "pattern")
    )
    raw = torch.einsum("bihd,bjhd->bhij", q, k) / 3**0.5
    ahead = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(scores, raw.masked_fill(ahead, -torch.inf))
    torch.testing.assert_close(pattern.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    assert not pattern[..., ahead].any()
    torch.testing.assert_close(z, torch.einsum("bhij,bjhd->bihd", pattern, v))


def test_weights_in_the_layout_of_transformer_lens_do_what_the_layer_does(generator):
    layer = Attention(10, 2, causal=False).double()
    x = normal(generator, 2, 3, 10).detach()
    weights = (layer.W_Q.detach(), layer.W_K.detach(), layer.W_V.detach())
    q, k, v = (torch.einsum("bpm,hmd->bphd", x, w) for w in weights)
    z = loop_attention(q, k, v, lambda b, i, j: True)
    torch.testing.assert_close(torch.einsum("bphd,hdm->bpm", z, layer.W_O.detach()), layer(x))


def test_roles_are_convolved_then_smeared_then_rotated(generator):
    layer = Attention(12, 3, rotary=True, smear=True, conv_on=("k", "q"), kernel_size=2).double()
    layer.smear.alpha.data = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    x = normal(generator, 2, 5, 12).detach()
    _, cache = Hooked(layer).run_with_cache(x)

    def convolved(role, module):
        plain = project(layer, x, role)
        moved = torch.zeros_like(plain)
        moved[:, 1:] = plain[:, :-1]
        now, before = (w.unflatten(0, (3, 4)) for w in module.weight.detach().T)
        return plain * now + moved * before

    k = convolved(1, layer.conv_k)
    own = torch.sigmoid(layer.smear.alpha.detach())[:, None]
    k[:, 1:] = own * k[:, 1:].clone() + (1 - own) * k[:, :-1].clone()
    torch.testing.assert_close(cache["layer.hook_k"], layer.rotary(k))
    torch.testing.assert_close(cache["layer.hook_q"], layer.rotary(convolved(0, layer.conv_q)))
    torch.testing.assert_close(cache["layer.hook_v"], project(layer, x, 2))


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 2, 1], [7], [2, 5]])
@pytest.mark.parametrize("mask", [False, True])
def test_pieces_with_state_equal_one_full_run(pieces, mask, generator):
    layer = Attention(12, 3, rotary=True, smear=True, conv_on="v", kernel_size=4).double()
    Hooked(layer)
    x, state = normal(generator, 2, 7, 12).detach(), {}
    seen = torch.tensor([[1, 1, 0, 0, 1, 1, 0], [1, 0, 1, 1, 1, 0, 1]]).bool() if mask else None
    outputs, stop = [], 0
    for piece in x.split(pieces, dim=1):
        stop += piece.shape[1]
        part = None if seen is None else seen[:, :stop]
        outputs.append(layer(piece, state=state, key_mask=part))
    torch.testing.assert_close(torch.cat(outputs, 1), layer(x, key_mask=seen))
    assert all(name.startswith("layer.") for name in state)


def test_a_layer_alone_keeps_a_state_too(generator):
    layer = Attention(6, 2).double()
    x, state = normal(generator, 2, 5, 6).detach(), {}
    pieces = [layer(piece, state=state) for piece in x.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), layer(x))


def test_wrong_layers_are_explained(unchecked):
    for n_heads in (4, 0, -3):
        with pytest.raises(ValueError, match=f"n_heads={n_heads} must be at least 1 and divide d_"):
            Attention(6, n_heads)
    with pytest.raises(ValueError, match="conv_on takes 'q', 'k' and 'v', got 'stream'"):
        Attention(6, 2, conv_on=("q", "stream"))
    with pytest.raises(
        ValueError, match=r"conv_on=\('q', 'q'\) names 'q' twice; each role has one"
    ):
        Attention(6, 2, conv_on=("q", "q"))
    with pytest.raises(ValueError, match="kernel_size must be at least 1, got 0"):
        Attention(6, 2, conv_on=("q",), kernel_size=0)
    with pytest.raises(ValueError, match="rotary positions need an even d_head, got 3; change n_h"):
        Attention(6, 2, rotary=True)
    with pytest.raises(ValueError, match="build the layer with causal=False for cross attention"):
        Attention(6, 2)(torch.zeros(1, 2, 6), torch.zeros(1, 3, 6))


def test_self_attention_that_reads_ahead_keeps_no_state():
    layer, x, state = Attention(6, 2, causal=False), torch.randn(2, 5, 6), {}
    with pytest.raises(
        ValueError, match=r"causal=False reads keys that do not exist yet: .* state=None"
    ):
        layer(x[:, :3], state=state)
    assert state == {}
    whole = layer(x, x)  # of a source, there before the first query, each piece sees all
    pieces = [layer(piece, x, state=state) for piece in x.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 3).bool(), torch.ones(1, 5).bool(), torch.ones(2, 5), [[True] * 5] * 2]
)
@pytest.mark.parametrize("explicit", [False, True])
def test_a_mask_that_does_not_fit_is_explained(mask, explicit, unchecked):
    layer = Attention(6, 2)
    if explicit:
        layer.hook_pattern.add_hook(lambda t, hook: None)
    message = r"key_mask must be a bool tensor \[batch key\] = \[2, 5\], got .*; True where a key"
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(2, 5, 6), key_mask=mask)


# Rotary ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0, 3, 1000])
def test_rotary_is_a_product_of_complex_numbers(start, generator):
    x = normal(generator, 2, 5, 3, 8).detach()
    z = torch.complex(x[..., :4], x[..., 4:])
    expected = torch.empty_like(z)
    for t, c in product(range(5), range(4)):
        angle = (start + t) * 10_000 ** (-2 * c / 8)
        expected[:, t, :, c] = z[:, t, :, c] * complex(math.cos(angle), math.sin(angle))
    found = Rotary(8)(x, start)
    torch.testing.assert_close(found[..., :4], expected.real)
    torch.testing.assert_close(found[..., 4:], expected.imag)


def test_a_rotary_score_depends_on_the_lag_alone(generator):
    q, k = normal(generator, 1, 1, 3, 8).detach(), normal(generator, 1, 1, 3, 8).detach()
    rotary = Rotary(8)

    def score(query, key):
        return (rotary(q, query) * rotary(k, key)).sum(-1)

    for lag in (0, 1, 5):
        for key in (0, 7, 40):
            torch.testing.assert_close(score(key + lag, key), score(lag, 0))
    assert not torch.allclose(score(5, 0), score(0, 0))


def test_rotation_keeps_lengths_and_the_first_token(generator):
    x = normal(generator, 2, 5, 3, 8).detach()
    turned = Rotary(8)(x)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, 0], x[:, 0])


def test_rotary_angles_are_exact_in_half_precision(generator):
    """A frequency rounded to bfloat16 would be off by a radian at position 400."""
    x = torch.randn(1, 3, 1, 8, generator=generator)
    layer = Attention(8, 1, rotary=True).bfloat16()
    expected = Rotary(8)(x.bfloat16().double(), 4000)
    found = layer.rotary(x.bfloat16(), 4000)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    assert not list(layer.rotary.state_dict())


def test_the_base_of_rotary_is_an_argument():
    x = torch.tensor([0.0, 1, 0, 0]).view(1, 1, 1, 4)
    turned = Rotary(4, base=16.0)(x, 2).flatten()  # pair 1 turns by 2 · 16^(-1/2)
    expected = torch.tensor([0, math.cos(0.5), 0, math.sin(0.5)])
    torch.testing.assert_close(turned, expected)


# Absolute positions, MLP, block ----------------------------------------------------------------


@pytest.mark.parametrize("d_model", [6, 7, 1])
def test_sinusoids_equal_their_closed_form(d_model):
    table = sinusoids(5, d_model)
    for t, c in product(range(5), range(d_model)):
        angle = t / 10_000 ** (2 * (c // 2) / d_model)
        expected = math.cos(angle) if c % 2 else math.sin(angle)
        assert math.isclose(table[t, c], expected, abs_tol=1e-7)


def test_positions_start_where_they_are_told():
    for kind in ("learned", "sinusoidal", "learned-sinusoidal"):
        positions = Positions(11, 6, kind)
        assert torch.equal(positions(3, 4), positions(0, 11)[3:7])
        assert len(list(positions.parameters())) == (kind != "sinusoidal")
    torch.testing.assert_close(Positions(11, 6, "learned-sinusoidal")(0, 5), sinusoids(5, 6))


def test_learned_positions_start_with_a_standard_deviation_of_a_tenth():
    spread = Positions(500, 40, "learned").table.std()
    torch.testing.assert_close(spread, torch.tensor(0.1), rtol=0.05, atol=0)


def test_the_mlp_acts_on_every_position_alone(generator):
    mlp = MLP(3, 7).double()
    x = normal(generator, 2, 5, 3).detach()
    for t in range(5):
        torch.testing.assert_close(mlp(x)[:, t], mlp(x[:, t : t + 1])[:, 0])
    hidden = F.gelu(x @ mlp.up.weight.T + mlp.up.bias, approximate="tanh")
    torch.testing.assert_close(mlp(x), hidden @ mlp.down.weight.T + mlp.down.bias)


@pytest.mark.parametrize("residual", [True, False])
def test_a_block_adds_or_replaces(residual, generator):
    block = Block(Attention(6, 2), d_model=6, d_mlp=10, residual=residual)
    model = Hooked(block)
    x = torch.randn(2, 5, 6, generator=generator)
    _, cache = model.run_with_cache(x)
    parts = cache["layer.hook_attn_out"] + cache["layer.hook_mlp_out"]
    expected = x + parts if residual else cache["layer.hook_mlp_out"]
    torch.testing.assert_close(cache["layer.hook_resid_post"], expected)
