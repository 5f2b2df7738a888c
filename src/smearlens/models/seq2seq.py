"""Seq2Seq: an encoder that reads a word, a decoder that writes another, as Vaswani et al. 2017.

Contains the model, its greedy decoding, and its decoder as a model that reads one fixed source.
Leaves out the attention layer (`nn.attention`) and the counting of right words (`training.words`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from smearlens._hooks import HookPoint
from smearlens.models.base import HookedModel, Preset
from smearlens.models.decoder import (
    ABSOLUTE,
    check_choice,
    check_mask,
    check_sizes,
    check_tokens,
    next_token_loss,
)
from smearlens.nn.attention import Attention
from smearlens.nn.layers import MLP
from smearlens.nn.positions import Positions

ReturnType = Literal["logits", "loss", "both"]


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig:
    """Sizes and switches of a Seq2Seq."""

    d_vocab: int = 29  # of source and target: a-z, '-', start, end
    d_model: int = 64  # width of the residual stream
    n_heads: int = 8  # each d_model / n_heads wide
    n_layers: int = 2  # of the encoder, and again of the decoder
    n_ctx: int = 32  # longest source and longest target, in tokens
    d_mlp: int = 64  # width of each MLP
    # added to the embedding: trained, fixed, or trained from the fixed on
    positions: Literal["learned", "sinusoidal", "learned-sinusoidal"] | None = "sinusoidal"
    norm: Literal["pre", "post"] = "pre"  # LayerNorm before each sublayer, or after its sum
    dropout: float = 0.0  # on the embedding and on what each sublayer adds
    start: int = 27  # token that every target begins with
    end: int = 28  # token that every target ends with

    def __post_init__(self):
        check_sizes(self, "d_vocab", "d_model", "n_heads", "n_layers", "n_ctx", "d_mlp")
        check_choice("positions", self.positions, (*ABSOLUTE, None))
        check_choice("norm", self.norm, ("pre", "post"))
        for name in ("start", "end"):
            token = getattr(self, name)
            if type(token) is not int or not 0 <= token < self.d_vocab:
                raise ValueError(f"{name} must be a token in 0..{self.d_vocab - 1}, got {token!r}")


class Seq2SeqBlock(nn.Module):
    """Self-attention, in a decoder cross attention, and an MLP, each added to the stream."""

    def __init__(self, config: Seq2SeqConfig, *, decoder: bool):
        super().__init__()
        width, self.pre = config.d_model, config.norm == "pre"
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width, config.n_heads, causal=decoder)
        self.cross_attn = None
        self.hook_resid_pre = HookPoint()  # [batch pos d_model]
        self.hook_attn_out = HookPoint()  # [batch pos d_model]
        if decoder:
            self.ln_cross = nn.LayerNorm(width)
            self.cross_attn = Attention(width, config.n_heads, causal=False)
            self.hook_cross_attn_out = HookPoint()  # [batch pos d_model]
        self.ln2, self.mlp = nn.LayerNorm(width), MLP(width, config.d_mlp)
        self.hook_mlp_out = HookPoint()  # [batch pos d_model]
        self.hook_resid_post = HookPoint()  # [batch pos d_model]
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Float[Tensor, "batch pos d_model"],
        memory: Float[Tensor, "batch source d_model"] | None = None,
        source_mask: Bool[Tensor, "batch source"] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Pass the stream through the block.

        Args:
            x: the stream
            memory: what the encoder made of the source; only a decoder block reads it
            source_mask: True where a source token is real
            state: of a decoder block, as in `Attention.forward`
        """
        x = self.hook_resid_pre(x)
        own_mask = source_mask if self.cross_attn is None else None  # later targets are not seen
        attn = self.attn(self._before(self.ln1, x), key_mask=own_mask, state=state)
        x = self._after(self.ln1, x + self.hook_attn_out(self.drop(attn)))
        if self.cross_attn is not None:
            query = self._before(self.ln_cross, x)
            cross = self.cross_attn(query, memory, key_mask=source_mask, state=state)
            x = self._after(self.ln_cross, x + self.hook_cross_attn_out(self.drop(cross)))
        mlp = self.mlp(self._before(self.ln2, x))
        x = self._after(self.ln2, x + self.hook_mlp_out(self.drop(mlp)))
        return self.hook_resid_post(x)

    def _before(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x) if self.pre else x

    def _after(self, norm: nn.Module, x: Tensor) -> Tensor:
        return x if self.pre else norm(x)


