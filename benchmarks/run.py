"""All benchmarks, each suite in a fresh process, as ratios with their bars.

make bench                            everything, into results/benchmarks/result.json
python benchmarks/run.py conv scan    these alone; written only with --out FILE

Each suite is written when it ends. A suite that the file holds already, from this machine, these
versions and this text of its file, is not run again unless `--force` says so. Ends with status 1 if
a row misses its bar or a suite fails.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from smearlens._files import write_atomically

HERE = Path(__file__).resolve().parent
RESULT = HERE.parent / "results" / "benchmarks" / "result.json"
SUITES = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
PACKAGES = ("smearlens", "torch", "transformers", "transformer-lens", "mambapy")


def main(arguments: list[str]) -> int:
    """0, 1 if a row misses its bar or a suite fails, 2 for a suite that does not exist."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--out", type=Path, help="result file; known suites in it are kept")
    parser.add_argument("--force", action="store_true", help="run suites that the file holds")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # one suite in this process
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.names) - set(SUITES))
    if unknown:
        print(f"no benchmark {unknown}; known: {SUITES}", file=sys.stderr)
        return 2
    if given.rows:
        given.rows.write_text(json.dumps(import_module(f"bench_{given.names[0]}").main()))
        return 0
    out = given.out or (None if given.names else RESULT)
    names = given.names or SUITES
    result = known(out)
    for name in names:
        if not given.force and result["suites"].get(name, {}).get("text") == text_of(name):
            print(f"\n{name}: measured on {result['suites'][name]['date']}, kept")
            continue
        print(f"\n{name}", flush=True)
        result["suites"][name] = measure(name)
        if out:
            write_atomically(out, as_text(result))
    return verdict({name: result["suites"][name] for name in names})


def known(out: Path | None) -> dict[str, Any]:
    """What `out` holds if this machine and these versions made it, else no suites."""
    fresh = {"command": "make bench", "machine": machine(), "suites": {}}
    if out is None or not out.exists():
        return fresh
    found = json.loads(out.read_text("utf-8"))
    return found if found.get("machine") == fresh["machine"] else fresh


def measure(name: str) -> dict[str, Any]:
    """Run a suite in a process of its own: its rows, what they cost, and what else went on."""
    start, before, load = time.perf_counter(), _cpu_seconds(), os.getloadavg()[0]
    text = text_of(name)  # as it is now: an edit while it runs is another suite
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, str(HERE / "run.py"), name, "--rows", str(rows)]
        status = subprocess.run(command).returncode
        found = json.loads(rows.read_text()) if rows.exists() else []
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "text": None if status else text,  # what failed runs again
        "status": status,
        "load": [load, os.getloadavg()[0]],
        "cpu_seconds": _cpu_seconds() - before,
        "wall_seconds": time.perf_counter() - start,
        "rows": found,
    }


def machine() -> dict[str, Any]:
    """Processor, cores and versions: what a ratio depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return {
        "processor": models[0] if models else platform.processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {p: importlib.metadata.version(p) for p in PACKAGES if p in installed},
    }


def text_of(name: str) -> str:
    """Which text of a suite's file was run."""
    return hashlib.sha256((HERE / f"bench_{name}.py").read_bytes()).hexdigest()[:16]


def as_text(result: dict[str, Any]) -> str:
    """JSON with four digits of every number and a line for every row."""
    short = _rounded(result)
    rows = {name: suite.pop("rows") for name, suite in short["suites"].items()}
    for name, suite in short["suites"].items():
        suite["rows"] = f"rows of {name}"
    text = json.dumps(short, indent=1)
    for name, each in rows.items():
        lines = ",\n".join(f"    {json.dumps(r)}" for r in each)
        text = text.replace(f'"rows of {name}"', f"[\n{lines}\n   ]" if each else "[]")
    return text + "\n"


def verdict(suites: dict[str, Any]) -> int:
    """Say which suites failed and which rows missed their bar; 1 if any did."""
    failed = [name for name, suite in suites.items() if suite["status"]]
    rows = [(name, row) for name, suite in suites.items() for row in suite["rows"]]
    missed = [(name, row) for name, row in rows if not row["ok"]]
    minutes = sum(suite["cpu_seconds"] for suite in suites.values()) / 60
    print(f"\n{len(rows)} rows, {minutes:.1f} minutes of computing, {len(missed)} above their bar")
    for name, row in missed:
        print(f"{name}: {row['name']} {row['shape']}: {row['value']:.3g}, bar {row['bar']:.3g}")
    for name in failed:
        print(f"{name}: failed with status {suites[name]['status']}")
    return 1 if missed or failed else 0


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
