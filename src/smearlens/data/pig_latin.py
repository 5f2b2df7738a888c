"""The Pig Latin task: the rule, word pairs, their vocabulary, split and batches.

Pairs come from the embedded tiny Shakespeare or from a file. Leaves out models and their scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smearlens._explain import explained
from smearlens.data.batches import shuffled
from smearlens.data.corpora import CorpusError, load_corpus, read_text
from smearlens.data.synthetic import step_generator

Pair = tuple[str, str]


def to_pig_latin(word: str, *, move_qu: bool = True) -> str:
    """Translate a word; the parts between hyphens are translated one by one.

    A part that starts with a, e, i, o or u gets `way`. Otherwise what stands before the first of
    a, e, i, o, u, y moves to the end (nothing, if the part starts with y; all, if there is none)
    and `ay` follows; a `u` after a `q` moves with it.

    >>> " ".join(map(to_pig_latin, ("team", "eat", "quicker", "younger", "try", "by-and-by")))
    'eamtay eatway ickerquay youngeray ytray ybay-andway-ybay'

    Args:
        word: letters a-z and hyphens
        move_qu: False leaves the `u` after a `q` where it is (`quick` → `uickqay`), as one part of
            the large published word list has it

    Raises:
        ValueError: for an empty word or another character
    """
    if not isinstance(word, str) or not re.fullmatch("[a-z-]+", word):
        raise ValueError(f"word must consist of a-z and '-', got {word!r}: lower it and strip it")
    return "-".join(_translate(part, move_qu) for part in word.split("-"))


def _translate(part: str, move_qu: bool) -> str:
    if not part or part[0] in "aeiou":
        return part and part + "way"
    first = next((i for i, letter in enumerate(part) if letter in "aeiouy"), len(part))
    if move_qu and part[first - 1 : first + 1] == "qu":
        first += 1
    return part[first:] + part[:first] + "ay"


@lru_cache(maxsize=1)
def _shakespeare_words() -> tuple[str, ...]:
    """The distinct words of tiny Shakespeare, lower case, without apostrophe or hyphen, sorted."""
    text = load_corpus("tiny-shakespeare", "all").text.lower()
    return tuple(sorted(set(re.findall(r"(?<![\w'-])[a-z]+(?![\w'-])", text))))


@explained
def pig_latin_pairs(*, min_letters: int = 1, max_letters: int | None = None) -> Iterator[Pair]:
    """Word and translation for each of the 10,863 distinct words of tiny Shakespeare, sorted.

    >>> next(pig_latin_pairs(min_letters=15))
    ('distinguishment', 'istinguishmentday')

    Args:
        min_letters: shortest word
        max_letters: longest word; None is no limit (the longest has 15)

    Raises:
        ValueError: if no word has such a length
    """
    longest = max_letters if max_letters is not None else 99
    words = [word for word in _shakespeare_words() if min_letters <= len(word) <= longest]
    if not words:
        raise ValueError(f"no word has {min_letters}..{longest} letters; the longest has 15")
    return ((word, to_pig_latin(word)) for word in words)


@explained
def read_pairs(path: str | Path, *, alphabetic: bool = True) -> list[Pair]:
    """Pairs of a text file, plain or `.gz`: a word, a blank, its translation on each line.

    Args:
        path: the file; blank lines are skipped
        alphabetic: leave out pairs with a character other than a-z and '-'

    Raises:
        CorpusError: if the file is missing or damaged, has a line of not two words, or no pair
    """
    pairs = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split()
        if words and len(words) != 2:
            raise CorpusError(f"{path}, line {number}: expected two words, got {line!r}")
        if words and (not alphabetic or re.fullmatch("[a-z-]+", "".join(words))):
            pairs.append((words[0], words[1]))
    if not pairs:
        raise CorpusError(f"{path} holds no pair: expected a word and its translation on each line")
    return pairs


def contradictions(pairs: Iterable[Pair]) -> dict[str, list[str]]:
    """Words with more than one translation: no model can be right on all of their pairs.

    >>> contradictions([("quit", "itquay"), ("md", "mday"), ("quit", "uitqay")])
    {'quit': ['itquay', 'uitqay']}
    """
    targets: dict[str, list[str]] = {}
    for word, target in dict.fromkeys(pairs):
        targets.setdefault(word, []).append(target)
    return {word: found for word, found in targets.items() if len(found) > 1}


@dataclass(frozen=True)
class PairSplit:
    """Pairs to train on and pairs to validate with; no word is in both."""

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]

    def __post_init__(self):
        both = sorted({word for word, _ in self.train} & {word for word, _ in self.validation})
        if both or not self.train or not self.validation:
            n, m = len(self.train), len(self.validation)
            found = f"{n} and {m} pairs, in both: {both[:5]}"
            raise ValueError(f"train and validation need pairs and no word in both, got {found}")

    def to_json(self) -> str:
        """The split as text, to be stored with the run that used it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PairSplit:
        """The split that `to_json` wrote."""
        stored = json.loads(text)
        train, validation = ([(a, b) for a, b in stored[k]] for k in ("train", "validation"))
        return cls(tuple(train), tuple(validation))


