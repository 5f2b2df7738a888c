"""Every campaign that tries to break the library, one after another; the result goes on the site.

make stress                          everything, to results/stress/result.json
python benchmarks/stress.py files    one of them

Each campaign says what it tried, how often, and what did not hold. One of them alone replaces its
part of the result. Exit code 1 if anything failed.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: forked children must not need threads
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # two threads on a busy machine need not spin
os.environ["SMEARLENS_PROGRESS"] = "0"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json
import platform
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import torch
from campaign import Campaign, report

import smearlens
from smearlens._files import write_atomically

RESULT = Path(__file__).resolve().parents[1] / "results" / "stress" / "result.json"
SUITES = ("resume", "saves", "files", "code", "input", "hooks", "injection", "training", "memory")


def main(names: list[str]) -> int:
    """Run the named suites (all by default); 1 if anything failed."""
    if unknown := sorted(set(names) - set(SUITES)):
        print(f"no campaign {unknown}; known: {SUITES}", file=sys.stderr)
        return 2
    if os.access("/dev/shm", os.W_OK):
        tempfile.tempdir = "/dev/shm"  # a kill ends a process, not the machine: no disk is needed
    done: dict[str, list[Campaign]] = {}
    for name in names or SUITES:
        print(f"\n{name}", flush=True)
        done[name] = report(import_module(f"stress_{name}").main())
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        found = contents({name: done[name]})
        write_atomically(RESULT, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    campaigns = [campaign for suite in done.values() for campaign in suite]
    failed = [campaign for campaign in campaigns if campaign.failures]
    seconds = sum(campaign.seconds for campaign in campaigns)
    print(f"\n{len(campaigns)} campaigns, {len(failed)} failed, {seconds:.0f} s of processor time")
    return 1 if failed else 0


def contents(done: dict[str, list[Campaign]]) -> dict[str, object]:
    """The result file with these suites; nothing in it tells one machine from another."""
    before = json.loads(RESULT.read_text("utf-8"))["campaigns"] if RESULT.exists() else []
    now = {f"python benchmarks/stress.py {name}": suite for name, suite in done.items()}
    campaigns = [campaign for campaign in before if campaign["command"] not in now]
    campaigns += [
        {"command": command, **campaign.to_dict()}
        for command, suite in now.items()
        for campaign in suite
    ]
    campaigns.sort(key=lambda campaign: SUITES.index(campaign["command"].split()[-1]))
    return {
        "command": "make stress",
        "versions": {
            "smearlens": smearlens.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, CPU only",
        "campaigns": campaigns,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
