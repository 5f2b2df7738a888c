"""Whole-word accuracy and loss per character, against one word after the other."""

import math

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smearlens.data.pig_latin import PigLatinVocabulary, to_pig_latin
from smearlens.models.mamba import Mamba, MambaConfig
from smearlens.models.seq2seq import Seq2Seq, Seq2SeqConfig
from smearlens.training.words import WordScores, score_words

WORDS = ["team", "eat", "try", "by-and-by", "oat", "my", "a", "stranger", "tea", "one"]
PAIRS = [(word, to_pig_latin(word)) for word in WORDS]
LONGEST = max(len(right) for _, right in PAIRS)
VOCABULARY = PigLatinVocabulary()


def ids(text):
    return [*VOCABULARY.encode(text).tolist(), 28]


def seq2seq():
    config = Seq2SeqConfig(d_model=16, n_heads=2, n_layers=1, d_mlp=12, n_ctx=26, dropout=0.3)
    return Seq2Seq(config)


def mamba():
    return Mamba(MambaConfig(d_vocab=29, d_model=8, n_layers=1, n_ctx=40, dropout=0.3))


def pair_logits(model, word, written):
    """Logits for each character behind `written`, one word at a time."""
    return model(torch.tensor([ids(word)]), torch.tensor([[27, *written]]))[0]


def joined_logits(model, word, written):
    return model(torch.tensor([[*ids(word), *written]]))[0, len(word) :]


CASES = pytest.mark.parametrize(
    ("make", "layout", "logits"),
    [(seq2seq, "pair", pair_logits), (mamba, "joined", joined_logits)],
    ids=["pair", "joined"],
)


@CASES
@pytest.mark.parametrize("batch_size", [2, 512])
@torch.no_grad()
def test_equals_one_word_after_the_other(make, layout, logits, batch_size):
    model = make()
    nn.init.normal_(model.unembed.weight, std=1.0)  # so that some translations end early
    model.unembed.weight.data[28] *= 3
    scores = score_words(model, PAIRS, layout=layout, batch_size=batch_size)
    assert model.training, "the mode is put back"
    model.eval()
    nats, characters, ended = 0.0, 0, 0
    for (word, right), answer in zip(PAIRS, scores.answers, strict=True):
        target = torch.tensor(ids(right))
        given = logits(model, word, target[:-1].tolist())
        nats += float(F.cross_entropy(given, target, reduction="sum"))
        characters += len(right) + 1
        written = []
        while 28 not in written and len(written) < len(answer) + 1:
            written.append(int(logits(model, word, written)[-1].argmax()))
        if answer.endswith("…"):
            assert 28 not in written
            assert len(answer.replace("[SOS]", "S")) > len(right)
            assert "".join(VOCABULARY.tokens(written)).startswith(answer[:-1])
        else:
            ended += 1
            assert "".join(VOCABULARY.tokens(written)) == answer + "[EOS]"
    assert ended > 0
    assert scores.characters == characters
    assert scores.nats == pytest.approx(nats, rel=1e-5)
    assert scores.loss == pytest.approx(nats / characters, rel=1e-5)


@CASES
def test_a_trained_model_is_right_on_the_words_it_knows(make, layout, logits):
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    words = PAIRS[:3]
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = sum(
            F.cross_entropy(logits(model, word, ids(right)[:-1]), torch.tensor(ids(right)))
            for word, right in words
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = score_words(model, [*words, ("tea", "wrong")], layout=layout)
    assert scores.outcomes == (True, True, True, False)
    assert (scores.right, scores.total, scores.accuracy) == (3, 4, 0.75)
    ((word, right, written),) = scores.mistakes
    assert (word, right) == ("tea", "wrong")
    assert written == scores.answers[3]
    assert scores.interval() == pytest.approx((0.194120, 0.993691), abs=1e-6)


def test_a_model_that_guesses_pays_ln_29_per_character_and_never_ends():
    model = seq2seq()
    nn.init.zeros_(model.unembed.weight)  # greedily an "a", again and again
    scores = score_words(model, PAIRS)
    assert scores.loss == pytest.approx(math.log(29), rel=1e-6)
    assert scores.right == 0
    assert {answer.rstrip("…").strip("a") for answer in scores.answers} == {""}
    assert all(answer.endswith("…") for answer in scores.answers)
    lengths = {len(word): 0 for word, _ in PAIRS}
    for (word, right), answer in zip(PAIRS, scores.answers, strict=True):
        lengths[len(word)] = max(lengths[len(word)], len(right) + 1)
        assert len(answer) - 1 >= len(right) + 1
    assert len(scores.answers[3]) - 1 == len(ids(PAIRS[3][1])) + 4


def test_right_letters_without_an_end_are_wrong():
    scores = WordScores((("eat", "eatway"), ("a", "away")), ("eatway…", "away"), 1.0, 12)
    assert scores.outcomes == (False, True)
    assert scores.mistakes == [("eat", "eatway", "eatway…")]


@pytest.mark.parametrize(
    ("pairs", "options"), [([], {}), (PAIRS, {"layout": "both"}), (PAIRS, {"batch_size": 0})]
)
def test_bad_arguments_are_explained(pairs, options):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=r"needs pairs, batch_size >= 1 and layout 'pair' or"):
            score_words(seq2seq(), pairs, **options)
        with pytest.raises(ValueError, match="target reach position 27, n_ctx is 26"):
            score_words(seq2seq(), [("a", "b" * 25)])
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
