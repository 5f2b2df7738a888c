"""Properties of losses on repeats, of n-grams and of embedded texts."""

import math
from collections import Counter
from itertools import pairwise

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.properties.strategies import fewer, generator, seeds, sizes

from smearlens.analysis.behaviour import (
    ar_split,
    icl_score,
    induction_accuracy,
    induction_gain,
    induction_loss,
    loss_by_position,
    per_token_loss,
    predictable,
)
from smearlens.analysis.coherence import coherence, segment_coherence
from smearlens.analysis.text import distinct_n, diversity, rep_n, repetition, self_bleu

close = torch.testing.assert_close
texts = st.lists(st.text("abc ", min_size=1, max_size=12), min_size=1, max_size=5)


@st.composite
def predictions(draw, least=2):
    batch, pos, vocab = draw(sizes(1, 3)), draw(sizes(least, 12)), draw(sizes(1, 5))
    g = generator(draw(seeds))
    logits = 3 * torch.randn(batch, pos, vocab, generator=g, dtype=torch.float64)
    return logits, torch.randint(vocab, (batch, pos), generator=g)


@given(predictions(), st.floats(-9, 9))
def test_losses_are_nats_of_the_next_token(case, shift):
    logits, tokens = case
    probability = logits.softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    close(per_token_loss(logits, tokens), -probability.log())
    close(per_token_loss(logits + shift, tokens), -probability.log())
    close(loss_by_position(logits, tokens), -probability.log().mean(0))


@given(predictions())
def test_what_induction_predicts_is_what_followed_an_equal_token(case):
    logits, tokens = case
    loss = per_token_loss(logits, tokens)
    seen = predictable(tokens)
    for b, row in enumerate(tokens.tolist()):
        expected = [row[i] in row[:i] for i in range(len(row) - 1)]
        assert seen[b].tolist() == expected
        new = [
            i for i in range(len(expected)) if row[i + 1] not in row[: i + 1] and not expected[i]
        ]
        old = [i for i, there in enumerate(expected) if there]
        mean = [float(loss[b, part].mean()) if part else math.nan for part in (new, old)]
        close(float(induction_loss(logits, tokens)[b]), mean[1], equal_nan=True)
        close(float(induction_gain(logits, tokens)[b]), mean[0] - mean[1], equal_nan=True)
        hits = [float(logits[b, i].argmax() == row[i + 1]) for i in old]
        accuracy = sum(hits) / len(hits) if hits else math.nan
        close(float(induction_accuracy(logits, tokens)[b]), accuracy, equal_nan=True)


@given(predictions())
def test_the_split_by_bigrams_is_one_of_all_targets(case):
    logits, tokens = case
    split, loss = ar_split(logits, tokens), per_token_loss(logits, tokens)
    hit = [
        (row[i], row[i + 1]) in {(row[j], row[j + 1]) for j in range(i)}
        for row in tokens.tolist()
        for i in range(len(row) - 1)
    ]
    assert (split.n_hits, split.n_others) == (sum(hit), len(hit) - sum(hit))
    mask = torch.tensor(hit).view_as(loss)
    close(split.hit_loss, float(loss[mask].mean()), equal_nan=True)
    close(split.other_loss, float(loss[~mask].mean()), equal_nan=True)


@fewer(0.5)
@given(predictions(least=4), sizes(1, 11), sizes(1, 11))
def test_learning_in_context_is_a_difference_that_adds_up(case, one, other):
    logits, tokens = case
    early, late = sorted((one, other))
    assume(early < late < tokens.shape[1])
    loss = per_token_loss(logits, tokens)
    found = icl_score(logits, tokens, early=early, late=late, shuffled=(logits.flip(0), tokens))
    close(found.values, loss[:, late - 1] - loss[:, early - 1])
    assert found.control is not None
    other_loss = per_token_loss(logits.flip(0), tokens)
    close(found.control, other_loss[:, late - 1] - other_loss[:, early - 1])


def ngrams(text, n, unit):
    units = list(text) if unit == "char" else text.split()
    return Counter(tuple(units[i : i + n]) for i in range(len(units) - n + 1))


