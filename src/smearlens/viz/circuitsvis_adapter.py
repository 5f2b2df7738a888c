"""CircuitsVis components without a network, with one copy of their script per page.

CircuitsVis 1.43 puts 1.3 MB of script into every widget, asks the network at each display, leaves
its props unescaped, writes tokens as HTML and masks the upper triangle unless told otherwise. Here
the script is taken from the installed package once, and each widget is a line of harmless props.
Leaves out: views of our own (`widgets.py`), which need no React and validate their input.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

import numpy as np
from torch import Tensor

from smearlens.viz._payload import safe_json

MASKED = frozenset({"AttentionHeads", "AttentionPattern", "AttentionPatterns"})
COMPONENTS = MASKED | {
    "ColoredTokens",
    "ColoredTokensMulti",
    "TextNeuronActivations",
    "TokenLogProbs",
    "TopkSamples",
    "TopkTokens",
}

# Components write some strings as HTML and some as text. An invisible word joiner after these
# characters keeps them from opening a tag or an entity in the former and looks right in both.
MARKUP = re.compile("[<&](?! )")

TAIL = """
window.slFlush = function () {
  if (!window.CircuitsVis) return;
  var queue = window.slQueue || [];
  window.slQueue = [];
  queue.forEach(function (w) {
    if (document.getElementById(w[0])) CircuitsVis.render(w[0], CircuitsVis[w[1]], w[2]);
  });
};
slFlush();
document.addEventListener("DOMContentLoaded", slFlush);
if (window.document$) document$.subscribe(slFlush);
"""

_shown = False  # whether this kernel has displayed the bundle


@dataclass(frozen=True, repr=False)
class Bundle:
    """The script of all components, as HTML that a notebook shows."""

    html: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"circuitsvis bundle, {len(self.html):,} characters"


@cache
def embed_bundle() -> Bundle:
    """The script for a page; a notebook needs it again after its first output was cleared."""
    folder = resources.files("circuitsvis").joinpath("dist/cdn/iife.js")
    source = folder.read_text("utf-8")
    lines = [line for line in source.splitlines() if not line.startswith("//# sourceMappingURL")]
    script = "\n".join(lines).replace("</script", r"<\/script")
    return Bundle(f"<script>{script}{TAIL}</script>")


@dataclass(frozen=True, repr=False)
class Component:
    """One CircuitsVis component with its props."""

    name: str
    props: Mapping[str, Any]
    max_width: int
    key: str

    def to_html(self, bundle: Literal["inline", "page"] = "inline") -> str:
        """One line of HTML; `"page"` leaves the script to one `embed_bundle()` on the page."""
        if bundle not in ("inline", "page"):
            raise ValueError(f"bundle must be 'inline' or 'page', got {bundle!r}")
        call = safe_json([self.key, self.name, self.props])
        html = (
            f'<div style="max-width:{self.max_width}px"><div id="{self.key}">'
            f"CircuitsVis {self.name}: drawn where scripts are allowed</div></div>"
            f"<script>(window.slQueue=window.slQueue||[]).push({call});"
            "window.slFlush&&slFlush()</script>"
        )
        return html + embed_bundle().html if bundle == "inline" else html

    def _repr_html_(self) -> str:
        global _shown
        first, _shown = not _shown, True
        return self.to_html("inline" if first else "page")

    def __repr__(self) -> str:
        return f"circuitsvis {self.name} with {', '.join(self.props)}"


def component(
    name: str,
    *,
    mask: Literal["none", "causal"] = "none",
    max_width: int = 480,
    **props: Any,
) -> Component:
    """A CircuitsVis component by name, offline.

    Args:
        name: `AttentionHeads`, `ColoredTokens`, … as in CircuitsVis
        mask: of attention components; CircuitsVis itself hides the upper triangle by default
        max_width: in CSS pixels
        **props: as the component takes them, in `snake_case` or `camelCase`; tensors, arrays and
            lists; `None` is left out

    Raises:
        ValueError: on an unknown component, a mask that is none, a value that is not finite
        TypeError: on a prop that has no JSON
    """
    if name not in COMPONENTS:
        raise ValueError(f"no component {name!r} in circuitsvis; there are {sorted(COMPONENTS)}")
    if mask not in ("none", "causal"):
        raise ValueError(f"mask must be 'none' or 'causal', got {mask!r}")
    given = {_camel(key): _plain(key, prop) for key, prop in props.items() if prop is not None}
    if name in MASKED:
        given["maskUpperTri"] = mask == "causal"
    return Component(name, given, max_width, f"sl-{uuid.uuid4().hex[:12]}")


def _camel(key: str) -> str:
    head, *rest = key.split("_")
    return head + "".join(word[:1].upper() + word[1:] for word in rest)


def _plain(name: str, prop: Any) -> Any:
    """A prop as JSON can hold it, numbers rounded to 4 digits."""
    if isinstance(prop, Tensor):
        prop = (prop.float() if prop.is_floating_point() else prop).numpy(force=True)
    if isinstance(prop, (np.ndarray, np.generic)):
        prop = prop.tolist()
    if isinstance(prop, float):
        if not np.isfinite(prop):
            raise ValueError(f"{name} must be finite, got {prop}; see torch.nan_to_num")
        return round(prop, 4)
    if isinstance(prop, str):
        return MARKUP.sub("\\g<0>\u2060", prop)
    if prop is None or isinstance(prop, (bool, int)):
        return prop
    if isinstance(prop, Mapping):
        return {str(key): _plain(name, value) for key, value in prop.items()}
    if isinstance(prop, Sequence):
        return [_plain(name, value) for value in prop]
    raise TypeError(f"{name} must hold tensors, arrays, lists, numbers or str, got {type(prop)}")
