"""AttnAttn: embedding → n × attention → unembedding.

With two layers the first can move the previous token into each position and the second can match
on it: the classical induction circuit, against which `ConvAttn` is compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smearlens.models.base import Preset
from smearlens.models.decoder import Decoder, check_sizes
from smearlens.nn.attention import Attention
from smearlens.nn.layers import Block


@dataclass(frozen=True, kw_only=True)
class AttnAttnConfig:
    """Sizes and switches of an AttnAttn."""

    d_vocab: int  # kinds of tokens
    d_model: int = 512  # width of the residual stream
    n_heads: int = 8  # each d_model / n_heads wide
    n_layers: int = 2  # attention layers
    n_ctx: int = 256  # longest sequence, in tokens
    # added to the embedding: trained, fixed, or trained from the fixed on; rotary turns Q and K
    positions: Literal["learned", "sinusoidal", "learned-sinusoidal", "rotary"] | None = "learned"
    residual: bool = True  # each layer adds to its input instead of replacing it
    norm: bool = False  # LayerNorm before attention, MLP and unembedding
    mlp: bool = False  # 4 · d_model wide, after each attention
    dropout: float = 0.0  # on the embedding and on what attention and MLP add

    def __post_init__(self):
        check_sizes(self, "d_vocab", "d_model", "n_heads", "n_layers", "n_ctx")


class AttnAttn(Decoder):
    """Embedding → n × multi-head attention → unembedding."""

    config_class = AttnAttnConfig
    presets = {  # noqa: RUF012
        "paper": Preset(
            "Attn-Attn of the k=5 write-up", {"d_vocab": 50257, "n_layers": 4, "residual": False}
        ),
        "k3": Preset(
            "Attn-Attn of the k=3 write-up",
            {
                "d_vocab": 50257, "d_model": 256, "n_heads": 4, "n_layers": 2, "n_ctx": 128,
                "residual": False,
            },
        ),
        "cpu": Preset(
            "trains in seconds on repeated tokens",
            {"d_vocab": 64, "d_model": 64, "n_heads": 4, "n_layers": 2, "n_ctx": 64},
        ),
    }  # fmt: skip
    config: AttnAttnConfig

    def __init__(self, config: AttnAttnConfig):
        self._require(config)
        blocks = [
            Block(
                Attention(config.d_model, config.n_heads, rotary=config.positions == "rotary"),
                d_model=config.d_model,
                d_mlp=4 * config.d_model if config.mlp else None,
                residual=config.residual,
                norm=config.norm,
                dropout=config.dropout,
            )
            for _ in range(config.n_layers)
        ]
        super().__init__(config, blocks)
