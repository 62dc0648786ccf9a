"""The helper that makes torchvision importable beside a CPU-only torch."""

import subprocess
import sys

CODE = """
import torch
from planecycle_fast.torchvision_fix import mend_torchvision
mended = mend_torchvision()
import torchvision, timm, transformers
assert mend_torchvision() is False
transformers.Dinov2Model, transformers.DINOv3ViTModel, timm.create_model
print(mended)
"""

NOT_THERE = """
import sys
sys.modules["torchvision"] = None
from planecycle_fast.torchvision_fix import mend_torchvision
print(mend_torchvision())
"""


def run(code):
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)


def test_timm_and_transformers_import_after_it():
    done = run(CODE)
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("True\n", "False\n")  # False where torchvision works by itself


def test_no_torchvision_is_no_reason_to_complain():
    done = run(NOT_THERE)
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr
