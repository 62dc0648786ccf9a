"""Settings of every test process."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from planecycle_fast.torchvision_fix import mend_torchvision

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test may depend on a network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
mend_torchvision()
torch.set_num_threads(1)  # one process per core

settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
