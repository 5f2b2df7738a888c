"""Properties of layers: scans, discretisations, convolutions, smearing, positions, attention, loss.

Leaves out the matrices that layers apply (`test_mixing`).
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, rules, scans, seeds, sizes

from smearlens.nn.attention import Attention
from smearlens.nn.conv import DepthwiseConv, KeySmear, depthwise_conv, depthwise_conv_plain
from smearlens.nn.discretize import discretize, negative_share
from smearlens.nn.large_vocab import plain_loss, streamed_loss
from smearlens.nn.positions import Positions, Rotary, sinusoids
from smearlens.nn.scan import selective_scan, selective_scan_plain, selective_step
from smearlens.nn.scan_variants import linear_scan
from smearlens.nn.ssm import SelectiveSSM

close = torch.testing.assert_close


def grads(outputs, inputs):
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
    total = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs)


@fewer(0.5)
@given(scans(), rules, st.booleans())
def test_the_scan_and_its_plain_twin_agree_in_value_and_gradient(case, rule, carried):
    inputs = [t.clone().requires_grad_() for t in (case if carried else case[:-1])]
    state = inputs[5] if carried else None
    found, plain = (
        scan(*inputs[:5], rule=rule, initial_state=state)
        for scan in (selective_scan, selective_scan_plain)
    )
    close(found, plain)
    close(grads(found, inputs), grads(plain, inputs))


@fewer(0.25)
@given(scans(), rules, sizes(0, 12))
def test_a_scan_in_two_parts_or_steps_is_one_scan(case, rule, cut):
    u, delta, A, B, C, state = case
    cut = 1 + cut % max(u.shape[1] - 1, 1)
    whole, last = selective_scan(u, delta, A, B, C, rule=rule, initial_state=state)
    pieces, carried = [], state
    for span in (slice(0, cut), slice(cut, None)):
        if u[:, span].shape[1]:
            part = (u[:, span], delta[:, span], A, B[:, span], C[:, span])
            y, carried = selective_scan(*part, rule=rule, initial_state=carried)
            pieces.append(y)
    close(torch.cat(pieces, 1), whole)
    close(carried, last)
    for t in range(u.shape[1]):
        y, state = selective_step(u[:, t], delta[:, t], A, B[:, t], C[:, t], state, rule)
        close(y, whole[:, t])
    close(state, last)


@fewer(0.5)
@given(scans(), rules, st.floats(-2, 2))
def test_the_scan_is_linear_and_causal(case, rule, factor):
    u, delta, A, B, C, state = case
    other = u.cos()

    def run(x, first):
        return selective_scan(x, delta, A, B, C, rule=rule, initial_state=first)

    mixed = run(u + factor * other, state)
    apart = [a + factor * b for a, b in zip(run(u, state), run(other, None), strict=True)]
    close(mixed, tuple(apart))
    changed = torch.cat([u[:, :-1], other[:, -1:]], 1)
    close(run(changed, state)[0][:, :-1], run(u, state)[0][:, :-1], rtol=0, atol=0)


@fewer(0.5)
@given(scans(), rules, sizes(0, 12))
def test_a_step_of_length_zero_is_no_step(case, rule, where):
    u, delta, A, B, C, state = case
    where %= u.shape[1] + 1
    stilled = [
        torch.cat([t[:, :where], new, t[:, where:]], 1)
        for t, new in ((u, u[:, :1].exp()), (delta, torch.zeros_like(delta[:, :1])),
                       (B, B[:, :1]), (C, C[:, :1]))
    ]  # fmt: skip
    y, last = selective_scan(*stilled[:2], A, *stilled[2:], rule=rule, initial_state=state)
    kept = torch.arange(y.shape[1]) != where
    close((y[:, kept], last), selective_scan(u, delta, A, B, C, rule=rule, initial_state=state))


@given(scans(), st.sampled_from(("doubling", "logspace")), st.booleans(), st.booleans())
def test_every_exact_scan_is_the_recurrence(case, method, carried, zeros):
    _, delta, A, B, _, state = case
    a, write = discretize(delta, 2 * A, B, "bilinear")  # decays of both signs
    a = a.expand_as(write).clone()
    if zeros:
        a[:, ::3] = 0
    first = state if carried else None
    found = linear_scan(a, write, initial_state=first, method=method)
    h, states = torch.zeros_like(state) if first is None else state, []
    for t in range(write.shape[1]):
        h = a[:, t] * h + write[:, t]
        states.append(h)
    close(found, (torch.stack(states, 1), h), atol=1e-9, rtol=1e-7)


@fewer(0.5)
@given(st.floats(1e-6, 30), st.floats(1e-6, 20), st.floats(-5, 5))
def test_discretisations_keep_what_their_rule_promises(delta, rate, gain):
    d, a, b = (torch.tensor([[x]], dtype=torch.float64) for x in (delta, -rate, gain))
    pairs = {rule: discretize(d, a, b, rule) for rule in ("mamba", "zoh", "bilinear")}
    z = delta * -rate
    for decay, _ in pairs.values():
        assert abs(float(decay)) <= 1
    close(pairs["zoh"][0], pairs["mamba"][0])
    close(pairs["mamba"][1].flatten(), delta * b.flatten())
    for rule in ("zoh", "bilinear"):  # a constant input settles at -B / A, whatever the step
        decay, write = pairs[rule]
        close(write.flatten() * rate, (1 - decay).flatten() * b.flatten(), atol=1e-14, rtol=1e-9)
    assert (float(pairs["bilinear"][0]) < 0) == (z < -2)
    decay, write = discretize(d, a, b, "bilinear-clamped")
    close(decay, pairs["bilinear"][0].clamp_min(0))
    close(write, pairs["bilinear"][1])
    close(negative_share(d[None], a, "bilinear"), torch.tensor([float(z < -2)]).double())


@fewer(0.5)
@given(sizes(1, 3), sizes(1, 9), sizes(1, 4), sizes(1, 5), sizes(0, 4), st.booleans(), seeds)
def test_the_convolution_is_its_sum_and_its_twin(batch, pos, channels, taps, ahead, bias, seed):
    ahead = min(ahead, taps - 1)
    g = generator(seed)
    sizes = ((batch, pos, channels), (channels, taps), (channels,))
    x, w, b = (torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes)
    given_ = (x, w, b) if bias else (x, w)
    found, twin = (conv(*given_, future=ahead) for conv in (depthwise_conv, depthwise_conv_plain))
    plain = torch.zeros_like(x) + (b if bias else 0)
    for tap in range(taps):
        for t in range(pos):
            if 0 <= t - tap + ahead < pos:
                moved = torch.zeros(pos, 1, dtype=torch.float64)
                moved[t] = 1
                plain = plain + moved * (w[:, tap] * x[:, t - tap + ahead])[:, None]
    close(found, plain)
    close(twin, plain)
    close(grads([found], given_), grads([plain], given_))


@fewer(0.5)
@given(sizes(1, 3), sizes(2, 9), sizes(1, 4), sizes(1, 5), sizes(1, 8), st.booleans(), seeds)
def test_a_convolution_in_pieces_is_one_convolution(batch, pos, channels, taps, cut, bias, seed):
    torch.manual_seed(seed)
    conv = DepthwiseConv(channels, taps, bias=bias).double()
    x = torch.randn(batch, pos, channels, dtype=torch.float64)
    whole, state = conv(x), {}
    pieces = [conv(part, state=state) for part in x.split(cut, 1)]
    close(torch.cat(pieces, 1), whole)
    close(conv(x[:, : pos - 1]), whole[:, : pos - 1])  # causal


@given(sizes(1, 3), sizes(1, 7), sizes(1, 3), sizes(1, 8), seeds)
def test_smeared_keys_are_the_mixture_with_the_key_before(batch, pos, heads, cut, seed):
    g = generator(seed)
    k = torch.randn(batch, pos, heads, 2, generator=g, dtype=torch.float64)
    smear = KeySmear(heads).double()
    with torch.no_grad():
        smear.alpha.copy_(torch.randn(heads, generator=g))
    found = smear(k)
    close(found[:, 0], k[:, 0])
    own = torch.sigmoid(smear.alpha)[:, None]
    close(found[:, 1:], own * k[:, 1:] + (1 - own) * k[:, :-1])
    state = {}
    close(torch.cat([smear(part, state=state) for part in k.split(cut, 1)], 1), found)


@given(sizes(1, 9), sizes(1, 4), sizes(0, 50), sizes(0, 50), seeds)
def test_rotated_products_depend_on_the_distance_alone(pos, half, start, other, seed):
    g = generator(seed)
    q, k = (torch.randn(1, pos, 2, 2 * half, generator=g, dtype=torch.float64) for _ in "qk")
    turn = Rotary(2 * half)
    here, there = (
        torch.einsum("bqhd,bkhd->bhqk", turn(q, first), turn(k, first)) for first in (start, other)
    )
    close(here, there)
    close(turn(q, start).norm(dim=-1), q.norm(dim=-1))
    close(turn(q)[:, 0], q[:, 0])


@given(sizes(1, 9), sizes(1, 9), sizes(0, 5))
def test_sinusoids_of_a_later_position_are_the_earlier_ones_turned(n, width, shift):
    table = sinusoids(n + shift, width).double()
    even = torch.arange(0, width - 1, 2)
    angle = shift * 10_000.0 ** (-even.double() / width)
    sin, cos = table[:n, even], table[:n, even + 1]
    close(table[shift:, even], sin * angle.cos() + cos * angle.sin(), atol=1e-5, rtol=0)
    close(table[shift:, even + 1], cos * angle.cos() - sin * angle.sin(), atol=1e-5, rtol=0)
    close(Positions(n + shift, width, "sinusoidal")(shift, n), table[shift:].float())


def attention(seed, **options):
    torch.manual_seed(seed)
    layer = Attention(6, 3, **options).double()
    for name, module in layer.named_modules():
        module.name = name  # as a model does: it tells the convolutions' buffers apart
    return layer


@fewer(0.5)
@given(sizes(1, 2), sizes(1, 9), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_attention_is_its_formula_through_either_core(batch, pos, causal, smear, bias, seed):
    layer = attention(seed, causal=causal, smear=smear, bias=bias)
    x = torch.randn(batch, pos, 6, dtype=torch.float64)
    q, k, v = (t.unflatten(-1, (3, 2)) for t in layer.in_proj(x).chunk(3, -1))
    if smear:
        k = torch.cat([k[:, :1], (k[:, 1:] + k[:, :-1]) / 2], 1)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 2**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(pos, pos).triu(1).bool(), -torch.inf)
    z = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    expected = layer.out_proj(z.flatten(2))
    close(layer(x), expected)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("smearlens.nn.attention.SHORT", 0)  # the fused core for short rows too
        close(layer(x), expected)
    if not bias:
        close(torch.einsum("bpm,hmd->bphd", x, layer.W_V), v)
        close(torch.einsum("bphd,hdm->bpm", z, layer.W_O), expected)


@fewer(0.25)
@given(sizes(1, 2), sizes(2, 9), sizes(1, 8), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_attention_token_by_token_is_attention(batch, pos, cut, smear, rotary, conv, seed):
    layer = attention(seed, smear=smear, rotary=rotary, conv_on="qkv" if conv else ())
    x = torch.randn(batch, pos, 6, dtype=torch.float64)
    whole, state = layer(x), {}
    close(torch.cat([layer(part, state=state) for part in x.split(cut, 1)], 1), whole)
    close(layer(x[:, : pos - 1]), whole[:, : pos - 1])  # causal


@fewer(0.5)
@given(sizes(1, 2), sizes(1, 5), sizes(2, 7), sizes(1, 5), seeds)
def test_masked_keys_of_a_source_are_as_good_as_cut_out(batch, pos, keys, cut, seed):
    layer = attention(seed, causal=False)
    x = torch.randn(batch, pos, 6, dtype=torch.float64)
    source = torch.randn(batch, keys, 6, dtype=torch.float64)
    mask = torch.rand(keys) < 0.6
    mask[-1] = True
    found = layer(x, source, key_mask=mask.expand(batch, -1))
    close(found, layer(x, source[:, mask]))
    order = torch.randperm(keys)
    close(layer(x, source[:, order]), layer(x, source))  # no positions: a set of keys
    state = {}
    pieces = [layer(part, source, state=state) for part in x.split(cut, 1)]
    close(torch.cat(pieces, 1), layer(x, source))


@fewer(0.5)
@given(sizes(1, 2), sizes(2, 7), sizes(1, 6), rules, st.sampled_from(("learned", "minus-one")),
       st.sampled_from(("selective", "constant", "position")), seeds)  # fmt: skip
def test_a_state_space_layer_is_one_map_on_either_path_and_in_pieces(
    batch, pos, cut, rule, a, delta, seed
):
    torch.manual_seed(seed)
    options = {"d_state": 3, "dt_rank": 2, "rule": rule, "a": a, "delta": delta, "n_ctx": pos}
    layer = SelectiveSSM(4, **options).double()
    u, gate = torch.randn(2, batch, pos, 4, dtype=torch.float64)
    whole = layer(u, gate)
    layer.method = "doubling"
    close(layer(u, gate), whole)
    layer.method = "fused"
    if delta != "position":  # there the model carries the tokens that tell the position
        state = {}
        parts = zip(u.split(cut, 1), gate.split(cut, 1), strict=True)
        close(torch.cat([layer(*part, state=state) for part in parts], 1), whole)


@given(sizes(1, 9), sizes(1, 5), sizes(1, 9), sizes(1, 40), seeds)
def test_the_streamed_loss_is_cross_entropy_in_value_and_gradient(rows, width, vocab, room, seed):
    g = generator(seed)
    hidden = (3 * torch.randn(rows, width, generator=g, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(vocab, (rows,), generator=g)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("smearlens.nn.large_vocab.CHUNK_LOGITS", room)
        found = streamed_loss(hidden, weight, targets)
        gradients = torch.autograd.grad(2 * found, (hidden, weight))
    logits = hidden @ weight.T
    picked = logits.gather(1, targets[:, None])[:, 0]
    expected = (logits.logsumexp(1) - picked).mean()
    close(found, expected)
    close(plain_loss(hidden, weight, targets), expected)
    close(gradients, torch.autograd.grad(2 * expected, (hidden, weight)))
