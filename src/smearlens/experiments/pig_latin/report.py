"""The report of the transformer on Pig Latin: tables, curves, mistakes, heads, embeddings.

Made from `result.json` alone. Leaves out training (`transformer`), evidence and verdicts; what the
report of Mamba shows too is in `parts`.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from smearlens.experiments.pig_latin import parts
from smearlens.experiments.pig_latin.evidence import LETTERS_OF, LOOKED_INTO, WROTE
from smearlens.experiments.pig_latin.parts import runs
from smearlens.viz.plots import COLOURS
from smearlens.viz.report import Part, Study, estimate, write_report
from smearlens.viz.widgets import attention_heads, layer_similarity

LETTERS = [*string.ascii_lowercase, "-", "[SOS]", "[EOS]"]
VOWELS = "aeiou"
CURVES: dict[str, Sequence[str]] = {
    "positions": ("small pairs/base", "small pairs/no positions", "small pairs/trained positions"),
    "layers": tuple(f"small pairs/{name}" for name in ("1 + 1 layers", "base", "4 + 4 layers")),
    "schedules": ("small pairs/base", "small pairs/plateau", "small pairs/accumulated"),
    "tuned": ("small pairs/beast small", "small pairs/beast large"),
}


def write_pig_latin_report(study: Study, out: Path) -> Path:
    """Write `report.html`, `figures/*.png` and `tables/*.md`; returns the page."""
    sections = [
        parts.list_part(study),
        *parts.table_parts(study),
        parts.curve_part(study, CURVES),
        *parts.mistake_parts(study, ("small pairs/base", "small pairs/beast small")),
        retried_part(study),
        parts.kinds_part(study, ("small pairs/base", "small pairs/beast small")),
        heads_part(study),
        lines_part(study),
        *(pattern_part(study, name) for name in LOOKED_INTO),
        position_part(study),
        *letter_parts(study),
    ]
    title = "Pig Latin: what an encoder-decoder transformer needs, and how it does it"
    return write_report(study, out, sections, title=title)


def retried_part(study: Study) -> Part:
    """The words that the write-up's models got wrong, given to ours."""
    written = [runs(study, f"small pairs/{n}")[0]["evidence"]["wrong"] for n in WROTE]
    rows = [["word", "right", "the write-up's", *WROTE, "among our training words"]]
    for first, *others in zip(*written, strict=True):
        rows.append([*first[:4], *(other[3] for other in others), first[4]])
    return Part(
        "The mistakes of the write-up",
        "Words that its base (the first four) or its small tuned model got wrong, what it wrote, "
        "and what our models of seed 0 write.",
        name="mistakes-of-the-write-up", table=rows,
    )  # fmt: skip


def heads_part(study: Study) -> Part:
    """Where every head looks, and what the keys of cross attention lose without it."""
    rows = [["model", "head", "looks at", "weight", "chance", "on itself, or first character",
             "words right, another word's share of the keys"]]  # fmt: skip
    for name in LOOKED_INTO:
        seen = [m["evidence"] for m in runs(study, f"small pairs/{name}")]
        sides = (
            ("encoder", "the token before", "previous", "scores", "self"),
            ("cross", "the source of the next character", "alignment", "mass", "first"),
        )
        for side, where, kind, score, other in sides:
            chance = f"{seen[0][kind]['chance']:.3f}"
            for layer, of_layer in enumerate(seen[0][kind][score]):
                for head in range(len(of_layer)):
                    values = ([s[kind][k][layer][head] for s in seen] for k in (score, other))
                    weight, beside = map(estimate, values)
                    left = estimate([s["keys"]["changed"][layer][head] for s in seen])
                    told = left if side == "encoder" else ""
                    rows.append([name, f"{side} {layer}.{head}", where, weight, chance, beside,
                                 told])  # fmt: skip
        whole = estimate([s["keys"]["whole"] for s in seen])
        rows.append([name, "all keys of cross attention", "", "", "", "", whole])
    return Part(
        "Previous-token heads and aligned heads",
        "Encoder heads: mean weight on the token before and on the token itself, and the share of "
        "words still right when that head tells the keys of cross attention, and nothing else, of "
        "another word of equal length; with all keys another word's, position is all they tell. "
        "Cross-attention heads: weight on the source of the character to be written next, by the "
        "rule, and the same for the first character alone. Heads of different seeds have no common "
        "order: read the best of each layer.",
        name="where-heads-look", table=rows,
    )  # fmt: skip


