"""A torchvision of another build than torch: README's lines run, and `info` says what is wrong."""

import importlib
import os
import subprocess
import sys

import pytest

from planecycle_fast.commands import info

from ..host_models import BY_NAME
from ..pages import ROOT, python

# transformers imports torchao where it is, which logs what it cannot load on a CPU.
QUIET = (
    "import logging\nfor name in ('torchao', 'torch.utils._pytree'):\n    logging.getLogger(name).setLevel('ERROR')\n"
)


def run(code, path=None):
    code = QUIET + code
    env = os.environ | ({"PYTHONPATH": os.pathsep.join([str(path), str(ROOT)])} if path else {})
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env, cwd=path or ROOT
    )


def test_the_quick_start_of_the_readme(tmp_path):
    """In a process of its own, as it stands but for the names of weights that would be downloaded."""
    blocks = [block.code for block in python("README.md")[:2]]
    BY_NAME["hf-dinov3"].make(num_hidden_layers=2).save_pretrained(tmp_path / "m")
    code = "\n".join(blocks).replace('"facebook/dinov3-vits16-pretrain-lvd1689m"', repr(str(tmp_path / "m")))
    code = code.replace("pretrained=True", "pretrained=False, depth=1")
    assert "AutoModel" in code and "timm.create_model" in code and "mend" not in code
    volume = "import torch\nvolume = torch.zeros(1, 3, 2, 32, 32)\n"
    done = run(volume + code + "\nprint(features.patches.shape, lifted(volume).pooled().shape)")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == "torch.Size([1, 2, 2, 2, 64]) torch.Size([1, 384])\n"


@pytest.mark.full
@pytest.mark.parametrize("order", ["timm, transformers", "transformers, timm", "torchvision, timm"])
def test_any_order_after_us(order):
    done = run(
        f"import planecycle_fast, {order}\nimport transformers\ntransformers.AutoModel, transformers.Dinov2Model"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_called_by_name():
    done = run(
        "from planecycle_fast.runtime.torchvision_fix import mend_torchvision\n"
        "mended = mend_torchvision()\n"
        "import torchvision, timm, transformers\n"
        "assert mend_torchvision() is False\n"
        "transformers.Dinov2Model, transformers.DINOv3ViTModel, timm.create_model\n"
        "print(mended)\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout in ("True\n", "False\n")  # False where torchvision works by itself


def test_no_torchvision_is_no_reason_to_complain():
    done = run(
        "import sys, planecycle_fast\n"
        "print([m for m in ('torchvision', 'timm', 'transformers', 'peft', 'safetensors') if m in sys.modules])\n"
        "sys.modules['torchvision'] = None\n"
        "from planecycle_fast.runtime.torchvision_fix import mend_torchvision\n"
        "print(mend_torchvision())\n"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\nFalse\n", "")


NEEDS = "import torch\ntorch.library.register_fake('torchvision::nms')(lambda dets, scores, iou_threshold: dets)\n"
EXTENSION = "def _has_ops():\n    return {}\n"
INSTALLATIONS = {  # what torchvision does when it is imported, whether it has its operations, and what comes of it
    "another build": (NEEDS, False, "imported", "its compiled operations do not load beside this torch"),
    "the right build": ("", True, "imported", "usable"),
    "another error": ("raise RuntimeError('no device')", True, "no device", "cannot be imported: no device; torch 2."),
    "a library": ("raise ImportError('libcudart.so')", True, "libcudart.so", "imported: libcudart.so; torch 2."),
}


@pytest.mark.parametrize("kind", INSTALLATIONS)
def test_what_is_mended_and_what_info_says(tmp_path, kind):
    text, has_ops, expected, said = INSTALLATIONS[kind]
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(text)
    (tmp_path / "torchvision" / "extension.py").write_text(EXTENSION.format(has_ops))
    done = run(
        "from planecycle_fast.commands import info\n"
        "try:\n"
        "    import torchvision\n"
        "    print('imported', torchvision.__file__)\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print(info.why_not_torchvision() or 'usable')\n",
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first == (f"imported {tmp_path / 'torchvision' / '__init__.py'}" if expected == "imported" else expected)
    assert said in second and ("needs torchvision 0." in second) == (said != "usable")


def test_info_names_what_cannot_be_imported(monkeypatch):
    found = importlib.import_module

    def broken(name, *rest):
        if name == "timm":
            raise ModuleNotFoundError("No module named 'nothing'")
        return found(name, *rest)

    monkeypatch.setattr(importlib, "import_module", broken)
    names = info.imports()
    assert names["timm"] == "cannot be imported: No module named 'nothing'"
    assert names["transformers"] == "usable"