@explained
def split_pairs(
    pairs: Iterable[Pair], validation: float = 0.2, *, generator: torch.Generator
) -> PairSplit:
    """Split by word; the order and the number of equal pairs do not matter.

    Args:
        pairs: all pairs; those of one word go to the same side
        validation: share of the words to validate with
        generator: the source of randomness

    Raises:
        ValueError: if a side would be empty
    """
    by_word: dict[str, list[Pair]] = {}
    for pair in sorted(set(pairs)):
        by_word.setdefault(pair[0], []).append(pair)
    words = list(by_word)
    n_validation = round(validation * len(words)) if 0 < validation < 1 else 0
    if not 0 < n_validation < len(words):
        raise ValueError(f"validation={validation} of {len(words)} words leaves one side empty")
    order = torch.randperm(len(words), generator=generator).tolist()
    sides = order[n_validation:], order[:n_validation]
    train, held_out = ([pair for i in side for pair in by_word[words[i]]] for side in sides)
    return PairSplit(tuple(train), tuple(held_out))


@explained
class PigLatinVocabulary:
    """29 symbols: a-z are 0..25, '-' is 26, start of sequence 27, end of sequence 28.

    >>> vocabulary = PigLatinVocabulary()
    >>> vocabulary.encode("by-eat").tolist(), vocabulary.tokens([27, 0, 28])
    ([1, 24, 26, 4, 0, 19], ['[SOS]', 'a', '[EOS]'])
    """

    d_vocab = 29
    sos = 27
    eos = 28
    _symbols = (*"abcdefghijklmnopqrstuvwxyz-", "[SOS]", "[EOS]")

    def encode(self, text: str) -> Int64[Tensor, " pos"]:
        """Ids of the characters of a word, without start and end."""
        if text and not re.fullmatch("[a-z-]+", text):
            raise ValueError(f"text must consist of a-z and '-', got {text!r}")
        return torch.tensor([self._symbols.index(c) for c in text], dtype=torch.int64)

    def decode(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> str:
        """The word up to the first end of sequence; a start of sequence is left out."""
        pieces = self.tokens(tokens)
        end = pieces.index("[EOS]") if "[EOS]" in pieces else len(pieces)
        return "".join(piece for piece in pieces[:end] if piece != "[SOS]")

    def tokens(self, tokens: Int[Tensor, " pos"] | Sequence[int]) -> list[str]:
        """One symbol per id."""
        ids = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        if wrong := [i for i in ids if not 0 <= i < self.d_vocab]:
            raise ValueError(f"tokens must be in 0..{self.d_vocab - 1}, got {wrong[0]}")
        return [self._symbols[i] for i in ids]


@explained
class PairBatches:
    """Batches of encoded pairs, in a new order each epoch.

    `layout="pair"`: `source` is word, EOS; `target` is SOS, translation, EOS.
    `layout="joined"`, for a decoder alone: `tokens` is word, EOS, translation, EOS, and `loss_mask`
    is True on the tokens of the translation and its EOS.

    By default all pairs of a batch have equal lengths: nothing is padded, a batch may be smaller.
    With `padded=True` batches mix words of all lengths and are filled up with EOS; `source_mask`
    `[batch, source]` and `loss_mask` `[batch, target]` come along (True: the token is real).

    >>> batches = PairBatches([("team", "eamtay"), ("eat", "eatway")], batch_size=2, seed=0)
    >>> batches.steps_per_epoch, {name: t.shape[0] for name, t in batches.batch(0).items()}
    (2, {'source': 1, 'target': 1})

    Args:
        pairs: words and translations
        batch_size: pairs in a batch
        seed: another seed gives another order
        layout: `pair` or `joined`
        padded: mix words of all lengths

    Raises:
        ValueError: if there are no pairs, or a size is out of range
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        batch_size: int,
        seed: int,
        *,
        layout: Literal["pair", "joined"] = "pair",
        padded: bool = False,
    ):
        if not pairs or batch_size < 1 or seed < 0 or layout not in ("pair", "joined"):
            raise ValueError(
                "need pairs, batch_size >= 1, seed >= 0 and layout 'pair' or 'joined', got "
                f"{len(pairs)} pairs, batch_size={batch_size}, seed={seed}, layout={layout!r}"
            )
        self._batch_size, self._seed, self._padded = batch_size, seed, padded
        self._lines = [_encode_pair(*pair, layout, padded) for pair in pairs]
        groups: dict[tuple[int, int], list[int]] = {}
        for i, (word, target) in enumerate(pairs):
            groups.setdefault((len(word), len(target)), []).append(i)
        self._groups = [torch.tensor(groups[lengths]) for lengths in sorted(groups)]
        self._plan: tuple[int, list[Tensor]] = (-1, [])  # the last epoch asked for

    @property
    def steps_per_epoch(self) -> int:
        """Batches in which every pair occurs at least once."""
        groups = [torch.arange(len(self._lines))] if self._padded else self._groups
        return sum(-(-len(group) // self._batch_size) for group in groups)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The pairs of a step."""
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        if self._padded:
            rows = shuffled(len(self._lines), self._batch_size, step, self._seed)
        else:
            epoch, position = divmod(step, self.steps_per_epoch)
            if self._plan[0] != epoch:
                self._plan = (epoch, self._batches_of(epoch))
            rows = self._plan[1][position]
        lines = [self._lines[i] for i in rows.tolist()]
        fill = {name: 0 if "mask" in name else PigLatinVocabulary.eos for name in lines[0]}
        return {n: pad_sequence([line[n] for line in lines], True, fill[n]) for n in fill}

    def _batches_of(self, epoch: int) -> list[Tensor]:
        generator, batches = step_generator(self._seed, epoch), []
        for group in self._groups:
            order = torch.randperm(len(group), generator=generator)
            batches.extend(group[order].split(self._batch_size))
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _encode_pair(word: str, target: str, layout: str, padded: bool) -> dict[str, Tensor]:
    vocabulary = PigLatinVocabulary()
    sos, eos = torch.tensor([vocabulary.sos]), torch.tensor([vocabulary.eos])
    source, translation = vocabulary.encode(word), vocabulary.encode(target)
    if layout == "joined":
        tokens = torch.cat((source, eos, translation, eos))
        return {"tokens": tokens, "loss_mask": torch.arange(len(tokens)) > len(word)}
    line = {"source": torch.cat((source, eos)), "target": torch.cat((sos, translation, eos))}
    if padded:
        line["source_mask"] = torch.ones(len(word) + 1, dtype=torch.bool)
        line["loss_mask"] = torch.ones(len(target) + 2, dtype=torch.bool)
    return line
