"""The rows of softmax attention in blocks of 128, from q and k: made, handed out, overwritten.

Contains the engine of `streaming`: how batch and heads are grouped so that a block stays small, how
a block is computed, masked and summed in buckets of 64 keys, and the checks of what users pass.
Leaves out the statistics themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 128  # queries per block
BUCKET = 64  # keys per bucket: blocks hold whole buckets, and ROWS is a multiple of it
ENTRIES = 2**20  # scores in a block, over all heads done at once, unless one head has more
_HIDDEN = -1e30  # score of a key that may not be seen: finite, so that 0 · score is 0


class Options(NamedTuple):
    """How scores become a pattern; the same for all patterns of one pass."""

    causal: bool
    scale: float | None
    key_mask: Tensor | None


@dataclass
class Block:
    """Rows `start` to `stop` of a group of heads, unnormalised; columns fill whole buckets.

    The next block overwrites `shifted` and `weights`; until then the reader may do so too.

    Attributes:
        start: first query
        stop: end of the queries
        causal: whether weights after the query are 0
        n_key: keys of the sequence; columns from there on are padding of weight 0
        top: largest score of each row, in units of log 2, [flat row]
        shifted: scores minus `top`, in units of log 2, [flat row column]; at most 0
        weights: 2**shifted, [flat row column]; P is weights over their sum
    """

    start: int
    stop: int
    causal: bool
    n_key: int
    top: Tensor
    shifted: Tensor
    weights: Tensor

    def lse(self, total: Tensor) -> Tensor:
        """Natural logarithm of the softmax denominator, from the sum of the weights."""
        return (self.top + total.log2()) * math.log(2)

    def entropy(self, total: Tensor) -> Tensor:
        """Of each row, in nats, as lse - Σ P · score: no logarithm per entry. Uses up `shifted`."""
        expected = self.shifted.mul_(self.weights).sum(-1) / total
        return (total.log2() - expected) * math.log(2)


def stream(
    pairs: Sequence[tuple[Tensor, Tensor]],
    options: Options,
    count: int,
    reduce: Callable[..., Sequence[Tensor]],
) -> tuple[Tensor, Tensor]:
    """Reduce every block of rows to `count` numbers per row.

    Args:
        pairs: (q, k) of each pattern, read side by side
        options: mask and scale
        count: how many [flat row] tensors `reduce` returns
        reduce: called with one block per pattern

    Returns:
        values [count batch head query], NaN where no key may be seen, and the number of keys that
        each query may see, [batch query]
    """
    check(pairs, options.key_mask)
    q, k = pairs[0]
    dtype = wide(*(t for pair in pairs for t in pair))
    values = torch.empty(count, *q.shape[:3], dtype=dtype, device=q.device)
    for batches, heads in _groups(q, k):
        part = options
        if options.key_mask is not None:
            part = options._replace(key_mask=options.key_mask[batches])
        sources = [_blocks(q[batches, heads], k[batches, heads], part, dtype) for q, k in pairs]
        group = values[:, batches, heads]
        for blocks in zip(*sources, strict=True):
            found = torch.stack(tuple(reduce(*blocks))).view(count, *group.shape[1:3], -1)
            group[..., blocks[0].start : blocks[0].stop] = found
    n_allowed = _count_allowed(q, k, options)
    return values.masked_fill_(n_allowed[:, None] == 0, torch.nan), n_allowed


def _groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Cut [batch head] into pieces whose blocks hold at most ENTRIES scores."""
    batch, head, query, _ = q.shape
    fit = max(1, ENTRIES // max(1, min(ROWS, query) * k.shape[2]))
    heads = min(fit, max(1, head))
    batches = max(1, fit // max(1, head))
    for b in range(0, batch, batches):
        for h in range(0, head, heads):
            yield slice(b, b + batches), slice(h, h + heads)


def _blocks(q: Tensor, k: Tensor, options: Options, dtype: torch.dtype) -> Iterator[Block]:
    """The blocks of one group, in two buffers that all of them share."""
    causal, scale, mask = options
    batch, head, n_query, d_head = q.shape
    n_key = k.shape[2]
    width = -(-n_key // BUCKET) * BUCKET
    factor = (d_head**-0.5 if scale is None else scale) * math.log2(math.e)
    q = q.reshape(batch * head, n_query, d_head).to(dtype)
    k, lowered = _flat_keys(k.to(dtype), mask, width)
    memory = q.new_empty(2, batch * head * min(ROWS, n_query) * width)
    for start in range(0, n_query, ROWS):
        stop = min(start + ROWS, n_query)
        seen = min(width, -(-stop // BUCKET) * BUCKET) if causal else width
        shape = (batch * head, stop - start, seen)
        scores, weights = (m[: math.prod(shape)].view(shape) for m in memory)
        torch.bmm(q[:, start:stop] * factor, k[:, :seen].mT, out=scores)
        if lowered is not None:
            scores += lowered[..., :seen]
        if causal:
            later = ahead(start, stop, start, seen, q.device)
            scores[..., start:].tril_().add_(later, alpha=_HIDDEN)  # masked_fill_ is 5 times slower
        top = scores.amax(-1)
        scores -= top[..., None]
        torch.exp2(scores, out=weights)
        yield Block(start, stop, causal, n_key, top, scores, weights)


def _flat_keys(k: Tensor, mask: Tensor | None, width: int) -> tuple[Tensor, Tensor | None]:
    """Keys as [flat column d_head], 0 where unseen, and what to add to the scores there.

    Cheaper than masking scores, and a NaN in an unseen key stays unseen.
    """
    batch, head, n_key, d_head = k.shape
    k = k.reshape(batch * head, n_key, d_head)
    if mask is None and width == n_key:
        return k, None
    if mask is None:
        mask = torch.ones(1, n_key, dtype=torch.bool, device=k.device)
    else:
        mask = mask.repeat_interleave(head, 0)
    unseen = F.pad(~mask, (0, width - n_key), value=True)
    k = F.pad(k, (0, 0, 0, width - n_key)).masked_fill(unseen[..., None], 0)
    return k, k.new_zeros(unseen.shape).masked_fill_(unseen, _HIDDEN)[:, None]


def bucket_masses(weights: Tensor) -> Tensor:
    """Sum of the weights in each bucket of keys, [flat row bucket]."""
    return weights.unflatten(-1, (-1, BUCKET)).sum(-1)


def lag_sum(weights: Tensor, masses: Tensor, query: Tensor) -> Tensor:
    """Σ_k weight · (q - k): lags to the start of each bucket, minus the way into the bucket."""
    inside = torch.arange(BUCKET, dtype=query.dtype, device=query.device)
    first = BUCKET * torch.arange(masses.shape[-1], dtype=query.dtype, device=query.device)
    to_bucket = (masses * (query[:, None] - first)).sum(-1)
    return to_bucket - weights.unflatten(-1, (-1, BUCKET)).sum(-2) @ inside


def span(weights: Tensor, masses: Tensor, wanted: Tensor, query: Tensor) -> Tensor:
    """Leave out whole buckets, then keys, from the first on, while the rest holds `wanted`."""
    upto = masses.cumsum(-1)  # of keys at or before the query only
    spare = upto[..., -1:] - wanted[..., None]
    bucket = torch.searchsorted(upto, spare, right=True).clamp_max(upto.shape[-1] - 1)
    before = F.pad(upto, (1, 0)).gather(-1, bucket)
    buckets = weights.view(-1, BUCKET)
    row = torch.arange(0, len(buckets), weights.shape[-1] // BUCKET, device=weights.device)
    inside = buckets.index_select(0, row + bucket.flatten()).cumsum(-1)
    key = torch.searchsorted(inside, (spare - before).view(-1, 1), right=True)
    first = BUCKET * bucket + key.clamp_max(BUCKET - 1).view_as(bucket)
    return torch.where(spare[..., 0] >= 0, query - first[..., 0], torch.nan)


def ahead(start: int, stop: int, first: int, last: int, device: torch.device) -> Tensor:
    """Whether keys `first` to `last` come after queries `start` to `stop`, [row key]."""
    query = torch.arange(start, stop, device=device)
    return torch.arange(first, max(first, last), device=device) > query[:, None]


def _count_allowed(q: Tensor, k: Tensor, options: Options) -> Tensor:
    batch, n_query, n_key = q.shape[0], q.shape[2], k.shape[2]
    mask = options.key_mask
    if mask is None:
        mask = torch.ones(batch, n_key, dtype=torch.bool, device=q.device)
    if not options.causal:
        return mask.sum(1, keepdim=True).expand(batch, n_query)
    last_seen = torch.arange(n_query, device=q.device).clamp_max(n_key - 1)
    return mask.cumsum(1)[:, last_seen]


def wide(*tensors: Tensor) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check(
    pairs: Sequence[tuple[Tensor, Tensor]], key_mask: Tensor | None, lse: Tensor | None = None
) -> None:
    """Refuse q, k, masks and normalisers that do not fit together, in words."""
    shapes = [list(t.shape) for pair in pairs for t in pair]
    if any(len(shape) != 4 for shape in shapes):
        raise ValueError(f"q and k must be [batch head pos d_head], got {shapes}")
    if any(a[:2] != shapes[0][:2] for a in shapes):
        raise ValueError(
            f"q and k must agree in batch and head, got {shapes}; "
            "where several query heads share a key head, repeat_interleave the keys over dim 1"
        )
    for q, k in zip(shapes[::2], shapes[1::2], strict=True):
        if q[3] != k[3] or k[2] == 0:
            raise ValueError(f"q {q} and k {k} must agree in d_head, and there must be a key")
        if (q[2], k[2]) != (shapes[0][2], shapes[1][2]):
            raise ValueError(f"both patterns must have the same queries and keys, got {shapes}")
    if lse is not None and list(lse.shape) != shapes[0][:3]:
        raise ValueError(f"lse must be [batch head query] = {shapes[0][:3]}, got {list(lse.shape)}")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask must be bool, True where a key counts, got {key_mask.dtype}")
    if list(key_mask.shape) != (wanted := [shapes[0][0], shapes[1][2]]):
        raise ValueError(f"key_mask must be [batch key] = {wanted}, got {list(key_mask.shape)}")
