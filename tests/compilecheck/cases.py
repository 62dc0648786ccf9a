"""Which models are compiled, and how."""

from dataclasses import dataclass

PLANES = ("DW", "DH")  # of the two layers that models have: from HW to DW, to DH, and after the last layer to HW
MODES = {  # of `lift`, by name
    "PCg": {"cycle_order": PLANES},
    "PCm": {"cycle_order": PLANES, "pool_method": "PCm"},
    "slice2d": {"mode": "slice2d"},
    "flatten3d": {"mode": "flatten3d"},
}
OWN = ", own attention"  # by name, of models; in training with a gradient for the volume


@dataclass(frozen=True)
class Case:
    model: str
    mode: str
    step: str  # "inference", "training"
    sizes: str  # "static", "dynamic"
    dtype: str

    @property
    def name(self):
        return f"{self.model} {self.mode} {self.step} {self.sizes} {self.dtype}"


def all_cases():
    """RoPE and registers in every mode; SwiGLU in two tensors and in one; a model of the authors' kind, accelerated."""
    return [
        *[Case("timm-dinov3-s", mode, "inference", "static", "bf16") for mode in ("PCg", "slice2d", "flatten3d")],
        *[Case("timm-dinov3-s", mode, "training", "static", "bf16") for mode in ("PCg", "slice2d", "flatten3d")],
        *[Case("timm-dinov3-s", mode, "inference", "dynamic", "bf16") for mode in ("PCg", "PCm")],
        *[Case("timm-dinov3-s", mode, "training", "dynamic", "bf16") for mode in ("PCg", "PCm")],
        Case("timm-dinov3-s", "PCg", "inference", "static", "autocast"),
        Case("timm-dinov3-s", "PCm", "training", "dynamic", "autocast"),
        Case("hf-dinov3", "PCg", "training", "static", "bf16"),
        Case("hf-dinov2-swiglu", "PCg", "training", "static", "bf16"),
        Case("hf-dinov2-swiglu", "PCm", "inference", "dynamic", "autocast"),
        Case("timm-dinov2-g", "PCg", "inference", "static", "fp32"),
        Case("timm-dinov2-g", "PCm", "training", "static", "bf16"),
        Case(f"timm-dinov3-s{OWN}", "PCg", "inference", "dynamic", "bf16"),
        Case(f"timm-dinov3-s{OWN}", "PCg", "training", "dynamic", "bf16"),
        Case("accelerated", "PCg", "training", "static", "bf16"),
        Case("accelerated", "PCm", "inference", "dynamic", "bf16"),
        Case("accelerated", "PCm", "training", "static", "fp32"),
    ]
