"""Plain linear layers on the CPU for inference, by oneDNN with what follows them: the bias in bfloat16, the exact GELU.

``F.linear`` in bfloat16 fills its output with the bias and lets the matrix product add to it: a pass over the output,
up to a quarter of the layer's time. A GELU of its own is another pass. `mkldnn::_linear_pointwise`, which torch's own
compiler calls, has both in its epilogue. Where it does not help, the layer is called as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)  # not their subclasses
_found: dict[torch.dtype, bool] = {}


class PlainLinears:
    """How the linear layers of one block run, for inputs of so many rows each; those that are not plain are called.

    Where several inputs follow, weights are brought into oneDNN's layout once, for as long as this object lives: what
    is kept longer would not follow weights that change.
    """

    def __init__(self, rows: int, several: bool) -> None:
        self.rows, self.several = rows, several
        self._packed: dict[int, Tensor] = {}  # by id of the layer

    def linear(
        self,
        layer: nn.Module,  # nn.Linear
        x: Tensor,  # (..., in_features)
    ) -> Tensor:  # (..., out_features)
        """``layer(x)`` without gradients; in bfloat16 rounded once instead of twice."""
        helps = x.dtype == torch.bfloat16 and _takes(layer, x) and layer.bias is not None
        return self._run(layer, x, "none", "") if helps else layer(x)

    def linear_gelu(
        self,
        layer: nn.Module,  # nn.Linear
        x: Tensor,  # (..., in_features)
    ) -> Tensor | None:  # (..., out_features)
        """The exact GELU of ``layer(x)`` without gradients, in one pass; None where oneDNN does not take it."""
        return self._run(layer, x, "gelu", "none") if _takes(layer, x) else None

    def _run(self, layer: nn.Linear, x: Tensor, after: str, algorithm: str) -> Tensor:
        weight = layer.weight
        if self.several:
            if id(layer) not in self._packed:
                self._packed[id(layer)] = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach(), self.rows)
            weight = self._packed[id(layer)]
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, layer.bias, after, [], algorithm)


def _takes(layer: nn.Module, x: Tensor) -> bool:
    if type(layer) is not nn.Linear or torch.is_autocast_enabled("cpu") or x.numel() == 0:
        return False
    weight, bias = layer.weight, layer.bias
    if type(x) is not Tensor or type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return False  # quantised, sharded or fake ones have their own ways
    if not weight.is_contiguous() or x.dtype != weight.dtype or (bias is not None and bias.dtype != weight.dtype):
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and _has_onednn(x.dtype)


def _has_onednn(dtype: torch.dtype) -> bool:
    """Whether torch has oneDNN, for a dtype on this CPU."""
    if dtype not in _found:
        operations = torch.ops.mkldnn
        has = torch.backends.mkldnn.is_available() and hasattr(operations, "_linear_pointwise")
        has = has and hasattr(operations, "_reorder_linear_weight")
        if dtype == torch.bfloat16:
            supported = getattr(operations, "_is_mkldnn_bf16_supported", None)
            has = has and supported is not None and supported()
        _found[dtype] = has
    return torch.backends.mkldnn.enabled and _found[dtype]
