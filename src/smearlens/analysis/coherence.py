"""Whether texts belong together, by the cosine of their embeddings, beside texts that do not.

The embedder is named with every number: counts of character n-grams by default, or a model of the
sentence-transformers library. Leaves out n-grams as such (`analysis.text`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens._explain import explained
from smearlens._extras import extra
from smearlens.analysis.text import check_texts


@runtime_checkable
class Embedder(Protocol):
    """Makes a vector of each text; its `name` is reported with every number made from it."""

    @property
    def name(self) -> str:
        """What it is."""
        ...

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """One row per text."""
        ...


@dataclass(frozen=True)
class LexicalEmbedder:
    """Counts of character n-grams, hashed: a baseline that sees shared words and no meaning."""

    n: int = 3
    buckets: int = 4096

    @property
    def name(self) -> str:
        """What it counts."""
        return f"counts of character {self.n}-grams in {self.buckets} buckets"

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """One row of counts per text, the same in every process."""
        rows = torch.zeros(len(texts), self.buckets, dtype=torch.float64)
        for row, text in zip(rows, texts, strict=True):
            for start in range(len(text) - self.n + 1):
                row[zlib.crc32(text[start : start + self.n].encode()) % self.buckets] += 1
        return rows


class SentenceEmbedder:
    """A model of the sentence-transformers library (extra "embeddings").

    Raises:
        MissingExtraError: if sentence-transformers is not installed
    """

    def __init__(self, model: str = "sentence-transformers/all-MiniLM-L6-v2"):
        self.name = model
        self._model = extra("sentence_transformers", "embeddings").SentenceTransformer(model)

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """One row per text."""
        return self._model.encode(list(texts), convert_to_tensor=True)


@dataclass(frozen=True, eq=False)
class Coherence:
    """Cosines of embeddings, beside those of texts that do not belong together.

    Attributes:
        values: one cosine per pair (or sample); NaN where a text is too short to embed
        null: mean cosine with the texts of the other pairs; NaN for a single one
        embedder: name of what made the vectors
    """

    values: Float[Tensor, " sample"]
    null: Float[Tensor, " sample"]
    embedder: str

    def __repr__(self) -> str:
        mean, null = float(self.values.nanmean()), float(self.null.nanmean())
        return f"coherence {mean:.3f} (unrelated texts {null:.3f}) by {self.embedder}"


@explained
def coherence(
    prompts: Sequence[str], continuations: Sequence[str], *, embedder: Embedder | None = None
) -> Coherence:
    """Cosine of the embeddings of each prompt and its continuation.

    Two texts of one language share much of any embedding: read the values beside their null, the
    cosine of each prompt with the continuations of the others.

    Args:
        prompts: what was given
        continuations: what was added, without the prompt
        embedder: default `LexicalEmbedder()`

    Raises:
        ValueError: if there are not as many continuations as prompts
    """
    check_texts(prompts, "prompts")
    check_texts(continuations, "continuations")
    if len(prompts) != len(continuations):
        raise ValueError(
            f"each prompt needs one continuation, got {len(prompts)} and {len(continuations)}"
        )
    embed = embedder or LexicalEmbedder()
    table = _cosines(embed(prompts), embed(continuations))
    others = table.masked_fill(torch.eye(len(table), dtype=torch.bool), torch.nan).nanmean(1)
    return Coherence(table.diagonal().clone(), others, embed.name)


@explained
def segment_coherence(
    samples: Sequence[str], *, segment: int, embedder: Embedder | None = None
) -> Coherence:
    """Mean cosine of neighbouring segments of each text; null: with segments of the other texts.

    Args:
        samples: the texts
        segment: characters in a segment; what is left at the end of a text is dropped
        embedder: default `LexicalEmbedder()`

    Returns:
        `Coherence` per sample; NaN for samples of fewer than two segments
    """
    check_texts(samples, "samples")
    if segment < 1:
        raise ValueError(f"segment must be at least 1 character, got {segment}")
    embed = embedder or LexicalEmbedder()
    pieces = [
        (i, text[start : start + segment])
        for i, text in enumerate(samples)
        for start in range(0, len(text) - segment + 1, segment)
    ]
    owner = torch.tensor([i for i, _ in pieces], dtype=torch.int64)
    vectors = embed([piece for _, piece in pieces])
    table = _cosines(vectors, vectors)
    own = torch.arange(len(samples))[:, None] == owner  # [sample segment]
    values = [table.diagonal(1)[mine[1:] & mine[:-1]].nanmean() for mine in own]
    null = [table[mine][:, ~mine].nanmean() for mine in own]
    short = own.sum(1) < 2
    return Coherence(
        torch.stack(values), torch.stack(null).masked_fill(short, torch.nan), embed.name
    )


def _cosines(a: Tensor, b: Tensor) -> Float[Tensor, "one other"]:
    """Cosine of every row of `a` with every row of `b`; NaN for rows of zeros."""
    a, b = (t.detach().double().cpu() for t in (a, b))
    return (a / a.norm(dim=1, keepdim=True)) @ (b / b.norm(dim=1, keepdim=True)).T
