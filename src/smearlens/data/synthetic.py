"""Synthetic token tasks: repeated blocks, independent tokens, multi-query recall.

Every task draws a batch from the generator it is given; `step_generator` makes one for each step of
a run. Leaves out the batches of a run (`smearlens.data.batches`) and text of any kind.
"""

from __future__ import annotations

from numbers import Integral

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from smearlens._explain import explained


@explained
def repeated_tokens(
    batch: int,
    period: int | tuple[int, int],
    length: int,
    d_vocab: int,
    generator: torch.Generator,
    *,
    bos: int | None = None,
) -> Int64[Tensor, "batch length"]:
    """Blocks of distinct random tokens, repeated until the sequence is full.

    `period=3, length=8:  7 1 4 7 1 4 7 1`; the second 7 should attend to the 1 that followed the
    first. Within a block no token occurs twice, so the token to attend to is never ambiguous. The
    last repeat may be cut off.

    >>> generator = torch.Generator().manual_seed(0)
    >>> tokens = repeated_tokens(2, 3, 8, 9, generator=generator)
    >>> tokens.shape, bool((tokens[:, 3:] == tokens[:, :5]).all())
    (torch.Size([2, 8]), True)

    Args:
        batch: number of sequences
        period: tokens in a block, or `(low, high)`, both included: drawn for each sequence. With a
            fixed period a head that always looks `period - 1` back passes for an induction head.
        length: tokens in a sequence, `bos` included
        d_vocab: tokens are drawn from `0 .. d_vocab - 1`, `bos` left out
        generator: the source of randomness
        bos: a token to put in front of every sequence

    Returns:
        the tokens

    Raises:
        ValueError: if a block has fewer than 2 tokens, more than the vocabulary holds, or so many
            that nothing repeats within `length`

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads", repeated random tokens
    """
    low, high = (period, period) if isinstance(period, (int, Integral)) else period
    _check_positive(batch=batch, length=length, d_vocab=d_vocab)
    _check_period(low, high, length, d_vocab, bos)
    block = _distinct(batch, high, 0, d_vocab - (bos is not None), generator)
    if bos is not None:
        block += block >= bos  # the ids from bos on move up by one: bos is never drawn
    device = generator.device
    periods = torch.randint(low, high + 1, (batch, 1), generator=generator, device=device)
    tokens = block.gather(1, torch.arange(length - (bos is not None), device=device) % periods)
    if bos is None:
        return tokens
    return torch.cat((torch.full((batch, 1), bos, device=device), tokens), dim=1)


def repeated_random(
    batch: int,
    period: int,
    n_repeats: int,
    d_vocab: int,
    generator: torch.Generator,
    *,
    bos: int | None = None,
) -> Int64[Tensor, "batch pos"]:
    """Blocks of `period` distinct random tokens, each repeated exactly `n_repeats` times.

    `period=3, n_repeats=2, bos=0:  0 7 1 4 7 1 4`. Olsson et al. 2022 use period 25, 4 repeats and
    a start token; TransformerLens' demos period 50, 2 repeats and a start token.

    >>> generator = torch.Generator().manual_seed(0)
    >>> tokens = repeated_random(2, 3, 4, 9, generator=generator, bos=0)
    >>> tokens.shape, tokens[:, 0].tolist(), bool((tokens[:, 1:10] == tokens[:, 4:]).all())
    (torch.Size([2, 13]), [0, 0], True)

    Args:
        batch: number of sequences
        period: tokens in a block
        n_repeats: times a block occurs, at least 2
        d_vocab: tokens are drawn from `0 .. d_vocab - 1`, `bos` left out
        generator: the source of randomness
        bos: a token to put in front of every sequence

    Returns:
        the tokens; `pos` is `period * n_repeats`, and one more with `bos`

    Raises:
        ValueError: if `n_repeats` is below 2, or as `repeated_tokens`
    """
    if n_repeats < 2:
        raise ValueError(
            f"n_repeats must be at least 2, got {n_repeats}: one block repeats nothing"
        )
    length = period * n_repeats + (bos is not None)
    return repeated_tokens(batch, period, length, d_vocab, generator=generator, bos=bos)


@explained
def iid_tokens(
    batch: int, length: int, d_vocab: int, *, generator: torch.Generator
) -> Int64[Tensor, "batch length"]:
    """Independent uniform tokens: nothing can be predicted, the best loss is `ln(d_vocab)` nats.

    A model that does better reads the token it is asked for.

    >>> iid_tokens(2, 3, 1, generator=torch.Generator().manual_seed(0)).tolist()
    [[0, 0, 0], [0, 0, 0]]

    Args:
        batch: number of sequences
        length: tokens in a sequence
        d_vocab: tokens are drawn from `0 .. d_vocab - 1`
        generator: the source of randomness

    Returns:
        the tokens

    Raises:
        ValueError: if a size is below 1
    """
    _check_positive(batch=batch, length=length, d_vocab=d_vocab)
    size = (batch, length)
    return torch.randint(d_vocab, size, generator=generator, device=generator.device)


