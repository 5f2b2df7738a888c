"""The Pig Latin task of two studies: word pairs, their fixed split, and what a model gets right.

Every model of both studies is measured on the same held-out words, so that models can be compared
word by word. Leaves out models and grids (the studies), tests and verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from smearlens._files import write_atomically
from smearlens.analysis.behaviour import per_token_loss
from smearlens.data.pig_latin import (
    Pair,
    PairBatches,
    PairSplit,
    PigLatinVocabulary,
    contradictions,
    pig_latin_pairs,
    read_pairs,
    split_pairs,
    to_pig_latin,
)
from smearlens.experiments.grid import Cell, Task
from smearlens.models.base import HookedModel
from smearlens.models.decoder import Decoder
from smearlens.training.words import score_words

SMALL_WORDS = 3198  # of the small published list; without it, of a seeded draw of that size
SPLIT_SEED = 0
MISTAKES = 60  # kept per run
CONSONANTS = "bcdfghjklmnpqrstvwxz"  # y ends them: what stands before it moves


def load_pairs(name: str, data: str | None) -> list[Pair]:
    """The pairs of list `name`, "small" or "large".

    Args:
        name: which list
        data: folder of `pig_latin_small.txt` and `pig_latin_large.txt`, each plain or `.gz`; None
            takes the words of tiny Shakespeare, all of them or a seeded draw of 3,198

    Raises:
        ValueError: if the folder does not hold the file
    """
    if data is None:
        pairs = list(pig_latin_pairs())
        if name == "large":
            return pairs
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(SPLIT_SEED))
        return [pairs[i] for i in sorted(order[:SMALL_WORDS].tolist())]
    stem = Path(data) / f"pig_latin_{name}.txt"
    for path in (stem, stem.with_name(stem.name + ".gz")):
        if path.exists():
            return read_pairs(path)
    raise ValueError(
        f"data={data!r} holds no {stem.name} and no {stem.name}.gz: give the folder of the word "
        "pairs, or leave it out to take the words of tiny Shakespeare"
    )


def stored_split(out: Path, name: str, data: str | None, words: int | None = None) -> PairSplit:
    """The split of a list, four fifths to train on; made once and kept in `out/split-NAME.json`.

    Args:
        out: folder of the study
        name: of the list
        data: as in `load_pairs`
        words: take only so many pairs, drawn by seed
    """
    path = out / f"split-{name}.json"
    if not path.exists():
        pairs, generator = load_pairs(name, data), torch.Generator().manual_seed(SPLIT_SEED)
        if words is not None:
            pairs = [pairs[i] for i in torch.randperm(len(pairs), generator=generator)[:words]]
        write_atomically(path, split_pairs(pairs, generator=generator).to_json())
    return PairSplit.from_json(path.read_text())


def describe(split: PairSplit) -> dict[str, Any]:
    """A split in numbers, for a result file: sizes, the rule, the held-out words' kinds."""
    pairs = [*split.train, *split.validation]
    rules = [
        {word: to_pig_latin(word, move_qu=move) for word, _ in pairs} for move in (True, False)
    ]
    return {
        "train_words": len(split.train),
        "validation_words": len(split.validation),
        "contradictions": len(contradictions(pairs)),  # words that no model can always get right
        "longest": max(len(word) for word, _ in pairs),
        "follow": sum(rules[0][word] == target for word, target in pairs),
        "leave_u": sum(rules[0][w] != target == rules[1][w] for w, target in pairs),
        "exceptions": sorted({(w, t) for w, t in pairs if t not in (rules[0][w], rules[1][w])}),
        "letters": [len(word) for word, _ in split.validation],
        "vowel_first": "".join("01"[word[0] in "aeiou"] for word, _ in split.validation),
    }


