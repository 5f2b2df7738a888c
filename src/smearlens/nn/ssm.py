"""The selective state-space layer of Mamba, every intermediate hooked.

| here | Gu & Dao 2023 | shape |
|---|---|---|
| `u` | x after convolution and activation | batch pos channel |
| `delta` | Δ | batch pos channel |
| `A`, `B`, `C`, `D` | A, B, C, D | [channel d_state], [batch pos d_state] twice, [channel] |
| channel | D · E, the inner width | `d_inner` |

Leaves out the recurrence (`nn.scan`), its discretisation (`nn.discretize`), the convolution before
it and the projections around it (`models.mamba`).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from smearlens._hooks import HookPoint, is_hooked
from smearlens.nn.discretize import (
    at_least_float32,
    discretize,
    rule_named,
    without_autocast,
)
from smearlens.nn.scan import selective_scan, selective_step
from smearlens.nn.scan_variants import METHODS, linear_scan

DeltaKind = Literal["selective", "constant", "position"]


class SelectiveSSM(nn.Module):
    r"""y = scan(Ā, B̄ u) C + D u with Δ, B and C read off the input (S6).

    $$h_t = \bar A_t h_{t-1} + \bar B_t u_t, \qquad y_t = C_t h_t + D u_t$$

    Args:
        d_inner: channels
        d_state: states per channel
        dt_rank: rank of the map that makes Δ
        rule: discretisation, "mamba", "zoh", "bilinear" or "bilinear-clamped"
        a: "learned" (A = -exp(A_log), started at -1, -2, …) or "minus-one" (A = -1 throughout, so
            that Δ alone decides what is kept)
        delta: "selective" (from the token), "constant" (one learned Δ per channel), "position"
            (from the position embedding)
        scale_delta: divide Δ by √d_inner
        n_ctx: positions, for delta="position"
        method: "fused", or a method of `nn.scan_variants.linear_scan`

    Raises:
        ValueError: for another rule, a, delta or method, or delta="position" without n_ctx
    """

    def __init__(
        self,
        d_inner: int,
        *,
        d_state: int,
        dt_rank: int,
        rule: str = "mamba",
        a: Literal["learned", "minus-one"] = "learned",
        delta: DeltaKind = "selective",
        scale_delta: bool = False,
        n_ctx: int = 0,
        method: str = "fused",
    ):
        super().__init__()
        rule_named(rule)
        _check_kinds(a, delta, method, n_ctx)
        self.name = ""  # the model's setup() writes the module's path here; it prefixes `state`
        self.d_state, self.dt_rank, self.rule, self.method = d_state, dt_rank, rule, method
        self.delta_kind, self.scale = delta, d_inner**-0.5 if scale_delta else 1.0
        self.low = dt_rank if delta == "selective" else 0  # width that the input gives to Δ
        self.x_proj = nn.Linear(d_inner, self.low + 2 * d_state, bias=False)  # Δ, B, C
        self._add_delta_weights(d_inner, dt_rank, n_ctx)
        self.D = nn.Parameter(torch.ones(d_inner))
        if a == "learned":
            steps = torch.arange(1, d_state + 1)
            self.A_log = nn.Parameter(steps.log().repeat(d_inner, 1))
        else:  # one decay for all states of a channel: A_bar keeps an axis of size 1
            self.register_buffer("A_log", torch.zeros(d_inner, 1))
        self.hook_u = HookPoint()  # [batch pos channel]
        self.hook_delta_raw = HookPoint()  # [batch pos channel], before the softplus
        self.hook_delta = HookPoint()  # [batch pos channel]
        self.hook_B = HookPoint()  # [batch pos d_state]
        self.hook_C = HookPoint()  # [batch pos d_state]
        self.hook_A_bar = HookPoint()  # [batch pos channel d_state]
        self.hook_B_bar = HookPoint()  # [batch pos channel d_state]
        self.hook_write = HookPoint()  # [batch pos channel d_state], B_bar · u
        self.hook_state = HookPoint()  # [batch pos channel d_state], after the token is written
        self.hook_y = HookPoint()  # [batch pos channel], before the gate
        self.hook_gate = HookPoint()  # [batch pos channel], after its SiLU

    @property
    def A(self) -> Float[Tensor, "channel d_decay"]:
        """The negative decay rates; [channel 1] where all states share one."""
        return -at_least_float32(self.A_log)[0].exp()

    @property
    def path(self) -> str:
        """Which computation the next forward takes, and why."""
        points = (self.hook_A_bar, self.hook_B_bar, self.hook_write, self.hook_state)
        hooked = [p.name for p in points if is_hooked(p)]
        if hooked:
            return f"plain: {', '.join(str(name) for name in hooked)} hooked"
        if self.method != "fused":
            return f"plain: method={self.method!r}"
        return "fused: no state-sized hook is attached"

    def forward(
        self,
        u: Float[Tensor, "batch pos channel"],
        gate: Float[Tensor, "batch pos channel"],
        *,
        state: dict[str, Tensor] | None = None,
    ) -> Float[Tensor, "batch pos channel"]:
        """Run the layer and gate it: y · SiLU(gate).

        Args:
            u: input, after convolution and activation
            gate: the other half of the in-projection
            state: where earlier tokens left the recurrence; read and updated. With
                delta="position" its "tokens" [batch earlier], which a model writes, count positions

        Raises:
            ValueError: if delta="position" and `state` holds earlier positions but no "tokens"
        """
        u = self.hook_u(u)
        first = None if state is None else state.get(f"{self.name}.state")
        past = 0 if state is None or "tokens" not in state else state["tokens"].shape[1]
        if self.delta_kind == "position" and first is not None and not past:
            raise ValueError(
                "state holds earlier positions but no 'tokens' that count them, and "
                "delta='position' needs their number: put the tokens so far [batch earlier] into "
                "state['tokens'] after each piece, as a model does"
            )
        low, B, C = self.x_proj(u).split([self.low, self.d_state, self.d_state], dim=-1)
        delta = self.hook_delta(self._delta(low, past))
        B, C = self.hook_B(B), self.hook_C(C)
        if not self.path.startswith("fused"):
            y, last = self._plain(u, delta, B, C, first)
        elif first is not None and u.shape[1] == 1:  # decoding: one step needs no scan
            y, last = selective_step(
                u[:, 0], delta[:, 0], self.A, B[:, 0], C[:, 0], first, self.rule
            )
            y = y.unsqueeze(1)
        else:
            y, last = selective_scan(u, delta, self.A, B, C, rule=self.rule, initial_state=first)
        if state is not None:
            state[f"{self.name}.state"] = last
        return self.hook_y(torch.addcmul(y, self.D, u)) * self.hook_gate(F.silu(gate))

    def _add_delta_weights(self, d_inner: int, dt_rank: int, n_ctx: int) -> None:
        """The weights that this kind of Δ needs, and no others."""
        if self.delta_kind == "constant":
            self.dt_bias = nn.Parameter(_delta_bias(d_inner))
            return
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
        self.dt_proj.bias = nn.Parameter(_delta_bias(d_inner))
        if self.delta_kind == "position":
            self.dt_position = nn.Parameter(torch.randn(n_ctx, dt_rank) * 0.1)

    def _delta(self, low: Tensor, past: int) -> Tensor:
        """Δ = softplus(raw), raw as `delta_kind` says."""
        if self.delta_kind == "constant":
            raw = self.dt_bias.repeat(*low.shape[:2], 1)
        elif self.delta_kind == "position":
            positions = self.dt_proj(self.dt_position[past : past + low.shape[1]])
            raw = positions.repeat(low.shape[0], 1, 1)
        else:
            raw = self.dt_proj(low)
        delta = F.softplus(self.hook_delta_raw(raw))
        return delta if self.scale == 1.0 else delta * self.scale

    def _plain(
        self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The definition, every state in memory and behind its hook."""
        A_bar, B_bar = discretize(delta, self.A, B, self.rule)
        A_bar = self.hook_A_bar(A_bar.expand_as(B_bar))
        write = self.hook_write(self.hook_B_bar(B_bar) * u.unsqueeze(-1))
        method = "sequential" if self.method == "fused" else self.method
        states, last = linear_scan(A_bar, write, initial_state=first, method=method)
        states = self.hook_state(states)
        with without_autocast(u.device):  # as the fused path
            y = torch.einsum("bpcn,bpn->bpc", states, C.to(states.dtype))
        return y.to(u.dtype), last


def _check_kinds(a: str, delta: str, method: str, n_ctx: int) -> None:
    """Raise a ValueError unless each names something there is, and positions have a number."""
    for name, given, allowed in (
        ("a", a, ("learned", "minus-one")),
        ("delta", delta, get_args(DeltaKind)),
        ("method", method, ("fused", *METHODS)),
    ):
        if given not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, got {given!r}")
    if delta == "position" and n_ctx < 1:
        raise ValueError(f"delta='position' needs n_ctx, the number of positions, got {n_ctx}")


def _delta_bias(d_inner: int, low: float = 1e-3, high: float = 0.1) -> Tensor:
    """A bias for which softplus(bias) is log-uniform in low..high, [channel].

    Source:
        Gu & Dao 2023, section 3.6
    """
    delta = torch.exp(torch.rand(d_inner) * (math.log(high) - math.log(low)) + math.log(low))
    return delta + torch.log(-torch.expm1(-delta))  # inverse of softplus