def multi_query_recall(
    batch: int,
    length: int,
    n_pairs: int,
    d_vocab: int,
    *,
    generator: torch.Generator,
    power: float = 0.01,
    noise: bool = True,
    ignore_index: int = -100,
) -> tuple[Int64[Tensor, "batch length"], Int64[Tensor, "batch length"]]:
    """Multi-query associative recall (MQAR): key-value pairs, later each key once more.

    With `n_pairs=2, length=10, d_vocab=12, noise=False` (· is `ignore_index`)::

        tokens  2 8 4 7  4 0 0 0 2 0      keys 1..5, values 6..11, filler 0
        labels  · · · ·  7 · · · 8 ·      at the second 4 the answer is 7, at the second 2 it is 8

    Unlike `tokens[:, 1:]`, a label stands at the position of its query: the answer itself does not
    follow in the sequence. The distance from the end of the pairs to a query follows a power law.

    >>> generator = torch.Generator().manual_seed(0)
    >>> tokens, labels = multi_query_recall(3, 10, 2, 12, generator=generator, noise=False)
    >>> query = labels[0] != -100
    >>> sorted(tokens[0, query].tolist()) == sorted(tokens[0, :4:2].tolist())
    True

    Args:
        batch: number of sequences
        length: tokens in a sequence: `2 * n_pairs` for the pairs and as many at least for queries
        n_pairs: key-value pairs in a sequence; no key and no value occurs in two of them
        d_vocab: keys are `1 .. d_vocab // 2 - 1`, values `d_vocab // 2 .. d_vocab - 1`
        generator: the source of randomness
        power: the g-th query slot, counted from 1, is drawn with weight `g ** (power - 1)`:
            1 is uniform
        noise: fill the positions between the queries with tokens of the whole vocabulary, as in the
            paper's code, rather than with 0
        ignore_index: the label of every position that is not a query

    Returns:
        tokens and labels

    Raises:
        ValueError: if the pairs do not fit into the length or the vocabulary

    Source:
        Arora et al. 2023, "Zoology: Measuring and Improving Recall in Efficient Language Models"
    """
    _check_positive(batch=batch, length=length, n_pairs=n_pairs, d_vocab=d_vocab)
    _check_recall(length, n_pairs, d_vocab)
    device, half, n_slots = generator.device, d_vocab // 2, length // 2 - n_pairs
    keys = _distinct(batch, n_pairs, 1, half, generator)
    values = _distinct(batch, n_pairs, half, d_vocab, generator)
    pairs = torch.stack((keys, values), dim=-1).flatten(1)

    # The largest of log-weights plus Gumbel noise are draws without replacement, in order.
    uniform = torch.rand(batch, n_slots, generator=generator, device=device, dtype=torch.float64)
    slots = torch.arange(1, n_slots + 1, device=device, dtype=torch.float64)
    slot = ((power - 1) * slots.log() - (-uniform.log()).log()).topk(n_pairs).indices
    query = 2 * (n_pairs + slot)

    tokens = torch.zeros(batch, length, dtype=torch.int64, device=device)
    if noise:
        tokens.random_(d_vocab, generator=generator)
    tokens[:, : 2 * n_pairs] = pairs
    labels = torch.full_like(tokens, ignore_index)
    return tokens.scatter_(1, query, keys), labels.scatter_(1, query, values)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator for each step of a run, the same in every process.

    torch's CPU generator reads 32 bits of its seed. Multiplying by an odd number permutes them:
    no two of the first 2**32 steps of a run share a stream.

    >>> step_generator(0, 3).initial_seed() == step_generator(0, 4).initial_seed()
    False
    """
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must be at least 0, got seed={seed}, step={step}")
    origin = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((origin + step * 0x9E3779B1) % 2**32)


def _distinct(
    batch: int, count: int, low: int, high: int, generator: torch.Generator
) -> Int64[Tensor, "batch count"]:
    """Rows of `count` different integers of `low .. high - 1`, in every order equally likely."""
    size, device = (batch, high - low), generator.device
    scores = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
    return scores.topk(count).indices + low


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _check_period(low: int, high: int, length: int, d_vocab: int, bos: int | None) -> None:
    if not 2 <= low <= high:
        raise ValueError(f"period must be at least 2, as n or (low, high), got ({low}, {high})")
    if bos is not None and not 0 <= bos < d_vocab:
        raise ValueError(f"bos={bos} must be a token, 0..{d_vocab - 1}, or None")
    drawn_from, room = d_vocab - (bos is not None), length - (bos is not None)
    if high > drawn_from:
        raise ValueError(
            f"period={high} needs as many different tokens, but d_vocab={d_vocab}, bos={bos} leave "
            f"{drawn_from}: shorten the period or enlarge the vocabulary"
        )
    if high >= room:
        raise ValueError(
            f"period={high} leaves nothing to repeat in length={length}, bos={bos}: "
            f"use a period of at most {room - 1} or a longer sequence"
        )


def _check_recall(length: int, n_pairs: int, d_vocab: int) -> None:
    if length < 4 * n_pairs:
        raise ValueError(
            f"length={length} is too short for n_pairs={n_pairs}: pairs and queries take "
            f"{4 * n_pairs} positions"
        )
    if d_vocab // 2 - 1 < n_pairs:
        raise ValueError(
            f"d_vocab={d_vocab} has {max(d_vocab // 2 - 1, 0)} keys, n_pairs={n_pairs} needs as "
            f"many: use a vocabulary of at least {2 * n_pairs + 2}"
        )
