"""Scores with a target: against plain loops, closed forms, planted patterns, TransformerLens."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import config as jaxtyping_config
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
    duplicate_token_score,
    induction_score,
    prefix_matching_score,
    prev_token_score,
    stripe_score,
)
from smearlens.analysis.heads import common_period
from smearlens.data.synthetic import repeated_random, repeated_tokens
from tests.analysis import reference as ref

BATCH, HEADS, LENGTH = 3, 2, 7
NAME = "blocks.0.attn"


@pytest.fixture
def unchecked():
    """Shapes unchecked, as for a user: the library's own messages must come."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)


def broken_pattern(seed=1, *, causal=True):
    """Random rows; example 1 has a row of zeros and a row of NaN, as after masking."""
    pattern = ref.random_pattern(seed, BATCH, HEADS, LENGTH, causal=causal)
    pattern[1, :, 2] = 0
    pattern[1, :, 4] = np.nan
    return pattern


# the first token comes back, two neighbours are equal; a block of 3 repeats; nothing repeats
TOKENS = np.array([[5, 2, 5, 5, 1, 2, 5], [4, 1, 0, 4, 1, 0, 4], [6, 5, 4, 3, 2, 1, 0]])
PADS = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1, 1]]).bool()
OPTIONS = {
    "plain": {},
    "bos": {"exclude_bos": True},
    "bos kept small": {"exclude_bos": True, "renormalise": False},
    "self": {"exclude_self": True},
    "bos and self": {"exclude_bos": True, "exclude_self": True},
    "queries": {"query_mask": PADS},
    "one mask for all": {"query_mask": PADS[0], "key_mask": PADS[2]},
    "pads": {"query_mask": PADS, "key_mask": PADS},
    "pads kept small": {"key_mask": PADS, "renormalise": False, "exclude_self": True},
}
DETECTION = np.random.default_rng(7).random((LENGTH, LENGTH)) < 0.3
DETECTIONS = np.broadcast_to(DETECTION, (BATCH, LENGTH, LENGTH))
ALIGNED = np.random.default_rng(8).integers(-1, LENGTH, (BATCH, LENGTH))

METRICS = {
    "prev": (lambda t: prev_token_score, lambda t: ref.prev_token),
    "duplicate": (
        lambda t: partial(duplicate_token_score, tokens=t),
        lambda t: ref.prefix(t, 0),
    ),
    "induction": (lambda t: partial(induction_score, tokens=t), lambda t: ref.prefix(t, 1)),
    "induction without boundary": (
        lambda t: partial(induction_score, tokens=t, include_boundary=False),
        lambda t: ref.prefix(t, 1, boundary=False),
    ),
    "preceding": (
        lambda t: partial(prefix_matching_score, tokens=t, offset=-1),
        lambda t: ref.prefix(t, -1),
    ),
    "two on, mean": (
        lambda t: partial(prefix_matching_score, tokens=t, offset=2, aggregate="mean"),
        lambda t: ref.prefix(t, 2, aggregate="mean"),
    ),
    "one on, mean": (
        lambda t: partial(prefix_matching_score, tokens=t, aggregate="mean"),
        lambda t: ref.prefix(t, 1, aggregate="mean"),
    ),
    "stripe": (
        lambda t: partial(stripe_score, detection=torch.from_numpy(DETECTION)),
        lambda t: ref.stripe_row(DETECTIONS),
    ),
    "stripe abs": (
        lambda t: partial(stripe_score, detection=torch.from_numpy(DETECTION), normalise_by="abs"),
        lambda t: ref.stripe_abs(DETECTIONS),
    ),
    "alignment": (
        lambda t: partial(alignment_mass, alignment=torch.from_numpy(ALIGNED)),
        lambda t: ref.alignment(ALIGNED, 0),
    ),
    "alignment accuracy": (
        lambda t: partial(
            alignment_mass, alignment=torch.from_numpy(ALIGNED), shift=-1, accuracy=True
        ),
        lambda t: ref.alignment_hit(ALIGNED, -1),
    ),
}


