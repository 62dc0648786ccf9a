"""Kernels on the CPU: this folder runs with TRITON_INTERPRET=1, which triton reads when it is imported.

`make test` does that. Without the variable these tests are skipped, so that a plain `pytest` still works.
"""

import os

REASON = "runs kernels in Triton's interpreter: TRITON_INTERPRET=1 pytest tests/interpreted (`make test` does)"

if os.environ.get("TRITON_INTERPRET") == "1":
    from ..kernelcheck import interpreter

    interpreter.patch()
else:
    collect_ignore_glob = ["test_*.py"]
