"""Position information: learned table, sinusoids (Vaswani et al. 2017), rotary (Su et al. 2021).

Absolute positions are added to the embedding; the rotary map turns queries and keys inside the
attention layer, so that their product depends on the lag alone.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn


def sinusoids(n_ctx: int, d_model: int) -> Float[Tensor, "pos d_model"]:
    """Sine and cosine of the position at geometrically spaced wavelengths, 2π to 20,000π.

    Source:
        Vaswani et al. 2017, section 3.5
    """
    position = torch.arange(n_ctx, dtype=torch.float64)[:, None]
    even = torch.arange(0, d_model, 2, dtype=torch.float64)
    angle = position * torch.exp(-math.log(10_000.0) * even / d_model)
    table = torch.zeros(n_ctx, d_model, dtype=torch.float64)
    table[:, 0::2] = angle.sin()
    table[:, 1::2] = angle.cos()[:, : d_model // 2]
    return table.to(torch.get_default_dtype())


class Positions(nn.Module):
    """Absolute positions to add to an embedding.

    Args:
        n_ctx: longest sequence, in tokens
        d_model: width
        kind: "learned" (normal with s.d. 0.1), "sinusoidal" (fixed), or "learned-sinusoidal"
            (trained, started from the sinusoids)
    """

    def __init__(self, n_ctx: int, d_model: int, kind: str):
        super().__init__()
        self.n_ctx = n_ctx
        start = (
            torch.randn(n_ctx, d_model) * 0.1 if kind == "learned" else sinusoids(n_ctx, d_model)
        )
        if kind == "sinusoidal":
            self.register_buffer("table", start, persistent=False)
        else:
            self.table = nn.Parameter(start)

    def forward(self, start: int, length: int) -> Float[Tensor, "pos d_model"]:
        """Rows `start` to `start + length` of the table."""
        return self.table[start : start + length]


class Rotary(nn.Module):
    """Turn each pair of channels (c, c + d_head/2) by position / base^(2c / d_head).

    The half-split convention of GPT-NeoX and Llama checkpoints.

    Source:
        Su et al. 2021, "RoFormer", equation 34
    """

    def __init__(self, d_head: int, base: float = 10_000.0):
        super().__init__()
        if d_head % 2:
            raise ValueError(f"rotary positions need an even d_head, got {d_head}; change n_heads")
        self.d_head, self.base = d_head, base

    def forward(
        self, x: Float[Tensor, "batch pos head d_head"], start: int = 0
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Rotate `x`, whose first token stands at position `start`."""
        wide = torch.promote_types(x.dtype, torch.float32)  # half a digit of an angle is no angle
        even = torch.arange(0, self.d_head, 2, device=x.device, dtype=wide)
        position = torch.arange(start, start + x.shape[1], device=x.device, dtype=wide)
        angle = torch.outer(position, self.base ** (-even / self.d_head))[:, None, :]
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
