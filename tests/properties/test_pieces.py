"""Properties of work done in pieces: what comes out does not depend on how large the pieces are."""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.strategies import (
    NAME,
    fewer,
    generator,
    random_pattern,
    rules,
    scans,
    seeds,
    sizes,
)

from smearlens.analysis.heads import prev_token_score
from smearlens.analysis.mixing import streaming
from smearlens.analysis.mixing.kinds import SoftmaxMixing
from smearlens.analysis.mixing.layer_streams import compare_layers
from smearlens.analysis.mixing.state_space import SSMMixing
from smearlens.analysis.patterns import attention_entropy, attention_span, self_mass
from smearlens.nn.conv import depthwise_conv, depthwise_conv_plain
from smearlens.nn.scan import selective_scan, selective_scan_plain

close = torch.testing.assert_close


@contextmanager
def pieces(**sizes_by_name):
    """Constants of modules below `smearlens`, dots written as two underscores, set for a while."""
    with pytest.MonkeyPatch.context() as patched:
        for name, size in sizes_by_name.items():
            patched.setattr("smearlens." + name.replace("__", "."), size)
        yield


def grads(outputs, inputs):
    weights = [torch.linspace(-1, 2, t.numel(), dtype=t.dtype).view_as(t) for t in outputs]
    total = sum((out * w).sum() for out, w in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, inputs)


@given(sizes(1, 3), sizes(1, 9), sizes(1, 4), sizes(1, 5), sizes(0, 4), sizes(1, 40), seeds)
def test_tiles_of_a_convolution(batch, pos, channels, taps, ahead, tile, seed):
    ahead, g = min(ahead, taps - 1), generator(seed)
    shapes = ((batch, pos, channels), (channels, taps), (channels,))
    inputs = [torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in shapes]
    with pieces(nn__conv___TILE=tile):
        found = depthwise_conv(*inputs, future=ahead)
        gradients = grads([found], inputs)
    plain = depthwise_conv_plain(*inputs, future=ahead)
    close(found, plain)
    close(gradients, grads([plain], inputs))


@given(scans(), rules, st.booleans(), sizes(1, 200), sizes(1, 40))
def test_blocks_of_a_scan(case, rule, carried, block, step):
    inputs = [t.clone().requires_grad_() for t in (case if carried else case[:-1])]
    options = {"rule": rule, "initial_state": inputs[5] if carried else None}
    with pieces(nn__scan_blocks__BLOCK_ELEMENTS=block, nn__scan_blocks__STEP_ELEMENTS=step):
        found = selective_scan(*inputs[:5], **options)
        gradients = grads(found, inputs)
    plain = selective_scan_plain(*inputs[:5], **options)
    close(found, plain)
    close(gradients, grads(plain, inputs))


