"""Parts that the reports of both Pig Latin studies share: tables, learning curves, mistakes, lists.

Leaves out what each study looks into (`report`, `mamba_report`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from smearlens.experiments.pig_latin.paired import runs_of
from smearlens.viz import plots
from smearlens.viz.report import Part, Study, estimate

READING = (
    "Held-out accuracy is the share of whole words, mean over seeds with its interval; “exact” "
    "are the counts of all seeds, and the Clopper-Pearson intervals of single seeds from the "
    "lowest end to the highest: all are asked the same words. The difference to the "
    "write-up is in points. “Against the base” is the paired difference in points over seeds, and "
    "Holm's p of the exact sign test over words, within the table. Losses are nats per character."
)


def list_part(study: Study) -> Part:
    """What was trained and measured on."""
    published = study["config"]["data"] is not None
    rows = [["list", "training pairs", "held-out pairs", "follow the rule", "leave “u” after “q”",
             "follow neither", "words with two targets", "longest word"]]  # fmt: skip
    rows += [
        [name, f"{n['train_words']:,}", f"{n['validation_words']:,}", f"{n['follow']:,}",
         str(n["leave_u"]), ", ".join(f"{word} → {t}" for word, t in n["exceptions"]) or "none",
         str(n["contradictions"]), str(n["longest"])]
        for name, n in study["lists"].items()
    ]  # fmt: skip
    source = (
        "The published word pairs."
        if published
        else "The words of tiny Shakespeare with the rule's translations, since no folder of the "
        "published pairs was given (data): figures beside the write-up's are on other words."
    )
    text = (
        f"{source} One fixed split by seed, kept with the runs: every model is asked the same "
        "held-out words."
    )
    return Part("The words", text, name="lists", table=rows)


def table_parts(study: Study) -> list[Part]:
    """Every table of the write-up, its figures beside ours."""
    return [
        Part(
            table["title"],
            f"{table['text']} {READING}" if i == 0 else table["text"],
            name=table["name"],
            table=_rows(table),
        )
        for i, table in enumerate(study["tables"])
    ]


def _rows(table: dict[str, Any]) -> list[list[str]]:
    head = ["", "parameters", "held-out accuracy", "exact", "write-up", "difference",
            "against the base", "held-out loss", "write-up", "training accuracy",
            "write-up"]  # fmt: skip
    return [head, *(_row(row) for row in table["rows"])]


def _row(row: dict[str, Any]) -> list[str]:
    ours = sum(row["ours"]) / len(row["ours"])
    stated = "" if row["accuracy"] is None else f"{row['accuracy']:.3f}"
    beside = "; ".join(text for text in (stated, row["note"]) if text) or "none"
    difference = "" if row["accuracy"] is None else f"{100 * (ours - row['accuracy']):+.1f}"
    low, high = row["exact"]
    return [
        row["label"], f"{row['parameters']:,}", estimate(row["ours"]),
        f"{row['right']:,} of {row['words']:,} [{low:.3f}, {high:.3f}]",
        beside, difference, _against(row["against_base"]),
        estimate(row["losses"]), _stated(row["loss"]),
        estimate(row["train"]), _stated(row["train_accuracy"]),
    ]  # fmt: skip


def _against(versus: dict[str, Any] | None) -> str:
    if versus is None:
        return "base"
    d = versus["difference"]
    if d["n"] < 2:
        return f"{100 * d['mean']:+.1f} (1 seed), p = {versus['p_holm']:.2g}"
    return (
        f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]; "
        f"p = {versus['p_holm']:.2g}"
    )


def _stated(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def curve_part(study: Study, groups: dict[str, Sequence[str]]) -> Part:
    """Held-out accuracy and loss over training.

    Args:
        study: whose curves
        groups: title of a column of panels to the variants in it, each `task/name`
    """
    return Part(
        "Learning curves",
        "Held-out words during training, teacher-forced (right exactly when greedy decoding is): "
        "mean and range over seeds. The large list's curves are on 500 of its words.",
        name="curves",
        draw=partial(_draw_curves, study=study, groups=groups),
    )


def _draw_curves(figure: Any, study: Study, groups: dict[str, Sequence[str]]) -> None:
    figure.set_size_inches(4.2 * len(groups), 5.6)
    axes = figure.subplots(2, len(groups), squeeze=False)
    for column, (title, names) in enumerate(groups.items()):
        curves = {name.partition("/")[2]: curves_of(study, name) for name in names}
        plots.draw_curves(axes[0][column], curves, key="accuracy", ylabel="words right (fraction)")
        plots.draw_curves(axes[1][column], curves, key="loss", ylabel="nats per character")
        axes[1][column].set_yscale("log")
        axes[0][column].set_title(title, fontsize=9)


def curves_of(study: Study, name: str) -> list[list[dict[str, Any]]]:
    """The learning curve of every seed of `task/name`."""
    return [m["curve"] for m in runs(study, name)]


def runs(study: Study, name: str) -> list[dict[str, Any]]:
    """The runs of `task/name`, by seed; a ValueError if there is none."""
    return [*runs_of(study["measures"], name)]


def kinds_part(study: Study, names: Sequence[str]) -> Part:
    """Whether longer words, or words that start with a vowel, are harder."""
    kinds: dict[str, Callable[[int, str], bool]] = {
        "up to 4 letters": lambda n, _: n <= 4,
        "5-7": lambda n, _: 5 <= n <= 7,
        "8-10": lambda n, _: 8 <= n <= 10,
        "11 and more": lambda n, _: n > 10,
        "starts with a, e, i, o, u": lambda _, vowel: vowel == "1",
        "starts otherwise": lambda _, vowel: vowel == "0",
    }
    rows = [["model", *kinds]]
    for name in names:
        listed = study["lists"][name.split("/")[0].split()[0]]
        words = list(zip(listed["letters"], listed["vowel_first"], strict=True))
        hits = [run["hits"] for run in runs(study, name)]
        chosen = [[i for i, word in enumerate(words) if f(*word)] for f in kinds.values()]
        rows.append([name, *(_right_among(hits, some) for some in chosen)])
    return Part(
        "Which words are hard?",
        "Share of the held-out words of a kind that are right, mean over seeds with its interval, "
        "and how many such words there are.",
        name="kinds-of-words", table=rows,
    )  # fmt: skip


def _right_among(hits: Sequence[str], chosen: Sequence[int]) -> str:
    if not chosen:
        return "no such word"
    shares = [sum(h[i] == "1" for i in chosen) / len(chosen) for h in hits]
    return f"{estimate(shares)} of {len(chosen)}"


def mistake_parts(study: Study, names: Sequence[str]) -> list[Part]:
    """Every mistake of the first seed of some variants, up to 60: word, right, wrong."""
    parts = []
    for name in names:
        task, _, variant = name.partition("/")
        run = runs(study, name)[0]
        counts = run["validation"]
        wrong = counts["words"] - counts["right"]
        shown = len(run["mistakes"])
        parts.append(
            Part(
                f"Mistakes of “{variant}” on the {task.split()[0]} list, seed 0",
                f"{wrong} of {counts['words']} held-out words are wrong"
                + (f"; the first {shown} of them." if shown < wrong else "."),
                name="mistakes-" + name.replace("/", "-").replace(" ", "-").replace(",", ""),
                table=[["word", "right", "wrong"], *run["mistakes"]],
            )
        )
    return parts
