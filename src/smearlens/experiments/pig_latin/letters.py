"""Letters as vectors: do a model's embeddings put vowels together, or near the start of a word?

Each statistic stands beside the same with the letters shuffled. Leaves out attention (`evidence`)
and pictures (`report`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens.data.pig_latin import PigLatinVocabulary
from smearlens.models.base import HookedModel

VOWELS = [0, 4, 8, 14, 20]
CONSONANTS = [i for i in range(26) if i not in VOWELS]
DASH = 26
SHUFFLES = 2000


def letters(model: HookedModel) -> dict[str, dict[str, float]]:
    """All statistics of a Seq2Seq's embeddings."""
    return {
        "[SOS] to vowels": letters_near_start(model),
        "vowels together": vowels_together(model),
        "- to [EOS]": dash_near_end(model),
    }


def letters_near_start(model: HookedModel) -> dict[str, float]:
    """Cosine of the decoder's [SOS] to the encoder's vowels minus that to its consonants.

    As a number of standard deviations (`z`) among random choices of five letters.
    """
    start = model.get_parameter("decoder.embed.weight").detach()[PigLatinVocabulary.sos]
    cosines = torch.cosine_similarity(_encoder(model)[:26], start[None], dim=1)
    return _against_shuffles(lambda order: _apart(cosines[order]))


def vowels_together(model: HookedModel) -> dict[str, float]:
    """Mean cosine between vowels minus that between vowels and consonants, and its z."""
    cosines = _cosines(_encoder(model)[:26])

    def value(order: Tensor) -> float:
        shuffled = cosines[order][:, order]
        among = shuffled[VOWELS][:, VOWELS]
        n = len(VOWELS)
        within = (among.sum() - among.diagonal().sum()) / (n * (n - 1))
        return float(within - shuffled[VOWELS][:, CONSONANTS].mean())

    return _against_shuffles(value)


def dash_near_end(model: HookedModel) -> dict[str, float]:
    """Cosine of the encoder's "-" and [EOS], and its z among all pairs of two symbols."""
    table = _encoder(model)
    used = [*range(27), PigLatinVocabulary.eos]  # the encoder never sees [SOS]
    cosines = _cosines(table[used])
    pairs = cosines[torch.ones_like(cosines).triu(1).bool()].double()
    found = float(cosines[DASH, -1])
    return {"value": found, "z": (found - float(pairs.mean())) / float(pairs.std())}


def _encoder(model: HookedModel) -> Float[Tensor, "symbol d_model"]:
    return model.get_parameter("encoder.embed.weight").detach()


def _cosines(vectors: Float[Tensor, "symbol d_model"]) -> Float[Tensor, "symbol symbol"]:
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    return unit @ unit.T


def _against_shuffles(value: Callable[[Tensor], float]) -> dict[str, float]:
    """A statistic of the letters, with its place among those of shuffled letters."""
    generator = torch.Generator().manual_seed(0)
    null = torch.tensor(
        [value(torch.randperm(26, generator=generator)) for _ in range(SHUFFLES)]
    ).double()
    found = float(value(torch.arange(26)))
    return {"value": found, "z": (found - float(null.mean())) / float(null.std())}


def _apart(values: Float[Tensor, " letter"]) -> float:
    return float(values[VOWELS].mean() - values[CONSONANTS].mean())
