"""Optional packages: imported when needed, with an error that says how to get them; and what they say, in one line."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
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


def one_line(text: str, longest: int = 400) -> str:
    """Text without what a damaged file has of other characters, and not too long for a terminal."""
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= longest else text[:longest] + "..."


def reason(error: Exception) -> str:
    """An error of a library in one short line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # SimpleITK begins with where it was compiled, and names objects by their address.
    line = lines[-1] if "SimpleITK" in lines[0] else lines[0]
    return one_line(re.sub(r" ?\(0x[0-9a-f]+\)", "", line), 200)


def shortened(error: BaseException, width: int = 400) -> str:
    """An error of a library in one line, of all that it says as much as fits; the name of its class if it is mute."""
    return textwrap.shorten(str(error), width, placeholder=" ...") or type(error).__name__


@contextmanager
def in_words(what: str, *stay: type[Exception]) -> Iterator[None]:
    """Whatever a library raises in the block is a ValueError of one line that begins with `what`, but for `stay`."""
    try:
        yield
    except stay:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{what}: {shortened(error)}") from error
