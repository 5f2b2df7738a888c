"""Properties of comparisons: patterns with patterns, activations with activations.

Leaves out scores of one pattern (`test_scores`).
"""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, random_pattern, seeds, sizes

from smearlens.analysis.heads import prev_token_score
from smearlens.analysis.mixing import streaming
from smearlens.analysis.mixing.kinds import DenseMixing, SoftmaxMixing
from smearlens.analysis.mixing.layer_streams import cka_table, compare_layers, head_statistics
from smearlens.analysis.patterns import (
    attention_entropy,
    attention_span,
    head_diversity,
    sink_mass,
)
from smearlens.analysis.similarity import js_similarity, layer_similarity, linear_cka

close = torch.testing.assert_close


def drawn_q_and_k(seed, batch, heads, queries, keys, width):
    g = generator(seed)
    sizes = ((batch, queries, heads, width), (batch, keys, heads, width))
    return tuple(2 * torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)


def plain_softmax(q, k, causal):
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    ahead = torch.ones(scores.shape[-2:]).triu(1).bool()
    return (scores.masked_fill(ahead, -torch.inf) if causal else scores).softmax(-1)


def entropy(p):
    return -(p * p.clamp_min(1e-300).log()).sum(-1)


@given(sizes(1, 9), sizes(1, 5), seeds)
def test_js_similarity_is_symmetric_one_for_equal_and_zero_for_disjoint_rows(keys, rows, seed):
    p, q = random_pattern(seed, 2, rows, keys, causal=False)
    close(js_similarity(p, q), js_similarity(q, p))
    close(js_similarity(p, p), torch.ones(rows, dtype=torch.float64))
    assert bool((js_similarity(p, q) >= -1e-12).all())
    apart = torch.cat([p, torch.zeros_like(p)], -1), torch.cat([torch.zeros_like(q), q], -1)
    close(js_similarity(*apart), torch.zeros(rows, dtype=torch.float64), atol=1e-12, rtol=0)
    mean = (p + q) / 2
    kl = [(r * (r.clamp_min(1e-300) / mean.clamp_min(1e-300)).log()).sum(-1) for r in (p, q)]
    close(js_similarity(p, q), 1 - (kl[0] + kl[1]) / 2 / math.log(2))


@fewer(0.25)
@given(
    sizes(1, 3), sizes(1, 3), sizes(3, 7), st.booleans(), st.sampled_from(("js", "cosine")), seeds
)
def test_a_layer_is_like_itself_and_pairs_are_symmetric(batch, heads, length, centred, kind, seed):
    one, two = random_pattern(seed, 2, batch, heads, length, length)
    layers = {"a": DenseMixing(one), "b": DenseMixing(two), "c": DenseMixing(one.clone())}
    for match in ("mean", "match"):
        found = layer_similarity(layers, kind=kind, centred=centred, heads=match).values
        close(found, found.T)
        close(found[0, 2], torch.tensor(1.0, dtype=torch.float64))
        close(found[0, 1], found[1, 2])
        assert bool((found <= 1 + 1e-9).all())


@fewer(0.1)
@given(sizes(2, 4), sizes(3, 7), seeds)
def test_the_best_matching_does_not_see_the_order_of_heads(heads, length, seed):
    one, two = random_pattern(seed, 2, 2, heads, length, length)
    order = torch.randperm(heads, generator=generator(seed))
    for kind in ("js", "cosine"):
        found, moved = (
            layer_similarity({"a": DenseMixing(one), "b": DenseMixing(t)}, kind=kind, heads="match")
            for t in (two, two[:, order])
        )
        close(found.values, moved.values)
        same = {"a": DenseMixing(one), "b": DenseMixing(one[:, order])}
        best = layer_similarity(same, kind=kind, heads="match").values
        close(best, torch.ones_like(best))


@given(sizes(5, 30), sizes(1, 5), sizes(1, 5), st.booleans(), st.floats(0.1, 9), seeds)
def test_cka_ignores_rotation_scale_and_shift_and_is_symmetric(n, w, v, debiased, scale, seed):
    g = generator(seed)
    x, y = (torch.randn(n, width, generator=g, dtype=torch.float64) for width in (w, v))
    turn = torch.linalg.qr(torch.randn(w, w, generator=g, dtype=torch.float64)).Q
    moved = scale * x @ turn + torch.randn(w, generator=g, dtype=torch.float64)
    close(linear_cka(moved, y, debiased=debiased), linear_cka(x, y, debiased=debiased))
    close(linear_cka(y, x, debiased=debiased), linear_cka(x, y, debiased=debiased))
    close(linear_cka(x, moved, debiased=debiased), 1.0)
    if not debiased:
        assert 0 <= linear_cka(x, y, debiased=False) <= 1 + 1e-9


@given(sizes(2, 3), sizes(5, 12), sizes(1, 4), sizes(1, 4), seeds)
def test_a_table_of_cka_holds_the_cka_of_every_pair(batch, pos, w, v, seed):
    g = generator(seed)
    streams = [torch.randn(batch, pos, n, generator=g, dtype=torch.float64) for n in (w, v, w)]
    table = cka_table(streams)
    for i, x in enumerate(streams):
        for j, y in enumerate(streams):
            one, other = (t.flatten(0, 1) for t in (x, y))
            close(float(table[i, j]), linear_cka(one, other), atol=1e-9, rtol=1e-7)


