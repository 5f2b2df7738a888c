"""All benchmarks, one after another, each in this process; results as ratios with their bars.

make bench                      everything, to benchmarks/results.json
python benchmarks/run.py conv   one of them
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import import_module
from pathlib import Path

import torch

HERE = Path(__file__).parent
SUITES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(names: list[str]) -> int:
    """Run the named suites (all by default); 1 if any row misses its bar."""
    unknown = set(names) - set(SUITES)
    if unknown:
        print(f"no benchmark {sorted(unknown)}; known: {SUITES}", file=sys.stderr)
        return 2
    results = {}
    for name in names or SUITES:
        print(f"\n{name}")
        results[name] = import_module(f"bench_{name}").main()
    if not names:
        about = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "cores": os.cpu_count(),
        }
        (HERE / "results.json").write_text(
            json.dumps({"about": about, "results": results}, indent=1) + "\n"
        )
    missed = [row for rows in results.values() for row in rows if not row["ok"]]
    print(f"\n{sum(map(len, results.values()))} rows, {len(missed)} above their bar")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
