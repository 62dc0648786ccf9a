"""From a scan to features and back: ``python examples/features_of_a_scan.py [SCAN [MODEL]]``.

By default the MNI152 brain and the demo's DINOv2, for which it needs what `make demo` installs. Which place looks most
like one in the left hemisphere? The same place in the right one.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F

import planecycle_fast as pcf
from planecycle_fast.commands.demo import mni152
from planecycle_fast.weights.load import DEMO_MODEL

PLACE = np.array((-36.0, -34.0, 42.0))  # millimetres, RAS+: to the right, forward, up
FAR = 30.0  # millimetres


def main(path: str, name: str = DEMO_MODEL) -> None:
    model, source = pcf.load_model(name)
    lifted = pcf.lift(model)
    scan = pcf.load_scan(path)
    given = pcf.prepare(scan, lifted, spacing=(8, 1, 1))  # slices of 8 mm, pixels of 1 mm: (1, 3, D, height, width)
    with torch.inference_mode():
        patches = lifted(given.pixels).patches[0]  # (D, H, W, C)
    patches = F.normalize(patches - patches.mean((0, 1, 2)), dim=-1)

    affine = given.feature_affine()  # from the index of a patch to millimetres
    here = tuple(np.rint(np.linalg.inv(affine) @ (*PLACE, 1)).astype(int)[:3])
    alike = patches @ patches[here]  # (D, H, W), cosines
    places = np.moveaxis(np.indices(alike.shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]  # (D, H, W, 3)
    near = torch.from_numpy(np.linalg.norm(places - PLACE, axis=-1) < FAR)
    best = np.unravel_index(int(alike.masked_fill(near, -1).argmax()), alike.shape)
    print(f"{source}; {' x '.join(map(str, alike.shape))} patches")
    print(f"most like {PLACE.round().tolist()} mm, {FAR:.0f} mm away or more: {places[best].round().tolist()} mm")

    overlay = pcf.to_scan(alike, affine, scan)  # the cosines in each voxel of the scan
    print(f"on the scan's own grid: {' x '.join(map(str, overlay.shape))} voxels")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [mni152()]))
