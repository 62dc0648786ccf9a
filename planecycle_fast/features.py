"""What a lifted model returns."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import _register_namedtuple


class VolumeFeatures(NamedTuple):
    """Features of a batch of volumes, in canonical order whatever plane the layer looked along.

    S, the number of sets of globals per volume, is D by default, 1 for flatten3d, and the slices P of
    the layer's plane under ``globals_at="plane"``.
    """

    patches: Tensor  # (B, D, H, W, C)
    cls: Tensor | None  # (B, S, C), None for a model without a class token
    registers: Tensor | None  # (B, S, r, C), None for a model without register tokens

    @property
    def maps(self) -> Tensor:  # (B, C, D, H, W)
        """The patches as convolutions take them, a view."""
        return self.patches.movedim(-1, 1)

    def pooled(self) -> Tensor:
        """One vector per volume, (B, C): the mean class token, or the mean patch where there is none."""
        if self.cls is not None:
            return self.cls.mean(1)
        return self.patches.mean((1, 2, 3))


def named_in_programs(kind: type[tuple[Any, ...]]) -> None:
    """Makes a NamedTuple one that torch.export.save writes; torch.export.load says what to import if it is missing."""
    _register_namedtuple(kind, serialized_type_name=f"planecycle_fast.{kind.__name__} (import planecycle_fast)")


named_in_programs(VolumeFeatures)