class Stack(nn.Module):
    """One side of the model: embedding (+ positions) → blocks (→ LayerNorm, with norms before)."""

    def __init__(self, config: Seq2SeqConfig, *, decoder: bool):
        super().__init__()
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.hook_embed = HookPoint()  # [batch pos d_model]
        self.pos_embed = None
        if config.positions is not None:
            self.pos_embed = Positions(config.n_ctx, config.d_model, config.positions)
            self.hook_pos_embed = HookPoint()  # [batch pos d_model]
        self.drop = nn.Dropout(config.dropout)
        blocks = [Seq2SeqBlock(config, decoder=decoder) for _ in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        pre = config.norm == "pre"
        self.ln_final: nn.Module = nn.LayerNorm(config.d_model) if pre else nn.Identity()

    def forward(
        self, tokens: Int[Tensor, "batch pos"], past: int = 0, **read: Any
    ) -> Float[Tensor, "batch pos d_model"]:
        """Run over tokens that stand behind `past` others; `read` goes to every block."""
        x = self.hook_embed(self.embed(tokens))
        if self.pos_embed is not None:
            positions = self.pos_embed(past, tokens.shape[1]).clone()  # caches keep what they saw
            if torch.is_grad_enabled() and self.hook_pos_embed.bwd_hooks:
                positions.requires_grad_()  # a fixed table has a gradient when a hook asks for it
            x = x + self.hook_pos_embed(positions.expand_as(x))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x, **read)
        return self.ln_final(x)


