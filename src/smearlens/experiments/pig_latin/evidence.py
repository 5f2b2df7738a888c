"""How a trained transformer translates: where its heads look, and what they break if misled.

Scores and interventions on held-out words of equal lengths, batch by batch: previous-token scores
of the encoder, cross attention against the rule's alignment, another word's previous tokens put
into the keys of cross attention, the embedding of [SOS] exchanged; and what a model makes of the
words that the write-up's got wrong. Leaves out training, letters as vectors (`letters`), verdicts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from smearlens.analysis.detection import alignment_mass
from smearlens.analysis.heads import prev_token_score
from smearlens.analysis.patterns import self_mass
from smearlens.causal.ablate import Hooks, replace_with
from smearlens.data.pig_latin import (
    Pair,
    PairBatches,
    PairSplit,
    PigLatinVocabulary,
    to_pig_latin,
)
from smearlens.experiments.grid import Cell
from smearlens.experiments.pig_latin.letters import CONSONANTS, VOWELS, letters
from smearlens.experiments.pig_latin.task import alignment, pair_tensors
from smearlens.models.base import HookedModel

WORDS = 256  # held-out words that everything is measured on
LOOKED_INTO = ("2 heads", "beast small")
LETTERS_OF = (*LOOKED_INTO, "base", "width 32")
WROTE = ("base", "beast small")
SHOWN = ("brown", "conditioning", "is")  # the words of the write-up
WRONG = {  # words that the write-up's base and its tuned model got wrong, and what they wrote
    "across": "acrosssway",
    "adieus": "adieussway",
    "ankle": "ankleeway",
    "good-humoured": "oodgay-mouray-odha",
    "pleasure-grounds": "easureplay-ouredsplay",
    "strengthening": "engtheneningstra",
    "thoughtfulness": "oughtfulneststhay",
}
VERSION = 2  # of what is asked here


def evidence(model: HookedModel, cell: Cell, *, split: PairSplit) -> dict[str, Any] | None:
    """What is asked of a trained model; None of all but the few that are looked into."""
    found: dict[str, Any] = {}
    if cell.task == "small pairs" and cell.name in LETTERS_OF:
        found["letters"] = letters(model)
    if cell.task == "small pairs" and cell.name in WROTE and cell.seed == 0:
        found["wrong"] = retried(model, split)
    if cell.task == "small pairs" and cell.name in LOOKED_INTO:
        found |= heads(model, cell, split)
    return found or None


def heads(model: HookedModel, cell: Cell, split: PairSplit) -> dict[str, Any]:
    """Scores and interventions of every seed; patterns and embeddings of seed 0."""
    batches = list(equal_lengths(split.validation[:WORDS]))
    if not batches:
        raise ValueError(
            f"of {len(split.validation)} held-out words no two have one length, and words are "
            "compared with others of their length: take more words"
        )
    found: dict[str, Any] = {
        "previous": previous_scores(model, batches),
        "alignment": alignment_scores(model, batches),
        "keys": keys_from_other_words(model, batches),
        "start": start_exchanged(model, batches),
    }
    if cell.seed == 0:
        found["patterns"] = {word: patterns(model, word) for word in SHOWN}
        found["embedding"] = _rounded(_of(model, "encoder.embed").detach())
        if model.config.positions == "learned-sinusoidal":
            found["positions"] = _rounded(model.get_parameter("encoder.pos_embed.table").detach())
    return found


def retried(model: HookedModel, split: PairSplit) -> list[list[str]]:
    """The write-up's mistakes: word, right, the write-up's, ours, whether ours trained on it."""
    known = {word for word, _ in split.train}
    rows = []
    for word, wrong in WRONG.items():
        written = model.translate(pair_tensors(word, "")["source"])[0]  # pyrefly: ignore[not-callable]
        ours = PigLatinVocabulary().decode(written)
        rows.append([word, to_pig_latin(word), wrong, ours, "yes" if word in known else "no"])
    return rows


class Batch:
    """Pairs whose words, and whose translations, have one length.

    Attributes:
        source: word, [EOS]
        target: [SOS], translation, [EOS]
        aligned: source position of the character that each target position predicts, or -1
    """

    def __init__(self, batch: dict[str, Tensor]):
        self.source, self.target = batch["source"], batch["target"]
        words = [PigLatinVocabulary().decode(row) for row in self.source]
        self.aligned = torch.tensor([[*alignment(word), -1, -1] for word in words])

    def right(self, model: HookedModel, hooks: Hooks) -> Bool[Tensor, "batch target"]:
        """Whether each next token of the translation is the likeliest one."""
        with torch.no_grad():
            logits = model.run_with_hooks(self.source, self.target, fwd_hooks=hooks)
        return logits[:, :-1].argmax(-1) == self.target[:, 1:]

    def cache(self, model: HookedModel, points: tuple[str, ...]) -> Any:
        """Activations whose names end so."""
        with torch.no_grad():
            _, cache = model.run_with_cache(
                self.source, self.target, names_filter=lambda name: name.endswith(points)
            )
        return cache


def equal_lengths(pairs: tuple[Pair, ...]) -> Iterator[Batch]:
    """The pairs, by length; lengths that only one pair has are left out: it has no other word."""
    batches = PairBatches(pairs, len(pairs), 0)
    for step in range(batches.steps_per_epoch):
        batch = batches.batch(step)
        if len(batch["source"]) > 1:
            yield Batch(batch)


def previous_scores(model: HookedModel, batches: list[Batch]) -> dict[str, Any]:
    """Mean weight of every encoder head on the token before, [layer][head], and that of chance.

    `self` is the weight on the token itself: what a head has that passes tokens on unchanged.
    """
    layers, uniform = _layers(model, "encoder", "attn"), []
    kinds = {"scores": prev_token_score, "self": self_mass}
    seen: dict[str, dict[str, list[Tensor]]] = {k: {n: [] for n in layers} for k in kinds}
    for batch in batches:
        cache = batch.cache(model, tuple(f"{layer}.hook_pattern" for layer in layers))
        uniform += [1 / batch.source.shape[1]] * len(batch.source)
        for layer in layers:
            for kind, score in kinds.items():
                seen[kind][layer].append(score(cache[f"{layer}.hook_pattern"]))
    found = {k: [_rounded(torch.cat(seen[k][n]).mean(0)) for n in layers] for k in kinds}
    return {**found, "chance": sum(uniform) / len(uniform)}


def alignment_scores(model: HookedModel, batches: list[Batch]) -> dict[str, Any]:
    """Weight of every cross-attention head on the source of the next character, [layer][head].

    Shift -1 is the source token before it: for most characters, the one just written. `first` is
    the weight of [SOS] on the source of the first character.
    """
    layers, uniform = _layers(model, "decoder", "cross_attn"), []
    found: dict[str, Any] = {}
    kinds: dict[str, dict[str, Any]] = {
        "mass": {},
        "accuracy": {"accuracy": True},
        "mass one before": {"shift": -1},
        "first": {},
    }
    for name, options in kinds.items():
        scores: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for batch in batches:
            cache = batch.cache(model, tuple(f"{layer}.hook_pattern" for layer in layers))
            uniform += [1 / batch.source.shape[1]] * len(batch.source)
            aligned = batch.aligned.clone()
            if name == "first":
                aligned[:, 1:] = -1
            for layer in layers:
                pattern = cache[f"{layer}.hook_pattern"]
                scores[layer].append(alignment_mass(pattern, aligned, **options))
        found[name] = [_rounded(torch.cat(scores[layer]).nanmean(0)) for layer in layers]
    return {**found, "chance": sum(uniform) / len(uniform)}


def keys_from_other_words(model: HookedModel, batches: list[Batch]) -> dict[str, Any]:
    """Share of right words when an encoder head tells the cross-attention keys of another word.

    Head by head, [layer][head]: its output is that of another word of the batch, and of all that
    this changes only the keys of cross attention are kept; everything else is as it was. `whole` is
    the share with all of these keys from the other word: what stays right is found by position.
    """
    layers = _layers(model, "encoder", "attn")
    keys = [f"{layer}.hook_k" for layer in _layers(model, "decoder", "cross_attn")]
    n_heads = model.config.n_heads
    right = {(layer, head): 0 for layer in layers for head in range(n_heads)}
    clean = whole = total = 0
    for batch in batches:
        foreign = batch.cache(model, tuple(keys))
        swapped: Hooks = [(key, replace_with(foreign[key].roll(1, 0))) for key in keys]
        whole += int(batch.right(model, swapped).all(1).sum())
        told = batch.cache(model, tuple(f"{layer}.hook_z" for layer in layers))
        clean += int(batch.right(model, []).all(1).sum())
        total += len(batch.source)
        for layer, head in right:
            other = told[f"{layer}.hook_z"].roll(1, 0)
            with model.hooks([(f"{layer}.hook_z", _one_head(other, head))]):
                cache = batch.cache(model, tuple(keys))
            hooks: Hooks = [(key, replace_with(cache[key])) for key in keys]
            right[layer, head] += int(batch.right(model, hooks).all(1).sum())
    changed = [[right[layer, head] / total for head in range(n_heads)] for layer in layers]
    return {"clean": clean / total, "whole": whole / total, "changed": changed}


def start_exchanged(model: HookedModel, batches: list[Batch]) -> dict[str, float]:
    """Share of right first characters with another vector in the place of [SOS]'s embedding.

    The mean of the decoder's vowels, the mean of equally many consonants (averaged over four
    draws), and nothing. Each has the length of the original.
    """
    table = _of(model, "decoder.embed").detach()
    own, generator = table[PigLatinVocabulary.sos], torch.Generator().manual_seed(0)
    draws = [torch.randperm(21, generator=generator)[:5] for _ in range(4)]
    others = torch.tensor(CONSONANTS)
    groups = {
        "clean": [own],
        "vowels": [table[VOWELS].mean(0)],
        "consonants": [table[others[draw]].mean(0) for draw in draws],
        "nothing": [torch.zeros_like(own)],
    }
    found = {}
    for name, vectors in groups.items():
        shares = []
        for vector in vectors:
            vector = vector * own.norm() / vector.norm().clamp_min(1e-12)
            hook = ("decoder.hook_embed", _first(vector))
            first = torch.cat([batch.right(model, [hook])[:, 0] for batch in batches])
            shares.append(float(first.double().mean()))
        found[name] = sum(shares) / len(shares)
    return found


def patterns(model: HookedModel, word: str) -> dict[str, Any]:
    """Every attention pattern on one word and the model's translation of it."""
    vocabulary = PigLatinVocabulary()
    source = pair_tensors(word, "")["source"]
    written = model.translate(source)[0]  # pyrefly: ignore[not-callable]
    target = torch.cat((torch.tensor([vocabulary.sos]), written))[None]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            source, target, names_filter=lambda name: name.endswith("hook_pattern")
        )
    found = {
        kind: [_rounded(cache[f"{n}.hook_pattern"][0]) for n in _layers(model, side, part)]
        for kind, side, part in (
            ("encoder", "encoder", "attn"),
            ("decoder", "decoder", "attn"),
            ("cross", "decoder", "cross_attn"),
        )
    }
    return {
        "source": vocabulary.tokens(source[0]), "target": vocabulary.tokens(target[0]), **found
    }  # fmt: skip


def _one_head(other: Tensor, head: int) -> Any:
    """A hook that gives one head the output in `other`."""

    def swap(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        z[:, :, head] = other[:, :, head]
        return z

    return swap


def _first(vector: Tensor) -> Any:
    """A hook that puts `vector` in the first position."""

    def swap(embedded: Tensor, hook: Any) -> Tensor:
        embedded = embedded.clone()
        embedded[:, 0] = vector
        return embedded

    return swap


def _layers(model: HookedModel, side: str, part: str) -> list[str]:
    return [f"{side}.blocks.{i}.{part}" for i in range(model.config.n_layers)]


def _of(model: HookedModel, module: str) -> Tensor:
    return model.get_parameter(f"{module}.weight")


def _rounded(values: Tensor) -> Any:
    return torch.round(values.double(), decimals=4).tolist()
