"""CUDA graphs: what cannot be captured says why. Capture itself is tested on GPUs, in test_gpu_models.py."""

import pytest
import torch

import planecycle_fast as pcf

from ..toy import ToyViT, toy_lift

VOLUME = torch.zeros(1, 3, 2, 4, 6)


@pytest.mark.parametrize(
    "model, volume, error, message",
    [
        (lambda v: v, VOLUME, TypeError, "model must be a torch.nn.Module, got function"),
        (toy_lift(ToyViT()), [0.0], TypeError, "volume must be a tensor, got list"),
        (toy_lift(ToyViT()).eval(), VOLUME, ValueError, "volume must be on a CUDA device to be captured .*, got cpu"),
    ],
    ids=["model", "volume", "device"],
)
def test_bad_input(model, volume, error, message):
    with pytest.raises(error, match=message):
        pcf.cuda_graph(model, volume)
