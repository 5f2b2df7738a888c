"""CharGPT: embedding → n × [LayerNorm → attention, LayerNorm → MLP] → LayerNorm → unembedding.

The shape and the initialisation of GPT-2, at sizes for characters and bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import nn

from smearlens.models.base import Preset
from smearlens.models.decoder import Decoder, check_choice, check_sizes
from smearlens.nn.attention import Attention
from smearlens.nn.layers import Block

_CHARS = {"d_model": 384, "n_heads": 6, "n_layers": 6, "n_ctx": 256, "dropout": 0.2}
_AS_SHAKESPEARE = "the character model of nanoGPT on {}, as in the write-up on attention patterns"


@dataclass(frozen=True, kw_only=True)
class CharGPTConfig:
    """Sizes and switches of a CharGPT."""

    d_vocab: int  # kinds of tokens
    d_model: int = 384  # width of the residual stream
    n_heads: int = 6  # each d_model / n_heads wide
    n_layers: int = 6  # blocks of attention and MLP
    n_ctx: int = 256  # longest sequence, in tokens
    # added to the embedding: trained, fixed, or trained from the fixed on; rotary turns Q and K
    positions: Literal["learned", "sinusoidal", "learned-sinusoidal", "rotary"] | None = "learned"
    bias: bool = False  # in linear maps and LayerNorms; GPT-2 has them, nanoGPT trains without
    gelu: Literal["exact", "tanh"] = "exact"  # as nanoGPT; "tanh" is the form that GPT-2 has
    tied: bool = True  # unembed with the embedding
    dropout: float = 0.0  # on the embedding and on what attention and MLP add

    def __post_init__(self):
        check_sizes(self, "d_vocab", "d_model", "n_heads", "n_layers", "n_ctx")
        check_choice("gelu", self.gelu, ("exact", "tanh"))

    @property
    def norm(self) -> bool:
        """A LayerNorm stands before the unembedding."""
        return True


class CharGPT(Decoder):
    """A decoder of the GPT-2 shape: pre-LayerNorm, MLP 4 · d_model wide with GELU.

    Weights start normal with s.d. 0.02, those of the maps that add to the residual stream with
    0.02 / √(2 n_layers), biases at 0.

    Source:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3;
        Karpathy, nanoGPT, `model.py`
    """

    config_class = CharGPTConfig
    presets = {  # noqa: RUF012
        "shakespeare": Preset(
            "nanoGPT, config/train_shakespeare_char.py: tiny Shakespeare, 65 characters",
            {"d_vocab": 65, **_CHARS},
        ),
        "enwik8": Preset(_AS_SHAKESPEARE.format("the bytes of enwik8"), {"d_vocab": 256, **_CHARS}),
        "text8": Preset(
            _AS_SHAKESPEARE.format("the 27 letters of text8"), {"d_vocab": 27, **_CHARS}
        ),
        "cpu": Preset(
            "nanoGPT, README: tiny Shakespeare on a CPU, minutes of training",
            {"d_vocab": 65, "d_model": 128, "n_heads": 4, "n_layers": 4, "n_ctx": 64},
        ),
    }
    config: CharGPTConfig

    def __init__(self, config: CharGPTConfig):
        self._require(config)
        d_model, bias, rotary = config.d_model, config.bias, config.positions == "rotary"
        blocks = [
            Block(
                Attention(d_model, config.n_heads, rotary=rotary, bias=bias),
                d_model=d_model,
                d_mlp=4 * d_model,
                norm=True,
                dropout=config.dropout,
                bias=bias,
                gelu="none" if config.gelu == "exact" else "tanh",
            )
            for _ in range(config.n_layers)
        ]
        super().__init__(config, blocks)
        self.ln_final = nn.LayerNorm(d_model, bias=bias)
        if config.tied:
            self.unembed.weight = self.embed.weight
        self._start()
        self.setup()

    def _start(self) -> None:
        """Draw the weights as GPT-2 does."""
        into_stream = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2 and (
                name != "pos_embed.table" or self.config.positions == "learned"
            ):
                inner = not name.endswith(("out_proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 if inner else into_stream)
