"""Where a trained Mamba keeps a word: its states exchanged, held, wiped, its convolution cut.

Each intervention is followed by the question whether the whole translation still comes out right,
word by word, on held-out words. Also the share of negative decays, the weights w_t with A = -1 and
their closed form, and Δ frozen at its mean. Leaves out training and verdicts.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smearlens.analysis.states import retention, state_boundary
from smearlens.causal.ablate import Hooks
from smearlens.causal.states import (
    cut_convolution,
    freeze_delta,
    hold_states,
    read_states,
    set_states,
)
from smearlens.data.pig_latin import Pair, PairSplit, PigLatinVocabulary, to_pig_latin
from smearlens.experiments.grid import Cell
from smearlens.models.base import HookedModel

VERSION = 2  # of what is asked here
WORDS = 128  # held-out words that the interventions are measured on
FEW = 64  # of them, where every decay of every state is kept
OFFSETS = (0, 1, 2, 4)  # tokens after [EOS] at which states are exchanged
SHOWN = ("conditioning", "pleasure-grounds", "is")  # the words of the write-up
MEMORY = ("small, kernel 16", "small", "bilinear", "kernel 4")  # cells that are intervened on


def evidence(model: HookedModel, cell: Cell, *, split: PairSplit) -> dict[str, Any] | None:
    """What is asked of a trained model; None of transformers and of the large list."""
    if cell.model != "Mamba" or cell.task != "small":
        return None
    words, few = Words(split.validation[:WORDS]), Words(split.validation[:FEW])
    found: dict[str, Any] = {"negative_decays": negative_decays(model, few)}
    if cell.config.delta == "selective":
        frozen = freeze_delta(model, words.tokens, mask=words.mask)
        found["frozen_delta"] = {
            "clean": share(words.right(model, [])),
            "frozen": share(words.right(model, frozen)),
        }
    if cell.name in MEMORY:
        found["memory"] = memory(model, words)
        found["exchange"] = {str(offset): exchange(model, words, offset) for offset in OFFSETS}
    if cell.config.a == "minus-one" and cell.config.rule == "mamba":
        found["closed_form"] = closed_form(model, few)
    if cell.config.a == "minus-one" or cell.name in MEMORY:
        found["boundary"] = boundary(model, few)
        found["shown"] = {word: weights(model, word) for word in SHOWN} if cell.seed == 0 else {}
    return found


class Words:
    """Word, [EOS], translation, [EOS] of some pairs, filled up at the end with [EOS].

    Attributes:
        tokens: [batch pos]
        mask: True where a token is real
        end: position of the [EOS] after the word
    """

    def __init__(self, pairs: tuple[Pair, ...], sources: tuple[Pair, ...] | None = None):
        vocabulary, self.pairs = PigLatinVocabulary(), pairs
        eos = torch.tensor([vocabulary.eos])
        words = [vocabulary.encode(word) for word, _ in (sources or pairs)]
        targets = [torch.cat((vocabulary.encode(target), eos)) for _, target in pairs]
        lines = [torch.cat((w, eos, t)) for w, t in zip(words, targets, strict=True)]
        self.tokens = pad_sequence(lines, True, vocabulary.eos)
        self.end = torch.tensor([len(word) for word in words])
        length = torch.tensor([len(line) for line in lines])
        self.mask = torch.arange(self.tokens.shape[1]) < length[:, None]

    def right(self, model: HookedModel, hooks: Hooks, after: int = 0) -> Bool[Tensor, " batch"]:
        """Whether each token of the translation from number `after` on is the likeliest one."""
        with torch.no_grad():
            logits = model.run_with_hooks(self.tokens, fwd_hooks=hooks)
        hit = logits[:, :-1].argmax(-1) == self.tokens[:, 1:]
        place = torch.arange(hit.shape[1])
        asked = (place >= (self.end + after)[:, None]) & self.mask[:, 1:]
        return (hit | ~asked).all(1)


def memory(model: HookedModel, words: Words) -> dict[str, float]:
    """Share of words that are right when one carrier of the word is taken away at its [EOS]."""
    end = words.end
    states = read_states(model, words.tokens, end)
    wiped = {layer: torch.zeros_like(state) for layer, state in states.items()}
    return {
        "clean": share(words.right(model, [])),
        "states wiped at [EOS]": share(words.right(model, set_states(model, wiped, end))),
        "convolution cut at [EOS]": share(words.right(model, cut_convolution(model, end))),
        "nothing written after [EOS]": share(words.right(model, hold_states(model, end + 1))),
    }


def exchange(model: HookedModel, words: Words, offset: int) -> dict[str, float | int]:
    """Share of words whose translation follows what was exchanged, on words of equal lengths.

    Before the token `offset` places after [EOS] the sequence is another word's, from it on this
    word's translation. Put in there are this word's states, its convolutions' windows, or both:
    right as far as they carry the word. Both are all that the recurrence holds, and must give this
    word's own run; its own states put into its own run must change nothing; a third word's states
    are what the exchange does by being one.
    """
    triples = same_length(words, offset)
    mine, mixed = _mixed(words, [(i, j) for i, j, _ in triples], offset)
    third = Words(tuple(words.pairs[k] for _, _, k in triples))
    at = mine.end + offset
    states = read_states(model, mine.tokens, at)
    moved = set_states(model, states, at)
    window = exchange_window(model, mine.tokens, at)
    foreign = set_states(model, read_states(model, third.tokens, at), at)

    def follow(hooks: Hooks, sequence: Words = mixed) -> float:
        return share(sequence.right(model, hooks, offset))

    return {
        "words": len(triples),
        "clean": follow([], mine),
        "own states": follow(moved, mine),
        "not exchanged": follow([]),
        "states": follow(moved),
        "states, convolution cut": follow([*moved, *cut_convolution(model, at)]),
        "windows": follow(window),
        "states and windows": follow([*moved, *window]),
        "a third word's states": follow(foreign),
    }


def same_length(words: Words, offset: int) -> list[tuple[int, int, int]]:
    """Each word with two others as long, all with translations that reach beyond `offset`."""
    groups: dict[int, list[int]] = {}
    for i, (word, target) in enumerate(words.pairs):
        if len(target) > offset:
            groups.setdefault(len(word), []).append(i)
    found = []
    for group in groups.values():
        for n, i in enumerate(group if len(group) > 2 else []):
            found.append((i, group[n - 1], group[n - 2]))
    if not found:
        raise ValueError(
            f"no three of {len(words.pairs)} words have one length and translations of more than "
            f"{offset} letters: take more words"
        )
    return found


def _mixed(words: Words, pairs: list[tuple[int, int]], offset: int) -> tuple[Words, Words]:
    """Words i, and the sequences that are word j's before the exchange and word i's from it on."""
    mine = Words(tuple(words.pairs[i] for i, _ in pairs))
    theirs = tuple(words.pairs[j] for _, j in pairs)
    mixed = Words(mine.pairs, sources=theirs)
    for row, (_, target) in enumerate(theirs):  # the token at the exchange is this word's again
        before = PigLatinVocabulary().encode(target)[: max(offset - 1, 0)]
        start = int(mixed.end[row]) + 1
        mixed.tokens[row, start : start + len(before)] = before
    return mine, mixed


def exchange_window(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], at: Int[Tensor, " batch"]
) -> Hooks:
    """Hooks after which convolutions, from position `at` on, see the past of a run on `tokens`.

    Up to `at` their inputs are those on `tokens`; what they put out before it stays as it is, and
    with it all that was written into the states.
    """
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith("conv.hook_in")
        )
    names = [name.removesuffix(".hook_in") for name in cache.keys()]  # noqa: SIM118
    return [h for n in names for h in _window(model.mod_dict[n], n, cache[f"{n}.hook_in"], at)]


def _window(conv: Any, name: str, own: Tensor, at: Int[Tensor, " batch"]) -> Hooks:
    place, kept = torch.arange(own.shape[1]), {}

    def keep(x: Tensor, hook: Any) -> None:
        kept[name] = x

    def put(out: Tensor, hook: Any) -> Tensor:
        x = torch.where((place <= at[:, None])[..., None], own, kept.pop(name))
        seen = torch.zeros_like(out) + conv.bias
        for tap, lag in enumerate(conv.lags):
            seen[:, lag:] += conv.weight[:, tap] * x[:, : x.shape[1] - lag]
        return torch.where((place >= at[:, None])[..., None], seen, out)

    return [(f"{name}.hook_in", keep), (f"{name}.hook_out", put)]


def negative_decays(model: HookedModel, words: Words) -> float:
    """Share of the entries of A_bar below 0 at real tokens."""
    found, count = 0.0, 0
    for A_bar, _ in _pairs(model, words.tokens).values():
        real = A_bar[words.mask]
        found, count = found + float((real < 0).sum()), count + real.numel()
    return found / count


def boundary(model: HookedModel, words: Words) -> dict[str, list[float]]:
    """Per layer: how much is written after [EOS] relative to before, and what is left at the end.

    The mean over words and channels of `analysis.states.state_boundary`.
    """
    writes, kept = [], []
    for A_bar, B_bar in _pairs(model, words.tokens).values():
        found = state_boundary(A_bar, B_bar, words.end, mask=words.mask)
        writes.append(float(found.write_ratio.nanmean()))
        kept.append(float(found.retention.mean()))
    return {"write_ratio": writes, "retention": kept}


def closed_form(model: HookedModel, words: Words) -> dict[str, float]:
    r"""Error of $h_t = \sum_s w_s Δ_s B_s u_s$ against the model's states, in units of the largest.

    w_s = exp(-Σ Δ_k) with the sum from s + 1 to t; and with token s decayed by its own step too.
    """
    points = ("hook_delta", "hook_B", "hook_u", "hook_state")
    with torch.no_grad():
        _, cache = model.run_with_cache(
            words.tokens, names_filter=lambda name: name.rpartition(".")[2] in points
        )
    errors: dict[str, float] = {"from s + 1": 0.0, "from s": 0.0}
    for layer in {name.rpartition(".")[0] for name in cache.keys()}:  # noqa: SIM118
        delta, B, u, state = (cache[f"{layer}.{point}"].double() for point in points)
        write = (delta * u)[..., None] * B[:, :, None]
        total = delta.cumsum(1)  # [batch pos channel]
        for name, own in (("from s + 1", 0.0), ("from s", 1.0)):
            h = torch.zeros_like(state)
            for t in range(state.shape[1]):
                weight = torch.exp(total[:, : t + 1] - total[:, t, None] - own * delta[:, : t + 1])
                h[:, t] = (weight[..., None] * write[:, : t + 1]).sum(1)
            error = float((h - state).abs().max() / state.abs().max())
            errors[name] = max(errors[name], error)
    return errors


def weights(model: HookedModel, word: str) -> dict[str, Any]:
    """Per layer and token of a word and the model's translation: w_t (retention to the end), Δ."""
    words = Words(((word, to_pig_latin(word)),))
    with torch.no_grad():
        _, cache = model.run_with_cache(
            words.tokens, names_filter=lambda name: name.endswith("hook_delta")
        )
    pairs = _pairs(model, words.tokens)
    return {
        "tokens": PigLatinVocabulary().tokens(words.tokens[0]),
        "weight": [_rounded(retention(A_bar)[0].mean((1, 2))) for A_bar, _ in pairs.values()],
        "delta": [_rounded(cache[f"{layer}.hook_delta"][0].mean(1)) for layer in pairs],
    }


def share(right: Bool[Tensor, " batch"]) -> float:
    """Fraction that is True."""
    return float(right.double().mean())


def _pairs(
    model: HookedModel, tokens: Int[Tensor, "batch pos"]
) -> dict[str, tuple[Float[Tensor, "..."], Float[Tensor, "..."]]]:
    """A_bar and B_bar of every layer, by its name."""
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, names_filter=lambda name: name.endswith(("hook_A_bar", "hook_B_bar"))
        )
    layers = sorted({name.rpartition(".")[0] for name in cache.keys()})  # noqa: SIM118
    return {n: (cache[f"{n}.hook_A_bar"], cache[f"{n}.hook_B_bar"]) for n in layers}


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]
