"""What every campaign of `make stress` hands back, and how it is printed.

Leaves out the campaigns (`stress_*.py`) and running them all (`stress.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 5  # failures that a result names


@dataclass
class Campaign:
    """One attack on the library: what was tried, and what did not hold.

    Attributes:
        claim: the property that must hold, in a few words
        tried: what was done to break it
        target: what must come out
        counts: numbers by what they count, `tried` first
        failures: everything that did not hold, named
        seconds: processor time, of child processes too
    """

    claim: str
    tried: str
    target: str
    counts: dict[str, int | float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def count(self, name: str, number: int = 1) -> None:
        """Add to one of the counts."""
        self.counts[name] = self.counts.get(name, 0) + number

    def expect(self, holds: bool, otherwise: str) -> None:
        """Note a failure unless something holds."""
        if not holds:
            self.failures.append(otherwise)

    @contextmanager
    def timed(self) -> Iterator[Campaign]:
        """Add the processor time that passes in the block."""
        before = _spent()
        try:
            yield self
        finally:
            self.seconds += _spent() - before

    def to_dict(self) -> dict[str, Any]:
        """What goes into the result: the first failures only, beside their number."""
        found = asdict(self)
        found["failed"], found["failures"] = len(self.failures), self.failures[:SHOWN]
        found["seconds"] = round(self.seconds, 1)
        return found

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in self.counts.items())
        lines = [
            f"{'ok' if not self.failures else 'FAILED':6} {self.claim}: {counts}; "
            f"{len(self.failures)} failed; {self.seconds:.1f} s"
        ]
        return "\n".join(lines + [f"       {failure}" for failure in self.failures[:SHOWN]])


def report(campaigns: Iterable[Campaign]) -> list[Campaign]:
    """Print campaigns as they end."""
    done = []
    for campaign in campaigns:
        print(campaign, flush=True)
        done.append(campaign)
    return done


def script(run: Callable[[], Iterable[Campaign]]) -> None:
    """Run the campaigns of one file; exit code 1 if anything failed."""
    raise SystemExit(any(campaign.failures for campaign in report(run())))


def _spent() -> float:
    import resource

    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
