"""What the adapters for Hugging Face transformers (version 5) have in common; families are in `huggingface_*.py`.

What is between pixels and tokens may be wrapped (LoRA, activation checkpointing, torch.compile), parametrised or
quantised: modules are called, and asked for channels and a dtype only where they are convolutions.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.tracing import recorder
from .adapter import Adapter, SinCos, is_instance_of, pair
from .huggingface_parts import block_parts, made_of
from .known import Contents, contents, why_called
from .parts import BlockParts, Part
from .projection import known_projection, plus, projected
from .wrapped import read

_PROJECTS = contents("projection")  # a module that holds the convolution, in most families


class HuggingFace(Adapter):
    """What all families have in common. `names` are those of their classes."""

    names: tuple[str, ...] = ()
    block_settings = ("_gradient_checkpointing_func",)
    framework = "PreTrainedModel"  # of which `from_pretrained` looks for those that initialise their own parts

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_instance_of(model, *[f"transformers.{name}" for name in cls.names])

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.patch_size = pair(self.config.patch_size)

    @property
    def core(self) -> nn.Module:
        """The module that holds embeddings and blocks."""
        return self.model

    @property
    def config(self) -> Any:
        return self.core.config

    @property
    def in_channels(self) -> int:
        return read(self.core.embeddings, "in_channels", self.config.num_channels)

    def _convolution(self) -> nn.Conv2d | None:
        """The patch embedding's, also where something is wrapped around it: what LoRA adds comes after it."""
        return next((m for m in self.core.embeddings.modules() if isinstance(m, nn.Conv2d)), None)

    def _cast(
        self,
        images: Tensor,  # (N, in_channels, height, width)
    ) -> Tensor:  # (N, in_channels, height, width)
        """To the dtype of the patch embedding, as the models do."""
        found = self._convolution()
        weight = None if found is None else found.weight
        return images if weight is None or not weight.is_floating_point() else images.to(weight.dtype)

    def parts(self, block: nn.Module) -> BlockParts | str:
        return block_parts(block)

    def norm(self, tokens: Tensor) -> Tensor:
        found = self.final_norm()
        return tokens if found is None else found(tokens)

    def final_norm(self) -> nn.Module | None:
        return self.core.layernorm

    def checkpoint(self, block: nn.Module) -> Callable[..., Any] | None:
        wanted = getattr(block, "gradient_checkpointing", False) and block.training
        return block._gradient_checkpointing_func if wanted else None


