"""Copy the seed-0 models of a finished comparison into the package, each with its card.

make demo && .venv/bin/python results/ship.py runs/compare
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from smearlens._files import write_atomically
from smearlens.models.families import load_model
from smearlens.models.files import SHIPPED, model_card

MODELS = {  # name in the package -> folder of the run
    "conv-attn-repeats": "repeats-conv k=3-seed0",
    "smeared-keys-repeats": "repeats-smeared keys-seed0",
    "attn-attn-repeats": "repeats-two layers-seed0",
    "attention-only-repeats": "repeats-attention only-seed0",
    "conv-attn-leaky-repeats": "repeats-conv k=3, same padding-seed0",
}


def main(study: Path) -> None:
    for name, run in MODELS.items():
        folder = study / "runs" / run
        measures = json.loads((folder / "measures.json").read_text())
        last = max((folder / "checkpoints").glob("step-*"))
        model = load_model(last)
        model.save_pretrained(SHIPPED / name)
        best = measures["scores"]["induction"]["best"]
        verdict = "passed" if measures["audit"]["passed"] else "FAILED: reads the future"
        card = model_card(model) + (
            "\n| measured on 256 repeats of period 8 to 20 | |\n|---|---|\n"
            f"| accuracy on what induction can predict | {measures['accuracy']:.4f} |\n"
            f"| induction score of the best head | {best['score']:.4f} |\n"
            f"| the same head on another example's tokens | {best['control']:.4f} |\n"
            f"| audit | {verdict} |\n"
            f"\nTrained by `smearlens compare --out runs/compare`, run `{run}`; copied by "
            "`python results/ship.py runs/compare`.\n"
        )
        card = card.replace('from_pretrained("this repository")', f'from_pretrained("{name}")')
        write_atomically(SHIPPED / name / "README.md", card)
        print(f"{name}: {model.n_parameters:,} parameters, {measures['accuracy']:.4f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
