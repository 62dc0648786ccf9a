"""The Triton kernel of plane_switch passes everything."""

from ..kernelcheck.harness import op_tests
from ..specs.plane_switch import SPEC

TestPlaneSwitch = op_tests(SPEC)