class LearnedPositions(HuggingFace):
    """Families with learned positions in each slice, none along D, and at most a class token that has one.

    At another size than the trained one positions are interpolated, as the models do if they are asked to
    (``interpolate_pos_encoding=True``).
    """

    known: Contents  # of `embeddings`
    projection = "patch_embeddings.projection"  # in `embeddings`: the convolution
    cls = "cls_token"  # in `embeddings`; "" for none
    asked = True  # to interpolate, where a size is not the trained one; False: interpolates by itself, at any size
    antialias = resampled_in_float32 = False  # how they interpolate
    block_arguments: tuple[None, ...] = ()  # after the tokens

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.image_size = pair(self.config.image_size)  # (height, width) that positions were trained for
        self.has_cls = bool(self.cls)
        self.num_globals = int(self.has_cls)

    def check_image_size(self, height: int, width: int) -> None:
        patch_h, patch_w = self.patch_size
        fits = height % patch_h == 0 and width % patch_w == 0
        rows, columns = (n // p for n, p in zip(self.image_size, self.patch_size))
        interpolates = rows == columns and (not self.asked or isinstance(self.config.patch_size, int))
        # Sizes are compared last: under torch.compile that would make them constants.
        if (fits and interpolates) or self._is_trained(height, width):
            return
        super().check_image_size(height, width)
        raise ValueError(
            f"volume's slices must have the model's own size, {self.image_size[0]} x {self.image_size[1]} pixels, "
            f"got {height} x {width}: transformers interpolates positions only where the model's own grid of "
            f"patches is square, and its patch_size one number; it is {rows} x {columns}, {self.config.patch_size}"
        )

    def _is_trained(self, height: int, width: int) -> bool:
        """Whether positions are taken as they are."""
        return (height, width) == self.image_size and (self.asked or height == width)

    def embed(self, images: Tensor) -> Tensor:
        settings = {"interpolate_pos_encoding": not self._is_trained(*images.shape[2:])} if self.asked else {}
        return self._before_blocks(self._embedded(self._cast(images), settings))

    def _embedded(
        self,
        images: Tensor,  # (N, in_channels, height, width)
        settings: dict[str, Any],
    ) -> Tensor:  # (N, g + L, C)
        """All tokens, by the model's own embeddings."""
        return self.core.embeddings(images, **settings)

    def _before_blocks(
        self,
        tokens: Tensor,  # (N, rows, C)
    ) -> Tensor:  # (N, rows, C)
        """What else comes before the first block."""
        return tokens

    def embed_parts(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.core.embeddings
        if not self._is_known(found):
            return super().embed_parts(images)
        patches = projected(attrgetter(self.projection)(found), self._cast(images))
        return self.from_patches(patches, *images.shape[2:], inplace=False)

    def patch_projection(self) -> nn.Conv2d | None:
        found = self.core.embeddings
        return known_projection(attrgetter(self.projection)(found)) if self._is_known(found) else None

    def from_patches(self, patches: Tensor, height: int, width: int, inplace: bool) -> tuple[Tensor, Tensor]:
        found, g = self.core.embeddings, int(self.has_cls)
        positions = self._positions(found, patches, height, width)  # (1, g + L, C)
        patches, first = plus(patches, positions[:, g:], inplace), positions[:, :g]
        globals_ = first + getattr(found, self.cls) if self.cls else first
        if (registers := getattr(found, "register_tokens", None)) is not None:
            globals_ = torch.cat([globals_, registers], dim=1)
        return self._before_blocks(patches), self._before_blocks(globals_)

    def _is_known(self, found: nn.Module) -> bool:
        """Whether the embeddings do what `embed_parts` does, and nobody sees that they are not called."""
        if not made_of(found, self.known) or Part([found], [getattr(found, "dropout", None)]).why_not() is not None:
            return False
        holder = getattr(found, self.projection.split(".")[0])
        return "." not in self.projection or (made_of(holder, _PROJECTS) and why_called(holder) is None)

    def _positions(
        self,
        found: nn.Module,
        patches: Tensor,  # (N, L, C)
        height: int,
        width: int,
    ) -> Tensor:  # (1, g + L, C)
        """Of the class token and the patches of a slice."""
        if recorder() == "torch.export":
            return self._resampled(found, height, width)
        if self.asked and self._is_trained(height, width):
            return self._own_positions(found)
        counted = patches.new_empty(1, int(self.has_cls) + patches.shape[1], patches.shape[2])  # it looks at sizes
        return found.interpolate_pos_encoding(counted, height, width)

    def _resampled(
        self,
        found: nn.Module,
        height: int,
        width: int,
    ) -> Tensor:  # (1, g + L, C)
        """As the models interpolate; at the trained size these are the positions as they are.

        The models compare sizes first, which torch.export would make constants by.
        """
        (patch_h, patch_w), g, own = self.patch_size, int(self.has_cls), self._own_positions(found)
        trained = [n // p for n, p in zip(self.image_size, self.patch_size)]
        maps = own[:, g:].mT.unflatten(2, trained)  # (1, C, rows, columns)
        if self.resampled_in_float32:
            maps = maps.float()
        size = (height // patch_h, width // patch_w)
        maps = F.interpolate(maps, size, mode="bicubic", antialias=self.antialias)
        return torch.cat([own[:, :g], maps.flatten(2).mT.to(own.dtype)], dim=1)

    def _own_positions(self, found: nn.Module) -> Tensor:  # (1, g + L, C)
        return found.position_embeddings

    def positions(self) -> Tensor:
        return self._own_positions(self.core.embeddings)[0, int(self.has_cls) :]

    def call_block(self, block: nn.Module, tokens: Tensor, grid: tuple[int, ...], sincos: SinCos | None) -> Tensor:
        return block(tokens, *self.block_arguments)
