"""Properties of what is left out before measuring: keys, queries, the first key, the own key."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, patterns, random_pattern, seeds, sizes

from smearlens.analysis.mixing.kinds import BandMixing, DenseMixing
from smearlens.analysis.mixing.options import RowOptions
from smearlens.analysis.mixing.rows import row_blocks
from smearlens.analysis.mixing.state_space import unsigned
from smearlens.analysis.patterns import (
    attention_entropy,
    attention_span,
    self_mass,
    sink_mass,
)

close = torch.testing.assert_close


def drawn_mask(seed, *size, share=0.6):
    return torch.rand(size, generator=generator(seed)) < share


@fewer(0.25)
@given(patterns(causal=False), seeds)
def test_masked_keys_are_as_good_as_cut_out(pattern, seed):
    keep = drawn_mask(seed, pattern.shape[-1])
    keep[-1] = True
    left = pattern[..., keep]
    plain = left / left.sum(-1, keepdim=True)
    expected = -(plain * plain.clamp_min(1e-38).log()).sum(-1).mean(-1)
    close(attention_entropy(pattern, key_mask=keep), expected)
    lag = torch.arange(pattern.shape[-1])[:, None] - torch.arange(pattern.shape[-1])[keep]
    close(attention_span(pattern, key_mask=keep), (plain * lag.abs()).sum(-1).mean(-1))


@fewer(0.5)
@given(patterns(), seeds)
def test_masked_queries_are_as_good_as_cut_out(pattern, seed):
    keep = drawn_mask(seed, len(pattern), pattern.shape[-1])
    rows = -(pattern * pattern.clamp_min(1e-38).log()).sum(-1)
    kept = [r[:, k].mean(-1) for r, k in zip(rows, keep, strict=True)]
    close(attention_entropy(pattern, query_mask=keep), torch.stack(kept), equal_nan=True)


@fewer(0.1)
@given(patterns(), seeds, st.booleans())
def test_a_mask_for_all_is_that_mask_for_each(pattern, seed, queries):
    mask = drawn_mask(seed, pattern.shape[-1])
    name = "query_mask" if queries else "key_mask"
    each = mask.expand(len(pattern), -1)
    for metric in (attention_entropy, sink_mass):
        one, many = metric(pattern, **{name: mask}), metric(pattern, **{name: each})
        close(one, many, equal_nan=True, rtol=0, atol=0)


@fewer(0.1)
@given(patterns(causal=True, least=3))
def test_leaving_out_the_first_key_is_a_key_mask(pattern):
    keys = torch.arange(pattern.shape[-1]) > 0
    for metric in (attention_entropy, attention_span, self_mass):
        close(metric(pattern, exclude_bos=True), metric(pattern, key_mask=keys), equal_nan=True)


@given(patterns(least=3), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_rows_keep_what_is_allowed_and_renormalise_to_one(pattern, bos, own, renormalise, seed):
    mask = drawn_mask(seed, pattern.shape[-1], share=0.8)
    options = RowOptions(exclude_bos=bos, exclude_self=own, key_mask=mask, renormalise=renormalise)
    mixing, length = DenseMixing(pattern), pattern.shape[-1]
    allowed = mask.expand(length, length).clone()
    if bos:
        allowed[:, 0] = False
    if own:
        allowed.fill_diagonal_(False)
    expected = pattern * allowed
    mass = expected.sum(-1)
    for block in row_blocks(mixing, options):
        close(block.full, mass > 0)
        if renormalise:
            expected = expected / torch.where(mass > 0, mass, 1)[..., None]
        close(block.weights, expected)
        assert not bool((block.weights * ~block.allowed).any())


@given(sizes(1, 4), sizes(1, 5), sizes(1, 9), sizes(0, 3), seeds)
def test_signed_rows_become_weights_as_named(channels, taps, length, ahead, seed):
    kernel = torch.randn(channels, taps, generator=generator(seed), dtype=torch.float64)
    mixing = BandMixing(kernel, [tap - min(ahead, taps - 1) for tap in range(taps)], length)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if mixing.causal else seen
    rows = mixing.dense()
    absolute = unsigned(rows.clone(), seen, "abs")
    mass = rows.abs().sum(-1)
    close(absolute.sum(-1), (mass > 0).double())
    close(absolute * mass[..., None], rows.abs())
    soft = unsigned(rows.clone(), seen, "softmax")
    close(soft.sum(-1), torch.ones_like(mass))
    assert not bool((soft * ~seen).any())
    ratio = (soft + 1e-300).log() - rows  # constant along the allowed keys of a row
    spread = torch.where(seen, ratio, ratio[..., :1])
    close(spread, spread[..., :1].expand_as(spread))
    flat = unsigned(rows.clone(), seen, "minmax")
    low = torch.where(seen, rows, torch.inf).amin(-1, keepdim=True)
    shifted = (rows - low) * seen
    close(flat * shifted.sum(-1, keepdim=True), shifted, atol=1e-12, rtol=1e-9)
    assert unsigned(rows, seen, "none") is rows


@fewer(0.1)
@given(sizes(1, 3), sizes(2, 8), sizes(1, 3), seeds)
def test_rows_without_any_key_count_nowhere(batch, length, head, seed):
    pattern = random_pattern(seed, batch, head, length, length)
    broken = drawn_mask(seed + 1, batch, length, share=0.3)
    spoiled = pattern.masked_fill(broken[:, None, :, None], 0)
    nan = pattern.masked_fill(broken[:, None, :, None], torch.nan)
    expected = attention_entropy(pattern, query_mask=~broken)
    close(attention_entropy(spoiled), expected, equal_nan=True)
    close(attention_entropy(nan), expected, equal_nan=True)
