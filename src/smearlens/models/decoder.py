"""`Decoder`: embedding → blocks → unembedding, its loss and its generation.

The shared frame of the decoder-only models. Each model's own file says what its blocks are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens._explain import describe, explained
from smearlens._hooks import HookPoint, is_hooked
from smearlens._tracing import is_traced, is_transformed
from smearlens.models.base import HookedModel
from smearlens.nn.large_vocab import streamed_loss
from smearlens.nn.positions import Positions

ABSOLUTE = ("learned", "sinusoidal", "learned-sinusoidal")  # added to the embedding
POSITIONS = (*ABSOLUTE, "rotary", None)
NO_TARGET = -100  # what F.cross_entropy leaves out
LARGE_VOCAB = 8192  # tokens from which a loss streams over the logits instead of keeping them


def check_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raise a ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def check_sizes(config: Any, *names: str) -> None:
    """Raise a ValueError unless the named fields are positive ints and the others make sense."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive int, got {value!r}")
    if config.d_model % config.n_heads:
        raise ValueError(f"n_heads={config.n_heads} must divide d_model={config.d_model}")
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "bool" and not isinstance(value, bool):
            raise ValueError(f"{field.name} must be True or False, got {value!r}")
    if not isinstance(config.dropout, (int, float)) or not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {config.dropout!r}")
    check_choice("positions", config.positions, POSITIONS)


class Decoder(HookedModel):
    """Embedding (+ positions) → `blocks` → (LayerNorm) → unembedding.

    Args:
        config: sizes; the fields `d_vocab`, `d_model`, `n_ctx`, `positions`, `norm`, `dropout`
        blocks: what the model is made of, each `block(x, state) -> x`
    """

    def __init__(self, config: Any, blocks: Sequence[nn.Module]):
        super().__init__(config)
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.hook_embed = HookPoint()  # [batch pos d_model]
        self.pos_embed = None
        if config.positions in ABSOLUTE:
            self.pos_embed = Positions(config.n_ctx, config.d_model, config.positions)
            self.hook_pos_embed = HookPoint()  # [batch pos d_model]
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(blocks)
        self.ln_final: nn.Module = nn.LayerNorm(config.d_model) if config.norm else nn.Identity()
        self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=False)
        self.setup()

    def forward(
        self,
        tokens: Int[Tensor, "batch pos"],
        return_type: Literal["logits", "loss", "both"] = "logits",
        *,
        loss_mask: Bool[Tensor, "batch pos"] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> Any:
        """Predict each next token.

        Args:
            tokens: ids below `d_vocab`, at most `n_ctx` of them
            return_type: logits [batch pos d_vocab]; the mean loss in nats per target; or both, as
                (logits, loss)
            loss_mask: True where a token counts as a target (position 0 never does); of no effect
                on logits
            state: what earlier tokens left behind: pass {} with the first piece of a sequence and
                the same dictionary with each next one

        Raises:
            ValueError, TypeError: for tokens of another shape, dtype or range, or too many
        """
        check_choice("return_type", return_type, ("logits", "loss", "both"))
        earlier = None if state is None else state.get("tokens")
        past = 0 if earlier is None else earlier.shape[1]
        self._check_tokens(tokens, earlier)
        check_mask("loss_mask", loss_mask, tokens, "as the tokens are", "target")
        targets = None if return_type == "logits" else next_targets(tokens, loss_mask)
        new = None if state is None else dict(state)  # `state` changes when all has gone well
        x = self.hook_embed(self.embed(tokens))
        if self.pos_embed is not None:
            x = x + self.hook_pos_embed(self._positions(past, tokens.shape[1]).expand_as(x))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, new)
        x = self.ln_final(x)
        if state is not None and new is not None:
            new["tokens"] = tokens if earlier is None else torch.cat((earlier, tokens), 1)
            state.update(new)
        if targets is not None and return_type == "loss" and self.streams_loss:
            kept = targets != NO_TARGET
            return streamed_loss(x[:, :-1][kept], self.unembed.weight, targets[kept])
        logits = self.unembed(x)
        if return_type == "logits":
            return logits
        loss = next_token_loss(logits, tokens, loss_mask)
        return loss if return_type == "loss" else (logits, loss)

    @property
    def streams_loss(self) -> bool:
        """Whether `return_type="loss"` never holds all logits: d_vocab >= 8,192, unembed unhooked.

        `nn.large_vocab.streamed_loss` then takes them chunk by chunk, and only where there is a
        target; "both" has its logits and the plain loss of them.
        """
        if type(self.unembed) is not nn.Linear or is_transformed():  # not a wrapped one's forward
            return False
        plain = self.unembed.bias is None and not is_hooked(self.unembed)
        return plain and self.config.d_vocab >= LARGE_VOCAB

    @explained
    @torch.no_grad()
    def generate(
        self,
        tokens: Int[Tensor, "batch pos"],
        max_new_tokens: int,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "batch total"]:
        """Continue `tokens` one by one, each step reusing what the earlier ones left behind.

        Call `model.eval()` first: in train mode dropout draws, and no two calls are alike.

        Args:
            tokens: the prompt
            max_new_tokens: how many to add; prompt and continuation must fit into `n_ctx`
            temperature: divides the logits; 0 takes the likeliest token
            top_k: sample among the k likeliest only
            generator: of the samples; required unless temperature is 0

        Returns:
            prompt and continuation

        Raises:
            ValueError, TypeError: for tokens or options that are not as described
        """
        self._check_tokens(tokens, None)
        n_ctx, length = self.config.n_ctx, tokens.shape[1]
        if type(max_new_tokens) is not int or not 1 <= max_new_tokens <= n_ctx - length:
            raise ValueError(
                f"max_new_tokens={max_new_tokens!r} after a prompt of {length} must be an int, at "
                f"least 1, and fit n_ctx={n_ctx}"
            )
        if not 0 <= temperature < math.inf or (temperature > 0 and generator is None):
            raise ValueError(
                f"temperature={temperature} with generator={generator}: pass temperature=0 for "
                "greedy decoding, or a temperature > 0 and a torch.Generator"
            )
        if top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ValueError(f"top_k must be an int, at least 1, or None, got {top_k!r}")
        state: dict[str, Tensor] = {}
        new = tokens
        for _ in range(max_new_tokens):
            logits = self(new, state=state)[:, -1]
            new = _sample(logits, temperature, top_k, generator)
            tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def _positions(self, start: int, length: int) -> Float[Tensor, "pos d_model"]:
        """Rows of the position table: a copy, so that caches do not follow the optimiser."""
        assert self.pos_embed is not None
        positions = self.pos_embed(start, length).clone()
        if torch.is_grad_enabled() and self.hook_pos_embed.bwd_hooks:
            positions.requires_grad_()  # a fixed table has a gradient when a hook asks for it
        return positions

    def _check_tokens(self, tokens: Any, earlier: Tensor | None) -> None:
        """Raise unless `tokens` can follow `earlier` ones (None: can start a sequence)."""
        check_tokens("tokens", tokens, self.config, self.embed.weight.device, earlier)