@fewer(0.1)
@given(sizes(1, 2), sizes(1, 3), sizes(3, 9), seeds)
def test_one_pass_over_layers_says_what_single_comparisons_say(batch, heads, length, seed):
    pairs = [drawn_q_and_k(seed + i, batch, h, length, length, 3) for i, h in enumerate((heads, 2))]
    layers = {str(i): SoftmaxMixing(q, k) for i, (q, k) in enumerate(pairs)}
    found = compare_layers(layers)
    for i, mixing in enumerate(layers.values()):
        close(found.diversity[:, i], head_diversity(mixing), equal_nan=True)
    for name, options in (("js", {}), ("centred", {"kind": "cosine"}),
                          ("cosine", {"kind": "cosine", "centred": False})):  # fmt: skip
        expected = layer_similarity(layers, **options).values
        close(getattr(found, name).mean(0), expected)
    matched = layer_similarity(layers, kind="cosine", heads="match").values
    close(found.matched.mean(0), matched)


@fewer(0.1)
@given(sizes(1, 2), sizes(1, 3), sizes(2, 9), st.booleans(), seeds)
def test_statistics_of_heads_are_those_of_their_patterns(batch, heads, length, causal, seed):
    q, k = drawn_q_and_k(seed, batch, heads, length, length, 3)
    found = head_statistics(SoftmaxMixing(q, k, causal=causal))
    pattern = plain_softmax(q, k, causal)
    expected = {
        "entropy": attention_entropy(pattern),
        "normalised_entropy": attention_entropy(pattern, normalised=True),
        "distance": attention_span(pattern),
        "span": attention_span(pattern, kind="mass"),
        "sink": sink_mass(pattern),
        "previous": prev_token_score(pattern),
        "entropy_without_first": attention_entropy(pattern, exclude_bos=True),
        "distance_without_first": attention_span(pattern, exclude_bos=True),
    }
    for name, value in expected.items():
        close(found[name], value, equal_nan=True, msg=name)


@fewer(0.5)
@given(sizes(1, 2), sizes(1, 3), sizes(1, 9), sizes(1, 9), st.booleans(), seeds)
def test_streamed_rows_say_what_the_whole_pattern_says(batch, heads, n, m, causal, seed):
    m = n if causal else m
    q, k = drawn_q_and_k(seed, batch, heads, n, m, 3)
    mask = torch.rand(batch, m, generator=generator(seed)) < 0.7
    pattern = plain_softmax(q, k, causal) * mask[:, None, None]
    pattern = pattern / pattern.sum(-1, keepdim=True)  # NaN where no key is left
    flat = [t.transpose(1, 2) for t in (q, k)]
    found = streaming.row_statistics(*flat, causal=causal, key_mask=mask)
    lag = torch.arange(n)[:, None] - torch.arange(m)
    close(found.entropy, entropy(pattern), equal_nan=True)
    close(found.distance, (pattern * lag.abs()).sum(-1), equal_nan=True)
    close(found.first_mass, pattern[..., 0], equal_nan=True)
    ahead = (pattern * (lag < 0)).sum(-1)
    close(found.future_mass, ahead, equal_nan=True, atol=1e-12, rtol=1e-7)
    close(found.n_allowed == 0, pattern[:, 0, :, 0].isnan())
    seen = torch.ones(n, m).tril() if causal else torch.ones(n, m)
    close(found.n_allowed, (mask[:, None] * seen).sum(-1).long())
    for start in range(min(2, n)):
        rows = streaming.pattern_rows(*flat, start, n, causal=causal, key_mask=mask)
        close(rows, pattern[:, :, start:], equal_nan=True)
    for lag in range(1 - m, n):
        entries = streaming.diagonal(*flat, lag, found.lse, causal=causal, key_mask=mask)
        close(entries, pattern.diagonal(-lag, 2, 3), equal_nan=True)


@fewer(0.5)
@given(sizes(1, 2), sizes(1, 3), sizes(1, 9), st.booleans(), seeds)
def test_two_streamed_patterns_compare_as_the_whole_ones(batch, heads, length, causal, seed):
    one, two = (drawn_q_and_k(seed + i, batch, heads, length, length, 2 + i) for i in (0, 1))
    p, r = plain_softmax(*one, causal), plain_softmax(*two, causal)
    flat = [t.transpose(1, 2) for t in (*one, *two)]
    js = entropy((p + r) / 2) - (entropy(p) + entropy(r)) / 2
    close(streaming.js_rows(*flat, causal=causal), js, atol=1e-12, rtol=1e-7)
    found = streaming.inner(*flat, causal=causal)
    close(found.cross, (p * r).sum(-1))
    close(found.first, p.square().sum(-1))
    close(found.second, r.square().sum(-1))
    close(found.cosine, torch.cosine_similarity(p, r, dim=-1))
