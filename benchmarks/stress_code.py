"""What the sources never do: run code that comes from a file.

    python benchmarks/stress_code.py

Reads the syntax tree of every source of the package, its benchmarks, examples and pages. Leaves out
what other packages do when they are called; that pickles in their place are refused, `stress_files`
tries.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from campaign import Campaign, script

ROOT = Path(__file__).resolve().parents[1]
PICKLES = {"pickle", "cPickle", "dill", "joblib", "cloudpickle", "shelve", "marshal", "jsonpickle"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load",
         "yaml.unsafe_load", "np.load", "numpy.load", "pd.read_pickle"}  # fmt: skip
FLAGS = {"weights_only": "False", "trust_remote_code": "True", "allow_pickle": "True",
         "shell": "True"}  # fmt: skip


def offences(text: str) -> Iterator[str]:
    """Everything forbidden that a source does, with its line."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            bad = PICKLES & {alias.name.partition(".")[0] for alias in node.names}
            yield from (f"line {node.lineno}: imports {name}" for name in bad)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in PICKLES:
                yield f"line {node.lineno}: imports from {node.module}"
        elif isinstance(node, ast.Call):
            yield from _call(node)


def _call(node: ast.Call) -> Iterator[str]:
    called = ast.unparse(node.func)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    if called in CALLS:
        yield f"line {node.lineno}: calls {called}"
    if called in ("torch.load", "load_object") and keywords.get("weights_only") != "True":
        yield f"line {node.lineno}: {called} without weights_only=True"
    for flag, value in FLAGS.items():
        if keywords.get(flag) == value:
            yield f"line {node.lineno}: {flag}={value}"


def sources() -> list[Path]:
    """The package, and what is run beside it; tests make pickles to see them refused."""
    folders = ("src", "benchmarks", "examples", "results", "docs/sitegen")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return found + sorted((ROOT / "docs").glob("*.py"))


def campaign() -> Campaign:
    found = Campaign(
        claim="No code is run from a file",
        tried="every source read for pickles, eval, exec, torch.load without weights_only=True, "
        "allow_pickle, trust_remote_code, shell=True",
        target="0 found in the package; outside of it only a pickle that is made to be refused",
    )
    with found.timed():
        for path in sources():
            found.count("sources")
            text = path.read_text("utf-8")
            name = path.relative_to(ROOT).as_posix()
            found.count("calls", len(re.findall(r"\w\(", text)))
            for offence in offences(text):
                made = name == "benchmarks/stress_files.py" and "imports pickle" in offence
                found.expect(made, f"{name} {offence}")
    return found


def main() -> Iterable[Campaign]:
    yield campaign()


if __name__ == "__main__":
    script(main)
