"""Scores with a target: against plain loops, closed forms, planted patterns, TransformerLens."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref

from smearlens import (
    alignment_mass,
    duplicate_token_score,
    induction_score,
    prefix_matching_score,
    prev_token_score,
    stripe_score,
)

BATCH, HEADS, LENGTH = 3, 2, 7
NAME = "blocks.0.attn"


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
