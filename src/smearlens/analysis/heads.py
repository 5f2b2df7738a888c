"""Scores of heads by where they look: previous token, duplicate, induction, prefix matching.

Each is the mean, over the rows where its target exists, of the weight on the target. Given a cache
it returns `Scores`; given one pattern tensor, the values [example head]. Leaves out targets that
the caller gives (`analysis.detection`), statistics without a target (`analysis.patterns`) and how
rows are read (`analysis.mixing.rows`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.mixing.options import RowOptions
from smearlens.analysis.mixing.rows import Metric, RowBlock, RowFunction, measure

Targets = Callable[[RowBlock], Bool[Tensor, "batch rows key"]]


@explained
def prev_token_score(source: Any, **options: Any) -> Any:
    r"""Mean weight on the token just before the query.

    $$\operatorname{mean}_{q \ge 1} A[q, q-1]$$

    Args:
        source: a cache, or a pattern [batch head query key]
        **options: fields of `RowOptions`

    Returns:
        `Scores` in [0, 1]; control: the mean weight on the other earlier tokens. Uniform causal
        attention over L tokens scores (H_L - 1) / (L - 1), H the harmonic number.

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads": previous-token head
    """

    def other_past(block: RowBlock) -> tuple[Tensor, Tensor]:
        past = (block.lag >= 2) & block.allowed
        count = past.sum(-1)
        return (block.weights * past).sum(-1) / count.clamp_min(1), count > 0

    return measure(
        source,
        Metric("prev_token_score", lambda block: block.at(block.lag == 1), other_past),
        RowOptions(**options),
    )


@explained
def duplicate_token_score(source: Any, tokens: Int[Tensor, "*batch pos"], **options: Any) -> Any:
    r"""Mean weight on earlier occurrences of the query's own token.

    $$\operatorname{mean}_{q} \sum_{k < q,\; x_k = x_q} A[q, k]$$ over rows with such a k.

    Args:
        source: a cache, or a pattern [batch head query key]
        tokens: what the model was run on
        **options: fields of `RowOptions`

    Returns:
        `Scores` in [0, 1]; control: the same with the tokens of another example of the batch

    Source:
        the duplicate-token head of Wang et al. 2022; TransformerLens `head_detector`
    """
    return prefix_matching_score(source, tokens, offset=0, name="duplicate_token_score", **options)


@explained
def induction_score(
    source: Any,
    tokens: Int[Tensor, "*batch pos"],
    *,
    kind: Literal["match", "diagonal"] = "match",
    include_boundary: bool = True,
    **options: Any,
) -> Any:
    r"""Mean weight on the tokens that followed earlier occurrences of the query's token.

    $$\operatorname{mean}_{q} \sum_{k < q,\; x_k = x_q} A[q, k + 1]$$ over rows with such a k: on
    repeated random tokens, the rows of the second and later repeats.

    Args:
        source: a cache, or a pattern [batch head query key]
        tokens: what the model was run on; draw the period per example, or the control cannot tell
            matching from a fixed lag
        kind: "diagonal" is the mean of all entries of lag T - 1 on [BOS, s, s] or [s, s], for
            comparison with published numbers only: two of its entries are no induction positions,
            so a perfect head that rests on BOS gets 0.963 at T = 25
        include_boundary: False drops rows whose arrival (previous token, token) is new, such as the
            first token of the second repeat
        **options: fields of `RowOptions`

    Returns:
        `Scores` in [0, 1]. Control: the same with the tokens of another example of the batch; a
        head that looks a fixed distance back on a fixed period scores as high there.

    Raises:
        ValueError: if tokens and pattern differ in size. Where no token occurs twice the value is
            NaN, for there is nothing to match

    Source:
        Olsson et al. 2022, prefix matching; the stripe of lag T - 1
    """
    if kind == "diagonal":
        return _diagonal_score(source, tokens, options)
    if kind != "match":
        raise ValueError(
            f"kind must be 'match' or 'diagonal', got {kind!r}; to choose layers, measure "
            "mixings(cache, kind=…)"
        )
    return prefix_matching_score(
        source, tokens, offset=1, include_boundary=include_boundary,
        name="induction_score", **options,
    )  # fmt: skip


@explained
def prefix_matching_score(
    source: Any,
    tokens: Int[Tensor, "*batch pos"],
    *,
    offset: int | tuple[int, ...] = 1,
    aggregate: Literal["sum", "mean"] = "sum",
    include_boundary: bool = True,
    name: str = "prefix_matching_score",
    **options: Any,
) -> Any:
    """Mean weight on positions `offset` after earlier occurrences of the query's token.

    Args:
        source: a cache, or a pattern [batch head query key]
        tokens: what the model was run on
        offset: +1 is what induction needs (attend to what followed); -1 is the wording of Olsson et
            al. 2022 ("the tokens that preceded"); 0 is the duplicate-token score. Several, such as
            (-1, 0, 1), give a dictionary of results
        aggregate: "sum" is the total weight on these positions, "mean" the mean entry
        include_boundary: as in `induction_score`
        name: of the metric, in the result
        **options: fields of `RowOptions`

    Returns:
        as `induction_score`, or a dictionary from offset to that

    Source:
        Olsson et al. 2022, "head activation evaluators"
    """
    if isinstance(offset, tuple):
        return {
            o: prefix_matching_score(
                source, tokens, offset=o, aggregate=aggregate, include_boundary=include_boundary,
                name=f"{name}({o:+d})", **options,
            )
            for o in offset
        }  # fmt: skip
    if aggregate not in ("sum", "mean"):
        raise ValueError(f"aggregate must be 'sum' or 'mean', got {aggregate!r}")
    tokens = checked_tokens(tokens)

    def weight_at(given: Tensor) -> RowFunction:
        targets = _earlier(given, offset, include_boundary)

        def value(block: RowBlock) -> tuple[Tensor, Tensor]:
            _check_fit(block, given)
            target = targets(block)[:, None] & block.allowed
            total, count = (block.weights * target).sum(-1), target.sum(-1)
            return total / count.clamp_min(1) if aggregate == "mean" else total, count > 0

        return value

    def ceiling(block: RowBlock) -> Tensor:  # all weight on the targets
        return 1 / (targets(block)[:, None] & block.allowed).sum(-1).clamp_min(1).double()

    targets = _earlier(tokens, offset, include_boundary)
    control = weight_at(tokens.roll(1, 0)) if tokens.shape[0] > 1 else None
    metric = Metric(name, weight_at(tokens), control, ceiling if aggregate == "mean" else None)
    return measure(source, metric, RowOptions(**options))


def _earlier(tokens: Int[Tensor, "batch pos"], offset: int, include_boundary: bool) -> Targets:
    """Targets: positions k + offset (<= q) of k < q with the query's token."""
    seen = _arrival_seen(tokens) if not include_boundary else None

    def targets(block: RowBlock) -> Bool[Tensor, "batch rows key"]:
        start, stop = block.start, block.start + block.weights.shape[-2]
        match = (tokens[:, start:stop, None] == tokens[:, None, :]) & (block.lag > 0)
        moved = torch.zeros_like(match)
        if offset > 0:
            moved[..., offset:] = match[..., :-offset]
        elif offset < 0:
            moved[..., :offset] = match[..., -offset:]
        else:
            moved = match
        moved &= block.lag >= 0
        return moved if seen is None else moved & seen[:, start:stop, None]

    return targets


