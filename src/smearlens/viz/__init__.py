"""Plots, widgets, reports; `embed_bundle` repeats the script of CircuitsVis in a notebook.

Loads nothing itself: each picture comes from its own module, such as `smearlens.viz.widgets`.
"""

from __future__ import annotations

from typing import Any

__all__ = ["embed_bundle"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(
            f"module 'smearlens.viz' has no attribute {name!r}; it has {__all__}, and modules "
            "such as smearlens.viz.widgets and smearlens.viz.plots to import from"
        )
    from smearlens.viz.circuitsvis_adapter import embed_bundle

    return embed_bundle
