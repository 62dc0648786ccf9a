"""The module that `lift` makes: the 2D model's own parts, run along the planes of a volume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from torch import Tensor, nn

from .adapters import Adapter
from .features import VolumeFeatures
from .inputs import check_volume, wanted_layers
from .ops import plane_switch
from .planes import HW, Plane, Sizes, permutation
from .pooling import transition
from .rope import PlaneTables

_SHARED = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class LiftedModel(nn.Module):
    """A 2D model that takes volumes. Made by `lift`; attributes it lacks are those of the 2D model.

    Blocks are called once per layer with tokens in plane order, ``(B*P, g + L, C)``: that is what
    forward hooks on a block see. See `planecycle_fast.planes` for the order of each plane.
    """

    def __init__(
        self,
        adapter: Adapter,
        mode: str,
        planes: tuple[Plane, ...],
        pool_method: str,
        globals_at: str,
        backend: str,
    ) -> None:
        super().__init__()
        host = adapter.model
        # Sharing the dictionaries themselves is what makes both models one: keys, Parameter objects,
        # replaced submodules (LoRA) and assigned parameters are the same in both, copies included.
        for shared in _SHARED:
            self.__dict__[shared] = host.__dict__[shared]
        # Past nn.Module.__setattr__: a child of the host may have the same name, and keeps it.
        self.__dict__.update(
            adapter=adapter, mode=mode, planes=planes, pool_method=pool_method, globals_at=globals_at, backend=backend
        )

    @property
    def training(self) -> bool:
        """Shared with the 2D model, like everything else."""
        return self.adapter.model.training

    @training.setter
    def training(self, mode: bool) -> None:
        if "adapter" in self.__dict__:  # not yet while nn.Module.__init__ runs
            self.adapter.model.training = mode

    @property
    def cycle_order(self) -> tuple[str, ...]:
        """Names of the planes that the layers take in turn."""
        return tuple(plane.name for plane in self.planes)

    @property
    def blocks(self) -> Any:
        """The layers, first to last."""
        return self.adapter.blocks

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property of ours raised AttributeError: show that error
            return object.__getattribute__(self, name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "adapter" not in self.__dict__ or name.startswith("__"):
                raise
        return getattr(self.adapter.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        host = self.__dict__["adapter"].model if "adapter" in self.__dict__ else None
        if host is not None and name in host.__dict__ and name not in self.__dict__ and name != "training":
            setattr(host, name, value)  # what one reads through the lifted model, one sets through it
        else:
            super().__setattr__(name, value)

    def train(self, mode: bool = True) -> LiftedModel:
        self.adapter.model.train(mode)  # hosts override this, to keep norms frozen for example
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LiftedModel:
        host = self.adapter.model  # hosts override this too, to keep buffers in fp32 for example
        host._apply(fn) if recurse else host._apply(fn, recurse=False)
        return self

    def _replicate_for_data_parallel(self) -> LiftedModel:
        raise TypeError("a lifted model cannot be replicated by DataParallel; use DistributedDataParallel")

    def extra_repr(self) -> str:
        order = ",".join(self.cycle_order)
        return f"mode={self.mode}, cycle_order={order}, pool_method={self.pool_method}, globals_at={self.globals_at}"

    def forward(
        self,
        volume: Tensor,  # (B, 3, D, height, width), pixels
    ) -> VolumeFeatures:
        """Features of the last layer after the model's final norm.

        Raises:
            TypeError: volume is not a floating-point tensor.
            ValueError: wrong rank, channels or size, an empty volume, or another device or dtype than
                the model's.
        """
        sizes = self._check(volume)
        return self._run(volume, sizes, {len(self.blocks) - 1}, norm=True)[0]

    def intermediate(
        self,
        volume: Tensor,  # (B, 3, D, height, width), pixels
        n: int | Sequence[int] = 1,
        norm: bool = True,
    ) -> list[VolumeFeatures]:
        """Features after several layers, in layer order.

        Args:
            volume: as for `forward`.
            n: how many of the last layers, or the indices of layers (negative ones count from the end).
            norm: apply the model's final norm to each.

        Raises ValueError for layers that the model lacks, and whatever `forward` raises.
        """
        sizes = self._check(volume)
        return self._run(volume, sizes, wanted_layers(n, len(self.blocks)), norm)

    def _run(self, volume: Tensor, sizes: Sizes, wanted: set[int], norm: bool) -> list[VolumeFeatures]:
        """Runs the layers up to the last one wanted; the features after each one wanted."""
        tables = PlaneTables(self.adapter.rope(volume.dtype), self.training, len(self.planes[0].sequence))
        images = volume.transpose(1, 2).flatten(0, 1)  # (B*D, 3, height, width)
        tokens, plane = self.adapter.embed(images), HW  # (B*P, g + L, C) from here on
        features = []
        for i, block in enumerate(islice(self.blocks, max(wanted) + 1)):
            following = self.planes[i % len(self.planes)]
            tokens, plane = self._switch(tokens, plane, following, sizes), following
            grid = plane.grid(sizes)
            tokens = self.adapter.call_block(block, tokens, grid, tables.for_block(grid))
            if i in wanted:
                features.append(self._features(tokens, plane, sizes, norm))
        return features

    def _switch(self, tokens: Tensor, old: Plane, new: Plane, sizes: Sizes) -> Tensor:
        m = transition(old.slices(sizes), new.slices(sizes), sizes[0], self.pool_method, self.globals_at)
        return plane_switch(tokens, old, new, sizes, self.adapter.num_globals, m, self.backend)

    def _features(self, tokens: Tensor, plane: Plane, sizes: Sizes, norm: bool) -> VolumeFeatures:
        """Canonical features of tokens (B*P, g + L, C) in the order of `plane`."""
        g = self.adapter.num_globals
        if self.globals_at == "depth":  # pool the residual, before the norm
            back = transition(plane.slices(sizes), sizes[0], sizes[0])
            tokens, plane = plane_switch(tokens, plane, HW, sizes, g, back, self.backend), HW
        if norm:
            tokens = self.adapter.norm(tokens)
        tokens = tokens.unflatten(0, (-1, plane.slices(sizes)))  # (B, S, g + L, C)
        patches = tokens[:, :, g:].reshape(-1, *plane.ordered(sizes), tokens.shape[-1])
        registers = tokens[:, :, int(self.adapter.has_cls) : g]
        return VolumeFeatures(
            patches=patches.permute(permutation(plane, HW)),
            cls=tokens[:, :, 0] if self.adapter.has_cls else None,
            registers=registers if registers.shape[2] else None,
        )

    def _check(self, volume: Tensor) -> Sizes:
        """Validates the volume; returns its size (D, H, W) in tokens."""
        check_volume(volume, self.adapter.in_channels, self)
        self.adapter.check_image_size(*volume.shape[3:])
        patch_h, patch_w = self.adapter.patch_size
        return volume.shape[2], volume.shape[3] // patch_h, volume.shape[4] // patch_w
