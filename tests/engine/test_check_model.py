"""The test bed of whole models allows what is not deterministic on a GPU by name, and nothing else; needs no GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("timm", reason="needs timm and transformers, whose models it runs")
pytest.importorskip("transformers", reason="needs timm and transformers, whose models it runs")
pytest.importorskip("triton", reason="needs triton, to import the test bed")

from ..host_models import BY_NAME, HOSTS
from ..kernelcheck import models
from ..kernelcheck.interpreter import poisoned

aten = torch.ops.aten


class AsOnAGpu(TorchDispatchMode):
    """Refuses gradients of resized images as torch does on a GPU (aten/src/ATen/native/cuda/UpSample*.cu)."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if "upsample" in name and "backward" in name:
            self.seen = function
            if torch.are_deterministic_algorithms_enabled():
                raise RuntimeError(f"{name} does not have a deterministic implementation")
        return function(*args, **kwargs or {})


class Put(torch.autograd.Function):
    """Its gradient is by `put_`, which torch refuses on every device where it asks for determinism."""

    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad).put_(torch.tensor([1]), grad[:1])


def test_other_operations_stay_refused():
    assert gradient_of_put(models.Allowing((aten.put_.default,)))[1] == 1
    for allowed in (models.Allowing(), models.Allowing((aten.put.default, aten.index_put_.default))):
        with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
            gradient_of_put(allowed)
    assert not torch.are_deterministic_algorithms_enabled()


def gradient_of_put(allowed):
    x = torch.ones(3, requires_grad=True)
    with poisoned(), allowed:
        (gradient,) = torch.autograd.grad(Put.apply(x).sum(), x)
        assert torch.are_deterministic_algorithms_enabled()  # again
        return gradient


@pytest.mark.parametrize("host", [host for host in HOSTS if not host.rope], ids=lambda host: host.name)
def test_hosts_that_resize_position_encodings_have_gradients_on_a_gpu(host):
    model, volume = host.make(), host.volume(batch=1, depth=2, grid=(2, 3))
    with AsOnAGpu() as gpu:
        found = models.results(model, volume, {}, "reference")
    assert gpu.seen in models.NOT_DETERMINISTIC
    assert any("gradient of" in name and "pos" in name for name in found)


@pytest.mark.parametrize("name", ["hf-dinov2", "hf-dinov2-registers"])  # resized without antialiasing, and with it
def test_each_of_them_is_needed(name, monkeypatch):
    host = BY_NAME[name]
    model, volume = host.make(), host.volume(batch=1, depth=2, grid=(2, 3))
    with AsOnAGpu() as gpu:
        models.results(model, volume, {}, "reference")
        others = [operation for operation in models.NOT_DETERMINISTIC if operation is not gpu.seen]
        monkeypatch.setattr(models.Allowing.__init__, "__defaults__", (others,))
        with pytest.raises(RuntimeError, match="bicubic2d.*_backward does not have a deterministic implementation"):
            models.results(model, volume, {}, "reference")