class Seq2Seq(HookedModel):
    """Encoder-decoder transformer."""

    config_class = Seq2SeqConfig
    presets = {  # noqa: RUF012
        "base": Preset(
            'base model of the Pig Latin write-up; its "head size 16" is read as a width of 16, '
            "so 4 heads (as a number of heads it would be n_heads=16); d_mlp is not stated there",
            {"n_heads": 4, "dropout": 0.1},
        ),
        "beast-small": Preset(
            "Beast Small of the Pig Latin write-up, 143 K parameters there, 142,784 here",
            {"positions": "learned-sinusoidal", "dropout": 0.1},
        ),
        "beast-large": Preset(
            "Beast Large of the Pig Latin write-up, 276 K parameters there, 275,648 here",
            {"positions": "learned-sinusoidal", "dropout": 0.1, "n_layers": 4},
        ),
    }
    config: Seq2SeqConfig

    def __init__(self, config: Seq2SeqConfig):
        self._require(config)
        super().__init__(config)
        self.encoder = Stack(config, decoder=False)
        self.decoder = Stack(config, decoder=True)
        self.unembed = nn.Linear(config.d_model, config.d_vocab, bias=False)
        self.setup()

    def forward(
        self,
        source: Int[Tensor, "batch source"],
        target: Int[Tensor, "batch pos"],
        return_type: ReturnType = "logits",
        *,
        source_mask: Bool[Tensor, "batch source"] | None = None,
        loss_mask: Bool[Tensor, "batch pos"] | None = None,
        state: dict[str, Tensor] | None = None,
    ) -> Any:
        """Predict each next token of the target.

        Args:
            source: what the encoder reads, at most `n_ctx` tokens
            target: start, translation, end
            return_type: logits [batch pos d_vocab]; mean loss, nats per target; both as a pair
            source_mask: True where a source token is real; what padding holds then does not matter
            loss_mask: True where a target token counts (position 0 never does)
            state: what earlier target tokens left behind: pass {} with the first piece of the
                target, with which alone the encoder runs, and the same dictionary, source (another
                is refused) and mask with each next one

        Raises:
            ValueError, TypeError: for tokens or masks of another shape, dtype or range
        """
        check_choice("return_type", return_type, ("logits", "loss", "both"))
        earlier = None if state is None else state.get("target")
        place = self.unembed.weight.device
        check_tokens("source", source, self.config, place)
        check_tokens("target", target, self.config, place, earlier)
        if source.shape[:1] != target.shape[:1]:
            shapes = f"{list(source.shape)} and {list(target.shape)}"
            raise ValueError(f"source and target must be equally many sequences, got {shapes}")
        check_mask("loss_mask", loss_mask, target, "as the tokens are", "target")
        memory = self._encode(source, source_mask, state or {})
        past = 0 if earlier is None else earlier.shape[1]
        new = None if state is None else dict(state)  # `state` changes when all has gone well
        read = {"memory": memory, "source_mask": source_mask, "state": new}
        logits = self.unembed(self.decoder(target, past, **read))
        loss = None if return_type == "logits" else next_token_loss(logits, target, loss_mask)
        if state is not None and new is not None:
            whole = target if earlier is None else torch.cat((earlier, target), 1)
            state.update({**new, "source": source, "memory": memory, "target": whole})
        return {"logits": logits, "loss": loss, "both": (logits, loss)}[return_type]

    @torch.no_grad()
    def translate(
        self,
        source: Int[Tensor, "batch source"],
        *,
        source_mask: Bool[Tensor, "batch source"] | None = None,
        max_new_tokens: int | None = None,
    ) -> Int[Tensor, "batch new"]:
        """The likeliest next token, again and again, until every sequence has reached `end`.

        Args:
            source: what the encoder reads, once
            source_mask: True where a source token is real
            max_new_tokens: how many to write at most; default: all that `n_ctx` has room for

        Returns:
            the tokens written, without `start`, filled up with `end`; in train mode dropout draws
        """
        start, end, room = self.config.start, self.config.end, self.config.n_ctx - 1
        limit = room if max_new_tokens is None else max_new_tokens
        if type(limit) is not int or not 1 <= limit <= room:
            allowed = f"an int in 1..{room} (n_ctx - 1) or None"
            raise ValueError(f"max_new_tokens must be {allowed}, got {max_new_tokens!r}")
        check_tokens("source", source, self.config, self.unembed.weight.device)
        state: dict[str, Tensor] = {}
        new = torch.full((len(source), 1), start, device=source.device)
        ended, written = torch.zeros_like(new, dtype=torch.bool), []
        for _ in range(limit):
            logits = self(source, new, source_mask=source_mask, state=state)
            new = logits[:, -1].argmax(-1, keepdim=True).masked_fill(ended, end)
            written.append(new)
            ended |= new == end
            if ended.all():
                break
        return torch.cat(written, dim=1)

    def decoder_given(self, source: Int[Tensor, "1 source"]) -> SourcedDecoder:
        """The decoder as a model of `tokens` that reads this one source, for `audit` and others."""
        return SourcedDecoder(self, source)

    def _encode(self, source: Tensor, mask: Tensor | None, state: dict[str, Tensor]) -> Tensor:
        if (known := state.get("source")) is not None:
            if source is not known and not torch.equal(source, known):
                raise ValueError("state was begun with another source; begin this one with {}")
            return state["memory"]
        if mask is not None:
            check_mask("source_mask", mask, source, "as source is", "token")
            if not mask.any(1).all():
                raise ValueError("source_mask must keep a token of every source; one has none")
        return self.encoder(source, source_mask=mask)


class SourcedDecoder(HookedModel):
    """A decoder that reads one fixed source whatever its tokens: modules and hooks are shared.

    Args:
        model: whose decoder it is; the names of its hooks stay as they are there
        source: one sequence [1 source]
    """

    config_class = Seq2SeqConfig
    presets = {}  # noqa: RUF012
    save_instead = "the Seq2Seq whose decoder it is; decoder_given(source) makes this again"

    def __init__(self, model: Seq2Seq, source: Int[Tensor, "1 source"]):
        check_tokens("source", source, model.config, model.unembed.weight.device)
        if len(source) != 1:
            raise ValueError(f"source must be one sequence [1 source], got {list(source.shape)}")
        super().__init__(model.config)
        self.encoder, self.decoder, self.unembed = model.encoder, model.decoder, model.unembed
        self.register_buffer("source", source, persistent=False)
        self._shared = (model,)  # a tuple keeps it out of the modules, whose names are set
        self.setup()

    def forward(
        self, tokens: Int[Tensor, "batch pos"], return_type: ReturnType = "logits", **options: Any
    ) -> Any:
        """`Seq2Seq.forward` with `tokens` as the target; options are `loss_mask` and `state`."""
        source = self.source.expand(len(tokens), -1)
        return self._shared[0](source, tokens, return_type, **options)