def check_tokens(
    name: str, tokens: Any, config: Any, place: torch.device, earlier: Tensor | None = None
) -> None:
    """Raise unless argument `name` holds tokens for a model that can follow `earlier` ones.

    Args:
        name: of the argument, for the message
        tokens: what was given
        config: of the model: `n_ctx` and `d_vocab` are read
        place: device of the model
        earlier: tokens that a state holds; None: a sequence starts
    """
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"{name} must be an int64 tensor [batch pos], got {type(tokens).__name__}; "
            "model.to_tokens(text) makes one of a text"
        )
    if tokens.ndim != 2 or not tokens.numel():
        raise ValueError(f"{name} must be [batch pos], got shape {tuple(tokens.shape)}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64, got {tokens.dtype}; use {name}.long()")
    if tokens.device != place:
        raise ValueError(
            f"{name} are on {tokens.device}, the model is on {place}; use {name}.to({str(place)!r})"
        )
    if earlier is not None and earlier.shape[0] != tokens.shape[0]:
        raise ValueError(
            f"state holds {earlier.shape[0]} sequences, {name} {tokens.shape[0]}; "
            "start other sequences with an empty state"
        )
    past = 0 if earlier is None else earlier.shape[1]
    if past + tokens.shape[1] > config.n_ctx:
        raise ValueError(
            f"{name} reach position {past + tokens.shape[1]}, n_ctx is {config.n_ctx}; "
            "shorten them or build the model with a larger n_ctx"
        )
    real = type(tokens) is Tensor and not is_traced()  # has values to look at
    if real and tokens.device.type == "cpu":
        low, high = (int(t) for t in tokens.aminmax())
        if low < 0 or high >= config.d_vocab:
            raise ValueError(
                f"{name} range over {low}..{high}, d_vocab is {config.d_vocab}; "
                "was the text encoded with this model's tokenizer?"
            )


def check_mask(name: str, mask: Any, tokens: Tensor, like: str, kept: str) -> None:
    """Raise unless argument `name` is None, or a bool tensor of the shape of `tokens`."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != tokens.shape:
        raise ValueError(
            f"{name} must be a bool tensor {list(tokens.shape)} {like}, got {describe(mask)}; "
            f"True keeps a {kept}"
        )


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    loss_mask: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross entropy of each next token, nats per target; `loss_mask` picks the targets."""
    targets = next_targets(tokens, loss_mask)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).to(wide), targets.flatten())


def next_targets(
    tokens: Int[Tensor, "batch pos"], loss_mask: Bool[Tensor, "batch pos"] | None
) -> Int[Tensor, "batch target"]:
    """The next token at every position but the last; `NO_TARGET` where `loss_mask` has none."""
    if tokens.shape[1] < 2:
        raise ValueError(f"a loss needs at least 2 tokens, got shape {tuple(tokens.shape)}")
    targets = tokens[:, 1:].long()
    if loss_mask is not None:
        check_mask("loss_mask", loss_mask, tokens, "as the tokens are", "target")
        if not loss_mask[:, 1:].any():
            raise ValueError(
                "loss_mask keeps no target (position 0 is none); the mean is undefined"
            )
        targets = targets.masked_fill(~loss_mask[:, 1:], NO_TARGET)
    return targets


def _sample(
    logits: Tensor, temperature: float | int, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """One token per row [batch 1]."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None:
        top = logits.topk(min(top_k, logits.shape[-1]))  # exactly k, whatever ties there are
        logits = torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)
    below = logits - logits.amax(-1, keepdim=True)  # at most 0: no quotient overflows upwards
    wide = below.to(torch.promote_types(below.dtype, torch.float32))
    return torch.multinomial((wide / temperature).softmax(-1), 1, generator=generator)
