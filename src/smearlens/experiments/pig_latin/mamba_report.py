"""The report of Mamba on Pig Latin: tables, curves, mistakes, where the word is kept, w_t and Δ.

Leaves out how the numbers came about (`mamba`, `mamba_evidence`, `parity`) and what both reports
have in common (`parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from smearlens.experiments.pig_latin import parity, parts
from smearlens.experiments.pig_latin.mamba_evidence import MEMORY
from smearlens.experiments.pig_latin.parts import runs
from smearlens.viz import plots
from smearlens.viz.report import Part, Study, estimate, write_report
from smearlens.viz.widgets import delta_strip

W_T = "A = -1, selective"
CURVES: dict[str, Sequence[str]] = {
    "discretisation": ("small/mamba rule", "small/zoh", "small/bilinear"),
    "A and Δ": ("small/A learned, constant", "small/A = -1, selective", "small/A = -1, constant"),
    "tuned": ("small/small", "small/small, kernel 16"),
    "large list": ("large/large", "large pairs/beast small"),
    "plateau": ("small/bilinear", "small/plateau"),
}
SELECTIVE = ("mamba rule", "zoh", "bilinear", "A = -1, selective", *MEMORY[:2])
EXCHANGED = {  # column -> key
    "its own run": "clean",
    "own states put in": "own states",
    "not exchanged": "not exchanged",
    "a third word's states": "a third word's states",
    "its states": "states",
    "its windows": "windows",
    "both": "states and windows",
    "its states, convolution cut": "states, convolution cut",
}


def write_mamba_pig_latin_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md`; returns the page."""
    tuned = ("small/small", "large/large", "large pairs/beast small")
    sections = [
        parts.list_part(study),
        *parts.table_parts(study),
        scans_part(),
        parts.curve_part(study, CURVES),
        *parts.mistake_parts(study, tuned),
        parts.kinds_part(study, tuned),
        memory_part(study),
        exchange_part(study),
        parity_part(study),
        frozen_part(study),
        boundary_part(study),
        weights_part(study),
    ]
    title = "Pig Latin: where Mamba keeps a word, and whether it beats a transformer"
    return write_report(study, out, sections, title=title)


def memory_part(study: Study) -> Part:
    """What is left when one carrier of the word is taken away at its end."""
    first = runs(study, f"small/{MEMORY[0]}")[0]["evidence"]["memory"]
    rows = [["model", *first]]
    for name in MEMORY:
        seen = [m["evidence"]["memory"] for m in runs(study, f"small/{name}")]
        rows.append([name, *(estimate([s[key] for s in seen]) for key in first)])
    return Part(
        "Is all of the word in the state at [EOS]?",
        "Share of held-out words still right. Cut: the convolutions see nothing from before [EOS] "
        "after it. Wiped: the states of all layers are 0 after [EOS]. Nothing written: Δ = 0 after "
        "[EOS], so that states neither change nor decay. “bilinear” and “kernel 4” are the side "
        "variants of 2 layers with 16 and 4 taps.",
        name="memory", table=rows,
    )  # fmt: skip


def exchange_part(study: Study) -> Part:
    """States and windows of one word put into the run of another."""
    rows = [["model", "tokens after [EOS]", *EXCHANGED]]
    for name in MEMORY:
        seen = [m["evidence"]["exchange"] for m in runs(study, f"small/{name}")]
        for offset in seen[0]:
            values = ([s[offset][key] for s in seen] for key in EXCHANGED.values())
            rows.append([name, offset, *map(estimate, values)])
    return Part(
        "States exchanged between words",
        "The sequence is another word's of equal length up to some tokens after its [EOS] and goes "
        "on with this word's translation; the states there, the windows of the convolutions, or "
        "both are this word's. Right: the share of words whose remaining characters all come out. "
        "Controls: its own states put in, and both, must give its own run, a third word's not.",
        name="exchange", table=rows,
    )  # fmt: skip


