"""What the study of attention over training takes from a trained model: how it writes.

Samples with their attention and their quality, and the same with attention changed. Leaves out what
is tracked while a model trains (`logs`), verdicts and report.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from smearlens.analysis.coherence import coherence
from smearlens.analysis.mixing.kinds import SoftmaxMixing
from smearlens.analysis.mixing.layer_streams import head_statistics
from smearlens.analysis.mixing.layers import mixings
from smearlens.analysis.text import diversity, repetition
from smearlens.data.tokenizers import Tokenizer
from smearlens.experiments.grid import Cell
from smearlens.models.base import HookedModel

TEMPERATURES = (0.5, 0.8, 1.1)  # of the samples
USUAL = 0.8  # the one at which attention is intervened on
SHARPER = (2.0, 1.4, 0.7, 0.5)  # factors on attention scores
OTHER_HEADS = 3  # knocked out for comparison
QUALITIES = ("diversity", "repetition", "coherence", "words", "quality")
Hooks = list[tuple[str, Callable]]
Numbers = dict[str, Any]


def after_training(
    model: HookedModel,
    cell: Cell,
    *,
    prompts: Int[Tensor, "prompt pos"],
    tokenizer: Tokenizer,
    words: frozenset[str],
    new_tokens: int,
    samples: int,
) -> Numbers:
    """Samples of every prompt and temperature, and of the usual one with attention changed."""
    many = prompts.repeat_interleave(samples, 0)
    judged = partial(text_quality, prompt=prompts.shape[1], tokenizer=tokenizer, words=words)
    columns: dict[str, list[float]] = {}
    texts = []
    for temperature in TEMPERATURES:
        written = write(model, many, new_tokens, temperature, [])
        numbers = judged(written) | sample_attention(model, written, prompts.shape[1])
        group = {"prompt": torch.arange(len(prompts)).repeat_interleave(samples)}
        group["temperature"] = torch.full((len(many),), temperature, dtype=torch.float64)
        for name, values in (group | numbers).items():
            columns.setdefault(name, []).extend(round(float(v), 5) for v in values)
        texts.append([temperature, tokenizer.decode(written[0])])
    return {
        **after_plain_training(prompts)(model, cell),
        "samples": columns,
        "texts": texts if cell.seed == 0 else [],
        "interventions": interventions(model, many, new_tokens, judged),
    }


def after_plain_training(prompts: Int[Tensor, "prompt pos"]) -> Callable[..., Numbers]:
    """A function from a trained model to the fingerprint of what it writes."""

    def fingerprint(model: HookedModel, cell: Cell) -> Numbers:
        written = write(model, prompts[:2], 8, USUAL, [])
        return {"written_sha256": hashlib.sha256(repr(written.tolist()).encode()).hexdigest()}

    return fingerprint


def write(
    model: Any, prompts: Tensor, new_tokens: int, temperature: float, hooks: Hooks
) -> Int[Tensor, "sample pos"]:
    """Prompts and their continuations, from the same random numbers each time."""
    generator = torch.Generator().manual_seed(1)
    with model.hooks(hooks):
        return model.generate(prompts, new_tokens, temperature=temperature, generator=generator)


def text_quality(
    written: Int[Tensor, "sample pos"], *, prompt: int, tokenizer: Tokenizer, words: frozenset[str]
) -> dict[str, Float[Tensor, " sample"]]:
    """How good each continuation is, by numbers that need no judge.

    Returns:
        "diversity" and "repetition" of character n-grams (`analysis.text`); "coherence": lexical
        cosine with the prompt; "words": share of the characters in whole words whose word stands
        in the training text; "quality": diversity · words, low for what repeats itself and for
        what is no language
    """
    asked = [tokenizer.decode(row[:prompt]) for row in written]
    given = [tokenizer.decode(row[prompt:]) for row in written]
    known = torch.tensor([_known(text, words) for text in given], dtype=torch.float64)
    varied = diversity(given, unit="char")
    return {
        "diversity": varied,
        "repetition": repetition(given, unit="char"),
        "coherence": coherence(asked, given).values.nan_to_num(),
        "words": known,
        "quality": varied * known,
    }


def _known(text: str, words: frozenset[str]) -> float:
    """Share of the characters of whole words that stand in words of the training text."""
    whole = text.split()[1:-1]  # the first and the last may be cut
    return sum(len(w) for w in whole if w in words) / max(1, sum(map(len, whole)))


@torch.no_grad()
def sample_attention(
    model: HookedModel, written: Int[Tensor, "sample pos"], prompt: int
) -> dict[str, Float[Tensor, " sample"]]:
    """What attention did while it wrote each sample; means over new tokens, layers and heads.

    Returns:
        "entropy": over log of the keys; "distance": tokens; "dominance": share of the strongest
        head in the summed norms of what a layer's heads add, 1 / heads if all add alike
    """
    rows, found = slice(prompt - 1, -1), []
    layers, added = _attention(model, written)
    for layer, mixing in layers.items():
        seen = head_statistics(mixing, rows=rows)
        norms = added[layer][:, rows].mean(1)
        found.append(torch.stack([
            seen["normalised_entropy"].mean(1), seen["distance"].mean(1),
            (norms.amax(1) / norms.sum(1)).double(),
        ]))  # fmt: skip
    return dict(zip(("entropy", "distance", "dominance"), torch.stack(found).mean(0), strict=True))


def _attention(
    model: HookedModel, tokens: Tensor
) -> tuple[dict[str, SoftmaxMixing], dict[str, Float[Tensor, "sample pos head"]]]:
    """Every layer's mixing, and the norms of what each head adds to the stream."""
    ends = (".attn.hook_q", ".attn.hook_k", ".attn.hook_z")
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: name.endswith(ends))
    named = {name: cache[name] for name in cache}
    layers = {n: m for n, m in mixings(named).items() if isinstance(m, SoftmaxMixing)}
    added = {}
    for layer in layers:
        out = model.get_submodule(layer).W_O
        z = named[f"{layer}.hook_z"]
        added[layer] = torch.einsum("bphd,hdm->bphm", z, out).norm(dim=-1)
    return layers, added


