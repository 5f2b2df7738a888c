"""The implicit attention of a whole Mamba block: convolution, state-space layer and gate as one.

Contains `ImplicitMixing`, from the input of the convolution to the gated output, and finding it in
a cache. Leaves out the projections before and after, and the norm: they mix no positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens._explain import explained, require_cache
from smearlens.analysis.mixing.bands import kernel_lags
from smearlens.analysis.mixing.layers import mixings
from smearlens.analysis.mixing.state_space import ChannelMixing, SSMMixing


class ImplicitMixing(ChannelMixing):
    r"""One signed lower-triangular matrix per example and channel, for a whole block.

    $$M_{blk}[c] = \operatorname{diag}(g[c])\,(M[c] + D[c] I)\,\operatorname{diag}(\sigma(v[c]))\,
    W[c], \qquad W[c][t, s] = w[c, t - s]$$

    v is the output of the convolution, which SiLU turns into v · σ(v); g the gate after its SiLU; M
    the hidden attention; w the kernel. Exact given the activations: g · y = M_blk x + what the
    convolution's bias adds, which `reconstruct` includes. Rows are streamed as those of M are, and
    cost one multiply-add per tap more; a diagonal costs as many of M as there are taps.

    Args:
        hidden: M, the mixing of the state-space layer
        gate: g
        conv_out: v
        kernel: w; tap i reads lag `lags[i]`
        lags: of the taps, none negative
        skip: D; None leaves the skip out
        bias: of the convolution

    Source:
        after Zimerman, Ali & Wolf 2024, "A Unified Implicit Attention Formulation for Gated-Linear
        Recurrent Sequence Models"
    """

    def __init__(
        self,
        hidden: SSMMixing,
        gate: Float[Tensor, "batch pos channel"],
        conv_out: Float[Tensor, "batch pos channel"],
        kernel: Float[Tensor, "channel tap"],
        lags: Sequence[int],
        *,
        skip: Float[Tensor, " channel"] | None = None,
        bias: Float[Tensor, " channel"] | None = None,
    ):
        self.hidden, self.lags = hidden, list(lags)
        self.n_examples, self.n_heads = hidden.n_examples, hidden.n_heads
        self.n_queries = self.n_keys = hidden.n_keys
        sizes = (self.n_examples, self.n_keys, self.n_heads)
        for name, given, wanted in [
            ("gate [batch pos channel]", gate, sizes),
            ("conv_out [batch pos channel]", conv_out, sizes),
            ("kernel [channel tap]", kernel, (self.n_heads, len(self.lags))),
            ("skip [channel]", skip, (self.n_heads,)),
            ("bias [channel]", bias, (self.n_heads,)),
        ]:
            if given is not None and tuple(given.shape) != wanted:
                raise ValueError(f"{name} must be {wanted}, got {tuple(given.shape)}")
        if min(self.lags) < 0:
            raise ValueError(
                f"a block of a causal layer reads no lag below 0, got lags {self.lags}"
            )
        none = kernel.new_zeros(self.n_heads)
        parts = (gate, conv_out, kernel, none if skip is None else skip,
                 none if bias is None else bias)  # fmt: skip
        wide = torch.promote_types(gate.dtype, torch.float32)
        self._gate, self._v, self._kernel, self._skip, self._bias = (
            x.detach().to(wide) for x in parts
        )
        self._sigma = torch.sigmoid(self._v)

    def channels(self, start: int, stop: int) -> ImplicitMixing:
        """The mixing of these channels alone."""
        self._check_channels(start, stop)
        now = slice(start, stop)
        return ImplicitMixing(
            self.hidden.channels(start, stop),
            self._gate[..., now],
            self._v[..., now],
            self._kernel[now],
            self.lags,
            skip=self._skip[now],
            bias=self._bias[now],
        )

    def rows(self, start: int, stop: int) -> Float[Tensor, "batch head rows key"]:
        """Rows `start` to `stop`, all keys."""
        return self._through(self.hidden.rows(start, stop), start)

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """All rows, `size` at a time, as (start, stop, rows [batch head rows key])."""
        for start, stop, rows in self.hidden.blocks(size or self._block_size()):
            yield start, stop, self._through(rows, start)

    def diagonal(self, lag: int) -> Float[Tensor, "batch head entry"]:
        """Entries M_blk[i, i - lag]: for each tap the entries of M that lead to it."""
        first, last = self._extent(lag)
        entries = self._gate.new_zeros(self.n_examples, self.n_heads, last - first)
        for tap, reach in enumerate(self.lags):
            step = lag - reach  # of M: from i back to i - step, and from there the tap
            if step < 0:
                continue
            own = self.hidden.diagonal(step)[..., reach:]  # the tap reads position 0 or later
            if step == 0:
                own = own + self._skip[:, None]
            middle = self._sigma[:, reach : self.n_keys - step].mT
            entries += own * middle * self._kernel[:, tap, None]
        return entries * self._gate[:, first:last].mT

    def reconstruct(
        self, x: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch pos channel"]:
        """M_blk x and what the bias adds: the block's gated output, before its projection."""
        v = self._bias.expand_as(self._v).clone()
        for tap, lag in enumerate(self.lags):
            if lag < self.n_keys:
                v[:, lag:] += self._kernel[:, tap] * x[:, : self.n_keys - lag]
        u = v * self._sigma
        return (self.hidden.reconstruct(u) + self._skip * u) * self._gate

    def _through(self, rows: Tensor, start: int) -> Tensor:
        """Rows of M, sent on through activation and convolution, and gated."""
        size = rows.shape[-2]
        rows.diagonal(start, -2, -1).add_(self._skip[:, None])
        rows *= self._sigma.mT[:, :, None]
        found = torch.zeros_like(rows)
        for tap, lag in enumerate(self.lags):
            if lag < self.n_keys:
                weight = self._kernel[:, tap, None, None]
                found[..., : self.n_keys - lag].addcmul_(rows[..., lag:], weight)
        return found.mul_(self._gate[:, start : start + size].mT[..., None])


