"""Tables of the whole smeared-keys study, from the plain numbers of its `result.json`.

Leaves out its figures and the page (`report`).
"""

from __future__ import annotations

from typing import Any

from smearlens.experiments.rules import half_way
from smearlens.experiments.smeared_keys.text_verdicts import CONV
from smearlens.viz.report import Study, estimate

Runs = list[dict[str, Any]]
Rows = list[list[str]]
WHERE = {
    "text": "tiny Shakespeare",
    "wikitext": "WikiText-2, pads left out",
    "pads counted": "WikiText-2, pads counted",
    "pads counted, no mask": "WikiText-2, pads counted, no causal mask",
}


def variants(study: Study, *tasks: str) -> dict[tuple[str, str], Runs]:
    """(task, name) to the runs of every seed, in the order of the grid."""
    found: dict[tuple[str, str], Runs] = {}
    for m in study["measures"]:
        if m["task"] in tasks:
            found.setdefault((m["task"], m["name"]), []).append(m)
    return found


def repeats_table(study: Study) -> Rows:
    """Every model on repeats: accuracy, heads, roles without lags, audit."""
    rows = [[
        "model", "parameters", "accuracy", "best induction score", "its control",
        "best previous-token score", "accuracy without Q's lags", "without K's", "without V's",
        "without any", "audit",
    ]]  # fmt: skip
    for (_, name), runs in variants(study, "repeats").items():
        best = [m["scores"]["induction"]["best"] for m in runs]
        lags = [m["smearing"].get("without_lags") for m in runs]
        passed = all(m["audit"]["passed"] for m in runs)
        rows.append([
            name, f"{runs[0]['n_parameters']:,}", estimate([m["accuracy"] for m in runs]),
            estimate([b["score"] for b in best]), estimate([b["control"] for b in best]),
            estimate([m["scores"]["prev_token"]["best"]["score"] for m in runs]),
            *(estimate([w[role]["accuracy"] for w in lags]) if lags[0] else ""
              for role in ("q", "k", "v", "qkv")),
            "passed" if passed else "reads the future",
        ])  # fmt: skip
    return rows


def offsets_table(study: Study) -> Rows:
    """Bare stacks: weight of the best head so many tokens after an earlier occurrence."""
    rows: Rows = []
    for (_, name), runs in variants(study, "repeats").items():
        if "offsets" not in runs[0]:
            continue
        offsets = list(runs[0]["offsets"])
        rows = rows or [["model", "accuracy", *(f"{o} tokens after" for o in offsets)]]
        scores = ([m["offsets"][o]["score"] for m in runs] for o in offsets)
        rows.append([name, estimate([m["accuracy"] for m in runs]), *map(estimate, scores)])
    return rows


def layers_table(study: Study) -> Rows:
    """Stacks of attention, layer by layer: scores of the best heads, and accuracy without them."""
    rows = [[
        "model", "layer", "induction score", "its control", "duplicate-token score",
        "previous-token score", "change without the induction head", "without another head",
        "change without the previous-token head",
    ]]  # fmt: skip
    for (_, name), runs in variants(study, "repeats").items():
        for i in range(len(runs[0].get("layers", ()))):
            layer = [m["layers"][i] for m in runs]
            rows.append([
                name, str(i + 1),
                estimate([r["induction"]["score"] for r in layer]),
                estimate([r["induction"]["control"] for r in layer]),
                estimate([r["duplicate_token"]["score"] for r in layer]),
                estimate([r["prev_token"]["score"] for r in layer]),
                estimate([r["without_induction"]["effect"] for r in layer]),
                estimate([r["without_induction"]["control_effect"] for r in layer]),
                estimate([r["without_prev_token"]["effect"] for r in layer]),
            ])  # fmt: skip
    return rows


def text_table(study: Study) -> Rows:
    """Both texts: held-out loss half-way and at the end, accuracy, audit."""
    rows = [[
        "text", "model", "parameters", "loss half-way", "loss at the end", "accuracy",
        "accuracy, pads counted", "audit",
    ]]  # fmt: skip
    for (task, name), runs in variants(study, *WHERE).items():
        key = "loss" if "loss" in runs[0] else "val_loss"
        rows.append([
            WHERE[task], name, f"{runs[0]['n_parameters']:,}", estimate(half_way(runs)),
            estimate([m[key] for m in runs]),
            *(estimate([m[k] for m in runs]) if k in runs[0] else ""
              for k in ("accuracy", "accuracy_with_pads")),
            "passed" if all(m["audit"]["passed"] for m in runs) else "reads the future",
        ])  # fmt: skip
    return rows