def interventions(
    model: HookedModel,
    prompts: Int[Tensor, "sample pos"],
    new_tokens: int,
    judged: Callable[[Tensor], Mapping[str, Tensor]],
) -> dict[str, dict[str, float]]:
    """Mean qualities of samples written with attention changed, by name of the change.

    "scores x 2": attention scores doubled in every head, which focuses it (x 0.5 spreads it);
    "dominant head": without the head that adds the largest share of its layer; "other head": mean
    over 3 other heads.
    """

    def qualities(hooks: Hooks) -> dict[str, float]:
        found = judged(write(model, prompts, new_tokens, USUAL, hooks))
        return {name: round(float(values.mean()), 5) for name, values in found.items()}

    found = {"none": qualities([])}
    for factor in SHARPER:
        found[f"scores x {factor:g}"] = qualities(_scaled(model, factor))
    with torch.no_grad():
        _, added = _attention(model, prompts)
    shares = torch.stack([n.mean((0, 1)) / n.mean((0, 1)).sum() for n in added.values()])
    heads = [divmod(int(i), shares.shape[1]) for i in shares.flatten().argsort(descending=True)]
    order = torch.randperm(len(heads) - 1, generator=torch.Generator().manual_seed(0))
    others = [heads[1 + int(i)] for i in order[:OTHER_HEADS]]
    found["dominant head"] = qualities(_without(list(added), heads[0]))
    each = [qualities(_without(list(added), head)) for head in others]
    found["other head"] = {key: statistics.fmean(q[key] for q in each) for key in QUALITIES}
    return found


def _scaled(model: HookedModel, factor: float) -> Hooks:
    names = [name for name in model.hook_dict if name.endswith("attn.hook_attn_scores")]
    return [(name, lambda scores, hook: scores * factor) for name in names]


def _without(layers: Sequence[str], head: tuple[int, int]) -> Hooks:
    def remove(z: Tensor, hook: Any) -> Tensor:
        return z.index_fill(2, torch.tensor([head[1]]), 0.0)

    return [(f"{layers[head[0]]}.hook_z", remove)]
