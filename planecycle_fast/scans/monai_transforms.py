"""MONAI's dictionary transforms for a lifted model's volumes. Needs MONAI: ``pip install 'planecycle-fast[monai]'``.

    from planecycle_fast.scans.monai_transforms import ToModelVolumed
    compose = Compose([LoadImaged("image", ensure_channel_first=True), ToModelVolumed("image", lifted, "-160,240")])
    loader = monai.data.DataLoader(monai.data.CacheDataset([{"image": path}], compose), batch_size=2)
    features = [lifted(batch["image"].as_tensor()) for batch in loader]

MONAI holds a scan as a MetaTensor (1, X, Y, Z), whose affine takes (x, y, z, 1) to millimetres, RAS+. Our volumes are
(C, D, H, W). Nothing is exchanged in silence: axes are turned to "SPR" by the affine, whichever way they ran, and the
MetaTensor that comes out has the affine of its own axes, so MONAI's transforms and writers place it rightly.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..inputs import check_one_of
from ..lifted import lifted_in
from ..optional import require
from ..weights.normalisation import normalisation_of
from .files import load_scan
from .grids import scaled, to_scan
from .orientation import AXIAL, LPS_TO_RAS, check_axes, spans_space, turned
from .preprocess import FITS, prepare
from .scan import Scan
from .windows import PERCENTILES, Window, as_spacing, as_window

require("monai", "monai")
from monai.config import KeysCollection  # noqa: E402
from monai.data import MetaTensor  # noqa: E402
from monai.transforms import InvertibleTransform, MapTransform  # noqa: E402
from monai.utils import MetaKeys, SpaceKeys, TraceKeys  # noqa: E402

UNKNOWN = "unknown"  # meta["axes"] of a scan whose file gives no orientation
_OURS = ("feature_affine", "padding", "axes", MetaKeys.AFFINE)  # of the meta, what a volume's differ in


class _Eachd(MapTransform):
    """What becomes of each key's value is what `_made` makes of it."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        d = dict(data)
        for key in self.key_iterator(d):
            d[key] = self._made(d[key], key)
        return d


