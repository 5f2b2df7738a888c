"""Wrong calls of everything public: each argument of a right call spoiled in every way that fits.

    python benchmarks/stress_input.py            # what is raised
    python benchmarks/stress_input.py --list     # every call and its answer

A wrong call is explained if it raises an error that this library raises on purpose and whose
message names the argument; accepted, if it means something after all. Anything else fails: an error
from below (torch, numpy, Python itself) or a bare KeyError, IndexError or AttributeError.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from campaign import Campaign, script
from jaxtyping import config as jaxtyping_config
from stress_calls import right_calls
from torch import Tensor, nn

import smearlens
from smearlens.models.base import HookedModel

SRC = Path(smearlens.__file__).parent
BARE = (KeyError, IndexError, AttributeError, AssertionError, ZeroDivisionError, StopIteration,
        UnboundLocalError, RecursionError)  # fmt: skip


class Odd:
    """An object of no use."""

    def __repr__(self) -> str:
        return "Odd()"


def spoiled(value: Any) -> Iterator[tuple[str, Any]]:
    """Wrong versions of `value`, each with what is wrong."""
    kinds: list[tuple[type | tuple, Callable[[Any], Iterator[tuple[str, Any]]]]] = [
        (Tensor, _tensors), (bool, _switches), (int, _integers), (float, _floats), (str, _texts),
        (dict, _mappings), ((list, tuple), _sequences), (HookedModel, _models), (Path, _paths),
        (torch.Generator, _generators),
    ]  # fmt: skip
    for kind, wrong in kinds:
        if isinstance(value, kind):
            yield from wrong(value)
            return
    if callable(value):
        yield from [("no function", 3)]


def _tensors(t: Tensor) -> Iterator[tuple[str, Any]]:
    yield "one axis less", t[0]
    yield "one axis more", t[None]
    yield "empty", t[..., :0]
    yield "no rows", t[:0]
    yield "shorter", t[..., :-1]
    yield "more rows", torch.cat((t, t[:1]))
    yield "a list", t.tolist()
    yield "None", None
    yield "text", "tokens"
    if t.dtype == torch.bool:
        yield "of numbers", t.float()
        yield "all False", torch.zeros_like(t)
    elif t.is_floating_point():
        yield "of integers", t.long()
        yield "nan", torch.full_like(t, torch.nan)
        yield "complex", t.to(torch.complex64)
    else:
        yield "of fractions", t / 2
        yield "of bools", t.bool()
        yield "negative", t - 100
        yield "too large", t + 10**6


def _integers(n: int) -> Iterator[tuple[str, Any]]:
    yield from [("negative", -7), ("zero", 0), ("fraction", 2.5), ("text", "3"), ("nan", torch.nan)]
    yield from [("list", [n]), ("None", None), ("inf", torch.inf)]  # huge sizes only cost memory


def _floats(n: float) -> Iterator[tuple[str, Any]]:
    yield from [("nan", torch.nan), ("inf", torch.inf), ("negative", -0.5), ("text", "0.5")]
    yield from [("large", 1e9), ("list", [n])]


def _texts(text: str) -> Iterator[tuple[str, Any]]:
    yield from [("unknown", "no such name"), ("empty", ""), ("number", 3), ("list", [text, 3])]
    yield from [("cut", text[:-1]), ("bytes", text.encode())]


def _switches(flag: bool) -> Iterator[tuple[str, Any]]:
    yield from [("text", "yes"), ("number", 2)]


def _mappings(d: dict) -> Iterator[tuple[str, Any]]:
    yield from [("empty", {}), ("odd keys", {"odd": torch.ones(2, 7, 12)}), ("list", list(d))]
    yield "None", None
    if d and all(isinstance(v, Tensor) and v.ndim > 1 for v in d.values()):
        yield "one axis less", {k: v[0] for k, v in d.items()}
        yield "empty tensors", {k: v[:, :0] for k, v in d.items()}
        yield "flat tensors", {k: v.flatten() for k, v in d.items()}


def _sequences(values: Any) -> Iterator[tuple[str, Any]]:
    kind = type(values)
    yield from [("empty", kind()), ("shorter", values[:-1]), ("None in it", kind([*values, None]))]
    yield from [("odd things", kind(Odd() for _ in values)), ("number", 3), ("text", "no such")]
    if all(isinstance(v, (int, float)) for v in values):
        yield from [("negative", kind(-100 for _ in values)), ("huge", kind(10**6 for _ in values))]
        yield "nan", kind(torch.nan for _ in values)
        yield "nested", kind([list(values)])


def _models(model: HookedModel) -> Iterator[tuple[str, Any]]:
    yield from [("no model", nn.Linear(2, 3)), ("None", None), ("the class", type(model))]


def _paths(path: Path) -> Iterator[tuple[str, Any]]:
    yield from [("missing", path.with_name("nowhere")), ("a file", Path(__file__) / "x")]
    yield from [("number", 3), ("empty", "")]


def _generators(generator: torch.Generator) -> Iterator[tuple[str, Any]]:
    yield from [("None", None), ("seed", 0)]


@cache
def _raises(file: str) -> list[tuple[int, int]]:
    """First and last line of every `raise` in a source."""
    tree = ast.parse(Path(file).read_text())
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Raise))
    return [(node.lineno, node.end_lineno or node.lineno) for node in found]


def on_purpose(error: BaseException) -> bool:
    """Whether a `raise` of this library made the error, not something below it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if not Path(last.filename).is_relative_to(SRC):
        return False
    return any(first <= (last.lineno or 0) <= end for first, end in _raises(last.filename))


