"""The loss over a whole text: counts, windows, units, and that nothing of the model moves."""

import math

import pytest
import torch

from smearlens.models.char_gpt import CharGPT, CharGPTConfig
from smearlens.training.evaluation import text_loss

TINY = {"d_vocab": 11, "d_model": 12, "n_heads": 3, "n_layers": 1, "n_ctx": 7, "dropout": 0.5}


@pytest.fixture
def model():
    model = CharGPT(CharGPTConfig(**TINY))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    return model.train()


def slow(model, tokens, length):
    """Each target by a run of its own over the context that its window gives it."""
    model.eval()
    terms = []
    for target in range(1, len(tokens)):
        start = (target - 1) // (length - 1) * (length - 1)
        logits = model(tokens[None, start:target])[0, -1].detach().double()
        terms.append(float(logits.logsumexp(0) - logits[tokens[target]]))
    model.train()
    return terms


@pytest.mark.parametrize("n_tokens", [2, 7, 8, 13, 31])
@pytest.mark.parametrize("length", [None, 2, 5])
def test_every_token_but_the_first_counts_once(model, n_tokens, length):
    tokens = torch.randint(11, (n_tokens,))
    expected = slow(model, tokens, length or 7)
    found = text_loss(model, tokens, length=length, batch_size=3)
    assert found.n_targets == found.n_characters == n_tokens - 1 == len(expected)
    assert found.total == pytest.approx(sum(expected), rel=1e-5)
    assert found.nats_per_token == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_bits_per_character_of_a_model_that_knows_nothing(model):
    """11 equally likely tokens of 4 characters each: log2(11) / 4 bits per character."""
    model.unembed.weight.data.zero_()
    found = text_loss(model, torch.randint(11, (22,)), n_characters=4 * 21)
    assert found.nats_per_token == pytest.approx(math.log(11), rel=1e-6)
    assert found.nats_per_character == pytest.approx(math.log(11) / 4, rel=1e-6)
    assert found.bits_per_character == pytest.approx(math.log2(11) / 4, rel=1e-6)


def test_the_model_and_its_randomness_are_left_as_they_were(model):
    before = torch.get_rng_state()
    text_loss(model, torch.randint(11, (9,), generator=torch.Generator().manual_seed(1)))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_wrong_counts_are_named(model):
    with pytest.raises(ValueError, match="n_characters must be at least 1, or None, got 0"):
        text_loss(model, torch.randint(11, (9,)), n_characters=0)
