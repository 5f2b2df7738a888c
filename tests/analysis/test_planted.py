"""Scores of heads made by hand: closed forms, perfect heads, controls, TransformerLens."""

import numpy as np
import pytest
import torch
from tests.analysis import reference as ref
from transformer_lens.head_detector import (
    detect_head,
    get_duplicate_token_head_detection_pattern,
    get_induction_head_detection_pattern,
    get_previous_token_head_detection_pattern,
)

from smearlens import (
    ConvAttn,
    ConvAttnConfig,
    alignment_mass,
    induction_score,
    prev_token_score,
    stripe_score,
)
from smearlens.analysis.heads import common_period
from smearlens.data.synthetic import repeated_random, repeated_tokens

NAME = "blocks.0.attn"

# Closed forms ------------------------------------------------------------------------------------


def harmonic(n):
    return sum(1 / i for i in range(1, n + 1))


def uniform_cache(batch, length):
    pattern = torch.from_numpy(ref.uniform(batch, length, length, causal=True))
    return {f"{NAME}.hook_pattern": pattern}


def perfect_induction(tokens):
    """Each token goes to what followed its last occurrence, or to BOS (the first key)."""
    batch, length = tokens.shape
    pattern = torch.zeros(batch, 1, length, length)
    for b in range(batch):
        for q in range(length):
            earlier = [k for k in range(q) if tokens[b, k] == tokens[b, q]]
            pattern[b, 0, q, earlier[-1] + 1 if earlier else 0] = 1
    return pattern


def test_uniform_head_on_the_previous_token():
    scores = prev_token_score(uniform_cache(2, 8))
    assert float(scores.mean()[NAME]) == pytest.approx((harmonic(8) - 1) / 7, abs=1e-9)
    assert float(scores.mean()[NAME]) == pytest.approx(0.245408, abs=1e-6)
    assert float(scores.chance[NAME]) == pytest.approx(0.245408, abs=1e-6)


@pytest.mark.parametrize(
    ("period", "bos", "value"),
    [(8, None, 0.082859), (25, None, 0.027330), (8, 0, 0.076323), (25, 0, 0.026576)],
)
def test_uniform_head_on_induction(period, bos, value, generator):
    tokens = repeated_random(3, period, 2, 60, generator=generator, bos=bos)
    scores = induction_score(uniform_cache(3, tokens.shape[1]), tokens)
    first = period + (bos is not None)
    closed = (harmonic(2 * period + (bos is not None)) - harmonic(first)) / period
    assert closed == pytest.approx(value, abs=1e-6)
    for number in (scores.mean()[NAME], scores.chance[NAME]):
        assert float(number) == pytest.approx(closed, abs=1e-9)


@pytest.mark.parametrize(("period", "diagonal"), [(10, 0.917), (25, 0.9630), (50, 0.981)])
def test_perfect_induction_head(period, diagonal, generator):
    tokens = repeated_random(3, period, 2, 90, generator=generator, bos=0)
    pattern = perfect_induction(tokens)
    torch.testing.assert_close(induction_score(pattern, tokens), torch.ones(3, 1).double())
    found = induction_score(pattern, tokens, kind="diagonal")
    torch.testing.assert_close(found, torch.full((3, 1), (period + 1) / (period + 2)).double())
    assert float(found[0]) == pytest.approx(diagonal, abs=5e-4)


def test_diagonal_score_is_the_mean_of_the_diagonal(generator):
    for bos in (None, 3):
        tokens = repeated_random(2, 5, 2, 11, generator=generator, bos=bos)
        length = tokens.shape[1]
        pattern = torch.from_numpy(ref.random_pattern(5, 2, 3, length))
        expected = pattern.diagonal(-4, dim1=-2, dim2=-1).mean(-1)
        torch.testing.assert_close(induction_score(pattern, tokens, kind="diagonal"), expected)