def pair_task(
    split: PairSplit, *, batch_size: int, joined: bool, padded: bool = False, few: int | None = None
) -> Task:
    """Training on a split, learning curve and measures on its held-out words.

    Args:
        split: the words
        batch_size: pairs per batch
        joined: word and translation as one sequence, for Mamba
        padded: batches of all lengths instead of equal ones
        few: curve on so many of the held-out words only
    """
    layout = "joined" if joined else "pair"
    return Task(
        lambda seed: PairBatches(split.train, batch_size, seed, layout=layout, padded=padded),
        partial(forced_counts, pairs=split.validation[:few]),
        lambda model, cell: measure(model, cell, split),
    )


def measure(model: HookedModel, cell: Cell, split: PairSplit) -> dict[str, Any]:
    """Exact counts on held-out and training words, and which held-out words are right."""
    layout = "joined" if cell.model == "Mamba" else "pair"
    held_out = score_words(model, split.validation, layout=layout)
    return {
        "validation": {
            "right": held_out.right,
            "words": held_out.total,
            "accuracy": held_out.accuracy,
            "loss": held_out.loss,
        },
        "train": forced_counts(model, split.train),
        "hits": "".join("01"[hit] for hit in held_out.outcomes),  # in the order of the split
        "mistakes": [list(mistake) for mistake in held_out.mistakes[:MISTAKES]],
    }


@torch.no_grad()
def forced_counts(model: Any, pairs: Sequence[Pair]) -> dict[str, float | int]:
    """Right words, words, accuracy and loss per character, all target characters in one pass.

    Given the right characters so far, the likeliest next one is right at every place exactly when
    greedy decoding writes the word: the counts are those of `training.words.score_words`.
    """
    joined = isinstance(model, Decoder)
    batches = PairBatches(pairs, 512, 0, layout="joined" if joined else "pair")
    right, nats, characters = 0, 0.0, 0
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        target = batch["tokens"] if joined else batch["target"]
        counted = batch["loss_mask"][:, 1:] if joined else torch.ones_like(target[:, 1:]).bool()
        logits = model(**{name: batch[name] for name in batch if name != "loss_mask"})
        hit = logits[:, :-1].argmax(-1) == target[:, 1:]
        right += int((hit | ~counted).all(1).sum())
        nats += float(per_token_loss(logits, target).double()[counted].sum())
        characters += int(counted.sum())
    return {
        "right": right,
        "words": len(pairs),
        "accuracy": right / len(pairs),
        "loss": nats / characters,
    }


def epochs_to_steps(split: PairSplit, epochs: int, batch_size: int, *, padded: bool = False) -> int:
    """Updates in which every training pair is seen `epochs` times."""
    batches = PairBatches(split.train, batch_size, 0, padded=padded)
    return epochs * batches.steps_per_epoch


def alignment(word: str, *, move_qu: bool = True) -> list[int]:
    """Where each character of the translation stands in the word; -1 for `way`, `ay`.

    >>> alignment("quit-is")  # itquay-isway
    [2, 3, 0, 1, -1, -1, 4, 5, 6, -1, -1, -1]
    """
    found: list[int] = []
    for part in re.finditer("[a-z]+|-", word):
        letters, start = part[0], part.start()
        moved = 0
        if letters[0] not in "aeiou-":
            moved = len(letters) - len(letters.lstrip(CONSONANTS))
            moved += move_qu and letters[moved - 1 : moved + 1] == "qu"
        order = [*range(moved, len(letters)), *range(moved)]
        added = 0 if letters == "-" else 3 if letters[0] in "aeiou" else 2
        found += [start + i for i in order] + [-1] * added
    return found


def pair_tensors(word: str, target: str) -> dict[str, torch.Tensor]:
    """One pair as a batch of one: source, target, and both joined into `tokens`."""
    vocabulary = PigLatinVocabulary()
    end = torch.tensor([vocabulary.eos])
    source = torch.cat((vocabulary.encode(word), end))
    translation = torch.cat((vocabulary.encode(target), end))
    start = torch.tensor([vocabulary.sos])
    return {
        "source": source[None],
        "target": torch.cat((start, translation))[None],
        "tokens": torch.cat((source, translation))[None],
    }
