"""The methods of an accelerated model: callable objects that know it, so that they are copied and pickled with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from .adapters.dinov3 import BLOCK, norm_parts, takes_volumes
from .inputs import check_volume, wanted_layers
from .ops import plane_switch
from .planes import DHW, HW, Plane, Sizes, parse_plane
from .pooling import transition

PLANES = ("HW", "DW", "DH")  # of a converted block


class Method:
    """What the two shadowing methods share: running the blocks."""

    def __init__(self, model: nn.Module, backend: str) -> None:
        self.model, self.backend = model, backend

    def _prepare(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        masks: Tensor | None = None,  # (B*D, H*W) bool, (B, D*H*W) for Flatten3D
    ) -> tuple[Tensor, Sizes, Plane]:
        """Embedded tokens, the volume's size in tokens, and the plane whose order they are in."""
        model = self.model
        check_volume(x, model.patch_embed.proj.in_channels, model, "x")
        sizes = (x.shape[2], *[n // model.patch_size for n in x.shape[3:]])  # a rest is lost, as it always was
        start = DHW if takes_volumes(model) and model.block_type == "Flatten3D" else HW
        if min(sizes) < 1:
            size = model.patch_size
            raise ValueError(f"x must have slices of at least one patch, {size} x {size} pixels, got {tuple(x.shape)}")
        if masks is not None:
            expected = (x.shape[0] * start.slices(sizes), start.length(sizes))
            if not isinstance(masks, Tensor) or masks.dtype != torch.bool or tuple(masks.shape) != expected:
                got = f"{masks.dtype} of {tuple(masks.shape)}" if isinstance(masks, Tensor) else type(masks).__name__
                raise ValueError(f"masks must be a bool tensor of shape {expected}, got {got}")
        given = x if takes_volumes(model) else x.transpose(1, 2).flatten(0, 1)
        return model.prepare_tokens_with_masks(given, masks)[0], sizes, start

    def _run(
        self,
        tokens: Tensor,  # (B*P, g + L, C), plane order of `start`
        sizes: Sizes,
        start: Plane,
        wanted: set[int],
        as_list: bool = False,  # how blocks that are not converted are called: hooks see it
    ) -> list[Tensor]:  # like `tokens`, one per layer wanted
        """Runs the blocks up to the last one wanted; the residual stream after each one wanted."""
        model, tables = self.model, _Tables()
        g, depth, channels = model.n_storage_tokens + 1, sizes[0], tokens.shape[-1]
        batch, plane, outputs = tokens.shape[0] // start.slices(sizes), start, []
        converted = not takes_volumes(model) or model.block_type == "PlaneCycle"
        for i, block in enumerate(model.blocks):
            if i > max(wanted):
                break
            plain = converted and _is_plain(block)
            following = plane_of(block) if plain else start
            pool_method = _pool_method(block) if plain else "PCg"
            there = transition(plane.slices(sizes), following.slices(sizes), depth, pool_method)
            tokens, plane = plane_switch(tokens, plane, following, sizes, g, there, self.backend), following
            if plain:
                tokens = block.blk2d(tokens, tables.get(block.rope_embed, plane.grid(sizes)))
            elif converted:
                tokens = block(tokens, (batch, *sizes, channels))
            else:
                sincos = tables.get(model.rope_embed, plane.grid(sizes))
                tokens = block([tokens], [sincos])[0] if as_list else block(tokens, sincos)
            if i in wanted:
                back = transition(plane.slices(sizes), start.slices(sizes), depth)
                outputs.append(plane_switch(tokens, plane, start, sizes, g, back, self.backend))
        return outputs


class ForwardFeatures(Method):
    """`forward_features_list` of an accelerated model."""

    def __call__(self, x_list: Sequence[Tensor], masks_list: Sequence[Tensor | None]) -> list[dict[str, Tensor]]:
        """Features of volumes (B, 3, D, height, width), one dictionary each.

        Blocks of Slice2D and Flatten3D take several volumes at once, by the model's own code (drop path
        draws for all of them together). Converted blocks take one after another; the authors' code
        silently drops all volumes but the first.

        Raises ValueError or TypeError for volumes or masks that do not fit the model or each other.
        """
        if not isinstance(x_list, Sequence) or not isinstance(masks_list, Sequence) or not x_list:
            got = f"{type(x_list).__name__} and {type(masks_list).__name__}" if x_list else "no volume"
            raise ValueError(f"x and masks must be lists of equal length, one mask or None for each volume, got {got}")
        if len(x_list) != len(masks_list):
            raise ValueError(
                f"masks must hold one mask or None for each of {len(x_list)} volumes, got {len(masks_list)}"
            )
        model, last = self.model, len(self.model.blocks) - 1
        if len(x_list) > 1 and takes_volumes(model) and model.block_type != "PlaneCycle":
            return type(model).forward_features_list(model, x_list, masks_list)
        outputs = []
        for i, (x, masks) in enumerate(zip(x_list, masks_list)):
            tokens = self._run(*self._prepare(x, masks), wanted={last}, as_list=True)[0]
            globals_, patches = norm_parts(model, tokens, local=model.training and i == 1)
            outputs.append(
                {
                    "x_norm_clstoken": globals_[:, 0],
                    "x_storage_tokens": globals_[:, 1:],
                    "x_norm_patchtokens": patches,
                    "x_prenorm": tokens,
                    "masks": masks,
                }
            )
        return outputs


class IntermediateLayers(Method):
    """`get_intermediate_layers` of an accelerated model."""

    def __call__(
        self,
        x: Tensor,  # (B, 3, D, height, width)
        *,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        return_extra_tokens: bool = False,
        norm: bool = True,
    ) -> tuple:
        """Patches after the `n` last layers, or after the layers listed, in layer order.

        Each is (B*D, H*W, C), (B, D*H*W, C) for Flatten3D, or (B, C, D, H, W) with `reshape`; with the
        class token (N, C) and the registers (N, r, C) if asked for, a tuple of them per layer.

        Raises ValueError or TypeError for layers that the model lacks or that are listed twice, or an x that
        is no volume for this model.
        """
        model, g = self.model, self.model.n_storage_tokens + 1
        wanted = wanted_layers(n, len(model.blocks))
        if isinstance(n, Sequence) and len(n) != len(wanted):
            raise ValueError(f"n must not list a layer twice, got {list(n)}")
        tokens, sizes, start = self._prepare(x)
        outputs = []
        for out in self._run(tokens, sizes, start, wanted):
            globals_, patches = norm_parts(model, out) if norm else (out[:, :g], out[:, g:])
            if reshape:
                patches = patches.reshape(x.shape[0], *sizes, -1).permute(0, 4, 1, 2, 3).contiguous()
            parts = [patches]
            if return_class_token:
                parts.append(globals_[:, 0])
            if return_extra_tokens:
                parts.append(globals_[:, 1:])
            outputs.append(tuple(parts) if len(parts) > 1 else patches)
        return tuple(outputs)


class Replicate(Method):
    """`_replicate_for_data_parallel` of an accelerated model: a replica would run the parameters of the original."""

    def __call__(self) -> NoReturn:
        raise TypeError("an accelerated model cannot be replicated by DataParallel; use DistributedDataParallel")


METHODS = {  # by the name that each shadows
    "forward_features_list": ForwardFeatures,
    "get_intermediate_layers": IntermediateLayers,
    "_replicate_for_data_parallel": Replicate,
}


class _Tables:
    """RoPE tables by the model's own module: once per plane, or anew for every block while it may draw."""

    def __init__(self) -> None:
        self.rope: nn.Module | None = None
        self.made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def get(
        self,
        rope: nn.Module | None,
        grid: tuple[int, ...],  # (n0, n1), or (D, H, W)
    ) -> tuple[Tensor, Tensor] | None:  # sin and cos, (L, hd) each
        if rope is None:
            return None
        if rope is not self.rope:  # blocks share one, usually
            self.rope, self.made = rope, {}
        if rope.training or grid not in self.made:
            self.made[grid] = rope(**dict(zip("HW" if len(grid) == 2 else "DHW", grid)))
        return self.made[grid]


def plane_of(block: nn.Module) -> Plane:
    """The plane of a converted block. Raises ValueError for one that such a block does not have."""
    if block.plane not in PLANES:
        raise ValueError(
            f"model.blocks must have a cycle_order of planes {', '.join(PLANES)}, got {block.plane!r} for block "
            f"{block.block_idx}"
        )
    return parse_plane(block.plane)


def _is_plain(block: nn.Module) -> bool:
    """Whether calling the 2D block inside cannot be told from calling this converted block."""
    if type(block).__name__ != BLOCK or bool(nn.modules.module._has_any_global_hook()):
        return False
    return not any(_is_watched(module) for module in (block, getattr(block, "planecycleop", None)))


def _is_watched(module: nn.Module | None) -> bool:
    if module is None:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    patched = "forward" in module.__dict__ or "_get_rope" in module.__dict__
    return any(hooks) or patched or module._compiled_call_impl is not None


def _pool_method(block: nn.Module) -> str:
    return block.pool_method if hasattr(block, "pool_method") else block.planecycleop.pool_method
