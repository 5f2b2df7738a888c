"""The README says what the code does: its quick start runs, its tables are those of the results."""

import re
from pathlib import Path

import pytest

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


def test_the_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).exists(), path