CASES = [*((choice, True) for choice in OPTIONS), ("plain", False), ("pads", False)]


@pytest.mark.parametrize(("choice", "causal"), CASES)
@pytest.mark.parametrize("metric", METRICS)
def test_equals_a_plain_loop_with_every_option(metric, choice, causal):
    pattern, options = broken_pattern(causal=causal), OPTIONS[choice]
    leave = ref.leave_of(options, BATCH, causal=causal)
    ours, theirs = METRICS[metric][0](torch.from_numpy(TOKENS)), METRICS[metric][1](TOKENS)
    even = ref.uniform(BATCH, LENGTH, LENGTH, causal=causal)
    expected = ref.per_example(pattern, theirs, leave)

    scores = ours({f"{NAME}.hook_pattern": torch.from_numpy(pattern).float()}, **options)
    alone = ours(torch.from_numpy(pattern), **options)

    np.testing.assert_allclose(alone, expected, atol=1e-9)
    np.testing.assert_allclose(scores[NAME], expected, atol=1e-6)
    np.testing.assert_allclose(scores.mean()[NAME], ref.nanmean(expected), atol=1e-6)
    pooled = ref.pooled(pattern, theirs, leave)
    np.testing.assert_allclose(scores.mean("micro")[NAME], pooled, atol=1e-6)
    chance = ref.nanmean(ref.per_example(even, theirs, leave))
    np.testing.assert_allclose(scores.chance[NAME], chance, atol=1e-9)


@pytest.mark.parametrize("choice", OPTIONS)
def test_controls_equal_a_plain_loop(choice):
    pattern, leave = broken_pattern(), ref.leave_of(OPTIONS[choice], BATCH)
    cache = {f"{NAME}.hook_pattern": torch.from_numpy(pattern)}
    swapped = ref.prefix(np.roll(TOKENS, 1, 0), 1)
    for scores, value in (
        (induction_score(cache, torch.from_numpy(TOKENS), **OPTIONS[choice]), swapped),
        (prev_token_score(cache, **OPTIONS[choice]), ref.other_past),
    ):
        expected = ref.nanmean(ref.per_example(pattern, value, leave))
        np.testing.assert_allclose(scores.control[NAME], expected, atol=1e-9)


@pytest.mark.parametrize("choice", OPTIONS)
def test_stripe_mul_is_one_ratio_of_sums(choice):
    pattern, leave = broken_pattern(), ref.leave_of(OPTIONS[choice], BATCH)
    ours = stripe_score(
        torch.from_numpy(pattern), torch.from_numpy(DETECTIONS.copy()), normalise_by="mul",
        **OPTIONS[choice],
    )  # fmt: skip
    np.testing.assert_allclose(ours, ref.stripe_mul(pattern, DETECTIONS, leave), atol=1e-9)


def test_stripe_maxima_are_attained_and_not_passed():
    """The best pattern puts each row on one detected key, or anywhere if there is none."""
    detection = np.tril(DETECTION)
    best = np.zeros((1, 1, LENGTH, LENGTH))
    for q in range(LENGTH):
        hits = [k for k in range(q + 1) if detection[q, k]]
        best[0, 0, q, hits[0] if hits else q] = 1
    cache = {f"{NAME}.hook_pattern": torch.from_numpy(best)}
    for normalise_by in ("row", "mul", "abs"):
        scores = stripe_score(cache, torch.from_numpy(detection), normalise_by=normalise_by)
        torch.testing.assert_close(scores.maximum[NAME], scores[NAME][0])


def test_offsets_come_together():
    pattern, tokens = torch.from_numpy(broken_pattern()), torch.from_numpy(TOKENS)
    found = prefix_matching_score(pattern, tokens, offset=(-1, 0, 1))
    assert list(found) == [-1, 0, 1]
    for offset, values in found.items():
        alone = prefix_matching_score(pattern, tokens, offset=offset)
        torch.testing.assert_close(values, alone, equal_nan=True, rtol=0, atol=0)
    duplicate = duplicate_token_score(pattern, tokens)
    torch.testing.assert_close(found[0], duplicate, equal_nan=True, rtol=0, atol=0)


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
    assert scores.control[NAME].isnan().all()


