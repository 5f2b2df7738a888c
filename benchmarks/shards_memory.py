"""Peak memory of tokenizing texts into shards: it must not grow with the text.

    python benchmarks/shards_memory.py                 # 30 and 300 MB of text
    python benchmarks/shards_memory.py --megabytes 10 1000

Each text is made of numbered copies of tiny Shakespeare and tokenized in a process of its own. The
peak is the rise of the resident set while `write_shards` runs; the time is processor time. Writes
`results/shards/result.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from children import call, peak_rise

from smearlens.data.corpora import load_corpus
from smearlens.data.shards import ShardedTokens, write_shards
from smearlens.data.tokenizers import ByteTokenizer

RESULT = Path(__file__).resolve().parents[1] / "results" / "shards" / "result.json"


def tokenize(source: str, folder: str) -> dict[str, float]:
    """Write the shards of one text; what it took."""
    done: list[ShardedTokens] = []
    warm = Path(folder) / "warm"
    (Path(folder) / "warm.txt").write_text("a line\n" * 999)
    write_shards(warm, [Path(folder) / "warm.txt"], ByteTokenizer())
    start = time.process_time()
    peak = peak_rise(lambda: done.append(write_shards(folder, [source], ByteTokenizer())))
    seconds = time.process_time() - start
    n_tokens, n_shards = len(done[0]), len(done[0].parts)
    return {"tokens": n_tokens, "shards": n_shards, "peak_mb": peak, "cpu_seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[30, 300], help="of text")
    options = parser.parse_args()
    text, rows = load_corpus("tiny-shakespeare", "all").text, []
    for megabytes in options.megabytes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "text.txt"
            with source.open("w") as file:
                for copy in range(-(-megabytes * 10**6 // len(text))):
                    file.write(f"copy {copy}\n{text}")
            row = call(tokenize, str(source), str(Path(folder)), environment={})
            rows.append({"text_mb": source.stat().st_size / 1e6, **row})
            print(rows[-1])
    result = {
        "command": "python benchmarks/shards_memory.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
