"""What the study of long contexts measures: repeats by gap, loss by position, recall by distance.

Leaves out the grid (`study`), verdicts and report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from smearlens.analysis.behaviour import per_token_loss
from smearlens.data.synthetic import step_generator
from smearlens.experiments.grid import Cell
from smearlens.models.base import HookedModel

BLOCK = 16  # tokens that come back
EXAMPLES = 32  # sequences per gap
LONG_WINDOWS = 6  # of held-out text at full length
SHORT_WINDOWS = 128  # at the trained length
NEAR, FAR = 16, 64  # tokens back to the last occurrence: near, middle, far
RARE = 0.25  # quantile of the training frequency of recalled bigrams
Numbers = dict[str, Any]


# Repeats at a gap ------------------------------------------------------------------------------


class Gapped(NamedTuple):
    """Sequences in which a block comes back, and which of their tokens it predicts."""

    tokens: Int64[Tensor, "batch length"]
    targets: Bool[Tensor, "batch length"]


def gap_tokens(
    batch: int,
    gap: int | tuple[int, int],
    length: int,
    d_vocab: int,
    *,
    copies: int | None = None,
    generator: torch.Generator,
) -> Gapped:
    """A block of 16 distinct tokens that comes back every `gap` tokens, noise of others elsewhere.

    Blocks use the first half of the vocabulary, the noise the second: nothing but an earlier copy
    tells what follows. With blocks of 3 and a gap of 5: `9 2 0 1 8 7 2 0 1`. A sequence ends with a
    copy; targets are the tokens of all copies but the first, without the first token of each.

    Args:
        batch: sequences
        gap: tokens from copy to copy, at least a block; from a range it is drawn log-uniformly
        length: tokens of a sequence
        d_vocab: kinds of tokens
        copies: of the block; None = as many as fit
        generator: of everything drawn

    Raises:
        ValueError: if two copies would overlap or not fit
    """
    low, high = (gap, gap) if isinstance(gap, int) else gap
    if not BLOCK <= low <= high <= length - BLOCK or d_vocab < 2 * BLOCK:
        raise ValueError(
            f"need {BLOCK} <= gap <= {length - BLOCK} and d_vocab >= {2 * BLOCK}, got gap={gap}, "
            f"length={length}, d_vocab={d_vocab}"
        )
    half = d_vocab // 2
    noise = torch.randint(half, d_vocab, (batch, length), generator=generator)
    block = torch.rand(batch, half, generator=generator).argsort(1)[:, :BLOCK]
    share = torch.rand(batch, 1, generator=generator, dtype=torch.float64)
    gaps = (low * ((high + 1) / low) ** share).long().clamp(low, high)
    fit = (length - BLOCK) // gaps + 1
    fit = fit if copies is None else fit.clamp_max(copies)
    from_end = torch.arange(length).flip(0)
    copy, place = from_end // gaps, from_end % gaps
    inside, place = (place < BLOCK) & (copy < fit), (BLOCK - 1 - place).clamp_min(0)
    tokens = torch.where(inside, block.gather(1, place), noise)
    return Gapped(tokens, inside & (copy < fit - 1) & (place > 0))


@dataclass(frozen=True)
class GapBatches:
    """Fresh `gap_tokens` at every step; only what an earlier copy predicts counts as a target."""

    batch_size: int
    gap: int | tuple[int, int]
    length: int
    d_vocab: int
    seed: int

    def batch(self, step: int) -> dict[str, Tensor]:
        """The sequences of a step."""
        generator = step_generator(self.seed, step)
        size = (self.batch_size, self.gap, self.length, self.d_vocab)
        tokens, targets = gap_tokens(*size, generator=generator)
        return {"tokens": tokens, "loss_mask": targets}


@torch.no_grad()
def gap_scores(model: Any, tokens: Int[Tensor, "batch pos"]) -> dict[str, float]:
    """Accuracy and loss on the last copy of the block, its first token left out."""
    logits, answers = model(tokens)[:, -BLOCK:-1], tokens[:, 1 - BLOCK :]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), answers.flatten())
    accuracy = (logits.argmax(-1) == answers).double().mean()
    return {"loss": float(loss), "accuracy": float(accuracy)}


def on_repeats(model: HookedModel, cell: Cell, *, length: int, longest: int) -> Numbers:
    """Accuracy by gap, a block and one copy, in sequences of the trained length, 4 and 16 times."""
    found: Numbers = {"by_length": {}}
    size = length
    while size <= min(longest, model.config.n_ctx):
        row = {}
        for gap in _gaps(size):
            tokens, _ = gap_tokens(
                EXAMPLES, gap, size, model.config.d_vocab, copies=2,
                generator=torch.Generator().manual_seed(gap),
            )  # fmt: skip
            scores = [gap_scores(model, part)["accuracy"] for part in tokens.split(8)]
            row[str(gap)] = sum(scores) / len(scores)
        found["by_length"][str(size)] = row
        size *= 4
    return found


def _gaps(length: int) -> list[int]:
    """Doubling from a block on, and the longest that fits."""
    found, gap = [], BLOCK
    while gap < length - BLOCK:
        found.append(gap)
        gap *= 4
    return [*found, length - BLOCK]


# Text ------------------------------------------------------------------------------------------


def windows(
    tokens: Int64[Tensor, " pos"], length: int, count: int
) -> Int64[Tensor, "window length"]:
    """At most `count` windows spread evenly over a text, as many as fit without overlap.

    Raises:
        ValueError: if the text is shorter than one window
    """
    count = min(count, len(tokens) // length)
    if count < 1:
        raise ValueError(f"held-out text of {len(tokens)} tokens is shorter than {length}")
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return tokens[starts[:, None] + torch.arange(length)]


@torch.no_grad()
def text_loss_of(model: Any, tokens: Int[Tensor, "window pos"]) -> dict[str, float]:
    """Mean loss on the windows, nats per token."""
    return {"loss": float(_losses(model, tokens).double().mean())}


@torch.no_grad()
def on_text(
    model: HookedModel,
    cell: Cell,
    *,
    train: Int64[Tensor, " n_train"],
    held_out: Int64[Tensor, " n_held_out"],
    length: int,
    longest: int,
) -> Numbers:
    """Loss at the trained length, recall by distance and frequency, and loss by position beyond."""
    short = windows(held_out, length, SHORT_WINDOWS)
    losses = _losses(model, short)
    found: Numbers = {"val_loss": float(losses.double().mean()), **recall(losses, short, train)}
    if model.config.n_ctx >= longest:
        long = windows(held_out, longest, LONG_WINDOWS)
        found["beyond"] = beyond(model, long, length)
    return found


def beyond(model: HookedModel, tokens: Int[Tensor, "window pos"], length: int) -> list[Numbers]:
    """Loss by position with the whole context, beside the same tokens with a trained one.

    Args:
        model: with an `n_ctx` that the windows fit
        tokens: long windows
        length: the trained length; the short context of a token is half of that to all of it

    Returns:
        a row for each doubling of the position: from, to, loss, loss with the short context
    """
    whole = torch.cat([_losses(model, window[None]) for window in tokens])
    half = length // 2
    pieces = tokens.unfold(1, length, half)  # [window piece length]
    recent = _losses(model, pieces.flatten(0, 1))[:, half - 1 :]
    recent = recent.unflatten(0, pieces.shape[:2]).flatten(1)  # targets from `half` on
    rows, start = [], half
    while start < tokens.shape[1]:
        stop = min(2 * start, half + recent.shape[1])
        rows.append({
            "from": start, "to": stop,
            "loss": float(whole[:, start - 1 : stop - 1].double().mean()),
            "short": float(recent[:, start - half : stop - half].double().mean()),
        })  # fmt: skip
        start *= 2
    return rows


def recall(
    losses: Float[Tensor, "window target"],
    tokens: Int[Tensor, "window pos"],
    train: Int64[Tensor, " n_train"],
) -> Numbers:
    """Loss on targets whose bigram stood earlier in the window, by distance and by frequency.

    The split of Arora et al. 2023 ("AR hits"), refined: "rare" are the quarter of hits whose bigram
    is rarest in the training text; distances are to the last occurrence.

    Returns:
        "recall": rows of distance, frequency, loss, n; "rare_far": for each window the mean loss
        on rare, far hits, None without any
    """
    gap = distance(tokens)
    frequency = _frequency(tokens, train)
    hit = gap > 0
    rare = frequency <= torch.quantile(frequency[hit].double(), RARE) if hit.any() else hit
    kinds = {"near": hit & (gap < NEAR), "middle": hit & (gap >= NEAR) & (gap < FAR),
             "far": hit & (gap >= FAR)}  # fmt: skip
    rows = [_row("new", "all", losses, ~hit), _row("hit", "all", losses, hit)]
    for name, chosen in kinds.items():
        rows.append(_row(name, "rare", losses, chosen & rare))
        rows.append(_row(name, "common", losses, chosen & ~rare))
    chosen = kinds["far"] & rare
    each = [float(x[c].double().mean()) if c.any() else None
            for x, c in zip(losses, chosen, strict=True)]  # fmt: skip
    return {"recall": rows, "rare_far": [None if v is None else round(v, 5) for v in each]}


def distance(tokens: Int[Tensor, "window pos"]) -> Int64[Tensor, "window target"]:
    """Tokens back to the last earlier occurrence of each bigram, by its second token; 0 if none."""
    pair = tokens[:, :-1] * (int(tokens.max()) + 1) + tokens[:, 1:]
    place = torch.arange(1, pair.shape[1] + 1)
    earlier = (pair[:, :, None] == pair[:, None, :]).tril(-1)
    last = (earlier * place).amax(-1)
    return torch.where(last > 0, place - last, 0)


def _frequency(
    tokens: Int[Tensor, "window pos"], train: Int64[Tensor, " n_train"]
) -> Int64[Tensor, "window target"]:
    """How often each target's bigram stands in the training text."""
    size = int(max(tokens.max(), train.max())) + 1
    counts = torch.bincount(train[:-1] * size + train[1:], minlength=size * size)
    return counts[tokens[:, :-1] * size + tokens[:, 1:]]


def _row(
    name: str,
    frequency: str,
    losses: Float[Tensor, "window target"],
    chosen: Bool[Tensor, "window target"],
) -> Numbers:
    n = int(chosen.sum())
    loss = float(losses[chosen].double().mean()) if n else None
    return {"distance": name, "frequency": frequency, "loss": loss, "n": n}


def _losses(model: Any, tokens: Int[Tensor, "window pos"]) -> Float[Tensor, "window target"]:
    parts = tokens.split(max(1, 2**14 // tokens.shape[1]))
    return torch.cat([per_token_loss(model(part), part) for part in parts])
