"""Depthwise convolution over positions, and smeared keys: the two cheapest ways to look back.

Contains the convolution as a function (tap by tap, in tiles that stay in the processor's cache),
its plain twin, and the two hooked modules. Leaves out what a kernel says about a model: `analysis`
reads that from caches.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens._explain import describe, explained
from smearlens._hooks import HookPoint, is_hooked
from smearlens._tracing import is_traced

_TILE = 2**18  # numbers per tile: 1 MB of float32, so that all taps find it in the cache


def depthwise_conv(
    x: Float[Tensor, "batch pos channel"],
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None = None,
    *,
    future: int = 0,
) -> Float[Tensor, "batch pos channel"]:
    r"""Convolve each channel over its positions: tap i reads lag i - future.

    $$y[t, c] = b[c] + \sum_i w[c, i] \; x[t - (i - \text{future}), c]$$

    with zeros outside the sequence. float32 and float64 on the CPU go tap by tap; everything else
    goes to `depthwise_conv_plain`. Mixed precisions are raised to the widest of them first.

    Args:
        x: the input
        weight: the kernel; with `future=0`, `weight[:, 1]` is the previous-token tap
        bias: added to every position
        future: taps that read ahead. 0 is causal; the "same" padding of `nn.Conv1d`,
            `padding=(K - 1) // 2`, is K // 2

    Raises:
        ValueError: if the channels differ, or `future` is not in 0..K-1
    """
    _check(x, weight, bias, future)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    if x.device.type == "cpu" and dtype in (torch.float32, torch.float64) and not is_traced():
        run = _TapByTap.apply if torch.is_grad_enabled() else _convolve  # apply takes 0.1 ms
        return run(x.contiguous(), weight, bias, future)
    return depthwise_conv_plain(x, weight, bias, future=future)


def depthwise_conv_plain(
    x: Float[Tensor, "batch pos channel"],
    weight: Float[Tensor, "channel tap"],
    bias: Float[Tensor, " channel"] | None = None,
    *,
    future: int = 0,
) -> Float[Tensor, "batch pos channel"]:
    """`depthwise_conv` by `F.conv1d`: the reference, and what runs on accelerators."""
    channels, taps = weight.shape
    padded = F.pad(rearrange(x, "batch pos chan -> batch chan pos"), (taps - 1 - future, future))
    kernel = rearrange(weight.flip(-1), "chan tap -> chan 1 tap")  # conv1d correlates
    y = F.conv1d(padded, kernel, bias, groups=channels)
    return rearrange(y, "batch chan pos -> batch pos chan")


class _TapByTap(torch.autograd.Function):
    """`depthwise_conv` of contiguous CPU tensors of one dtype."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, future: int) -> Tensor:
        return _convolve(x, weight, bias, future)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        *tensors, ctx.future = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (x, weight, bias) = grads, ctx.saved_tensors
        future, taps, wants = ctx.future, weight.shape[1], ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # create_graph=True: someone differentiates this gradient
            own: list = [t if t is None else t.view_as(t) for t in (x, weight, bias)]  # x may use w
            wanted = [t for t, want in zip(own, wants, strict=True) if want]
            y = depthwise_conv_plain(*own, future=future)
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if want else None for want in wants), None
        dy = dy.contiguous()
        dx = _convolve(dy, weight.flip(-1), None, taps - 1 - future) if wants[0] else None
        dw = _correlate(dy, x, taps, future) if wants[1] else None
        return dx, dw, dy.sum((0, 1)) if wants[2] else None, None


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, future: int) -> Tensor:
    """All taps on one tile of the output, then the next tile."""
    y = torch.empty_like(x)
    taps = weight.t().contiguous()  # [tap channel]
    lags = [i - future for i in range(len(taps)) if i != future]
    for rows, start, stop in _tiles(*x.shape):
        here, out = x[rows, start:stop], y[rows, start:stop]
        if bias is None:
            torch.mul(here, taps[future], out=out)
        else:
            torch.addcmul(bias, here, taps[future], out=out)
        for lag in lags:
            lo, hi = max(start, lag), min(stop, x.shape[1] + lag)
            if lo < hi:
                y[rows, lo:hi].addcmul_(x[rows, lo - lag : hi - lag], taps[lag + future])
    return y


