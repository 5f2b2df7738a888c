"""The tables of the Pig Latin write-up with our figures beside its own, as plain numbers.

A table compares each of its variants with one base on the same held-out words. Leaves out how a
table is shown (`parts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from smearlens.experiments.pig_latin.paired import (
    Runs,
    accuracies,
    compare,
    exact_interval,
    runs_of,
)


@dataclass(frozen=True)
class Row:
    """A variant and what the write-up says of it.

    Attributes:
        run: its runs, as `task/name`
        label: what it is called in the table
        accuracy: held-out accuracy in the write-up; None where it has none
        loss: its held-out loss, nats per character
        train_accuracy: its accuracy on the training words
        note: what else to say of the write-up's figure
    """

    run: str
    label: str
    accuracy: float | None = None
    loss: float | None = None
    train_accuracy: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows, the first of which is the base of the others unless `base` names another.

    Attributes:
        name: of the file
        title: heading
        text: what to know when reading it
        rows: the variants
    """

    name: str
    title: str
    text: str = field(kw_only=True)
    rows: Sequence[Row] = field(kw_only=True)
    base: str | None = field(default=None, kw_only=True)


def fill(tables: Sequence[Table], found: Runs) -> list[dict[str, Any]]:
    """Every table with our counts and comparisons; Holm's correction is over one table.

    Args:
        tables: the write-up's
        found: measures of all runs
    """
    return [_filled(table, found) for table in tables]


def _filled(table: Table, found: Runs) -> dict[str, Any]:
    base = table.base or table.rows[0].run
    others = [row.run for row in table.rows if row.run != base]
    against = {c.a: c for c in compare(found, [(run, base) for run in others])}
    rows = []
    for row in table.rows:
        runs = runs_of(found, row.run)
        versus = against.get(row.run)
        rows.append(
            {
                **asdict(row),
                "parameters": runs[0]["n_parameters"],
                "ours": accuracies(runs),
                "exact": list(exact_interval(runs)),
                "right": sum(m["validation"]["right"] for m in runs),
                "words": sum(m["validation"]["words"] for m in runs),
                "losses": [m["validation"]["loss"] for m in runs],
                "train": [m["train"]["accuracy"] for m in runs],
                "against_base": None if versus is None else asdict(versus),
            }
        )
    return {
        "name": table.name,
        "title": table.title,
        "text": table.text,
        "base": next(row.label for row in table.rows if row.run == base),
        "rows": rows,
    }


def _pairs(name: str, *figures: Any, label: str = "", note: str = "") -> Row:
    return Row(f"small pairs/{name}", label or name, *figures, note=note)


def _joined(name: str, *figures: Any, label: str = "", note: str = "") -> Row:
    return Row(f"small/{name}", label or name, *figures, note=note)


BASE_FIGURES = (0.909, 0.043, 0.957)
BEAST_FIGURES = (0.970, 0.025, 1.000)
BASE_LABEL = "base: width 64, 4 heads, 2 + 2 layers, sinusoids"
BASE = _pairs("base", *BASE_FIGURES, label=BASE_LABEL)
ONE_BASE = "Each row differs from the base in what it is called, and trained as long."

TRANSFORMER = (
    Table(
        "positions", "Position embeddings",
        text=f"{ONE_BASE} In the full study that is 100 epochs, as in the write-up, here and in "
        "all tables. Trained positions start from the sinusoids.",
        rows=(
            BASE,
            _pairs("no positions", 0.576, 0.232, 0.858),
            _pairs("trained positions", 0.962, 0.033, 1.000),
        ),
    ),
    Table(
        "heads", "Number of heads",
        text="The write-up gives “head size” 4, 8 and 16 and calls the base 16. Read as the width "
        "of a head, these are 16, 8 and 4 heads at width 64; read as a number of heads, 4, 8 and "
        "16, and the figures of 4 and 16 change places. Two heads are the model it looks into.",
        rows=(
            _pairs("base", *BASE_FIGURES, label="4 heads of 16 (base)",
                   note="0.853 if the size counts heads"),
            _pairs("2 heads", label="2 heads of 32"),
            _pairs("8 heads", 0.912, 0.059, 0.971, label="8 heads of 8"),
            _pairs("16 heads", 0.853, 0.070, 0.970, label="16 heads of 4",
                   note="0.909 if the size counts heads"),
        ),
    ),
    Table(
        "width", "Hidden dimension", text=ONE_BASE,
        rows=(BASE, _pairs("width 32", 0.779, 0.106, 0.923)),
    ),
    Table(
        "layers", "Number of layers",
        text="The write-up counts encoder and decoder together: 2, 4 and 8. “Beast large” below "
        "has as many layers, eight heads and trained positions.",
        rows=(
            BASE,
            _pairs("1 + 1 layers", 0.842, 0.086, 0.935),
            _pairs("4 + 4 layers", 0.812, 0.120, 0.984),
        ),
    ),
    Table(
        "engineering", "Batches, schedules, weight decay",
        text="The write-up speaks of these without figures. Gradients are accumulated over 5 "
        "batches of equal lengths, so that there are a fifth as many updates; “lengths mixed” has "
        "padded batches of 128 and a third as many.",
        rows=(
            BASE,
            Row("small pairs mixed/lengths mixed", "lengths mixed"),
            *(_pairs(name) for name in ("accumulated", "plateau", "no weight decay",
                                        "weight decay 0.1")),
        ),
    ),
    Table(
        "beasts", "The tuned models",
        text="8 heads and trained positions. Large has 4 + 4 layers.",
        rows=(
            _pairs("beast small", *BEAST_FIGURES),
            _pairs("beast large", 0.964, 0.036, 1.000),
        ),
    ),
)  # fmt: skip

