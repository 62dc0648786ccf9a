"""Kernels on the CPU: this folder runs with TRITON_INTERPRET=1, which triton reads when it is imported.

`make test` does that. Without the variable a plain `pytest` leaves this folder out.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    try:
        from ..kernelcheck import interpreter
    except ImportError as error:
        raise RuntimeError(f"tests/kernelcheck knows the interpreter of triton 3.6 to 3.9: {error}") from error

    interpreter.patch()
else:
    collect_ignore_glob = ["test_*.py"]


def pytest_collection_modifyitems(items):
    """Long tests where they start at once: `--dist worksteal` gives each of two processes one half of the list."""
    names = ("test_error_budget_of_any_case", "test_overflow", "test_overflow_typed_by_inductor")
    long = [item for item in items if getattr(item, "originalname", "") in names]
    rest = [item for item in items if getattr(item, "originalname", "") not in names]
    middle = len(rest) // 2
    items[:] = [*long[::2], *rest[:middle], *long[1::2], *rest[middle:]]
