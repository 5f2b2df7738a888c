"""The page on reliability and the committed result of `make stress` agree."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT / "benchmarks")]

from sitegen import reliability  # noqa: E402

RESULT = json.loads((ROOT / "results" / "stress" / "result.json").read_text("utf-8"))


def test_every_property_has_a_campaign_and_every_campaign_a_property():
    claims = [c["claim"] for c in RESULT["campaigns"]]
    for beginnings in reliability.ROWS.values():
        for beginning in beginnings:
            assert any(claim.startswith(beginning) for claim in claims), beginning
    shown = [c["claim"] for name in reliability.ROWS for c in reliability.of(name)]
    assert sorted(shown) == sorted(claims)


def test_the_page_shows_every_number_of_the_result():
    page = f"{reliability.overview()}{reliability.in_full()}{reliability.conditions()}"
    for campaign in RESULT["campaigns"]:
        for name, number in campaign["counts"].items():
            shown = f"{number:,} {name}" if number >= 1 or not number else f"{name} {number:g}"
            assert page.count(shown) >= 2, (campaign["claim"], shown)
        assert f"`{campaign['command']}`" in page


def test_every_suite_is_in_the_result():
    source = (ROOT / "benchmarks" / "stress.py").read_text()
    for campaign in RESULT["campaigns"]:
        assert f'"{campaign["command"].split()[-1]}"' in source
    suites = {campaign["command"].split()[-1] for campaign in RESULT["campaigns"]}
    files = {path.stem.removeprefix("stress_") for path in ROOT.glob("benchmarks/stress_*.py")}
    assert suites == files - {"calls"}


def test_targets_that_are_counts_are_reached():
    counts = {c["claim"]: c["counts"] for c in RESULT["campaigns"]}
    resumed = [c for claim, c in counts.items() if claim.startswith("Exact resume")]
    assert len(resumed) == 5
    assert all(c["kills"] >= 10 and c["bytes differing"] == 0 for c in resumed)
    assert counts["Files are whole or absent"]["kills during a save"] >= 100
    flips = [c for claim, c in counts.items() if claim.startswith("A flipped bit")]
    assert [c["flips"] for c in flips] == [c["detected"] for c in flips] == [200, 200]
    kinds = [c["kinds"] for claim, c in counts.items() if claim.startswith("A broken file is")]
    assert min(kinds) >= 12
    assert counts["Wrong input is explained"]["explained"] >= 60
    assert counts["Strings stay text"]["strings"] >= 20
    assert all(c["failed"] == 0 for c in RESULT["campaigns"])
