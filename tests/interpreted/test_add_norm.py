"""The kernels of add_norm, and of plane_switch in full, against their reference, in the interpreter."""

from ..kernelcheck.harness import op_tests
from ..specs.add_norm import SPEC

TestAddNorm = op_tests(SPEC, examples=20)
