"""Batches as a pure function of the step, from tokens in memory or on disk.

`batch(step)` depends on nothing but the step and the arguments of the object: a run resumes at any
step, in any process, without a state of the data. Leaves out word pairs (pig_latin.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, Int64, Integer
from torch import Tensor

from smearlens._explain import explained
from smearlens.data.shards import ShardedTokens
from smearlens.data.synthetic import repeated_tokens, step_generator

Tokens = Int[Tensor, " n_tokens"] | Integer[np.ndarray, " n_tokens"] | ShardedTokens


@runtime_checkable
class Batches(Protocol):
    """A source of training data without a state."""

    def batch(self, step: int) -> dict[str, Tensor]:
        """Keyword arguments of the model's forward pass at a step, counted from 0."""


@explained
@dataclass(frozen=True, eq=False)
class TokenBatches:
    """Windows of one long sequence of tokens: `{"tokens": [batch, length]}`.

    Args:
        tokens: all tokens, in memory, `open_token_file(path).tokens` or `open_shards(folder)`
        batch_size: windows in a batch
        length: tokens in a window
        seed: another seed gives another order
        order: `random` cuts each window anywhere; `shuffled` takes the windows that start at
            multiples of `length`, each once per epoch, in a new order each epoch, without the
            remainder at the end of the tokens

    Raises:
        ValueError: if the tokens are fewer than `length`, or a size is out of range
    """

    tokens: Tokens = field(repr=False)
    batch_size: int
    length: int
    seed: int
    order: Literal["random", "shuffled"] = "random"

    def __post_init__(self):
        _check_sizes(self.batch_size, self.length, self.seed)
        _check_tokens(self.tokens, self.length)
        if self.order not in ("random", "shuffled"):
            raise ValueError(f"order must be 'random' or 'shuffled', got {self.order!r}")

    def batch(self, step: int) -> dict[str, Tensor]:
        """The windows of a step."""
        n_tokens, length, size = len(self.tokens), self.length, self.batch_size
        if self.order == "random":
            generator = step_generator(self.seed, step)
            starts = torch.randint(n_tokens - length + 1, (size,), generator=generator)
        else:
            starts = shuffled(n_tokens // length, size, step, self.seed) * length
        return {"tokens": _windows(self.tokens, starts, length)}


@explained
@dataclass(frozen=True)
class RepeatBatches:
    """Fresh repeated random tokens at every step: `{"tokens": [batch, length]}`.

    Args as `smearlens.data.synthetic.repeated_tokens`, with a seed for its generator.

    >>> batches = RepeatBatches(batch_size=4, period=(3, 5), length=11, d_vocab=13, seed=0)
    >>> batches.batch(7)["tokens"].equal(batches.batch(7)["tokens"])
    True
    """

    batch_size: int
    period: int | tuple[int, int]
    length: int
    d_vocab: int
    seed: int
    bos: int | None = None

    def __post_init__(self):
        _check_sizes(self.batch_size, self.length, self.seed)
        self.batch(0)  # a wrong period is found here rather than in the first step

    def batch(self, step: int) -> dict[str, Tensor]:
        """The sequences of a step."""
        generator, bos = step_generator(self.seed, step), self.bos
        size = (self.batch_size, self.period, self.length, self.d_vocab)
        return {"tokens": repeated_tokens(*size, generator=generator, bos=bos)}


@explained
class PaddedBatches:
    """Lines, each cut or padded to one length, in a new order each epoch.

    `{"tokens": [batch, length], "loss_mask": [batch, length]}`: `loss_mask[b, t]` is True where
    `tokens[b, t]` is a token of the line and no padding, so that it counts as a target.

    >>> lines = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    >>> batches = PaddedBatches(lines, batch_size=2, length=4, pad=0, seed=0)
    >>> batches.n_targets, round(batches.pad_fraction, 3)
    (2, 0.667)

    Args:
        lines: token ids of each line; empty ones are kept. A batch whose lines all have fewer than
            2 tokens has no target and no loss: `train` refuses beforehand a run that comes to one
        batch_size: lines in a batch
        length: tokens to which each line is cut or padded
        pad: id that fills a line up; it may be a token of the lines, as GPT-2's end of text
        seed: another seed gives another order

    Raises:
        ValueError: if there are no lines, or a size is out of range
    """

    def __init__(
        self, lines: Sequence[Int[Tensor, " _"]], batch_size: int, length: int, pad: int, seed: int
    ):
        _check_sizes(batch_size, length, seed)
        if not len(lines) or pad < 0:
            raise ValueError(f"need a line and a pad id >= 0, got {len(lines)} lines, pad={pad}")
        self.batch_size, self.seed = batch_size, seed
        self._tokens = torch.full((len(lines), length), pad, dtype=torch.int64)
        for row, line in zip(self._tokens, lines, strict=True):
            row[: len(line)] = line[:length]
        n_real = torch.tensor([len(line) for line in lines])
        self._loss_mask = torch.arange(length) < n_real[:, None]

    @property
    def n_targets(self) -> int:
        """Targets of one epoch that are not padding."""
        return int(self._loss_mask[:, 1:].sum())  # the first token is never one

    @property
    def pad_fraction(self) -> float:
        """Share of padding among the targets."""
        return 1 - self.n_targets / self._loss_mask[:, 1:].numel()

    def batch_without_target(self, n_batches: int) -> int | None:
        """The first of the first `n_batches` batches that has no target; None if each has one."""
        counts = self._loss_mask[:, 1:].any(1)
        if counts.all():
            return None
        rows = (shuffled(len(counts), self.batch_size, i, self.seed) for i in range(n_batches))
        return next((i for i, row in enumerate(rows) if not counts[row].any()), None)

    def batch(self, step: int) -> dict[str, Tensor]:
        """The lines of a step and which of their targets count."""
        rows = shuffled(len(self._tokens), self.batch_size, step, self.seed)
        return {"tokens": self._tokens[rows], "loss_mask": self._loss_mask[rows]}


def evaluation_windows(
    tokens: Tokens, length: int, batch_size: int
) -> Iterator[dict[str, Int64[Tensor, "batch pos"]]]:
    """Cover a text once: every token but the first is the target of exactly one position.

    Neighbouring windows share one token, the last target of one and the first input of the next. A
    remainder is a shorter window at the end.

    >>> windows = evaluation_windows(torch.arange(8), length=4, batch_size=2)
    >>> [w["tokens"].tolist() for w in windows]
    [[[0, 1, 2, 3], [3, 4, 5, 6]], [[6, 7]]]
    """
    _check_sizes(batch_size, length, 0)
    _check_tokens(tokens, 2)
    n_whole, rest = divmod(len(tokens) - 1, length - 1)
    for first in range(0, n_whole, batch_size):
        starts = torch.arange(first, min(first + batch_size, n_whole)) * (length - 1)
        yield {"tokens": _windows(tokens, starts, length)}
    if rest:
        yield {"tokens": _windows(tokens, torch.tensor([n_whole * (length - 1)]), rest + 1)}


def shuffled(n_items: int, batch_size: int, step: int, seed: int) -> Int64[Tensor, " batch"]:
    """The items of a step when every epoch is a new permutation and nothing is dropped.

    A batch that reaches the end of an epoch goes on with the first items of the next.

    >>> order = torch.cat([shuffled(5, 2, step, seed=0) for step in range(5)])
    >>> sorted(order[:5].tolist()), sorted(order[5:].tolist())
    ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4])
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    parts, start, stop = [], step * batch_size, (step + 1) * batch_size
    while start < stop:
        epoch, first = divmod(start, n_items)
        parts.append(_permutation(n_items, seed, epoch)[first : first + stop - start])
        start += len(parts[-1])
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _permutation(n_items: int, seed: int, epoch: int) -> Int64[Tensor, " n_items"]:
    return torch.randperm(n_items, generator=step_generator(seed, epoch))


def _windows(
    tokens: Tokens, starts: Int64[Tensor, " batch"], length: int
) -> Int64[Tensor, "batch {length}"]:
    index = starts[:, None] + torch.arange(length)
    if isinstance(tokens, Tensor):
        return tokens[index].long()
    return torch.from_numpy(np.asarray(tokens[index.numpy()], dtype=np.int64))


def _check_sizes(batch_size: int, length: int, seed: int) -> None:
    if batch_size < 1 or length < 2 or seed < 0:
        given = f"batch_size={batch_size}, length={length}, seed={seed}"
        raise ValueError(f"need batch_size >= 1, length >= 2 and seed >= 0, got {given}")


def _check_tokens(tokens: Tensor | np.ndarray | ShardedTokens, length: int) -> None:
    if tokens.ndim != 1 or len(tokens) < length or "int" not in str(tokens.dtype):
        given = f"shape {tuple(tokens.shape)}, {tokens.dtype}"
        raise ValueError(f"tokens must be one sequence of at least {length} ids, got {given}")
