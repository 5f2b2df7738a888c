"""What the static picture is made of: a palette, lines of text in it, the bytes of a PNG.

Leaves out: what is drawn where (`_picture.py`).
"""

from __future__ import annotations

import importlib.util
import math
import struct
import zlib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

INK = 15  # palette: 0 nothing, 1..15 ink, 16..253 the colour scale, and two colours of bars
PAST, FUTURE = 254, 255
BARS = ((74, 143, 214), (247, 103, 7))


def clear_palette(
    stops: list[tuple[float, str]], signed: bool
) -> tuple[UInt8[np.ndarray, "256 3"], UInt8[np.ndarray, "256"]]:
    """Colours and opacities that read on a light and on a dark page."""
    colour, alpha = np.zeros((256, 3), np.uint8), np.zeros(256, np.uint8)
    colour[:16], alpha[:16] = 125, np.arange(16) * 17
    places = np.array([place for place, _ in stops])
    strength = np.interp(np.linspace(0, 1, PAST - 16), places, np.linspace(0, 1, len(places)))
    colour[16:PAST] = (38, 112, 205)
    if signed:
        strength = 2 * strength - 1
        colour[16:PAST][strength < 0] = (224, 104, 30)
    alpha[16:PAST] = np.rint(20 + 235 * abs(strength) ** 0.8)
    colour[PAST:], alpha[PAST:] = BARS, 255
    return colour, alpha


def white_palette(
    stops: list[tuple[float, str]],
) -> tuple[UInt8[np.ndarray, "256 3"], UInt8[np.ndarray, "256"]]:
    """The colours of the script on a light page, opaque."""
    colour = np.zeros((256, 3), np.uint8)
    colour[:16] = np.linspace(255, 20, 16)[:, None]
    hues = np.array([[int(hue[i : i + 2], 16) for i in (1, 3, 5)] for _, hue in stops])
    at, places = np.linspace(0, 1, PAST - 16), [place for place, _ in stops]
    colour[16:PAST] = np.rint(np.stack([np.interp(at, places, hue) for hue in hues.T], -1))
    colour[PAST:] = BARS
    return colour, np.full(256, 255, np.uint8)


def png(
    page: UInt8[np.ndarray, "row col"],
    palette: UInt8[np.ndarray, "256 3"],
    alpha: UInt8[np.ndarray, "256"],
) -> bytes:
    """A PNG with 8-bit palette indices (W3C PNG specification, colour type 3, no filter)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    height, width = page.shape
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0),
        b"PLTE": palette.tobytes(),
        b"tRNS": alpha.tobytes(),
        b"IDAT": zlib.compress(np.pad(page, ((0, 0), (1, 0))).tobytes()),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts.items())


def margin(names: list[str]) -> int:
    """CSS pixels that the names of an axis need."""
    return min(66, math.ceil(max(text_width(name, 10) for name in names))) + 9


@cache
def _font(size: int) -> Any:
    """DejaVu Sans, which matplotlib brings (many scripts), else Pillow's own."""
    from PIL import ImageFont

    spec = importlib.util.find_spec("matplotlib")
    folder = Path(spec.origin).parent if spec and spec.origin else Path()
    path = folder / "mpl-data/fonts/ttf/DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size) if path.exists() else ImageFont.load_default(size)


@lru_cache(4096)
def shades(text: str, size: int, zoom: int) -> UInt8[np.ndarray, "row col"]:
    """A line of text in palette indices of ink; 5 shades are enough."""
    from PIL import Image, ImageDraw

    width, height = math.ceil(text_width(text, size) * zoom) + 2, (size + 4) * zoom
    image = Image.new("L", (width, height))
    ImageDraw.Draw(image).text((0, 0), text, fill=255, font=_font(size * zoom))
    return (np.asarray(image, np.uint16) * 5 // 255 * 3).astype(np.uint8)


@lru_cache(4096)
def text_width(text: str, size: int) -> float:
    return _font(size).getlength(text)
