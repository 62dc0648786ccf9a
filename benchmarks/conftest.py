"""Benchmarks import timm, which needs a torchvision that imports."""

from planecycle_fast.torchvision_fix import mend_torchvision

mend_torchvision()
