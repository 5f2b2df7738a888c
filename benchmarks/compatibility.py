"""Install the package beside the oldest and the newest of what it needs, and run tests there.

    python benchmarks/compatibility.py                    # every combination
    python benchmarks/compatibility.py --only oldest reference
    python benchmarks/compatibility.py --folder /data/tmp --keep    # environments stay

Each combination gets an environment of its own (a kept one serves again), with the package as
`git archive HEAD` has it, and runs the tests named below, which touch every dependency. What was
installed and what passed goes into `results/compatibility/result.json`; a combination that was not
run this time keeps its entry. An interpreter is looked for as `pythonX.Y` on the path and among
those of pyenv. "oldest" takes each lower bound of `pyproject.toml` as an exact version. Exit code 1
if an installation or a test failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "results" / "compatibility" / "result.json"
TESTS = (
    "tests/nn/test_conv.py", "tests/nn/test_attention.py", "tests/models/test_saving.py",
    "tests/models/test_hooks.py", "tests/analysis/test_heads.py", "tests/causal/test_patch.py",
    "tests/data/test_tokenizers.py", "tests/training/test_checkpoint.py",
    "tests/training/test_loop.py", "tests/adapters/test_bridge.py",
    "tests/adapters/test_hugging_face.py", "tests/viz/test_widgets.py",
)  # fmt: skip
TOOLS = ("pytest", "pytest-timeout", "hypothesis", "beartype")
FACTS = """
import json, platform, sys, torch
from importlib.metadata import version
found = {name: version(name) for name in sys.argv[1:]}
print(json.dumps([platform.python_version(), found, torch.cuda.is_available()]))
"""


@dataclass(frozen=True)
class Combination:
    """What is installed together.

    Attributes:
        why: what it stands for
        python: version of the interpreter
        floors: every lower bound of the package as an exact version
        constraints: the versions of `constraints.txt`
    """

    why: str
    python: str
    floors: bool = False
    constraints: bool = False


COMBINATIONS = {
    "oldest": Combination("every lower bound, on the oldest Python", "3.10", floors=True),
    "reference": Combination("the versions of constraints.txt", "3.11", constraints=True),
    "newest": Combination("the newest of everything", "3.11"),
    "newest-python": Combination("the newest of everything, on the newest Python", "3.13"),
}  # fmt: skip


def floors() -> dict[str, str]:
    """Name of a dependency to its lower bound in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    block = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    return dict(re.findall(r'"([\w-]+)>=([\d.]+)"', block[1]))


def requirements(combination: Combination) -> list[str]:
    """What pip is asked for beside the package and the tools."""
    if combination.constraints:
        return ["-c", str(ROOT / "constraints.txt")]
    pins = [f"{name}=={version}" for name, version in floors().items()]
    return pins if combination.floors else []


def interpreter(version: str) -> str:
    """An interpreter of a version such as 3.12.

    Raises:
        FileNotFoundError: if there is none
    """
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    found = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    check = f"import sys; sys.exit(sys.version_info[:2] != ({version.replace('.', ', ')}))"
    for path in filter(None, found):
        if subprocess.run([str(path), "-c", check], capture_output=True).returncode == 0:
            return str(path)
    raise FileNotFoundError(f"no Python {version}: install it, or leave that combination out")


def run(name: str, folder: Path) -> dict[str, Any]:
    """Install and test one combination; its entry of the result."""
    combination = COMBINATIONS[name]
    source, python = folder / "source", folder / "env" / "bin" / "python"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(source)], input=archive.stdout, check=True)
    if not python.exists():
        subprocess.run([interpreter(combination.python), "-m", "venv", folder / "env"], check=True)
    wanted = requirements(combination)
    entry = {"why": combination.why}
    install = [python, "-m", "pip", "install", "--quiet", *wanted, str(source), *TOOLS]
    installed = subprocess.run([str(word) for word in install], capture_output=True, text=True)
    if installed.returncode:
        error = [line for line in installed.stderr.splitlines() if "WARNING" not in line]
        return {**entry, "outcome": "not installable", "error": "\n".join(error[-12:])}
    facts = subprocess.run(
        [python, "-c", FACTS, *floors()], capture_output=True, text=True, check=True
    )
    version, packages, gpu = json.loads(facts.stdout)
    counts = test(python, source, folder / "report.xml")
    outcome = "passed" if counts["passed"] and not counts["failed"] else "failed"
    return {**entry, "python": version, "packages": packages, "gpu": gpu, **counts,
            "outcome": outcome}  # fmt: skip


def test(python: Path, source: Path, report: Path) -> dict[str, Any]:
    """Run the tests of `source` with `python`: how many passed, failed and were skipped."""
    command = [
        python, "-m", "pytest", "-q", "-p", "no:randomly", "-m", "not slow", f"--junitxml={report}",
        "--continue-on-collection-errors",
        *TESTS,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(w) for w in command], cwd=source, env=environment, capture_output=True, text=True
    )
    if not report.exists():
        return {"passed": 0, "failed": 0, "skipped": 0, "failures": done.stdout[-2000:]}
    cases = list(ET.parse(report).iter("testcase"))
    failed = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = sum(c.find("skipped") is not None for c in cases)
    return {
        "passed": len(cases) - len(failed) - skipped,
        "failed": len(failed),
        "skipped": skipped,
        "failures": [f"{c.get('classname')}::{c.get('name')}" for c in failed],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=COMBINATIONS, default=list(COMBINATIONS))
    parser.add_argument("--folder", type=Path, help="of the environments")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    options = parser.parse_args()
    bad = 0
    for name in options.only:
        folder = (options.folder or Path(tempfile.gettempdir())) / f"smearlens-{name}"
        try:
            entry = run(name, folder)
        finally:
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
        bad += entry["outcome"] != "passed"
        print(f"{name}: {entry['outcome']}", {k: entry.get(k) for k in ("passed", "failed")})
        result = json.loads(RESULT.read_text()) if RESULT.exists() else {"combinations": {}}
        result["combinations"][name] = entry
        result["command"] = "python benchmarks/compatibility.py"
        result["machine"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
        result["tests"] = list(TESTS)
        order = list(COMBINATIONS).index
        result["combinations"] = dict(
            sorted(result["combinations"].items(), key=lambda c: order(c[0]))
        )
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
