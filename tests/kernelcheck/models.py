"""Whole models on kernels: outputs and all gradients, and whether they are within the budget of the reference."""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import planecycle_fast as pcf

from .budget import check_all, reference_errors
from .interpreter import poisoned

# Position encodings of DINOv2 are resized by these, whose gradients torch sums in any order on a GPU. Nothing else may.
NOT_DETERMINISTIC = (
    torch.ops.aten.upsample_bicubic2d_backward.default,
    torch.ops.aten._upsample_bicubic2d_aa_backward.default,
)
LAYERS = 3  # of a model that run


class Allowing(TorchDispatchMode):
    """Within it these operations run where torch asks for determinism (`poisoned`), which they refuse on a GPU."""

    def __init__(self, operations=NOT_DETERMINISTIC):
        super().__init__()
        self.operations = operations

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in self.operations:
            return function(*args, **kwargs or {})
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)
        try:
            return function(*args, **kwargs or {})
        finally:
            torch.use_deterministic_algorithms(before)


def results(model, volume, settings, backend, attention="auto"):
    """Features and gradients by name, of the volume and of every parameter that has one."""
    lifted = pcf.lift(model, backend=backend, attention=attention, **settings)
    volume = volume.detach().requires_grad_()
    with poisoned():
        features = lifted.intermediate(volume, [min(LAYERS, len(lifted.blocks)) - 1])[0]
        found = {name: t for name, t in features._asdict().items() if t is not None}
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in found.values()]
        leaves = {"volume": volume} | {name: p for name, p in model.named_parameters() if p.requires_grad}
        with Allowing():
            gradients = torch.autograd.grad(list(found.values()), list(leaves.values()), grads, allow_unused=True)
    made = {f"gradient of {name}": g for name, g in zip(leaves, gradients) if g is not None}
    return {name: t.detach() for name, t in found.items()} | made


def check_model(host, settings, dtype, device="cpu", shape=(1, 3, (2, 5)), backend="triton", attention="auto"):
    """Raises BudgetError where a host lifted with a backend is further from float64 than it may be.

    Args:
        shape: batch, depth and (H, W) in tokens.
    """
    batch, depth, grid = shape
    model = host.make().to(device, dtype)
    wide = copy.deepcopy(model).double()
    size = host.volume(batch=batch, depth=depth, grid=grid).shape

    def volume(seed):
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)

    exact, largest = reference_errors(
        lambda seed: (
            results(model, volume(seed), settings, "reference"),
            results(wide, volume(seed).double(), settings, "reference"),
        )
    )
    check_all(results(model, volume(0), settings, backend, attention), exact, largest)
