"""gelu: the exact GELU, x/2 * (1 + erf(x/sqrt(2))), in place where nothing needs x again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.backends import pick

GELUS = ("exact", "tanh_epilogue")
# The largest difference of the two is 4.74e-4, at +-2.70. Of 10^7 standard normal values it is 8.5e-5 in the mean,
# where rounding the exact one to bfloat16 is off by 5.6e-4 (at most 1.6e-2), and to float16 by 7.1e-5 (1.9e-3).
TANH_ERROR = 4.8e-4


def check_gelu(gelu: str) -> None:
    """Raises ValueError for a name that is not one of `GELUS`."""
    if gelu not in GELUS:
        raise ValueError(f"gelu must be one of {', '.join(GELUS)}, got {gelu!r}")


def gelu_tanh(
    x: Tensor,  # any shape
    inplace: bool = False,
) -> Tensor:  # like x
    """GELU's tanh approximation, on any device and with gradients unless in place; off by up to `TANH_ERROR`."""
    return torch.ops.aten.gelu_.default(x, approximate="tanh") if inplace else F.gelu(x, approximate="tanh")


def gelu_ref(
    x: Tensor,  # any shape
    inplace: bool = False,
) -> Tensor:  # like x
    """Pure PyTorch, any device and floating dtype, differentiable any number of times unless in place."""
    return torch.ops.aten.gelu_.default(x) if inplace else F.gelu(x)


def gelu(
    x: Tensor,  # any shape
    inplace: bool = False,
    backend: str = "auto",
) -> Tensor:  # like x
    """`gelu_ref` on the backend asked for. For "triton" and "cpu" too it is torch's kernel, which is one
    pass already (on a CPU oneDNN's; vectors of our own were no faster).

    Args:
        inplace: write into x and return it; only where autograd does not need x.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: `inplace` on a tensor that needs a gradient, or a backend that is unknown or not usable.
    """
    check_inplace(x, inplace)
    pick(backend, x.device, op="gelu")
    return gelu_ref(x, inplace)


def check_inplace(x: Tensor, inplace: bool, name: str = "x") -> None:
    """Raises TypeError unless x is a floating-point tensor, ValueError where it cannot be written to."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if inplace and x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"inplace must be False for a tensor {name} that needs a gradient, got True")
