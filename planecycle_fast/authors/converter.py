"""`PlaneCycleConverter`: the authors' way to convert a backbone, in place, with their arguments and keys."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ..geometry.planes import DEFAULT_CYCLE, HW, Plane, parse_cycle
from ..geometry.pooling import check_pooling, transition
from ..hosts import ADAPTERS
from ..hosts.dinov3 import BLOCK, holds_converted, is_dinov3, takes_volumes
from ..ops import plane_switch
from .accelerate import accelerate, check_model, restore_methods
from .accelerated import PLANES, plane_of


class NotConvertedError(ValueError, RuntimeError):
    """`restore` on a backbone whose original blocks were not kept. (The authors' converter: RuntimeError.)"""


class PlaneCycleBlock(nn.Module):
    """A 2D block that looks along one plane of a volume. Tokens go in and come out in canonical order.

    Globals are pooled from D slices to those of the plane, and back to D after the block
    (``globals_at="depth"``). Keys of the state_dict are those of the authors' block.
    """

    def __init__(
        self,
        blk2d: nn.Module,
        rope_embed: nn.Module | None,
        n_storage_tokens: int,
        block_idx: int,
        cycle_order: Sequence[str] = DEFAULT_CYCLE,
        pool_method: str = "PCg",
    ) -> None:
        super().__init__()
        self.blk2d = blk2d
        self.rope_embed = rope_embed
        self.cycle_order = tuple(cycle_order)
        self.pool_method = pool_method
        self.g_len = n_storage_tokens + 1
        self.block_idx = block_idx

    @property
    def plane(self) -> str:
        """Name of the plane that this block looks along: its place in a cycle that goes on over all blocks."""
        order = self.cycle_order
        return order[self.block_idx % len(order)]

    def forward(
        self,
        x: Tensor,  # (B*D, g + H*W, C)
        shape: tuple[int, int, int, int, int],  # (B, D, H, W, C)
    ) -> Tensor:  # (B*D, g + H*W, C)
        plane, sizes = plane_of(self), tuple(shape[1:4])
        depth, slices = sizes[0], plane.slices(sizes)
        there = transition(depth, slices, depth, self.pool_method)
        tokens = plane_switch(x, HW, plane, sizes, self.g_len, there)  # (B*P, g + L, C)
        rows, columns = plane.grid(sizes)
        sincos = None if self.rope_embed is None else self.rope_embed(H=rows, W=columns)
        tokens = self.blk2d(tokens, sincos)
        return plane_switch(tokens, plane, HW, sizes, self.g_len, transition(slices, depth, depth))

    def extra_repr(self) -> str:
        return f"plane={self.plane}, pool_method={self.pool_method}"


class PlaneCycleConverter:
    """Wraps the blocks of a backbone in `PlaneCycleBlock`, in place; change one import to use it.

    Beyond the authors' converter it accelerates what it converts, accepts stock facebookresearch/dinov3
    models (which then take volumes: ``forward_features(volume)`` returns the authors' dictionary), and
    `restore` takes the kept blocks away again, so that the state_dict is the original one.

    Args:
        keep_original: keep the unwrapped blocks, as ``_<blocks_attr>_original``, for `restore`. They are
            part of the state_dict then, under their own keys too.
        blocks_attr: where the backbone holds its blocks, an nn.ModuleList. A backbone of another class
            than DINOv3's must call each as ``block(x, (B, D, H, W, C))``, and a 2D block of it takes
            ``(tokens, (sin, cos))``, or ``(tokens, None)`` without a ``rope_embed``.
        cycle_order: names of planes, HW, DW or DH, repeated over the blocks.
        pool_method: "PCg" or "PCm".

    Raises TypeError or ValueError for a wrong argument.
    """

    def __init__(
        self,
        keep_original: bool = False,
        blocks_attr: str = "blocks",
        cycle_order: str | Sequence[str | Plane] = DEFAULT_CYCLE,
        pool_method: str = "PCg",
    ) -> None:
        if not isinstance(keep_original, bool):
            raise TypeError(f"keep_original must be True or False, got {keep_original!r}")
        if not isinstance(blocks_attr, str):
            raise TypeError(f"blocks_attr must be the name of an attribute, got {type(blocks_attr).__name__}")
        check_pooling(pool_method, "depth")
        self.cycle_order = tuple(plane.name for plane in parse_cycle(cycle_order))
        if not set(self.cycle_order) <= set(PLANES):
            raise ValueError(
                f"cycle_order must name planes {', '.join(PLANES)}, got {self.cycle_order}; "
                "all tokens in one sequence is block_type 'Flatten3D', or planecycle_fast.lift(model, mode='flatten3d')"
            )
        self.keep_original, self.blocks_attr, self.pool_method = keep_original, blocks_attr, pool_method

    @property
    def _kept(self) -> str:
        return f"_{self.blocks_attr}_original"

    def __call__(self, backbone: nn.Module) -> nn.Module:
        """Converts `backbone` in place and returns it.

        Raises:
            TypeError: not an nn.Module, or its blocks no nn.ModuleList.
            ValueError: no such attribute, no blocks, blocks that are converted already, or a backbone
                that would not call converted blocks.
        """
        blocks = self._check(backbone)
        converted = nn.ModuleList(self._converted(backbone, blocks))
        converted.training = blocks.training
        if self.keep_original:
            setattr(backbone, self._kept, blocks)
        setattr(backbone, self.blocks_attr, converted)
        return accelerate(backbone) if is_dinov3(backbone) else backbone

    def _converted(self, backbone: nn.Module, blocks: nn.ModuleList) -> Iterator[PlaneCycleBlock]:
        shared = dict(
            rope_embed=getattr(backbone, "rope_embed", None),
            n_storage_tokens=getattr(backbone, "n_storage_tokens", 0),
            cycle_order=self.cycle_order,
            pool_method=self.pool_method,
        )
        for i, block in enumerate(blocks):
            wrapper = PlaneCycleBlock(block, block_idx=i, **shared)
            wrapper.training = block.training  # of itself only: parts may be frozen in another mode
            yield wrapper

    def restore(self, backbone: nn.Module) -> nn.Module:
        """Puts the kept blocks back, in place, and returns `backbone`.

        Raises TypeError for no nn.Module, NotConvertedError where none were kept.
        """
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        if not hasattr(backbone, self._kept):
            raise NotConvertedError(
                f"backbone must be converted with keep_original=True to be restored, got one without {self._kept}"
            )
        restore_methods(backbone)
        setattr(backbone, self.blocks_attr, getattr(backbone, self._kept))
        delattr(backbone, self._kept)
        return backbone

    def _check(self, backbone: nn.Module) -> nn.ModuleList:
        if not isinstance(backbone, nn.Module):
            raise TypeError(f"backbone must be a torch.nn.Module, got {type(backbone).__name__}")
        name = type(backbone).__name__
        if is_dinov3(backbone):
            if takes_volumes(backbone) and backbone.block_type != "PlaneCycle":
                raise ValueError(f"backbone must have block_type 'PlaneCycle', got {backbone.block_type!r}")
            if self.blocks_attr != "blocks":
                raise ValueError(f"blocks_attr must be 'blocks' for a {name}, got {self.blocks_attr!r}")
        elif any(adapter.matches(backbone) for adapter in ADAPTERS):
            raise ValueError(
                f"backbone must call its blocks with a volume's shape, got a {name}; use planecycle_fast.lift(backbone)"
            )
        blocks = getattr(backbone, self.blocks_attr, None)
        if blocks is None:
            raise ValueError(f"backbone must have the attribute {self.blocks_attr!r}, got a {name} without it")
        if not isinstance(blocks, nn.ModuleList):
            raise TypeError(f"backbone.{self.blocks_attr} must be a ModuleList, got {type(blocks).__name__}")
        if len(blocks) == 0:
            raise ValueError(f"backbone.{self.blocks_attr} must hold at least one block, got an empty ModuleList")
        if holds_converted(blocks):
            raise ValueError(f"backbone must not be converted yet, got blocks of class {BLOCK}")
        if is_dinov3(backbone):
            check_model(backbone, convertible=True)
        return blocks
