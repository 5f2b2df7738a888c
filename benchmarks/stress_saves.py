"""Kill training while it saves: nothing half-written is ever read, or stays.

    python benchmarks/stress_saves.py --kills 100

The victim says when a save begins and when it ends; the kill falls in between. After every kill
each checkpoint must read as intact; the next start must remove what the last one left half-written;
files must have the mode that the umask asks for; and the run must end with the bytes of one that
nobody killed.
"""

from __future__ import annotations

import stress_resume  # first: it says how many threads torch may start

# isort: split
import argparse
import os
import random
import signal
import stat
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from campaign import Campaign, script
from stress_resume import check, child, differing, state, undisturbed, wait

from smearlens.training import loop
from smearlens.training.checkpoint import list_checkpoints

UMASK, MODE = 0o027, 0o640
EVERY = 1  # updates between two saves


def announced(save: Callable, signals: int) -> Callable:
    """`save`, saying on a pipe when it begins and ends."""

    def saving(*args: object, **kwargs: object) -> object:
        os.write(signals, b"s")
        result = save(*args, **kwargs)
        os.write(signals, b"e")
        return result

    return saving


def victim(name: str, out: Path, steps: int, signals: int) -> None:
    """The training whose saves are interrupted."""
    os.umask(UMASK)
    loop._Run._save = announced(loop._Run._save, signals)
    stress_resume.run(name, out, steps, EVERY)


def killed_in_a_save(
    name: str, out: Path, steps: int, nth: int, delay: float
) -> tuple[int | None, bool]:
    """Exit code of a run killed `delay` seconds into its `nth` save, and whether it was in it."""
    read, write = os.pipe()
    pid = child(lambda: victim(name, out, steps, write))
    os.close(write)
    seen = b""
    try:
        while seen.count(b"s") < nth:
            new = os.read(read, 1)
            if not new:
                return wait(pid), False
            seen += new
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        while new := os.read(read, 4096):
            seen += new
        return code, seen.count(b"s") > seen.count(b"e")
    finally:
        os.close(read)


def litter(out: Path) -> set[str]:
    """Names of what is half-written in the folder of a run."""
    return {path.name for path in out.rglob(".*") if path.name.endswith(".tmp")}


def campaign(
    kills: int, name: str, steps: int, root: Path, moments: random.Random, longest: float
) -> Campaign:
    """Interrupt `kills` saves."""
    found = Campaign(
        claim="Files are whole or absent",
        tried="kill -9 between the beginning and the end of a save of weights, optimiser and "
        f"manifest, umask {UMASK:03o}; then the same call again",
        target="0 unreadable checkpoints, 0 half-written files after the next start, every file "
        f"of mode {MODE:o}, 0 differing bytes at the end",
        counts=dict.fromkeys(("kills during a save", "half-written files left by them",
                              "still there after the next start", "finished runs"), 0),
    )  # fmt: skip
    counts, number, left = found.counts, 0, set()
    with found.timed():
        expected, _ = undisturbed(name, root / "undisturbed", steps, EVERY)
        out = root / "killed-0"
        while counts["kills during a save"] < kills or out.exists():
            enough = counts["kills during a save"] >= kills
            nth = steps + 9 if enough else moments.randint(1, 2)
            code, during = killed_in_a_save(name, out, steps, nth, moments.uniform(0, longest))
            stayed = left & litter(out)
            found.count("still there after the next start", len(stayed))
            found.expect(not stayed, f"{sorted(stayed)[:2]} still there after a start")
            left = litter(out)
            if code == -signal.SIGKILL:
                longest *= 1.1 if during else 0.8  # about as long as a save takes here
                found.count("kills during a save", during)
                found.count("half-written files left by them", len(left))
                unreadable = wait(child(lambda out=out: check(out)))
                found.expect(not unreadable, f"kill {counts['kills during a save']}: unreadable")
                continue
            found.count("finished runs")
            _judge_end(found, out, code, expected, left)
            number, left = number + 1, set()
            out = root / f"killed-{number}"
    return found


def _judge_end(found: Campaign, out: Path, code: int | None, expected: dict, left: set) -> None:
    """Bytes, modes and litter of a run that has ended."""
    found.expect(code == 0 and not left, f"a run ended with exit code {code} and {sorted(left)}")
    off = differing(expected, state(out) if code == 0 else {})
    found.expect(off == 0, f"{off} bytes differ from the undisturbed run")
    last = list_checkpoints(out / "checkpoints")[-1]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in last.iterdir()}
    wrong = {name: oct(mode) for name, mode in modes.items() if mode != MODE}
    found.expect(not wrong, f"modes {wrong} under umask {UMASK:03o}")


def main(
    kills: int = 100, *, name: str = "ConvAttn", steps: int = 40, seed: int = 1
) -> Iterable[Campaign]:
    stress_resume.warm_up()
    with tempfile.TemporaryDirectory() as root:
        moments = random.Random(seed)
        yield campaign(kills, name, steps, Path(root), moments, longest=0.02)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=40, help="updates of each run")
    given = parser.parse_args()
    script(lambda: main(given.kills, steps=given.steps))
