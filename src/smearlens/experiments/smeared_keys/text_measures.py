"""What the smeared-keys study takes from text whose lines are padded: WikiText-2 in GPT-2's tokens.

The lines, accuracy with pads counted and not, and where attention goes when lines end early. Leaves
out repeats (`experiments.measures`) and text without padding.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from smearlens.causal.leaks import reads_future
from smearlens.data.batches import Batches, PaddedBatches
from smearlens.data.corpora import load_corpus, read_text
from smearlens.data.synthetic import iid_tokens
from smearlens.data.tokenizers import gpt2_tokenizer
from smearlens.models.base import HookedModel

MAX_CHARS = {"train": 1_000_000, "validation": 400_000}  # of each split, from its start
ROWS_AT_ONCE = 8  # 8 x 64 tokens of 50,257 logits are 100 MB


def wikitext_text(data: str | None, split: str) -> str:
    """The start of a split of WikiText-2 raw, whole lines only.

    Args:
        data: folder with one `wiki.train*` and one `wiki.valid*` file, plain or `.gz`; None fetches
            the corpus by its name
        split: "train" or "validation"

    Raises:
        ValueError: if the folder does not hold one such file
        CorpusError: if the file is damaged or the corpus out of reach
    """
    if data is None:
        return load_corpus("wikitext-2-raw", split, max_chars=MAX_CHARS[split]).text
    short = {"train": "train", "validation": "valid"}[split]
    found = sorted(Path(data).expanduser().glob(f"wiki.{short}*"))
    if len(found) != 1:
        raise ValueError(
            f"data={data!r} must be a folder with one file wiki.{short}*.raw or .raw.gz, "
            f"found {[path.name for path in found] or 'none'}"
        )
    text = read_text(found[0])[: MAX_CHARS[split]]
    return text[: text.rfind("\n") + 1]


def wikitext_rows(text: str) -> list[str]:
    r"""Rows of a WikiText file as `datasets` gives them: a blank line is the row `""`.

    >>> wikitext_rows(" \n = Title = \n")
    ['', ' = Title = \n']
    """
    return [line if line.strip() else "" for line in io.StringIO(text, newline="\n")]


def wikitext_lines(data: str | None, split: str) -> list[Int[Tensor, " _"]]:
    """GPT-2 tokens of each row, as `datasets` cuts rows: a blank line is a row without tokens."""
    tokenizer = gpt2_tokenizer()
    return [tokenizer.encode(row) for row in wikitext_rows(wikitext_text(data, split))]


@dataclass(frozen=True, eq=False)
class PadsCounted:
    """Batches of padded lines whose pads count as targets, as if nobody had masked them."""

    lines: Batches

    def batch(self, step: int) -> dict[str, Tensor]:
        """The lines of a step without their mask."""
        return {"tokens": self.lines.batch(step)["tokens"]}


def held_out_rows(
    lines: Sequence[Int[Tensor, " _"]], rows: int, length: int
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Some padded lines, the same for every model, and which of their tokens are real."""
    pad = gpt2_tokenizer().end_of_text
    batch = PaddedBatches(lines, min(rows, len(lines)), length, pad, seed=0).batch(0)
    return batch["tokens"], batch["loss_mask"]


def padding(lines: Sequence[Int[Tensor, " _"]], length: int) -> dict[str, float]:
    """What padding alone does at a length: its share, and the accuracy of constant answers.

    `constant` counts pads and always says the most frequent target; `unigram` leaves pads out and
    always says the most frequent token.
    """
    tokens, real = held_out_rows(lines, len(lines), length)
    targets, real = tokens[:, 1:], real[:, 1:]
    most = torch.bincount(targets.flatten()).max()
    return {
        "lines": float(len(lines)),
        "blank": float(sum(len(line) == 0 for line in lines)),
        "pad_fraction": float((~real).double().mean()),
        "constant": float(most / targets.numel()),
        "unigram": float(torch.bincount(targets[real]).max() / real.sum()),
    }


