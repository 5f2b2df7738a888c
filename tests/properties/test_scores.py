"""Properties of what heads are scored by: targets, entropy, spans, lags, diversity.

Every metric of a pattern is here at least once. Leaves out comparisons of two patterns
(`test_similarity`) and masks (`test_masks`).
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.properties.strategies import (
    NAME,
    fewer,
    generator,
    patterns,
    random_pattern,
    seeds,
    sizes,
    with_tokens,
)

from smearlens.analysis.detection import alignment_mass, stripe_score
from smearlens.analysis.heads import (
    common_period,
    duplicate_token_score,
    induction_score,
    prefix_matching_score,
    prev_token_score,
)
from smearlens.analysis.patterns import (
    attention_entropy,
    attention_span,
    future_mass,
    head_diversity,
    lag_profile,
    self_mass,
    sink_mass,
)
from smearlens.data.synthetic import repeated_random

close = torch.testing.assert_close


def one_hot(keys, n_keys):
    """Each query looks at one key: [batch 1 query key] from key indices [batch query]."""
    return torch.nn.functional.one_hot(keys, n_keys).double()[:, None]


@fewer(0.25)
@given(patterns())
def test_sink_self_previous_and_future_are_parts_of_the_lag_profile(pattern):
    length = pattern.shape[-1]
    profile = lag_profile(pattern, max_lag=length)
    share = dict(zip(profile.lags, profile.share.unbind(-1), strict=True))
    close(self_mass(pattern), share[0])
    close(prev_token_score(pattern), share[1] * length / (length - 1))
    ahead = sum((s for lag, s in share.items() if lag < 0), torch.zeros_like(share[0]))
    close(future_mass(pattern), ahead)
    close(sum(share.values()), torch.ones_like(share[0]))
    close(sink_mass(pattern), pattern[..., 0].mean(-1))


@fewer(0.25)
@given(patterns())
def test_the_mean_distance_is_the_profile_times_the_lags(pattern):
    profile = lag_profile(pattern, max_lag=pattern.shape[-1])
    lags = torch.tensor(profile.lags, dtype=torch.float64).abs()
    close(attention_span(pattern), profile.share @ lags)


@fewer(0.5)
@given(patterns(causal=True))
def test_the_relative_distance_divides_each_row_by_its_place(pattern):
    place = torch.arange(pattern.shape[-1], dtype=torch.float64)
    distance = (pattern * (place[:, None] - place).abs()).sum(-1)
    close(attention_span(pattern, kind="relative"), (distance / place)[..., 1:].mean(-1))


@fewer(0.25)
@given(patterns(), st.floats(1.1, 20))
def test_entropy_in_another_base_and_the_effective_number_of_keys(pattern, base):
    nats = attention_entropy(pattern)
    close(attention_entropy(pattern, base=base), nats / math.log(base))
    effective = attention_span(pattern, kind="effective")
    assert bool((effective >= nats.exp() - 1e-9).all())  # Jensen: the mean of exp, exp of the mean
    assert bool((effective <= pattern.shape[-1] + 1e-9).all())


@fewer(0.25)
@given(patterns(least=3))
def test_normalised_entropy_is_one_for_uniform_rows_and_below_for_others(pattern):
    assert bool((attention_entropy(pattern, normalised=True) <= 1 + 1e-9).all())
    allowed = pattern.tril() > 0 if not pattern.triu(1).any() else pattern >= 0
    even = allowed / allowed.sum(-1, keepdim=True).double()
    close(attention_entropy(even, normalised=True), torch.ones_like(even[..., 0, 0]))


@fewer(0.25)
@given(patterns(), st.floats(0.05, 0.95), st.floats(0.05, 0.95))
def test_a_span_holds_its_mass_and_grows_with_it(pattern, one, other):
    less, more = sorted((one, other))
    narrow, wide = (attention_span(pattern, kind="mass", mass=m) for m in (less, more))
    assert bool((narrow <= wide + 1e-9).logical_or(wide.isnan() | pattern.triu(1).any()).all())
    length = pattern.shape[-1]
    for b, h in ((0, 0), (len(pattern) - 1, pattern.shape[1] - 1)):
        spans = []
        for q in range(length):
            held = [float(pattern[b, h, q, q - w : q + 1].sum()) for w in range(q + 1)]
            spans += [w for w in range(q + 1) if held[w] >= less - 1e-6][:1]
        expected = sum(spans) / len(spans) if spans else math.nan
        assert float(narrow[b, h]) == pytest.approx(expected, nan_ok=True)


@fewer(0.5)
@given(patterns(heads=(2, 4)), seeds)
def test_diversity_does_not_see_the_order_of_heads_and_is_zero_for_equal_ones(pattern, seed):
    order = torch.randperm(pattern.shape[1], generator=generator(seed))
    for kind in ("js", "variance"):
        close(head_diversity(pattern[:, order], kind=kind), head_diversity(pattern, kind=kind))
        same = head_diversity(pattern[:, :1].expand_as(pattern), kind=kind)
        close(same, torch.zeros_like(same), atol=1e-12, rtol=0)


@given(sizes(2, 9), sizes(1, 3), seeds)
def test_diversity_of_two_heads_that_never_look_alike_is_one(length, batch, seed):
    first = torch.randint(length, (batch, length), generator=generator(seed))
    other = (first + 1) % length
    pattern = torch.cat([one_hot(first, length), one_hot(other, length)], 1)
    close(head_diversity(pattern), torch.ones(batch, dtype=torch.float64))


@fewer(0.05)
@given(sizes(2, 7), sizes(2, 4), sizes(1, 3), st.booleans(), seeds)
def test_a_head_that_looks_where_induction_wants_scores_one(period, repeats, batch, bos, seed):
    start = 0 if bos else None
    tokens = repeated_random(batch, period, repeats, 11, generator=generator(seed), bos=start)
    length = tokens.shape[1]
    perfect = one_hot((torch.arange(length) - period + 1).clamp_min(0).expand(batch, -1), length)
    if repeats == 2:
        assert induction_score(perfect, tokens).unique().tolist() == [1.0]
        assert induction_score(perfect, tokens, include_boundary=False).unique().tolist() == [1.0]
    before = one_hot((torch.arange(length) - period).clamp_min(0).expand(batch, -1), length)
    scores = prefix_matching_score(before, tokens, offset=(-1, 0, 1))
    assert float(scores[0].min()) == 1.0
    assert float(scores[1].max()) == 0.0
    close(scores[0], duplicate_token_score(before, tokens))
    assert common_period(tokens) == period


@fewer(0.25)
@given(with_tokens(least=3))
def test_induction_weight_is_that_on_duplicates_one_key_later(case):
    pattern, tokens = case
    later = torch.zeros_like(pattern)
    later[..., :-1] = pattern[..., 1:]
    match = (tokens[:, :, None] == tokens[:, None]).tril(-1)[:, None]
    rows = match.any(-1)
    expected = ((later * match).sum(-1) * rows).sum(-1) / rows.sum(-1)
    close(induction_score(pattern, tokens), expected, equal_nan=True)


@fewer(0.1)
@given(with_tokens())
def test_a_mean_entry_is_the_total_over_the_number_of_targets(case):
    pattern, tokens = case
    total = prefix_matching_score(pattern, tokens, offset=0)
    mean = prefix_matching_score(pattern, tokens, offset=0, aggregate="mean")
    match = (tokens[:, :, None] == tokens[:, None]).tril(-1)[:, None]
    count, rows = match.sum(-1), match.any(-1)
    each = (pattern * match).sum(-1) / count.clamp_min(1)
    close(mean, (each * rows).sum(-1) / rows.sum(-1), equal_nan=True)
    assert bool((mean <= total + 1e-12).logical_or(total.isnan()).all())


@fewer(0.05)
@given(with_tokens(), seeds)
def test_scores_do_not_see_names_of_tokens_and_follow_heads_and_examples(case, seed):
    pattern, tokens = case
    g = generator(seed)
    batch, heads = (torch.randperm(n, generator=g) for n in pattern.shape[:2])
    renamed = torch.randperm(50, generator=g)[tokens]
    for score in (duplicate_token_score, induction_score):
        found = score(pattern[batch][:, heads], renamed[batch])
        close(found, score(pattern, tokens)[batch][:, heads], equal_nan=True)


@fewer(0.1)
@given(patterns(), seeds)
def test_row_stripes_of_a_partition_add_up_to_one(pattern, seed):
    length = pattern.shape[-1]
    colour = torch.randint(3, (length, length), generator=generator(seed))
    total = torch.zeros(pattern.shape[:2], dtype=torch.float64)
    for part in range(3):
        total += stripe_score(pattern, colour == part, normalise_by="mul").nan_to_num()
    close(total, torch.ones_like(total))
    chosen = colour == 0
    there = chosen if pattern.triu(1).any() else chosen.tril()
    rows = there.any(-1)
    if rows.any():
        plain = (pattern * there).sum(-1)[..., rows].mean(-1)
        close(stripe_score(pattern, chosen), plain)


@fewer(0.25)
@given(patterns(causal=False), seeds)
def test_a_stripe_counts_what_it_misses_and_what_it_adds(pattern, seed):
    length = pattern.shape[-1]
    wanted = torch.rand(length, length, generator=generator(seed)) < 0.4
    plain = 1 - (pattern - wanted.double()).abs().sum(-1).mean(-1)
    close(stripe_score(pattern, wanted, normalise_by="abs"), plain)


@fewer(0.1)
@given(sizes(1, 3), sizes(1, 8), sizes(2, 7), sizes(-1, 1), seeds)
def test_alignment_mass_is_a_gather_and_its_accuracy_counts_ties_in_parts(b, n, m, shift, seed):
    pattern = random_pattern(seed, b, 2, n, m, causal=False)
    aligned = torch.randint(-1, m, (b, n), generator=generator(seed))
    there = (aligned >= 0) & (aligned + shift >= 0) & (aligned + shift < m)
    index = (aligned + shift).clamp(0, m - 1)[:, None, :, None].expand(-1, 2, -1, 1)
    rows = there[:, None].double()
    mass = (pattern.gather(-1, index)[..., 0] * rows).sum(-1) / rows.sum(-1)
    cache = {f"{NAME}.cross_attn.hook_pattern": pattern}
    found = alignment_mass(cache, aligned, shift=shift)
    close(next(iter(found.values())), mass, equal_nan=True)
    hit = (pattern.argmax(-1) == aligned[:, None] + shift) * rows
    found = alignment_mass(cache, aligned, shift=shift, accuracy=True)
    close(next(iter(found.values())), hit.sum(-1) / rows.sum(-1), equal_nan=True)
    even = torch.full_like(pattern, 1 / m)
    chance = next(iter(alignment_mass({"x.cross_attn.hook_pattern": even}, aligned, shift=shift,
                                      accuracy=True).values()))  # fmt: skip
    expected = torch.full((b, 2), 1 / m, dtype=torch.float64)
    close(chance, expected.masked_fill(~there.any(-1, keepdim=True), torch.nan), equal_nan=True)


@fewer(0.25)
@given(with_tokens(), st.sampled_from(("macro", "micro")))
def test_a_mean_is_of_examples_or_of_rows(case, reduce):
    pattern, tokens = case
    scores = duplicate_token_score({f"{NAME}.hook_pattern": pattern}, tokens)
    match = (tokens[:, :, None] == tokens[:, None]).tril(-1)
    rows, value = match.any(-1), (pattern * match[:, None]).sum(-1)
    per_example = [v[:, r].mean(-1) for v, r in zip(value, rows, strict=True) if r.any()]
    pooled = [v[:, r] for v, r in zip(value, rows, strict=True) if r.any()]
    if per_example:
        macro, micro = torch.stack(per_example).mean(0), torch.cat(pooled, 1).mean(1)
        close(scores.mean(reduce)[NAME], macro if reduce == "macro" else micro)
        assert scores.rows[NAME][:, 0].tolist() == rows.sum(-1).tolist()
    else:
        assert bool(scores.mean(reduce)[NAME].isnan().all())
