"""The static picture of a widget: a small PNG with a palette, drawn without a browser.

It stands where scripts are stripped and until the script has run. Leaves out: everything that
reacts; of several layers or checkpoints only the one shown first is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from smearlens.viz._png import (
    FUTURE,
    INK,
    PAST,
    clear_palette,
    png,
    shades,
    text_width,
    white_palette,
)

Real: TypeAlias = float | int

COARSER = ((32, 128), (16, 84), (16, 64), (12, 42), (8, 32), (6, 24), (5, 16), (4, 12), (3, 9))
THUMBNAIL = 84  # pixels
ROW = 17  # pixels from one line of text to the next


def draw(
    payload: Mapping[str, Any],
    values: Float32[np.ndarray, "frame head query key"],
    *,
    limit: int | None = None,
    zoom: int = 1,
    ground: Literal["none", "white"] = "none",
) -> bytes:
    """A PNG of the first view of a widget.

    Args:
        payload: the fields the script reads
        values: the numbers before they were packed
        limit: most bytes; colours and cells get coarser until the file fits
        zoom: pixels per CSS pixel
        ground: `"none"` is transparent, so that it fits light and dark pages
    """
    if limit is None:
        return _Sheet(payload, values[payload["start"]], 240, 4096, zoom).png(ground)
    image = b""
    for levels, cells in COARSER:
        image = _Sheet(payload, values[payload["start"]], levels, cells, zoom).png(ground)
        if len(image) <= limit:
            break
    return image


class _Sheet:
    """A page of palette indices that grows downwards."""

    def __init__(
        self,
        payload: Mapping[str, Any],
        maps: Float32[np.ndarray, "head query key"],
        levels: int,
        cells: int,
        zoom: int,
    ):
        self.payload, self.maps, self.levels, self.cells, self.zoom = (
            payload,
            maps,
            levels,
            cells,
            zoom,
        )
        self.rows, self.cols = payload["rows"], payload.get("cols", payload["rows"])
        self.page = np.zeros((8, 8), np.uint8)
        top = self.header()
        if not payload["cell"]:
            self.strip(top)
        elif len(maps) == 1:
            self.single(top)
        else:
            self.grid(top)

    def header(self) -> int:
        """Title and colour scale; returns the pixel below them."""
        x, payload = 2, self.payload
        if payload["title"]:
            self.text(payload["title"], x, 2, 13)
            x += math.ceil(text_width(payload["title"], 13)) + 24
        if "ends" in payload:
            low, high = payload["ends"]
            self.text(low, x, 5, 10)
            x += math.ceil(text_width(low, 10)) + 5
            scale = np.linspace(payload["low"], payload["high"], 60, dtype=np.float32)
            self.heat(scale[None], x, 6, 60, 9)
            self.text(high, x + 66, 5, 10)
        return ROW + 6

    def grid(self, top: int) -> None:
        """All heads, each with its name."""
        columns, height = self.payload["columns"], round(THUMBNAIL * self.payload["ratio"])
        for head, name in enumerate(self.payload["heads"]):
            x = 2 + head % columns * (THUMBNAIL + 8)
            y = top + head // columns * (height + 2 * ROW)
            self.heat(self.maps[head], x, y, THUMBNAIL, height)
            note = self.payload["notes"][self.payload["start"]][head]
            self.text(name, x, y + height + 1, 10, room=THUMBNAIL)
            self.text(note, x, y + height + 14, 9, room=THUMBNAIL)

    def single(self, top: int) -> None:
        """One map with its tokens on both axes."""
        queries, keys = self.maps.shape[1:]
        left, cell = self.payload["left"], min(self.payload["cell"], 640 / keys)
        width = round(cell * keys)
        height = round((self.payload["tall"] or cell) * queries)
        self.heat(self.maps[0], left, top, width, height)
        for i in range(0, queries, math.ceil(11 * queries / height)):
            y = top + round((i + 0.5) * height / queries) - 7
            self.text(self.rows[i], left - 4, y, 10, room=66, align="right")
        for i in range(0, keys, math.ceil(11 * keys / width)):
            x = left + round((i + 0.5) * width / keys) - 7
            self.text(self.cols[i], x, top + height + 3, 10, room=66, turned=True)

    def strip(self, top: int) -> None:
        """Tokens as lines of text, each with its colour below it or its bar above it."""
        spec, x = self.payload["strips"][0], 2
        bars, narrow = spec.get("bars", 0), spec.get("wide", 8)
        step = bars + ROW + (6 if bars else 8)
        for i, (token, value) in enumerate(zip(self.cols, self.maps[0, 0], strict=True)):
            width = max(math.ceil(text_width(token, 11)), narrow) + (10 if bars else 1)
            if x + width > 700 and x > 2:
                x, top = 2, top + step
            inset = (width - math.ceil(text_width(token, 11))) // 2 if bars else 0
            self.text(token, x + inset, top + (bars + 3 if bars else 0), 11)
            if bars:
                self.bar(i, float(value), x, top, width, bars)
            else:
                self.heat(value.reshape(1, 1), x, top + 15, width - 1, 5)
            x += width

    def bar(self, i: int, value: float, x: int, top: int, width: int, bars: int) -> None:
        """A bar from 0 to `value` before its null band and behind its interval."""
        payload = self.payload
        low, high = payload["low"], payload["high"]

        def box(ends: Sequence[Real], edge: Real, index: int) -> None:
            y0, y1 = sorted(bars * (high - end) / (high - low) for end in ends)
            self.fill(index, x + edge, top + y0, width - 2 * edge, max(1, y1 - y0))

        if "band" in payload:
            box(payload["band"][i], 0, 4)
        box((0, value), width * 0.1, FUTURE if i < payload["future"] else PAST)
        box((0, 0), 0, INK)
        if "interval" in payload:
            box(payload["interval"][payload["start"]][i], width / 2 - 1, INK)

    def tone(self, values: Float[np.ndarray, "row col"]) -> UInt8[np.ndarray, "row col"]:
        """Palette indices of values, in `levels` steps."""
        low, high, steps = self.payload["low"], self.payload["high"], self.levels - 1
        t = np.rint(np.clip((values - low) / (high - low), 0, 1) * steps) / steps
        return (16 + np.rint(t * 237)).astype(np.uint8)

    def heat(
        self, values: Float32[np.ndarray, "query key"], x: int, y: int, width: int, height: int
    ) -> None:
        """One map; of cells that share a pixel the strongest is seen, so thin stripes stay."""
        width, height = width * self.zoom, height * self.zoom
        causal = self.payload["causal"] and values.shape == self.maps.shape[1:]
        allowed = np.tri(*values.shape, dtype=bool) if causal else np.ones(values.shape, bool)
        pooled, seen = _pool(values, allowed, min(self.cells, height), min(self.cells, width))
        tones = np.where(seen, self.tone(pooled), 0).astype(np.uint8)
        row = np.arange(height) * len(tones) // height
        col = np.arange(width) * tones.shape[1] // width
        self.room(x * self.zoom + width, y * self.zoom + height)
        at = np.s_[y * self.zoom :, x * self.zoom :]
        self.page[at][:height, :width] = tones[row][:, col]

    def fill(self, index: int, x: Real, y: Real, width: Real, height: Real) -> None:
        """A rectangle of one colour."""
        left, top, right, foot = (round(v * self.zoom) for v in (x, y, x + width, y + height))
        self.room(right, foot)
        self.page[top : max(foot, top + 1), left : max(right, left + 1)] = index

    def text(
        self,
        text: str,
        x: Real,
        y: Real,
        size: int,
        *,
        room: Real = math.inf,
        align: Literal["left", "right"] = "left",
        turned: bool = False,
    ) -> None:
        """A line of text, cut with an ellipsis where it is wider than `room`."""
        while text and text_width(text, size) > room:
            text = text.removesuffix("…")[:-1] + "…" if len(text.removesuffix("…")) > 1 else ""
        ink = shades(text, size, self.zoom)
        ink = np.rot90(ink) if turned else ink
        left = round(x * self.zoom) - (ink.shape[1] if align == "right" else 0)
        top, left = round(y * self.zoom), max(0, left)
        self.room(left + ink.shape[1], top + ink.shape[0])
        target = self.page[top : top + ink.shape[0], left : left + ink.shape[1]]
        np.copyto(target, ink, where=(ink > 0) & (target < 16))

    def room(self, width: int, height: int) -> None:
        """Grow the page to at least this many pixels."""
        missing = [(0, max(0, height + 4 - self.page.shape[0]))]
        missing.append((0, max(0, width + 4 - self.page.shape[1])))
        if any(after for _, after in missing):
            self.page = np.pad(self.page, missing)

    def png(self, ground: Literal["none", "white"]) -> bytes:
        """The page with its palette."""
        stops = self.payload["colors"][0]
        if ground == "white":
            return png(self.page, *white_palette(stops))
        return png(self.page, *clear_palette(stops, self.payload["low"] < 0))


def _pool(
    values: Float32[np.ndarray, "query key"],
    allowed: Bool[np.ndarray, "query key"],
    rows: int,
    cols: int,
) -> tuple[Float32[np.ndarray, "row col"], Bool[np.ndarray, "row col"]]:
    """The strongest allowed value under each of at most rows x cols pixels."""
    queries, keys = values.shape
    starts = [-(-np.arange(min(r, n)) * n // min(r, n)) for r, n in ((rows, queries), (cols, keys))]

    def fold(reduce: np.ufunc, array: np.ndarray) -> np.ndarray:
        return reduce.reduceat(reduce.reduceat(array, starts[0], axis=0), starts[1], axis=1)

    hidden = np.where(allowed, values, 0)
    high, low = fold(np.maximum, hidden), fold(np.minimum, hidden)
    return np.where(high >= -low, high, low), fold(np.logical_or, allowed)