def signature_error(error: BaseException) -> bool:
    """Python's own answer to an unknown or missing argument: it names both."""
    return isinstance(error, TypeError) and "argument" in str(error) and "()" in str(error)


def answer(function: Callable, arguments: dict[str, Any], name: str) -> tuple[str, str]:
    """What a call does: a verdict (accepted, explained, unnamed, below, bare) and its words."""
    try:
        result = function(**arguments)
        if inspect.isgenerator(result):
            list(result)
    except Exception as error:
        words = f"{type(error).__name__}: {error}".replace("\n", " ")
        if isinstance(error, OSError) and error.filename is not None:
            return "explained", words  # the system's own words name the path
        if isinstance(error, BARE):
            return "bare", words
        if signature_error(error):
            return "explained", words
        if not on_purpose(error):
            return "below", words
        return ("explained" if name in str(error) else "unnamed"), words
    return "accepted", ""


def wrong_calls(only: str = "") -> Iterator[tuple[str, str, str, str, str]]:
    """(call, argument, what is wrong, verdict, words) for every wrong call."""
    for call, make in right_calls().items():
        if only not in call:
            continue
        for name, value in make()[1].items():
            for what, wrong in spoiled(value):
                function, arguments = make()
                verdict, words = answer(function, {**arguments, name: wrong}, name)
                yield call, name, what, verdict, words


def campaign(only: str = "") -> Campaign:
    """All wrong calls, with types unchecked as a user has them."""
    found = Campaign(
        claim="Wrong input is explained",
        tried="each argument of a right call of every public name and method, spoiled in every "
        "way that fits: rank, type, size, range, nan, empty, unknown names, None",
        target="at least 60 refused; no error from below, no bare KeyError, IndexError or "
        "AttributeError; the right calls work",
    )
    with found.timed(), unchecked():
        for call, make in right_calls().items():
            if only in call:
                found.count("right calls")
                verdict, words = answer(*make(), "")
                found.expect(verdict == "accepted", f"right call of {call}: {words}")
        for call, name, what, verdict, words in wrong_calls(only):
            found.count("wrong calls")
            found.count({"unnamed": "explained, argument not named"}.get(verdict, verdict))
            found.expect(verdict not in ("bare", "below"), f"{call}({name}: {what}): {words:.150}")
    return found


def unchecked() -> Any:
    """Run-time type checks off and warnings unheard, as a user has it; in an empty folder.

    A wrong path may be a right one by chance: "" is the folder that this is run in.
    """
    from contextlib import ExitStack

    stack = ExitStack()
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    stack.callback(os.chdir, os.getcwd())
    os.chdir(folder)
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", True)
    stack.callback(jaxtyping_config.update, "jaxtyping_disable", before)
    stack.enter_context(warnings.catch_warnings())
    warnings.simplefilter("ignore")
    return stack


def main(only: str = "") -> Iterable[Campaign]:
    yield campaign(only)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("only", nargs="?", default="", help="part of the name of a call")
    parser.add_argument("--list", action="store_true", help="every wrong call and its answer")
    given = parser.parse_args()
    if given.list:
        with unchecked():
            for line in wrong_calls(given.only):
                print("\t".join(line), flush=True)
    else:
        script(lambda: main(given.only))
