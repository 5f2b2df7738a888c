"""From rows to numbers: validity, masks, signed rows, kinds of source, precision, bad input."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref

from smearlens import (
    ConvAttn,
    ConvAttnConfig,
    attention_entropy,
    attention_span,
    future_mass,
    head_diversity,
    induction_score,
    kernel_profile,
    lag_profile,
    layer_similarity,
    mixings,
    prev_token_score,
    score_by_lag,
    self_mass,
    sink_mass,
    smear_evidence,
)
from smearlens.analysis.mixing.kinds import BandMixing, DenseMixing, Mixing
from smearlens.analysis.mixing.options import RowOptions
from smearlens.analysis.mixing.rows import row_block, row_blocks

NAME = "blocks.0.attn"
NAME_PATTERN = f"{NAME}.hook_pattern"


@pytest.fixture(scope="module")
def run():
    """Tokens, cache and model of a ConvAttn whose patterns are far from uniform."""
    torch.manual_seed(5)
    config = ConvAttnConfig(d_vocab=7, d_model=12, n_heads=3, kernel_size=3, n_ctx=20)
    model = ConvAttn(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    tokens = torch.randint(0, 7, (2, 11))
    return tokens, model.run_with_cache(tokens)[1], model


# Validity ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_fully_masked_rows_are_left_out_and_not_averaged_as_zero(nothing):
    """Left padding: the first two queries of example 0 see no key."""
    pattern = torch.from_numpy(ref.random_pattern(0, 2, 3, 7))
    masked = pattern.clone()
    masked[0, :, :2] = nothing
    for metric in (attention_entropy, attention_span, sink_mass, self_mass, prev_token_score):
        scores = metric({f"{NAME}.hook_pattern": masked})
        mask = torch.ones(2, 7).bool()
        mask[0, :2] = False
        torch.testing.assert_close(scores[NAME], metric(pattern, query_mask=mask))
        whole = metric(pattern)
        torch.testing.assert_close(scores[NAME][1], whole[1])
        first = 1 if metric is prev_token_score else 0
        assert scores.rows[NAME][:, 0].tolist() == [5, 7 - first]


def test_a_row_with_an_entry_that_is_not_finite_is_left_out():
    pattern = torch.from_numpy(ref.random_pattern(0, 2, 3, 7))
    pattern[1, 2, 4, 3] = math.inf
    mask = torch.arange(7) != 4
    for metric in (sink_mass, self_mass, prev_token_score):
        scores, rest = metric({f"{NAME}.hook_pattern": pattern}), metric(pattern, query_mask=mask)
        assert float(scores[NAME][1, 2]) == float(rest[1, 2])
        first = 1 if metric is prev_token_score else 0
        assert scores.rows[NAME].tolist() == [[7 - first] * 3, [7 - first] * 2 + [6 - first]]


@pytest.mark.parametrize("nothing", [0.0, math.nan])
def test_rows_without_keys_do_not_hide_that_a_pattern_is_causal(nothing):
    pattern = torch.from_numpy(ref.random_pattern(0, 2, 3, 7))
    pattern[0, :, :3] = nothing
    assert DenseMixing(pattern).causal
    scores = prev_token_score({f"{NAME}.hook_pattern": pattern})
    assert float(scores.chance[NAME]) == pytest.approx(sum(1 / n for n in range(2, 8)) / 6)


def test_no_valid_row_is_nan_and_never_zero():
    pattern = torch.from_numpy(ref.random_pattern(0, 2, 3, 5))
    none = torch.zeros(2, 5).bool()
    one = none.clone()
    one[1] = True
    for metric in (attention_entropy, attention_span, sink_mass, self_mass, prev_token_score):
        assert metric(pattern, query_mask=none).isnan().all()
        scores = metric({f"{NAME}.hook_pattern": pattern}, query_mask=one)
        assert scores[NAME][0].isnan().all()
        assert scores[NAME][1].isfinite().all()
        torch.testing.assert_close(scores.mean()[NAME], scores[NAME][1])
        torch.testing.assert_close(scores.mean("micro")[NAME], scores[NAME][1])
    distinct = torch.arange(5).expand(2, 5)
    assert induction_score(pattern, distinct).isnan().all()


def test_macro_is_the_mean_of_examples_and_micro_of_rows():
    """Two planted examples: 1 valid row of score 1, and 4 of score 0."""
    pattern = torch.zeros(2, 1, 5, 5)
    pattern[:, :, range(5), 0] = 1  # every query rests on the first key
    mask = torch.tensor([[0, 1, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    scores = prev_token_score({f"{NAME}.hook_pattern": pattern}, query_mask=mask)
    assert scores[NAME][:, 0].tolist() == [1.0, 0.25]
    assert float(scores.mean()[NAME]) == 0.625
    assert float(scores.mean("micro")[NAME]) == 2 / 5
    assert scores.rows[NAME][:, 0].tolist() == [1, 4]


def test_masks_may_differ_by_example_where_the_mixing_does_not():
    kernel = torch.randn(3, 2, dtype=torch.float64)
    band = BandMixing(kernel, [0, 1], 6)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1]]).bool()
    expected = torch.cat([self_mass(band, query_mask=m) for m in mask])
    torch.testing.assert_close(self_mass(band, query_mask=mask), expected)
    profile = lag_profile(band, query_mask=mask, max_lag=2)
    assert profile.values.shape == (2, 3, 3)


# Signed rows -------------------------------------------------------------------------------------


def signed_rows(seed=0, batch=2, heads=3, length=6):
    rows = torch.randn(batch, heads, length, length, dtype=torch.float64)
    return rows.tril()


def as_weights(row, allowed, normalise):
    """One signed row as weights over its causal keys."""
    values = {k: float(row[k]) for k in allowed}
    if normalise == "none":
        return values
    if normalise == "softmax":
        parts = {k: math.exp(v) for k, v in values.items()}
    elif normalise == "minmax":
        parts = {k: v - min(values.values()) for k, v in values.items()}
    else:
        parts = {k: abs(v) for k, v in values.items()}
    total = sum(parts.values())
    return {k: v / total for k, v in parts.items()} if total > 0 else None


@pytest.mark.parametrize(
    "kept", [{}, {"exclude_bos": True}, {"exclude_bos": True, "renormalise": False}]
)
@pytest.mark.parametrize("normalise", ["abs", "softmax", "minmax", "none"])
def test_signed_rows_become_weights_before_keys_are_left_out(normalise, kept):
    rows = signed_rows()
    ours = self_mass(DenseMixing(rows, signed=True), normalise=normalise, **kept)
    for b, h in np.ndindex(2, 3):
        values = []
        for q in range(6):
            weights = as_weights(rows[b, h, q], range(q + 1), normalise)
            if weights is None:
                continue
            if "exclude_bos" in kept:
                del weights[0]
            mass = sum(weights.values()) if normalise != "none" else 1.0
            if not weights or (q in weights and mass == 0):
                continue
            scale = 1 / mass if len(kept) == 1 else 1.0
            values.append(scale * weights[q])
        assert float(ours[b, h]) == pytest.approx(sum(values) / len(values), abs=1e-9)


def test_rows_that_sum_to_less_than_zero_count_too():
    """With "none" a signed row is what it is: its sign does not make it empty."""
    rows = torch.tensor([[-1.0, 0.0], [0.5, -2.0]])[None, None]
    assert float(self_mass(DenseMixing(rows, signed=True), normalise="none")) == -1.5
    empty = torch.tensor([[0.0, 0.0], [0.5, -2.0]])[None, None]
    assert float(self_mass(DenseMixing(empty, signed=True), normalise="none")) == -2.0


def test_the_choice_for_signed_rows_is_stated_and_ignored_for_attention(run):
    _, cache, _ = run
    scores = prev_token_score(cache, kind="conv", normalise="minmax")
    assert scores.note == "signed maps normalised by 'minmax'"
    assert "normalised by 'minmax'" in repr(scores)
    plain = sink_mass(cache, exclude_self=True)
    raw = sink_mass(cache, exclude_self=True, normalise="none")
    torch.testing.assert_close(raw[NAME], plain[NAME])
    assert plain.note == ""


# Sources -----------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same(run):
    tokens, cache, model = run
    pattern = cache[f"{NAME}.hook_pattern"]
    by_cache = prev_token_score(cache)
    assert list(by_cache) == [NAME]
    for source in (dict(cache.items()), {f"{NAME}.hook_pattern": pattern}, mixings(cache)):
        torch.testing.assert_close(prev_token_score(source)[NAME], by_cache[NAME])
    values = prev_token_score(pattern)
    assert values.shape == (2, 3)
    torch.testing.assert_close(values, by_cache[NAME])
    torch.testing.assert_close(prev_token_score(pattern[1]), values[1])
    torch.testing.assert_close(prev_token_score(pattern[1, 2]), values[1, 2])
    torch.testing.assert_close(prev_token_score(DenseMixing(pattern)), values)
    assert prev_token_score(pattern[1, 2]).shape == ()
    _, flat = model.run_with_cache(tokens[:1], remove_batch_dim=True)
    assert flat[f"{NAME}.hook_pattern"].ndim == 3
    torch.testing.assert_close(prev_token_score(flat)[NAME], values[:1])
    induced = induction_score(pattern[0], tokens[0])
    torch.testing.assert_close(induced, induction_score(pattern, tokens)[0])
    whole = induction_score({"hook_pattern": pattern}, tokens)  # a cache whose layer has no name
    torch.testing.assert_close(whole[""], induction_score(pattern, tokens))


def test_layers_come_in_natural_order():
    pattern = torch.from_numpy(ref.random_pattern(0, 1, 2, 3))
    names = [f"blocks.{i}.attn" for i in (10, 2, 0, 1)]
    scores = prev_token_score({f"{name}.hook_pattern": pattern for name in names})
    assert list(scores) == [f"blocks.{i}.attn" for i in (0, 1, 2, 10)]


@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_caches(run, dtype, near):
    """Statistics are computed wide: what remains is the rounding of the cache."""
    tokens, cache, model = run
    half = {name: value.to(dtype) for name, value in cache.items()}
    for metric in (prev_token_score, attention_entropy, attention_span, sink_mass):
        found = metric(half)[NAME]
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, metric(cache)[NAME], atol=3 * near, rtol=near)
    found = induction_score(half, tokens)[NAME]
    torch.testing.assert_close(found, induction_score(cache, tokens)[NAME], atol=near, rtol=near)
    assert kernel_profile(half).lags == [0, 1, 2]
    by_lag = score_by_lag(half, model.blocks[0].attn.W_K)
    exact = score_by_lag(cache, model.blocks[0].attn.W_K)
    for lag, scores in by_lag.items():
        assert scores.dtype == torch.float32
        size = float(exact[lag].abs().max())
        torch.testing.assert_close(scores, exact[lag], atol=2 * near * size, rtol=0)


def test_the_cache_is_never_modified(run):
    tokens, cache, model = run
    before = {name: value.clone() for name, value in cache.items()}
    kept = {"exclude_bos": True, "exclude_self": True, "key_mask": torch.arange(11) != 4}
    signed = [{"normalise": n} for n in ("abs", "softmax", "minmax", "none")]
    for options in (kept, *signed, {**kept, **signed[0]}, {**kept, **signed[3]}):
        source = mixings(cache, kind=("attention", "conv"))
        for metric in (attention_span, prev_token_score, future_mass, lag_profile):
            metric(source, **options)
        induction_score(source, tokens, **options)
        for metric in (attention_entropy, head_diversity):
            if options.get("normalise") != "none":
                metric(source, **options)
        for kind in ("js", "cosine"):
            both = {"a.hook_pattern": cache[f"{NAME}.hook_pattern"]}
            layer_similarity({**both, "b.hook_pattern": both["a.hook_pattern"]}, kind=kind)
    for mixing in mixings(cache, kind=("attention", "conv")).values():
        mixing.dense().zero_()
        mixing.diagonal(1).zero_()
        for _, _, rows in mixing.blocks(4):
            rows.zero_()
    kernel_profile(cache)
    by_lag = score_by_lag(cache, model.blocks[0].attn.W_K)
    smear_evidence(by_lag, tokens)
    for name, value in before.items():
        assert torch.equal(cache[name], value), name


# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
def test_numbers_do_not_depend_on_the_blocks(length, monkeypatch, generator):
    """The default block of 128 rows against one block of all, and blocks of 50."""
    scores = torch.randn(2, 3, length, length, generator=generator, dtype=torch.float64)
    ahead = torch.ones(length, length).triu(1).bool()
    pattern = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    tokens = torch.randint(0, max(2, length // 5), (2, length), generator=generator)
    mask = torch.rand(2, length, generator=generator) < 0.8

    def everything():
        mixing = DenseMixing(pattern)
        found = [
            induction_score(mixing, tokens, key_mask=mask, query_mask=mask),
            prev_token_score(mixing, exclude_bos=True),
            attention_entropy(mixing),
            attention_span(mixing, kind="mass"),
            lag_profile(mixing, max_lag=7, key_mask=mask).values,
            head_diversity(mixing),
            head_diversity(mixing, kind="variance"),
        ]
        two = {"a": mixing, "b": DenseMixing(pattern.flip(1)[:, :2].contiguous())}
        for kind in ("js", "cosine"):
            found.append(layer_similarity(two, kind=kind, heads="match").values)
        return found

    default = everything()
    for size in (length, 50):
        blocks = DenseMixing.blocks

        def cut(self, _=128, size=size, blocks=blocks):
            return blocks(self, size)

        with monkeypatch.context() as patch:
            patch.setattr(DenseMixing, "blocks", cut)
            for one, other in zip(everything(), default, strict=True):
                torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-12, atol=1e-12)


def test_a_long_pattern_against_one_numpy_expression():
    """Two block borders inside; the diagonal in one stroke."""
    pattern = torch.from_numpy(ref.random_pattern(3, 1, 2, 260))
    stripe = pattern.diagonal(-1, dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(prev_token_score(pattern), stripe)
    position = torch.arange(260).double()
    lag = position[:, None] - position
    torch.testing.assert_close(attention_span(pattern), (pattern * lag).sum(-1).mean(-1))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999), st.booleans(), st.booleans())
def test_row_blocks_put_together_are_the_rows_prepared_one_by_one(queries, cut, seed, bos, own):
    pattern = torch.from_numpy(ref.random_pattern(seed, 2, 3, queries))
    keys = torch.rand(2, queries, generator=torch.Generator().manual_seed(seed)) < 0.7
    options = {"exclude_bos": bos, "exclude_self": own, "key_mask": keys}
    leave = ref.leave_of(options, 2)
    mixing = DenseMixing(pattern)
    for start in range(0, queries, cut):
        stop = min(start + cut, queries)
        block = row_block(mixing, mixing.rows(start, stop), start, RowOptions(**options))
        for b, h, q in np.ndindex(2, 3, stop - start):
            row = leave.row(pattern.numpy(), b, h, start + q)
            assert bool(block.full[b, h, q]) == (row is not None)
            if row is not None:
                expected = [row.get(k, 0.0) for k in range(queries)]
                assert block.weights[b, h, q].tolist() == pytest.approx(expected, abs=1e-12)


def test_rows_are_taken_as_they_are_unless_keys_are_left_out():
    """A pattern that a hook halved keeps its mass; only what was left out is made up for."""
    pattern = torch.from_numpy(ref.random_pattern(0, 2, 3, 7))
    torch.testing.assert_close(self_mass(pattern / 2), self_mass(pattern) / 2)
    found, whole = (self_mass(p, exclude_bos=True) for p in (pattern / 2, pattern))
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("least", [1e-29, 1e-34])
def test_what_a_sink_leaves_is_renormalised_however_little_it_is(least):
    """A row that counts has sum 1 after the sink is left out, in float32 too."""
    pattern = torch.tensor([[1.0, 0, 0], [1.0, least, 0], [1.0, least, 3 * least]])
    assert self_mass(pattern, exclude_bos=True).item() == pytest.approx((1 + 0.75) / 2, rel=1e-5)
    band = BandMixing(torch.tensor([[least, 3 * least]]), [0, 1], 3)
    assert self_mass(band).item() == pytest.approx((1 + 0.25 + 0.25) / 3, rel=1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(0, 999), st.booleans())
def test_renormalised_rows_sum_to_one_and_others_never_more(length, seed, renormalise):
    mixing = DenseMixing(torch.from_numpy(ref.random_pattern(seed, 2, 3, length)))
    options = RowOptions(exclude_bos=True, exclude_self=True, renormalise=renormalise)
    for block in row_blocks(mixing, options):
        mass = block.weights.sum(-1)[block.full]
        assert bool((mass <= 1 + 1e-9).all())
        if renormalise:
            torch.testing.assert_close(mass, torch.ones_like(mass))


def test_a_padded_query_does_not_make_a_layer_look_ahead():
    """Hugging Face leaves the row of a left pad uniform over all keys."""
    length = 9
    causal = torch.ones(2, 3, length, length).tril()
    causal = causal / causal.sum(-1, keepdim=True)
    padded = causal.clone()
    padded[0, :, :4] = 1 / length
    real = torch.ones(2, length, dtype=torch.bool)
    real[0, :4] = False
    for metric in (prev_token_score, attention_entropy, attention_span):
        plain, other = (metric({NAME_PATTERN: p}, query_mask=real) for p in (causal, padded))
        assert plain == other
        for field in ("chance", "maximum"):
            torch.testing.assert_close(getattr(plain, field), getattr(other, field))
    assert lag_profile(padded, query_mask=real).lags == list(range(length))
    assert lag_profile(padded).lags == list(range(1 - length, length))
    assert mixings({NAME_PATTERN: padded}, causal=True)[NAME].causal
    assert not mixings({NAME_PATTERN: causal}, causal=False)[NAME].causal
    ahead = padded.clone()
    ahead[1, 2, 5, 8] = 0.5  # of a query that counts
    assert lag_profile(ahead, query_mask=real).lags[0] == 1 - length


def test_rows_that_are_no_weights_are_refused_or_named():
    signed = torch.tensor([[0.5, 0.0], [-0.25, 1.0]])
    with pytest.raises(ValueError, match=r"negative entries \(least -0.25\).*signed=True"):
        prev_token_score({NAME_PATTERN: signed[None, None]})
    whole = DenseMixing(signed[None, None], signed=True)
    assert float(prev_token_score(whole)) == pytest.approx(0.2)
    raw = {"a": whole, "b": whole}
    refused = {
        "attention_entropy": attention_entropy,
        "attention_span(mass)": partial(attention_span, kind="mass"),
        "head_diversity(js)": head_diversity,
        "layer_similarity(js)": layer_similarity,
    }
    for name, metric in refused.items():
        with pytest.raises(ValueError, match=re.escape(f"{name} needs weights")):
            metric(raw, normalise="none")
    ones = torch.ones(1, 2, 5, 5).tril()
    assert prev_token_score({NAME_PATTERN: ones}).note == f"rows of {NAME} do not sum to 1"
    ones[:, :, 1:] = 0  # a row without weights says nothing about the others
    assert prev_token_score({NAME_PATTERN: ones}).note == ""


def test_rows_of_a_mixing_of_ones_own_stay_as_they_are():
    class Stored(Mixing):
        signed = causal = True
        n_examples = n_heads = 1
        n_queries = n_keys = 5

        def __init__(self):
            self.matrix = torch.randn(1, 1, 5, 5).tril()

        def rows(self, start, stop):
            return self.matrix[:, :, start:stop]  # no copy

    own = Stored()
    before = own.matrix.clone()
    for normalise in ("abs", "softmax", "minmax", "none"):
        prev_token_score(own, normalise=normalise)
        lag_profile(own, normalise=normalise)
    assert torch.equal(own.matrix, before)


def test_a_source_of_mixings_holds_nothing_else():
    both = {NAME: DenseMixing(torch.eye(3)[None, None]), NAME_PATTERN: torch.eye(3)[None, None]}
    with pytest.raises(TypeError, match="source holds mixings and other things"):
        prev_token_score(both)


def test_masks_of_too_many_axes_are_explained():
    with pytest.raises(ValueError, match=re.escape("query_mask [2, 1, 3] does not fit")):
        prev_token_score(torch.eye(3), query_mask=torch.ones(2, 1, 3, dtype=torch.bool))