def test_stripe_of_a_perfect_induction_head_reaches_its_maximum(generator):
    tokens = repeated_random(1, 25, 2, 60, generator=generator, bos=0)
    detection = get_induction_head_detection_pattern(tokens).bool()
    cache = {f"{NAME}.hook_pattern": perfect_induction(tokens)}
    for normalise_by, value in (("row", 1.0), ("mul", 0.4902), ("abs", 0.4902)):
        scores = stripe_score(cache, detection, normalise_by=normalise_by)
        assert float(scores.maximum[NAME]) == pytest.approx(value, abs=5e-5)
        if normalise_by != "abs":
            assert float(scores.mean()[NAME]) == pytest.approx(value, abs=5e-5)
    assert float(stripe_score(cache, detection, normalise_by="mul")[NAME]) == pytest.approx(25 / 51)


def test_perfect_previous_token_head_by_mul_is_short_of_one():
    length = 11
    pattern = torch.zeros(1, 1, length, length)
    pattern[0, 0, range(1, length), range(length - 1)] = 1
    pattern[0, 0, 0, 0] = 1
    detection = torch.ones(length, length).tril(-1).triu(-1).bool()
    score = stripe_score(pattern, detection, normalise_by="mul")
    assert float(score) == pytest.approx((length - 1) / length)
    assert float(prev_token_score(pattern)) == 1.0


def test_perfect_heads_score_one_and_their_maximum_is_one(generator):
    tokens = repeated_tokens(5, (4, 9), 29, 13, generator=generator)
    scores = induction_score({f"{NAME}.hook_pattern": perfect_induction(tokens)}, tokens)
    assert scores[NAME].tolist() == [[1.0]] * 5
    assert scores.maximum[NAME].tolist() == [1.0]


# What the control is for -------------------------------------------------------------------------


def fixed_lag_head(batch, length, lag):
    pattern = torch.zeros(batch, 1, length, length)
    for q in range(length):
        pattern[:, 0, q, max(0, q - lag)] = 1
    return pattern


def test_the_control_exposes_a_fixed_lag_head_on_a_fixed_period(generator):
    tokens = repeated_tokens(6, 7, 28, 20, generator=generator)
    scores = induction_score({f"{NAME}.hook_pattern": fixed_lag_head(6, 28, 6)}, tokens)
    assert float(scores.mean()[NAME]) == 1.0  # it passes for an induction head …
    assert float(scores.control[NAME]) == 1.0  # … and does as well on the wrong tokens


def test_the_control_clears_a_matching_head_on_varied_periods(generator):
    tokens = repeated_tokens(12, (5, 13), 39, 40, generator=generator)
    matching = induction_score({f"{NAME}.hook_pattern": perfect_induction(tokens)}, tokens)
    assert float(matching.mean()[NAME]) == 1.0
    assert float(matching.control[NAME]) < 0.3
    positional = induction_score({f"{NAME}.hook_pattern": fixed_lag_head(12, 39, 8)}, tokens)
    assert float(positional.mean()[NAME]) < 0.5


def test_one_example_has_no_control(generator):
    tokens = repeated_tokens(1, 3, 8, 9, generator=generator)
    scores = induction_score({f"{NAME}.hook_pattern": perfect_induction(tokens)}, tokens)
    assert scores.name == "induction_score"
    assert scores.control[NAME].isnan().all()


# Periods, alignment ------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize(("period", "n_repeats"), [(2, 3), (3, 2), (5, 2), (7, 4)])
def test_common_period_is_found(period, n_repeats, bos, generator):
    tokens = repeated_random(3, period, n_repeats, 19, generator=generator, bos=bos)
    assert common_period(tokens) == period
    for cut in range(1, period):  # the last block may be cut off
        if tokens.shape[1] - cut - (bos is not None) >= 2 * period:
            assert common_period(tokens[:, :-cut]) == period


def test_no_common_period(generator):
    varied = repeated_tokens(9, (3, 6), 20, 11, generator=generator)
    ends_alike = torch.tensor([[7, 1, 2, 3, 4, 5, 7]])  # not two blocks of six
    for tokens in (varied, ends_alike):
        with pytest.raises(ValueError, match=r"needs one period .* use kind='match'"):
            common_period(tokens)


