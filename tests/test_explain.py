"""Why a call failed: the argument of the wrong kind is named, and nothing else changes."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from smearlens._explain import describe, explained, fits

WHOLE = torch.arange(6).view(2, 3)


@pytest.mark.parametrize(
    ("hint", "right", "wrong"),
    [
        (int, [0, -3, True], ["3", 2.5, None, [3]]),
        (float, [0, 2.5, float("nan")], ["0.5", None, [0.5]]),
        (str, [""], [b"", 3, None]),
        (bool, [True], ["yes", 1]),
        (int | None, [None, 3], ["3"]),
        (Literal["js", "cka"], ["js"], ["l2", 3, ["js"]]),
        (Sequence[str], [["a"], ("a",), []], ["a", [3], 3, None]),
        (tuple[int, int], [(1, 2)], [[1, 2], 3]),
        (tuple[int, ...], [(1, 2, 3), ()], [(1, "2"), [1]]),
        (int | tuple[int, int], [3, (1, 2)], ["3", 2.5]),
        (Mapping[str, Tensor], [{"a": WHOLE}, {}], [{"a": 3}, [], None]),
        (Callable[[int], int], [len], [3, None]),
        (Int[Tensor, "batch pos"], [WHOLE], [WHOLE[0], WHOLE / 2, WHOLE > 2, [1], None]),
        (Float[Tensor, "*batch pos"] | None, [None, WHOLE / 2], [WHOLE]),
        (torch.Generator, [torch.Generator()], [0, None]),
        (Any, [3, None, "a"], []),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else "",
)
def test_what_fits_an_annotation(hint, right, wrong):
    assert [value for value in right if not fits(value, hint)] == []
    assert [value for value in wrong if fits(value, hint)] == []


@explained
def halves(tokens: Int[Tensor, "batch pos"], size: int, *, kind: str = "a", **more: Any) -> Any:
    if kind == "mine":
        raise ValueError("kind must not be mine")
    return tokens[:, : size // 2], kind.upper(), more["key"]


def plain(*args, **kwargs):
    """The call as users have it: without the type checks of a test run."""
    return explained(inspect.unwrap(halves))(*args, **kwargs)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plain(WHOLE, "4", key=1), "halves: size must be int, got '4'"),
        (lambda: plain(WHOLE, 4, kind=3, key=1), "halves: kind must be str, got 3"),
        (
            lambda: plain(WHOLE[0], 4, key=1),
            r"halves: tokens must be Int\[Tensor, 'batch pos'\], got torch.int64 \[3\]",
        ),
    ],
)
def test_the_argument_is_named_and_the_cause_kept(call, message):
    with pytest.raises(TypeError, match=message) as error:
        call()
    assert error.value.__cause__ is not None


def test_other_failures_pass_as_they_are():
    with pytest.raises(KeyError, match="key"):
        plain(WHOLE, 4)
    with pytest.raises(ValueError, match="kind must not be mine"):
        plain(WHOLE, 4, kind="mine")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'size'"):
        plain(WHOLE)
    assert plain(WHOLE, 2, key=5)[1:] == ("A", 5)


def test_the_library_s_own_words_are_kept():
    """`CharTokenizer` refuses an empty text by a `raise` of its own."""
    from smearlens.data.tokenizers import CharTokenizer

    with pytest.raises(ValueError, match="text is empty"):
        CharTokenizer("")


def test_a_class_is_explained_in_its_constructor_and_methods():
    @explained
    class Box:
        def __init__(self, size: int):
            self.size = size + 1

        def grow(self, by: int) -> int:
            return self.size + by

        def forward(self, by: int) -> int:
            return self.size + by

    with pytest.raises(TypeError, match=r"Box: size must be int, got '3'"):
        Box("3")  # pyrefly: ignore
    with pytest.raises(TypeError, match=r"Box.grow: by must be int, got \[3\]"):
        Box(3).grow([3])  # pyrefly: ignore
    with pytest.raises(TypeError, match="unsupported operand"):
        Box(3).forward("3")  # pyrefly: ignore
    assert Box(3).grow(2) == 6
    assert list(inspect.signature(Box).parameters) == ["size"]


def test_what_was_given_is_told_in_a_few_words():
    assert describe(WHOLE) == "torch.int64 [2, 3]"
    assert describe("a") == "'a'"
    assert describe(list(range(100))).startswith("list [0, 1, 2")
    assert len(describe(list(range(100)))) < 60
