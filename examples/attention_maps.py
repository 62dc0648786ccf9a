"""Where DINOv2 looks in the MNI152 brain, layer by layer: ``python examples/attention_maps.py`` writes a picture.

Needs what `make demo` installs. The picture is docs/attention.png, the text about it docs/attention.md.
"""

import sys

import torch

import planecycle_fast as pcf
from planecycle_fast.commands.demo import mni152
from planecycle_fast.runtime.torchvision_fix import mend_torchvision
from planecycle_fast.scans.files import load_scan
from planecycle_fast.scans.preprocess import PERCENTILES
from planecycle_fast.scans.scan import model_input
from planecycle_fast.scans.viz import attention_picture
from planecycle_fast.weights.load import DEMO_MODEL, load_model

LAYERS, PATCH = (9, 10, 11), (14, 16, 8)  # of the planes DW, DH, HW; a patch in the left hemisphere


def main(path: str) -> None:
    mend_torchvision()
    scan = load_scan(mni152())
    image = PERCENTILES.apply(scan.voxels)  # (D, H, W) in [0, 1]
    model, note = load_model(DEMO_MODEL)
    lifted = pcf.lift(model)
    volume = model_input(image, scan.spacing, lifted.adapter.patch_size, size=448)
    with torch.inference_mode():
        maps = lifted.attention_maps(volume, LAYERS, PATCH)
    title = f"attention, heads averaged, on the plane of each layer\n{note}"
    attention_picture(maps, image, path, title, PATCH, axes="SPR")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "attention.png")
