"""Why a call failed: the argument that is not of the declared kind, by name.

Contains `explained`, which costs nothing while calls succeed, and `warn`, which points at the
caller. Leaves out ranges, and sizes that must agree: every function checks its own.
"""

from __future__ import annotations

import collections.abc
import dis
import functools
import inspect
import numbers
import sys
import types
import typing
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

Target = TypeVar("Target", bound=Callable[..., Any])

VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}


def explained(target: Target) -> Target:
    """Name the argument of the wrong kind when a call of `target` fails.

    Of a class, calls of its constructor and its public methods, but for `forward`.

    Nothing is checked beforehand. If the call raises, and not by a `raise` of this library, which
    says what is wrong itself, the arguments are held against their annotations: kind, and of a
    tensor dtype and number of axes. The first that does not fit becomes a TypeError, with the error
    as its cause; otherwise the error passes as it is.

    >>> @explained
    ... def half(size: int) -> int:
    ...     return size // 2
    >>> half("7")
    Traceback (most recent call last):
    TypeError: half: size must be int, got '7'
    """
    if isinstance(target, type):
        for name, member in list(vars(target).items()):
            public = name in ("__init__", "__call__") or not name.startswith("_")
            if isinstance(member, types.FunctionType) and public and name != "forward":
                setattr(target, name, explained(member))
        return target

    @functools.wraps(target)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return target(*args, **kwargs)
        except Exception as error:
            if (why := _why(target, args, kwargs, error)) is None:
                raise
            raise TypeError(why) from error

    return call  # pyrefly: ignore[bad-return]


def require_cache(name: str, value: Any) -> None:
    """Raise unless argument `name` maps names to activations (an ActivationCache, a dict)."""
    if not hasattr(value, "keys"):
        raise TypeError(
            f"{name} must map hook names to tensors, as run_with_cache returns it, "
            f"got {describe(value)}"
        )


def warn(message: str) -> None:
    """Warn with `message`, at the line outside this library whose call led here."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == "smearlens":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def describe(value: Any) -> str:
    """What was given, in a few words: of a tensor its dtype and shape."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__} {text[:40]}…"


def _why(target: Callable, args: tuple, kwargs: dict[str, Any], error: Exception) -> str | None:
    """The message about the first argument of a wrong kind; None if there is none to give."""
    if _on_purpose(error):
        return None
    try:
        bound = inspect.signature(target).bind(*args, **kwargs)
        hints = typing.get_type_hints(target)
    except (TypeError, NameError):
        return None  # Python itself has named an argument that is unknown or missing
    parameters = bound.signature.parameters
    for name, value in bound.arguments.items():
        if parameters[name].kind in VARIABLE:
            continue  # their annotation is of each value
        if name in hints and not fits(value, hints[name]):
            where = target.__qualname__.removesuffix(".__init__").removesuffix(".__call__")
            return f"{where}: {name} must be {_shown(hints[name])}, got {describe(value)}"
    return None


def _on_purpose(error: Exception) -> bool:
    """Whether a `raise` statement of this library made the error."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or not last.tb_frame.f_globals.get("__name__", "").startswith("smearlens"):
        return False
    return dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]] == "RAISE_VARARGS"


def fits(value: Any, hint: Any) -> bool:
    """Whether `value` may be what the annotation `hint` asks for; in doubt it may."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return any(type(value) is type(one) and value == one for one in inner)
    if origin is collections.abc.Callable:
        return callable(value)
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return _is(value, origin) and all(fits(item, inner[1]) for item in value.values())
    if origin is tuple and inner[1:] not in ((), (Ellipsis,)):
        pair = _is(value, tuple) and len(value) == len(inner)
        return pair and all(map(fits, value, inner))
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable):
        items = inner[:1] if inner[1:] in ((), (Ellipsis,)) else ()
        listed = _is(value, origin) and not isinstance(value, (str, bytes))
        seen = value if listed and isinstance(value, collections.abc.Collection) else ()
        return listed and all(fits(item, one) for item in seen for one in items)
    return _is(value, _NUMBERS.get(hint, hint if origin is None else origin))


def _is(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if not isinstance(kind, type) or kind.__module__.startswith("numpy._typing"):
        return True  # numpy's own protocols do not know a list
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol that cannot be asked
        return True


def _shown(hint: Any) -> str:
    """An annotation as it is written: int, Float[Tensor, 'batch pos'], str | None."""
    if hint is type(None):
        return "None"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_shown(one) for one in typing.get_args(hint))
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    for module in ("typing.", "collections.abc.", "torch."):
        text = text.replace(module, "")
    return text
