"""What no implementation does without: the matrix products and the attention of a pass, as bare calls of its shapes.

Nothing that they compute is used: rows are random, one set for all blocks, and so large (or the model so small) that
this changes nothing. The patch embedding is one product of rearranged pixels, which on an H100 takes a tenth of the
convolution. In training each call goes forward and backward by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..geometry.planes import DEFAULT_CYCLE, parse_cycle
from ..runtime.attentions import flash_function, why_not_attention
from .cells import FLOOR, GLOBALS, PATCH, PRODUCTS, Volume
from .contenders import NotHereError

KERNELS = {"products + flash": SDPBackend.FLASH_ATTENTION, "products + cuDNN": SDPBackend.CUDNN_ATTENTION,
           "products + efficient": SDPBackend.EFFICIENT_ATTENTION}  # fmt: skip


class Floor:
    """The calls of one pass, or of one training step, over a volume of one size."""

    def __init__(self, host: nn.Module, size: Volume, training: bool) -> None:
        self.host, self.size, self.training = host, size, training
        weight = host.patch_embed.proj.weight
        self.patch_weight, self.patch_bias = weight.detach().flatten(1), host.patch_embed.proj.bias
        self.patch_weight.requires_grad_(weight.requires_grad)
        planes = parse_cycle(DEFAULT_CYCLE)
        self.planes = [planes[i % len(planes)] for i in range(len(host.blocks))]
        self.random = partial(torch.randn, dtype=weight.dtype, device=weight.device)
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def make(self, code: str) -> Callable[[Tensor], None]:
        """One of `cells.FLOORS`. Raises NotHereError where its attention is not here."""
        attend, context = _sdpa, nullcontext  # of `FLOOR`: whichever of its kernels torch picks
        if code == PRODUCTS:
            attend = None
        elif code in KERNELS:
            context = partial(sdpa_kernel, KERNELS[code])
        elif code != FLOOR:
            reason = why_not_attention("flash3")
            if reason is not None:
                raise NotHereError(reason)
            attend = flash_function("flash3")

        def step(volume: Tensor) -> None:  # (B, 3, D, height, width)
            with torch.set_grad_enabled(self.training), context():
                self._pass(volume, attend)

        return step

    def _pass(self, volume: Tensor, attend: Callable[..., Any] | None) -> None:
        self._call(F.linear, patches(volume), self.patch_weight, self.patch_bias)
        for block, plane in zip(self.host.blocks, self.planes):
            sequences = self.size.batch * plane.slices(self.size.tokens)
            length = GLOBALS + plane.length(self.size.tokens)
            for linear in [module for module in block.modules() if isinstance(module, nn.Linear)]:
                rows = self._rows(sequences * length, linear.in_features)
                self._call(F.linear, rows, linear.weight, linear.bias)
            if attend is not None:
                heads = block.attn.num_heads
                packed = self._rows(sequences, length, 3, heads, self.host.embed_dim // heads)
                self._call(lambda qkv: attend(*qkv.unbind(2)), packed)

    def _rows(self, *shape: int) -> Tensor:
        if shape not in self.kept:
            self.kept[shape] = self.random(shape).requires_grad_(self.training)
        return self.kept[shape]

    def _call(self, function: Callable[..., Any], *inputs: Tensor | None) -> None:
        out = function(*inputs)
        if self.training:
            leaves = [t for t in inputs if t is not None and t.requires_grad]
            torch.autograd.grad(out, leaves, self._rows(*out.shape).detach())


def patches(
    volume: Tensor,  # (B, 3, D, height, width)
) -> Tensor:  # (B*D*h*w, 3*PATCH*PATCH), the pixels of a patch side by side
    b, c, d, height, width = volume.shape
    cut = volume.view(b, c, d, height // PATCH, PATCH, width // PATCH, PATCH)
    return cut.permute(0, 2, 3, 5, 1, 4, 6).reshape(-1, c * PATCH * PATCH)


def _sdpa(
    q: Tensor,  # (N, rows, heads, hd)
    k: Tensor,  # like q
    v: Tensor,  # like q
) -> Tensor:  # (N, heads, rows, hd)
    return F.scaled_dot_product_attention(*[t.transpose(1, 2) for t in (q, k, v)])