@fewer(0.25)
@given(scans(), rules, sizes(1, 4), sizes(1, 9), sizes(1, 60))
def test_blocks_of_the_hidden_attention(case, rule, block, stretch, room):
    _, delta, A, B, C, _ = case
    mixing = SSMMixing.from_delta(delta, A, B, C, rule)
    whole = mixing.dense()
    scores = attention_entropy(mixing)
    home = "analysis__mixing__state_space__"
    with pieces(**{f"{home}BLOCK": block, f"{home}STRETCH": stretch, f"{home}ROOM": room}):
        close(mixing.dense(), whole)
        close(torch.cat([rows for _, _, rows in mixing.blocks()], -2), whole)
        parts = list(mixing.parts())
        close(torch.cat([part.dense() for part in parts], 1), whole)
        close(mixing.rows(mixing.n_queries // 2, mixing.n_queries),
              whole[..., mixing.n_queries // 2 :, :])  # fmt: skip
        u = delta.cos()
        close(mixing.reconstruct(u), torch.einsum("bcij,bjc->bic", whole, u))
        close(attention_entropy(mixing), scores, equal_nan=True)


@fewer(0.5)
@given(sizes(1, 2), sizes(1, 3), sizes(1, 20), sizes(1, 20), st.booleans(), sizes(1, 2),
       sizes(1, 99), st.floats(0.1, 0.9), seeds)  # fmt: skip
def test_blocks_and_buckets_of_streamed_rows(b, h, n, m, causal, rows, entries, mass, seed):
    m = n if causal else m
    g = generator(seed)
    q, k = (2 * torch.randn(b, h, size, 3, generator=g, dtype=torch.float64) for size in (n, m))
    mask = torch.rand(b, m, generator=g) < 0.8
    options = {"causal": causal, "key_mask": mask}
    whole = streaming.row_statistics(q, k, mass=mass, **options)
    js, inner = streaming.js_rows(q, k, -q, k, **options), streaming.inner(q, k, -q, k, **options)
    home = "analysis__mixing__softmax_blocks__"
    small = {f"{home}BUCKET": 4, f"{home}ROWS": 4 * rows, f"{home}ENTRIES": entries,
             "analysis__mixing__streaming__BUCKET": 4,
             "analysis__mixing__streaming__ENTRIES": entries}  # fmt: skip
    with pieces(**small):
        found = streaming.row_statistics(q, k, mass=mass, **options)
        for name in ("lse", "entropy", "distance", "self_mass", "first_mass", "n_allowed", "span"):
            close(getattr(found, name), getattr(whole, name), equal_nan=True, msg=name)
        close(found.future_mass, whole.future_mass, equal_nan=True, atol=1e-12, rtol=1e-7)
        close(streaming.log_normaliser(q, k, **options), whole.lse, equal_nan=True)
        close(streaming.js_rows(q, k, -q, k, **options), js, equal_nan=True, atol=1e-12, rtol=1e-7)
        close(streaming.inner(q, k, -q, k, **options).cosine, inner.cosine, equal_nan=True)
        pattern = streaming.pattern_rows(q, k, 0, n, **options)
        close(pattern, streaming.pattern_rows(q, k, 0, n, whole.lse, **options), equal_nan=True)
        for lag in (0, 1, -1):
            if 1 - m <= lag < n:
                entry = streaming.diagonal(q, k, lag, whole.lse, **options)
                close(entry, pattern.diagonal(-lag, 2, 3), equal_nan=True)
    spans = pattern.nan_to_num()
    for i in range(n):
        row = spans[0, 0, i, : i + 1].flip(0).cumsum(0)
        reached = (row >= mass).nonzero()
        nearest = max(0, i - m + 1)  # lag of the nearest key
        expected = float(reached[0]) + nearest if len(reached) else float("nan")
        if abs(row - mass).min() > 1e-9 and int(whole.n_allowed[0, i]):
            assert float(whole.span[0, 0, i]) == pytest.approx(expected, nan_ok=True)


@fewer(0.1)
@given(sizes(1, 2), sizes(1, 3), sizes(2, 9), sizes(1, 200), st.booleans(), seeds)
def test_rows_at_a_time_of_compared_layers(batch, heads, length, entries, causal, seed):
    g = generator(seed)
    layers = {}
    for name, h in (("a", heads), ("b", 2)):
        q, k = (torch.randn(batch, length, h, 3, generator=g, dtype=torch.float64) for _ in "qk")
        layers[name] = SoftmaxMixing(q, k, causal=causal)
    rows = slice(seed % 2, None)
    whole = compare_layers(layers, rows=rows)
    with pieces(analysis__mixing__layer_streams__ENTRIES=entries):
        found = compare_layers(layers, rows=rows)
    for name in ("diversity", "js", "cosine", "centred", "matched"):
        close(getattr(found, name), getattr(whole, name), equal_nan=True, msg=name)


@fewer(0.1)
@given(sizes(1, 2), sizes(2, 9), sizes(1, 30), seeds)
def test_rows_at_a_time_of_chance(batch, length, room, seed):
    cache = {f"{NAME}.hook_pattern": random_pattern(seed, batch, 2, length, length)}
    for metric in (attention_entropy, attention_span, prev_token_score, self_mass):
        whole = metric(cache, exclude_bos=length > 2)
        with pieces(analysis__mixing__rows__ROOM=room):
            found = metric(cache, exclude_bos=length > 2)
        close(found.chance[NAME], whole.chance[NAME])
        close(found.maximum[NAME], whole.maximum[NAME])
