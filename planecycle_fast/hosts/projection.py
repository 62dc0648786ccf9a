"""Which module of a patch embedding projects pixels, and when one matrix product may take its place.

`Adapter.patch_projection` gives it where a family's patch embedding is known and nobody sees that it is not called;
`Adapter.from_patches` makes of what it computes what `embed_parts` returns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .description import PLAIN
from .known import why_called


def known_projection(module: nn.Module) -> nn.Conv2d | None:
    """The module, where it is torch's Conv2d of patches side by side and nobody can tell that it is not called."""
    if why_called(module, nn.Conv2d) is not None:
        return None
    settings = (module.stride, module.padding, module.dilation, module.groups)
    if settings not in [(module.kernel_size, padding, (1, 1), 1) for padding in ((0, 0), "valid")]:
        return None
    plain = all([t is None or (type(t) in PLAIN and t.is_floating_point()) for t in (module.weight, module.bias)])
    return module if plain else None  # type: ignore[return-value]  # of this very class


def projected(
    module: nn.Module,
    images: Tensor,  # (N, in_channels, height, width)
) -> Tensor:  # (N, L, C), any strides
    """Patches as a host's own convolution makes them."""
    return module(images).flatten(2).transpose(1, 2)


def plus(
    patches: Tensor,  # (N, L, C), any strides
    positions: Tensor,  # (1, L, C)
    inplace: bool,
) -> Tensor:  # (N, L, C)
    """Patches with their positions: where they may be written to and keep their dtype, the same tensor."""
    recorded = positions.requires_grad and torch.is_grad_enabled()
    if inplace and not recorded and torch.promote_types(patches.dtype, positions.dtype) == patches.dtype:
        return patches.add_(positions)
    return patches + positions