@explained
def implicit_mixings(
    cache: Mapping[str, Tensor] | Any, *, skips: Mapping[str, Tensor] | None = None
) -> dict[str, ImplicitMixing]:
    """The implicit attention of every block with a convolution before its state-space layer.

    What it returns can be given to any score in the place of a cache.

    Args:
        cache: with `hook_in`, `hook_kernel`, `hook_out` of `blocks.0.conv` and `hook_A_bar`,
            `hook_B_bar`, `hook_C`, `hook_gate` of `blocks.0.ssm`, and so on
        skips: D of each block by name, such as {"blocks.0": model.blocks[0].ssm.D}, which is a
            weight and in no cache; a block without one is taken to have none

    Raises:
        ValueError: if the cache holds no such block, or only part of one
    """
    require_cache("cache", cache)
    skips, names = skips or {}, set(cache.keys())
    found = {}
    for layer, hidden in mixings(cache, kind="ssm").items():
        assert isinstance(hidden, SSMMixing)
        block = layer.rpartition(".")[0]
        needed = [f"{block}.conv.{p}" for p in ("hook_in", "hook_kernel", "hook_out")]
        needed.append(f"{layer}.hook_gate")
        if missing := [name for name in needed if name not in names]:
            raise ValueError(f"implicit attention of {block!r} needs {missing} in the cache")
        x, kernel, v, gate = (cache[name] for name in needed)
        x, v, gate = (t if t.ndim == 3 else t[None] for t in (x, v, gate))
        lags = kernel_lags(cache, f"{block}.conv")
        found[block] = ImplicitMixing(
            hidden, gate, v, kernel, lags, skip=skips.get(block), bias=_bias(x, kernel, v, lags)
        )
    if unknown := set(skips) - set(found):
        raise ValueError(f"skips for {sorted(unknown)}; blocks in the cache: {list(found)}")
    return found


def _bias(x: Tensor, kernel: Tensor, v: Tensor, lags: Sequence[int]) -> Float[Tensor, " channel"]:
    """What the convolution added to every position: read off the first, where one tap acts."""
    return (v - x * kernel[:, lags.index(0)])[:, 0].mean(0)