def pattern_part(study: Study, name: str) -> Part:
    """Encoder, decoder and cross attention on the three words of the write-up."""
    shown = runs(study, f"small pairs/{name}")[0]["evidence"]["patterns"]
    kinds = (
        ("encoder", "encoder self-attention", "source", "source"),
        ("decoder", "decoder self-attention", "target", "target"),
        ("cross", "cross attention", "target", "source"),
    )
    widgets = []
    for word, seen in shown.items():
        for kind, title, query, key in kinds:
            weights = np.asarray(seen[kind])
            layers, heads = weights.shape[:2]
            widgets.append(
                attention_heads(
                    _unrounded(weights.reshape(-1, *weights.shape[2:])),
                    seen[query],
                    seen[key] if query != key else None,
                    labels=[f"layer {i}, head {j}" for i in range(layers) for j in range(heads)],
                    mask="causal" if kind == "decoder" else "none",
                    title=f"{word}: {title}",
                )
            )
    return Part(
        f"Attention of “{name}”",
        "Query down, key across; seed 0. In cross attention queries are target tokens and keys "
        "source tokens: the row of a token shows where the next one comes from.",
        name="attention-" + name.replace(" ", "-"),
        widgets=widgets,
    )


def lines_part(study: Study) -> Part:
    """Cross attention of the model that the write-up looks into, as it draws it."""
    shown = runs(study, f"small pairs/{LOOKED_INTO[0]}")[0]["evidence"]["patterns"]
    return Part(
        "Cross attention as lines",
        f"“{LOOKED_INTO[0]}”, seed 0. Left the target tokens, right the source; a line is as "
        "dark as the weight, and goes from a token to where the next one comes from.",
        name="cross-attention-lines",
        draw=partial(_draw_lines, shown=shown),
    )


def position_part(study: Study) -> Part:
    """The encoder's trained position embeddings beside the sinusoids they started from."""
    table = runs(study, "small pairs/beast small")[0]["evidence"]["positions"]
    return Part(
        "Trained position embeddings",
        "Encoder of “beast small”, seed 0: trained, and how far training moved each from the "
        "sinusoid it started as. Positions beyond the longest word were never "
        "trained: weight decay alone moved them.",
        name="positions-trained",
        draw=partial(_draw_positions, table=table),
    )


def letter_parts(study: Study) -> list[Part]:
    """Do vowels and consonants form clusters? Cosines, principal components, shuffled letters."""
    rows = [["model", "vowel-vowel minus vowel-consonant cosine", "in s.d. of shuffled letters",
             "cosine of - and [EOS]", "in s.d. of all pairs"]]  # fmt: skip
    for name in LETTERS_OF:
        seen = [m["evidence"]["letters"] for m in runs(study, f"small pairs/{name}")]
        rows.append(
            [name]
            + [estimate([s[statistic][key] for s in seen])
               for statistic in ("vowels together", "- to [EOS]") for key in ("value", "z")]
        )  # fmt: skip
    embedding = np.asarray(runs(study, "small pairs/beast small")[0]["evidence"]["embedding"])
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    order = [*sorted(range(26), key=lambda i: (LETTERS[i] not in VOWELS, i)), 26, 27, 28]
    labels = [LETTERS[i] for i in order]
    return [
        Part(
            "Do vowels and consonants form clusters?",
            "The encoder's embedding of every letter. The null: the same vectors with the letters "
            "shuffled, 2,000 times. Right, the components of a random embedding of this size, for "
            "comparison: two components of 64 always scatter.",
            name="letters", table=rows, draw=partial(_draw_letters, embedding=embedding),
        ),
        Part(
            "Cosines between letters",
            "Vowels first. “beast small”, seed 0.",
            name="letter-cosines",
            widgets=[layer_similarity((unit @ unit.T)[order][:, order], labels,
                                      title="cosine of the encoder's embeddings")],
        ),
    ]  # fmt: skip