@torch.no_grad()
def padded_scores(
    model: Any, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> dict[str, float]:
    """Accuracy and loss (nats) on real targets, and the same with pads counted."""
    hits, losses = [], []
    for part in tokens.split(ROWS_AT_ONCE):
        logits, targets = model(part)[:, :-1], part[:, 1:]
        hits.append(logits.argmax(-1) == targets)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses.append(loss.view(targets.shape))
    hit, loss, counts = torch.cat(hits).double(), torch.cat(losses).double(), real[:, 1:]
    return {
        "loss": float(loss[counts].mean()),
        "loss_with_pads": float(loss.mean()),
        "accuracy": float(hit[counts].mean()),
        "accuracy_with_pads": float(hit.mean()),
    }


def half_full(lines: Sequence[Int[Tensor, " _"]], length: int) -> list[Int[Tensor, " _"]]:
    """The lines that fill a quarter to three quarters of a length."""
    return [line for line in lines if length // 4 <= len(line) <= 3 * length // 4]


def stripes(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], real: Bool[Tensor, "batch pos"]
) -> dict[str, dict[str, float]]:
    """Where the first layer's heads look from real tokens, with pads as keys and without.

    Queries are the tokens before a line's last one. Every weight is a mean over heads, `highest`
    that of the head with the most of it; the strongest column is the key with the highest mean
    weight, of the head where it is highest.

    Args:
        model: a decoder whose first block has attention
        tokens: lines that end early (`half_full`)
        real: True where a token is no pad
    """
    return {
        "pads seen": _weights(_first_patterns(model, tokens, torch.ones_like(real)), real),
        "pads hidden": _weights(_first_patterns(model, tokens, real), real),
    }


@torch.no_grad()
def _first_patterns(
    model: HookedModel, tokens: Int[Tensor, "batch pos"], seen: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch head query key"]:
    """Patterns of the first layer when only the keys in `seen` may be looked at."""
    kept: list[Tensor] = []

    def keep(pattern: Tensor, hook: Any) -> Tensor:
        kept.append(pattern.double())
        return pattern

    for part, keys in zip(tokens.split(ROWS_AT_ONCE), seen.split(ROWS_AT_ONCE), strict=True):
        hidden = ~keys[:, None, None, :]
        model.run_with_hooks(
            part,
            fwd_hooks=[
                (
                    "blocks.0.attn.hook_attn_scores",
                    lambda scores, hook, hidden=hidden: scores.masked_fill(hidden, -torch.inf),
                ),
                ("blocks.0.attn.hook_pattern", keep),
            ],
        )
    return torch.cat(kept)


def _weights(
    pattern: Float[Tensor, "batch head query key"], real: Bool[Tensor, "batch pos"]
) -> dict[str, float]:
    """Mean weights of the queries before each line's last token, by kind of key."""
    position = torch.arange(real.shape[1])
    last = real.sum(1) - 1
    query = position < last[:, None]  # [batch query]
    kinds = {
        "later keys": (position[None, :] > position[:, None]).expand(len(real), -1, -1),
        "pads": (~real)[:, None, :],
        "last position": (position == real.shape[1] - 1)[None, None, :],
        "last token of the line": (position == last[:, None])[:, None, :],
        "first key": (position == 0)[None, None, :],
    }
    found = {}
    for name, keys in kinds.items():
        weight = (pattern * keys[:, None]).sum(-1)  # [batch head query]
        per_head = (weight * query[:, None]).sum((0, 2)) / query.sum()
        found[name] = float(per_head.mean())
        found[f"{name}, highest"] = float(per_head.max())
    columns = (pattern * query[:, None, :, None]).sum(2) / query.sum(1)[:, None, None]
    strongest, where = columns.max(-1)  # [batch head]
    head = int(strongest.mean(0).argmax())
    is_pad = (~real).gather(1, where[:, head : head + 1])
    found["strongest column"] = float(strongest[:, head].mean())
    found["strongest column is a pad"] = float(is_pad.double().mean())
    found["share of pads among keys"] = float((~real).double().mean())
    return found


def leak(model: HookedModel) -> dict[str, Any]:
    """Whether later tokens change earlier logits, on a few short random sequences."""
    generator = torch.Generator().manual_seed(0)
    tokens = iid_tokens(2, 12, model.config.d_vocab, generator=generator)
    found = reads_future(model, tokens, generator=generator)
    return {
        "passed": not found.leaks,
        "influence": max(found.influence),
        "first_leak": found.first_leak,
    }
