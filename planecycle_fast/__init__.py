"""PlaneCycle, fast: pretrained 2D networks on 3D volumes, without training.

    import planecycle_fast as pcf
    lifted = pcf.lift(model)         # a Hugging Face or timm vision transformer
    features = lifted(volume)        # (B, 3, D, height, width) -> VolumeFeatures

See the README, or the docstrings of `lift`, `LiftedModel` and `plane_cycle`.

Packages and root modules, the lowest first; each imports only those above it in this list (tests/test_import_order.py),
and has a docstring that says where to start reading:

    optional, version, features   packages that may lack; versions; what a lifted model returns
    runtime                       which implementation runs here, and building it
    geometry                      where each token lies on each plane
    ops                           one folder per operation: reference, Triton, C++
    hosts                         what we know of each family of 2D models
    inputs                        checks that everything which takes a volume makes
    engine, weights               one pass of blocks on the stream; models by name
    operator, lifted              `plane_cycle`; `lift`, `LiftedModel` and `unlift`
    pretrained, authors, cost     folders of lifted models; the authors' models; counting before running
    scans                         scans in, features out
    export, bench                 files that run without us; the timing suite
    commands                      one file per verb of `planecycle-fast`
"""

import importlib
from types import ModuleType

from . import ops
from .authors.accelerate import accelerate, restore
from .authors.converter import PlaneCycleConverter
from .engine.cuda_graphs import cuda_graph
from .engine.graph_store import GraphOptions
from .engine.lifted_block import LiftedBlock
from .engine.stream import Stream
from .export.exporting import export_model
from .features import VolumeFeatures, pyramid
from .hosts import Adapter
from .lifted import LiftedModel, lift, unlift
from .moved import MOVED, find_moved
from .operator import plane_cycle
from .pretrained import from_pretrained
from .runtime.backends import backends, use_backend
from .runtime.torchvision_fix import watch_torchvision
from .scans import transforms
from .scans.feature_files import load_features
from .scans.files import load_scan
from .scans.grids import to_scan
from .scans.preprocess import prepare
from .scans.scan import Scan
from .scans.sliding import sliding_window
from .scans.volume_lists import map_volumes
from .version import __version__
from .weights.checkpoints import convert_state_dict
from .weights.load import load_model

watch_torchvision()
find_moved()

__all__ = [
    "Adapter",
    "GraphOptions",
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


def __getattr__(name: str) -> ModuleType:
    """Modules by their old names, see `moved`."""
    if name in MOVED:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
