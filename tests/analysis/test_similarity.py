"""Layers compared: against loops over all matchings and quadruples, closed forms, known nulls."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref

from smearlens import layer_similarity, linear_cka
from smearlens.analysis.mixing.kinds import DenseMixing, SoftmaxMixing
from smearlens.analysis.mixing.layer_streams import compare_layers
from smearlens.analysis.similarity import js_similarity

BATCH, LENGTH = 2, 6
PADS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]]).bool()
OPTIONS = {
    "plain": {},
    "bos": {"exclude_bos": True},
    "queries": {"query_mask": PADS},
    "pads": {"query_mask": PADS, "key_mask": PADS, "exclude_self": True},
}
KINDS = {"js": {"kind": "js"}, "centred": {"kind": "cosine"}}
KINDS["raw"] = {"kind": "cosine", "centred": False}


def two_layers(*, causal=True, broken=True):
    """2 heads against 3, each with rows that hold nothing, not the same ones."""
    one = ref.random_pattern(1, BATCH, 2, LENGTH, causal=causal)
    other = ref.random_pattern(2, BATCH, 3, LENGTH, causal=causal)
    if broken:
        one[0, :, 3], other[1, :, 4], other[1, 0, 2] = np.nan, 0, np.nan
    return one, other


def cache_of(*patterns):
    return {f"blocks.{i}.attn.hook_pattern": torch.from_numpy(p) for i, p in enumerate(patterns)}


# Patterns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", ["mean", "match"])
@pytest.mark.parametrize("choice", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_a_plain_loop_over_all_matchings(kind, choice, heads):
    for causal in (True, False):
        one, other = two_layers(causal=causal)
        leave = ref.leave_of(OPTIONS[choice], BATCH, causal=causal)
        expected = ref.layer_similarity(one, other, kind, heads, leave)
        options = {**KINDS[kind], **OPTIONS[choice], "heads": heads}
        found = layer_similarity(cache_of(one, other), **options)
        assert found.layers == ["blocks.0.attn", "blocks.1.attn"]
        assert float(found.values[1, 0]) == pytest.approx(expected, abs=1e-9)
        assert float(found.values[0, 1]) == float(found.values[1, 0])
        assert found.values.diagonal().tolist() == [1.0, 1.0]
        turned = layer_similarity(cache_of(other, one), **options)
        assert float(turned.values[1, 0]) == pytest.approx(expected, abs=1e-9)


def test_matching_finds_permuted_heads():
    pattern = ref.random_pattern(1, BATCH, 5, LENGTH)
    shuffled = pattern[:, [3, 0, 4, 1, 2]]
    for kind in KINDS.values():
        matched = layer_similarity(cache_of(pattern, shuffled), heads="match", **kind)
        assert float(matched.values[0, 1]) == pytest.approx(1)
        by_mean = layer_similarity(cache_of(pattern, shuffled), **kind)
        assert float(by_mean.values[0, 1]) == pytest.approx(1)
    different = layer_similarity(cache_of(pattern, ref.random_pattern(9, BATCH, 5, LENGTH)))
    assert float(different.values[0, 1]) < 0.99


def test_the_null_stands_beside_the_value():
    layers = [ref.random_pattern(i, BATCH, 2, LENGTH) for i in range(3)]
    nulls = [ref.random_pattern(i, BATCH, 2, LENGTH) for i in range(5, 8)]
    found = layer_similarity(cache_of(*layers), null=cache_of(*nulls))
    alone = layer_similarity(cache_of(*nulls))
    torch.testing.assert_close(found.null, alone.values)
    assert alone.null is None
    (first, second, value, null), *rest = found.pairs()
    assert (first, second, len(rest)) == ("blocks.0.attn", "blocks.1.attn", 2)
    assert value == pytest.approx(float(found.values[0, 1]))
    assert null == pytest.approx(float(alone.values[0, 1]))
    assert f"null {null:.3f}" in repr(found)
    assert "null not given" in repr(alone)
    with pytest.raises(ValueError, match=r"null must have the layers of source"):
        layer_similarity(cache_of(*layers), null=cache_of(*nulls[:2]))


def previous_token(length):
    pattern = np.zeros((length, length))
    pattern[range(1, length), range(length - 1)] = 1
    pattern[0, 0] = 1
    return pattern[None, None]


def test_identity_against_the_previous_token():
    identity, previous = np.eye(8)[None, None], previous_token(8)
    rows = js_similarity(torch.from_numpy(identity), torch.from_numpy(previous))[0, 0]
    divergence = (1 - rows) * math.log(2)
    assert divergence.tolist() == pytest.approx([0] + [math.log(2)] * 7)
    found = layer_similarity(cache_of(identity, previous))
    assert float(found.values[0, 1]) == pytest.approx(0)  # row 0 has one key and does not count
    off_row_0 = {"kind": "cosine", "centred": False, "query_mask": torch.arange(8) > 0}
    found = layer_similarity(cache_of(identity, previous), **off_row_0)
    assert float(found.values[0, 1]) == 0


def test_uniform_against_identity():
    uniform = ref.uniform(1, 8, 8, causal=True)
    cache = cache_of(uniform, np.eye(8)[None, None])
    found = layer_similarity(cache, kind="cosine", centred=False)
    assert float(found.values[0, 1]) == pytest.approx(
        math.sqrt(sum(1 / n for n in range(1, 9)) / 8)
    )
    assert float(found.values[0, 1]) == pytest.approx(0.582865, abs=1e-6)
    centred = layer_similarity(cache, kind="cosine")
    assert centred.values[0, 1].isnan()  # nothing of the uniform pattern is left to compare


def test_a_uniform_layer_has_no_direction():
    """Centred it is nothing but rounding, whose cosine would say anything, 1 with itself."""
    uniform = torch.full((3, 2, 20, 20), 1 / 20)
    other = torch.from_numpy(ref.random_pattern(0, 3, 2, 20, causal=False)).float()
    for heads in ("mean", "match"):
        found = layer_similarity(
            {"a.hook_pattern": uniform, "b.hook_pattern": uniform, "c.hook_pattern": other},
            kind="cosine", heads=heads,
        ).values  # fmt: skip
        assert found[0, 1].isnan()
        assert found[0, 2].isnan()
    raw = {"a.hook_pattern": uniform, "b.hook_pattern": uniform}
    assert float(layer_similarity(raw, kind="cosine", centred=False).values[0, 1]) > 0.999


def test_streamed_uniform_layers_have_no_direction_either():
    almost_one_key = torch.randn(2, 1, 3, 4) + 1e-7 * torch.randn(2, 9, 3, 4)
    still = SoftmaxMixing(torch.randn(2, 9, 3, 4), almost_one_key)
    random = SoftmaxMixing(torch.randn(2, 9, 3, 4), torch.randn(2, 9, 3, 4))
    found = compare_layers({"a": still, "b": still, "c": random})
    for name in ("centred", "matched"):
        assert getattr(found, name)[:, 0, 1:].isnan().all(), name
    torch.testing.assert_close(found.cosine[:, 0, 1], torch.ones(2).to(found.cosine))


def test_layers_of_other_examples_are_not_compared():
    cache = {"a.hook_pattern": torch.eye(3).expand(2, 1, 3, 3),
             "b.hook_pattern": torch.eye(3).expand(5, 1, 3, 3)}  # fmt: skip
    with pytest.raises(ValueError, match="layers of 5 and 2 examples cannot be compared"):
        layer_similarity(cache)


@pytest.mark.parametrize(
    ("length", "cosine", "js"),
    [  # known figures, each of one pair of heads, with the standard deviation over pairs
        (16, (0.73, 0.056), (0.79, 0.027)),
        (64, (0.63, 0.037), (0.75, 0.009)),
        (256, (0.50, 0.017), (0.72, 0.002)),
    ],
)
def test_two_independent_random_heads(length, cosine, js, generator):
    """What unrelated heads score: the reason why the null is reported and cosines are centred."""
    n = 3000 // length
    scores = torch.randn(2, n, 1, length, length, generator=generator)
    ahead = torch.ones(length, length).triu(1).bool()
    layers = dict(
        zip("ab", map(DenseMixing, scores.masked_fill(ahead, -torch.inf).softmax(-1)), strict=True)
    )
    raw = float(layer_similarity(layers, kind="cosine", centred=False).values[0, 1])
    assert raw == pytest.approx(cosine[0], abs=2 * cosine[1])
    divergence = float(layer_similarity(layers, kind="js").values[0, 1])
    assert divergence == pytest.approx(js[0], abs=2 * js[1])
    assert float(layer_similarity(layers, kind="cosine").values[0, 1]) == pytest.approx(0, abs=0.03)
    p, q = (mixing.dense().double() for mixing in layers.values())  # one plain formula each
    norms = (p.square().sum((-1, -2)) * q.square().sum((-1, -2))).sqrt()
    assert raw == pytest.approx(float(((p * q).sum((-1, -2)) / norms).mean()), abs=1e-6)
    m = (p + q) / 2
    kl = [(a * (a / m).clamp_min(1e-300).log()).nan_to_num().sum(-1) for a in (p, q)]
    plain = 1 - (kl[0] + kl[1]) / 2 / math.log(2)
    assert divergence == pytest.approx(float(plain[..., 1:].mean()), abs=1e-6)


def test_an_example_without_valid_rows_is_left_out():
    one, other = two_layers(broken=False)
    for heads in ("mean", "match"):
        for kind in KINDS.values():
            whole = layer_similarity(cache_of(one[:1], other[:1]), heads=heads, **kind).values
            damaged = one.copy()
            damaged[1] = np.nan
            found = layer_similarity(cache_of(damaged, other), heads=heads, **kind).values
            torch.testing.assert_close(found, whole)
            damaged[0] = 0
            found = layer_similarity(cache_of(damaged, other), heads=heads, **kind).values
            assert found[0, 1].isnan()


def test_a_causal_layer_against_one_that_reads_ahead():
    """Both are compared over all keys that either sees, in either order."""
    one = ref.random_pattern(1, BATCH, 2, LENGTH)
    other = ref.random_pattern(2, BATCH, 3, LENGTH, causal=False)
    for name, kind in KINDS.items():
        expected = ref.layer_similarity(one, other, name, "mean", ref.Leave(causal=False))
        for pair in ((one, other), (other, one)):
            found = float(layer_similarity(cache_of(*pair), **kind).values[0, 1])
            assert found == pytest.approx(expected, abs=1e-9)


# Activations -------------------------------------------------------------------------------------


def rows(seed, n, width):
    return np.random.default_rng(seed).normal(size=(n, width)) + 3


@pytest.mark.parametrize(("n", "one", "two"), [(11, 3, 5), (7, 2, 4)])
def test_cka_equals_a_plain_loop(n, one, two):
    x, y = rows(1, n, one), rows(2, n, two)
    plain = linear_cka(torch.from_numpy(x), torch.from_numpy(y), debiased=False)
    assert plain == pytest.approx(ref.linear_cka(x, y), abs=1e-9)
    debiased = linear_cka(torch.from_numpy(x), torch.from_numpy(y), debiased=True)
    expected = ref.hsic(x, y) / math.sqrt(abs(ref.hsic(x, x) * ref.hsic(y, y)))
    assert debiased == pytest.approx(expected, abs=1e-9)
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == debiased  # n < 10 · width


def test_cka_is_debiased_below_ten_tokens_per_column():
    for n, debiased in ((49, True), (50, False)):
        x, y = (torch.from_numpy(rows(seed, n, 5)) for seed in (1, 2))
        assert linear_cka(x, y) == linear_cka(x, y, debiased=debiased)
        assert linear_cka(x, y) != linear_cka(x, y, debiased=not debiased)


@pytest.mark.parametrize(("n", "bias"), [(50, 0.56), (200, 0.23), (2000, 0.03)])
def test_cka_bias_on_random_data(n, bias, generator):
    x, y = torch.randn(2, n, 64, generator=generator, dtype=torch.float64)
    assert linear_cka(x, y, debiased=False) == pytest.approx(bias, abs=0.02)
    assert linear_cka(x, y, debiased=True) == pytest.approx(0, abs=0.05)


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 30), st.integers(1, 5), st.integers(0, 999), st.booleans())
def test_cka_ignores_rotation_scale_and_shift(n, width, seed, debiased):
    n = max(n, 5)
    x, y = (torch.from_numpy(rows(seed + i, n, width)) for i in range(2))
    rotation, _ = torch.linalg.qr(torch.from_numpy(rows(seed, width, width)))
    assert linear_cka(x, x @ rotation, debiased=debiased) == pytest.approx(1, abs=1e-6)
    moved = 2.5 * x @ rotation + torch.arange(width)
    expected = linear_cka(x, y, debiased=debiased)
    assert linear_cka(moved, y, debiased=debiased) == pytest.approx(expected, abs=1e-6)
    assert linear_cka(y, x, debiased=debiased) == pytest.approx(expected, abs=1e-9)


def test_cka_of_layers_counts_the_tokens_it_is_told_to():
    torch.manual_seed(1)
    cache = {f"blocks.{i}.hook_resid_post": torch.randn(2, 9, 3) for i in range(3)}
    names = list(cache)
    mask = torch.ones(2, 9).bool()
    mask[0, :4] = False
    for options, keep in (
        ({}, torch.ones(2, 9).bool()),
        ({"exclude_bos": True}, torch.arange(9).expand(2, 9) > 0),
        ({"query_mask": mask}, mask),
        ({"query_mask": mask, "exclude_bos": True}, mask & (torch.arange(9) > 0)),
        ({"query_mask": mask[0]}, mask[:1].expand(2, 9)),
    ):
        found = layer_similarity(cache, kind="cka", **options)
        assert found.layers == names
        for i, j in ((0, 1), (1, 2), (2, 0)):
            expected = linear_cka(cache[names[i]][keep], cache[names[j]][keep])
            assert float(found.values[i, j]) == pytest.approx(expected)
    flat = {name: x[1] for name, x in cache.items()}  # a cache without batch axis
    found = layer_similarity(flat, kind="cka", null=cache)
    assert float(found.values[0, 1]) == pytest.approx(linear_cka(flat[names[0]], flat[names[1]]))
    assert found.null is not None
    heads = {f"blocks.{i}.attn.hook_z": torch.randn(2, 9, 3, 5) for i in range(2)}
    found = layer_similarity(heads, kind="cka", point="hook_z")
    x, y = (z.reshape(18, 15) for z in heads.values())
    assert float(found.values[0, 1]) == pytest.approx(linear_cka(x, y))


# Properties --------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(st.integers(2, 8), st.integers(1, 4), st.integers(0, 999))
def test_similarities_are_bounded_symmetric_and_one_for_equals(length, heads, seed):
    patterns = [ref.random_pattern(seed + i, BATCH, heads, length) for i in range(3)]
    cache = cache_of(*patterns, patterns[0])
    for kind in KINDS.values():
        for how in ("mean", "match"):
            values = layer_similarity(cache, heads=how, **kind).values
            assert torch.equal(values, values.mT)
            assert bool((values <= 1 + 1e-9).all())
            assert bool((values >= (-1 if kind == {"kind": "cosine"} else 0)).all())
            assert float(values[0, 3]) == pytest.approx(1)
            assert bool((values[0, :3] <= values[0, 3] + 1e-9).all())
