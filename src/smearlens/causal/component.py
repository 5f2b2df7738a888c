"""`Component`: which units of which activation an intervention is about.

Contains the axes of all hooks of this library, and checks of units against an activation. Leaves
out the interventions themselves.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch import Tensor

from smearlens._explain import explained

PATTERN, HEAD, LAST = 1, 2, -1
AXES = {  # of the units, by the last part of a hook's name
    **dict.fromkeys(("hook_pattern", "hook_attn_scores"), PATTERN),  # [batch head query key]
    **dict.fromkeys(("hook_q", "hook_k", "hook_v", "hook_z"), HEAD),  # [batch pos head d_head]
    **dict.fromkeys(("hook_A_bar", "hook_B_bar", "hook_write", "hook_state"), HEAD),  # channels
    **dict.fromkeys(("hook_kernel", "hook_weight"), LAST),  # [channel tap], [head]
    **dict.fromkeys(("hook_embed", "hook_pos_embed", "hook_resid_pre", "hook_resid_post"), LAST),
    **dict.fromkeys(("hook_attn_out", "hook_cross_attn_out", "hook_mlp_out"), LAST),
    **dict.fromkeys(("hook_conv_out", "hook_ssm_out", "hook_in", "hook_out", "hook_post"), LAST),
    **dict.fromkeys(("hook_u", "hook_delta_raw", "hook_delta", "hook_y", "hook_gate"), LAST),
    **dict.fromkeys(("hook_B", "hook_C"), LAST),  # [batch pos d_state]
}
WEIGHTS = ("hook_kernel", "hook_weight")


@explained
@dataclass(frozen=True)
class Component:
    """Some units of one activation.

    Attributes:
        name: hook name
        units: heads of `hook_q`, `hook_k`, `hook_v`, `hook_z`, patterns and `smear.hook_weight`;
            taps of `hook_kernel`; channels of any other activation (of `hook_B` and `hook_C`,
            entries of the state). None is all of them
        axis: which axis `units` index, known for hooks of this library. In a model with hooks of
            its own, 1 stands for [batch head query key]; anything else for [batch pos ...]

    Raises:
        ValueError: for units of a hook that this library does not know, without `axis`
    """

    name: str
    units: tuple[int, ...] | None = None
    axis: int | None = None

    def __post_init__(self):
        given = self.units if isinstance(self.units, (tuple, list)) else ()
        indices = bool(given) and all(hasattr(unit, "__index__") for unit in given)
        if self.units is not None and not indices:
            raise ValueError(f"units must be some indices, or None for all, got {self.units!r}")
        if self.units is not None:
            object.__setattr__(self, "units", tuple(operator.index(unit) for unit in self.units))
            if len(set(self.units)) < len(self.units):
                raise ValueError(f"units must differ, got {self.units}")
        if not isinstance(self.axis, int | None):
            raise TypeError(f"axis must be an int or None, got {self.axis!r}")
        if self.axis is None:
            object.__setattr__(self, "axis", AXES.get(self.point))
        if self.units is not None:
            self.known_axis("units")

    @property
    def point(self) -> str:
        """The last part of the name."""
        return self.name.rpartition(".")[2]

    def known_axis(self, purpose: str) -> int:
        """`axis`, or a ValueError that says what it is needed for."""
        if self.axis is None:
            raise ValueError(
                f"{purpose} of {self.name!r}: no layer of this library has a hook of that name, so "
                f"its axes are unknown; write Component({self.name!r}, ..., axis=), the axis of "
                "its units: 1 of [batch head query key], 2 of [batch pos head d_head], -1 of "
                "channels"
            )
        return self.axis

    def unit_axis(self, value: Tensor, purpose: str = "units") -> int:
        """Axis of the units in `value`, counted from the front."""
        axis = self.known_axis(purpose)
        if not -value.ndim <= axis < value.ndim:
            raise ValueError(
                f"axis={axis} of {self.name}: its {value.ndim} axes are {list(value.shape)}"
            )
        return axis % value.ndim

    def pos_axis(self, value: Tensor, purpose: str) -> int:
        """Axis of the (query) positions in `value`."""
        return 2 if self.unit_axis(value, purpose) == PATTERN else 1

    def check_units(self, value: Tensor) -> None:
        """Raise unless `value` has all the units."""
        n_units = 0 if self.units is None else value.shape[self.unit_axis(value)]
        bad = [unit for unit in self.units or () if not 0 <= unit < n_units]
        if bad:
            raise ValueError(f"units {bad} of {self.name}: allowed are 0..{n_units - 1}")

    def check_examples(self, value: Tensor, batch: int, purpose: str) -> None:
        """Raise if `value` is a weight, which no example has of its own."""
        if self.point in WEIGHTS or value.ndim == 0 or len(value) != batch:
            raise ValueError(
                f"{purpose} needs an activation of each example; {self.name} {list(value.shape)} "
                "is the same for all of them. Take weights away by ablate(..., how='zero'), lags "
                "by keep_lags, or give run_with_hooks a hook that returns what you want"
            )


def as_component(given: Component | str) -> Component:
    """A hook name stands for all of its units."""
    return Component(given) if isinstance(given, str) else given
