"""Optional packages: imported when needed, with an error that says how to get them."""

from __future__ import annotations

import importlib
from types import ModuleType


class MissingPackageError(ImportError, ValueError):
    """An optional package is not installed. Also a ValueError, like all bad input of this package."""


def require(package: str, extra: str) -> ModuleType:
    """Imports `package`. Raises MissingPackageError, naming the extra that brings it."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != package.split(".")[0]:
            raise  # the package is there, but something that it needs is not
        raise MissingPackageError(
            f"package {package!r} is not installed; it comes with: pip install 'planecycle-fast[{extra}]'"
        ) from None
