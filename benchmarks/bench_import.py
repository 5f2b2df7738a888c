"""What an import costs, each in fresh processes: processor time beside the library it stands on.

python benchmarks/bench_import.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from statistics import median

from timing import Row, report, row, tenths

ROUNDS = 3
CODE = """
import json, time
start = time.process_time()
{}
print("\\n" + json.dumps(time.process_time() - start))
"""
PAIRS = [  # subject, peer, bar
    ("import smearlens", "import torch", 0.1),
    ("from smearlens import induction_score", "import torch", 1.2),
    ("from smearlens import ConvAttn", "import transformer_lens", 1.1),
]
WHY = "the subject imports the peer, which it needs, and then itself"


def seconds(statement: str) -> float:
    """Processor time of `statement` at the start of a process."""
    command = [sys.executable, "-c", CODE.format(statement)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def rows() -> Iterator[Row]:
    statements = list(dict.fromkeys(s for subject, peer, _ in PAIRS for s in (subject, peer)))
    rounds = [{s: seconds(s) for s in statements} for _ in range(ROUNDS)]
    for subject, peer, bar in PAIRS:
        ratios = [times[subject] / times[peer] for times in rounds]
        spread = tenths(ratios)
        yield row(f"{subject} / {peer}", (), median(ratios), bar, **spread, why=WHY)


def main() -> list[Row]:
    return report(rows())


if __name__ == "__main__":
    main()