def _arrival_seen(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """True at t where the pair (x[t-1], x[t]) stood somewhere before."""
    whole = tokens.long() - tokens.min()
    pair = whole[:, :-1] * (whole.max() + 1) + whole[:, 1:]
    ordered, place = pair.sort(dim=1, stable=True)  # equal pairs side by side, earliest first
    again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.nn.functional.pad(torch.zeros_like(again).scatter(1, place, again), (1, 0))


def _diagonal_score(source: Any, tokens: Int[Tensor, "*batch pos"], options: dict) -> Any:
    """Mean of every entry of the diagonal of lag T - 1."""
    tokens = checked_tokens(tokens)
    period = common_period(tokens)

    def value(block: RowBlock) -> tuple[Tensor, Tensor]:
        _check_fit(block, tokens)
        return block.at(block.lag == period - 1)

    return measure(source, Metric("induction_score(diagonal)", value), RowOptions(**options))


def common_period(tokens: Int[Tensor, "batch pos"]) -> int:
    """The least T at which every example repeats, twice or more: x[t] = x[t - T] (BOS aside).

    Raises:
        ValueError: if there is none
    """
    length = tokens.shape[1]
    for period in range(1, length // 2 + 1):
        for body in (tokens, tokens[:, 1:]):
            long_enough = body.shape[1] >= 2 * period
            if long_enough and bool((body[:, period:] == body[:, :-period]).all()):
                return period
    raise ValueError(
        "kind='diagonal' needs one period for all examples ([BOS, s, s] or [s, s]); "
        "use kind='match' for varied periods"
    )


def checked_tokens(tokens: Any, name: str = "tokens") -> Int[Tensor, "batch pos"]:
    """Tokens as [batch pos] on the CPU."""
    whole = isinstance(tokens, Tensor) and not tokens.dtype.is_floating_point
    if not whole or tokens.dtype == torch.bool or tokens.ndim not in (1, 2):
        given = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else tokens
        raise TypeError(f"{name} must be an integer tensor [batch pos], got {given!r}")
    return (tokens if tokens.ndim == 2 else tokens[None]).cpu()


def same_batch(given: Tensor, block: RowBlock) -> bool:
    """Whether what came with the pattern has its examples, or either is the same for all."""
    return 1 in (len(given), len(block.weights)) or len(given) == len(block.weights)


def _check_fit(block: RowBlock, tokens: Tensor) -> None:
    n_examples, _, _, n_keys = block.weights.shape
    if tokens.shape[1] != n_keys or (n_examples > 1 and tokens.shape[0] != n_examples):
        raise ValueError(
            f"tokens {list(tokens.shape)} do not belong to a pattern of {n_examples} examples and "
            f"{n_keys} keys; pass the tokens the model was run on"
        )
