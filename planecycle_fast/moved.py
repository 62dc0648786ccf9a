"""Names that modules had before they lay in packages: they import the same modules, and files pickled with them load.

"lift", "accelerate", "backends" and "pyramid" (in `features` now) are not among them: importing these would hide the
functions.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGE = __name__.rpartition(".")[0]
# By new package: old names, "old:new" where the file is called otherwise now. What is within them moved along.
_MOVED = {
    "geometry": "planes pooling rope",
    "runtime": "attentions compiling native torchvision_fix tracing",
    "": "adapters:hosts benchmark:bench",
    "hosts": "adapters.base:adapter buffers parts placement reading:description wrapped",
    "weights": "checkpoints hub loaded_keys lora models:load normalisation timm_models",
    "engine": "attention_maps blocks:lifted_block depth_position finite framework_class graphs:cuda_graphs "
    "layer:stream module_tree report shared_module taps",
    "authors": "accelerated converter",
    "scans": "extract:extraction feature_files grids monai_transforms preprocess progress scan_checks:checks "
    "scan_files:files scan_options:checks sliding transforms viz volume_lists volume_sets volumes:scan windows",
    "scans.formats": "dicom_series",
    "cost": "gpus meter planning traffic",
    "commands": "cli demo info plan_table:plan verify",
}
MOVED = {
    old: f"{package}.{new or old}".strip(".")
    for package, names in _MOVED.items()
    for old, _, new in [name.partition(":") for name in names.split()]
}


def new_name(old: str) -> str | None:
    """The full name of the module that had an old one, or None where nothing moved."""
    within = old.removeprefix(f"{PACKAGE}.")
    for known in sorted(MOVED, key=len, reverse=True) if within != old else ():
        if within == known or within.startswith(f"{known}."):
            return f"{PACKAGE}.{MOVED[known]}{within[len(known) :]}"
    return None


class MovedFinder(MetaPathFinder, Loader):
    """Finds old names, and nothing else."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if new_name(name) is None else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        name = new_name(spec.name)
        assert name is not None  # `find_spec` has said so
        module = importlib.import_module(name)
        self._own = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own  # importing has put the old name's in its place


def find_moved() -> None:
    """Makes old names importable, once."""
    if not any([isinstance(finder, MovedFinder) for finder in sys.meta_path]):
        sys.meta_path.insert(0, MovedFinder())  # ahead of folders that old versions left behind