RULE_FIGURES = (0.654, 0.237, 0.996)  # of Mamba's own discretisation, the write-up's base
MAMBA_BASE = _joined("bilinear", 0.833, 0.175, 0.998, label="bilinear (base of the tables below)")

MAMBA = (
    Table(
        "discretisation", "Discretisation, Δ as it is",
        text="The first of two tables of the write-up. Clamped: decays below 0 are set to 0.",
        rows=(
            MAMBA_BASE,
            _joined("mamba rule", *RULE_FIGURES, label="exponential, B̄ = ΔB (Mamba's)"),
            _joined("zoh", 0.638, 0.252, 0.998, label="exact zero-order hold"),
            _joined("bilinear clamped"),
        ),
    ),
    Table(
        "discretisation-scaled", "Discretisation, Δ divided by √d",
        text="Compared with the second table of the write-up, whose models are not described.",
        rows=(
            _joined("bilinear, scaled", 0.873, 0.119, 0.998),
            _joined("mamba rule, scaled", 0.818, 0.107, 0.997),
            _joined("zoh, scaled", 0.808, 0.142, 0.998),
            _joined("bilinear", label="bilinear, not scaled"),
        ),
    ),
    Table(
        "a-and-delta", "A and Δ",
        text="All combinations, with Mamba's rule, from which the write-up derives w_t. Constant: "
        "one learned Δ per channel. Position: Δ from a learned embedding of the position.",
        rows=(
            _joined("mamba rule", *RULE_FIGURES, label="A learned, Δ selective (base)"),
            _joined("A learned, constant", 0.839, 0.157, 0.997, label="A learned, Δ constant"),
            _joined("A learned, position", label="A learned, Δ from the position", note="NA"),
            _joined("A = -1, selective", 0.833, 0.168, 0.997, label="A = -1, Δ selective"),
            _joined("A = -1, constant", label="A = -1, Δ constant"),
            _joined("A = -1, position", label="A = -1, Δ from the position", note="NA"),
        ),
    ),
    Table(
        "sizes", "Width and layers", text=ONE_BASE,
        rows=(
            _joined("bilinear", label="width 64, 2 layers (base)"),
            _joined("width 32", 0.844, 0.153, 0.996, label="width 32, 2 layers"),
            _joined("1 layer", 0.867, 0.167, 0.997, label="width 64, 1 layer"),
            _joined("3 layers", label="width 64, 3 layers"),
        ),
    ),
    Table(
        "training", "Kernel, learning rate, schedule, dropout",
        text=f"{ONE_BASE} The write-up prefers 3e-3 to 3e-4 and gives no figure.",
        rows=(
            _joined("bilinear", label="kernel 16, rate 3e-3, cosine (base)"),
            *(_joined(name) for name in ("kernel 4", "rate 3e-4", "plateau", "dropout")),
        ),
    ),
    Table(
        "tuned", "The tuned models on the small list",
        text="“small” has a kernel of 4 taps, the write-up's one of 16; the transformer is the "
        "small tuned model of the other study.",
        rows=(
            _joined("small", note="0.870 with kernel 16"),
            _joined("small, kernel 16", 0.870, 0.144, 0.998),
            _pairs("beast small", *BEAST_FIGURES, label="transformer, beast small"),
        ),
    ),
    Table(
        "large", "The tuned models on the large list",
        text="The write-up trained its large Mamba on the large list and its transformers on the "
        "small one. Here both see every word as often, the transformer in batches of 128 instead "
        "of 64 and so with fewer updates.",
        rows=(
            Row("large/large", "Mamba, large", 0.983, 0.015, 0.998),
            Row("large pairs/beast small", "transformer, beast small", note="not trained on it"),
        ),
    ),
)  # fmt: skip
