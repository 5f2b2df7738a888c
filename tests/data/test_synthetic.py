"""Synthetic tasks against naive loops, their distributions, and their limits."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smearlens.data.synthetic import (
    iid_tokens,
    multi_query_recall,
    repeated_random,
    repeated_tokens,
    step_generator,
)


def period_by_loop(row):
    """The smallest shift under which a sequence repeats itself, found by trying."""
    for period in range(1, len(row)):
        if all(row[t] == row[t - period] for t in range(period, len(row))):
            return period
    return len(row)


def assert_even(counts, n_cells):
    """All cells occur, each within six standard deviations of an equal share."""
    total = sum(counts.values())
    share = total / n_cells
    assert len(counts) == n_cells
    assert max(abs(n - share) for n in counts.values()) < 6 * math.sqrt(share)


@settings(max_examples=100, deadline=None)
@given(
    low=st.integers(2, 6),
    spread=st.integers(0, 4),
    extra=st.integers(1, 17),
    spare=st.integers(0, 5),
    bos=st.none() | st.integers(0, 11),
    seed=st.integers(0, 2**31),
)
def test_repeated_tokens_repeat_distinct_tokens(low, spread, extra, spare, bos, seed):
    high, d_vocab = low + spread, low + spread + spare + 1
    bos = None if bos is None else bos % d_vocab
    length = high + extra + (bos is not None)
    generator = torch.Generator().manual_seed(seed)
    tokens = repeated_tokens(
        batch=3, period=(low, high), length=length, d_vocab=d_vocab, generator=generator, bos=bos
    )
    assert tokens.shape == (3, length)
    assert tokens.dtype == torch.int64
    for row in tokens.tolist():
        if bos is not None:
            assert row[0] == bos
            assert bos not in row[1:]
            row = row[1:]
        period = period_by_loop(row)
        assert low <= period <= high
        assert len(set(row[:period])) == period
        assert 0 <= min(row) <= max(row) < d_vocab


def test_the_call_of_the_quick_start(generator):
    tokens = repeated_tokens(batch=8, period=(8, 20), length=48, d_vocab=64, generator=generator)
    assert tokens.shape == (8, 48)
    assert len({period_by_loop(row) for row in tokens.tolist()}) > 1


@pytest.mark.parametrize("bos", [None, 0, 2, 4])
def test_every_block_is_equally_likely(bos, generator):
    tokens = repeated_tokens(6000, 2, 5, 5, generator=generator, bos=bos)
    blocks = Counter(map(tuple, tokens[:, -2:].tolist()))
    assert_even(blocks, 5 * 4 if bos is None else 4 * 3)


def test_every_period_is_equally_likely(generator):
    tokens = repeated_tokens(4000, (3, 7), 15, 11, generator=generator)
    assert_even(Counter(period_by_loop(row) for row in tokens.tolist()), 5)


def test_a_fixed_period_is_a_range_of_one():
    fixed, ranged = (
        repeated_tokens(2, p, 13, 7, generator=torch.Generator().manual_seed(3))
        for p in (5, (5, 5))
    )
    assert fixed.equal(ranged)


def test_repeated_random_holds_whole_blocks(generator):
    tokens = repeated_random(2, 5, 3, 11, generator=generator, bos=7)
    assert tokens.shape == (2, 16)
    for row in tokens.tolist():
        assert row == [7, *row[1:6] * 3]


def test_iid_tokens_are_uniform_and_independent(generator):
    tokens = iid_tokens(3000, 2, 5, generator=generator)
    assert_even(Counter(map(tuple, tokens.tolist())), 25)


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize(("length", "n_pairs", "d_vocab"), [(8, 2, 12), (17, 3, 9), (64, 7, 101)])
def test_recall_labels_are_what_a_dictionary_gives(length, n_pairs, d_vocab, noise, generator):
    tokens, labels = multi_query_recall(
        5, length, n_pairs, d_vocab, generator=generator, noise=noise, ignore_index=-7
    )
    assert tokens.shape == labels.shape == (5, length)
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        pairs = dict(zip(row[: 2 * n_pairs : 2], row[1 : 2 * n_pairs : 2], strict=True))
        assert len(pairs) == len(set(pairs.values())) == n_pairs
        assert all(1 <= key < d_vocab // 2 <= value < d_vocab for key, value in pairs.items())
        asked = [t for t in range(length) if label[t] != -7]
        assert sorted(row[t] for t in asked) == sorted(pairs)
        assert all(label[t] == pairs[row[t]] for t in asked)
        assert all(t >= 2 * n_pairs and t % 2 == 0 for t in asked)
        rest = [row[t] for t in range(2 * n_pairs, length) if t not in asked]
        assert noise or set(rest) <= {0}
        assert all(0 <= token < d_vocab for token in rest)


def test_recall_gaps_follow_the_power_law(generator):
    """One pair: the slot g = 1 … 6 of its query has probability g^(power-1) / sum."""
    for power in (1.0, 0.01):
        _, labels = multi_query_recall(20_000, 14, 1, 4, generator=generator, power=power)
        slots = (labels != -100).nonzero()[:, 1] // 2
        weights = torch.arange(1.0, 7) ** (power - 1)
        found = torch.bincount(slots, minlength=7)[1:] / 20_000
        torch.testing.assert_close(found, weights / weights.sum(), atol=0.015, rtol=0)


def test_step_generators_differ_and_can_be_had_again():
    draws = {torch.rand(1, generator=step_generator(5, step)).item() for step in range(2000)}
    assert len(draws) > 1990  # float32 has few values: some may coincide
    seeds = {step_generator(5, step).initial_seed() for step in range(20_000)}
    assert len(seeds) == 20_000
    assert len({step_generator(5, 2**k).initial_seed() for k in range(32)}) == 32
    assert step_generator(5, 2**31).initial_seed() != step_generator(5, 0).initial_seed()
    assert step_generator(5, 3).initial_seed() != step_generator(6, 3).initial_seed()
    assert step_generator(5, 3).initial_seed() == step_generator(5, 3).initial_seed()


REPEAT = {"batch": 2, "period": 3, "length": 11, "d_vocab": 7}
RECALL = {"batch": 2, "length": 16, "n_pairs": 3, "d_vocab": 12}


@pytest.mark.parametrize(
    ("task", "sizes", "message"),
    [
        (repeated_tokens, REPEAT | {"batch": 0}, "batch must be at least 1, got 0"),
        (repeated_tokens, REPEAT | {"length": 0}, "length must be at least 1, got 0"),
        (repeated_tokens, REPEAT | {"period": 1}, r"period must be at least 2.*got \(1, 1\)"),
        (repeated_tokens, REPEAT | {"period": (5, 3)}, r"as n or \(low, high\), got \(5, 3\)"),
        (repeated_tokens, REPEAT | {"period": 8}, "period=8 needs as many.*d_vocab=7, bos=None"),
        (repeated_tokens, REPEAT | {"period": 7, "bos": 0}, "bos=0 leave 6: shorten the period"),
        (repeated_tokens, REPEAT | {"length": 3}, "period=3 leaves nothing to repeat in length=3"),
        (repeated_tokens, REPEAT | {"length": 4, "bos": 0}, "use a period of at most 2"),
        (repeated_tokens, REPEAT | {"bos": 7}, r"bos=7 must be a token, 0\.\.6, or None"),
        (repeated_tokens, REPEAT | {"bos": -1}, "bos=-1 must be a token"),
        (iid_tokens, {"batch": 2, "length": 3, "d_vocab": 0}, "d_vocab must be at least 1, got 0"),
        (multi_query_recall, RECALL | {"n_pairs": 0}, "n_pairs must be at least 1, got 0"),
        (multi_query_recall, RECALL | {"length": 11}, "length=11 is too short for n_pairs=3.*12"),
        (multi_query_recall, RECALL | {"d_vocab": 7}, "d_vocab=7 has 2 keys.*at least 8"),
    ],
)
def test_impossible_sizes_are_explained(task, sizes, message, generator):
    with pytest.raises(ValueError, match=message):
        task(**sizes, generator=generator)


def test_one_repeat_and_negative_steps_are_refused(generator):
    with pytest.raises(ValueError, match="n_repeats must be at least 2, got 1"):
        repeated_random(2, 3, 1, 7, generator=generator)
    with pytest.raises(ValueError, match="at least 0, got seed=0, step=-1"):
        step_generator(0, -1)
    with pytest.raises(ValueError, match="at least 0, got seed=-1, step=0"):
        step_generator(-1, 0)
