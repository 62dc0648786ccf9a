"""Plain linear layers on the CPU for inference, by oneDNN with what follows them: the bias in bfloat16, the exact GELU.

``F.linear`` in bfloat16 fills its output with the bias and lets the matrix product add to it: a pass over the output,
up to a quarter of the layer's time. A GELU of its own is another pass. `mkldnn::_linear_pointwise`, which torch's own
compiler calls, has both in its epilogue. Where it does not help, the layer is called as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_found: dict[torch.dtype, bool] = {}


def linear(
    layer: nn.Module,  # a plain nn.Linear; anything else is called
    x: Tensor,  # (..., in_features)
) -> Tensor:  # (..., out_features)
    """``layer(x)`` without gradients; in bfloat16 rounded once instead of twice."""
    if x.dtype != torch.bfloat16 or not _takes(layer, x) or layer.bias is None:
        return layer(x)
    return torch.ops.mkldnn._linear_pointwise.default(x, layer.weight, layer.bias, "none", [], "")


def linear_gelu(
    layer: nn.Module,  # a plain nn.Linear
    x: Tensor,  # (..., in_features)
) -> Tensor | None:  # (..., out_features)
    """The exact GELU of ``layer(x)`` without gradients, in one pass; None where oneDNN does not take it."""
    if not _takes(layer, x):
        return None
    return torch.ops.mkldnn._linear_pointwise.default(x, layer.weight, layer.bias, "gelu", [], "none")


def _takes(layer: nn.Module, x: Tensor) -> bool:
    if type(layer) is not nn.Linear or torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return False
    weight, bias = layer.weight, layer.bias
    if not weight.is_contiguous() or x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and _has_onednn(x.dtype)


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN, for a dtype on this CPU."""
    if dtype not in _found:
        operations = torch.ops.mkldnn
        has = torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise")
        if dtype == torch.bfloat16:
            supported = getattr(operations, "_is_mkldnn_bf16_supported", None)
            has = has and supported is not None and supported()
        _found[dtype] = has
    return torch.backends.mkldnn.enabled and _found[dtype]