def parity_part(study: Study) -> Part:
    """What separates recurrences: parity of more bits than were trained on."""
    rows = [["model", "parameters", "right within the trained length", "beyond it"]]
    for name in parity.NAMES:
        seen = runs(study, f"parity/{name}")
        values = (estimate([m[key] for m in seen]) for key in ("within", "beyond"))
        rows.append([name, f"{seen[0]['n_parameters']:,}", *values])
    return Part("Parity: is it like any recurrent network?", parity.TEXT, name="parity", table=rows)


def frozen_part(study: Study) -> Part:
    """Δ replaced by its mean after training."""
    rows = [["model", "words right", "Δ frozen at its mean"]]
    for name in SELECTIVE:
        seen = [m["evidence"]["frozen_delta"] for m in runs(study, f"small/{name}")]
        rows.append([name, *(estimate([s[key] for s in seen]) for key in ("clean", "frozen"))])
    return Part(
        "Does a trained model use that Δ is selective?",
        "Every Δ is replaced by its mean per channel over the held-out words: steps that no longer "
        "depend on the token. What is lost says how far these models came to rest on it; whether a "
        "model needs it at all, the table of A and Δ says.",
        name="frozen-delta", table=rows,
    )  # fmt: skip


def scans_part() -> Part:
    """Where the write-up's study of scans is."""
    return Part(
        "Speed and precision of scans",
        "The write-up's comparison of a parallel with a sequential scan, with and without "
        "compilation, and its curve of the error by length, are a study of their own: “smearlens "
        "experiment scans”, which judges claim 22.",
        name="scans",
    )


def boundary_part(study: Study) -> Part:
    """The correlational reading: what is written after the end of the word."""
    rows = [["model", "layer", "written after [EOS] over before", "state at [EOS] left at the end"]]
    for name in (*MEMORY, W_T):
        seen = [m["evidence"]["boundary"] for m in runs(study, f"small/{name}")]
        for layer in range(len(seen[0]["retention"])):
            values = ([s[key][layer] for s in seen] for key in ("write_ratio", "retention"))
            rows.append([name, str(layer), *map(estimate, values)])
    return Part(
        "What the weights alone suggest",
        "Mean |B̄| after [EOS] over that before it, and the share of the state at [EOS] that is "
        "left at the end: 0 and 1 would say that all is written by then. They say nothing of what "
        "the convolution carries.",
        name="boundary", table=rows,
    )  # fmt: skip


def weights_part(study: Study) -> Part:
    """w_t and Δ per character for the words of the write-up."""
    shown = runs(study, f"small/{W_T}")[0]["evidence"]["shown"]
    widgets = [
        delta_strip(
            seen["delta"], seen["tokens"], title=f"{word}: mean Δ",
            labels=[f"layer {i}" for i in range(len(seen["delta"]))],
        )
        for word, seen in shown.items()
    ]  # fmt: skip
    return Part(
        "w_t and Δ, character by character",
        "A = -1 with a selective Δ, seed 0. w_t = exp(-ΣΔ), summed from the next token to the end: "
        "the share of what each token wrote that is left when the translation ends, mean over "
        "channels. Dashed: [EOS] of the word.",
        name="weights", draw=partial(_draw_weights, shown=shown), widgets=widgets,
    )  # fmt: skip


def _draw_weights(figure: Any, shown: dict[str, Any]) -> None:
    figure.set_size_inches(11, 5.2)
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, (word, seen) in enumerate(shown.items()):
        end = seen["tokens"].index("[EOS]")
        for row, (key, label) in enumerate((("weight", "w_t at the end"), ("delta", "mean Δ"))):
            ax = axes[row][column]
            for layer, values in enumerate(seen[key]):
                ax.plot(values, marker=".", color=plots.COLOURS[layer], label=f"layer {layer}")
            ax.axvline(end, color=plots.NULL, linestyle="--", linewidth=1)
            ax.set_xticks(range(len(values)), [t.replace("[EOS]", "∎") for t in seen["tokens"]],
                          fontsize=7)  # fmt: skip
            ax.set(ylabel=label, title=word if row == 0 else "", ylim=(0, None))
    axes[0][0].legend(frameon=False, fontsize=8)
