"""What a sliding window changes in the features of the MNI152 brain: ``python examples/sliding_window.py``, a table.

Needs what `make demo` installs. The table is in docs/pipelines.md. Minutes on two cores.
"""

import torch
import torch.nn.functional as F

import planecycle_fast as pcf
from planecycle_fast.commands.demo import mni152
from planecycle_fast.runtime.torchvision_fix import mend_torchvision
from planecycle_fast.scans.viz import foreground
from planecycle_fast.weights.load import DEMO_MODEL

WINDOWS = ((16, 196, 168), (8, 196, 168), (32, 112, 112), (16, 112, 112))  # of a volume of 32 x 196 x 168 pixels


def main() -> None:
    mend_torchvision()
    lifted = pcf.lift(pcf.load_model(DEMO_MODEL)[0])
    given = pcf.prepare(pcf.load_scan(mni152()), lifted, spacing=(6, 1.2, 1.2))
    with torch.inference_mode():
        whole = lifted(given.pixels)
    brain = foreground(given.image, whole.patches.shape[1:4])
    print("window          overlap  blend     cosine to the whole: patches, pooled")
    for window in WINDOWS:
        for overlap, blend in ((0, "constant"), (0.25, "constant"), (0.25, "linear"), (0.25, "gaussian")):
            features = pcf.sliding_window(lifted, given.pixels, window, overlap=overlap, blend=blend)
            patches = F.cosine_similarity(features.patches, whole.patches, dim=-1)[0][brain].mean()
            pooled = F.cosine_similarity(features.pooled(), whole.pooled())[0]
            size = " x ".join(map(str, window))
            print(f"{size:15} {overlap:<8} {blend:9} {patches:.3f}, {pooled:.3f}", flush=True)


if __name__ == "__main__":
    main()
