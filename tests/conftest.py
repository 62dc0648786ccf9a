"""Settings of every test process."""

import os

import pytest
import torch

from planecycle_fast import use_backend

from . import peers, standins

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may depend on a network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
torch.set_num_threads(1)  # one process per core

try:
    from hypothesis import HealthCheck, settings
except ModuleNotFoundError:  # tests/gpu/test_gpu.py runs without
    pass
else:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    settings.register_profile("default", deadline=None, print_blob=True, suppress_health_check=slow)
    settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def on_reference():
    """Where results are compared bit for bit: "auto" is pure PyTorch, which runs a host's own operations."""
    with use_backend("reference"):
        yield


SOURCES = [  # of models of the authors' code
    "stand-in",
    pytest.param("authors", marks=peers.needs_planecycle),
]


@pytest.fixture(params=SOURCES)
def build(request):
    """A function that makes a model of a block type, converted by the converter of the same source."""

    def make(block_type="PlaneCycle", cycle_order=("HW", "DW", "DH", "HW"), pool_method="PCg", **settings):
        if request.param == "stand-in":
            model, converter = standins.DinoVisionTransformer(block_type, **settings), standins.Converter
        else:
            small = dict(embed_dim=64, num_heads=1 if block_type == "Flatten3D" else 2, depth=5, patch_size=4)
            small |= dict(n_storage_tokens=4, pos_embed_rope_dtype="fp32", pos_embed_rope_rescale_coords=2.0)
            if settings.pop("swiglu", False):
                settings["ffn_layer"] = "swiglu"
            model_class, converter = peers.authors()
            model = peers.randomise(model_class(block_type=block_type, layerscale_init=0.3, **(small | settings)))
        if block_type == "PlaneCycle":
            model = converter(cycle_order=cycle_order, pool_method=pool_method)(model)
        return model.eval()

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Of `planecycle-fast features`: a folder with a small DINOv3, and the statistics of its images."""
    from .saved_models import with_statistics

    return with_statistics(tmp_path_factory.mktemp("model"), layers=4)


@pytest.fixture
def run(model, tmp_path, monkeypatch, capsys):
    """Runs `features` in tmp_path: status, lines of stdout, lines of stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*arguments):
        from planecycle_fast.commands.cli import main

        status = main(["features", "--model", model, *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out.splitlines(), captured.err.splitlines()

    return command
