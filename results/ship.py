"""Copy the seed-0 models of a finished study into the package, each with its card.

make demo && .venv/bin/python results/ship.py runs/compare
smearlens experiment pig-latin --data FOLDER && .venv/bin/python results/ship.py runs/pig-latin
smearlens experiment mamba-pig-latin --data FOLDER
.venv/bin/python results/ship.py runs/mamba-pig-latin
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from smearlens._files import write_atomically
from smearlens.data.pig_latin import pig_latin_pairs
from smearlens.experiments.pig_latin.task import forced_counts
from smearlens.models.base import HookedModel
from smearlens.models.families import load_model
from smearlens.models.files import SHIPPED, model_card

MODELS = {  # study -> name in the package -> folder of the run
    "compare": {
        "conv-attn-repeats": "repeats-conv k=3-seed0",
        "smeared-keys-repeats": "repeats-smeared keys-seed0",
        "attn-attn-repeats": "repeats-two layers-seed0",
        "attention-only-repeats": "repeats-attention only-seed0",
        "conv-attn-leaky-repeats": "repeats-conv k=3, same padding-seed0",
    },
    "pig-latin": {"pig-latin-seq2seq": "small pairs-beast small-seed0"},
    "mamba-pig-latin": {"pig-latin-mamba": "small-small-seed0"},
}
EVERY = 11  # of the words of tiny Shakespeare, for a figure that needs no other file


def main(study: Path) -> None:
    """Copy the models of the study in this folder, which has the study's name."""
    for name, run in MODELS[study.name].items():
        folder = study / "runs" / run
        measures = json.loads((folder / "measures.json").read_text())
        model = load_model(max((folder / "checkpoints").glob("step-*")))
        model.save_pretrained(SHIPPED / name)
        measured = on_repeats if study.name == "compare" else on_words
        command = "compare" if study.name == "compare" else f"experiment {study.name} --data FOLDER"
        card = model_card(model) + (
            f"\n{measured(model, measures)}"
            f"\nTrained by `smearlens {command} --out {study}`, run `{run}`; copied by "
            f"`python results/ship.py {study}`.\n"
        )
        card = card.replace('from_pretrained("this repository")', f'from_pretrained("{name}")')
        write_atomically(SHIPPED / name / "README.md", card)
        print(f"{name}: {model.n_parameters:,} parameters")


def on_repeats(model: HookedModel, measures: dict[str, Any]) -> str:
    """What the main job measured, as rows of a card."""
    best = measures["scores"]["induction"]["best"]
    verdict = "passed" if measures["audit"]["passed"] else "FAILED: reads the future"
    return (
        "| measured on 256 repeats of period 8 to 20 | |\n|---|---|\n"
        f"| accuracy on what induction can predict | {measures['accuracy']:.4f} |\n"
        f"| induction score of the best head | {best['score']:.4f} |\n"
        f"| the same head on another example's tokens | {best['control']:.4f} |\n"
        f"| audit | {verdict} |\n"
    )


def on_words(model: HookedModel, measures: dict[str, Any]) -> str:
    """Counts of words that come out right, as rows of a card."""
    held_out, training = measures["validation"], measures["train"]
    others = forced_counts(model, list(pig_latin_pairs())[::EVERY])
    return (
        "Trained on four fifths of the published list of 3,198 pairs: word pairs of University of "
        "Toronto CSC421 and MSU CSE 849; the lists are not shipped.\n\n"
        "| words translated right, to their end | |\n|---|---|\n"
        f"| of {held_out['words']} held out | {held_out['right']} |\n"
        f"| of {training['words']:,} trained on | {training['right']:,} |\n"
        f"| of {others['words']} others: every {EVERY}th word of tiny Shakespeare, some of them "
        f"trained on | {others['right']} |\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
