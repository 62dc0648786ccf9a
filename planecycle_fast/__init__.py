"""PlaneCycle, fast: pretrained 2D networks on 3D volumes, without training.

    import planecycle_fast as pcf
    lifted = pcf.lift(model)         # a Hugging Face or timm vision transformer
    features = lifted(volume)        # (B, 3, D, height, width) -> VolumeFeatures

See the README, or the docstrings of `lift`, `LiftedModel` and `plane_cycle`.
"""

from . import ops, transforms
from .accelerate import accelerate, restore
from .adapters import Adapter
from .backends import backends, use_backend
from .blocks import LiftedBlock
from .checkpoints import convert_state_dict
from .converter import PlaneCycleConverter
from .exporting import export_model
from .feature_files import load_features
from .features import VolumeFeatures
from .graphs import cuda_graph
from .grids import to_scan
from .layer import Stream
from .lift import lift, unlift
from .lifted import LiftedModel
from .models import load_model
from .operator import plane_cycle
from .preprocess import prepare
from .pretrained import from_pretrained
from .pyramid import pyramid
from .scan_files import load_scan
from .sliding import sliding_window
from .torchvision_fix import watch_torchvision
from .version import __version__
from .volume_lists import map_volumes
from .volumes import Scan

watch_torchvision()

__all__ = [
    "Adapter",
    "LiftedBlock",
    "LiftedModel",
    "PlaneCycleConverter",
    "Scan",
    "Stream",
    "VolumeFeatures",
    "__version__",
    "accelerate",
    "backends",
    "convert_state_dict",
    "cuda_graph",
    "export_model",
    "from_pretrained",
    "lift",
    "load_features",
    "load_model",
    "load_scan",
    "map_volumes",
    "ops",
    "plane_cycle",
    "prepare",
    "pyramid",
    "restore",
    "sliding_window",
    "to_scan",
    "transforms",
    "unlift",
    "use_backend",
]