def _correlate(dy: Tensor, x: Tensor, taps: int, future: int) -> Tensor:
    """Gradient of the kernel: the sum over batch and t of dy[t] · x[t - lag], [channel tap]."""
    dw = dy.new_zeros(taps, dy.shape[2])
    for rows, start, stop in _tiles(*x.shape):
        for tap in range(taps):
            lag = tap - future
            lo, hi = max(start, lag), min(stop, x.shape[1] + lag)
            if lo < hi:
                dw[tap] += (dy[rows, lo:hi] * x[rows, lo - lag : hi - lag]).sum((0, 1))
    return dw.t()


def _tiles(batch: int, length: int, channels: int) -> Iterator[tuple[slice, int, int]]:
    """Cut [batch pos channel] into (batch rows, start, stop) of at most _TILE numbers."""
    span = max(1, min(length, _TILE // channels))
    rows = max(1, _TILE // (span * channels))
    for first in range(0, batch, rows):
        for start in range(0, length, span):
            yield slice(first, first + rows), start, min(start + span, length)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, future: int) -> None:
    channels, taps = weight.shape
    if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[2] != channels:
        raise ValueError(
            f"x must be [batch pos channel] with the {channels} channels of the weight "
            f"[channel tap], got {list(x.shape) if isinstance(x, Tensor) else describe(x)}"
        )
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"bias must be [channel] = [{channels}], got {list(bias.shape)}")
    if not 0 <= future < taps:
        raise ValueError(
            f"future={future} taps of {taps} cannot read ahead; allowed: 0 (causal) to {taps - 1}"
        )


@explained
class DepthwiseConv(nn.Module):
    r"""y[t, c] = b[c] + Σ_i w[c, i] · x[t - lags[i], c], one kernel per channel.

    Args:
        channels: width of the input and of the output
        kernel_size: taps
        causal: True reads lags 0..K-1. False centres the kernel, lags -(K // 2)..(K - 1) // 2, as
            `padding=(K - 1) // 2` does; negative lags are tokens that come later
        bias: whether a constant per channel is added
    """

    def __init__(self, channels: int, kernel_size: int, *, causal: bool = True, bias: bool = False):
        super().__init__()
        for name, value in (("channels", channels), ("kernel_size", kernel_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.causal = causal
        self.name = ""  # the model's setup() writes the module's path here; it prefixes `state`
        self.weight = nn.Parameter(torch.empty(channels, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.hook_in = HookPoint()  # [batch pos channel]
        self.hook_kernel = HookPoint()  # [channel tap]
        self.hook_out = HookPoint()  # [batch pos channel]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new weights uniformly within ±1/√kernel_size, as a depthwise `nn.Conv1d` does."""
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @property
    def lags(self) -> list[int]:
        """How many tokens back each tap reads; negative ones read ahead."""
        return [tap - self._future for tap in range(self.weight.shape[1])]

    def forward(
        self, x: Float[Tensor, "batch pos channel"], *, state: dict[str, Tensor] | None = None
    ) -> Float[Tensor, "batch pos channel"]:
        """Convolve `x`; with `state`, as what follows the positions that `state` has seen.

        `state` holds the last inputs of earlier calls under `{name}.past`; it is updated.
        """
        if state is not None:
            y, state[f"{self.name}.past"] = self.step(x, state.get(f"{self.name}.past"))
            return y
        x, kernel = self.hook_in(x), self._kernel()
        return self.hook_out(depthwise_conv(x, kernel, self.bias, future=self._future))

    def step(
        self,
        x_new: Float[Tensor, "batch new channel"],
        buffer: Float[Tensor, "batch past channel"] | None = None,
    ) -> tuple[Float[Tensor, "batch new channel"], Float[Tensor, "batch past channel"]]:
        """The next outputs and the next buffer: pieces put together equal one full forward.

        Args:
            x_new: one or more new positions
            buffer: the last K-1 inputs, oldest first, as the call before returned them; None at
                the start of the sequences

        Raises:
            ValueError: if the kernel reads ahead, or the buffer does not hold K-1 inputs
        """
        if not self.causal:
            raise ValueError(
                "a convolution with causal=False reads tokens that do not exist yet: "
                "run it on the whole sequence, or build it with causal=True"
            )
        _check(x_new, self.weight, self.bias, 0)
        (batch, _, channels), past = x_new.shape, self.weight.shape[1] - 1
        if buffer is None:
            buffer = x_new.new_zeros(batch, past, channels)
        elif buffer.shape != (batch, past, channels):
            raise ValueError(
                f"buffer must hold the last {past} inputs, {[batch, past, channels]}, "
                f"got {list(buffer.shape)}; buffer=None starts a sequence"
            )
        seen = torch.cat((buffer, self.hook_in(x_new)), dim=1)
        if x_new.shape[1] != 1:
            y = depthwise_conv(seen, self._kernel(), self.bias)[:, past:]
        else:  # decoding: one sum over the taps
            y = (seen * self._kernel().flip(-1).t()).sum(1, keepdim=True)
            y = y if self.bias is None else y + self.bias
        return self.hook_out(y), seen[:, seen.shape[1] - past :].clone()

    @property
    def _future(self) -> int:
        return 0 if self.causal else self.weight.shape[1] // 2

    def _kernel(self) -> Float[Tensor, "channel tap"]:
        point = self.hook_kernel  # gets a copy: a cached kernel must not follow the optimiser
        return point(self.weight.clone()) if is_hooked(point) else self.weight

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        channels, taps = self.weight.shape
        return f"{channels}, kernel_size={taps}, causal={self.causal}, bias={self.bias is not None}"


@explained
class KeySmear(nn.Module):
    r"""Smeared keys: each head mixes the previous key into every key but the first.

    $$k'_t = \sigma(\alpha_h) \, k_t + (1 - \sigma(\alpha_h)) \, k_{t-1}, \qquad k'_0 = k_0$$

    It lets one attention layer match a token by what stood before it. `hook_weight` is the weight
    on the previous key, 1 - σ(α): 0 ablates the module, 1 replaces each key by the one before.

    Args:
        n_heads: heads, one α each
        alpha: initial α; 0 mixes both keys in equal parts

    Source:
        Olsson et al. 2022, "In-context Learning and Induction Heads", smeared key
    """

    def __init__(self, n_heads: int, *, alpha: float = 0.0):
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"n_heads must be at least 1, got {n_heads}")
        self.name = ""  # the model's setup() writes the module's path here; it prefixes `state`
        self.alpha = nn.Parameter(torch.full((n_heads,), float(alpha)))
        self.hook_weight = HookPoint()  # [head], weight on the previous key

    def forward(
        self, k: Float[Tensor, "batch pos head d_head"], *, state: dict[str, Tensor] | None = None
    ) -> Float[Tensor, "batch pos head d_head"]:
        """Smear `k`; with `state`, as the keys that follow those that `state` has seen.

        Args:
            k: keys as projected
            state: the last key of earlier calls under `{name}.last`; read and updated
        """
        heads = len(self.alpha)
        fits = isinstance(k, Tensor) and k.ndim == 4 and k.shape[2] == heads
        if not fits or not k.is_floating_point():
            raise ValueError(f"k must be [batch pos head={heads} d_head], got {describe(k)}")
        last = None if state is None else state.get(f"{self.name}.last")
        if state is not None:
            state[f"{self.name}.last"] = k[:, -1:].clone()
        weight = rearrange(self.hook_weight(torch.sigmoid(-self.alpha)), "head -> head 1")
        before = torch.cat((k[:, :1] if last is None else last, k[:, :-1]), dim=1)
        return torch.lerp(k, before, weight.to(k.dtype))  # the first key meets itself: unchanged