@given(texts, sizes(1, 4), st.sampled_from(("char", "word")))
def test_ngram_fractions_are_those_of_counted_ngrams(samples, n, unit):
    copies, repeated = rep_n(samples, n, unit=unit), repetition(samples, n, unit=unit)
    distinct = distinct_n(samples, n, unit=unit, per_sample=True)
    for i, text in enumerate(samples):
        counted = ngrams(text, n, unit)
        whole = sum(counted.values())
        if not whole:
            assert math.isnan(copies[i])
            assert math.isnan(repeated[i])
            continue
        close(float(copies[i]), 1 - len(counted) / whole)
        close(float(repeated[i]), sum(c for c in counted.values() if c > 1) / whole)
        assert copies[i] <= repeated[i] <= 2 * copies[i] + 1e-12
    close(distinct, 1 - copies, equal_nan=True)
    pooled = [ngrams(text, n, unit) for text in samples]
    whole = sum(sum(c.values()) for c in pooled)
    expected = len(set().union(*pooled)) / whole if whole else math.nan
    close(distinct_n(samples, n, unit=unit), expected, equal_nan=True)
    parts = [1 - rep_n(samples, k, unit=unit) for k in (2, 3, 4)]
    close(diversity(samples, unit=unit), parts[0] * parts[1] * parts[2], equal_nan=True)


@fewer(0.5)
@given(texts, st.dictionaries(st.sampled_from("abc"), st.sampled_from("xyz"), min_size=3))
def test_ngram_fractions_do_not_see_names_of_letters(samples, names):
    assume(len(set(names.values())) == 3)
    renamed = [text.translate(str.maketrans(names)) for text in samples]
    for n in (1, 2, 3):
        assert distinct_n(samples, n, unit="char") == distinct_n(
            renamed, n, unit="char"
        ) or not any(len(text) >= n for text in samples)


@fewer(0.25)
@given(st.lists(st.text("abc ", min_size=3, max_size=9), min_size=2, max_size=4), seeds)
def test_a_copy_of_another_sample_has_bleu_one_and_order_does_not_matter(samples, seed):
    doubled = [*samples, samples[0]]
    found = self_bleu(doubled, 2, unit="char")
    close(found[[0, -1]], torch.ones(2, dtype=torch.float64))
    order = torch.randperm(len(doubled), generator=generator(seed))
    close(self_bleu([doubled[i] for i in order], 2, unit="char"), found[order])
    assert bool(((found >= 0) & (found <= 1 + 1e-9)).all())


@given(st.lists(st.text("abcd", min_size=3, max_size=9), min_size=2, max_size=4), seeds)
def test_coherence_is_the_cosine_of_counts(samples, seed):
    found = coherence(samples, samples)
    close(found.values, torch.ones(len(samples), dtype=torch.float64))
    order = torch.randperm(len(samples), generator=generator(seed)).tolist()
    moved = coherence(samples, [samples[i] for i in order])
    for i, j in enumerate(order):
        one, other = ngrams(samples[i], 3, "char"), ngrams(samples[j], 3, "char")
        sizes = [math.sqrt(sum(c * c for c in counted.values())) for counted in (one, other)]
        cosine = sum(one[g] * other[g] for g in one) / sizes[0] / sizes[1]
        close(float(moved.values[i]), cosine)


@given(st.lists(st.text("abcd", min_size=6, max_size=14), min_size=2, max_size=3))
def test_coherence_of_segments_is_that_of_neighbours(samples):
    found = segment_coherence(samples, segment=3)
    for i, text in enumerate(samples):
        pieces = [text[s : s + 3] for s in range(0, len(text) - 2, 3)]
        equal = [float(a == b) for a, b in pairwise(pieces)]
        close(float(found.values[i]), sum(equal) / len(equal))
        others = [
            other[s : s + 3]
            for j, other in enumerate(samples)
            for s in range(0, len(other) - 2, 3)
            if j != i
        ]
        same = [float(a == b) for a in pieces for b in others]
        close(float(found.null[i]), sum(same) / len(same))
