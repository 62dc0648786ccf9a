"""The Triton kernels of patchify pass everything."""

from ..kernelcheck.harness import op_tests
from ..specs.patchify import SPEC

TestPatchify = op_tests(SPEC, examples=14)
