"""The README says what the code does: its quick start runs, its tables are those of the results."""

import re
from pathlib import Path

import pytest
import torch

from smearlens import ConvAttn, induction_score
from smearlens.experiments.measures import evaluation_tokens
from smearlens.experiments.smeared_keys.short import D_VOCAB, LENGTH, PERIODS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_quick_start_runs_and_prints_what_is_shown(capsys):
    code, shown = re.search(r"```python\n(.*?)```.*?```\n(.*?)```", README, re.DOTALL).groups()
    assert len(code.strip().splitlines()) <= 17
    exec(code.replace("steps=500", "steps=2").replace("warmup=100", "warmup=1"), {})
    printed = capsys.readouterr().out

    def outline(text):
        """The text with its numbers taken out: they belong to 500 steps."""
        return re.sub(r"\s+", " ", re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)).strip()

    assert outline(printed) == outline(shown)


@pytest.mark.parametrize("table", ["models", "roles"])
def test_every_number_of_the_tables_is_in_the_results(table):
    rows = (ROOT / "results" / "compare" / "tables" / f"{table}.md").read_text().splitlines()
    known = {cell.strip() for row in rows for cell in row.strip("|").split("|")}
    start = {"models": "| model | parameters", "roles": "| model | intact"}[table]
    block = README[README.index(start) :].split("\n\n")[0].splitlines()
    for row in [block[0], *block[2:]]:
        for cell in row.strip("|").split("|"):
            assert cell.strip() in known, cell


def test_the_control_is_lifted_by_pairs_that_share_their_period():
    """What stands above the table, on the model and the tokens of its row."""
    tokens = evaluation_tokens(PERIODS, LENGTH, D_VOCAB)
    model = ConvAttn.from_pretrained("conv-attn-repeats").eval()
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    best = induction_score(cache, tokens).top(1)[0]
    of_the_example_before = induction_score(cache["blocks.0.attn.hook_pattern"], tokens.roll(1, 0))[
        :, best["head"]
    ]
    periods = torch.tensor(
        [next(p for p in range(2, 48) if row[p:] == row[:-p]) for row in tokens.tolist()]
    )
    same = periods == periods.roll(1)
    assert f"{same.sum()} of {len(tokens)} here" in README
    others = float(of_the_example_before[~same].mean())
    assert f"{others:.3f}, below chance ({best['chance']:.3f})" in README
    assert float(of_the_example_before[same].mean()) > 0.96
    assert abs(best["control"] - float(of_the_example_before.mean())) < 1e-6


def test_the_trap_of_one_period_is_told_as_it_was_measured():
    table = ROOT / "results" / "compare" / "tables" / "positional.md"
    known = dict(
        re.findall(r"^\| (.*?) \| (\S+) \[.*\|$", table.read_text("utf-8"), flags=re.MULTILINE)
    )
    score, control = (known[n] for n in ("induction score at the trained period",
                      "the same with another example's tokens (control)"))  # fmt: skip
    assert score == control
    assert f'"induction score" of {score}' in README
    assert f"{known['accuracy at period 12']} at period 12" in README.replace("\n", " ")
    left = float(known["weight on that lag when nothing repeats"])
    assert f"half of that weight ({left:.2f})" in README


def test_the_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
