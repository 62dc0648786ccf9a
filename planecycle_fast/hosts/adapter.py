"""What `lift` needs to know about a family of 2D models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry.planes import DHW, Plane
from ..geometry.rope import Rope, section_sizes
from .buffers import Computed
from .parts import WHOLE, BlockParts
from .wrapped import own_class

SinCos = tuple[Tensor, Tensor]  # sin and cos, (L, hd) each
_SHORTCUTS = (  # (a method, what does its work otherwise)
    ("embed", "embed_parts"),
    ("embed", "patch_projection"),
    ("embed_parts", "patch_projection"),
    ("call_block", "parts"),
    ("norm", "final_norm"),
)


class Adapter(ABC):
    """A 2D model seen as: embed, blocks, final norm. Subclass it to lift a model of your own.

    An adapter holds the model and nothing else that changes; it runs the model's own modules. Four
    methods and three attributes are enough; `rope` is for models with axial rotary embedding, and what comes after it
    lets the model's blocks run in parts, without copies between them::

        class MyViT(pcf.Adapter):
            num_globals, has_cls, patch_size = 1, True, (16, 16)

            @property
            def blocks(self):
                return self.model.blocks

            def embed(self, images):
                return self.model.embed(images)

            def call_block(self, block, tokens, grid, sincos):
                return block(tokens)

            def norm(self, tokens):
                return self.model.norm(tokens)

        lifted = pcf.lift(model, adapter=MyViT)
    """

    num_globals: int  # g: class and register tokens per slice, before the patches
    has_cls: bool  # whether the first global is a class token
    patch_size: tuple[int, int]  # pixels (height, width) of one patch
    in_channels: int = 3
    block_settings: tuple[str, ...] = ()  # attributes with underscores that the library sets on blocks, and reads there
    framework: str | None = None  # the name of the base class by which the library finds its models within others

    def __init_subclass__(cls, **settings: Any) -> None:
        """A subclass that overrides a method of a family loses the family's shortcut around that method."""
        super().__init_subclass__(**settings)
        families = [base for base in cls.__mro__[1:] if base is not Adapter]
        for method, shortcut in _SHORTCUTS:
            overrides = method in cls.__dict__ and any([method in base.__dict__ for base in families])
            if overrides and shortcut not in cls.__dict__:
                setattr(cls, shortcut, getattr(Adapter, shortcut))

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """The model's layers, first to last."""

    @abstractmethod
    def embed(
        self,
        images: Tensor,  # (N, in_channels, height, width)
    ) -> Tensor:  # (N, g + h*w, C), h = height / patch, globals first
        """Everything before the first block."""

    @abstractmethod
    def call_block(
        self,
        block: nn.Module,
        tokens: Tensor,  # (N, g + L, C), globals first
        grid: tuple[int, ...],  # (n0, n1) or (n0, n1, n2): the plane, L = n0*n1[*n2]
        sincos: SinCos | None,  # RoPE tables of that plane, None without `rope`
    ) -> Tensor:  # (N, g + L, C)
        """One layer on sequences of any plane."""

    @abstractmethod
    def norm(
        self,
        tokens: Tensor,  # (N, rows, C)
    ) -> Tensor:  # (N, rows, C)
        """Everything after the last block, up to the features: usually the final norm."""

    def rope(self, dtype: torch.dtype) -> Rope | None:
        """The model's rotary embedding as it is now (periods may have been loaded or cast), or None.

        `dtype` is that of the input volume, for models whose tables follow it.
        """
        return None

    def positions(self) -> Tensor | None:  # (L, C), L as many as the model was trained with
        """Learned positions of the patches of a slice, or None: that of depth takes their size (`depth_position`)."""
        return None

    def positions_on_planes(self) -> str | None:
        """What tells the model places along the axes of every plane already, D among them; or None."""
        return None if self.rope(torch.float32) is None else "rotary embeddings"

    def embed_parts(
        self,
        images: Tensor,  # (N, in_channels, height, width)
    ) -> tuple[Tensor, Tensor]:  # patches (N, L, C), any strides; globals (N, g, C), or (1, g, C): alike in all images
        """`embed` without the concatenation, for models that allow it."""
        tokens = self.embed(images)
        return tokens[:, self.num_globals :], tokens[:, : self.num_globals]

    def patch_projection(self) -> nn.Conv2d | None:
        """The convolution of pixels to patches, where all else of `embed_parts` is `from_patches`; or None.

        One matrix product does its work then, mostly on GPUs, and neither it nor what holds it is called: give it only
        where nobody can tell (`hosts.projection.known_projection`).
        """
        return None

    def from_patches(
        self,
        patches: Tensor,  # (N, L, C), as `patch_projection` makes them, any strides
        height: int,  # of the slices, in pixels
        width: int,
        inplace: bool,  # whether patches may be written to, and returned
    ) -> tuple[Tensor, Tensor]:  # as of `embed_parts`
        """What `embed_parts` makes of them. Patches that are returned as they came are not copied."""
        raise NotImplementedError(f"{type(self).__name__} has a patch_projection, and needs from_patches as well")

    def parts(self, block: nn.Module) -> BlockParts | str:
        """A block taken apart, or why it cannot be."""
        return WHOLE

    def final_norm(self) -> nn.Module | None:
        """The module that is all of `norm`, or None."""
        return None

    def checkpoint(self, block: nn.Module) -> Callable[..., Any] | None:
        """``function(run, *tensors)`` where the model wants this block's activations computed again in backward."""
        return None

    def computed_buffers(self) -> list[Computed]:
        """Buffers that positions are made from, with what the configuration gives. `buffers` checks them."""
        return []

    def check_planes(self, planes: Sequence[Plane]) -> None:
        """Raises ValueError for a plane that the model's positions cannot be moved to."""
        rope = self.rope(torch.float32) if DHW in planes else None
        if rope is not None:
            section_sizes(rope.head_dim, num_axes=3)  # raises for a head dimension that has no three sections

    def check_image_size(self, height: int, width: int) -> None:
        """Raises ValueError if the model cannot embed slices of this size, in pixels."""
        patch_h, patch_w = self.patch_size
        if height % patch_h or width % patch_w:
            raise ValueError(
                f"volume's slices must be a multiple of the patch, {patch_h} x {patch_w} pixels, got {height} x {width}"
            )


def is_instance_of(model: Any, *qualified: str) -> bool:
    """Whether the model's class or a base is called `package.ClassName`, without importing the package.

    Its forward must be that class's: a subclass with one of its own (FSDP2's have none) may compute something else.
    """
    kind = type(model)
    named = [c for c in kind.__mro__ if f"{c.__module__.split('.')[0]}.{c.__name__}" in qualified]
    return any([c.forward is kind.forward for c in named])


def is_exactly(model: Any, qualified: str) -> bool:
    """As `is_instance_of`, but of this very class, or one that torch made from it: others may compute another thing."""
    cls = own_class(model)
    return f"{cls.__module__.split('.')[0]}.{cls.__name__}" == qualified


def pair(size: Any) -> tuple[int, int]:
    """14 or (14, 14) to (14, 14)."""
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)
