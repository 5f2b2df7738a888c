"""N-gram measures against counts by hand and loops, BLEU written out, embedders and nulls."""

import math
import sys
import types
from collections import Counter

import pytest
import torch

from smearlens._extras import MissingExtraError
from smearlens.analysis.coherence import (
    Coherence,
    Embedder,
    LexicalEmbedder,
    SentenceEmbedder,
    coherence,
    segment_coherence,
)
from smearlens.analysis.text import distinct_n, diversity, rep_n, repetition, self_bleu

VERSES = [
    "the quality of mercy is not strained",
    "it droppeth as the gentle rain from heaven upon the place beneath",
    "to be or not to be that is the question",
    "ha ha ha ha ha ha",
    "o",
]
UNIT = pytest.mark.parametrize("unit", ["char", "word"])


def ngrams(text, n, unit):
    """All n-grams, one by one."""
    units = text if unit == "char" else text.split()
    return [tuple(units[i : i + n]) for i in range(len(units) - n + 1)]


def test_the_worked_example():
    text, two = ["abcabc"], {"n": 2, "unit": "char"}
    assert distinct_n(text, **two) == pytest.approx(0.6)
    assert distinct_n(text, **two, denominator="tokens") == pytest.approx(0.5)
    assert rep_n(text, **two).tolist() == pytest.approx([0.4])
    assert repetition(text, **two).tolist() == pytest.approx([0.8])
    assert diversity(text, unit="char").tolist() == pytest.approx([0.6 * 0.75 * 1])
    assert distinct_n(["to be to be"], 2, unit="word") == pytest.approx(2 / 3)


@UNIT
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_ngram_measures_equal_loops(n, unit):
    seen, total, units = set(), 0, 0
    for i, verse in enumerate(VERSES):
        grams = ngrams(verse, n, unit)
        seen |= set(grams)
        total += len(grams)
        units += len(verse if unit == "char" else verse.split()) if grams else 0
        copies = sum(gram in grams[:at] for at, gram in enumerate(grams))
        part = sum(grams.count(gram) > 1 for gram in grams)
        want = [copies / len(grams), part / len(grams)] if grams else [math.nan] * 2
        found = [f(VERSES, n, unit=unit)[i].item() for f in (rep_n, repetition)]
        assert found == pytest.approx(want, nan_ok=True)
        single = distinct_n(VERSES, n, unit=unit, per_sample=True)[i].item()
        assert single == pytest.approx(1 - want[0], nan_ok=True)
    assert distinct_n(VERSES, n, unit=unit) == pytest.approx(len(seen) / total)
    by_tokens = distinct_n(VERSES, n, unit=unit, denominator="tokens")
    assert by_tokens == pytest.approx(len(seen) / units)


def test_texts_shorter_than_n_are_nan_and_never_zero():
    assert rep_n(["ab", "abcd"], 3, unit="char").isnan().tolist() == [True, False]
    assert diversity(["abc", "abcd"], unit="char").isnan().tolist() == [True, False]
    assert math.isnan(distinct_n(["", "a"], 2, unit="char"))
    assert distinct_n(["a b", "a"], 2, unit="word", denominator="tokens") == 0.5
    assert self_bleu(["a b", "a b c d", "a b c d"], unit="word").isnan().tolist() == [
        True,
        False,
        False,
    ]


def bleu(text, references, n, unit):
    """BLEU by its definition (Papineni et al. 2002), orders without a match smoothed by halving."""
    units = [list(t) if unit == "char" else t.split() for t in (text, *references)]
    length = len(units[0])
    closest = min((abs(len(r) - length), len(r)) for r in units[1:])[1]
    logs, halvings = 0.0, 0
    for order in range(1, n + 1):
        mine, *theirs = (Counter(ngrams(t, order, unit)) for t in (text, *references))
        matched = sum(min(c, max(other[g] for other in theirs)) for g, c in mine.items())
        if matched == 0:
            if order == 1:
                return 0
            halvings += 1
            matched = 0.5**halvings
        logs += math.log(matched / mine.total()) / n
    return math.exp(logs + min(0, 1 - closest / length))


@UNIT
@pytest.mark.parametrize("n", [2, 4])
def test_self_bleu_equals_its_definition(n, unit):
    texts = VERSES[:4]
    found = self_bleu(texts, n, unit=unit)
    for i, text in enumerate(texts):
        assert found[i].item() == pytest.approx(bleu(text, texts[:i] + texts[i + 1 :], n, unit))


def test_self_bleu_leaves_each_text_out_of_its_references():
    apart = self_bleu(["a b c d", "e f g h", "i j k l"], unit="word")
    assert apart.max() < 0.2
    assert self_bleu(["a b c d", "a b c d"], unit="word").tolist() == pytest.approx([1, 1])
    none = self_bleu(["a b c d", "a b x y"], unit="word", smoothing="none")
    assert none.tolist() == [0, 0]


