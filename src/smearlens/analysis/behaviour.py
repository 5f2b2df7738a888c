"""What a model does with what it has seen: losses and accuracy on repeats, learning in context.

Every function takes logits and tokens, so that it serves models of any library. Leaves out where
the model looked (`analysis.heads`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from smearlens._explain import explained


@explained
def per_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, "batch target"]:
    """Cross entropy in nats of every next token; entry i is token i + 1 predicted at position i."""
    _check(logits, tokens)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide[:, :-1].transpose(1, 2), tokens[:, 1:].long(), reduction="none")


def predictable(tokens: Int[Tensor, "batch pos"]) -> Bool[Tensor, "batch target"]:
    """Which next tokens induction can predict: their predecessor stood earlier in the sequence.

    On repeated blocks these are the tokens of the second and later repeats, without the first
    token of the second repeat (the step from the last token to the first was not seen yet).
    """
    before = tokens[:, :-1]
    return (before[:, :, None] == before[:, None, :]).tril(-1).any(-1)


@explained
def induction_loss(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Mean loss, per example, on the tokens that induction can predict; nats."""
    return _mean_where(per_token_loss(logits, tokens).double(), predictable(tokens))


@explained
def induction_accuracy(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Fraction, per example, of the tokens that induction can predict and the model does."""
    _check(logits, tokens)
    hit = (logits[:, :-1].argmax(-1) == tokens[:, 1:]).double()
    hit = hit.masked_fill(logits[:, :-1].isnan().any(-1), torch.nan)  # argmax would name a NaN
    return _mean_where(hit, predictable(tokens))


def induction_gain(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Mean loss on new tokens minus that on the tokens that induction can predict; nats.

    On repeated blocks: loss(repeat 1) - loss(repeats >= 2); the first token of the second repeat,
    neither new nor predictable, counts on neither side.
    """
    loss, seen = per_token_loss(logits, tokens).double(), predictable(tokens)
    known = (tokens[:, 1:, None] == tokens[:, None, :]).tril(0).any(-1)
    return _mean_where(loss, ~known & ~seen) - _mean_where(loss, seen)


@dataclass(frozen=True)
class IclScore:
    """Loss at a late token minus loss at an early one; negative = the context helps.

    Attributes:
        values: per example, nats
        early, late: the two token indices
        control: the same on shuffled tokens, where it should be near 0; None if not asked for
    """

    values: Float[Tensor, " batch"]
    early: int
    late: int
    control: Float[Tensor, " batch"] | None = None

    def mean(self) -> float:
        """Mean over examples, nats."""
        return float(self.values.mean())


@explained
def icl_score(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    *,
    early: int | None = None,
    late: int | None = None,
    shuffled: tuple[Tensor, Tensor] | None = None,
) -> IclScore:
    """In-context-learning score: mean loss of token `late` minus mean loss of token `early`.

    Args:
        logits: of the model
        tokens: of one document per example, not packed across boundaries
        early: index of the early token; default 50 in contexts of at least 512, else ⌈0.1 L⌉
        late: index of the late token; default 500, else ⌈0.98 L⌉ - 1
        shuffled: (logits, tokens) of the same examples with their tokens shuffled: the control

    Source:
        Olsson et al. 2022, in-context learning score (50th and 500th of 512 tokens)
    """
    length = tokens.shape[1]
    early = early if early is not None else 50 if length >= 512 else math.ceil(0.1 * length)
    late = late if late is not None else 500 if length >= 512 else math.ceil(0.98 * length) - 1
    if not 1 <= early < late < length:
        raise ValueError(
            f"need 1 <= early < late < {length} (the context), got early={early}, late={late}"
        )

    def difference(given: Tensor, on: Tensor) -> Tensor:
        loss = per_token_loss(given, on).double()
        return loss[:, late - 1] - loss[:, early - 1]

    control = None if shuffled is None else difference(*shuffled)
    return IclScore(difference(logits, tokens), early, late, control)


@dataclass(frozen=True)
class ArSplit:
    """Loss on tokens whose bigram stood earlier in the context ("hits") and on the rest; nats."""

    hit_loss: float
    other_loss: float
    n_hits: int
    n_others: int


@explained
def ar_split(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> ArSplit:
    """Split the loss by whether recalling an earlier bigram would have given the token.

    Source:
        Arora et al. 2023, "Zoology": associative-recall hits
    """
    loss = per_token_loss(logits.detach(), tokens).double()
    tokens = tokens.long()  # the pair numbers may not fit int32
    pair = tokens[:, :-1] * (int(tokens.max()) + 1) + tokens[:, 1:]
    hit = (pair[:, :, None] == pair[:, None, :]).tril(-1).any(-1)
    return ArSplit(
        float(loss[hit].mean()), float(loss[~hit].mean()), int(hit.sum()), int((~hit).sum())
    )


def loss_by_position(
    logits: Float[Tensor, "batch pos d_vocab"], tokens: Int[Tensor, "batch pos"]
) -> Float[Tensor, " target"]:
    """Mean over examples of the loss of each token index from 1 on; nats."""
    return per_token_loss(logits, tokens).double().mean(0)


def _mean_where(value: Tensor, where: Tensor) -> Float[Tensor, " batch"]:
    """Row means over `where`; NaN for a row without any."""
    return torch.where(where, value, 0).sum(-1) / where.sum(-1)


def _check(logits: Tensor, tokens: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[:2] != tokens.shape:
        raise ValueError(
            f"logits must be [batch pos d_vocab] for tokens [batch pos], got {list(logits.shape)} "
            f"and {list(tokens.shape)}"
        )
    if tokens.shape[1] < 2:
        raise ValueError(f"need at least 2 tokens per example, got {tokens.shape[1]}")
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be an integer tensor, got {tokens.dtype}")
    low, high = (int(t) for t in tokens.aminmax()) if tokens.numel() else (0, 0)
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"tokens range over {low}..{high}, the logits over 0..{logits.shape[-1] - 1}"
        )
