"""Packages that only an extra of smearlens installs: loaded when used, missed by name."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class MissingExtraError(ImportError):
    """A package is missing that only an extra of smearlens installs: names it and the pip line."""


def extra(module: str, name: str) -> Any:
    """Import `module`, which the extra `name` of smearlens installs."""
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} is not installed; it comes with an extra: pip install 'smearlens[{name}]'"
        ) from error