# Periods, alignment ------------------------------------------------------------------------------


@pytest.mark.parametrize("bos", [None, 0])
@pytest.mark.parametrize(("period", "n_repeats"), [(2, 3), (3, 2), (5, 2), (7, 4)])
def test_common_period_is_found(period, n_repeats, bos, generator):
    tokens = repeated_random(3, period, n_repeats, 19, generator=generator, bos=bos)
    assert common_period(tokens) == period


def test_no_common_period(generator):
    varied = repeated_tokens(9, (3, 6), 20, 11, generator=generator)
    ends_alike = torch.tensor([[7, 1, 2, 3, 4, 5, 7]])  # not two blocks of six
    for tokens in (varied, ends_alike):
        with pytest.raises(ValueError, match=r"needs one period .* use kind='match'"):
            common_period(tokens)


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


# Properties --------------------------------------------------------------------------------------

ALL = [
    prev_token_score,
    *(METRICS[m] for m in ("duplicate", "induction", "preceding", "one on, mean")),
]


def value_of(metric, pattern, tokens):
    return metric(pattern) if callable(metric) else metric[0](tokens)(pattern)


@st.composite
def cases(draw):
    batch, heads, length = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(2, 9))
    seed = draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(batch, heads, length, length, generator=generator)
    ahead = torch.ones(length, length).triu(1).bool()
    pattern = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    tokens = torch.randint(0, draw(st.integers(1, 6)), (batch, length), generator=generator)
    return pattern, tokens, generator


@settings(max_examples=12, deadline=None)
@given(cases())
def test_scores_lie_between_zero_and_one_or_are_undefined(case):
    pattern, tokens, _ = case
    for metric in ALL:
        values = value_of(metric, pattern, tokens)
        assert values.shape == pattern.shape[:2]
        assert bool(((values >= 0) & (values <= 1 + 1e-6) | values.isnan()).all())


@settings(max_examples=12, deadline=None)
@given(cases())
def test_permuting_heads_and_examples_permutes_the_scores(case):
    pattern, tokens, generator = case
    batch, heads = (torch.randperm(n, generator=generator) for n in pattern.shape[:2])
    for metric in ALL:
        expected = value_of(metric, pattern, tokens)[batch][:, heads]
        found = value_of(metric, pattern[batch][:, heads], tokens[batch])
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


@settings(max_examples=12, deadline=None)
@given(cases())
def test_the_uniform_pattern_scores_chance(case):
    pattern, tokens, _ = case
    even = torch.ones_like(pattern).tril().double()
    cache = {f"{NAME}.hook_pattern": even / even.sum(-1, keepdim=True)}
    for metric in ALL:
        scores = value_of(metric, cache, tokens)
        expected = scores.chance[NAME].expand(pattern.shape[1])
        torch.testing.assert_close(scores.mean()[NAME], expected, equal_nan=True)


@settings(max_examples=12, deadline=None)
@given(cases())
def test_renaming_the_tokens_changes_nothing(case):
    pattern, tokens, generator = case
    renamed = torch.randperm(50, generator=generator)[tokens]
    for metric in ALL[1:]:
        found, expected = (value_of(metric, pattern, t) for t in (renamed, tokens))
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)


@settings(max_examples=12, deadline=None)
@given(cases())
def test_the_score_of_a_mixture_is_the_mixture_of_the_scores(case):
    pattern, tokens, _ = case
    other = pattern.flip(1)
    for metric in ALL:
        mixed = value_of(metric, (pattern + other) / 2, tokens)
        apart = (value_of(metric, pattern, tokens) + value_of(metric, other, tokens)) / 2
        torch.testing.assert_close(mixed, apart, equal_nan=True, rtol=0, atol=1e-6)


# Bad input ---------------------------------------------------------------------------------------

PATTERN = torch.from_numpy(ref.random_pattern(2, 2, 3, 7))
GOOD = torch.arange(14).view(2, 7) % 5
SQUARE = torch.eye(7).bool()
CROSS = {"decoder.blocks.0.cross_attn.hook_pattern": PATTERN[:, :, :5]}

