"""Padding and stripes on lines whose answers are known, and the lines of a folder."""

import gzip

import pytest
import torch

from smearlens.experiments.smeared_keys import text_measures
from smearlens.experiments.smeared_keys.text_measures import (
    PadsCounted,
    padded_scores,
    padding,
    stripes,
    wikitext_text,
)
from smearlens.models.conv_attn import ConvAttn, ConvAttnConfig


class Copycat:
    """Says each token again: right where a token repeats, pads included."""

    def __call__(self, tokens):
        return 30.0 * torch.nn.functional.one_hot(tokens, 7).float()


TOKENS = torch.tensor([[1, 1, 2, 2, 0, 0, 0], [3, 4, 5, 0, 0, 0, 0]])
REAL = torch.tensor([[True] * 4 + [False] * 3, [True] * 3 + [False] * 4])


def test_accuracy_with_and_without_pads_counted():
    found = padded_scores(Copycat(), TOKENS, REAL)
    # targets 1 2 2 | 0 0 0 and 4 5 | 0 0 0 0: hits 1, 0, 1 | 0, 1, 1 and 0, 0 | 0, 1, 1, 1
    assert found["accuracy"] == pytest.approx(2 / 5)
    assert found["accuracy_with_pads"] == pytest.approx(7 / 12)
    assert found["loss"] == pytest.approx(3 / 5 * 30, rel=1e-4)
    assert found["loss_with_pads"] == pytest.approx(5 / 12 * 30, rel=1e-4)


def test_padding_alone(monkeypatch):
    monkeypatch.setattr(text_measures, "gpt2_tokenizer", lambda: type("T", (), {"end_of_text": 0}))
    lines = [torch.tensor([1, 1, 2, 2]), torch.tensor([3, 4, 5]), torch.tensor([], dtype=int)]
    found = padding(lines, 7)
    assert found["pad_fraction"] == pytest.approx(13 / 18)
    assert found["constant"] == pytest.approx(13 / 18)
    assert found["unigram"] == pytest.approx(2 / 5)


def test_pads_counted_is_the_same_batch_without_a_mask():
    class Lines:
        def batch(self, step):
            return {"tokens": TOKENS + step, "loss_mask": REAL}

    found = PadsCounted(Lines()).batch(2)
    assert list(found) == ["tokens"]
    assert found["tokens"].equal(TOKENS + 2)


def test_stripes_against_a_loop_over_queries_and_keys():
    torch.manual_seed(0)
    model = ConvAttn(ConvAttnConfig(d_vocab=7, d_model=6, n_heads=3, kernel_size=2, n_ctx=7)).eval()
    model.blocks[0].attn.causal = False
    found = stripes(model, TOKENS, REAL)
    _, cache = model.run_with_cache(TOKENS)
    pattern, last = cache["blocks.0.attn.hook_pattern"].double(), (3, 2)
    totals = {"later keys": 0.0, "pads": 0.0, "last token of the line": 0.0, "first key": 0.0}
    n_queries = 0
    for line in range(2):
        for query in range(last[line]):
            n_queries += 1
            for key in range(7):
                weight = float(pattern[line, :, query, key].mean())
                totals["later keys"] += weight * (key > query)
                totals["pads"] += weight * (not REAL[line, key])
                totals["last token of the line"] += weight * (key == last[line])
                totals["first key"] += weight * (key == 0)
    for name, total in totals.items():
        assert found["pads seen"][name] == pytest.approx(total / n_queries, rel=1e-5)
    assert found["pads hidden"]["pads"] == 0
    assert found["pads hidden"]["last token of the line"] > totals["last token of the line"] / 5
    assert found["pads seen"]["share of pads among keys"] == pytest.approx(1 / 2)


def test_lines_that_end_early():
    lines = [torch.arange(n) for n in (0, 1, 2, 3, 6, 7, 8, 11)]
    assert [len(line) for line in text_measures.half_full(lines, 9)] == [2, 3, 6]


def test_the_strongest_column_and_whether_it_is_a_pad():
    pattern = torch.full((2, 1, 7, 7), 0.05, dtype=torch.float64)
    pattern[0, :, :, 5] = 0.7  # a pad of the first line
    pattern[1, :, :, 1] = 0.7  # a token of the second
    found = text_measures._weights(pattern, REAL)
    assert found["strongest column"] == pytest.approx(0.7)
    assert found["strongest column is a pad"] == 0.5


def test_a_folder_holds_one_file_per_split_and_a_cut_line_is_dropped(tmp_path):
    (tmp_path / "wiki.train.head.raw.gz").write_bytes(gzip.compress(b"one\ntwo\nthr"))
    assert wikitext_text(str(tmp_path), "train") == "one\ntwo\n"
    with pytest.raises(ValueError, match=r"one file wiki.valid\*.raw or .raw.gz, found none"):
        wikitext_text(str(tmp_path), "validation")
    (tmp_path / "wiki.train.raw").write_text("one\n")
    with pytest.raises(ValueError, match=r"found \['wiki.train.head.raw.gz', 'wiki.train.raw'\]"):
        wikitext_text(str(tmp_path), "train")
