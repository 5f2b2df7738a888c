"""The models that ship with the package are what their cards say."""

import re

import pytest
import torch

from smearlens import audit, induction_accuracy, induction_score, load_model
from smearlens.analysis.scores import best_head
from smearlens.data.pig_latin import pig_latin_pairs
from smearlens.data.synthetic import repeated_tokens
from smearlens.experiments.pig_latin.task import forced_counts
from smearlens.models.files import SHIPPED

NAMES = sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir())
TRANSLATORS = [name for name in NAMES if name.startswith("pig-latin")]


def test_every_model_of_the_studies_is_here():
    assert len(NAMES) == 7
    assert TRANSLATORS == ["pig-latin-mamba", "pig-latin-seq2seq"]
    sizes = {name: sum(f.stat().st_size for f in (SHIPPED / name).iterdir()) for name in NAMES}
    assert all(sizes[name] < (800_000 if name in TRANSLATORS else 400_000) for name in NAMES)
    assert sum(sizes.values()) < 2_000_000  # all of it is in the wheel


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(TRANSLATORS)))
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
        assert value == pytest.approx(stated(card, label), abs=2e-3), label
    assert audit(model).passed == ("FAILED" not in card)
    assert f'{type(model).__name__}.from_pretrained("{name}")' in card


@pytest.mark.parametrize("name", TRANSLATORS)
def test_the_card_gives_the_words_that_come_out_right(name):
    """The held-out words are not in the package; other words are."""
    card = (SHIPPED / name / "README.md").read_text()
    model = load_model(name)
    words = list(pig_latin_pairs())[::11]
    found = forced_counts(model, words)
    label = f"of {len(words)} others: every 11th word of tiny Shakespeare, some of them trained on"
    assert found["right"] == pytest.approx(stated(card, label), abs=2)  # other CPUs round otherwise
    assert stated(card, "of 640 held out") >= 600
    assert model.n_parameters < 150_000
    assert f'{type(model).__name__}.from_pretrained("{name}")' in card


def stated(card, label):
    """The number that a card's table gives."""
    return float(re.search(re.escape(f"| {label} |") + r" ([\d.,]+) \|", card)[1].replace(",", ""))