BAD = {
    "tokens too short": (
        lambda: induction_score(PATTERN, GOOD[:, :5]),
        ValueError, r"tokens \[2, 5\] do not belong to a pattern of 2 examples and 7 keys",
    ),
    "tokens too short for the diagonal": (
        lambda: induction_score(PATTERN, torch.tensor([[3, 1, 3, 1]] * 2), kind="diagonal"),
        ValueError, r"tokens \[2, 4\] do not belong to a pattern",
    ),
    "tokens of another batch": (
        lambda: duplicate_token_score(PATTERN, GOOD.repeat(2, 1)[:3]),
        ValueError, r"tokens \[3, 7\] do not belong to a pattern of 2 examples",
    ),
    "several examples of tokens for one of the pattern": (
        lambda: induction_score(PATTERN[0], GOOD),
        ValueError, r"pattern of shape \[3, 7, 7\] is one example, but .* for 2; pass \[batch",
    ),
    "float tokens": (
        lambda: induction_score(PATTERN, GOOD.float()),
        TypeError, r"tokens must be an integer tensor \[batch pos\], got 'torch.float32 \[2, 7\]'",
    ),
    "bool tokens": (
        lambda: induction_score(PATTERN, GOOD.bool()),
        TypeError, r"tokens must be an integer tensor \[batch pos\], got 'torch.bool \[2, 7\]'",
    ),
    "tokens that are a list": (
        lambda: induction_score(PATTERN, [1, 2]), TypeError, r"tokens must be .* got \[1, 2\]",
    ),
    "kind": (
        lambda: induction_score(PATTERN, GOOD, kind="stripe"),
        ValueError, r"kind must be 'match' or 'diagonal', got 'stripe'",
    ),
    "aggregate": (
        lambda: prefix_matching_score(PATTERN, GOOD, aggregate="max"),
        ValueError, r"aggregate must be 'sum' or 'mean', got 'max'",
    ),
    "normalise_by": (
        lambda: stripe_score(PATTERN, SQUARE, normalise_by="rows"),
        ValueError, r"normalise_by must be 'row', 'mul' or 'abs', got 'rows'",
    ),
    "float detection": (
        lambda: stripe_score(PATTERN, SQUARE.float()),
        TypeError, r"detection must be a bool tensor, got torch.float32; use .bool\(\)",
    ),
    "detection with too few keys": (
        lambda: stripe_score(PATTERN, SQUARE[:, :5]),
        ValueError, r"detection \[7, 5\] does not fit patterns of \[7, 7\]",
    ),
    "detection with too many queries": (
        lambda: stripe_score(PATTERN, torch.ones(9, 7).bool()),
        ValueError, r"detection \[9, 7\] does not fit patterns of \[7, 7\]",
    ),
    "detection of another batch": (
        lambda: stripe_score(PATTERN, SQUARE.expand(3, 7, 7)),
        ValueError, r"detection \[3, 7, 7\] does not fit",
    ),
    "alignment of another length": (
        lambda: alignment_mass(CROSS, GOOD),
        ValueError, r"alignment \[2, 7\] does not fit a pattern of 2 examples and 5 queries",
    ),
    "float alignment": (
        lambda: alignment_mass(CROSS, GOOD[:, :5].float()),
        TypeError, r"alignment must be an integer tensor",
    ),
    "previous token across two sequences": (
        lambda: prev_token_score(CROSS), ValueError, r"lags are undefined between two sequences",
    ),
    "induction across two sequences": (
        lambda: induction_score(CROSS, GOOD),
        ValueError, r"give alignment_mass the alignment of target and source",
    ),
    "own position across two sequences": (
        lambda: alignment_mass(CROSS, GOOD[:, :5], exclude_self=True),
        ValueError, r"exclude_self is undefined between two sequences",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_refused_in_words(case, unchecked):
    call, error, message = BAD[case]
    with pytest.raises(error, match=re.compile(message)):
        call()
