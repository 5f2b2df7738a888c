"""Interventions on what a state-space layer remembers: its states, its steps, its convolution.

Contains moving a state into another run, and edits that isolate one carrier of the past. All are
hooks for whole sequences. Leaves out edits of activations (`causal.patch`), taps (`causal.lags`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from smearlens._explain import explained
from smearlens._hooks import HookedRootModule
from smearlens.causal.patch import Recovery
from smearlens.causal.running import BehaviourMetric, Hooks, activations, observed, scored

Layers = str | Sequence[str] | None


@explained
@observed
def state_patch(
    model: HookedRootModule,
    clean: Int[Tensor, "batch pos"],
    corrupt: Int[Tensor, "other_batch other_pos"],
    layers: Layers = None,
    *,
    donor: int | Int[Tensor, " batch"],
    recipient: int | Int[Tensor, " batch"] | None = None,
    channels: Sequence[int] | None = None,
    propagate: bool = True,
    metric: BehaviourMetric,
) -> Recovery:
    """Run `corrupt` with the states that the clean run had reached after one position.

    With `propagate` the recurrence goes on from the new state, so every later state follows;
    without, only what is read out at that position changes. They are different experiments.

    Args:
        model: with state-space layers
        clean: tokens with the behaviour
        corrupt: tokens without it, as many sequences, of whatever length
        layers: such as "blocks.0.ssm", or several; default all. Only all of them together hold
            everything that the recurrences know of the past
        donor: position in `clean` whose state is taken, after its token was written; one for all
            sequences or one each; negative counts from the end
        recipient: position in `corrupt` that gets it; default `donor`
        channels: which channels to move; default all
        propagate: whether later states follow
        metric: (logits, tokens) to one number per example; it is given the clean tokens in every
            run, and the logits of `corrupt` moved so that `recipient` lies at `donor`: NaN at
            positions of `clean` that have no counterpart

    Returns:
        the metric of the clean, corrupt and patched run, and of one patched with the states of
        another clean example (NaN with a single one)

    Raises:
        ValueError: for layers, positions or channels that the model or the tokens do not have, or a
            metric that returns anything but one number per example
    """
    if len(clean) != len(corrupt):
        raise ValueError(f"clean and corrupt differ in number: {len(clean)}, {len(corrupt)}")
    donor = _positions("donor", donor, *clean.shape)
    recipient = _positions("recipient", donor if recipient is None else recipient, *corrupt.shape)
    states = read_states(model, clean, donor, layers)

    def run(moved: Mapping[str, Tensor] | None) -> Tensor:
        hooks: Hooks = []
        if moved is not None:
            hooks = set_states(model, moved, recipient, channels=channels, propagate=propagate)
        logits = model.run_with_hooks(corrupt, fwd_hooks=hooks)
        return scored(metric, _shifted(logits, donor - recipient, clean.shape[1]), clean)

    whole = scored(metric, model(clean), clean)
    name = f"states of {', '.join(states)}, {'propagating' if propagate else 'read-out only'}"
    others = {layer: state.roll(1, 0) for layer, state in states.items()}
    found = whole, run(None), run(states)
    return Recovery(name, *found, run(others) if len(clean) > 1 else torch.full((1,), torch.nan))


@explained
@observed
def read_states(
    model: HookedRootModule,
    tokens: Int[Tensor, "batch pos"],
    position: int | Int[Tensor, " batch"],
    layers: Layers = None,
) -> dict[str, Float[Tensor, "batch channel d_state"]]:
    """The state of each layer after the token at `position`, by layer name."""
    index = _positions("position", position, *tokens.shape)
    found: dict[str, Tensor] = {}

    def read(state: Tensor, hook) -> None:
        found[hook.name.removesuffix(".hook_state")] = state[torch.arange(len(state)), index]

    names = [f"{layer}.hook_state" for layer in _layers(model, layers, "hook_state")]
    model.run_with_hooks(tokens, fwd_hooks=[(name, read) for name in names])
    return found


@explained
def set_states(
    model: HookedRootModule,
    states: Mapping[str, Float[Tensor, "batch channel d_state"]],
    position: int | Int[Tensor, " batch"],
    *,
    channels: Sequence[int] | None = None,
    propagate: bool = True,
) -> Hooks:
    """Hooks that put `states` in the place of those after the token at `position`.

    Propagating, the decay into that position becomes 0 and the write there the new state: later
    states follow from it, whatever the layers below have changed. Otherwise the read-out alone.

    Args:
        model: to intervene on
        states: by layer name, as `read_states` gives them
        position: one for all sequences or one each; negative counts from the end
        channels: which to replace; default all
        propagate: whether later states follow
    """
    layers = _layers(model, list(states), "hook_state")

    def put(new: Tensor | None) -> Callable:
        def edit(value: Tensor, hook) -> Tensor:
            index = _positions("position", position, *value.shape[:2])
            every, count = torch.arange(len(value)), value.shape[2]
            chosen = torch.arange(count) if channels is None else _units(channels, count)
            now = value[every, index]
            if new is not None and new.shape != now.shape:
                raise ValueError(
                    f"states of {hook.name!r} must be [batch channel d_state] = {list(now.shape)}, "
                    f"got {list(new.shape)}"
                )
            now[:, chosen] = 0 if new is None else new[:, chosen].to(now)
            value[every, index] = now
            return value

        return edit

    if not propagate:
        return [(f"{layer}.hook_state", put(states[layer])) for layer in layers]
    return [
        pair
        for layer in layers
        for pair in (
            (f"{layer}.hook_A_bar", put(None)),
            (f"{layer}.hook_write", put(states[layer])),
        )
    ]


@explained
def hold_states(
    model: HookedRootModule, start: int | Int[Tensor, " batch"], layers: Layers = None
) -> Hooks:
    """Hooks that set Δ = 0 from position `start` on: no later token is written, none decays.

    What is right after them the layer knows of tokens before `start`, or through the convolution.
    """

    def hold(delta: Tensor, hook) -> Tensor:
        first = _positions("start", start, *delta.shape[:2])
        return delta.masked_fill(_from(first, delta.shape[1])[..., None], 0)

    return [(f"{layer}.hook_delta", hold) for layer in _layers(model, layers, "hook_delta")]


@explained
@observed
def freeze_delta(
    model: HookedRootModule,
    tokens: Int[Tensor, "batch pos"],
    layers: Layers = None,
    *,
    mask: Bool[Tensor, "mask_batch mask_pos"] | None = None,
) -> Hooks:
    """Hooks that replace Δ by its mean per channel over `tokens`: steps that select nothing.

    Args:
        model: to intervene on, and to take the mean from
        tokens: what to average over
        layers: which layers; default all
        mask: True where a position counts; default everywhere
    """
    names = [f"{layer}.hook_delta" for layer in _layers(model, layers, "hook_delta")]
    counted = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    if counted.shape != tokens.shape:
        raise ValueError(f"mask {list(counted.shape)} must be as tokens are, {list(tokens.shape)}")
    if not counted.any():
        raise ValueError("mask keeps no position; the mean of delta is undefined")
    cache = activations(model, tokens, names)

    def freeze(mean: Tensor) -> Callable:
        return lambda delta, hook: mean.expand_as(delta)

    return [(name, freeze(cache[name][counted].mean(0))) for name in names]


@explained
def cut_convolution(
    model: HookedRootModule,
    position: int | Int[Tensor, " batch"],
    layers: Layers = None,
    *,
    hide_position: bool = False,
) -> Hooks:
    """Hooks after which no convolution carries anything from before `position` past it.

    Outputs after `position` are computed as if all inputs before it were 0; the others stay. Put
    them behind hooks that edit the input or the kernel: they keep both as they find them.

    Args:
        model: with convolutions
        position: one for all sequences or one each; negative counts from the end
        layers: such as "blocks.0.conv"; default all convolutions
        hide_position: hide the input at `position` too. Above the first layer it has seen what came
            before, and only without it do the states after `position` carry everything
    """
    hidden, chosen = int(hide_position), _layers(model, layers, "hook_kernel")
    each = (_cut(layer, model.mod_dict[layer], position, hidden) for layer in chosen)
    return [pair for hooks in each for pair in hooks]


def _cut(layer: str, conv: torch.nn.Module, position: int | Tensor, hidden: int) -> Hooks:
    """`cut_convolution` of one layer: input and kernel are kept until the output passes."""
    if missing := [name for name in ("lags", "bias") if not hasattr(conv, name)]:
        raise ValueError(f"{layer!r} lacks {missing}: the lag of each tap, and a bias or None")
    lags: list[int] = conv.lags  # pyrefly: ignore[bad-assignment]
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook) -> None:
        kept[hook.name] = value

    def cut(out: Tensor, hook) -> Tensor:
        x, kernel = kept.pop(f"{layer}.hook_in"), kept.pop(f"{layer}.hook_kernel")
        batch, length, _ = out.shape
        index = _positions("position", position, batch, length)
        x = x.masked_fill(~_from(index + hidden, length)[..., None], 0)
        seen = torch.zeros_like(out)
        if isinstance(conv.bias, Tensor):
            seen = seen + conv.bias
        for tap, lag in enumerate(lags):
            lo, hi = max(0, lag), min(length, length + lag)
            if lo < hi:
                seen[:, lo:hi] += kernel[:, tap] * x[:, lo - lag : hi - lag]
        reached = _from(index + 1, length) & ~_from(index + hidden + max(lags), length)
        return torch.where(reached[..., None], seen, out)

    reads = [(f"{layer}.{point}", keep) for point in ("hook_in", "hook_kernel")]
    return [*reads, (f"{layer}.hook_out", cut)]


def _layers(model: HookedRootModule, layers: Layers, point: str) -> list[str]:
    """Names of layers that have the hook `point`: those given, or all."""
    known = [n.rpartition(".")[0] for n in model.hook_dict if n.rpartition(".")[2] == point]
    wanted = known if layers is None else [layers] if isinstance(layers, str) else list(layers)
    if not wanted or set(wanted) - set(known):
        raise ValueError(
            f"layers={layers!r}: layers of this {type(model).__name__} with a {point}: {known}"
        )
    return wanted


def _positions(name: str, given: int | Tensor, batch: int, length: int) -> Int[Tensor, " batch"]:
    """One index into `length` positions per sequence, from one or many, none negative."""
    index = torch.as_tensor(given)
    if index.is_floating_point() or index.shape not in ((), (batch,)):
        raise ValueError(f"{name} must be an int or an integer per sequence [{batch}], got {given}")
    if bool(((index < -length) | (index >= length)).any()):
        raise ValueError(f"{name} must be in {-length}..{length - 1}, got {index.tolist()}")
    return torch.where(index < 0, index + length, index).expand(batch)


def _units(channels: Sequence[int], count: int) -> Int[Tensor, " chosen"]:
    """`channels` as an index, checked."""
    bad = [c for c in channels if not 0 <= c < count]
    if bad or not channels:
        raise ValueError(f"channels must be some of 0..{count - 1}, got {list(channels)}")
    return torch.tensor(list(channels))


def _from(index: Int[Tensor, " batch"], length: int) -> Bool[Tensor, "batch pos"]:
    """True at each sequence's own index and after it."""
    return torch.arange(length) >= index[:, None]


def _shifted(
    logits: Float[Tensor, "batch pos d_vocab"], shift: Int[Tensor, " batch"], length: int
) -> Float[Tensor, "batch length d_vocab"]:
    """Position t of each sequence at t + shift; NaN where nothing lands."""
    source = torch.arange(length) - shift[:, None]
    inside = (source >= 0) & (source < logits.shape[1])
    index = source.clamp(0, logits.shape[1] - 1)[..., None].expand(-1, -1, logits.shape[2])
    return logits.gather(1, index).masked_fill(~inside[..., None], torch.nan)
