"""The loss of a model over a whole text, each token a target exactly once.

Leaves out per-token losses and what a model does on repeats (`analysis.behaviour`), and when to
evaluate (`training.loop`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from smearlens._explain import explained
from smearlens.data.batches import Tokens, evaluation_windows
from smearlens.models.base import HookedModel
from smearlens.training.randomness import observing


@dataclass(frozen=True, kw_only=True)
class TextLoss:
    """Loss of a model over a text, with the counts that it is a mean over."""

    total: float  # nats, summed over all targets
    n_targets: int  # tokens predicted: all but the first
    n_characters: int  # characters (or bytes) that the targets stand for

    @property
    def nats_per_token(self) -> float:
        """Mean cross entropy of a token."""
        return self.total / self.n_targets

    @property
    def nats_per_character(self) -> float:
        """Mean cross entropy of a character; comparable between tokenizers."""
        return self.total / self.n_characters

    @property
    def bits_per_character(self) -> float:
        """The same in bits."""
        return self.nats_per_character / math.log(2)


@explained
def text_loss(
    model: HookedModel,
    tokens: Tokens,
    *,
    length: int | None = None,
    batch_size: int = 32,
    n_characters: int | None = None,
) -> TextLoss:
    """Evaluate `model`, in eval mode, on windows that cover `tokens` once.

    A token has between 1 and `length` - 1 tokens of context, all equally often but for the end.

    Args:
        model: called as `model(tokens=..., return_type="loss")`
        tokens: of the whole text, in memory or mapped from a file
        length: tokens of a window; the model's `n_ctx` by default
        batch_size: windows at a time
        n_characters: characters of the text after its first token; by default each token is one

    Raises:
        ValueError: for sizes out of range, or fewer than 2 tokens
    """
    if n_characters is not None and n_characters < 1:
        raise ValueError(f"n_characters must be at least 1, or None, got {n_characters}")
    device = next(model.parameters()).device
    windows = evaluation_windows(
        tokens, model.config.n_ctx if length is None else length, batch_size
    )
    total, n_targets = 0.0, 0
    with observing(model):
        for window in windows:
            count = window["tokens"][:, 1:].numel()
            batch = {name: t.to(device) for name, t in window.items()}
            total += float(model(**batch, return_type="loss")) * count
            n_targets += count
    return TextLoss(total=total, n_targets=n_targets, n_characters=n_characters or n_targets)