def _draw_lines(figure: Any, shown: dict[str, Any]) -> None:
    weights = {word: np.concatenate(seen["cross"]) for word, seen in shown.items()}
    heads = max(len(w) for w in weights.values())
    figure.set_size_inches(2.1 * heads, 9.0)
    heights = [len(seen["target"]) + 2 for seen in shown.values()]
    axes = figure.subplots(len(shown), heads, squeeze=False, height_ratios=heights)
    for row, (word, seen) in zip(axes, shown.items(), strict=True):
        for head, ax in enumerate(row):
            for q, of_query in enumerate(weights[word][head]):
                for k, weight in enumerate(of_query):
                    ax.plot((0, 1), (q, k), color=COLOURS[0], alpha=min(1, weight), linewidth=1.6)
            for x, side, align in ((-0.05, "target", "right"), (1.05, "source", "left")):
                for place, token in enumerate(seen[side]):
                    ax.text(x, place, token, ha=align, va="center", fontsize=8)
            ax.set(xlim=(-0.5, 1.5), ylim=(len(seen["target"]) - 0.5, -0.5))
            layer, number = divmod(head, len(seen["cross"][0]))
            ax.set_title(f"{word}: {layer}.{number}", fontsize=9)
            ax.axis("off")


def _draw_positions(figure: Any, table: list[list[float]]) -> None:
    trained = np.asarray(table)
    start = _sinusoids(*trained.shape)
    figure.set_size_inches(10, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    top = float(np.abs(trained).max())
    left.imshow(trained, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    left.set(xlabel="channel", ylabel="position (token)", title="trained")
    right.plot(np.linalg.norm(trained - start, axis=1), color=COLOURS[0], label="moved")
    right.plot(np.linalg.norm(start, axis=1), color=COLOURS[5], label="length of the sinusoid")
    right.set(xlabel="position (token)", ylabel="euclidean length", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)


def _draw_letters(figure: Any, embedding: np.ndarray) -> None:
    figure.set_size_inches(9, 4.2)
    random = np.random.default_rng(0).normal(size=embedding.shape)
    titles = ("trained", "random")
    for ax, vectors, title in zip(figure.subplots(1, 2), (embedding, random), titles, strict=True):
        centred = vectors - vectors.mean(0)
        _, size, directions = np.linalg.svd(centred, full_matrices=False)
        share = (size**2 / (size**2).sum())[:2]
        points = centred @ directions[:2].T
        for label, (x, y) in zip(LETTERS, points, strict=True):
            colour = COLOURS[1] if label in VOWELS else COLOURS[0]
            ax.annotate(label, (x, y), color=colour, ha="center", va="center", fontsize=9)
        low, high = points.min(0), points.max(0)
        pad = 0.08 * (high - low)
        ax.set(
            xlim=(low[0] - pad[0], high[0] + pad[0]), ylim=(low[1] - pad[1], high[1] + pad[1]),
            xlabel=f"first component ({share[0]:.0%} of the variance)",
            ylabel=f"second ({share[1]:.0%})", title=f"{title} (vowels red)",
        )  # fmt: skip


def _unrounded(weights: np.ndarray) -> np.ndarray:
    """Rows that sum to 1 again after the rounding of `result.json`."""
    return weights / weights.sum(-1, keepdims=True)


def _sinusoids(n_ctx: int, d_model: int) -> np.ndarray:
    """Vaswani et al. 2017, section 3.5."""
    angle = np.arange(n_ctx)[:, None] / 10_000 ** (np.arange(0, d_model, 2) / d_model)
    return np.stack((np.sin(angle), np.cos(angle)), -1).reshape(n_ctx, d_model)
