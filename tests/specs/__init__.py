"""What the test bed knows of each operation: one file per operation, its `SPEC` listed here."""

from .plane_switch import SPEC as PLANE_SWITCH

SPECS = [PLANE_SWITCH]