class LoadScand(_Eachd):
    """Reads scans by `load_scan`, whatever it reads and refuses: a path becomes a MetaTensor (1, D, H, W), float32.

    Its affine takes (d, h, w, 1) to millimetres, RAS+; meta["axes"] says where D, H, W point, "SPR" by default, or
    "unknown", which `ToModelVolumed` takes as they are.

    Args:
        keys: of paths.
        allow_missing_keys: as of all of MONAI's.
        reading: arguments of `load_scan`, by name.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False, **reading: Any) -> None:
        super().__init__(keys, allow_missing_keys)
        self.reading = reading

    def _made(self, path: Any, key: Hashable) -> MetaTensor:  # (1, D, H, W)
        scan = load_scan(path, **self.reading)
        meta = {"filename_or_obj": str(path), "axes": scan.axes or UNKNOWN, MetaKeys.SPACE: SpaceKeys.RAS}
        return MetaTensor(scan.voxels[None], affine=torch.from_numpy(scan.affine), meta=meta)


class Windowd(_Eachd):
    """Intensities of (1, ...) tensors cut to a window, which becomes [0, 1]: `transforms.window` of any rank.

    Args:
        keys: of images of one channel.
        window: (LOW, HIGH), "-160,240", or percentiles of each image, "0.5%,99.5%".
        allow_missing_keys: as of all of MONAI's.
    """

    def __init__(
        self,
        keys: KeysCollection,
        window: Window | str | Sequence[float] = PERCENTILES,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.window = as_window(window)

    def _made(self, image: Any, key: Hashable) -> MetaTensor:  # (1, ...)
        image = _meta_tensor(image, key)
        cut = self.window.apply(image.as_tensor()[0].float())[None]
        return MetaTensor(cut, meta=image.meta, applied_operations=image.applied_operations)


class ToModelVolumed(_Eachd, InvertibleTransform):
    """A scan, MetaTensor (1, X, Y, Z), as the volume that a lifted model takes, MetaTensor (C, D, height, width).

    What `prepare` does, after turning axes: the same voxels give the same pixels, to the bit. Batched by a DataLoader
    they are (B, C, D, height, width); ``batch["image"].as_tensor()`` is the plain tensor. The meta have the affine of
    the pixels, `feature_affine` of the patches, `axes` and `padding`.

    Invertible: `Invertd` brings what the model made back to where the scan was, through all transforms before, from
    tensors (C', D, height, width) of pixels, or (C', D, height/patch, width/patch) of patches, such as
    ``features.patches.movedim(-1, 1)`` of a batch; linearly, or by the nearest cell with ``nearest_interp=True``.

    Args:
        keys: of scans.
        model: lifted, whose patch size, statistics and dtype are taken, or its patch size alone. It is not kept, so
            that workers need not copy it; pixels stay on the scan's device.
        window: None: voxels are in [0, 1] already, as of `Windowd` or ScaleIntensityRanged.
        spacing, fit, mean, std: as of `prepare`.
        axes: where D, H, W are to point; None: as the tensor has them, for arrays without orientation.
        allow_missing_keys: as of all of MONAI's.

    Raises as `prepare`; TypeError for no MetaTensor, ValueError for several channels.
    """

    def __init__(
        self,
        keys: KeysCollection,
        model: nn.Module | tuple[int, int],
        window: Window | str | Sequence[float] | None = PERCENTILES,
        spacing: str | float | Sequence[float] | None = None,
        fit: str = "pad",
        axes: str | None = AXIAL,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        check_one_of(fit, FITS, "fit")
        self.patch_size, self.dtype = model, torch.float32
        if not isinstance(model, (tuple, list)):
            lifted = lifted_in(model)
            self.patch_size = tuple(lifted.adapter.patch_size)
            self.dtype = next((p.dtype for p in lifted.parameters() if p.is_floating_point()), torch.float32)
            if mean is None and std is None:
                mean, std = normalisation_of(lifted.adapter.model, lifted.adapter.in_channels)
        self.window = None if window is None else as_window(window)
        self.spacing = None if spacing is None else as_spacing(spacing)
        self.axes = None if axes is None else check_axes(axes)
        self.fit, self.mean, self.std = fit, mean, std

    def _made(self, image: Any, key: Hashable) -> MetaTensor:
        """Of (1, X, Y, Z): (C, D, height, width)."""
        image = _meta_tensor(image, key)
        affine, axes = _ras(image), self.axes
        voxels = image.as_tensor()[0].detach().float()
        if axes is None or image.meta.get("axes") == UNKNOWN:
            scan = Scan(voxels, affine)
        else:
            where = voxels.device
            array, its = turned(voxels.cpu().numpy(), affine, axes)
            scan = Scan(torch.from_numpy(np.ascontiguousarray(array)).to(where), its, axes)
        given = prepare(scan, self.patch_size, self.window, self.spacing, self.fit, self.mean, self.std)
        meta = {name: value for name, value in image.meta.items() if name != MetaKeys.AFFINE} | {
            "axes": scan.axes or UNKNOWN,
            "padding": given.padding,
            "feature_affine": torch.from_numpy(given.feature_affine()),
            MetaKeys.SPACE: SpaceKeys.RAS,
        }
        out = MetaTensor(given.pixels[0].to(self.dtype), affine=torch.from_numpy(given.affine), meta=meta)
        out.applied_operations = list(image.applied_operations)
        info = {
            "mode": "bilinear",  # Invertd writes "nearest" here where it is asked to
            "pixels": torch.from_numpy(given.affine),
            "size": tuple(given.image.shape),
            "turned": torch.from_numpy(scan.affine),
            "turned_size": tuple(scan.voxels.shape),
            "before": torch.from_numpy(affine),
            "meta": {name: image.meta[name] for name in ("axes", MetaKeys.SPACE) if name in image.meta},
            "affine": image.affine.clone(),
        }
        return self.push_transform(out, orig_size=tuple(image.shape[1:]), extra_info=info)

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """What the model made of the volumes, on the grids of the scans."""
        d = dict(data)
        for key in self.key_iterator(d):
            trace = self.pop_transform(d[key])
            d[key] = self._back(d[key], trace[TraceKeys.EXTRA_INFO], str(key))
        return d

    def _back(self, made: MetaTensor, info: Mapping[str, Any], key: str) -> MetaTensor:
        """Of (C', D, height, width), pixels or patches: (C', X, Y, Z)."""
        values, size = made.as_tensor().movedim(0, -1), tuple(info["size"])
        patches = (size[0], size[1] // self.patch_size[0], size[2] // self.patch_size[1])
        affine = info["pixels"].numpy()
        if tuple(values.shape[:3]) == patches:
            affine = affine @ scaled((1, *self.patch_size))
        elif tuple(values.shape[:3]) != size:
            raise ValueError(
                f"{key} must have the volume's size, {size}, or that of its patches, {patches}, to go back to the "
                f"scan, got {tuple(values.shape[:3])}"
            )
        mode = "nearest" if info["mode"] == "nearest" else "linear"
        if mode == "linear" and not values.is_floating_point():
            values = values.float()
        its = info["turned"].numpy()
        back = to_scan(values, affine, Scan(torch.zeros(()).expand(info["turned_size"]), its), mode)
        turn = np.rint(np.linalg.inv(info["before"].numpy()) @ its)[:3, :3]  # a signed permutation: rows are old axes
        order = [int(abs(row).argmax()) for row in turn]
        back = back.flip([axis for axis in range(3) if turn[:, axis].sum() < 0]).permute(3, *order)
        meta = {name: value for name, value in made.meta.items() if name not in _OURS}
        meta |= info["meta"]
        return MetaTensor(
            back.contiguous(), affine=info["affine"], meta=meta, applied_operations=made.applied_operations
        )


def _meta_tensor(image: Any, key: Hashable) -> MetaTensor:  # (1, ...)
    if not isinstance(image, MetaTensor):
        raise TypeError(f"{key} must be a MetaTensor, as of LoadImaged or LoadScand, got {type(image).__name__}")
    if image.ndim != 4 or image.shape[0] != 1 or image.numel() == 0:
        raise ValueError(f"{key} must have one channel and three axes, (1, X, Y, Z), got {tuple(image.shape)}")
    return image


def _ras(image: MetaTensor) -> np.ndarray:  # (4, 4)
    """The affine of a MetaTensor to millimetres in RAS+."""
    affine = image.affine.as_subclass(torch.Tensor).cpu().double().numpy().copy()
    if affine.shape != (4, 4) or not spans_space(affine):
        raise ValueError(f"affine must be (4, 4) with axes that span space, got {affine.tolist()}")
    return LPS_TO_RAS @ affine if image.meta.get(MetaKeys.SPACE) == SpaceKeys.LPS else affine