def test_white_space_is_a_character_like_any_other():
    assert self_bleu(["a\n b", "a\n b"], 2, unit="char").tolist() == pytest.approx([1, 1])
    assert self_bleu(
        ["a\n\n\n", "a   "], 1, unit="char", smoothing="none"
    ).tolist() == pytest.approx([0.25] * 2)


def test_lexical_embeddings_are_counts_of_the_named_ngrams():
    embed = LexicalEmbedder(n=2, buckets=10007)
    one, two = embed(["abab", "ba"])
    assert one.sum() == 3
    assert float(one @ two) == 1
    assert one.max() == 2
    assert embed.name == "counts of character 2-grams in 10007 buckets"
    assert isinstance(embed, Embedder)


def test_coherence_equals_cosines_of_counts():
    prompts, continuations = ["abab", "xyz"], ["baba", "xyq"]
    found = coherence(prompts, continuations, embedder=LexicalEmbedder(n=2, buckets=10007))
    # ab:2 ba:1 and ba:2 ab:1; xy yz and xy yq; nothing in common across
    assert found.values.tolist() == pytest.approx([4 / 5, 1 / 2])
    assert found.null.tolist() == pytest.approx([0, 0])
    assert "10007 buckets" in repr(found)
    assert "unrelated texts 0.000" in repr(found)
    several = Coherence(torch.tensor([0.5, 0.25]), torch.tensor([0.2, 0.4]), "counting")
    assert repr(several) == "coherence 0.375 (unrelated texts 0.300) by counting"


def test_the_null_of_coherence_is_the_mean_over_the_other_pairs():
    class Turning:
        """The angle of each text's number, on the unit circle."""

        name = "angle"

        def __call__(self, texts):
            angle = torch.tensor([float(t) for t in texts])
            return torch.stack((angle.cos(), angle.sin()), 1)

    prompts, continuations = ["0.1", "0.4", "1.1"], ["0.3", "2.0", "0.7"]
    found = coherence(prompts, continuations, embedder=Turning())
    p, c = ([float(t) for t in texts] for texts in (prompts, continuations))
    assert found.values.tolist() == pytest.approx(
        [math.cos(a - b) for a, b in zip(p, c, strict=True)]
    )
    for i in range(3):
        want = sum(math.cos(p[i] - c[j]) for j in range(3) if j != i) / 2
        assert found.null[i].item() == pytest.approx(want, abs=1e-6)
    assert coherence(["0.1"], ["0.2"], embedder=Turning()).null.isnan().all()

    # what is left at the end of a text, "9." and "8", is dropped
    samples = ["0.11.09.", "2.00.31.78", "0.5"]
    found = segment_coherence(samples, segment=3, embedder=Turning())
    assert found.values[:2].tolist() == pytest.approx(
        [math.cos(0.9), (math.cos(1.7) + math.cos(1.4)) / 2], abs=1e-6
    )
    others = [math.cos(a - b) for a in (0.1, 1.0) for b in (2.0, 0.3, 1.7, 0.5)]
    assert found.null[0].item() == pytest.approx(sum(others) / 8, abs=1e-6)
    assert found.values.isnan().tolist() == found.null.isnan().tolist() == [False, False, True]
    single = segment_coherence(["12", "3"], segment=1, embedder=Turning())
    assert single.values[0].item() == pytest.approx(math.cos(1), abs=1e-6)


def test_a_text_too_short_to_embed_is_nan():
    found = coherence(["ab", "abcd"], ["abcd", "abcd"])
    assert found.values.isnan().tolist() == [True, False]
    assert isinstance(found, Coherence)


def test_what_only_an_extra_installs_is_missed_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics.bleu", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'smearlens\[text\]'"):
        self_bleu(["abcd", "abcd"], unit="char")
    with pytest.raises(MissingExtraError, match=r"pip install 'smearlens\[embeddings\]'"):
        SentenceEmbedder()


def test_a_sentence_transformer_is_named_by_its_model(monkeypatch):
    class Fake:
        def __init__(self, model):
            self.width = len(model)

        def encode(self, texts, convert_to_tensor):
            assert convert_to_tensor
            return torch.ones(len(texts), self.width)

    module = types.SimpleNamespace(SentenceTransformer=Fake)
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    found = coherence(["one"], ["two"], embedder=SentenceEmbedder("some/model"))
    assert found.embedder == "some/model"
    assert found.values.tolist() == pytest.approx([1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rep_n(["a"], 0, unit="char"), "n must be an int, at least 1, got 0"),
        (lambda: rep_n([], 1, unit="char"), "samples is empty; give at least one text"),
        (lambda: self_bleu(["abcd"], unit="char"), "give at least 2, got 1"),
        (lambda: coherence(["a"], ["b", "c"]), "one continuation, got 1 and 2"),
        (lambda: segment_coherence(["a"], segment=0), "segment must be at least 1 character"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_single_text_is_not_taken_for_a_list():
    with pytest.raises(TypeError, match=r"continuations must be a list .* write \[text\]"):
        coherence(["a"], "b")