def test_a_stripe_of_cross_attention_is_its_detected_mass(generator):
    pattern = torch.rand(2, 3, 5, 7, generator=generator, dtype=torch.float64).softmax(-1)
    wanted = torch.rand(5, 7, generator=generator) < 0.4
    wanted[1] = False
    cache = {"decoder.blocks.0.cross_attn.hook_pattern": pattern}
    (found,) = stripe_score(cache, wanted).per_layer.values()
    rows = [pattern[:, :, i, wanted[i]].sum(-1) for i in range(5) if wanted[i].any()]
    torch.testing.assert_close(found, torch.stack(rows).mean(0))


def test_cross_attention_by_alignment():
    """Two sequences of different length: the planted head finds its source, chance is 1 / keys."""
    aligned = np.array([[4, 0, 2, -1, 9], [3, 3, 1, 0, 2]])  # -1: no source; 9: outside
    pattern = np.zeros((2, 2, 5, 6))
    pattern[:, 1] = 1 / 6
    for b, q in np.ndindex(aligned.shape):
        pattern[b, 0, q, aligned[b, q] if aligned[b, q] in range(6) else 5] = 1
    cache = {"decoder.blocks.0.cross_attn.hook_pattern": torch.from_numpy(pattern)}
    for accuracy in (False, True):
        scores = alignment_mass(cache, torch.from_numpy(aligned), accuracy=accuracy)
        layer = "decoder.blocks.0.cross_attn"
        torch.testing.assert_close(scores.mean()[layer], torch.tensor([1, 1 / 6]).double())
        assert float(scores.chance[layer]) == pytest.approx(1 / 6)
    moved = alignment_mass(torch.from_numpy(pattern), torch.from_numpy(aligned - 1), shift=1)
    assert moved[0].tolist() == pytest.approx([1, 1 / 6])


def test_monotone_cross_attention_is_not_taken_for_causal():
    """A square alignment along the diagonal looks causal; its queries see all keys all the same."""
    layer = "decoder.blocks.0.cross_attn"
    cache = {f"{layer}.hook_pattern": torch.eye(5)[None, None]}
    scores = alignment_mass(cache, torch.arange(5)[None])
    assert float(scores.mean()[layer]) == 1.0
    assert float(scores.chance[layer]) == pytest.approx(1 / 5)


# TransformerLens ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    config = ConvAttnConfig(d_vocab=9, d_model=12, n_heads=3, kernel_size=3, n_ctx=20)
    model = ConvAttn(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)  # patterns far from uniform
    return model


@pytest.mark.parametrize(
    ("head", "detection_of"),
    [
        ("previous_token_head", get_previous_token_head_detection_pattern),
        ("duplicate_token_head", get_duplicate_token_head_detection_pattern),
        ("induction_head", get_induction_head_detection_pattern),
    ],
)
def test_detect_head_of_transformer_lens_agrees(model, head, detection_of, generator):
    tokens = repeated_tokens(1, 6, 17, 9, generator=generator)
    detection = detection_of(tokens).bool()
    _, cache = model.run_with_cache(tokens)
    for kept in ({}, {"exclude_bos": True}, {"exclude_self": True}):
        theirs = detect_head(
            model, tokens, head, exclude_bos="exclude_bos" in kept,
            exclude_current_token="exclude_self" in kept,
        )  # fmt: skip
        ours = stripe_score(cache, detection, normalise_by="mul", renormalise=False, **kept)
        torch.testing.assert_close(ours[NAME].float(), theirs, atol=1e-6, rtol=0)
    absolute = detect_head(model, tokens, head, error_measure="abs")  # rounded to 3 digits
    ours = stripe_score(cache, detection, normalise_by="abs")[NAME].float()
    torch.testing.assert_close(ours, absolute, atol=6e-4, rtol=0)
