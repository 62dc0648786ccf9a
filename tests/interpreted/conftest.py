"""Kernels on the CPU: this folder runs with TRITON_INTERPRET=1, which triton reads when it is imported.

`make test` does that. Without the variable a plain `pytest` leaves this folder out.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from ..kernelcheck import interpreter

    interpreter.patch()
else:
    collect_ignore_glob = ["test_*.py"]
