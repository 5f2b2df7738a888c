"""Measurements that need a process of their own: peak memory, fresh heaps, imports.

    python benchmarks/children.py bench_scan alternate '["hugging_face", 0]'

calls that function of that file and prints what it returns as a last line of JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back to the system at once


def call(function: Callable[..., Any], *arguments: Any, environment: dict[str, str]) -> Any:
    """`function(*arguments)` in a fresh process of one thread; arguments and result as JSON.

    Of the settings of malloc the process has those in `environment` and no others.
    """
    module = Path(function.__code__.co_filename).stem
    command = [sys.executable, __file__, module, function.__name__, json.dumps(arguments)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    settings = inherited | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=settings, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_rise(run: Callable[[], object]) -> float:
    """MB by which the resident set of this process rises at most while `run` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MB of this process: VmRSS now, VmHWM at its peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


if __name__ == "__main__":
    name, chosen, given = sys.argv[1:]
    print("\n" + json.dumps(getattr(import_module(name), chosen)(*json.loads(given))))
