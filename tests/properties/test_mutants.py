"""The changes that mutation testing makes: each compiles, keeps the lines and says what it does."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from mutants import functions_of, mutants_of  # noqa: E402

SOURCE = b'''"""A docstring with 1 in it."""
LIMIT = 3


class Box:
    size: int = 2

    def fill(self, x: int, *, twice: bool = False) -> int:
        """Text, 2."""
        if x < 0:
            raise ValueError(f"x={x + 1} must be at least 0")
        total = max(
            x,
            self.size,
        )
        return total * 2 if twice else -total


def tail(rows, most):
    return list(zip(rows[most:], rows, strict=True))
'''
EXPECTED = {
    "x < 0 -> x <= 0", "x < 0 -> x >= 0", "0 -> 1", "0 -> -1", "x < 0 -> not x < 0",
    "max( x, self.size, ) -> max(x)",
    "max( x, self.size, ) -> min(x, self.size)",
    "return total * 2 if twice else -total -> return None",
    "total * 2 if twice else -total -> total * 2 if not twice else -total",
    "total * 2 -> total / 2", "2 -> 3", "2 -> 1", "-total -> total",
    "return list(zip(rows[most:], rows, strict=True)) -> return None",
    "zip(rows[most:], rows, strict=True) -> zip(rows, rows[most:], strict=True)",
    "zip(rows[most:], rows, strict=True) -> zip(rows[most:], strict=True)",
    "most: -> most + 1:", "most: -> most:-1",
}  # fmt: skip


def test_the_changes_of_a_small_file_are_these():
    found = {f"{m.before} -> {m.after}" for m in mutants_of("a.py", SOURCE)}
    drop = {change for change in found if change.endswith("-> pass")}
    assert len(drop) == 1  # the raise; its text is left alone
    assert found - drop == EXPECTED
    assert functions_of(SOURCE) == {"Box.fill": (8, 16), "tail": (19, 20)}


@pytest.mark.parametrize("path", ["analysis/heads.py", "nn/conv.py", "causal/states.py"])
def test_every_change_compiles_and_moves_no_line(path):
    source = (ROOT / "src" / "smearlens" / path).read_bytes()
    changes = mutants_of(path, source)
    assert len({m.key for m in changes}) == len(changes) > 100
    lines = source.splitlines()
    for m in changes[::7]:
        changed = m.applied(source)
        compile(changed, path, "exec")
        first, last = functions_of(source)[m.function]
        other = changed.splitlines()
        assert len(other) == len(lines)
        assert other[: first - 1] + other[last:] == lines[: first - 1] + lines[last:]
        assert other != lines
