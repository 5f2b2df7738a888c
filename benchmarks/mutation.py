"""How many small wrong versions of `analysis`, `nn` and `causal` the tests notice: `make mutation`.

Draws changes at random (`benchmarks/mutants.py` says of which kinds), in proportion to the size of
the modules. Tests are collected once; each change is tried in a forked copy of that process, where
the code of the one function is exchanged and the tests that run the changed lines are called,
cheapest first, until one fails. Shape checks of the annotations are on, as in every test run. A
change that no test reaches has survived; one that takes ten times the time of its tests is noticed.

What was measured stays in the work folder: a run that was stopped goes on, and `--again` tries only
what survived. `--packages` draws from some of the three alone. `--name` puts the figures into
`results/mutation/result.json`: now, and at first, where changes that a sample of a smaller seed had
do not count, since tests may have been written for them. Changes that make no difference are listed
in `results/mutation/accepted.json` with the reason, one by one.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib
import json
import os
import random
import resource
import select
import signal
import sys
import time
import types
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from mutants import Mutant, functions_of, mutants_of

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src"
RESULTS = ROOT / "results" / "mutation"
PACKAGES = ("analysis", "nn", "causal")
TESTS = [f"tests/{name}" for name in (*PACKAGES, "properties")]
TESTS += [f"src/smearlens/{name}" for name in PACKAGES]
ELSEWHERE = (
    "test_long_context.py",
    "test_peak_memory",
    "test_memory_grows",
    "test_time_per_element",
)
HEAVY = ("scipy.stats", "scipy.optimize", "pandas", "sacrebleu.metrics.bleu")  # loaded before forks
AT_MOST = 20.0  # processor seconds of tests for one change, the cheapest first
NOTICED = ("killed", "timeout")


def read_sources() -> dict[str, bytes]:
    """Every module of the packages, by path."""
    files = [f for name in PACKAGES for f in sorted((SOURCES / "smearlens" / name).rglob("*.py"))]
    return {str(file.relative_to(SOURCES)): file.read_bytes() for file in files}


def drawn(count: int, seed: int, sources: dict[str, bytes]) -> list[Mutant]:
    """`count` changes, from each module in proportion, in random order: a part is a sample too."""
    every = {path: mutants_of(path, source) for path, source in sources.items()}
    rng, total = random.Random(seed), sum(map(len, every.values()))
    shares = {path: count * len(found) / total for path, found in every.items()}
    sizes = {path: int(share) for path, share in shares.items()}
    rest = sorted(shares, key=lambda path: sizes[path] - shares[path])
    for path in rest[: count - sum(sizes.values())]:
        sizes[path] += 1
    chosen = [m for path in every for m in rng.sample(every[path], sizes[path])]
    rng.shuffle(chosen)
    return chosen


def sample_of(
    count: int, seed: int, packages: list[str], sources: dict[str, bytes], work: Path
) -> dict[str, Mutant | None]:
    """The changes drawn when the work folder first saw this seed; None for one that is gone."""
    some = [] if packages == list(PACKAGES) else packages
    file = work / f"sample-{'-'.join([str(seed), str(count), *some])}.json"
    if not file.exists():
        allowed = {path: text for path, text in sources.items() if _package(path) in packages}
        file.write_text(json.dumps([m.key for m in drawn(count, seed, allowed)], indent=0))
    every = {m.key: m for path, text in sources.items() for m in mutants_of(path, text)}
    sample = {key: every.get(key) for key in json.loads(file.read_text())}
    gone = [key for key, mutant in sample.items() if mutant is None]
    print(f"{len(gone)} changes drawn before are of code that is no more", *gone, sep="\n  ")
    return sample


def drawn_before(seed: int, work: Path) -> set[str]:
    """The changes in the samples of smaller seeds."""
    files = [f for f in work.glob("sample-*.json") if int(f.stem.split("-")[1]) < seed]
    return {key for file in files for key in json.loads(file.read_text())}


class Forked:
    """In the place of pytest's loop over the tests: every run is in a copy of this process."""

    def __init__(
        self,
        work: Path,
        seed: int,
        sources: dict[str, bytes],
        mutants: list[Mutant],
        seconds: float,
    ):
        self.work, self.sources, self.mutants, self.seconds = work, sources, mutants, seconds
        self.log = f"outcomes-{seed}.jsonl"
        self.failed: list[str] = []

    def pytest_configure(self, config: Any) -> None:
        """Properties with few examples; one that fails need not be made small."""
        from hypothesis import Phase, settings

        few = {"max_examples": 25, "phases": (Phase.explicit, Phase.generate)}
        settings.register_profile("mutation", settings.get_profile("gate"), **few)
        settings.load_profile("mutation")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {
            item.nodeid: item
            for item in session.items
            if not any(name in item.nodeid for name in ELSEWHERE)  # in a process of their own
        }
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        reporter._tw._file = open(os.devnull, "w")  # noqa: SIM115 - as long as the process lives
        for name in (*HEAVY, *map(_module, self.sources)):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        gc.collect()
        gc.freeze()
        self.live = _functions()
        began = time.process_time()
        runs = Coverage(self.work / "coverage.jsonl", self).measured()
        self.warm(runs)
        log = self.work / self.log
        for number, mutant in enumerate(self.mutants):
            used = time.process_time() - began + _children()
            if used > self.seconds:
                print(f"stopped after {used:.0f} processor seconds", flush=True)
                break
            outcome = self.tried(mutant, runs)
            with log.open("a") as file:
                file.write(json.dumps({"key": mutant.key, "line": mutant.line, **outcome}) + "\n")
            print(number, outcome["outcome"], mutant.key, outcome.get("by", ""), flush=True)
        return True

    def warm(self, runs: dict[str, dict[str, Any]]) -> None:
        """Run the three cheapest tests of every file, so that no copy pays for first calls."""
        files = defaultdict(list)
        for nodeid in sorted(runs, key=lambda nodeid: runs[nodeid]["seconds"], reverse=True):
            files[_file(nodeid)].append(nodeid)
        for nodeids in files.values():
            for nodeid in nodeids[-3:]:
                self.call(nodeid, None)
        self.failed.clear()
        gc.collect()
        gc.freeze()

    def tried(self, mutant: Mutant, runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What becomes of one change."""
        lines, place = set(range(mutant.first, mutant.last + 1)), f"{mutant.path}:{mutant.function}"
        reach = [n for n, run in runs.items() if lines & set(run["lines"].get(place, ()))]
        reach.sort(key=lambda nodeid: runs[nodeid]["seconds"])
        chosen, seconds = [], 0.0
        for nodeid in reach:
            seconds += runs[nodeid]["seconds"]
            if chosen and seconds > AT_MOST:
                break
            chosen.append(nodeid)
        if not chosen:
            return {"outcome": "survived", "tests": 0}
        limit = 10 * min(seconds, AT_MOST) + 10

        def child() -> dict[str, Any]:
            if not self.exchange(mutant):
                return {"outcome": "not applied"}
            for nodeid, then in zip(chosen, [*chosen[1:], None], strict=True):
                self.call(nodeid, then)
                if self.failed:
                    return {"outcome": "killed", "by": nodeid}
            return {"outcome": "survived"}

        found = forked(child, limit)
        return {"tests": len(chosen)} | ({"outcome": "timeout"} if found is None else found)

    def call(self, nodeid: str, then: str | None) -> None:
        """Run one test as pytest does, warnings as errors included."""
        item = self.items[nodeid]
        following = None if then is None else self.items[then]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def exchange(self, mutant: Mutant) -> bool:
        """Give every live function of the module the code of its changed version."""
        module, file = sys.modules[_module(mutant.path)], str(SOURCES / mutant.path)
        loader: Any = module.__spec__.loader  # the one that adds shape checks
        new = _codes(loader.source_to_code(mutant.applied(self.sources[mutant.path]), file))
        done = False
        for name, functions in self.live[file].items():
            if name == mutant.function or name.startswith(f"{mutant.function}.<locals>"):
                for function in functions:
                    with contextlib.suppress(KeyError, ValueError):  # it captures something else
                        function.__code__ = new[name]
                        done = True
        return done


class Coverage:
    """Which lines of which functions each test runs, and for how long.

    Kept in a file; it stands until the file of the test or one of these functions changes.
    """

    def __init__(self, log: Path, loop: Forked):
        self.log, self.loop = log, loop
        self.places = {path: functions_of(text) for path, text in loop.sources.items()}
        self.tests = {file: _digest((ROOT / file).read_bytes()) for file in map(_file, loop.items)}

    def measured(self) -> dict[str, dict[str, Any]]:
        """By test; tests that fail without any change are left out, and named."""
        known = self.known()
        todo = [nodeid for nodeid in self.loop.items if nodeid not in known]
        print(f"{len(known)} tests measured before, {len(todo)} to measure", flush=True)
        for start in range(0, len(todo), 40):
            forked(lambda part=todo[start : start + 40]: self.run(part), 3600)
        known = self.known()
        for test in set(self.loop.items) - set(known):
            print(f"fails without any change: {test}", flush=True)
        return known

    def known(self) -> dict[str, dict[str, Any]]:
        """What is in the file and stands."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        runs = {run["test"]: run for run in map(json.loads, lines)}
        return {test: run for test, run in runs.items() if self.stands(test, run)}

    def stands(self, test: str, run: dict[str, Any]) -> bool:
        """Whether the test passed, and neither it nor what it runs has changed since."""
        if test not in self.loop.items or run["file"] != self.tests[_file(test)]:
            return False
        return run["passed"] and all(self.digest(f) == old for f, old in run["digests"].items())

    def run(self, nodeids: list[str]) -> dict[str, Any]:
        import coverage

        include = [f"{SOURCES}/smearlens/{name}/*" for name in PACKAGES]
        for nodeid, then in zip(nodeids, [*nodeids[1:], None], strict=True):
            self.loop.failed.clear()
            tracer = coverage.Coverage(data_file=None, config_file=False, include=include)
            began = time.process_time()
            tracer.start()
            self.loop.call(nodeid, then)
            tracer.stop()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data = tracer.get_data()
            lines: dict[str, list[int]] = defaultdict(list)
            for file in data.measured_files():
                path = str(Path(file).relative_to(SOURCES))
                for name, (first, last) in self.places[path].items():
                    inside = [n - first for n in data.lines(file) or () if first < n <= last]
                    if inside:
                        lines[f"{path}:{name}"] = sorted(inside)
            run = {
                "test": nodeid, "passed": not self.loop.failed, "lines": lines,
                "seconds": time.process_time() - began, "file": self.tests[_file(nodeid)],
                "digests": {place: self.digest(place) for place in lines},
            }  # fmt: skip
            with self.log.open("a") as log:
                log.write(json.dumps(run) + "\n")
        return {}

    def digest(self, place: str) -> str:
        """Of the text of a function."""
        path, _, name = place.partition(":")
        first, last = self.places.get(path, {}).get(name, (1, 0))
        lines = self.loop.sources.get(path, b"").splitlines()
        return _digest(b"\n".join(lines[first - 1 : last]))


def forked(work: Any, seconds: float) -> dict[str, Any] | None:
    """What `work` returns in a copy of this process; None if it takes longer, or dies."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with contextlib.suppress(BaseException):
            _be_quiet()
            used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
            resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 1,) * 2)
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**30,) * 2)
            os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    answer = b""
    deadline = time.monotonic() + 40 * seconds + 60  # on a busy machine; a sleeper uses no time
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            continue
        piece = os.read(reader, 2**16)
        if not piece:
            break
        answer += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.waitpid(child, 0)
    return json.loads(answer) if answer else None


def _be_quiet() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _children() -> float:
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _package(path: str) -> str:
    return path.split("/")[1]


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:16]


def _functions() -> dict[str, dict[str, list[types.FunctionType]]]:
    """Every live function of the package, by file and dotted name."""
    found: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    gc.unfreeze()
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType:  # others may answer isinstance with a warning
            file = thing.__code__.co_filename
            if file.startswith(str(SOURCES)):
                found[file][thing.__code__.co_qualname].append(thing)
    gc.freeze()
    return found


def _codes(code: types.CodeType) -> dict[str, types.CodeType]:
    """Code of every function inside, by dotted name."""
    found = {}
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            found[const.co_qualname] = const
            found.update(_codes(const))
    return found


def outcomes(work: Path, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Every outcome of each change, the oldest first."""
    found = defaultdict(list)
    log = work / f"outcomes-{seed}.jsonl"
    for line in log.read_text().splitlines() if log.exists() else ():
        entry = json.loads(line)
        found[entry["key"]].append(entry)
    return found


def accepted() -> dict[str, str]:
    """Changes that make no difference, with the reason."""
    file = RESULTS / "accepted.json"
    return json.loads(file.read_text("utf-8")) if file.exists() else {}


def score(found: dict[str, str], reasons: dict[str, str]) -> dict[str, Any]:
    """Noticed of all that make a difference, with the exact binomial interval."""
    from smearlens.analysis.stats import proportion_interval

    counted = [key for key, outcome in found.items() if outcome in NOTICED or key not in reasons]
    noticed = sum(found[key] in NOTICED for key in counted)
    if not counted:
        return {"tried": len(found)}
    low, high = proportion_interval(noticed, len(counted))
    return {
        "tried": len(found), "accepted": len(found) - len(counted), "noticed": noticed,
        "score": noticed / len(counted), "low": low, "high": high,
        "raw": noticed / len(found),
    }  # fmt: skip


def summary(keys: list[str], work: Path, seed: int, which: int) -> dict[str, Any]:
    """Changes of one sample in figures; `which` is 0 for first outcomes and -1 for last ones."""
    log, reasons = outcomes(work, seed), accepted()
    found = {key: log[key][which]["outcome"] for key in keys if key in log}
    found = {key: outcome for key, outcome in found.items() if outcome != "not applied"}
    parts = {
        name: score(part, reasons)
        for name in PACKAGES
        if (part := {key: found[key] for key in found if _package(key) == name})
    }
    return {"seed": seed, **score(found, reasons), "packages": parts}


def survivors(mutants: list[Mutant], work: Path, seed: int) -> list[dict[str, Any]]:
    """Those that no test noticed when last tried, in the order of the sources."""
    log, reasons = outcomes(work, seed), accepted()
    last = {key: entries[-1]["outcome"] for key, entries in log.items()}
    return [
        {"where": f"{m.path}:{m.line}", "function": m.function, "operator": m.operator,
         "change": f"{m.before} -> {m.after}", "accepted": reasons.get(m.key)}
        for m in sorted(mutants, key=lambda m: (m.path, m.line))
        if last.get(m.key) == "survived"
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=400, help="changes to try")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES))
    parser.add_argument("--seconds", type=float, default=3000, help="processor time, at most")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mutation")
    parser.add_argument("--again", action="store_true", help="try what survived once more")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files or folders of tests")
    parser.add_argument("--name", help="of the sample in the result, written when done")
    given = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))  # tests import their references
    work = given.work
    work.mkdir(parents=True, exist_ok=True)
    sources, log, reasons = read_sources(), outcomes(work, given.seed), accepted()
    sample = sample_of(given.sample, given.seed, given.packages, sources, work)
    mutants = [mutant for mutant in sample.values() if mutant is not None]
    if given.again:
        last = {key: entries[-1]["outcome"] for key, entries in log.items()}
        todo = [m for m in mutants if last.get(m.key) == "survived" and m.key not in reasons]
    else:
        todo = [m for m in mutants if m.key not in log]
    print(f"{len(todo)} of {len(sample)} changes to try", flush=True)
    if todo:
        options = ["-q", "-s", "-p", "no:randomly", "-p", "no:xdist", "--no-header"]
        pytest.main(
            [*options, *given.tests],
            plugins=[Forked(work, given.seed, sources, todo, given.seconds)],
        )
    before = drawn_before(given.seed, work)
    once = summary([key for key in sample if key not in before], work, given.seed, 0)
    now = summary([m.key for m in mutants], work, given.seed, -1)
    print("at first", once, "now", now, sep="\n")
    now["survivors"] = survivors(mutants, work, given.seed)
    for entry in now["survivors"]:
        print(entry["where"], entry["function"], entry["change"], "|", entry["accepted"] or "")
    if given.name:
        options = f"--sample {given.sample} --seed {given.seed} --name {given.name}"
        if given.packages != list(PACKAGES):
            options += f" --packages {' '.join(given.packages)}"
        command = f"python benchmarks/mutation.py {options}"
        write(given.name, {"command": command, "at_first": once, "now": now})


def write(name: str, sample: dict[str, Any]) -> None:
    """Put a sample into the committed result, beside those of other names."""
    file = RESULTS / "result.json"
    result = json.loads(file.read_text("utf-8")) if file.exists() else {"samples": {}}
    sources = read_sources()
    result["changes"] = dict.fromkeys(PACKAGES, 0)
    for path, text in sources.items():
        result["changes"][_package(path)] += len(mutants_of(path, text))
    result["samples"][name] = sample
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
