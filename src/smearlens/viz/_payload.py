"""What a widget sends to the page: checked arrays, packed numbers, colours, safe JSON and HTML.

Leaves out: which fields a kind of widget has (`widgets.py`), the page around them (`_widget.py`).
"""

from __future__ import annotations

import base64
import html
import json
import math
import unicodedata
import zlib
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Float32
from torch import Tensor

Values: TypeAlias = Tensor | np.ndarray | Sequence[Any]
Scale: TypeAlias = Literal["linear", "sqrt"]

MAX_TOKENS = 512
MAX_HEADS = 64
MAX_CELLS = MAX_HEADS * MAX_TOKENS**2

# light and dark; values 0 to high, and low to 0 to high
SEQUENTIAL = (
    ("#f1f4f9", "#b9d3f0", "#5f9fdf", "#1f62b5", "#0a2a5e"),
    ("#1d222b", "#1d4377", "#2f7acb", "#84bdf5", "#f0f8ff"),
)
DIVERGING = (
    ("#7f2704", "#d9601a", "#f7b27a", "#f3f4f6", "#8fbde8", "#2a71c0", "#0a2a5e"),
    ("#ffe3c9", "#f39a4f", "#8a451a", "#1d222b", "#1f5a9c", "#5fa8ee", "#e2f1ff"),
)


def as_array(name: str, values: Values, axes: str) -> Float32[np.ndarray, "..."]:
    """`values` as a finite float32 array with the axes of one of the layouts in `axes`.

    Args:
        name: argument name for messages
        values: tensor, array or nested list of real numbers
        axes: allowed layouts, for example `"[query key] or [head query key]"`

    Raises:
        TypeError: if `values` is not real-valued
        ValueError: if the number of axes fits no layout, an axis is empty, there are more numbers
            than a page can take, or one is not finite
    """
    given = values if isinstance(values, (Tensor, np.ndarray)) else np.asarray(values)
    shape = tuple(given.shape)
    if len(shape) not in {len(layout.split()) for layout in axes.split(" or ")} or 0 in shape:
        raise ValueError(
            f"{name} must be {axes} without empty axes, got shape {shape}; "
            f"pick one example first, for instance {name}[0]"
        )
    _check_size(name, shape)
    if isinstance(given, Tensor):  # numpy has no bfloat16
        given = (given.float() if given.is_floating_point() else given).numpy(force=True)
    if given.dtype.kind not in "fiub":
        raise TypeError(f"{name} must hold real numbers, got dtype {given.dtype}")
    array = given.astype(np.float32)
    broken = np.argwhere(~np.isfinite(array))
    if len(broken):
        where = ", ".join(map(str, broken[0]))
        raise ValueError(
            f"{name} must be finite, got {len(broken)} non-finite values, the first at "
            f"{name}[{where}]; fully masked rows become 0 with torch.nan_to_num"
        )
    return array


def _check_size(name: str, shape: tuple[int, ...]) -> None:
    """Stop before a page gets too large for a browser; the message says how to slice."""
    if max(shape[-2:]) > MAX_TOKENS:
        last = ", ".join([f"-{MAX_TOKENS}:"] * len(shape[-2:]))
        raise ValueError(
            f"{name} has {' x '.join(map(str, shape[-2:]))} positions, more than {MAX_TOKENS} can "
            f"be drawn; slice it and its tokens: {name}[..., {last}]"
        )
    heads = shape[-3] if len(shape) > 2 else 1
    if heads > MAX_HEADS:
        raise ValueError(
            f"{name} has {heads} heads, more than {MAX_HEADS} can be drawn; "
            f"slice it and its labels: {name}[..., :{MAX_HEADS}, :, :]"
        )
    if math.prod(shape) > MAX_CELLS:
        raise ValueError(
            f"{name} has {math.prod(shape):,} cells, more than {MAX_CELLS:,} can be drawn; "
            f"slice it, for instance the first of its {shape[0]} maps: {name}[:1]"
        )


def check_tokens(name: str, tokens: Sequence[str], count: int, axis: str) -> list[str]:
    """The tokens as they are shown, after a check of their number and type."""
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise TypeError(f"{name} must be a list of str, one per {axis}, got {_kind(tokens)}")
    if len(tokens) != count:
        raise ValueError(f"{name} has {len(tokens)} entries, but the {axis} axis has {count}")
    return [visible(token) for token in tokens]


def _kind(tokens: Sequence[str]) -> str:
    if isinstance(tokens, str):
        return f"one str of length {len(tokens)}; use list(text) for characters"
    other = next(token for token in tokens if not isinstance(token, str))
    return f"an entry of type {type(other).__name__}; decode token ids first"


def visible(token: str) -> str:
    r"""A token as it is shown: white space and control characters get a visible sign.

    >>> [visible(token) for token in [" the", " ", "\n", "", "\u202e"]]
    [' the', '␣', '↵', '∅', '⟨202E⟩']
    """
    if not token:
        return "∅"
    if not token.strip(" "):
        return "␣" * len(token)
    return "".join({"\n": "↵", "\t": "⇥", "\u200d": "\u200d"}.get(c) or _sign(c) for c in token)


def _sign(char: str) -> str:
    hidden = unicodedata.category(char) in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return f"⟨{ord(char):04X}⟩" if hidden else char


def number(value: float) -> str:
    """Three digits, with a minus as wide as a plus."""
    return f"{value:.3g}".replace("-", "−")


def pack(values: Float32[np.ndarray, "..."], low: float, high: float, bits: int) -> dict[str, Any]:
    """Numbers as deflated integers in base64: value = low + step * integer.

    Args:
        values: any shape, between `low` and `high`
        low: smallest value that can be told; if it is -high, then 0 is exact
        high: largest value that can be told
        bits: 8 (error at most 0.2% of the range, 0.4% where low is -high) or 16 (0.0008%)
    """
    levels = 2**bits - (2 if low == -high else 1)
    step = (high - low) / levels
    integers = np.rint((values.astype(np.float64) - low) / step).astype(f"<u{bits // 8}")
    return {
        "data": base64.b64encode(zlib.compress(integers.tobytes())).decode(),
        "bits": bits,
        "low": low,
        "high": high,
        "step": step,
        "digits": _digits(step, high - low),
    }


def _digits(step: float, width: float) -> int:
    """Decimals that a step can tell, at most four significant digits."""
    return max(0, min(round(-math.log10(step)), 3 - math.floor(math.log10(width))))


def colour_stops(signed: bool, scale: str) -> list[list[tuple[float, str]]]:
    """Places in [0, 1] and colours, for a light and a dark page; `"sqrt"` lifts small values."""
    if scale not in ("linear", "sqrt"):
        raise ValueError(f"scale must be 'linear' or 'sqrt', got {scale!r}")
    power = 2 if scale == "sqrt" else 1

    def place(t: float) -> float:
        if not signed:
            return t**power
        return 0.5 + 0.5 * math.copysign(abs(2 * t - 1) ** power, t - 0.5)

    themes = DIVERGING if signed else SEQUENTIAL
    return [[(place(i / (len(c) - 1)), hue) for i, hue in enumerate(c)] for c in themes]


def safe_json(value: Any) -> str:
    r"""JSON that stays data in a script or between single quotes: ASCII without `<`, `>`, `&`, `'`.

    >>> safe_json({"token": "</script>"})
    '{"token":"\\u003c/script\\u003e"}'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for char in "<>&'":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def safe_html(text: str) -> str:
    """Text for an element or a quoted attribute, in ASCII."""
    escaped = html.escape(visible(text), quote=True) if text else ""
    return escaped.encode("ascii", "xmlcharrefreplace").decode()
