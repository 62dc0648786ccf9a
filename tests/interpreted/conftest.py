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
