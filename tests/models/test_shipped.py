"""The models that ship with the package are what their cards say."""

import re

import pytest
import torch

from smearlens import audit, induction_accuracy, induction_score, load_model
from smearlens.analysis.scores import best_head
from smearlens.data.synthetic import repeated_tokens
from smearlens.models.files import SHIPPED

NAMES = sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir())


def test_every_model_of_the_main_job_is_here():
    assert len(NAMES) == 5
    assert all(
        sum(f.stat().st_size for f in (SHIPPED / name).iterdir()) < 400_000 for name in NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_card_gives_what_is_measured(name):
    card = (SHIPPED / name / "README.md").read_text()
    model = load_model(name)
    generator = torch.Generator().manual_seed(2**31 - 1)  # of the study's held-out repeats
    tokens = repeated_tokens(256, (8, 20), 48, 64, generator)
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens)
    best = best_head(induction_score(cache, tokens))
    measured = {
        "accuracy on what induction can predict": float(induction_accuracy(logits, tokens).mean()),
        "induction score of the best head": best["score"],
        "the same head on another example's tokens": best["control"],
    }
    for label, value in measured.items():
        stated = float(re.search(re.escape(f"| {label} |") + r" ([\d.]+) \|", card)[1])
        assert value == pytest.approx(stated, abs=2e-3), label
    assert audit(model).passed == ("FAILED" not in card)
    assert f'{type(model).__name__}.from_pretrained("{name}")' in card
