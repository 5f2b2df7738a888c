"""`score_words`: which words does a model translate right, and at what loss per character?

Counts are exact: every word counts once and every character once, whatever the batches. Leaves out
the task itself (`data.pig_latin`), the models, and the tests that compare two sets of outcomes
(`analysis.stats`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smearlens._explain import explained
from smearlens.analysis.behaviour import per_token_loss
from smearlens.analysis.stats import proportion_interval
from smearlens.data.pig_latin import Pair, PigLatinVocabulary
from smearlens.models.base import HookedModel
from smearlens.training.randomness import observing

OVERTIME = 4  # tokens a translation may run on after the longest right one, to be shown
UNENDED = "…"  # stands behind a translation without an end


@dataclass(frozen=True)
class WordScores:
    """What a model made of word pairs.

    Attributes:
        pairs: words and their right translations
        answers: what the model wrote, greedily; one that did not end has "…" behind it
        nats: cross entropy of all target characters, each translation's end of sequence among them
        characters: how many those are
    """

    pairs: tuple[Pair, ...]
    answers: tuple[str, ...]
    nats: float
    characters: int

    @property
    def outcomes(self) -> tuple[bool, ...]:
        """Whether each word is right, to its end: what paired tests take."""
        return tuple(a == right for a, (_, right) in zip(self.answers, self.pairs, strict=True))

    @property
    def right(self) -> int:
        """Words translated right."""
        return sum(self.outcomes)

    @property
    def total(self) -> int:
        """Words."""
        return len(self.pairs)

    @property
    def accuracy(self) -> float:
        """Fraction of the words that are right."""
        return self.right / self.total

    @property
    def loss(self) -> float:
        """Nats per target character, given the right ones before it; ln 29 is guessing."""
        return self.nats / self.characters

    @property
    def mistakes(self) -> list[tuple[str, str, str]]:
        """The words that are wrong, as (word, right, written)."""
        triples = zip(self.pairs, self.answers, strict=True)
        return [(word, right, answer) for (word, right), answer in triples if answer != right]

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Clopper-Pearson interval of the accuracy."""
        return proportion_interval(self.right, self.total, level)


@explained
def score_words(
    model: HookedModel,
    pairs: Sequence[Pair],
    *,
    layout: Literal["pair", "joined"] = "pair",
    batch_size: int = 512,
) -> WordScores:
    """Translate each word greedily, and take the loss on its right translation.

    Words of one length go together, so that no word is padded before it is read.

    Args:
        model: of the Pig Latin vocabulary, in any mode; it is put back
        pairs: words and their translations
        layout: "pair" for a model with `translate` (`Seq2Seq`); "joined" for a decoder alone that
            continues word, end of sequence
        batch_size: words at once

    Raises:
        ValueError: for no pairs, another layout, or words that do not fit the model's n_ctx
    """
    if not pairs or batch_size < 1 or layout not in ("pair", "joined"):
        raise ValueError(
            "score_words needs pairs, batch_size >= 1 and layout 'pair' or 'joined', got "
            f"{len(pairs)} pairs, batch_size={batch_size}, layout={layout!r}"
        )
    score = _score_pair if layout == "pair" else _score_joined
    answers, nats, characters = [""] * len(pairs), 0.0, 0
    with observing(model):
        for rows in _equal_lengths(pairs, batch_size):
            source, target = _encode([pairs[i] for i in rows], next(model.parameters()).device)
            losses, counted, written = score(model, source, target)
            nats += float(losses.double()[counted].sum())
            characters += int(counted.sum())
            for i, tokens in zip(rows, written, strict=True):
                answers[i] = _read(tokens)
    return WordScores(tuple(pairs), tuple(answers), nats, characters)


def _equal_lengths(pairs: Sequence[Pair], batch_size: int) -> Iterator[list[int]]:
    """Numbers of pairs whose words have one length, at most `batch_size` at once."""
    groups: dict[int, list[int]] = {}
    for i, (word, _) in enumerate(pairs):
        groups.setdefault(len(word), []).append(i)
    for length in sorted(groups):
        for start in range(0, len(groups[length]), batch_size):
            yield groups[length][start : start + batch_size]


def _encode(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor]:
    """Word and EOS; translation and EOS, filled with EOS."""
    vocabulary, eos = PigLatinVocabulary(), PigLatinVocabulary.eos
    words, translations = (
        [torch.cat((vocabulary.encode(text), torch.tensor([eos]))) for text in side]
        for side in zip(*pairs, strict=True)
    )
    return torch.stack(words).to(device), pad_sequence(translations, True, eos).to(device)


def _real(target: Tensor) -> Tensor:
    """True up to the first EOS of each row, that one included."""
    ended = target == PigLatinVocabulary.eos
    return ended.cumsum(1) - ended.long() == 0


def _score_pair(model: Any, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and which of them count [batch target], and the tokens written."""
    start = torch.full_like(target[:, :1], PigLatinVocabulary.sos)
    given = torch.cat((start, target), dim=1)
    losses = per_token_loss(model(source, given), given)
    limit = min(target.shape[1] + OVERTIME, model.config.n_ctx - 1)
    return losses, _real(target), model.translate(source, max_new_tokens=limit)


def _score_joined(model: Any, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same for a decoder that reads word, EOS, translation, EOS."""
    tokens = torch.cat((source, target), dim=1)
    losses = per_token_loss(model(tokens), tokens)[:, source.shape[1] - 1 :]
    limit = min(target.shape[1] + OVERTIME, model.config.n_ctx - source.shape[1])
    state: dict[str, Tensor] = {}
    new, written, ended = source, [], torch.zeros_like(source[:, 0], dtype=torch.bool)
    while len(written) < limit and not ended.all():
        new = model(new, state=state)[:, -1].argmax(-1, keepdim=True)
        written.append(new)
        ended |= new[:, 0] == PigLatinVocabulary.eos
    return losses, _real(target), torch.cat(written, dim=1)


def _read(tokens: Tensor) -> str:
    """A translation as text; what never ended says so, and [SOS] in it is no letter of it."""
    pieces = PigLatinVocabulary().tokens(tokens)
    if "[EOS]" not in pieces:
        return "".join(pieces) + UNENDED
    return "".join(pieces[: pieces.index("[EOS]")])
