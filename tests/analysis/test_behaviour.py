"""Losses and accuracies: plain loops and logits made by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.analysis import reference as ref

from smearlens import ar_split, icl_score, induction_accuracy, induction_loss, per_token_loss
from smearlens.analysis.behaviour import induction_gain, loss_by_position, predictable
from smearlens.data.synthetic import repeated_random, repeated_tokens

V = 7
TOKENS = torch.tensor(
    [[0, 3, 5, 3, 5, 5, 3, 1, 0], [6, 1, 2, 6, 1, 2, 6, 1, 2], [0, 1, 2, 3, 4, 5, 6, 6, 0]]
)


def random_logits(seed=0, tokens=TOKENS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*tokens.shape, V, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_losses_equal_a_plain_loop(dtype):
    logits = random_logits(dtype=dtype)
    losses = ref.losses(logits.double().numpy(), TOKENS.numpy())
    found = per_token_loss(logits, TOKENS)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    near = 1e-12 if dtype == torch.float64 else 2e-6
    expected = [[of[i] for i in range(1, 9)] for of in losses]
    np.testing.assert_allclose(found, expected, atol=near)
    np.testing.assert_allclose(loss_by_position(logits, TOKENS), np.mean(expected, 0), atol=near)
    np.testing.assert_allclose(
        induction_loss(logits, TOKENS),
        [
            ref.where(of, lambda i, x=x: ref.predictable(x, i))
            for of, x in zip(losses, TOKENS.tolist(), strict=True)
        ],
        atol=near,
    )


def test_logits_that_are_not_numbers_predict_nothing():
    tokens = torch.tensor([[0, 0, 0, 0], [1, 2, 1, 2]])
    logits = torch.zeros(2, 4, 3)
    logits[0, 2] = torch.nan  # argmax would name its first entry, which is the token
    found = induction_accuracy(logits, tokens)
    assert found.isnan().tolist() == [True, False]


def test_accuracy_equals_a_plain_loop():
    logits = random_logits()
    logits[:, :-1].scatter_add_(2, TOKENS[:, 1:, None], torch.full((3, 8, 1), 3.0).double())
    expected = []
    for b, x in enumerate(TOKENS.tolist()):
        hits = {i: float(int(np.argmax(logits[b, i - 1].numpy())) == x[i]) for i in range(1, 9)}
        expected.append(ref.where(hits, lambda i, x=x: ref.predictable(x, i)))
    np.testing.assert_allclose(induction_accuracy(logits, TOKENS), expected)
    assert 0 < min(expected[:2]) < 1


def test_what_is_predictable():
    """Tokens of the second and later repeats, without the first of the second."""
    found = predictable(TOKENS)[1].tolist()  # blocks of 6 1 2; entry i is token i + 1
    assert [i + 1 for i, seen in enumerate(found) if seen] == [4, 5, 6, 7, 8]
    for b, x in enumerate(TOKENS.tolist()):
        expected = [ref.predictable(x, i) for i in range(1, 9)]
        assert predictable(TOKENS)[b].tolist() == expected


def copying_logits(tokens, strength):
    """What followed the last occurrence of the token gets `strength`, all others 0."""
    logits = torch.zeros(*tokens.shape, V, dtype=torch.float64)
    for b, x in enumerate(tokens.tolist()):
        for i in range(len(x)):
            earlier = [k for k in range(i) if x[k] == x[i]]
            if earlier:
                logits[b, i, x[earlier[-1] + 1]] = strength
    return logits


def test_a_perfect_copier(generator):
    tokens = repeated_tokens(3, (3, 5), 14, V, generator=generator)
    logits = copying_logits(tokens, 4.0)
    right = -math.log(math.exp(4) / (math.exp(4) + V - 1))
    assert induction_loss(logits, tokens).tolist() == pytest.approx([right] * 3)
    assert induction_accuracy(logits, tokens).tolist() == [1.0] * 3
    assert induction_gain(logits, tokens).tolist() == pytest.approx([math.log(V) - right] * 3)
    assert induction_accuracy(-logits, tokens).tolist() == [0.0] * 3


@pytest.mark.parametrize("bos", [None, 0])
def test_gain_is_repeat_one_minus_later_repeats_without_the_boundary(bos, generator):
    tokens = repeated_random(2, 3, 3, V, generator=generator, bos=bos)
    logits = random_logits(1, tokens)
    first = 0 if bos is None else 1
    for b, of in enumerate(ref.losses(logits.numpy(), tokens.numpy())):
        early = ref.where(of, lambda i: i < first + 3)
        late = ref.where(of, lambda i: i > first + 3)  # index first + 3 is the boundary
        found = induction_gain(logits, tokens)[b]
        assert float(found) == pytest.approx(early - late, abs=1e-9)


def test_nothing_to_predict_is_nan():
    tokens = torch.arange(V)[None]
    for score in (induction_loss, induction_accuracy, induction_gain):
        assert score(random_logits(0, tokens), tokens).isnan().all()


# Learning in context -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "early", "late"),
    [(512, 50, 500), (600, 50, 500), (511, 52, 500), (100, 10, 97), (30, 3, 29), (10, 1, 9)],
)
def test_icl_score_takes_the_right_tokens(length, early, late):
    """Hand-made: only the losses of tokens `early` and `late` are not ln 5."""
    tokens = torch.arange(length)[None].repeat(2, 1) % 5
    logits = torch.zeros(2, length, 5, dtype=torch.float64)
    logits[0, early - 1, tokens[0, early]] = 2.0
    logits[0, late - 1, tokens[0, late]] = 3.0
    score = icl_score(logits, tokens)
    assert (score.early, score.late) == (early, late)
    loss = [-math.log(math.exp(z) / (math.exp(z) + 4)) for z in (2.0, 3.0)]
    assert score.values.tolist() == pytest.approx([loss[1] - loss[0], 0], abs=1e-9)
    assert score.mean() == pytest.approx((loss[1] - loss[0]) / 2)
    assert score.values[0] < 0  # the context helps
    assert score.control is None


def test_icl_score_of_every_short_length_follows_the_fractions():
    for length in range(4, 512, 3):
        tokens = torch.zeros(1, length, dtype=torch.int64)
        score = icl_score(torch.zeros(1, length, 1), tokens)
        assert score.early == -(-length // 10)
        assert score.late == -(-98 * length // 100) - 1


def test_icl_control_is_the_same_number_on_shuffled_tokens():
    logits, shuffled = random_logits(0), TOKENS.flip(1)
    other = random_logits(5)
    score = icl_score(logits, TOKENS, early=2, late=7, shuffled=(other, shuffled))
    losses = ref.losses(logits.numpy(), TOKENS.numpy())
    np.testing.assert_allclose(score.values, [of[7] - of[2] for of in losses], atol=1e-9)
    torch.testing.assert_close(score.control, icl_score(other, shuffled, early=2, late=7).values)


# Associative recall ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_ar_split_equals_a_plain_loop(dtype):
    logits = random_logits()
    hits, others = [], []
    for x, of in zip(TOKENS.tolist(), ref.losses(logits.numpy(), TOKENS.numpy()), strict=True):
        for i, loss in of.items():
            seen = any((x[j - 1], x[j]) == (x[i - 1], x[i]) for j in range(1, i))
            (hits if seen else others).append(loss)
    found = ar_split(logits, TOKENS.to(dtype))
    assert (found.n_hits, found.n_others) == (len(hits), len(others))
    assert found.hit_loss == pytest.approx(ref.mean(hits), abs=1e-9)
    assert found.other_loss == pytest.approx(ref.mean(others), abs=1e-9)


def test_bigrams_of_a_large_vocabulary_do_not_collide():
    """0 → 65536 and 65536 → 0 of 2^16 + 1 ids: a pair number must not wrap around in int32."""
    n = 2**16
    tokens = torch.tensor([[0, n - 1, n, 0, 1, n]], dtype=torch.int32)
    found = ar_split(torch.zeros(1, 6, n + 1), tokens)
    assert (found.n_hits, found.n_others) == (0, 5)


# Properties --------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 12), st.integers(1, V), st.integers(0, 999))
def test_losses_are_positive_and_do_not_see_a_shift_of_the_logits(length, used, seed):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, used, (3, length), generator=generator)
    logits = random_logits(seed, tokens)
    moved = logits + torch.randn(3, length, 1, generator=generator)
    for score in (per_token_loss, induction_loss, induction_gain, induction_accuracy):
        torch.testing.assert_close(score(moved, tokens), score(logits, tokens), equal_nan=True)
    assert bool((per_token_loss(logits, tokens) >= 0).all())
    accuracy = induction_accuracy(logits, tokens)
    assert bool(((accuracy >= 0) & (accuracy <= 1) | accuracy.isnan()).all())
