"""A tiny model with dropout, its data, and a folder of a run: shared by the tests of training."""

import pytest
import torch
from torch import nn


class TinyModel(nn.Module):
    """Predicts each of 13 tokens from the one before it."""

    def __init__(self, dropout: float = 0.2):
        super().__init__()
        self.embed = nn.Embedding(13, 7)
        self.drop = nn.Dropout(dropout)
        self.up = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.out = nn.Linear(11, 13, bias=False)

    def forward(self, tokens, return_type):
        assert return_type == "loss"
        x = self.out(self.norm(self.up(self.drop(self.embed(tokens)))).relu())
        return nn.functional.cross_entropy(x[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class TokenData:
    """Random tokens, `batch` rows of 5."""

    def __init__(self, batch: int = 3):
        self.size = (batch, 5)

    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        return {"tokens": torch.randint(13, self.size, generator=generator)}


@pytest.fixture
def make_model():
    """Models that are equal whenever they are made with the same arguments."""

    def make(seed: int = 3, dropout: float = 0.2) -> TinyModel:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return TinyModel(dropout)

    return make


@pytest.fixture
def data():
    return TokenData()


@pytest.fixture
def make_data():
    return TokenData