def padding_table(study: Study) -> Rows:
    """What padding alone does to held-out lines, by length."""
    rows = [["lines cut or padded to", "lines", "of them blank", "pads among the targets",
             "accuracy of always saying 'pad', pads counted",
             "accuracy of the most frequent token, real targets"]]  # fmt: skip
    for length, found in study["padding"].items():
        rows.append([
            f"{length} tokens", f"{found['lines']:,.0f}", f"{found['blank']:,.0f}",
            f"{found['pad_fraction']:.3f}", f"{found['constant']:.3f}", f"{found['unigram']:.3f}",
        ])  # fmt: skip
    return rows


def stripes_table(study: Study) -> Rows:
    """Where the first layer looks from real tokens before the end of their line."""
    keys = ("later keys", "pads", "share of pads among keys", "last position, highest",
            "last token of the line, highest", "first key", "strongest column",
            "strongest column is a pad")  # fmt: skip
    rows = [["text", "model", "keys", *(k.replace(", highest", " (top head)") for k in keys)]]
    for (task, name), runs in variants(study, *WHERE).items():
        for seen in runs[0].get("stripes", {}):
            found = [m["stripes"][seen] for m in runs]
            rows.append([
                WHERE[task], name, seen, *(estimate([f[key] for f in found]) for key in keys)
            ])  # fmt: skip
    return rows


def kernels_table(study: Study) -> Rows:
    """How far training moved each kernel of the stream from where it started."""
    rows = [["trained on", "model", "bound at the start", "largest |weight|", "moved / length",
             "RMS at lag 1, start", "RMS at lag 1", "average weight at lag 1",
             "share of taps that read ahead"]]  # fmt: skip
    for (task, name), runs in variants(study, "repeats", *WHERE).items():
        kernels = [m["kernel"] for m in runs]
        if not kernels[0] or kernels[0]["layer"] != "blocks.0.conv" or 1 not in kernels[0]["lags"]:
            continue
        at = kernels[0]["lags"].index(1)
        rows.append([
            WHERE.get(task, task), name, f"{kernels[0]['bound']:.3f}",
            estimate([k["largest"] for k in kernels]),
            estimate([k["moved_in_all"] for k in kernels]),
            *(estimate([k[key][at] for k in kernels])
              for key in ("start_rms", "rms", "signed_mean")),
            estimate([k["future_share"] for k in kernels]),
        ])  # fmt: skip
    return rows


def taps_table(study: Study) -> Rows:
    """Loss and accuracy with the taps that read ahead removed."""
    rows = [["measured on", "model", "taps removed", "loss (nats)", "accuracy"]]
    for (task, name), runs in variants(study, "repeats", "text").items():
        for i, row in enumerate(runs[0].get("future_taps", ())):
            found = [m["future_taps"][i] for m in runs]
            rows.append([
                WHERE.get(task, task), name, removed_taps(row["removed"]),
                estimate([f["loss"] for f in found]),
                estimate([f["accuracy"] for f in found]) if "accuracy" in row else "",
            ])  # fmt: skip
    return rows


def norms_table(study: Study) -> Rows:
    """Gradient norms of the kernel and of the steepest other parameter, and the loss."""
    rows = [["model", "kernel: median norm", "kernel: largest", "kernel: largest jump",
             "largest jump of any other", "held-out loss"]]  # fmt: skip
    for (_, name), runs in variants(study, "norms").items():
        conv = [m["gradient_norms"]["parameters"].get(CONV) for m in runs]
        others = [
            max(p["jump"] for n, p in m["gradient_norms"]["parameters"].items() if n != CONV)
            for m in runs
        ]
        rows.append([
            name,
            *(estimate([c[key] for c in conv]) if conv[0] else ""
              for key in ("median", "largest", "jump")),
            estimate(others), estimate([m["val_loss"] for m in runs]),
        ])  # fmt: skip
    return rows


def clipping_table(study: Study) -> Rows:
    """Held-out loss with clipping minus without, paired over seeds."""
    found = variants(study, "norms")
    rows = [["model", "loss clipped minus not clipped (nats)"]]
    for (task, name), runs in found.items():
        if name.endswith(", not clipped"):
            setting = name.removesuffix(", not clipped")
            clipped = found[task, f"{setting}, clipped"]
            pairs = zip(clipped, runs, strict=True)
            gaps = [m["val_loss"] - free["val_loss"] for m, free in pairs]
            rows.append([setting, estimate(gaps, "+.4f")])
    return rows


def removed_taps(removed: list[int]) -> str:
    """Lags as offsets, the way the write-up counts them: lag -2 is +2."""
    return " and ".join(f"{-lag:+d}" for lag in removed) or "none"
