"""`Scores`: a number per layer, example and head, with interval, chance, maximum and control.

Leaves out how the numbers come about: `analysis.mixing.rows` and the functions that use it.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from smearlens._explain import explained
from smearlens.analysis.stats import bootstrap_interval

COLUMNS = ("layer", "head", "score", "low", "high", "chance", "maximum", "control")


@explained
@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """Per layer name a tensor [example head]; NaN where an example has no valid row.

    Attributes:
        name: of the metric
        per_layer: layer name to [example head]
        chance: layer name to the value that uniform attention gets on the same tokens, [head or 1]
        maximum: layer name to the highest attainable value
        control: layer name to the value on a matched wrong target (see the metric), [head]; NaN
            where there is none
        rows: layer name to the number of valid rows per example, [example head]
        unit: of the values
        note: choices worth stating beside the number, such as the normalisation of signed maps
    """

    name: str
    per_layer: dict[str, Tensor]
    chance: dict[str, Tensor]
    maximum: dict[str, Tensor]
    control: dict[str, Tensor]
    rows: dict[str, Tensor]
    unit: str = "fraction"
    note: str = ""
    _intervals: dict[float, dict[str, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __getitem__(self, layer: str) -> Float[Tensor, "example head"]:
        """Values of one layer."""
        if layer not in self.per_layer:
            raise KeyError(f"no layer {layer!r} in {self.name}; layers: {list(self.per_layer)}")
        return self.per_layer[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.per_layer)

    def __len__(self) -> int:
        return len(self.per_layer)

    def __eq__(self, other: object) -> bool:
        """Whether both are the same metric with the same values, NaN where the other has NaN."""
        if not isinstance(other, Scores) or (self.name, list(self)) != (other.name, list(other)):
            return False
        pairs = zip(self.per_layer.values(), other.per_layer.values(), strict=True)
        return all(a.shape == b.shape and torch.allclose(a, b, 0, 0, True) for a, b in pairs)

    __hash__ = None

    def mean(self, reduce: Literal["macro", "micro"] = "macro") -> dict[str, Tensor]:
        """Per layer the mean over examples [head]: of example means, or of pooled rows."""
        if reduce not in ("macro", "micro"):
            raise ValueError(f"reduce must be 'macro' or 'micro', got {reduce!r}")
        if reduce == "macro":
            return {layer: v.nanmean(0) for layer, v in self.per_layer.items()}
        pooled = {}
        for layer, v in self.per_layer.items():
            weight = self.rows[layer].expand_as(v) * v.isfinite()
            pooled[layer] = (v.nan_to_num() * weight).sum(0) / weight.sum(0)
        return pooled

    def interval(self, level: float = 0.95) -> dict[str, Tensor]:
        """Per layer [head, 2]: bootstrap percentile interval of the mean over examples.

        1,000 resamples of the examples, seeded, so that the same scores give the same interval.
        """
        if level not in self._intervals:
            self._intervals[level] = {
                layer: bootstrap_interval(v, level) for layer, v in self.per_layer.items()
            }
        return self._intervals[level]

    def records(self, level: float = 0.95) -> list[dict[str, Any]]:
        """One dictionary per layer and head, keys as in `COLUMNS`."""
        means, intervals = self.mean(), self.interval(level)
        records = []
        for layer, mean in means.items():
            beside = [
                self.chance[layer].expand_as(mean),
                self.maximum[layer].expand_as(mean),
                self.control[layer].expand_as(mean),
            ]
            for head in range(len(mean)):
                numbers = [mean[head], *intervals[layer][head], *(b[head] for b in beside)]
                row = dict(zip(COLUMNS[2:], (float(n) for n in numbers), strict=True))
                records.append({"layer": layer, "head": head, **row})
        return records

    def to_frame(self, level: float = 0.95) -> Any:
        """The records as a pandas DataFrame."""
        import pandas as pd

        return pd.DataFrame(self.records(level), columns=list(COLUMNS))

    def top(self, k: int = 5) -> list[dict[str, Any]]:
        """The `k` heads with the highest score, best first."""
        known = [r for r in self.records() if r["score"] == r["score"]]
        return sorted(known, key=lambda r: -r["score"])[:k]

    def _shown(self, most: int, top: int) -> tuple[list[dict[str, Any]], str]:
        """What is printed: all of up to `most` heads, else the best, and a line that says so."""
        records = self.records()
        shown = records if len(records) <= most else self.top(top)
        rest = f"… the top {len(shown)} of {len(records)} heads; .to_frame() has all"
        return shown, rest if len(shown) < len(records) else ""

    @property
    def _title(self) -> str:
        return f"{self.name} ({self.unit}{'; ' + self.note if self.note else ''})"

    def __repr__(self) -> str:
        shown, rest = self._shown(40, 20)
        width = max(24, *(len(r["layer"]) for r in shown))
        lines = [f"{'layer':<{width}} head   score  [95% interval]   chance maximum control"]
        for r in shown:
            lines.append(
                f"{r['layer']:<{width}} {r['head']:>4} {r['score']:>7.3f}  "
                f"[{r['low']:>6.3f}, {r['high']:>6.3f}] {r['chance']:>7.3f} {r['maximum']:>7.3f} "
                f"{r['control']:>7.3f}"
            )
        return "\n".join([self._title, *lines, *([rest] if rest else [])])

    def _repr_html_(self) -> str:
        shown, rest = self._shown(40, 40)
        cells = "".join(f"<th>{c}</th>" for c in COLUMNS)
        body = "".join(
            f"<tr><td>{html.escape(r['layer'])}</td><td>{r['head']}</td>"
            + "".join(f"<td>{r[c]:.3f}</td>" for c in COLUMNS[2:])
            + "</tr>"
            for r in shown
        )
        caption = html.escape(f"{self._title} {rest}".strip())
        return (
            f"<table><caption>{caption}</caption><thead><tr>{cells}</tr></thead>"
            f"<tbody>{body}</tbody></table>"
        )


def best_head(scores: Scores) -> dict[str, Any]:
    """The record of the head with the highest score over all layers."""
    found = scores.top(1)
    if not found:
        raise ValueError(f"{scores.name}: no head has a valid score (no row qualifies)")
    return found[0]
