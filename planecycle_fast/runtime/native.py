"""The library of the `cpu` backend: found, or built on first use into the user's cache, and loaded.

PLANECYCLE_FAST_BUILD says what may be built: "auto" (the default) builds where nothing is there yet and uses the
reference where that fails, with one line in the log; "require" raises instead; "never" only loads what is there.

A library that was built with the package lies beside it. Others are in PLANECYCLE_FAST_CACHE, or in planecycle_fast
within XDG_CACHE_HOME or ~/.cache, by a key of all that they depend on. Code that is loaded from there runs as the user,
so the folder must be the user's own, with no access for others, and no symbolic link. A library is loaded only while it
is the file that was built, by its recorded size and digest: a damaged one is built again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from .compiling import BuildError, capability, compile_library, compiler, damage, key, library_name, sources
from .tracing import constant_when_compiled

BUILD = "PLANECYCLE_FAST_BUILD"
CACHE = "PLANECYCLE_FAST_CACHE"
CHOICES = ("auto", "never", "require")
LOCK_LIMIT = 900  # seconds to wait for another process that builds
log = logging.getLogger("planecycle_fast")

# "reason": why it is not usable, or None once it is loaded; "library": what is loaded
_state: dict[str, str | None] = {}
_lock = threading.RLock()


def csrc() -> Path:
    """The folder of the sources: in the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    return next((path for path in (package / "csrc", package.parent / "csrc") if path.is_dir()), package / "csrc")


def cache() -> Path:
    """The folder of libraries built on first use."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planecycle_fast"


def build_setting() -> str:
    """What PLANECYCLE_FAST_BUILD says. Raises ValueError for something else than `CHOICES`."""
    setting = os.environ.get(BUILD) or "auto"
    if setting not in CHOICES:
        raise ValueError(f"{BUILD} must be one of {', '.join(CHOICES)}, got {setting!r}")
    return setting


def shipped() -> Path | None:
    """The library that was built ahead of time for this torch and CPU, if there is one that is whole."""
    path = Path(__file__).parents[1] / library_name(capability())
    return path if _is_whole(path) else None


def found() -> Path | None:
    """The library that is there already, shipped or built before, or None."""
    return shipped() or (_cached() if _is_whole(_cached()) else None)


def _is_whole(library: Path) -> bool:
    return library.is_file() and damage(library) is None


@constant_when_compiled
def why_not_native() -> str | None:
    """The reason why the library is not usable, as far as can be told without building it, or None."""
    if "reason" in _state:
        return _state["reason"]
    try:
        if shipped() is not None:
            return None
        if _is_whole(_cached()):
            return _distrust(cache()) or _distrust(_cached().parent)
        return _why_not_built()
    except (BuildError, OSError, RuntimeError) as error:  # Path.home() where there is none
        return str(error)


def _why_not_built() -> str | None:
    """Why nothing is built where there is no whole library, or None: then it will be tried."""
    state = "damaged" if _cached().is_file() else "not built"
    if build_setting() == "never":
        return f"its library is {state}, and {BUILD} is never; build it with: planecycle-fast build"
    if compiler() is None:
        named = os.environ.get("CXX")
        return f"no C++ compiler was found{f' at CXX={named}' if named else ''}, and its library is {state}"
    if not sources(csrc()):
        return f"there are no sources in {csrc()}"
    return _distrust(cache())


def _cached() -> Path:
    """Where the library is or will be. Without a compiler: one that some compiler has made of the same, if any has."""
    folder, name = key(csrc(), capability()), library_name(capability())
    if compiler() is None:
        made = sorted(cache().glob(f"{folder.split('-')[0]}-*/{name}"), key=lambda path: (not _is_whole(path), path))
        return made[0] if made else cache() / folder / name
    return cache() / folder / name


@constant_when_compiled
def ready() -> bool:
    """Loads the library, building it if need be; whether it is usable now. Says so in the log, once, where it is not.

    Raises RuntimeError instead under PLANECYCLE_FAST_BUILD=require.
    """
    with _lock:
        if "reason" not in _state:
            _state["reason"] = _load()
            if _state["reason"] is not None and build_setting() == "auto":
                log.warning("backend 'cpu' is not usable, the reference runs instead: %s", _state["reason"])
        reason = _state["reason"]
        if reason is not None and build_setting() == "require":
            raise RuntimeError(f"{BUILD} is require, but backend 'cpu' is not usable: {reason}")
        return reason is None


def _load() -> str | None:
    """Why nothing could be loaded, or None."""
    try:
        library = shipped()
        if library is None and found() is None and build_setting() == "never":
            return _why_not_built()
        library = library or build(say=True)
        torch.ops.load_library(str(library))
    except (BuildError, OSError, RuntimeError) as error:
        text = f"{error}: {error.__cause__}" if error.__cause__ else f"{error}"
        return " ".join(text.split())[:500] or type(error).__name__
    _state["library"] = str(library)
    return None


def build(say: bool = False) -> Path:
    """Builds the library into the cache unless it is there, whole; returns its path. Other processes wait meanwhile.

    Raises BuildError where it cannot be built: no compiler, a cache that cannot be trusted or written to, a lock that
    another process does not give back.
    """
    library = _cached()
    if _is_whole(library):
        if (reason := _distrust(cache()) or _distrust(library.parent)) is not None:
            raise BuildError(reason)
        return library
    if compiler() is None and (reason := _why_not_built()) is not None:
        raise BuildError(reason)
    for folder in (cache(), library.parent):
        _make_private(folder)
    with _locked(library.parent / "lock"):
        if not _is_whole(library):
            for left in library.parent.glob(".building-*"):  # of a build that was killed
                shutil.rmtree(left, ignore_errors=True)
            if say:
                again = f"again, {damage(library)}" if library.is_file() else "once"
                log.warning("building the operations of backend 'cpu', %s, about half a minute (%s)", again, library)
            compile_library(csrc(), library, capability())
    return library


def _make_private(folder: Path) -> None:
    """Makes the folder if need be. Raises BuildError unless it is the user's own, private, no link, and writable."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise BuildError(f"the cache {folder} cannot be made: {error.strerror or error}") from error
    if (reason := _distrust(folder)) is not None:
        raise BuildError(reason)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BuildError(f"the cache {folder} cannot be written to")


def _distrust(folder: Path) -> str | None:
    """Why what is in a cache is not loaded, or None, also where it is not there yet."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"the cache {folder} cannot be made: {error.strerror or error}"
    if not stat.S_ISDIR(found.st_mode):
        return f"the cache {folder} must be a folder, and no symbolic link; set {CACHE} to another"
    if not hasattr(os, "getuid"):  # a system without owners and modes
        return None
    if found.st_uid != os.getuid():
        return f"the cache {folder} belongs to user {found.st_uid}, expected {os.getuid()}"
    if found.st_mode & 0o077:
        return f"the cache {folder} can be used by others: mode {found.st_mode & 0o777:o}, expected 700"
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock that is a file; the system gives it back when a process dies."""
    try:
        import fcntl
    except ModuleNotFoundError as error:
        raise BuildError("it is not built on first use on this system; install it with --no-build-isolation") from error
    end = time.monotonic() + LOCK_LIMIT
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise BuildError(f"another process has held {path} for {LOCK_LIMIT} seconds") from None
                time.sleep(0.1)
        yield
